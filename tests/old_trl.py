"""TRL 0.11 and 0.12 under the old alignment-handbook, written out in torch: the judge of preset `paper`.

From messages to updated weights, with transformers' own tokenizer and chat template: nothing of drift_jax makes a
token or a number here. The rules are those that numerics of public versions state (TRL v0.11.4 `tokenize_row` and
`_truncate_tokens`, v0.12.2 `tokenize_row` and `concatenated_forward`); one process stands for all devices, each of
which has `GROUP` pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

GROUP = 4
IGNORED = -100


@dataclass(frozen=True)
class OldTrl:
    """What differs between the versions."""

    cuts_only_when_too_long: bool  # 0.9 to 0.11
    always_appends_eos: bool  # from 0.12
    nll_ignores_id_0: bool  # from 0.12
    drops_last_column: bool = False  # 0.12.0 to 0.12.2


TRL_0_11 = OldTrl(cuts_only_when_too_long=True, always_appends_eos=False, nll_ignores_id_0=False)
TRL_0_13 = OldTrl(cuts_only_when_too_long=False, always_appends_eos=True, nll_ignores_id_0=True)
TRL_0_12_2 = OldTrl(False, True, True, drops_last_column=True)


@dataclass(frozen=True)
class Settings:
    """Of a run, with the published names."""

    learning_rate: float
    steps: int
    max_length: int
    max_prompt_length: int
    beta: float = 0.1
    rpo_alpha: float = 0.001
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0


def tokenize(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, trl: OldTrl, s: Settings) -> dict[str, list[int]]:
    """Ids of prompt, chosen and rejected of one row of messages, after the cuts that happen before batching."""
    prompt = list(row["prompt"])
    if prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": ""}, *prompt]
    texts = {
        name: tokenizer.apply_chat_template(messages, tokenize=False)
        for name, messages in (("prompt", prompt), ("chosen", row["chosen"]), ("rejected", row["rejected"]))
    }

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt_ids, eos = encode(texts["prompt"]), tokenizer.eos_token_id
    replies = {}
    for name in ("chosen", "rejected"):
        if trl.cuts_only_when_too_long:  # one string, split by the length of the prompt
            ids = encode(texts["prompt"] + texts[name])[len(prompt_ids) :]
        else:
            ids = encode(texts[name])
        replies[name] = ids if ids[-1] == eos and not trl.always_appends_eos else [*ids, eos]
    if not trl.cuts_only_when_too_long:
        return {"prompt": prompt_ids[-s.max_prompt_length :], **replies}
    longer = max(map(len, replies.values()))
    if len(prompt_ids) + longer > s.max_length:
        prompt_ids = prompt_ids[-s.max_prompt_length :]
    if len(prompt_ids) + longer > s.max_length:
        replies = {name: ids[: s.max_length - s.max_prompt_length] for name, ids in replies.items()}
    return {"prompt": prompt_ids, **replies}


def collate(rows: Sequence[dict[str, list[int]]], trl: OldTrl, s: Settings) -> tuple[torch.Tensor, ...]:
    """ids, attention mask and completion mask [2 * rows, T]: chosen rows, then rejected ones."""
    widest_prompt = max(len(row["prompt"]) for row in rows)
    widest_reply = max(len(row[side]) for row in rows for side in ("chosen", "rejected"))
    ids, attention, loss = [], [], []
    for side in ("chosen", "rejected"):
        for row in rows:
            left, right = widest_prompt - len(row["prompt"]), widest_reply - len(row[side])
            ids.append([0] * left + row["prompt"] + row[side] + [0] * right)
            attention.append([0] * left + [1] * (len(row["prompt"]) + len(row[side])) + [0] * right)
            loss.append([0] * widest_prompt + [1] * len(row[side]) + [0] * right)
    shifted = []
    for i, mask in enumerate(attention):  # flush left
        first = mask.index(1)
        shifted.append([part[i][first:] + part[i][:first] for part in (ids, attention, loss)])
    tensors = [torch.tensor(part) for part in zip(*shifted, strict=True)]
    width = tensors[0].shape[1]
    empty = (tensors[1].sum(0) == 0).nonzero()
    if len(empty):
        width = int(empty[0]) - int(trl.drops_last_column)
    return tuple(part[:, : min(width, s.max_length)] for part in tensors)


def forward(model: torch.nn.Module, batch: tuple[torch.Tensor, ...], trl: OldTrl) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probs [2, rows] of the completions, and the NLL of the chosen half."""
    ids, attention, loss_mask = batch
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    targets, mask = ids[:, 1:], loss_mask[:, 1:].bool()
    picked = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    logps = (picked * mask).sum(-1).reshape(2, -1)
    half, ignored = len(ids) // 2, 0 if trl.nll_ignores_id_0 else IGNORED
    labels = torch.where(mask, targets, torch.full_like(targets, ignored))
    nll = torch.nn.functional.cross_entropy(
        logits[:half].reshape(-1, logits.shape[-1]), labels[:half].reshape(-1), ignore_index=ignored
    )
    return logps, nll


def metrics_of_group(logps: torch.Tensor, ref: torch.Tensor, nll: torch.Tensor, s: Settings) -> dict[str, torch.Tensor]:
    """Means over the pairs of one device."""
    margin = (logps[0] - logps[1]) - (ref[0] - ref[1])
    rewards = s.beta * (logps - ref)
    return {
        "loss": (-torch.nn.functional.logsigmoid(s.beta * margin) + s.rpo_alpha * nll).mean(),
        "nll_loss": nll,
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "logps/chosen": logps[0].mean(),
        "logps/rejected": logps[1].mean(),
    }


def load(model_dir: Path, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()


def train(
    model_dir: Path, updates: Sequence[Sequence[dict[str, Any]]], trl: OldTrl, s: Settings, dtype: torch.dtype
) -> tuple[list[dict[str, float]], torch.nn.Module]:
    """Metrics of every update on rows of messages, and the trained model.

    Each update has a multiple of `GROUP` rows; gradients and metrics are means over the devices.
    """
    model, reference = load(model_dir, dtype), load(model_dir, dtype)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=s.learning_rate)
    warmup = math.ceil(s.warmup_ratio * s.steps)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup, s.steps)
    history = []
    for rows in updates:
        tokenized = [tokenize(row, tokenizer, trl, s) for row in rows]
        groups = [tokenized[i : i + GROUP] for i in range(0, len(tokenized), GROUP)]
        totals: dict[str, float] = {}
        for group in groups:
            batch = collate(group, trl, s)
            with torch.no_grad():
                ref, _ = forward(reference, batch, trl)
            logps, nll = forward(model, batch, trl)
            metrics = metrics_of_group(logps, ref, nll, s)
            (metrics["loss"] / len(groups)).backward()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / len(groups)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
        history.append(totals | {"grad_norm": float(norm), "learning_rate": scheduler.get_last_lr()[0]})
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return history, model
