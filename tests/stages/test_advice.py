"""Warnings about a config that is valid: each has a twin in which the same key is of use."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drift_jax.config import RunConfig, build_config, load_config
from drift_jax.stages.advice import print_advice

REPO = Path(__file__).resolve().parents[2]


def said(config: RunConfig) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    print_advice(config, console)
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def build(sections: dict[str, dict[str, Any]]) -> RunConfig:
    raw: dict[str, Any] = {"run_dir": "r", "model": {"path": "m"}}
    return build_config({**raw, **{name: raw.get(name, {}) | keys for name, keys in sections.items()}})


JUDGE = {"base_url": "http://127.0.0.1:1/v1", "model": "j"}
UNUSED = [
    ("train", {"adam_beta1": 0.8}, {"optimizer": "adamw"}, "train.adam_beta1 (0.8)", "train.optimizer is rmsprop"),
    (
        "train",
        {"rmsprop_decay": 0.9, "optimizer": "adamw"},
        {"optimizer": "rmsprop"},
        "train.rmsprop_decay (0.9)",
        "adamw",
    ),
    (
        "train",
        {"warmup_ratio": 0.5, "warmup_steps": 3},
        {"warmup_steps": None},
        "train.warmup_ratio (0.5)",
        "replaces it",
    ),
    (
        "sampling",
        {"longest_within": 9, "n": 2},
        {"chooser": "longest_within"},
        "sampling.longest_within (9)",
        "is first",
    ),
    ("theory", {"tau": 0.5}, {"every": 1}, "theory.tau (0.5)", "theory.every is null"),
    (
        "recipe",
        {"ranker": "judge"},
        {"method": "iterdpo"},
        "recipe.ranker (judge)",
        "recipe.method drift ranks nothing",
    ),
]


@pytest.mark.parametrize(("section", "keys", "used", "key", "why"), UNUSED, ids=[row[-2] for row in UNUSED])
def test_a_key_that_nothing_reads_is_named(section: str, keys: dict, used: dict, key: str, why: str) -> None:
    others = {"judge": JUDGE, "data": {"dsat": "d", "sat": "s"}}
    (line,) = said(build(others | {section: keys}))
    assert line.startswith(f"warning: {key} has no effect: ") and line.endswith(f"{why}.")
    assert said(build(others | {section: keys | used})) == []


def test_the_server_of_another_engine() -> None:
    vllm = {"port": 8000, "base_urls": ["http://127.0.0.1:1"]}
    lines = said(build({"vllm": vllm}))
    assert [line.split()[1] for line in lines] == ["vllm.base_urls", "vllm.port"]
    assert said(build({"vllm": vllm, "sampling": {"engine": "vllm"}})) == []


@pytest.mark.parametrize(
    ("compute", "export", "warns"),
    [("float32", "bfloat16", True), ("float32", "float32", False), ("bfloat16", "bfloat16", False)],
)
def test_policies_that_are_exported_as_they_were_not_measured(compute: str, export: str, warns: bool) -> None:
    lines = said(build({"model": {"path": "m", "compute_dtype": compute}, "export": {"dtype": export}}))
    assert len(lines) == warns and all("export.dtype=float32 keeps it." in line for line in lines)


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_have_no_such_key(path: Path) -> None:
    assert said(load_config(path)) == []
