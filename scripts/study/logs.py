"""The logs of the study: what the base model answered, and what the user said about it.

dsat.jsonl  the base model's reply to the question alone, about which the user complains
sat.jsonl   its reply to that complaint, where the user is happy with it, beside the question alone: as the published
            data makes seed pairs of DSAT -> SAT turns

Both have the same questions in the same order, so that all methods train on the same ones. A question whose first reply
satisfies, or to which no reply after the complaint does, is in neither.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from study.user import complain, is_satisfied

from drift_jax.config import RunConfig
from drift_jax.files import write_json, write_jsonl
from drift_jax.records import Message
from drift_jax.stages.answer import answer_stage

LOG_TOKENS = 56  # of a logged reply, before it is cut to whole sentences
ROUNDS = 4  # times that a complaint is answered, until an answer satisfies
SEED = 7
_WHOLE = re.compile(r"(?s)^.*[.!?][\"')\]”’]*(?=\s|$)")

Prompt = Mapping[str, str]  # a row of prompts.jsonl


def make_logs(config: RunConfig, model_dir: Path, prompts: Sequence[Prompt], out_dir: Path, console: Console) -> Path:
    """Writes dsat.jsonl, sat.jsonl and log.json (what was left out, and why) to `out_dir`, which it returns."""
    if (out_dir / "log.json").exists():
        return out_dir
    rows = {row["id"]: row for row in prompts}
    first = _draw(config, model_dir, {i: _asked(row) for i, row in rows.items()}, out_dir / "first", 0, console)
    first = {i: whole_sentences(text) for i, text in first.items()}
    complaints = {i: complain(i, rows[i]["prompt"], text) for i, text in first.items()}
    unhappy = {i: said for i, said in complaints.items() if said is not None}
    after: dict[str, str] = {}
    for number in range(1, ROUNDS + 1):
        left = {
            i: [*_asked(rows[i]), Message("assistant", first[i]), Message("user", said)]
            for i, said in unhappy.items()
            if i not in after
        }
        if left:
            replies = _draw(config, model_dir, left, out_dir / f"after_{number}", number, console)
            after |= {i: text.strip() for i, text in replies.items() if is_satisfied(rows[i]["prompt"], text)}
    kept = [i for i in rows if i in after]
    write_jsonl(out_dir / "dsat.jsonl", [_dsat(rows[i], first[i], unhappy[i]) for i in kept])
    write_jsonl(out_dir / "sat.jsonl", [_sat(rows[i], after[i]) for i in kept])
    found = {
        "prompts": len(rows),
        "happy with the first reply": len(rows) - len(unhappy),
        f"unhappy after {ROUNDS} replies to the complaint": len(unhappy) - len(after),
        "kept": len(kept),
    }
    write_json(out_dir / "log.json", found)
    return out_dir


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; all of it where it has none.

    So the turn end that training puts behind a logged reply never stands in mid-sentence.
    """
    found = _WHOLE.match(text.strip())
    return found.group().strip() if found else text.strip()


def _draw(
    config: RunConfig,
    model_dir: Path,
    dialogues: Mapping[str, Sequence[Message]],
    out: Path,
    seed: int,
    console: Console,
) -> dict[str, str]:
    sampling = dataclasses.replace(config.sampling, max_new_tokens=LOG_TOKENS, seed=SEED + seed)
    config = dataclasses.replace(config, sampling=sampling)
    found = answer_stage(config, model_dir, dialogues, out, console, f"log, {out.name}")
    return {name: answer.text for name, answer in found.by_id.items()}


def _asked(row: Prompt) -> list[Message]:
    return [Message("user", row["prompt"])]


def _shared(row: Prompt) -> dict[str, Any]:
    return {
        "id": row["id"],
        "source": row["source"],
        "license": row["license"],
        "prompt": [{"role": "user", "content": row["prompt"]}],
    }


def _dsat(row: Prompt, reply: str, complaint: str) -> dict[str, Any]:
    return _shared(row) | {
        "rejected": [{"role": "assistant", "content": reply}],
        "user_preference": {"role": "user", "content": complaint},
    }


def _sat(row: Prompt, reply: str) -> dict[str, Any]:
    return _shared(row) | {
        "chosen": [{"role": "assistant", "content": reply}],
        "user_preference": {"role": "user", "content": "Thanks, that is what I wanted."},
    }
