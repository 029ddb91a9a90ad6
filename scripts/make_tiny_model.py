"""Writes a tiny random Qwen2 with a byte-level tokenizer: enough for the whole loop, in a second, without a download.

python scripts/make_tiny_model.py [--out .cache/tiny_model]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # runs from a checkout that is not installed

import jax  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from drift_jax.config import MeshConfig  # noqa: E402
from drift_jax.models.architecture import qwen_config_from_hf  # noqa: E402
from drift_jax.models.hf_export import save_hf  # noqa: E402
from drift_jax.models.qwen import init_params  # noqa: E402
from drift_jax.sharding import build_layout  # noqa: E402

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def make_tiny_model(out: Path) -> None:
    """Writes the directory; one that is there already stays."""
    if (out / "config.json").exists():
        print(f"{out} is there already")
        return
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    eos = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    config = CONFIG | {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": eos[0]}
    source = out.with_name(out.name + ".source")
    source.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(source / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | special, indent=2) + "\n"
    )
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}) + "\n")
    (source / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    layout = build_layout(MeshConfig(), jax.devices()[:1])
    save_hf(init_params(qwen_config_from_hf(config), 0, layout), source, out, "float32")
    shutil.rmtree(source)
    print(f"wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO / ".cache" / "tiny_model")
    make_tiny_model(parser.parse_args().out)
