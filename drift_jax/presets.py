"""Presets: one name for a whole stack's way of making tokens and losses out of pairs.

A preset only gives config keys their values; a key that is written in the config or set on the command line wins.
Every value names one object in code (a template, a cut, a reduction), so nothing branches on a preset.

Sources: `drift` is this package's reading of arXiv 2510.02341; `paper` follows the authors' public configs on
alignment-handbook before 2025-07 with TRL 0.10 to 0.12; `trl1` follows TRL from 0.29 (`DataCollatorForPreference`,
loss types `sigmoid` and `sft`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from drift_jax.errors import ConfigError

# key -> value -> what it does, as `drift presets` prints it. The objects: data/rules.py, losses.py, data/prompts.py.
CHOICES: Mapping[str, Mapping[str, str]] = {
    "data.template": {
        "generation_prompt": "prompt ends with the assistant's header; a sampled completion's ids are used as drawn",
        "handbook": "prompt (with an empty system turn) and reply are rendered apart, so that the completion begins "
        "with the template's own system turn and the assistant's header",
        "full_render": "the dialogue is encoded as a whole; the completion is what follows the prompt's ids",
        "reply_text": "prompt ends with the assistant's header; the reply's text is encoded for itself, sampled ids "
        "are not used (TRL 0.12 to 0.28 on messages)",
    },
    "data.eos": {
        "turn_end": "the completion ends with its turn end; what the template writes after it is left out",
        "append_if_missing": "all the template writes, then the tokenizer's EOS unless it is there (TRL <= 0.11)",
        "append": "all the template writes, then the tokenizer's EOS in any case (TRL 0.12 to 0.28)",
        "as_rendered": "all the template writes, nothing appended (TRL >= 0.29)",
    },
    "data.truncation": {
        "keep_prompt_end": "prompt keeps its last max_prompt_length tokens; each completion what then fits max_length",
        "trl<=0.11": "only if prompt + longer reply exceed max_length: prompt keeps its last max_prompt_length tokens; "
        "if that is not enough, both replies keep their first max_length - max_prompt_length",
        "trl<=0.11 keep_start": "the same, but the prompt keeps its start (truncation_mode: keep_start)",
        "trl0.12": "prompt keeps its last max_prompt_length tokens; prompt + completion their first max_length",
        "trl0.12.0-0.12.2": "as trl0.12, with its bug: the longest rows of group_size pairs lose their last token",
        "keep_start": "prompt + completion keep their first max_length tokens; a pair whose prompt fills it is dropped",
    },
    "data.thinking": {
        "none": "a template that knows of thoughts (Qwen3) ends the prompt with an empty one: no reply has a thought",
        "template": "the template's own default: Qwen3 thinks first, and a logged reply begins with an empty thought",
    },
    "train.nll_reduction": {
        "global_token_mean": "mean over the chosen tokens of the whole update",
        "group_token_mean": "token mean inside group_size pairs (one device's share in TRL), then mean over the groups",
        "sequence_mean": "mean over the tokens of a reply, then over the replies (OpenRLHF)",
    },
    "train.nll_tokens": {
        "all": "every chosen completion token",
        "nonzero": "tokens whose id is 0 are skipped (TRL 0.12 to 0.28: cross entropy with ignore_index 0)",
    },
    "model.pad_embedding": {
        "trained": "the embedding of the pad token learns like any other",
        "frozen": "reading it gives no gradient, as in torch (padding_idx); matters where the pad token is in the text",
    },
    "sampling.style": {
        "chat": "dialogue, reply, complaint and request to improve through the chat template",
        "complaint": "dialogue, reply and complaint through the chat template, without the request",
        "paper": "the authors' plain text, without a chat template",
        "unguided": "the dialogue alone through the chat template",
    },
}

_DRIFT = {
    "data.template": "generation_prompt",
    "data.eos": "turn_end",
    "data.truncation": "keep_prompt_end",
    "data.thinking": "none",
    "train.nll_reduction": "global_token_mean",
    "train.nll_tokens": "all",
    "model.pad_embedding": "trained",
    "sampling.style": "chat",
}
_PAPER = {
    "data.template": "handbook",
    "data.eos": "append_if_missing",
    "data.truncation": "trl<=0.11",
    "data.thinking": "template",
    "train.nll_reduction": "group_token_mean",
    "train.nll_tokens": "all",
    "model.pad_embedding": "frozen",
    "sampling.style": "paper",
}
_TRL1 = {
    "data.template": "full_render",
    "data.eos": "as_rendered",
    "data.truncation": "keep_start",
    "data.thinking": "template",
    "train.nll_reduction": "group_token_mean",
    "train.nll_tokens": "all",
    "model.pad_embedding": "frozen",
    "sampling.style": "chat",
}
PRESETS: Mapping[str, Mapping[str, str]] = MappingProxyType({"drift": _DRIFT, "paper": _PAPER, "trl1": _TRL1})

# What TRL 0.12 changed besides the cut: under `paper`, choosing its cut brings these along.
_TRL_0_12 = {"data.eos": "append", "train.nll_tokens": "nonzero"}
_FOLLOWS = {("paper", "trl0.12"): _TRL_0_12, ("paper", "trl0.12.0-0.12.2"): _TRL_0_12}


def preset_values(preset: str, truncation: str | None = None) -> dict[str, str]:
    """Dotted key -> value. `truncation` is the cut the user chose; None: the preset's own.

    Raises:
      ConfigError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}. See `drift presets`.")
    values = dict(PRESETS[preset])
    if truncation is not None:
        values["data.truncation"] = truncation
    return values | _FOLLOWS.get((preset, values["data.truncation"]), {})


def apply_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a config with those keys filled in that its `preset` decides and it leaves out."""
    preset = raw.get("preset", "drift")
    data = raw.get("data")
    chosen = data.get("truncation") if isinstance(data, dict) else None
    chosen = chosen if isinstance(chosen, str) else None
    filled = dict(raw)
    # A section that is not a mapping, or a preset or a cut that is no text, is left for the validation to name.
    for key, value in preset_values(preset, chosen).items() if isinstance(preset, str) else ():
        section, leaf = key.split(".")
        held = filled.get(section, {})
        if isinstance(held, dict):
            filled[section] = {leaf: value} | held
    return filled


def presets_table() -> Group:
    """What each preset chooses, then what every value that can be chosen does."""
    chosen = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", *PRESETS):
        chosen.add_column(name, no_wrap=True)
    meanings = Table(box=None, pad_edge=False, show_header=False)
    meanings.add_column(no_wrap=True)
    meanings.add_column()
    for key, values in CHOICES.items():
        chosen.add_row(key, *(preset[key] for preset in PRESETS.values()))
        meanings.add_row(f"\n[bold]{key}[/]", "")
        for value, meaning in values.items():
            meanings.add_row(escape(f"  {value}"), escape(meaning))
    notes = "\nUnder paper, a data.truncation of trl0.12 or trl0.12.0-0.12.2 brings along: " + ", ".join(
        f"{key}={value}" for key, value in _TRL_0_12.items()
    )
    return Group(chosen, notes + ".\nA key that is set in the config or by --set wins over its preset.", meanings)
