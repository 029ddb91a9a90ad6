"""Hugging Face directories in and out: safetensors only, tensor by tensor, never a second copy of the model.

Reading opens a file anew for each slice: its pages are mapped memory, and closing is what gives them back.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from drift_jax.errors import ModelError, StageError
from drift_jax.models.architecture import QwenConfig, load_hf_config, qwen_config_from_hf
from drift_jax.models.qwen import Declared, declare_qwen, is_declared, param_shardings
from drift_jax.sharding import Layout

# What a model directory holds besides weights. config.json is rewritten, the others are copied as they are.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
LOADABLE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Progress = Callable[[int, int], None]  # (bytes of this tensor, bytes of all)


def resolve_model(path: str, revision: str | None = None) -> Path:
    """A local directory as it is; a hub id is downloaded (safetensors, configs and tokenizer files only).

    Raises:
      ModelError: there is neither a directory nor an answer from the hub.
    """
    local = Path(path)
    if local.is_dir():
        return local
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(f"no model directory at {path}. Give a Hugging Face directory or a hub id (org/name).")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.safetensors.index.json", *COMPANION_FILES, "config.json"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"{path} is no directory here, and the hub did not give it ({type(error).__name__}: {error}). "
            "Check the name and the network, or download the model and pass its directory."
        ) from None


@dataclass(frozen=True)
class WeightFiles:
    """Which file holds which tensor, its shape and its dtype; opened and checked, nothing read yet."""

    where: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @staticmethod
    def open(model_dir: Path) -> WeightFiles:
        """Raises `ModelError` for a directory without safetensors, a truncated file or an odd dtype."""
        files = _weight_file_names(model_dir)
        where: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            try:
                with safe_open(path, framework="numpy") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  (not a dict)
                        piece = tensors.get_slice(name)
                        if piece.get_dtype() not in LOADABLE_DTYPES:
                            raise ModelError(
                                f"{path}: tensor {name} is {piece.get_dtype()}; only "
                                f"{', '.join(LOADABLE_DTYPES.values())} can be loaded (no quantised weights)."
                            )
                        where[name], shapes[name] = path, tuple(piece.get_shape())
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path} is not a whole safetensors file ({error}): {path.stat().st_size} bytes on disk. "
                    "Download or copy it again."
                    if path.exists()
                    else f"{path} is named by the index file but missing. Download it again."
                ) from None
        return WeightFiles(where, shapes)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        with safe_open(self.where[name], framework="numpy") as tensors:
            return tensors.get_slice(name)[index]


def _weight_file_names(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index ({error!r}). Download it again.") from None
        return [model_dir / name for name in names]
    files = sorted(model_dir.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for p in model_dir.glob("*.bin")) + sorted(p.name for p in model_dir.glob("*.pt*"))
    found = f" It holds {', '.join(pickles)}: pickles can run code and are never opened." if pickles else ""
    raise ModelError(
        f"no .safetensors file in {model_dir}.{found} "
        "Save the model with transformers' save_pretrained, which writes safetensors."
    )


def load_qwen_config(model_dir: Path) -> QwenConfig:
    return qwen_config_from_hf(load_hf_config(model_dir), source=str(model_dir / "config.json"))


def load_params(
    model_dir: Path, layout: Layout, dtype: str = "float32", progress: Progress | None = None
) -> dict[str, Any]:
    """Weights of a Hugging Face directory as `dtype`, each device's part read by itself.

    Host memory: the parameters plus the part of one stacked tensor that one device holds.

    Raises:
      ModelError: tensors missing or left over (all names listed), or of another shape than config.json says.
    """
    config = load_qwen_config(model_dir)
    _, declared = declare_qwen(config)
    files = WeightFiles.open(model_dir)
    leaves, treedef = jax.tree.flatten(declared, is_leaf=is_declared)
    _check_tensors(files, leaves, config, model_dir)
    shardings = jax.tree.leaves(param_shardings(declared, layout))
    total = sum(math.prod(leaf.shape) for leaf in leaves) * np.dtype(dtype).itemsize
    arrays = []
    for leaf, sharding in zip(leaves, shardings, strict=True):
        arrays.append(_load_array(files, leaf, sharding, np.dtype(dtype)))
        if progress is not None:
            progress(arrays[-1].nbytes, total)
    return jax.tree.unflatten(treedef, arrays)


def hf_names(leaf: Declared) -> list[str]:
    """The Hugging Face tensors that make up one parameter: one, or one per layer."""
    if leaf.dims[0] != "layers":
        return [leaf.hf_name]
    return [leaf.hf_name.format(layer) for layer in range(leaf.shape[0])]


def _inner(leaf: Declared) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Dims and shape of one layer of a parameter (of the parameter itself when it is not stacked)."""
    start = 1 if leaf.dims[0] == "layers" else 0
    return leaf.dims[start:], leaf.shape[start:]  # type: ignore[return-value]


def _hf_shape(leaf: Declared) -> tuple[int, ...]:
    sizes = dict(zip(*_inner(leaf), strict=True))
    return tuple(math.prod(sizes[dim] for dim in group) for group in leaf.hf_dims)


def _check_tensors(files: WeightFiles, leaves: list[Declared], config: QwenConfig, model_dir: Path) -> None:
    expected = {name: _hf_shape(leaf) for leaf in leaves for name in hf_names(leaf)}
    found = set(files.where)
    if config.tied and "lm_head.weight" in found:
        # Some writers store a tied head twice. It is the same tensor or the config is wrong.
        table = files.read("model.embed_tokens.weight", (slice(None), slice(None)))
        if not np.array_equal(table, files.read("lm_head.weight", (slice(None), slice(None)))):
            raise ModelError(
                f"{model_dir}: config.json says tie_word_embeddings, but lm_head.weight differs from "
                "model.embed_tokens.weight. Set tie_word_embeddings to false in config.json."
            )
        found.discard("lm_head.weight")
    problems = []
    if missing := sorted(expected.keys() - found):
        problems.append(f"{len(missing)} missing: {', '.join(missing)}")
    if extra := sorted(found - expected.keys()):
        problems.append(f"{len(extra)} left over: {', '.join(extra)}")
    problems += [
        f"{name} has shape {files.shapes[name]}, config.json means {shape}"
        for name, shape in expected.items()
        if name in files.shapes and files.shapes[name] != shape
    ]
    if problems:
        raise ModelError(f"{model_dir}: the tensors do not fit config.json: " + "; ".join(problems) + ".")


def _load_array(files: WeightFiles, leaf: Declared, sharding: Any, dtype: np.dtype) -> jax.Array:
    parts: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
        parts.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in parts.items():
        block = _read_block(files, leaf, bounds, dtype)
        shards += [jax.device_put(block, device) for device in devices]
        # device_put is asynchronous: without waiting, the host copies of all parts would pile up.
        jax.block_until_ready(shards)
        del block
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _read_block(files: WeightFiles, leaf: Declared, bounds: tuple[tuple[int, int], ...], dtype: np.dtype) -> np.ndarray:
    block = np.empty([stop - start for start, stop in bounds], dtype)
    names = hf_names(leaf)
    if leaf.dims[0] != "layers":
        block[...] = _read_one(files, names[0], leaf, bounds)
        return block
    for row, layer in enumerate(range(*bounds[0])):
        block[row] = _read_one(files, names[layer], leaf, bounds[1:])
    return block


def _read_one(files: WeightFiles, name: str, leaf: Declared, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    """One tensor's part in our layout: slice in theirs, split the merged dims, put the dims in our order."""
    dims, shape = _inner(leaf)
    size, bound = dict(zip(dims, shape, strict=True)), dict(zip(dims, bounds, strict=True))
    index = []
    for first, *rest in leaf.hf_dims:
        if any(bound[dim] != (0, size[dim]) for dim in rest):
            raise AssertionError(f"{name}: only the first of the merged dims {(first, *rest)} can be split")
        inner = math.prod(size[dim] for dim in rest)
        index.append(slice(bound[first][0] * inner, bound[first][1] * inner))
    order = [dim for group in leaf.hf_dims for dim in group]
    part = files.read(name, tuple(index)).reshape([bound[dim][1] - bound[dim][0] for dim in order])
    return part.transpose([order.index(dim) for dim in dims])


def iterate_hf_tensors(
    params: dict[str, Any], config: QwenConfig, dtype: str
) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
    """(Hugging Face name, bytes, function that makes the array), layer by layer; nothing is made before it is asked."""
    _, declared = declare_qwen(config)
    pairs = list(zip(jax.tree.leaves(declared, is_leaf=is_declared), jax.tree.leaves(params), strict=True))

    def make(leaf: Declared, array: jax.Array, layer: int | None) -> np.ndarray:
        host = np.asarray(array if layer is None else array[layer])
        dims, _ = _inner(leaf)
        order = [dim for group in leaf.hf_dims for dim in group]
        theirs = host.transpose([dims.index(dim) for dim in order]).reshape(_hf_shape(leaf))
        return np.ascontiguousarray(theirs.astype(np.dtype(dtype)))

    for leaf, array in pairs:
        if leaf.dims[0] == "layers":
            continue
        yield (
            leaf.hf_name,
            math.prod(leaf.shape) * np.dtype(dtype).itemsize,
            lambda a=leaf, b=array: make(a, b, None),
        )
    for layer in range(config.layers):
        for leaf, array in pairs:
            if leaf.dims[0] != "layers":
                continue
            size = math.prod(leaf.shape[1:]) * np.dtype(dtype).itemsize
            yield leaf.hf_name.format(layer), size, lambda a=leaf, b=array, i=layer: make(a, b, i)


def save_hf(params: dict[str, Any], source_dir: Path, out_dir: Path, dtype: str, max_shard_gib: float = 4.0) -> None:
    """Writes a directory that transformers and vLLM load.

    `source_dir` is the directory the policy came from: its config, generation config, tokenizer files and chat
    template go along. Written under a temporary name and renamed, so a directory of that name is whole.

    Raises:
      StageError: the disk is full or not writable; nothing is left behind.
    """
    config = load_qwen_config(source_dir)
    temporary = out_dir.with_name(out_dir.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_shards(params, config, temporary, dtype, int(max_shard_gib * 2**30))
        hf_config = load_hf_config(source_dir)
        # transformers 4 reads torch_dtype, 5 reads dtype.
        hf_config = {k: v for k, v in hf_config.items() if k != "torch_dtype"} | {"dtype": dtype}
        (temporary / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        for name in COMPANION_FILES:
            if (source_dir / name).exists():
                shutil.copyfile(source_dir / name, temporary / name)
        shutil.rmtree(out_dir, ignore_errors=True)
        temporary.rename(out_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StageError(
            f"cannot write the model to {out_dir}: {error}. Nothing was left behind; free space "
            f"(about {config.num_parameters * np.dtype(dtype).itemsize / 2**30:.1f} GiB are needed) and run again."
        ) from None


def _write_shards(params: dict[str, Any], config: QwenConfig, out_dir: Path, dtype: str, max_bytes: int) -> None:
    shards: list[list[tuple[str, int, Callable[[], np.ndarray]]]] = [[]]
    for tensor in iterate_hf_tensors(params, config, dtype):
        if shards[-1] and sum(size for _, size, _ in shards[-1]) + tensor[1] > max_bytes:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # transformers refuses files whose metadata do not say which framework the layout is for.
        save_file({key: make() for key, _, make in shard}, out_dir / name, metadata={"format": "pt"})
        weight_map |= {key: name for key, _, _ in shard}
    if len(shards) > 1:
        total = sum(size for shard in shards for _, size, _ in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
