"""A run directory as `drift run` leaves it, with texts and numbers of the test's own, for tests of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drift_jax.config import RunConfig, build_config, config_to_yaml
from drift_jax.data.pairs import TokenizedPair
from drift_jax.data.token_cache import TokenizedRows, cache_path, write_tokens
from drift_jax.evaluation.preference import PairLogps, preference_numbers
from drift_jax.files import write_json, write_jsonl
from drift_jax.manifest import Manifest
from drift_jax.records import DsatRecord, Message, Pair, dsat_to_row, pair_to_row
from drift_jax.telemetry import MetricsWriter

HELD_OUT = 8
DROPPED = 4  # records without a pair, after the others
Say = Callable[[int, str], str]  # (record, which text) -> text


def plain(record: int, what: str) -> str:
    return f"{what} of record {record}: one two three {'four' if what.endswith('2') else 'five'}"


def write_run(
    folder: Path,
    pairs: int = 24,
    iterations: int = 2,
    say: Say = plain,
    steps: int = 6,
    theory: bool = False,
    finished: bool = True,
    warnings: Sequence[str] = (),
) -> Path:
    """`pairs` records that have pairs in every iteration, the first `HELD_OUT` held out, and `DROPPED` others."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        DsatRecord(f"r{i}", (Message("user", say(i, "prompt")),), say(i, "rejected"), say(i, "complaint"))
        for i in range(pairs + DROPPED)
    ]
    write_jsonl(folder / "dsat.jsonl", map(dsat_to_row, records))
    config = build_config(
        {
            "run_dir": str(folder),
            "model": {"path": str(folder / "base")},
            "data": {"dsat": str(folder / "dsat.jsonl"), "test_rows": HELD_OUT},
            "recipe": {"iterations": iterations},
        }
    )
    (folder / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    manifest = Manifest(folder)
    for k in range(1, iterations + 1):
        _write_iteration(folder / f"iter_{k}", records, pairs, k, say, steps, theory)
        _enter(manifest, config, k, pairs, steps, finished or k < iterations, warnings)
    return folder


def _enter(
    manifest: Manifest, config: RunConfig, k: int, pairs: int, steps: int, finished: bool, warnings: Sequence[str]
) -> None:
    drops = {"speaks for another": DROPPED, "record left out": DROPPED}
    summaries: dict[str, dict[str, Any]] = {
        "sample": {"completions": pairs + DROPPED, "drops": {"bad row": 0}, "seconds": 4.0},
        "pair": {"pairs": pairs - HELD_OUT, "held_out": HELD_OUT, "drops": drops, "seconds": 0.1},
        "train": {"pairs": pairs - HELD_OUT, "held_out": HELD_OUT, "drops": {}, "steps": steps, "loss": 0.6},
        "export": {"seconds": 0.5},
    }
    summaries["train"] |= {"tokens_per_second": 100.0, "warnings": list(warnings), "seconds": 60.0}
    for part, summary in summaries.items():
        keys = {"epochs": 1.0} if part == "train" else {}
        manifest.enter(f"iter_{k}/{part}", dataclasses.asdict(config.train) | keys, {"policy": f"{k:064x}"})
        if finished or part not in ("train", "export"):
            manifest.finish(f"iter_{k}/{part}", summary)


def _write_iteration(
    folder: Path, records: list[DsatRecord], pairs: int, k: int, say: Say, steps: int, theory: bool
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = [Pair(r.id, r.prompt, say(i, f"chosen {k}"), r.rejected) for i, r in enumerate(records[:pairs])]
    write_jsonl(folder / "pairs.test.jsonl", map(pair_to_row, made[:HELD_OUT]))
    write_jsonl(folder / "pairs.train.jsonl", map(pair_to_row, made[HELD_OUT:]))
    lost = [{"id": r.id, "split": "train", "reason": "no completion left"} for r in records[pairs:]]
    rows = [row | {"sample": 0, "reason": "speaks for another"} for row in lost]
    write_json(folder / "drops.json", {"counts": {}, "rows": rows, "records": lost})
    write_jsonl(
        folder / "completions.jsonl",
        [{"id": r.id, "sample": 0, "text": say(i, f"drawn {k}")} for i, r in enumerate(records)],
    )
    rng = np.random.default_rng(k)
    with MetricsWriter(folder) as writer:
        for step in range(1, steps + 1):
            writer.write(step, {"epoch": step / steps, **_metrics(rng, step / steps, k, theory)})
    refs = rng.normal(-90.0, 9.0, (HELD_OUT, 2))
    logps = PairLogps(
        [pair.id for pair in made[:HELD_OUT]],
        refs + rng.normal(0.0, 5.0, (HELD_OUT, 2)),
        refs,
        np.full((HELD_OUT, 2), 30.0),
    )
    numbers = preference_numbers(logps, 0.1)
    write_json(folder / "eval.json", {"step": steps, "pairs": HELD_OUT, "eval_loss": 0.6, "preference": numbers})
    write_jsonl(folder / "scores.test.jsonl", logps.rows(0.1))
    tokens = [
        TokenizedPair(pair.id, *(np.ones(rng.integers(1, 60), np.int32) for _ in range(3)), 0, 0, 0) for pair in made
    ]
    write_tokens(cache_path(folder / "tokens", "pairs.train", "ab" * 32), "ab" * 32, TokenizedRows(tokens, ()))


def _metrics(rng: np.random.Generator, share: float, k: int, theory: bool) -> dict[str, float]:
    noise = float(rng.normal(0.0, 0.02))
    found = {
        "loss": 0.69 - 0.2 * share + noise,
        "rewards/margins": share + noise,
        "rewards/accuracies": 0.5 + 0.4 * share,
        "rewards/chosen": 0.5 * share,
        "rewards/rejected": -0.5 * share - noise,
        "logps/chosen": -90.0 + share,
        "logps/rejected": -120.0 - share,
        "grad_norm": 12.0 + noise,
        "learning_rate": 5e-7 * (1 - share),
        "tokens_per_second": 100.0 + noise,
    }
    if theory:
        names = ("grad_norm", "bound", "p0", "delta", "tau", "weight/p05", "weight/p50", "weight/p95")
        values = (1.4, 0.5, 0.9, 9.0, 0.25, 0.2, 0.4, 0.5)
        found |= {f"theory/{name}": value for name, value in zip(names, values, strict=True)}
        if k > 1:
            found |= {"theory/iter_1/margin_then": 1.0, "theory/iter_1/margin": 0.8, "theory/iter_1/retention": 0.8}
    return found
