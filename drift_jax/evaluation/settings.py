"""The configuration of an evaluation: a run's config where there is one, but answers drawn as the benchmark has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_jax.config import JudgeConfig, RunConfig, apply_override, build_config, read_yaml
from drift_jax.errors import ConfigError

# Greedy, as upstream's inference has it. What a training run samples with must not shape a benchmark unseen.
WILDBENCH = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 4096, "max_input_length": 8192}
ALPACA_EVAL = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 2048, "max_input_length": 4096}
WIN_RATE = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 1024, "max_input_length": 4096}
_VERDICT_TOKENS = 1024  # of WildBench's judge: shorter ones are cut, and an answer that was cut is asked for again
_WHAT_IS_DRAWN = ("n", "chooser", "on_cut", "style")


def build_evaluation_config(
    model: str, out_dir: Path, drawing: Mapping[str, Any], file: Path | None, overrides: Sequence[str]
) -> RunConfig:
    """Of `file` all is taken but how answers are drawn, which is `drawing`; `overrides` win.

    A run's own config.yaml has every key written out, so a `judge.max_tokens` in it need not be anybody's wish: one
    below WildBench's is raised to it, and only an override goes lower.

    Raises:
      ConfigError: a key is unknown, has an impossible value, or is said by the command itself.
    """
    raw = read_yaml(file) if file is not None else {}
    judge = {} if raw.get("judge") is None else raw["judge"]
    if isinstance(judge, dict):
        raw["judge"] = judge | {"max_tokens": _room_for_verdicts(judge.get("max_tokens", _VERDICT_TOKENS))}
    given = {} if raw.get("sampling") is None else raw["sampling"]
    if isinstance(given, dict):  # what is no section is left for the validation to name
        kept = {key: value for key, value in given.items() if key not in (*drawing, *_WHAT_IS_DRAWN)}
        raw["sampling"] = kept | dict(drawing)
    raw["run_dir"] = str(out_dir)
    name_model(raw, model, overrides)
    if raw["run_dir"] != str(out_dir):
        raise ConfigError(f"--set run_dir: results go to {out_dir}, as --out says. Leave run_dir out.")
    return build_config(raw, source=str(file) if file is not None else "the options")


def _room_for_verdicts(written: Any) -> Any:
    """What is no number of tokens is left for the validation to name."""
    return max(written, _VERDICT_TOKENS) if type(written) is int and written > 0 else written


def name_model(raw: dict[str, Any], model: str, overrides: Sequence[str]) -> None:
    """Makes `model` the one of a config's plain values, and applies `overrides` to them.

    A revision that stands there is one of the config's own model, one of the overrides is one of `model`.

    Raises:
      ConfigError: an override is of another form, or names another model.
    """
    section = {} if raw.get("model") is None else raw["model"]
    if isinstance(section, dict):
        others = () if section.get("path") == model else ("revision",)
        raw["model"] = {key: value for key, value in section.items() if key not in others} | {"path": model}
    for override in overrides:
        apply_override(raw, override)
    section = raw["model"]
    if isinstance(section, dict) and section.setdefault("path", model) != model:
        raise ConfigError(f"--set model.path: the model is {model}, as the command names it. Leave model.path out.")


def fit_to_model(config: RunConfig, longest: int | None) -> tuple[RunConfig, str | None]:
    """The config with prompts and answers that fit the model, and what was changed.

    Args:
      longest: tokens that the model was made for; None: it does not say.
    """
    sampling = config.sampling
    if longest is None or sampling.max_input_length + sampling.max_new_tokens <= longest:
        return config, None
    new = min(sampling.max_new_tokens, max(1, longest // 2))
    fitted = dataclasses.replace(sampling, max_new_tokens=new, max_input_length=max(1, longest - new))
    note = (
        f"the model was made for {longest} tokens: prompts are cut to their last {fitted.max_input_length}, answers "
        f"end after {new}"
    )
    return dataclasses.replace(config, sampling=fitted), note


def require_judge(judge: JudgeConfig) -> JudgeConfig:
    """Raises `ConfigError` unless a server and its model are named."""
    if not (judge.base_url and judge.model):
        raise ConfigError(
            "no judge is named. Give --set judge.base_url=https://HOST/v1 --set judge.model=NAME, and --set "
            "judge.api_key_env=VARIABLE where the server asks for a key; or a --config with a section judge."
        )
    return judge
