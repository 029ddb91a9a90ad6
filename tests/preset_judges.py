"""One update of each preset in torch float64, from messages to moved weights: the judge of tests/goldens/presets.json.

Only `scripts/make_goldens.py` runs it; the tests compare with what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tests import old_trl
from tests.old_trl import GROUP, TRL_0_11, TRL_0_12_2, TRL_0_13, Settings

Row = dict[str, Any]  # prompt, chosen, rejected: lists of messages
Ids = dict[str, list[int]]


@dataclass(frozen=True)
class Judge:
    """How a stack makes ids and rows of one group of pairs, and what its NLL and its embedding do."""

    tokenize: Callable[[Row, PreTrainedTokenizerFast, Settings], Ids]
    trl: old_trl.OldTrl  # decides how rows are collated and which ids the NLL ignores
    group: int | None  # None: all pairs are one group
    trains_pad: bool


def tokenize_drift(row: Row, tokenizer: PreTrainedTokenizerFast, s: Settings) -> Ids:
    """Prompt up to the reply, each reply with its turn end, the prompt's end kept, each reply cut for itself."""
    prompt = _render(row["prompt"], tokenizer, add_generation_prompt=True)[-s.max_prompt_length :]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    replies = {
        side: [*tokenizer(row[side][0]["content"], add_special_tokens=False)["input_ids"], end]
        for side in ("chosen", "rejected")
    }
    return {"prompt": prompt, **{side: ids[: s.max_length - len(prompt)] for side, ids in replies.items()}}


def tokenize_trl1(row: Row, tokenizer: PreTrainedTokenizerFast, s: Settings) -> Ids:
    """The whole dialogue, split after the prompt's ids, its first `max_length` tokens kept."""
    prompt = _render(row["prompt"], tokenizer, add_generation_prompt=True)
    ids = {"prompt": prompt[: s.max_length]}
    for side in ("chosen", "rejected"):
        whole = _render(row["prompt"] + row[side], tokenizer, add_generation_prompt=False)
        assert whole[: len(prompt)] == prompt
        ids[side] = whole[len(prompt) : s.max_length]
    return ids


def _render(messages: list[Row], tokenizer: PreTrainedTokenizerFast, add_generation_prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _old(trl: old_trl.OldTrl) -> Judge:
    return Judge(lambda row, tokenizer, s: old_trl.tokenize(row, tokenizer, trl, s), trl, GROUP, trains_pad=False)


# TRL_0_11 collates and masks by position, as the rules of `drift` and `trl1` do once rows are cut.
JUDGES = {
    "drift": Judge(tokenize_drift, TRL_0_11, None, trains_pad=True),
    "paper": _old(TRL_0_11),
    "paper, trl0.12": _old(TRL_0_13),
    "paper, trl0.12.0-0.12.2": _old(TRL_0_12_2),
    "trl1": Judge(tokenize_trl1, TRL_0_11, GROUP, trains_pad=False),
}


def judge_update(
    model_dir: Path, rows: Sequence[Row], ref: Sequence[Sequence[float]], judge: Judge, s: Settings
) -> dict[str, dict[str, float]]:
    """Metrics, and per tensor the norms of the gradient and of the first RMSprop update (no warm-up).

    Args:
      ref: reference log-probs (chosen, rejected) of each row.
    """
    model = old_trl.load(model_dir, torch.float64)
    if judge.trains_pad:
        model.get_input_embeddings().padding_idx = None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    tokenized = [judge.tokenize(row, tokenizer, s) for row in rows]
    size = judge.group or len(rows)
    starts = range(0, len(rows), size)
    metrics: dict[str, float] = {}
    for start in starts:
        batch = old_trl.collate(tokenized[start : start + size], judge.trl, s)
        group_ref = torch.tensor(ref[start : start + size], dtype=torch.float32).double().T
        logps, nll = old_trl.forward(model, batch, judge.trl)
        of_group = old_trl.metrics_of_group(logps, group_ref, nll, s)
        (of_group["loss"] / len(starts)).backward()
        for name, value in of_group.items():
            metrics[name] = metrics.get(name, 0.0) + float(value.detach()) / len(starts)
    named = {name: p for name, p in model.named_parameters() if p.grad is not None}
    grads = {name: float(p.grad.norm()) for name, p in named.items()}
    before = {name: p.detach().clone() for name, p in named.items()}
    metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm))
    torch.optim.RMSprop(model.parameters(), lr=s.learning_rate).step()
    updates = {name: float((p.detach() - before[name]).norm()) for name, p in named.items()}
    return {"metrics": metrics, "grad_norms": grads, "update_norms": updates}
