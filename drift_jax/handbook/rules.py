"""Rules of the keys whose meaning depends on another key, or whose values need more than a table."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from drift_jax.config import CheckpointConfig
from drift_jax.handbook.keys import NOT_NULL
from drift_jax.handbook.values import HandbookFile, Outcome, Refused, Rule, check, fitting, shown, word

_Count = Annotated[int, Field(ge=1)]


def _max_grad_norm(value: Any, file: HandbookFile) -> Outcome:
    if value == 0 and not isinstance(value, bool):
        raise Refused(f"must be above 0, found {shown(value)}: {NOT_NULL['max_grad_norm']}.")
    return Outcome({"train.max_grad_norm": fitting("train.max_grad_norm", value)})


def _max_steps(value: Any, file: HandbookFile) -> Outcome:
    steps = check(int, value)
    return Outcome({"train.max_steps": steps} if steps > 0 else {"train.max_steps": None})


def _warmup_ratio(value: Any, file: HandbookFile) -> Outcome:
    ratio = fitting("train.warmup_ratio", value)
    if file.values["lr_scheduler_type"] == "constant":
        return Outcome(_by_ratio(0.0), "lr_scheduler_type constant has no warm-up")
    steps = file.values.get("warmup_steps", 0)
    if isinstance(steps, float) and 0 < steps < 1:
        return Outcome({}, "does not apply: replaced by warmup_steps")
    by_steps = isinstance(steps, int | float) and steps >= 1
    return Outcome({"train.warmup_ratio": ratio} if by_steps else _by_ratio(ratio))


def _by_ratio(ratio: float) -> dict[str, Any]:
    """No number of updates stands against the ratio, not even that of a config the translation is merged into."""
    return {"train.warmup_ratio": ratio, "train.warmup_steps": None}


def _warmup_steps(value: Any, file: HandbookFile) -> Outcome:
    steps = check(Annotated[float, Field(ge=0, allow_inf_nan=False)], value)
    if file.values["lr_scheduler_type"] == "constant":
        return Outcome({}, "does not apply: lr_scheduler_type constant has no warm-up")
    if steps == 0:
        return Outcome({}, "does not apply: warmup_ratio holds")
    if steps < 1:
        return Outcome(_by_ratio(steps), "a share of the updates")
    return Outcome({"train.warmup_steps": _steps(value)})


def _loss_type(value: Any, file: HandbookFile) -> Outcome:
    if value not in ("sigmoid", ["sigmoid"], ["sigmoid", "sft"]):
        raise Refused(f'must be "sigmoid" or ["sigmoid", "sft"], found {shown(value)}: other losses are not offered.')
    return Outcome({"preset": file.stack.preset, **file.stack.settings}, file.stack.name)


def _loss_weights(value: Any, file: HandbookFile) -> Outcome:
    kinds = file.values["loss_type"]
    weights = check(list[float], value)
    if not isinstance(kinds, list) or len(weights) != len(kinds) or weights[:1] != [1.0]:
        raise Refused(f"must be one weight for each loss_type, the first 1.0, found {shown(value)}.")
    return Outcome({"train.rpo_alpha": fitting("train.rpo_alpha", weights[1])} if len(weights) == 2 else {})


def _rpo_alpha(value: Any, file: HandbookFile) -> Outcome:
    if file.values["loss_type"] == ["sigmoid", "sft"]:
        if value is not None:
            raise Refused("the NLL is in loss_type already; keep one of them.")
        return Outcome({}, "does not apply: loss_weights holds")
    return Outcome({"train.rpo_alpha": 0.0 if value is None else fitting("train.rpo_alpha", value)})


def _truncation_mode(value: Any, file: HandbookFile) -> Outcome:
    return Outcome({"data.truncation": word(value, file.stack.truncation)})


def _train_batch(value: Any, file: HandbookFile) -> Outcome:
    pairs, steps = check(_Count, value), file.count("gradient_accumulation_steps")
    settings = {"train.batch_size": pairs * steps * file.devices, "train.group_size": pairs}
    return Outcome(settings, f"{pairs} x {steps} steps x {file.devices} devices")


def _accumulation(value: Any, file: HandbookFile) -> Outcome:
    return Outcome({"train.accumulation_steps": fitting("train.accumulation_steps", value)})


def _eval_batch(value: Any, file: HandbookFile) -> Outcome:
    pairs = check(_Count, value)
    return Outcome({"train.eval_batch_size": pairs * file.devices}, f"{pairs} x {file.devices} devices")


def _steps(value: Any) -> int:
    """A number of updates. A share of the run, which transformers takes too, is refused."""
    if isinstance(value, float) and 0 < value < 1:
        raise Refused(f"must be a number of updates, found {value}: a share of the run is not offered.")
    return check(_Count, int(value) if isinstance(value, float) and value.is_integer() else value)


def _strategy(value: Any) -> str:
    return word("no" if value is False else value, _STRATEGIES)  # YAML 1.1 reads a bare `no` as false


_STRATEGIES = {kind: kind for kind in ("no", "steps", "epoch")}


def _do_eval(value: Any, file: HandbookFile) -> Outcome:
    check(bool, value)
    return Outcome({}, "does not apply: the held-out pairs are scored after the last update in any case")


def _when(what: str, ours: str, never: str | None, note: str = "") -> dict[str, Rule]:
    """Rules of `{what}_strategy` and `{what}_steps`, which together are one key of ours; `never` stands for no."""

    def strategy(value: Any, file: HandbookFile) -> Outcome:
        kind = _strategy(value)
        if kind == "steps":
            return Outcome({}, f"every {what}_steps updates")
        return Outcome({ours: never}, note) if kind == "no" else Outcome({ours: kind})

    def steps(value: Any, file: HandbookFile) -> Outcome:
        count = _steps(value)
        if file.values[f"{what}_strategy"] != "steps":
            return Outcome({}, f"does not apply: {what}_strategy is not steps")
        return Outcome({ours: count})

    return {f"{what}_strategy": strategy, f"{what}_steps": steps}


def _save_total_limit(value: Any, file: HandbookFile) -> Outcome:
    limit = None if value is None else check(int, value)
    if limit is None or limit < 1:
        return Outcome({"checkpoint.keep": CheckpointConfig().keep}, "the Hugging Face Trainer keeps all")
    return Outcome({"checkpoint.keep": limit})


def _logging_strategy(value: Any, file: HandbookFile) -> Outcome:
    kind = _strategy(value)
    return Outcome({}, "every logging_steps updates" if kind == "steps" else "does not apply: logging_steps holds")


def _logging_steps(value: Any, file: HandbookFile) -> Outcome:
    return Outcome({"tracking.log_every": _steps(value)})


_TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def _report_to(value: Any, file: HandbookFile) -> Outcome:
    names = [value] if isinstance(value, str) else check(list[str], value)
    if names == ["all"]:
        installed = [name for name, module in _TRACKERS.items() if importlib.util.find_spec(module)]
        return Outcome({"tracking.trackers": installed}, "those installed")
    wrong = [name for name in names if name not in (*_TRACKERS, "none")]
    if wrong or ("none" in names and len(names) > 1):
        raise Refused(f"must be none, all, or a list of {' and '.join(_TRACKERS)}, found {shown(value)}.")
    return Outcome({"tracking.trackers": [name for name in names if name != "none"]}, "metrics.jsonl in any case")


def _seed(value: Any, file: HandbookFile) -> Outcome:
    seed = fitting("train.seed", value)
    if "data_seed" in file.values:
        return Outcome({}, "does not apply: data_seed orders the pairs, and nothing else is random")
    return Outcome({"train.seed": seed})


def _data_seed(value: Any, file: HandbookFile) -> Outcome:
    return Outcome({"train.seed": fitting("train.seed", value)})


def _tokenizer(value: Any, file: HandbookFile) -> Outcome:
    model = file.values.get("model_name_or_path")
    if value != model:
        raise Refused(f"must be that of the model, {shown(model)}, found {shown(value)}: no other is loaded.")
    return Outcome({}, "does not apply: the model's own, as here in any case")


RULES: Mapping[str, Rule] = {
    "max_grad_norm": _max_grad_norm,
    "max_steps": _max_steps,
    "warmup_ratio": _warmup_ratio,
    "warmup_steps": _warmup_steps,
    "loss_type": _loss_type,
    "loss_weights": _loss_weights,
    "rpo_alpha": _rpo_alpha,
    "truncation_mode": _truncation_mode,
    "per_device_train_batch_size": _train_batch,
    "gradient_accumulation_steps": _accumulation,
    "per_device_eval_batch_size": _eval_batch,
    "do_eval": _do_eval,
    **_when("eval", "train.eval_every", never=None, note="after the last update"),
    **_when("save", "checkpoint.every_steps", never="end"),
    "save_total_limit": _save_total_limit,
    "logging_strategy": _logging_strategy,
    "logging_steps": _logging_steps,
    "report_to": _report_to,
    "seed": _seed,
    "data_seed": _data_seed,
    "tokenizer_name_or_path": _tokenizer,
}
