"""What policies prefer on pairs: every stage of a run against its own reference, or one model against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.data.chat_template import Thinking
from drift_jax.data.pairs import TokenizedPair, tokenize_pair
from drift_jax.data.rules import build_rules
from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.distributed import on_each
from drift_jax.errors import ConfigError, DataError, StageError
from drift_jax.evaluation.preference import PairLogps
from drift_jax.manifest import Manifest
from drift_jax.models.hf import load_qwen_config, resolve_model
from drift_jax.records import Message, Pair
from drift_jax.sharding import build_layout
from drift_jax.stages.dpo import build_trainer
from drift_jax.stages.inputs import open_policy, open_tokenizer
from drift_jax.stages.scoring import pair_logps, score_pairs
from drift_jax.stages.tokens import load_tokenized


@dataclass(frozen=True)
class Target:
    """A policy, and the reference that its rewards are against."""

    name: str
    policy: Path
    reference: Path


@dataclass(frozen=True)
class Scored:
    """What was found of each target, and the pairs of the file that are left out: reason -> how many."""

    of: Mapping[str, PairLogps]
    drops: Mapping[str, int]


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run, or of one of its stages."""
    return any((folder / "config.yaml").is_file() and (folder / "manifest.json").is_file() for folder in _folders(path))


def run_folder(path: Path) -> Path:
    """RUN, of RUN or RUN/iter_2."""
    return next(folder for folder in _folders(path) if (folder / "config.yaml").is_file())


def _folders(path: Path) -> tuple[Path, Path]:
    return path, path.absolute().parent


def find_stages(run: Path) -> list[str]:
    """The stages of a run that have a policy, in their order."""
    iterations = sorted(int(path.parent.name[5:]) for path in run.glob("iter_*/hf") if path.parent.name[5:].isdigit())
    names = ["seed", *(f"iter_{number}" for number in iterations)]
    return [name for name in names if (run / name / "hf" / "config.json").is_file()]


def find_targets(config: RunConfig, given: Path, reference: Path | None) -> list[Target]:
    """The stages of a run (RUN), or one of them (RUN/iter_2), each against its own reference unless one is given.

    Raises:
      StageError: no stage has a policy, or a reference is no longer what the stage was trained against.
    """
    run = run_folder(given)
    stages = find_stages(run)
    wanted = stages if given == run else [name for name in stages if name == given.name]
    if not wanted:
        raise StageError(f"{given} has no exported policy (hf/): finish the run, or name a stage that is finished.")
    initial = resolve_model(config.model.path, config.model.revision) if reference is None else reference
    manifest, targets = Manifest(run), []
    for name in wanted:
        own = reference or _own_reference(config, run, stages, name, initial)
        made = manifest.inputs(f"{name}/train").get("reference")
        if reference is None and made is not None and manifest.model_hash(own) != made:
            raise StageError(
                f"{own} is not what {run / name} was trained against: its files have changed since. Restore them, or "
                "name the reference with --reference."
            )
        targets.append(Target(name, run / name / "hf", own))
    return targets


def _own_reference(config: RunConfig, run: Path, stages: Sequence[str], name: str, initial: Path) -> Path:
    before = stages[: stages.index(name)]
    if name == "seed" or not before or config.recipe.reference == "initial":
        return initial
    return run / before[-1] / "hf"


def score_targets(config: RunConfig, targets: Sequence[Target], pairs: Path, console: Console) -> Scored:
    """Log-probs of a file of pairs; every model is loaded once, by the forward pass and the rules of training.

    Raises:
      DataError: no pair is left.
      ConfigError: models have tokenizers of their own.
    """
    models = list(dict.fromkeys(path for target in targets for path in (target.reference, target.policy)))
    tokenizer = shared_tokenizer(models, config.data.thinking)
    file = load_tokenized(config, pairs, tokenizer, console=console)
    if not file.pairs:
        raise file.nothing_left(pairs, "evaluate on")
    logps = score_models(config, models, file.pairs, console)
    of = {t.name: pair_logps(file.pairs, logps[t.policy], logps[t.reference]) for t in targets}
    return Scored(of, {reason: count for reason, count in file.drops.items() if count})


def shared_tokenizer(models: Sequence[Path], thinking: Thinking) -> ChatTokenizer:
    """Raises `ConfigError` unless all models make the same ids of a text."""
    tokenizers = [on_each(lambda model=model: open_tokenizer(model, thinking)) for model in models]
    for model, tokenizer in zip(models, tokenizers, strict=True):
        if tokenizer.content_hash != tokenizers[0].content_hash:
            raise ConfigError(
                f"{model} and {models[0]} have different tokenizers or chat templates: log-probs of different ids "
                "cannot be compared. Name a reference of the same family."
            )
    return tokenizers[0]


def score_models(
    config: RunConfig, models: Sequence[Path], pairs: Sequence[TokenizedPair], console: Console
) -> dict[Path, Float[np.ndarray, "N 2"]]:
    """Log-probs of pairs under each model, one model in memory at a time."""
    layout, trainer, known, logps = build_layout(config.mesh), None, None, {}
    for model in models:
        architecture = on_each(lambda model=model: load_qwen_config(model))
        if trainer is None or architecture != known:
            trainer, known = build_trainer(config, model, layout, 1), architecture
        c = config.model.compute_dtype, config.train.master_dtype
        params = open_policy(model, layout, *c, console).params
        logps[model] = score_pairs(config, trainer, params, pairs, f"log-probs under {label(model)}", console).logps
        del params
    return logps


def label(model: Path) -> str:
    """RUN/iter_2/hf is iter_2."""
    return model.parent.name if model.name == "hf" else model.name


def implicit_rewards(
    config: RunConfig,
    policy: str,
    reference: str,
    replies: Sequence[tuple[str, Sequence[Message], str]],
    console: Console,
) -> list[float]:
    """beta * (log p_policy - log p_reference) of each reply (id, dialogue, text), two of them in each pair.

    Raises:
      DataError: a reply cannot be encoded, or has no token left within `data.max_length`.
    """
    models = [on_each(lambda path=path: resolve_model(path)) for path in (policy, reference)]
    tokenizer, data = shared_tokenizer(models, config.data.thinking), config.data
    rules = build_rules(data)
    by_prompt: dict[tuple[Message, ...], list[int]] = {}
    for at, (_, prompt, _) in enumerate(replies):
        by_prompt.setdefault(tuple(prompt), []).append(at)
    places, pairs = [], []
    for prompt, members in by_prompt.items():
        for first in range(0, len(members), 2):
            both = (members[first], members[min(first + 1, len(members) - 1)])
            name = " and ".join(dict.fromkeys(replies[at][0] for at in both))
            pair = Pair(name, prompt, replies[both[0]][2], replies[both[1]][2])
            pairs.append(tokenize_pair(pair, tokenizer, data.max_prompt_length, data.max_length, rules))
            places.append(both)
    emptied = [pair.id for pair in pairs if pair.emptied]
    if emptied:
        raise DataError(
            f"{len(emptied)} replies have no token left within data.max_length ({data.max_length}), among them "
            f"{', '.join(emptied[:5])}. Raise it in the file of --config."
        )
    logps = score_models(config, models, pairs, console)
    rewards = np.empty(len(replies))
    rewards[np.asarray(places)] = config.train.beta * (logps[models[0]] - logps[models[1]])
    return [float(reward) for reward in rewards]


def describe(targets: Sequence[Target]) -> dict[str, dict[str, Any]]:
    """Where policies and references lie."""
    return {target.name: {"policy": str(target.policy), "reference": str(target.reference)} for target in targets}
