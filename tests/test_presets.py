"""Presets: what they choose, and that `paper` computes what TRL 0.11 and 0.12 compute, written out in torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

import jax
import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from drift_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, SamplingConfig, TrainConfig, build_config
from drift_jax.data.batches import PairBatch, epoch_order
from drift_jax.data.chat_template import THOUGHTS
from drift_jax.data.pairs import TokenizedPair, tokenize_pair
from drift_jax.data.prompts import PROMPT_STYLES
from drift_jax.data.rules import END_RULES, TEMPLATES, TRUNCATIONS, build_rules
from drift_jax.data.tokenizer import load_tokenizer
from drift_jax.errors import ConfigError
from drift_jax.files import write_jsonl
from drift_jax.losses import NLL_REDUCTIONS, NLL_TOKENS
from drift_jax.models.architecture import PAD_EMBEDDINGS
from drift_jax.models.hf import load_params
from drift_jax.presets import CHOICES, PRESETS, preset_values
from drift_jax.records import Pair, pair_to_row, read_pairs
from drift_jax.sharding import build_layout
from drift_jax.stages.dpo import TrainJob, build_loader, build_trainer, train_stage
from drift_jax.stages.reference import RefLogps
from drift_jax.telemetry import read_metrics
from drift_jax.train import host_metrics
from tests import old_trl
from tests.old_trl import TRL_0_11, TRL_0_12_2, TRL_0_13, OldTrl, Settings
from tests.tiny_pairs import build_tiny_policy

REPO = Path(__file__).parents[1]
PAIRS = REPO / "data" / "sample" / "compare.jsonl"
STACKS = {"trl<=0.11": TRL_0_11, "trl0.12": TRL_0_13, "trl0.12.0-0.12.2": TRL_0_12_2}
BETA = 0.1
SETTINGS = Settings(learning_rate=1e-4, steps=30, max_length=256, max_prompt_length=64)


def resolve(preset: str, **sections: Any) -> RunConfig:
    return build_config({"run_dir": "r", "model": {"path": "m"}, "preset": preset} | sections)


# --- what a preset chooses --------------------------------------------------------------------------------


def test_every_choice_names_an_object_and_is_a_value_of_the_config() -> None:
    objects = {
        "data.template": (DataConfig, TEMPLATES),
        "data.eos": (DataConfig, END_RULES),
        "data.truncation": (DataConfig, TRUNCATIONS),
        "data.thinking": (DataConfig, THOUGHTS),
        "train.nll_reduction": (TrainConfig, NLL_REDUCTIONS),
        "train.nll_tokens": (TrainConfig, NLL_TOKENS),
        "model.pad_embedding": (ModelConfig, PAD_EMBEDDINGS),
        "sampling.style": (SamplingConfig, PROMPT_STYLES),
    }
    assert CHOICES.keys() == objects.keys()
    for key, (section, table) in objects.items():
        literal = get_type_hints(section)[key.split(".")[1]]
        assert set(CHOICES[key]) == set(table) == set(get_args(literal)), key


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_defaults_and_explicit_keys_win(preset: str) -> None:
    config = resolve(preset)
    for key, value in PRESETS[preset].items():
        section, leaf = key.split(".")
        assert getattr(getattr(config, section), leaf) == value
    assert resolve(preset, data={"eos": "append"}).data.eos == "append"
    assert resolve(preset, train={"nll_reduction": "sequence_mean"}).train.nll_reduction == "sequence_mean"


def test_drift_is_the_default_and_equals_the_dataclasses() -> None:
    assert build_config({"run_dir": "r", "model": {"path": "m"}}) == resolve("drift")
    assert resolve("drift").data == DataConfig() and resolve("drift").train == TrainConfig()


def test_the_cut_of_trl_0_12_brings_its_other_rules() -> None:
    config = resolve("paper", data={"truncation": "trl0.12"})
    assert (config.data.eos, config.train.nll_tokens) == ("append", "nonzero")
    assert (resolve("paper").data.eos, resolve("paper").train.nll_tokens) == ("append_if_missing", "all")
    config = resolve("paper", data={"truncation": "trl0.12", "eos": "turn_end"}, train={"group_size": 2})
    assert (config.data.eos, config.train.group_size) == ("turn_end", 2)


def test_unknown_presets_are_named() -> None:
    with pytest.raises(ConfigError, match="'grpo' is not one of drift, paper, trl1. See `drift presets`"):
        preset_values("grpo")


# --- paper against torch ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It pads with its turn end, as SmolLM2 does: torch never trains the embedding of that one."""
    return build_tiny_policy(tmp_path_factory.mktemp("presets") / "m", vocab_size=384, pad_token_id=381)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return list(read_pairs(PAIRS).records)


@pytest.fixture(scope="module")
def short_pairs(pairs: list[Pair]) -> list[Pair]:
    """The same pairs with replies of many lengths, so that some rows are cut and others are not.

    An exclamation mark has id 0 here, as in Qwen: the token that some versions skip.
    """
    return [
        dataclasses.replace(p, chosen=p.chosen[: 10 + 53 * i % 250] + "!", rejected=p.rejected[: 10 + 71 * i % 250])
        for i, p in enumerate(pairs)
    ]


def paper_config(truncation: str, s: Settings = SETTINGS, **train: Any) -> RunConfig:
    data = {"truncation": truncation, "max_length": s.max_length, "max_prompt_length": s.max_prompt_length}
    train = {"learning_rate": s.learning_rate, "batch_size": 8, "max_steps": s.steps} | train
    model = {"path": "m", "compute_dtype": "float32", "remat": "none"}
    return resolve("paper", model=model, data=data, train=train)


def tokenize_all(pairs: list[Pair], config: RunConfig, model_dir: Path) -> list[TokenizedPair]:
    tokenizer, rules, data = load_tokenizer(model_dir), build_rules(config.data), config.data
    return [tokenize_pair(p, tokenizer, data.max_prompt_length, data.max_length, rules) for p in pairs]


@pytest.mark.parametrize("truncation", STACKS)
@pytest.mark.parametrize("lengths", [(256, 96), (1200, 64), (4096, 2048)])
def test_tokens_equal_those_of_old_trl(
    truncation: str, lengths: tuple[int, int], pairs: list[Pair], model_dir: Path
) -> None:
    """All rows of every batch: prompt, completions and masks, with nothing, something and nearly all cut."""
    s = dataclasses.replace(SETTINGS, max_length=lengths[0], max_prompt_length=lengths[1])
    config = paper_config(truncation, s)
    ours = tokenize_all(pairs, config, model_dir)
    hf = PreTrainedTokenizerFast.from_pretrained(model_dir)
    theirs = [old_trl.tokenize(pair_to_row(pair), hf, STACKS[truncation], s) for pair in pairs]
    trainer = build_trainer(config, model_dir, build_layout(config.mesh, jax.devices()[:1]), steps=1)
    loader = build_loader(config, trainer, ours)
    for step in range(loader.steps_per_epoch):
        sides = unpack(loader.shuffled(step))
        order = epoch_order(len(pairs), config.train.seed, 0)[step * 8 :][:8]
        for start in range(0, 8, old_trl.GROUP):
            ids, attention, mask = old_trl.collate(
                [theirs[i] for i in order[start : start + old_trl.GROUP]], STACKS[truncation], s
            )
            rows = [(i, side) for side in (0, 1) for i in range(start, start + old_trl.GROUP)]
            for k, (i, side) in enumerate(rows):
                (ids_of_side, counted), size = sides[i, side], int(attention[k].sum())
                # A lost last token is still in our row: it does not count, and nothing sees it.
                assert ids_of_side[:size] == ids[k, :size].tolist()
                assert counted == torch.nonzero(mask[k])[:, 0].tolist()


def unpack(batch: PairBatch) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """(pair, side) -> ids of prompt and completion, and the places in them that count, of a packed batch.

    From what the step looks at: spans say where a side stands, and sources, targets and owners which tokens count.
    """
    found, length = {}, batch.ids.shape[2]
    for micro in range(len(batch.ids)):
        # On one device: the sources of all rows are listed together.
        ((sources, targets, owners),) = zip(
            *(x[micro] for x in (batch.sources, batch.targets, batch.owners)), strict=True
        )
        for owner in np.unique(owners[owners >= 0]):
            ((row, *_), listed) = np.divmod(sources[owners == owner], length)
            ids, positions = batch.ids[micro, row], batch.positions[micro, row]
            first, last, own = (bound[micro, row] for bound in batch.spans)
            start, stop = first[listed[0]], last[listed[0]]
            begin = max(own[(first == start) & (last == stop)]) if owner % 2 else stop
            side = np.concatenate([np.arange(start, stop), np.flatnonzero((own == begin) & (last == stop))])
            assert positions[side].tolist() == list(range(len(side)))
            counted = positions[listed] + 1
            assert targets[owners == owner].tolist() == ids[side][counted].tolist()
            found[divmod(int(owner), 2)] = (ids[side].tolist(), counted.tolist())
    return found


def train_ours(config: RunConfig, pairs: list[Pair], model_dir: Path) -> list[dict[str, float]]:
    layout = build_layout(config.mesh, jax.devices()[:1])
    steps = config.train.max_steps or 1
    trainer, params = build_trainer(config, model_dir, layout, steps), load_params(model_dir, layout)
    tokenized = tokenize_all(pairs, config, model_dir)
    scores = trainer.score_pairs(params, build_loader(config, trainer, tokenized), as_trained=True)
    loader = build_loader(config, trainer, tokenized, RefLogps(scores.logps, scores.last_logps))
    return [host_metrics(m) for _, _, m, _ in trainer.fit(trainer.init_state(params), loader, steps)]


def train_theirs(trl: OldTrl, s: Settings, config: RunConfig, pairs: list[Pair], model_dir: Path) -> Any:
    size, per_epoch = config.train.batch_size, len(pairs) // config.train.batch_size
    updates = []
    for step in range(s.steps):
        epoch, position = divmod(step, per_epoch)
        order = epoch_order(len(pairs), config.train.seed, epoch)[position * size :][:size]
        updates.append([pair_to_row(pairs[i]) for i in order])
    return old_trl.train(model_dir, updates, trl, s, torch.float32)[0]


def largest_difference(theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> tuple[float, str]:
    """As scripts/compare_trl.py: relative, rewards less four roundings of their log-probs and to at least beta."""
    found = [(0.0, "nothing")]
    for step, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        logps = np.float32(max(abs(a["logps/chosen"]), abs(a["logps/rejected"])))
        for name in a.keys() & b.keys():
            gap, scale = abs(b[name] - a[name]), abs(a[name])
            if "rewards" in name:
                gap, scale = gap - 4 * BETA * float(np.spacing(logps)), max(scale, BETA)
            if gap > 0:
                found.append((gap / scale if scale else np.inf, f"{name} of update {step}"))
    return max(found)


@pytest.mark.slow
@pytest.mark.parametrize("truncation", STACKS)
def test_thirty_updates_equal_old_trl(truncation: str, short_pairs: list[Pair], model_dir: Path) -> None:
    config = paper_config(truncation)
    theirs = train_theirs(STACKS[truncation], SETTINGS, config, short_pairs, model_dir)
    assert theirs[-1]["rewards/margins"] > 1, "the weights must move for this test to mean anything"
    ours = train_ours(config, short_pairs, model_dir)
    assert len(ours) == SETTINGS.steps
    worst, where = largest_difference(theirs, ours)
    assert worst < 1e-4, where


@pytest.mark.slow
def test_a_stage_computes_what_its_preset_says(short_pairs: list[Pair], model_dir: Path, tmp_path: Path) -> None:
    """Through `train_stage`: the config alone decides; with its metrics.jsonl the judge is old TRL."""
    s = dataclasses.replace(SETTINGS, steps=8)
    config = paper_config("trl0.12.0-0.12.2", s)
    write_jsonl(tmp_path / "pairs.jsonl", map(pair_to_row, short_pairs))
    job = TrainJob(model_dir, model_dir, tmp_path / "pairs.jsonl", None, tmp_path / "out", epochs=1.0)
    mesh = MeshConfig(1, 1, 1)
    with patch("drift_jax.stages.dpo.build_layout", lambda _: build_layout(mesh, jax.devices()[:1])):
        train_stage(config, job, Console(quiet=True))
    theirs = train_theirs(TRL_0_12_2, s, config, short_pairs, model_dir)
    worst, where = largest_difference(theirs, read_metrics(tmp_path / "out"))
    assert worst < 1e-4, where


@pytest.fixture(scope="module")
def one_update(short_pairs: list[Pair], model_dir: Path) -> tuple[RunConfig, list[Pair], list[dict[str, float]]]:
    """TRL 0.12.2's update on eight pairs that fit whole: were every row cut, some choices would make no difference."""
    s = dataclasses.replace(SETTINGS, steps=1)
    pairs = sorted(short_pairs, key=lambda pair: sum(len(m.content) for m in pair.prompt))[:8]
    config = paper_config("trl0.12.0-0.12.2", s)
    return config, pairs, train_theirs(TRL_0_12_2, s, config, pairs, model_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"nll_reduction": "global_token_mean"}},  # group means weigh short groups more
        {"train": {"nll_tokens": "all"}},
        {"data": {"truncation": "trl0.12"}},
        {"data": {"eos": "as_rendered"}},
        {"data": {"template": "generation_prompt"}},
        {"model": {"pad_embedding": "trained"}},
    ],
    ids=json.dumps,
)
def test_every_choice_matters(changes: dict[str, dict[str, Any]], one_update: Any, model_dir: Path) -> None:
    """Without a change, the numbers agree; with one choice of another stack they are far outside the tolerance."""
    config, pairs, theirs = one_update
    for section, values in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    worst, where = largest_difference(theirs, train_ours(config, pairs, model_dir))
    assert worst > 5e-5 if changes else worst < 1e-5, where
