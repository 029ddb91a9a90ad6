"""The packed step with shared prompts equals the plain `[B, 2, T]` one, whatever the pairs and their packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drift_jax.config import MeshConfig, TrainConfig
from drift_jax.data.batches import PairBatch, PairLoader, epoch_order, put_batch
from drift_jax.data.pairs import TokenizedPair
from drift_jax.models.attention import AttentionBackend, attend
from drift_jax.models.hf import load_params, load_qwen_config
from drift_jax.models.intervals import KeyIntervals, KeySpans
from drift_jax.models.qwen import declare_qwen
from drift_jax.sharding import build_layout, use_layout
from drift_jax.step import MicroBatch, arrange, loss_and_grads
from drift_jax.train import Trainer, host_metrics
from tests.hf_tensors import to_hf_tensors
from tests.plain_step import PlainScores, plain_batch, plain_step
from tests.tiny_models import VOCAB, build_tiny_model

CONFIG = TrainConfig(beta=0.1, label_smoothing=0.1, rpo_alpha=0.5, batch_size=8, warmup_ratio=0.0)
LONGEST = 24  # tokens of a part; one pair has three parts of that, so that few shapes are planned
ROW = 2 * LONGEST  # tokens of a plain row
RTOL = 1e-5
# Of the longest pair and a row length of 128: one row a micro-batch, or as many as the update needs, or in between.
LAYOUTS = ((8, 1, None), (8, 4, None), (4, 1, None), (8, 1, 128), (3, 1, 256))  # pairs, accumulation steps, tokens


class Scene(NamedTuple):
    """A tiny model and the two steps."""

    trainer: Trainer
    params: dict[str, Any]
    packed: Callable[..., Any]
    plain: Callable[..., Any]
    model_dir: Path


@pytest.fixture(scope="module")
def build_scene(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Scene]:
    folder, layout = tmp_path_factory.mktemp("policy"), build_layout(MeshConfig(), jax.devices()[:1])

    @cache
    def build(kind: str, config: TrainConfig = CONFIG) -> Scene:
        model_dir = build_tiny_model(folder / kind, kind, tied=kind == "qwen2", num_hidden_layers=2)
        declared = declare_qwen(load_qwen_config(model_dir))
        trainer = Trainer(*declared, layout, config, "layer", total_steps=10)
        packed = jax.jit(partial(loss_and_grads, trainer.setup))
        return Scene(trainer, load_params(model_dir, layout), packed, plain_step(declared[0], config), model_dir)

    return build


KINDS = pytest.mark.parametrize("kind", ["qwen2", "qwen3"])


def make_pairs(lengths: list[tuple[int, int, int]], seed: int) -> list[TokenizedPair]:
    """Pairs of random ids, of which the first is as long as pairs here become."""
    rng = np.random.default_rng(seed)
    parts = [[rng.integers(0, VOCAB, size).astype(np.int32) for size in sizes] for sizes in [(LONGEST,) * 3, *lengths]]
    return [TokenizedPair(f"p{i}", *ids) for i, ids in enumerate(parts)]


def score_plainly(scene: Scene, pairs: list[TokenizedPair], ref_logps: np.ndarray) -> tuple[Any, Any, PlainScores]:
    metrics, grads, scores = scene.plain(scene.params, plain_batch(pairs, ref_logps, 8, ROW))
    return host_metrics(metrics), grads, PlainScores(*(np.asarray(x)[: len(pairs)] for x in scores))


def reference_near(scene: Scene, pairs: list[TokenizedPair], seed: int) -> np.ndarray:
    """Log-probs of a reference that differs by up to 20 nats from the policy: rewards of up to 2, no sigmoid flat."""
    logps = score_plainly(scene, pairs, np.zeros((len(pairs), 2)))[2].logps
    return np.float32(logps + np.random.default_rng(seed).uniform(-20, 20, logps.shape))


def run_packed(scene: Scene, batch: PairBatch) -> tuple[dict[str, float], dict[str, Any]]:
    with use_layout(scene.trainer.layout):
        metrics, grads = scene.packed(scene.params, put_batch(batch, scene.trainer.layout))
    return host_metrics(metrics), grads


def worst_metric(found: dict[str, float], expected: dict[str, float], beta: float = CONFIG.beta) -> tuple[float, str]:
    """Relative; a reward is beta times a difference of log-probs, and relative to at least beta times one of them."""
    assert found.keys() == expected.keys()
    scales = {name: abs(value) for name, value in expected.items()}
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        logps = max(abs(expected["logps/chosen"]), abs(expected["logps/rejected"]))
        scales[name] = max(scales[name], beta * logps)
    # An accuracy of 0 is 0 on both sides.
    return max((abs(found[name] - expected[name]) / (scales[name] or 1.0), name) for name in expected)


def worst_gradient(scene: Scene, found: Any, expected: Any) -> tuple[float, str]:
    """Of each tensor the norm of the difference over its norm, or over 1e-4 of that of all: where prompts and
    completions have one token only, queries and keys have no gradient but rounding."""
    config = load_qwen_config(scene.model_dir)
    ours, theirs = (to_hf_tensors(grads, config) for grads in (found, expected))
    floor = 1e-4 * np.sqrt(sum(np.linalg.norm(value) ** 2 for value in theirs.values())) + 1e-30
    errors = {n: np.linalg.norm(ours[n] - v) / max(np.linalg.norm(v), floor) for n, v in theirs.items()}
    return max((float(error), name) for name, error in errors.items())


# Of prompt, chosen and rejected; a cut may leave nothing of a completion.
lengths = st.lists(st.tuples(st.integers(1, LONGEST), *[st.integers(0, LONGEST)] * 2), max_size=7)


@KINDS
@settings(max_examples=12, deadline=None)
@given(lengths=lengths, layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**32 - 1))
@example(lengths=[(3, 0, 0), (5, 4, 0), (1, 1, 1)], layout=(8, 1, 128), seed=1)
def test_packed_equals_plain(
    build_scene: Any, kind: str, lengths: list[tuple[int, int, int]], layout: tuple[int, int, int | None], seed: int
) -> None:
    """All updates of an epoch: loss, metrics and every gradient."""
    scene, pairs = build_scene(kind), make_pairs(lengths, seed)
    ref_logps = reference_near(scene, pairs, seed)
    size, accumulation, tokens = layout
    loader = PairLoader(pairs, ref_logps, size, accumulation, ROW, seed % 100, tokens_per_device=tokens)
    order = epoch_order(len(pairs), loader.seed, 0)
    for step in range(loader.steps_per_epoch):
        rows = order[step * size :][:size]
        expected, expected_grads, _ = score_plainly(scene, [pairs[row] for row in rows], ref_logps[rows])
        metrics, grads = run_packed(scene, loader.shuffled(step))
        assert worst_metric(metrics, expected) < (RTOL, "")
        assert worst_gradient(scene, grads, expected_grads) < (RTOL, "")


@KINDS
@settings(max_examples=12, deadline=None)
@given(lengths=lengths, layout=st.sampled_from(LAYOUTS), as_trained=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_the_reference_pass_equals_plain(
    build_scene: Any,
    kind: str,
    lengths: list[tuple[int, int, int]],
    layout: tuple[int, int, int | None],
    as_trained: bool,
    seed: int,
) -> None:
    """Log-probs of each completion and of its last token, NLL and tokens, in both orders of pairs; and rewards."""
    scene, pairs = build_scene(kind), make_pairs(lengths, seed)
    ref_logps = reference_near(scene, pairs, seed)
    size, accumulation, tokens = layout
    loader = PairLoader(pairs, ref_logps, size, accumulation, ROW, seed % 100, tokens_per_device=tokens)
    found = scene.trainer.score_pairs(scene.params, loader, as_trained=as_trained)
    expected = score_plainly(scene, pairs, ref_logps)[2]
    np.testing.assert_allclose(found.logps, expected.logps, rtol=RTOL)
    np.testing.assert_allclose(found.last_logps, expected.last_logps, rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(found.nll, -expected.logps[:, 0], rtol=RTOL)
    np.testing.assert_array_equal(found.tokens, [len(pair.chosen_ids) for pair in pairs])
    rewards = CONFIG.beta * (found.logps - ref_logps)
    larger = np.maximum(abs(expected.logps), abs(ref_logps))  # of the two that a reward is the difference of
    assert (abs(rewards - expected.rewards) <= RTOL * CONFIG.beta * larger).all()


# --- negative twins -----------------------------------------------------------------------------------------


def positions_go_on(batch: PairBatch) -> PairBatch:
    """The rejected side stands after the chosen one instead of after the prompt."""
    starts = batch.spans.prompt_start
    inside = batch.spans.prompt_stop > starts
    return batch._replace(positions=np.where(inside, np.arange(starts.shape[-1]) - starts, 0).astype(np.int32))


def chosen_is_seen(batch: PairBatch) -> PairBatch:
    """Both sides see from the prompt's end on, so that the rejected one sees the chosen one."""
    own, stop = batch.spans.own_start, batch.spans.prompt_stop
    return batch._replace(spans=batch.spans._replace(own_start=np.minimum(own, np.where(stop > 0, stop, own))))


def neighbours_are_seen(batch: PairBatch) -> PairBatch:
    return batch._replace(spans=KeySpans(*(np.zeros_like(bound) for bound in batch.spans)))


def sources_are_late(batch: PairBatch) -> PairBatch:
    """Each token is predicted by itself."""
    return batch._replace(sources=np.where(batch.owners >= 0, batch.sources + 1, 0))


def sides_are_swapped(batch: PairBatch) -> PairBatch:
    return batch._replace(owners=np.where(batch.owners >= 0, batch.owners ^ 1, -1))


MISTAKES = (positions_go_on, chosen_is_seen, neighbours_are_seen, sources_are_late, sides_are_swapped)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def seven_pairs(build_scene: Any, request: pytest.FixtureRequest) -> tuple[Scene, PairLoader, Any, Any]:
    scene, rng = build_scene(request.param), np.random.default_rng(4)
    pairs = make_pairs([tuple(rng.integers(4, LONGEST, 3).tolist()) for _ in range(6)], 4)
    ref_logps = reference_near(scene, pairs, 4)
    return scene, PairLoader(pairs, ref_logps, 8, 1, ROW), *score_plainly(scene, pairs, ref_logps)[:2]


@pytest.mark.parametrize("mistake", [lambda batch: batch, *MISTAKES], ids=lambda change: change.__name__)
def test_mistakes_are_far_outside(seven_pairs: Any, mistake: Callable[[PairBatch], PairBatch]) -> None:
    """Without one the loss agrees; with any it is at least 100 tolerances away, some gradient 1000."""
    scene, loader, expected, expected_grads = seven_pairs
    metrics, grads = run_packed(scene, mistake(loader.shuffled(0)))
    error, name = worst_metric(metrics, expected)
    grad_error, tensor = worst_gradient(scene, grads, expected_grads)
    if mistake in MISTAKES:
        assert abs(metrics["loss"] - expected["loss"]) > 100 * RTOL * expected["loss"]
        assert grad_error > 1000 * RTOL
    else:
        assert error < RTOL, name
        assert grad_error < RTOL, tensor


# --- rows in the order of the kernels -----------------------------------------------------------------------


def attend_intervals(query: jax.Array, key: jax.Array, value: jax.Array, seen: KeyIntervals) -> jax.Array:
    """What a kernel is to compute."""
    keys = np.arange(key.shape[1])
    return attend(query, key, value, (keys >= seen.start[..., None]) & (keys < seen.stop[..., None]))


def keep_sources(backend: AttentionBackend, micro: MicroBatch) -> Any:
    """The mistake: rows are turned round, and their completion tokens looked for where they were."""
    turned, seen = arrange(backend, micro)
    return turned._replace(sources=micro.sources), seen


@pytest.mark.parametrize("change", [arrange, keep_sources], ids=lambda change: change.__name__)
def test_rows_in_the_order_of_the_kernels_equal_plain(seven_pairs: Any, change: Callable[..., Any]) -> None:
    scene, loader, expected, expected_grads = seven_pairs
    kernel = AttentionBackend("turned", None, True, attend_intervals)
    setup = dataclasses.replace(scene.trainer.setup, attention=kernel)
    with patch("drift_jax.step.arrange", change):
        metrics, grads = run_packed(scene._replace(packed=jax.jit(partial(loss_and_grads, setup))), loader.shuffled(0))
    error, grad_error = worst_metric(metrics, expected), worst_gradient(scene, grads, expected_grads)
    if change is arrange:
        assert max(error, grad_error) < (RTOL, "")
    else:
        assert min(error, grad_error) > (100 * RTOL, "")


# --- no matter how they are packed --------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["global_token_mean", "sequence_mean", "group_token_mean"])
def test_the_loss_does_not_depend_on_packing(build_scene: Any, reduction: str) -> None:
    """Same pairs, other budgets, for every NLL; TRL's groups are neighbours of the shuffled batch, not of a row."""
    config = dataclasses.replace(CONFIG, nll_reduction=reduction, nll_tokens="nonzero", group_size=3)
    scene, rng = build_scene("qwen2", config), np.random.default_rng(9)
    pairs = make_pairs([tuple(rng.integers(1, LONGEST, 3).tolist()) for _ in range(7)], 9)
    for pair in pairs[::2]:
        pair.chosen_ids[-1] = 0  # the token that `nonzero` leaves out
    ref_logps = reference_near(scene, pairs, 9)
    order = epoch_order(len(pairs), 2, 0)
    expected, expected_grads, _ = score_plainly(scene, [pairs[i] for i in order], ref_logps[order])
    shapes = set()
    for tokens in (128, 1024):
        batch = PairLoader(pairs, ref_logps, 8, 1, ROW, seed=2, tokens_per_device=tokens).shuffled(0)
        shapes.add(batch.ids.shape)
        metrics, grads = run_packed(scene, batch)
        assert worst_metric(metrics, expected) < (RTOL, "")
        assert worst_gradient(scene, grads, expected_grads) < (RTOL, "")
    assert len(shapes) == 2
    in_file_order, _, _ = score_plainly(scene, pairs, ref_logps)
    moved = abs(in_file_order["nll_loss"] - expected["nll_loss"]) / expected["nll_loss"]
    assert moved > 1e-3 if reduction == "group_token_mean" else moved < RTOL
