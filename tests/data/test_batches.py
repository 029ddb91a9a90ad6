"""The loader: which pairs are in which batch, what a packed row says of them, and how much of real data is padding."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_jax.config import DataConfig
from drift_jax.data.batches import PairBatch, PairLoader, count_tokens, epoch_order, pair_tokens
from drift_jax.data.packing import COSTS, BatchShape, Split
from drift_jax.data.pairs import TokenizedPair, tokenize_pair
from drift_jax.data.tokenizer import load_tokenizer
from drift_jax.records import Pair, read_dsat
from tests.tiny_pairs import random_pairs

REPO = Path(__file__).parents[2]
REAL_DATA = REPO.parent / "shared" / "data" / "dsat_real.jsonl"


def make_pair(name: str, prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
    return TokenizedPair(name, *(np.array(ids, np.int32) for ids in (prompt, chosen, rejected)))


def make_loader(pairs: list[TokenizedPair], batch_size: int = 4, accumulation_steps: int = 1, **rest) -> PairLoader:
    """Reference log-probs are -i of the chosen and -i - 0.5 of the rejected side of pair i."""
    ref = -np.arange(len(pairs))[:, None] - np.array([[0.0, 0.5]])
    return PairLoader(pairs, ref, batch_size, accumulation_steps, 256, **rest)


def pairs_in(loader: PairLoader, step: int) -> list[int]:
    """The pairs of a batch, by their reference log-probs."""
    batch = loader.shuffled(step)
    return (-batch.ref_logps[batch.real, 0]).astype(int).tolist()


def assert_same(a: PairBatch, b: PairBatch) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- one row by hand ----------------------------------------------------------------------------------------


@pytest.fixture
def two_pairs() -> PairLoader:
    """The longer pair comes first in its row: [10 11 12 | 20 21 | 30 31 32], then [40 41 | 50 | 60]."""
    pairs = [make_pair("a", [40, 41], [50], [60]), make_pair("b", [10, 11, 12], [20, 21], [30, 31, 32])]
    return make_loader(pairs)


def at(batch: PairBatch, name: str, size: int) -> list[int]:
    return getattr(batch, name)[0, 0, :size].tolist()


def test_a_row_by_hand(two_pairs: PairLoader) -> None:
    batch = two_pairs.shuffled(0)
    assert epoch_order(2, 0, 0).tolist() == [0, 1] and batch.ids.shape == (1, 1, 128)
    assert at(batch, "ids", 13) == [10, 11, 12, 20, 21, 30, 31, 32, 40, 41, 50, 60, 0]
    assert at(batch, "positions", 13) == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 2, 0]
    starts, stops, owns = (bound[0, 0, :14].tolist() for bound in batch.spans)
    assert starts == [0] * 8 + [8] * 4 + [12, 13]
    assert stops == [3] * 8 + [10] * 4 + [12, 13]
    assert owns == [0, 0, 0, 3, 3, 5, 5, 5, 8, 8, 10, 11, 12, 13]
    # The batch's pair 0 is "a", which stands behind "b".
    assert at(batch, "sources", 7) == [2, 3, 2, 5, 6, 9, 9]
    assert at(batch, "targets", 7) == [20, 21, 30, 31, 32, 50, 60]
    assert at(batch, "owners", 8) == [2, 2, 3, 3, 3, 0, 1, -1]
    assert batch.real.tolist() == [True, True, False, False] and int(batch.micro_batches) == 1
    assert batch.ref_logps.tolist() == [[0, -0.5], [-1, -1.5], [0, 0], [0, 0]]
    assert count_tokens(batch) == 12 == sum(map(pair_tokens, two_pairs.pairs))


def test_padding_sees_itself_only() -> None:
    """Behind the pairs of a row, and in micro-batches that the update could have needed: no two pairs share a row."""
    batch = make_loader([make_pair(name, list(range(60)), [50], [60]) for name in "abc"]).shuffled(0)
    assert batch.ids.shape == (4, 1, 128) and int(batch.micro_batches) == 2
    own = np.arange(128)
    for bound in batch.spans:
        np.testing.assert_array_equal(bound[1, 0, 62:], own[62:])
        np.testing.assert_array_equal(bound[2:], np.broadcast_to(own, (2, 1, 128)))
    assert (batch.owners[2:] == -1).all() and (batch.owners[1, 0, 2:] == -1).all()


def test_rows_are_dealt_out_over_the_devices() -> None:
    """Four rows for four devices that could take two each: every device has one to compute."""
    pairs = [make_pair(str(i), list(range(70)), [50], [60]) for i in range(8)]
    loader = make_loader(pairs, 8, split=Split(4), tokens_per_device=256)
    batch = loader._build(np.arange(4), np.zeros((4, 2), bool), [BatchShape(8, 128)])
    assert (batch.owners[0] >= 0).sum(axis=1).tolist() == [2, 2, 2, 2]


def test_lost_ends_are_not_listed_and_not_in_the_reference(two_pairs: PairLoader) -> None:
    """ "a" loses its only rejected token, "b" the last of both sides; the tokens stay in the row."""
    lost = np.array([[False, True], [True, True]])
    seen: list[tuple[list[int], list[list[int]], int]] = []

    def cut(prompts: np.ndarray, completions: np.ndarray, max_length: int) -> np.ndarray:
        seen.append((prompts.tolist(), completions.tolist(), max_length))
        return lost

    loader = dataclasses.replace(two_pairs, group_cut=cut, group_size=2, ref_last_logps=np.full((2, 2), -0.25))
    batch = loader.shuffled(0)
    assert seen == [([2, 3], [[1, 1], [2, 3]], 256)]
    assert at(batch, "targets", 5) == [20, 30, 31, 50, 0]
    assert at(batch, "sources", 4) == [2, 2, 5, 9]
    assert at(batch, "owners", 5) == [2, 3, 3, 0, -1]
    assert batch.ref_logps[:2].tolist() == [[0, -0.25], [-0.75, -1.25]]
    np.testing.assert_array_equal(batch.ids, two_pairs.shuffled(0).ids)
    for _, whole in loader.first_epoch():  # the reference pass does not know neighbours
        assert_same(whole, two_pairs.shuffled(0))


def test_groups_are_neighbours_of_the_shuffled_batch() -> None:
    groups: list[list[int]] = []

    def cut(prompts: np.ndarray, completions: np.ndarray, max_length: int) -> np.ndarray:
        groups.append(prompts.tolist())
        return np.zeros((len(prompts), 2), bool)

    pairs = [make_pair(str(i), [1] * (i + 1), [2], [3]) for i in range(10)]
    loader = make_loader(pairs, 5, group_cut=cut, group_size=2, ref_last_logps=np.zeros((10, 2)))
    loader.shuffled(1)
    expected = (epoch_order(10, 0, 0)[5:] + 1).tolist()
    assert groups == [expected[:2], expected[2:4], expected[4:]]


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each of its updates: of 200,000 pairs the shapes alone took half a minute."""
    shuffled, generator = [], np.random.Generator

    def count(bits: np.random.BitGenerator) -> np.random.Generator:
        shuffled.append(bits)
        return generator(bits)

    monkeypatch.setattr(np.random, "Generator", count)
    loader = make_loader([make_pair(str(i), [1], [2], [3]) for i in range(37)], 4)
    assert loader.shapes and len([loader.ids(step) for step in range(20)]) == 20
    assert len(shuffled) == 2
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(37, 0, 0)[0] = 1


# --- any pairs ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 30),
    longest=st.sampled_from([3, 40, 120]),
    batch_size=st.integers(1, 9),
    ways=st.sampled_from([1, 2, 4]),
    tokens=st.sampled_from([None, 128, 700]),
    seed=st.integers(0, 1000),
)
def test_every_token_of_a_batch_is_where_its_pair_says(
    count: int, longest: int, batch_size: int, ways: int, tokens: int | None, seed: int
) -> None:
    """Rebuilt from the batch alone: ids, positions, what is seen, what predicts what."""
    pairs = random_pairs(count, seed, longest)
    loader = make_loader(pairs, batch_size, seed=seed, split=Split(ways), tokens_per_device=tokens)
    for step in range(loader.steps_per_epoch):
        batch, members = loader.shuffled(step), pairs_in(loader, step)
        micro_batches = int(batch.micro_batches)
        assert batch.ids.shape[1] % ways == 0 and 1 <= micro_batches <= len(batch.ids)
        assert (batch.owners[micro_batches:] == -1).all() and (batch.owners[:micro_batches] >= 0).any(axis=(1, 2)).all()
        assert batch.owners.shape[1] == ways and batch.owners[0].size == batch.ids[0].size
        assert count_tokens(batch) == sum(pair_tokens(pairs[i]) for i in members)
        for index, i in enumerate(members):
            check_sides(batch, index, pairs[i])


def check_sides(batch: PairBatch, index: int, pair: TokenizedPair) -> None:
    for side, completion in enumerate((pair.chosen_ids, pair.rejected_ids)):
        places = np.argwhere(batch.owners == 2 * index + side)
        ((micro, device),) = {tuple(place) for place in places[:, :2].tolist()}
        listed = places[:, 2]
        assert np.diff(listed, append=listed[-1] + 1).tolist() == [1] * len(listed)
        assert batch.targets[micro, device][listed].tolist() == completion.tolist()
        rows, sources = np.divmod(batch.sources[micro, device][listed], batch.ids.shape[2])
        assert len(set(rows)) == 1
        row = (micro, device * (batch.ids.shape[1] // batch.owners.shape[1]) + rows[0])
        whole = np.concatenate([pair.prompt_ids, completion])
        for k, source in enumerate(sources):
            keys = np.arange(source + 1)
            first, last, own = (bound[row][source] for bound in batch.spans)
            seen = keys[((keys >= first) & (keys < last)) | (keys >= own)]
            before = len(pair.prompt_ids) + k
            assert batch.ids[row][seen].tolist() == whole[:before].tolist()
            assert batch.positions[row][seen].tolist() == list(range(before))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 1000))
def test_every_pair_is_once_in_an_epoch(count: int, batch_size: int, seed: int) -> None:
    loader = make_loader(random_pairs(count, longest=5), batch_size, seed=seed)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        batches = [pairs_in(loader, step) for step in steps]
        assert all(len(batch) == batch_size for batch in batches[:-1])
        epochs.append([i for batch in batches for i in batch])
        assert epochs[-1] == epoch_order(count, seed, epoch).tolist()
        assert sorted(epochs[-1]) == list(range(count))
    assert count < 8 or epochs[0] != epochs[1]
    for batches in (loader.first_epoch(), loader.by_length()):
        rows = np.concatenate([rows for rows, _ in batches])
        assert sorted(rows.tolist()) == list(range(count))


def test_a_batch_is_a_function_of_its_step() -> None:
    """Whatever was asked before: a run that is resumed gets the batches that it would have got."""
    pairs = random_pairs(21, longest=120)
    used, fresh = make_loader(pairs, seed=7), make_loader(pairs, seed=7)
    expected = {step: used.shuffled(step) for step in range(12)}
    list(used.by_length())
    for step in (11, 3, 7, 3):
        assert_same(fresh.shuffled(step), expected[step])
        assert_same(used.shuffled(step), expected[step])
    with pytest.raises(AssertionError):
        assert_same(make_loader(pairs, seed=8).shuffled(3), expected[3])


def test_the_longest_pairs_come_first_where_order_does_not_matter() -> None:
    loader = make_loader(random_pairs(13, longest=120))
    sizes = [pair_tokens(loader.pairs[row]) for rows, _ in loader.by_length() for row in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_the_reference_pass_runs_the_batches_of_the_first_epoch() -> None:
    loader = make_loader(random_pairs(13, longest=120), seed=5)
    for step, (rows, batch) in enumerate(loader.first_epoch()):
        assert rows.tolist() == pairs_in(loader, step)
        assert_same(batch, loader.shuffled(step))


def test_a_stage_has_few_shapes() -> None:
    pairs = random_pairs(600, longest=30) + random_pairs(200, seed=1, longest=300)
    loader = make_loader(pairs, 8)
    shapes = {loader.shuffled(step).ids.shape for step in range(3 * loader.steps_per_epoch)}
    assert 1 < len(shapes) <= len(loader.shapes) <= 3


def test_the_real_share_counts_what_is_computed(two_pairs: PairLoader) -> None:
    assert two_pairs.real_token_share() == 12 / 128
    loader = make_loader(random_pairs(30, longest=120), 7, split=Split(2))
    batches = [loader.shuffled(step) for step in range(loader.steps_per_epoch)]
    computed = sum(int(batch.micro_batches) * batch.ids[0].size for batch in batches)
    assert loader.real_token_share() == sum(map(count_tokens, batches)) / computed


# --- real lengths -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_pairs(demo_model_dir: Path) -> list[TokenizedPair]:
    """The complaint's reply against the reply after it; prompts of up to 1024 tokens, 2048 with a completion."""
    if not REAL_DATA.exists():
        pytest.skip(f"{REAL_DATA} is not there")
    tokenizer, data = load_tokenizer(demo_model_dir), DataConfig(max_length=2048, max_prompt_length=1024)
    answered = [record for record in read_dsat(REAL_DATA).records if record.extra.get("next_assistant")]
    pairs = [Pair(r.id, r.prompt, r.extra["next_assistant"], r.rejected, {}) for r in answered]
    return [tokenize_pair(pair, tokenizer, data.max_prompt_length, data.max_length) for pair in pairs]


def measure_share(pairs: list[TokenizedPair], attention: str, ways: int, **rest: int) -> float:
    zeros, where = np.zeros((len(pairs), 2)), {"split": Split(ways), "attention": attention}
    return PairLoader(pairs, zeros, 32, 1, 2048, seed=42, **where, **rest).real_token_share()


@pytest.mark.demo
@pytest.mark.parametrize("attention", COSTS)
def test_most_computed_tokens_of_real_pairs_are_real(
    real_pairs: list[TokenizedPair], attention: str, record_property: Callable[[str, object], None]
) -> None:
    """32 pairs an update. On many devices the longest pair of an update is longer than what each would get."""
    shares = {ways: measure_share(real_pairs, attention, ways) for ways in (1, 4, 16)}
    print(f"{attention}: {len(real_pairs)} pairs, share of real tokens by devices: {json.dumps(shares)}")
    record_property("real_token_share", shares)
    assert shares[1] >= 0.92
    assert shares[4] >= 0.90 and shares[16] >= 0.70
    assert measure_share(real_pairs, attention, 1, compile_tokens=10**9) >= 0.92, "and with few shapes"
    one_row_each = sum(map(pair_tokens, real_pairs)) / (len(real_pairs) * max(map(pair_tokens, real_pairs)))
    assert one_row_each < 0.45, "padding to the longest pair would do as well"
