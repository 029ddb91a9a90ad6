"""The records of runs for the page's browser: prompt, complaint, and both replies of each stage side by side.

Where they are too large for the page, those with the smallest hash of their id stay, which has nothing to do with what
is in them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_jax.errors import DriftError
from drift_jax.journal import read_rows
from drift_jax.methods import DEFAULT, UNGUIDED, load_method, method_names
from drift_jax.records import LOGGED_READERS, DsatRecord, Message, read_pairs
from drift_jax.report import forms
from drift_jax.report.runs import Run, Stage, read_json_file

_MOST_CHARACTERS = 20_000  # of one text
_SPLITS = ("train", "test")
_WHOLE = "record left out"


def build_browser(runs: Sequence[Run], most_bytes: int) -> dict[str, Any]:
    """What report.js takes, as JSON values; its records take at most `most_bytes` of JSON.

    `columns` are the stages, `name` and `group` each; those of a group are a run's iterations. A record has `id`,
    `prompt` ([role, text] each), `complaint` or null, `texts`, and `stages`: objects with `column`, `split`, `chosen`,
    `rejected`, `margin` or null, `drops` ([text, reason] each); replies are places in `texts`, or null. `reasons` has
    how many records have a drop of each reason, `missing` what could not be read, `total` the number of all records.
    """
    records: dict[str, dict[str, Any]] = {}
    columns, missing = list[dict[str, Any]](), list[str]()
    for run in runs:
        complaints, prompts, why = _logged(run)
        missing += why
        for stage in run.stages:
            entries = _stage_entries(run, stage)
            if not entries:
                continue
            name = stage.name if len(runs) == 1 else f"{run.name} {stage.name}"
            columns.append({"name": name, "group": None if stage.name == "seed" else run.name})
            for name, (prompt, entry) in entries.items():
                record = records.setdefault(
                    name, {"id": name, "prompt": [], "complaint": None, "texts": [], "stages": []}
                )
                record["prompt"] = record["prompt"] or prompt or prompts.get(name, [])
                if stage.name != "seed":
                    record["complaint"] = record["complaint"] or complaints.get(name)
                record["stages"].append({"column": len(columns) - 1} | _placed(entry, record["texts"]))
    # Records of iterations come before those of the seed stage alone.
    order = sorted(records.values(), key=lambda record: columns[record["stages"][-1]["column"]]["group"] is None)
    kept = _fitting(order, most_bytes)
    reasons = Counter(
        reason for record in kept for reason in {d[1] for stage in record["stages"] for d in stage["drops"]}
    )
    return {
        "columns": columns,
        "records": kept,
        "reasons": dict(sorted(reasons.items())),
        "missing": list(dict.fromkeys(missing)),
        "total": len(records),
    }


def _stage_entries(run: Run, stage: Stage) -> dict[str, tuple[list[list[str]], dict[str, Any]]]:
    """By record: its prompt (empty where only a drop is known), and what the stage made of it."""
    found: dict[str, tuple[list[list[str]], dict[str, Any]]] = {}
    for split in _SPLITS:
        path = _pairs_file(run, stage, split)
        if path is None or not path.is_file() or not path.stat().st_size:  # nothing is held out
            continue
        for pair in read_pairs(path, "skip").records:
            entry = _entry(split, stage.margins.get(pair.id))
            entry |= {"chosen": _cut(pair.chosen), "rejected": _cut(pair.rejected)}
            found[pair.id] = (_messages(pair.prompt), entry)
    drops = read_json_file(stage.folder / "drops.json", {}, forms.Drops)
    if drops:
        texts = {(row["id"], row["sample"]): row["text"] for row in _completions(stage.folder)}
        for row in drops.get("rows", []):
            _, entry = found.setdefault(row["id"], ([], _entry(row["split"], None)))
            entry["drops"].append([_cut(texts.get((row["id"], row["sample"]), "")), row["reason"]])
        for row in drops.get("records", []):
            _, entry = found.setdefault(row["id"], ([], _entry(row["split"], None)))
            reason = _WHOLE if entry["drops"] else row["reason"]
            entry["drops"].append(["", reason])
    return found


def _placed(entry: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """The entry with places in `texts` for replies: a logged one is the same in every stage."""

    def place(text: str | None) -> int | None:
        if text is None:
            return None
        if text not in texts:
            texts.append(text)
        return texts.index(text)

    drops = [[place(text or None), reason] for text, reason in entry["drops"]]
    return entry | {side: place(entry[side]) for side in ("chosen", "rejected")} | {"drops": drops}


def _entry(split: str, margin: float | None) -> dict[str, Any]:
    return {"split": split, "margin": margin, "chosen": None, "rejected": None, "drops": []}


def _pairs_file(run: Run, stage: Stage, split: str) -> Path | None:
    """A seed stage trains on files of the user's, which may have moved since."""
    if stage.name != "seed":
        return stage.folder / f"pairs.{split}.jsonl"
    named = run.config.get("data", {}).get(f"seed_{split}")
    return Path(named) if named else None


def _completions(folder: Path) -> list[dict[str, Any]]:
    path = folder / "completions.jsonl"
    return read_rows(path, torn=True, form=forms.Completion) if path.is_file() else []


def _logged(run: Run) -> tuple[Mapping[str, str], Mapping[str, list[list[str]]], list[str]]:
    """Complaints and prompts by id, and what is to be said of files that cannot be read."""
    method = run.config.get("recipe", {}).get("method", DEFAULT)
    kind = load_method(method, UNGUIDED).records if method in method_names() else "dsat"
    named = run.config.get("data", {}).get(kind)
    if not named:
        return {}, {}, []
    try:
        records = LOGGED_READERS[kind](named, "skip").records
    except DriftError as error:
        return {}, {}, [f"{run.name}: {'complaints' if kind == 'dsat' else 'prompts'} are not shown, {error}"]
    complaints = {record.id: _cut(record.user_preference) for record in records if isinstance(record, DsatRecord)}
    return complaints, {record.id: _messages(record.prompt) for record in records}, []


def _messages(prompt: Sequence[Message]) -> list[list[str]]:
    return [[message.role, _cut(message.content)] for message in prompt]


def _cut(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS]} [... {len(text) - _MOST_CHARACTERS} characters more]"


def _fitting(records: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """In their order, as many as fit."""
    sizes = {record["id"]: len(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")) for record in records}
    kept, size = set[str](), 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest()):
        size += sizes[name]
        if size > most:
            break
        kept.add(name)
    return [record for record in records if record["id"] in kept]
