"""What must hold for every pair: where it lies in a batch changes nothing, and swapping its sides flips the margin.

Each property has its negative twin: the same comparison with a common mistake put into the model or the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_jax import compiled
from drift_jax.config import MeshConfig, TrainConfig
from drift_jax.data.batches import PairBatch, PairLoader, put_batch
from drift_jax.data.packing import pack_rows
from drift_jax.data.pairs import TokenizedPair
from drift_jax.losses import dpo_losses
from drift_jax.models.attention import BACKENDS, AttentionBackend, attend
from drift_jax.models.hf import load_params, load_qwen_config
from drift_jax.models.intervals import KeyIntervals
from drift_jax.models.logps import Tile, choose_tile
from drift_jax.models.qwen import declare_qwen
from drift_jax.sharding import Layout, build_layout, use_layout
from drift_jax.step import MicroBatch, PairScores, arrange, loss_and_grads
from drift_jax.train import Trainer, host_metrics
from tests.tiny_models import VOCAB, build_tiny_model

CONFIG = TrainConfig(beta=0.3, label_smoothing=0.1, rpo_alpha=0.5, batch_size=4, learning_rate=1e-4, warmup_ratio=0.0)
PAD = 0  # what the loader fills rows with, and here a token like any other too

# Float32: a sum of n token log-probs, rounded after each, is right to about sqrt(n) of 6e-8, so 7e-7 for 128 of
# them; each is a difference of logits of order ten, which other row lengths change in their last bits.
RELATIVE, ABSOLUTE = 2e-6, 1e-5  # of a summed log-prob; nats

# Of the rows of a micro-batch, which keys [R, T, T] their queries look at.
Mask = Callable[[MicroBatch], jax.Array]


class Layout(NamedTuple):
    """How pairs lie in batches. Few of them: each of its shapes is compiled once per model."""

    batch_size: int
    budget: int  # tokens of a micro-batch: with the longest pair's length it gives the number of rows
    longest: int  # tokens of the longest neighbour; a row is a multiple of 128 that holds the longest pair there is
    chunk: int | None
    by_interval: bool = False  # rows as kernels take them, with the chosen side reversed before its prompt


ALONE = Layout(1, 128, 128, None)
LAYOUTS = (
    Layout(4, 256, 128, 48),  # one or two rows of 128, up to four micro-batches
    Layout(3, 384, 384, 1000),  # rows of 128 to 384
    Layout(6, 128, 60, 9),  # one row, several pairs
    Layout(4, 256, 256, None, by_interval=True),
)


def by_interval(query: Any, key: Any, value: Any, seen: KeyIntervals) -> Any:
    """What kernels compute, with a plain mask."""
    keys = jnp.arange(key.shape[1])
    return attend(query, key, value, (keys >= seen.start[..., None]) & (keys < seen.stop[..., None]))


BY_INTERVAL = AttentionBackend("by_interval", None, True, by_interval)


@dataclass(frozen=True)
class ChangedLoader(PairLoader):
    """A loader whose rows hold their pairs in any order, and whose batches are changed before they leave."""

    change: Callable[[PairBatch], PairBatch] = field(default=lambda batch: batch)
    shuffle: int | None = None  # None: as packed

    def _build(self, *args: Any) -> PairBatch:
        def pack_in_any_order(lengths: Any, row_length: int) -> list[list[int]]:
            rows, rng = pack_rows(lengths, row_length), np.random.default_rng(self.shuffle)
            return [rng.permutation(rows[i]).tolist() for i in rng.permutation(len(rows))]

        pack = pack_rows if self.shuffle is None else pack_in_any_order
        with patch("drift_jax.data.batches.pack_rows", pack):
            return self.change(super()._build(*args))


class Scorer:
    """One tiny model; its programs are compiled once."""

    def __init__(self, model_dir: Path) -> None:
        self.layout = build_layout(MeshConfig(), jax.devices()[:1])
        self.declared = declare_qwen(load_qwen_config(model_dir))
        self.params = load_params(model_dir, self.layout)
        self.trainers: dict[Any, Trainer] = {}
        setup = self.build_trainer(BACKENDS["xla"]).setup
        self._metrics = jax.jit(lambda params, batch: loss_and_grads(setup, params, batch)[0])

    def build_trainer(self, backend: AttentionBackend) -> Trainer:
        compiled._LAST.clear()  # what is patched is not part of the key
        with patch("drift_jax.train.resolve_attention", lambda *_: backend):
            return Trainer(*self.declared, self.layout, CONFIG, "none", total_steps=10)

    def score(
        self,
        pairs: list[TokenizedPair],
        layout: Layout = ALONE,
        change: Callable[[PairBatch], PairBatch] = lambda batch: batch,
        shuffle: int | None = None,
        mask: Mask | None = None,
    ) -> PairScores:
        """The reference pass; `change` and `mask` may put a mistake into the batch or the attention."""
        backend = BY_INTERVAL if layout.by_interval else BACKENDS["xla"]
        arranged = arrange
        if mask is not None:
            backend = replace(BACKENDS["xla"], attend=lambda query, key, value, seen: attend(query, key, value, seen))
            arranged = lambda _, micro: (micro, mask(micro))  # noqa: E731
        key = (layout.chunk, layout.by_interval, mask)
        if key not in self.trainers:
            self.trainers[key] = self.build_trainer(backend)
        rest = {"max_length": 512, "tokens_per_device": layout.budget, "change": change, "shuffle": shuffle}
        loader = ChangedLoader(pairs, np.zeros((len(pairs), 2)), layout.batch_size, 1, **rest)
        by_layout = (lambda *_: Tile(layout.chunk, 100)) if layout.chunk else choose_tile
        with patch("drift_jax.step.choose_tile", by_layout), patch("drift_jax.step.arrange", arranged):
            return self.trainers[key].score_pairs(self.params, loader, as_trained=shuffle is not None)

    def step(self, pairs: list[TokenizedPair], ref_logps: np.ndarray) -> dict[str, float]:
        """Metrics of an update of one to four pairs, filled up to four, in micro-batches of one or two rows of 128."""
        batch = PairLoader(pairs, ref_logps, 4, 1, max_length=512, tokens_per_device=256).shuffled(0)
        with use_layout(self.layout):
            return host_metrics(self._metrics(self.params, put_batch(batch, self.layout)))


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
    """Pairs of 3 to `longest` tokens, the prompt counted once; every fifth is the id that fills rows."""
    prompt = draw(st.integers(1, longest - 2))
    chosen = draw(st.integers(1, longest - prompt - 1))
    rejected = draw(st.integers(1, longest - prompt - chosen))
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
    """Other ids and positions where a row is padding, also in rows without a pair, and other lists beyond their end."""
    rng, length = np.random.default_rng(0), batch.ids.shape[-1]
    real, listed = batch.spans.prompt_stop > batch.spans.prompt_start, batch.owners >= 0

    def fill(values: np.ndarray, keep: np.ndarray, high: int) -> np.ndarray:
        return np.where(keep, values, rng.integers(0, high, values.shape)).astype(np.int32)

    return batch._replace(
        ids=fill(batch.ids, real, VOCAB),
        positions=fill(batch.positions, real, length),
        sources=fill(batch.sources, listed, length),
        targets=fill(batch.targets, listed, VOCAB),
    )


# --- where a pair lies --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    layout=st.sampled_from(LAYOUTS),
    noise=st.booleans(),
    shuffle=st.none() | st.integers(0, 99),
    seed=st.integers(0, 99),
)
def test_a_pair_scores_the_same_wherever_it_lies(
    scorer: Scorer, data: st.DataObject, layout: Layout, noise: bool, shuffle: int | None, seed: int
) -> None:
    """Row length, place in the row, padding and what fills it, neighbours, their number and order, chunk of logits."""
    pair = data.draw(token_pairs(min(128, layout.longest)), "pair")
    neighbours = data.draw(st.lists(token_pairs(layout.longest), max_size=5), "neighbours")
    place = data.draw(st.integers(0, len(neighbours)), "place")
    alone = scorer.score([pair])
    crowd = [*neighbours[:place], pair, *neighbours[place:]]
    among = scorer.score(crowd, layout, fill_with_noise if noise else lambda batch: batch, shuffle)
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
ONE_ROW = [make_pair((20, 12, 8), seed=2), make_pair((9, 14, 10), seed=3), make_pair((15, 6, 9), seed=4)]
IN_ONE_ROW = Layout(3, 128, 128, None)
ONE_MODEL = pytest.mark.parametrize("scorer", ["qwen2"], indirect=True)
FAR = 1e-3  # relative: hundreds of times what is allowed above


def largest_change(scores: PairScores, expected: PairScores) -> float:
    return float(np.max(np.abs(scores.logps / expected.logps - 1)))


def sees(micro: MicroBatch) -> jax.Array:
    """Which keys each query of a row may look at, by the definition."""
    first, last, own = (bound[..., None] for bound in micro.spans)
    at = jnp.arange(micro.ids.shape[1])
    return (at <= at[:, None]) & ((at >= own) | ((at >= first) & (at < last)))


def same_pair(micro: MicroBatch) -> jax.Array:
    first = micro.spans.prompt_start
    return first[:, :, None] == first[:, None, :]


def before(micro: MicroBatch) -> jax.Array:
    return jnp.broadcast_to(jnp.tri(micro.ids.shape[1], dtype=bool), sees(micro).shape)


def is_padding(micro: MicroBatch) -> jax.Array:
    return (micro.spans.prompt_stop == micro.spans.prompt_start)[:, None, :]


MASKS: dict[str, Mask] = {
    "nothing": sees,
    "attention to what comes later": lambda micro: sees(micro) | sees(micro).swapaxes(1, 2),
    "attention to padding": lambda micro: sees(micro) | is_padding(micro),
    "attention by id": lambda micro: sees(micro) & (micro.ids != PAD)[:, None, :],
    "chosen visible to rejected": lambda micro: before(micro) & same_pair(micro),
    "another pair visible": lambda micro: sees(micro) | (before(micro) & ~same_pair(micro)),
}


def padding_sees_the_row(batch: PairBatch) -> PairBatch:
    """No mistake: what padding looks at is read by nobody."""
    real = batch.spans.prompt_stop > batch.spans.prompt_start
    return batch._replace(spans=batch.spans._replace(own_start=np.where(real, batch.spans.own_start, 0)))


def known_by_id(batch: PairBatch) -> PairBatch:
    return batch._replace(owners=np.where(batch.targets == PAD, -1, batch.owners))


def predicted_by_the_token_before(batch: PairBatch) -> PairBatch:
    """The first token of the rejected side stands after the last one of the chosen side, not after the prompt."""
    first = (batch.owners % 2 == 1) & (np.roll(batch.owners, 1, axis=-1) == batch.owners - 1)
    return batch._replace(sources=np.where(first, np.roll(batch.sources, -1, axis=-1) - 1, batch.sources))


def positions_by_place(batch: PairBatch) -> PairBatch:
    """Right for the prompt and the chosen side; those of the rejected side do not start again after the prompt."""
    at = np.arange(batch.ids.shape[-1], dtype=np.int32) - batch.spans.prompt_start
    return batch._replace(positions=np.where(batch.spans.prompt_stop > batch.spans.prompt_start, at, batch.positions))


def positions_by_id(batch: PairBatch) -> PairBatch:
    """A token's position counts the tokens before it that are not the pad id."""
    positions, skipped = np.array(batch.positions), batch.ids == PAD
    for at in np.ndindex(positions.shape):
        own, start, stop = (int(bound[at]) for bound in (batch.spans.own_start, *batch.spans[:2]))
        row = skipped[at[:-1]]
        positions[at] -= row[start : min(stop, at[-1])].sum() + (row[own : at[-1]].sum() if own >= stop else 0)
    return batch._replace(positions=positions)


BATCHES: dict[str, Callable[[PairBatch], PairBatch]] = {
    "nothing": padding_sees_the_row,
    "positions by id": positions_by_id,
    "a gap in the positions": lambda batch: batch._replace(positions=batch.positions + (batch.positions >= 20)),
    "positions that do not start again": positions_by_place,
    "a completion known by id": known_by_id,
    "a first token predicted by the other side": predicted_by_the_token_before,
}
MISTAKES = [*(("mask", name) for name in MASKS), *(("change", name) for name in BATCHES)]


@ONE_MODEL
@pytest.mark.parametrize(("where", "mistake"), MISTAKES)
def test_mistakes_are_seen(scorer: Scorer, where: str, mistake: str) -> None:
    """A pad id in the pair tells what goes by place from what goes by id; any other pair does not.

    Another pair of the row is seen by those that stand behind it, so that mistake needs a row of several.
    """
    wrong = {where: {"mask": MASKS, "change": BATCHES}[where][mistake]}
    with_pad, without = (
        largest_change(scorer.score([pair], **wrong), scorer.score([pair])) for pair in (WITH_PAD_ID, WITHOUT_PAD_ID)
    )
    packed = largest_change(scorer.score(ONE_ROW, IN_ONE_ROW, **wrong), scorer.score(ONE_ROW))
    silent_alone = mistake in ("nothing", "another pair visible")
    assert with_pad < RELATIVE if silent_alone else with_pad > FAR
    assert without < RELATIVE if silent_alone or "by id" in mistake else without > FAR
    assert packed < RELATIVE if mistake == "nothing" else packed > FAR


@ONE_MODEL
def test_attention_to_padding_makes_the_row_length_matter(scorer: Scorer) -> None:
    pairs, layout = [WITH_PAD_ID, make_pair((80, 60, 60), seed=5)], Layout(2, 256, 256, None)
    wrong = MASKS["attention to padding"]
    short, long = scorer.score(pairs[:1], mask=wrong), scorer.score(pairs, layout, mask=wrong)
    assert largest_change(PairScores(*(x[:1] for x in long)), short) > FAR
    right = scorer.score(pairs, layout, mask=sees)
    assert largest_change(PairScores(*(x[:1] for x in right)), scorer.score(pairs[:1])) < RELATIVE


# --- chosen and rejected ------------------------------------------------------------------------------------


def swap(pair: TokenizedPair) -> TokenizedPair:
    return dataclasses.replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)


def dpo_part(metrics: dict[str, float]) -> float:
    return metrics["loss"] - CONFIG.rpo_alpha * metrics["nll_loss"]


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(token_pairs(), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_swapping_the_sides_flips_the_margin(scorer: Scorer, pairs: list[TokenizedPair], seed: int) -> None:
    """Log-probs and rewards change places, within the rounding that another place in the row brings."""
    ref = reference_near(np.zeros((len(pairs), 2)), seed) - 50
    metrics, swapped = scorer.step(pairs, ref), scorer.step([swap(pair) for pair in pairs], ref[:, ::-1])
    sides = ("chosen", "rejected")
    for side, other in (sides, sides[::-1]):
        logps = metrics[f"logps/{other}"]
        assert swapped[f"logps/{side}"] == pytest.approx(logps, rel=RELATIVE, abs=ABSOLUTE)
        allowed = CONFIG.beta * (ABSOLUTE + RELATIVE * abs(logps))
        assert swapped[f"rewards/{side}"] == pytest.approx(metrics[f"rewards/{other}"], rel=RELATIVE, abs=allowed)
    allowed = CONFIG.beta * sum(ABSOLUTE + RELATIVE * abs(metrics[f"logps/{side}"]) for side in sides)
    margin = metrics["rewards/margins"]
    assert swapped["rewards/margins"] == pytest.approx(-margin, rel=RELATIVE, abs=allowed)
    assert swapped["rewards/accuracies"] == pytest.approx(1 - metrics["rewards/accuracies"], abs=1e-6)
    # -log sigmoid(-m) = m - log sigmoid(m), so the smoothed losses of both orders differ by (1 - 2 eps) m.
    dpo, flipped = dpo_part(metrics), dpo_part(swapped)
    grown = (1 - 2 * CONFIG.label_smoothing) * margin
    assert flipped - dpo == pytest.approx(grown, abs=allowed + 1e-5 * (1 + dpo + flipped))


@ONE_MODEL
def test_a_reference_that_was_not_swapped_is_seen(scorer: Scorer) -> None:
    ref = reference_near(np.zeros((2, 2)), seed=0) - np.array([50.0, 80.0])
    pairs = [WITH_PAD_ID, WITHOUT_PAD_ID]
    metrics, wrong = scorer.step(pairs, ref), scorer.step([swap(pair) for pair in pairs], ref)
    assert abs(wrong["rewards/margins"] + metrics["rewards/margins"]) > 1
    assert abs(wrong["rewards/chosen"] - metrics["rewards/rejected"]) > 1
