"""What must hold for every pair: where it lies in a batch changes nothing, and swapping its sides flips the margin.

Each property has its negative twin: the same comparison with a common mistake put into the model or the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_jax.config import MeshConfig, TrainConfig
from drift_jax.data.batches import PairBatch, PairLoader, put_batch
from drift_jax.data.pairs import TokenizedPair
from drift_jax.losses import dpo_losses
from drift_jax.models.attention import attend
from drift_jax.models.hf import load_params, load_qwen_config
from drift_jax.models.logps import CHUNK, token_logps
from drift_jax.models.policy import bind
from drift_jax.models.qwen import declare_qwen
from drift_jax.sharding import build_mesh
from drift_jax.train import PairScores, Trainer, host_metrics, loss_and_grads
from tests.tiny_models import VOCAB, build_tiny_model

CONFIG = TrainConfig(beta=0.3, label_smoothing=0.1, rpo_alpha=0.5, batch_size=4, learning_rate=1e-4, warmup_ratio=0.0)
PAD = 0  # what the loader fills rows with, and here a token like any other too

# Float32: a sum of n token log-probs, rounded after each, is right to about sqrt(n) of 6e-8, so 7e-7 for 128 of
# them; each is a difference of logits of order ten, which other row lengths change in their last bits.
RELATIVE, ABSOLUTE = 2e-6, 1e-5  # of a summed log-prob; nats


class Layout(NamedTuple):
    """How pairs lie in batches. Few of them: each of its row lengths is compiled once per model."""

    batch_size: int
    max_length: int  # rows of 128: 128; of 192: 192; of 256: 128 or 256, as the longest pair of the batch needs
    chunk: int


ALONE = Layout(1, 128, CHUNK)
LAYOUTS = (Layout(4, 128, 48), Layout(3, 192, 1000), Layout(2, 256, 9))


@dataclass(frozen=True)
class ChangedLoader(PairLoader):
    """A loader whose batches are changed before they leave."""

    change: Callable[[PairBatch], PairBatch] = field(default=lambda batch: batch)

    def _build(self, rows: np.ndarray, lost_ends: np.ndarray) -> PairBatch:
        return self.change(super()._build(rows, lost_ends))


class Scorer:
    """One tiny model; its programs are compiled once."""

    def __init__(self, model_dir: Path) -> None:
        self.mesh = build_mesh(MeshConfig(), jax.devices()[:1])
        self.declared = declare_qwen(load_qwen_config(model_dir))
        self.params = load_params(model_dir, self.mesh)
        self.trainers: dict[Any, Trainer] = {}
        setup = self.build_trainer().setup
        self._metrics = jax.jit(lambda params, batch: loss_and_grads(setup, params, batch)[0])

    def build_trainer(self) -> Trainer:
        return Trainer(*self.declared, self.mesh, CONFIG, "none", total_steps=10)

    def score(
        self,
        pairs: list[TokenizedPair],
        layout: Layout = ALONE,
        change: Callable[[PairBatch], PairBatch] = lambda batch: batch,
        bind: Callable[..., Any] = bind,
    ) -> PairScores:
        """The reference pass; `change` and `bind` may put a mistake into the batch or the model."""
        key = (layout.chunk, bind)
        if key not in self.trainers:
            self.trainers[key] = self.build_trainer()
        zeros = np.zeros((len(pairs), 2))
        loader = ChangedLoader(pairs, zeros, layout.batch_size, 1, layout.max_length, change=change)
        chunked = partial(token_logps, chunk=layout.chunk)
        with patch("drift_jax.train.token_logps", chunked), patch("drift_jax.train.bind", bind):
            return self.trainers[key].score_pairs(self.params, loader)

    def step(self, pairs: list[TokenizedPair], ref_logps: np.ndarray) -> dict[str, float]:
        """Metrics of an update of one to four pairs, filled up to four, in rows of 128."""
        batch = PairLoader(pairs, ref_logps, 4, 1, max_length=128).shuffled(0)
        with jax.set_mesh(self.mesh):
            return host_metrics(self._metrics(self.params, put_batch(batch, self.mesh)))


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    out = tmp_path_factory.mktemp("policy") / "m"
    return Scorer(build_tiny_model(out, request.param, tied=request.param == "qwen2"))


def make_pair(sizes: tuple[int, int, int], seed: int, pad_share: float = 0.2) -> TokenizedPair:
    rng = np.random.default_rng(seed)

    def ids(size: int) -> np.ndarray:
        return np.where(rng.random(size) < pad_share, PAD, rng.integers(1, VOCAB, size)).astype(np.int32)

    return TokenizedPair(f"p{seed}", *map(ids, sizes))


@st.composite
def token_pairs(draw: st.DrawFn, longest: int = 128) -> TokenizedPair:
    """Rows of 2 to `longest` tokens; every fifth is the id that fills rows."""
    prompt = draw(st.integers(1, longest - 1))
    chosen, rejected = (draw(st.integers(1, longest - prompt)) for _ in range(2))
    return make_pair((prompt, chosen, rejected), draw(st.integers(0, 2**32 - 1)))


def reference_near(logps: np.ndarray, seed: int) -> np.ndarray:
    """Log-probs of a reference so near that no sigmoid is flat."""
    return np.float32(logps + np.random.default_rng(seed).uniform(-3, 3, logps.shape))


def dpo_of(logps: np.ndarray, ref_logps: np.ndarray) -> np.ndarray:
    """DPO loss of each pair."""
    single = (jnp.asarray(x, jnp.float32) for x in (logps, ref_logps))
    return np.asarray(dpo_losses(*single, CONFIG.beta, CONFIG.label_smoothing), np.float64)


def allowed_in_dpo(logps: np.ndarray) -> float:
    """What the rounding of two summed log-probs may change in a pair's DPO loss, whose slope is at most beta."""
    return CONFIG.beta * float(np.max(np.sum(ABSOLUTE + RELATIVE * np.abs(logps), axis=-1)))


def fill_with_noise(batch: PairBatch) -> PairBatch:
    """Other ids than the loader's where a row has ended, and in the rows that only fill the batch."""
    length = batch.ids.shape[-1]
    mask = np.asarray(batch.completion_mask)
    end = np.where(mask.any(-1), length - np.argmax(mask[..., ::-1], axis=-1), 0)
    noise = np.random.default_rng(0).integers(0, VOCAB, batch.ids.shape).astype(np.int32)
    return batch._replace(ids=np.where(np.arange(length) < end[..., None], batch.ids, noise))


# --- where a pair lies --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), pair=token_pairs(), layout=st.sampled_from(LAYOUTS), noise=st.booleans(), seed=st.integers(0, 99)
)
def test_a_pair_scores_the_same_wherever_it_lies(
    scorer: Scorer, data: st.DataObject, pair: TokenizedPair, layout: Layout, noise: bool, seed: int
) -> None:
    """Row length, padding and what fills it, neighbours, their number and order, and the chunk of log-probs."""
    neighbours = data.draw(st.lists(token_pairs(layout.max_length), max_size=5), "neighbours")
    place = data.draw(st.integers(0, len(neighbours)), "place")
    alone = scorer.score([pair])
    crowd = [*neighbours[:place], pair, *neighbours[place:]]
    among = scorer.score(crowd, layout, fill_with_noise if noise else lambda batch: batch)
    for name in ("logps", "last_logps", "nll"):
        seen, expected = getattr(among, name)[place], getattr(alone, name)[0]
        np.testing.assert_allclose(seen, expected, rtol=RELATIVE, atol=ABSOLUTE, err_msg=name)
    assert among.tokens[place] == alone.tokens[0] == len(pair.chosen_ids)
    ref = reference_near(alone.logps, seed)
    difference = dpo_of(among.logps[[place]], ref) - dpo_of(alone.logps, ref)
    assert abs(difference[0]) <= allowed_in_dpo(alone.logps)


@settings(max_examples=25, deadline=None)
@given(pairs=st.lists(token_pairs(), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_step_is_the_mean_of_pairs_that_are_alone(scorer: Scorer, pairs: list[TokenizedPair], seed: int) -> None:
    alone = [scorer.score([pair]) for pair in pairs]
    logps, nll, tokens = (np.concatenate([getattr(s, name) for s in alone]) for name in ("logps", "nll", "tokens"))
    ref = reference_near(logps, seed)
    metrics = scorer.step(pairs, ref)
    for side, name in enumerate(("chosen", "rejected")):
        expected = logps[:, side].mean()
        assert metrics[f"logps/{name}"] == pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)
    mean_nll = nll.sum() / tokens.sum()
    assert metrics["nll_loss"] == pytest.approx(mean_nll, rel=RELATIVE, abs=ABSOLUTE)
    expected = dpo_of(logps, ref).mean() + CONFIG.rpo_alpha * mean_nll
    assert metrics["loss"] == pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE + allowed_in_dpo(logps))


# --- the same with a mistake in it --------------------------------------------------------------------------

WITH_PAD_ID = make_pair((20, 30, 25), seed=1)
WITHOUT_PAD_ID = make_pair((20, 30, 25), seed=1, pad_share=0.0)
ONE_MODEL = pytest.mark.parametrize("scorer", ["qwen2"], indirect=True)
FAR = 1e-3  # relative: hundreds of times what is allowed above


def largest_change(scores: PairScores, expected: PairScores) -> float:
    return float(np.max(np.abs(scores.logps / expected.logps - 1)))


def bind_changed(
    mask: Callable[[Any], Any] | None = None, move: Callable[[Any, Any], Any] = lambda rows, positions: positions
) -> Callable[..., Any]:
    """`bind` of a model that looks at the tokens that `mask(ids)` names, and has its tokens at other positions."""

    def changed(graphdef: Any, params: Any) -> Any:
        model = bind(graphdef, params)

        def hidden(rows: Any, positions: Any, remat: str) -> Any:
            chosen = partial(attend, mask=None if mask is None else mask(rows))
            with patch("drift_jax.models.qwen.attend", chosen):
                return model.hidden(rows, move(rows, positions), remat)

        return SimpleNamespace(hidden=hidden, output_table=model.output_table)

    return changed


def causal(rows: Any) -> Any:
    length = rows.shape[1]
    return jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows.shape[0], length, length))


BIND = {
    "nothing": bind_changed(mask=causal),
    "attention to what comes later": bind_changed(mask=lambda rows: jnp.ones_like(causal(rows))),
    "attention by id": bind_changed(mask=lambda rows: causal(rows) & (rows != PAD)[:, None, :]),
    "positions by id": bind_changed(move=lambda rows, positions: jnp.cumsum(rows != PAD, axis=1) - 1),
    "a gap in the positions": bind_changed(move=lambda rows, positions: positions + (positions >= 20)),
}


@ONE_MODEL
@pytest.mark.parametrize("mistake", BIND)
def test_mistakes_in_the_model_are_seen(scorer: Scorer, mistake: str) -> None:
    """A pad id in the prompt tells a mask by position from one by id; any other pair does not."""
    with_pad, without = (
        largest_change(scorer.score([pair], bind=BIND[mistake]), scorer.score([pair]))
        for pair in (WITH_PAD_ID, WITHOUT_PAD_ID)
    )
    assert with_pad < RELATIVE if mistake == "nothing" else with_pad > FAR
    assert without < RELATIVE if "by id" in mistake or mistake == "nothing" else without > FAR


@ONE_MODEL
def test_attention_to_padding_makes_the_row_length_matter(scorer: Scorer) -> None:
    wrong = BIND["attention to what comes later"]
    short, long = (scorer.score([WITH_PAD_ID], layout, bind=wrong) for layout in (ALONE, Layout(1, 192, CHUNK)))
    assert largest_change(long, short) > FAR


@ONE_MODEL
def test_a_completion_known_by_id_is_seen(scorer: Scorer) -> None:
    def by_id(batch: PairBatch) -> PairBatch:
        return batch._replace(completion_mask=batch.completion_mask & (np.asarray(batch.ids) != PAD))

    assert largest_change(scorer.score([WITH_PAD_ID], change=by_id), scorer.score([WITH_PAD_ID])) > FAR
    same = scorer.score([WITHOUT_PAD_ID], change=by_id)
    np.testing.assert_array_equal(same.logps, scorer.score([WITHOUT_PAD_ID]).logps)


# --- chosen and rejected ------------------------------------------------------------------------------------


def swap(pair: TokenizedPair) -> TokenizedPair:
    return dataclasses.replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)


def dpo_part(metrics: dict[str, float]) -> float:
    return metrics["loss"] - CONFIG.rpo_alpha * metrics["nll_loss"]


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(token_pairs(), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_swapping_the_sides_flips_the_margin(scorer: Scorer, pairs: list[TokenizedPair], seed: int) -> None:
    """Log-probs and rewards change places to the bit. A margin is beta x - beta y with one product unrounded (FMA)."""
    ref = reference_near(np.zeros((len(pairs), 2)), seed) - 50
    metrics, swapped = scorer.step(pairs, ref), scorer.step([swap(pair) for pair in pairs], ref[:, ::-1])
    for name in ("logps", "rewards"):
        assert swapped[f"{name}/chosen"] == metrics[f"{name}/rejected"]
        assert swapped[f"{name}/rejected"] == metrics[f"{name}/chosen"]
    rewards = abs(metrics["rewards/chosen"]) + abs(metrics["rewards/rejected"])
    margin = metrics["rewards/margins"]
    assert swapped["rewards/margins"] == pytest.approx(-margin, abs=1e-6 * rewards)
    assert swapped["rewards/accuracies"] == pytest.approx(1 - metrics["rewards/accuracies"], abs=1e-6)
    # -log sigmoid(-m) = m - log sigmoid(m), so the smoothed losses of both orders differ by (1 - 2 eps) m.
    dpo, flipped = dpo_part(metrics), dpo_part(swapped)
    grown = (1 - 2 * CONFIG.label_smoothing) * margin
    assert flipped - dpo == pytest.approx(grown, abs=1e-5 * (1 + dpo + flipped))


@ONE_MODEL
def test_a_reference_that_was_not_swapped_is_seen(scorer: Scorer) -> None:
    ref = reference_near(np.zeros((2, 2)), seed=0) - np.array([50.0, 80.0])
    pairs = [WITH_PAD_ID, WITHOUT_PAD_ID]
    metrics, wrong = scorer.step(pairs, ref), scorer.step([swap(pair) for pair in pairs], ref)
    assert abs(wrong["rewards/margins"] + metrics["rewards/margins"]) > 1
    assert abs(wrong["rewards/chosen"] - metrics["rewards/rejected"]) > 1
