"""Token log-probabilities against log_softmax of all logits in torch float64: values, gradients, meshes, memory."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from drift_jax.config import MeshConfig
from drift_jax.models import logps
from drift_jax.models.logps import Tile, choose_tile, token_logps
from drift_jax.sharding import build_layout, use_layout

ROWS, LENGTH, DIM, VOCAB, LISTED = 8, 20, 16, 48, 16
MESHES = [(8, 1, 1), (2, 2, 2), (1, 2, 4)]


class Case(NamedTuple):
    """What `token_logps` is given, and the weight of each log-prob in the sum that is differentiated."""

    hidden: jax.Array
    head: jax.Array
    sources: jax.Array
    targets: jax.Array
    weights: jax.Array


class Judged(NamedTuple):
    logps: Any
    d_hidden: Any
    d_head: Any


def make_case(vocab: int = VOCAB, seed: int = 0) -> Case:
    """Logits of order ten; a state predicts one token, several or none."""
    rng = np.random.default_rng(seed)
    return Case(
        jnp.asarray(rng.normal(size=(ROWS, LENGTH, DIM)), jnp.float32),
        jnp.asarray(rng.normal(size=(vocab, DIM)), jnp.float32),
        jnp.asarray(rng.integers(0, LENGTH, (ROWS, LISTED)), jnp.int32),
        jnp.asarray(rng.integers(0, vocab, (ROWS, LISTED)), jnp.int32),
        jnp.asarray(rng.normal(size=(ROWS, LISTED)), jnp.float32),
    )


def judge(case: Case, listed: int = LISTED) -> Judged:
    """All logits at once, in float64."""
    hidden, head, weights = (torch.tensor(np.asarray(x), dtype=torch.float64) for x in (case[0], case[1], case[4]))
    hidden.requires_grad_(), head.requires_grad_()
    sources, targets = (torch.tensor(np.asarray(x), dtype=torch.int64) for x in case[2:4])
    states = torch.take_along_dim(hidden, sources[..., None], 1)
    logps = torch.log_softmax(states @ head.T, -1).gather(-1, targets[..., None])[..., 0]
    logps = torch.where(torch.arange(LISTED) < listed, logps, 0.0)
    (weights * logps).sum().backward()
    return Judged(logps.detach().numpy(), hidden.grad.numpy(), head.grad.numpy())  # pyright: ignore


@partial(jax.jit, static_argnames="tile")
def ours(case: Case, listed: int | jax.Array = LISTED, head_grads: Any = None, tile: Tile | None = None) -> Judged:
    """`d_head` is what `head_grads` becomes, if it is given."""

    def total(hidden: jax.Array, head: jax.Array, head_grads: Any) -> tuple[jax.Array, jax.Array]:
        tail = case.sources, case.targets, jnp.asarray(listed), head_grads, tile
        logps = token_logps(hidden, head, *tail)
        return jnp.sum(case.weights * logps), logps

    wrt = (0, 1) if head_grads is None else (0, 2)
    (d_hidden, d_head), logps = jax.grad(total, wrt, has_aux=True)(case.hidden, case.head, head_grads)
    return Judged(logps, d_hidden, d_head)


def assert_close(seen: Judged, expected: Judged, rtol: float = 1e-6) -> None:
    """Relative to the largest number of an array: its parts add up from terms of that size."""
    for name, a, b in zip(Judged._fields, seen, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(), err_msg=name)


TILES = [Tile(1, VOCAB), Tile(5, 16), Tile(16, 7), Tile(64, 1), Tile(3, 47), None]


@pytest.mark.parametrize("tile", TILES)
def test_values_and_gradients_equal_log_softmax_of_all_logits(tile: Tile | None) -> None:
    """Also where the last chunk or block is not full, and where one is longer than all there is."""
    case = make_case()
    expected = judge(case)
    assert 5 < np.abs(expected.logps).max() < 100
    assert_close(ours(case, tile=tile), expected)


@pytest.mark.parametrize(("platform", "groups", "vocab"), [("cpu", 1, 49152), ("cpu", 8, 1000), ("gpu", 2, 151936)])
def test_a_tile_by_platform(platform: str, groups: int, vocab: int) -> None:
    tile = choose_tile(platform, groups, vocab)
    most = {"cpu": 2**20, "gpu": 2**27}[platform]
    assert tile.words <= vocab and most / 2 < groups * tile.tokens * tile.words <= most
    blocks = -(-vocab // tile.words)
    assert blocks * tile.words - vocab < 128 * blocks, "the last block makes little again of the one before it"


@pytest.mark.mesh
def test_a_tile_on_a_mesh() -> None:
    """Of four groups of rows a device sees two, and a quarter of the words."""
    with use_layout(build_layout(MeshConfig(2, 2, 2))):
        tile = choose_tile("tpu", 4, 152064)
    assert tile.words == 152064 and 2**24 < tile.tokens * (4 // 2) * (tile.words // 4) <= 2**25


@pytest.mark.parametrize("mistake", ["source", "target", "head"])
def test_a_mistake_is_seen(mistake: str) -> None:
    """The negative twin: one state, one id or one row of the table off by one."""
    case = make_case()
    expected = judge(case)
    if mistake == "source":
        case = case._replace(sources=case.sources.at[0, 0].set((case.sources[0, 0] + 1) % LENGTH))
    elif mistake == "target":
        case = case._replace(targets=case.targets.at[0, 0].set((case.targets[0, 0] + 1) % VOCAB))
    else:
        case = case._replace(head=case.head.at[3].add(1e-3))
    with pytest.raises(AssertionError):
        assert_close(ours(case), expected)


@pytest.mark.parametrize("listed", [0, 4, 12, 16])
def test_nothing_is_computed_beyond_the_listed_tokens(listed: int) -> None:
    """States of later chunks may be NaN: they give 0, and no gradient of theirs or of the table."""
    case = make_case()
    case = case._replace(sources=jnp.broadcast_to(jnp.arange(LISTED), case.sources.shape))
    expected = judge(case, listed)
    beyond = case._replace(hidden=case.hidden.at[:, listed:].set(jnp.nan))
    seen = ours(beyond, listed, tile=Tile(4, VOCAB))
    assert_close(seen, expected)
    np.testing.assert_array_equal(np.asarray(seen.logps)[:, listed:], 0.0)
    np.testing.assert_array_equal(np.asarray(seen.d_hidden)[:, listed:], 0.0)
    if listed < LISTED:
        assert not np.isfinite(np.asarray(ours(beyond, LISTED, tile=Tile(4, VOCAB)).d_head)).any(), (
            "the NaN would be seen"
        )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_that_are_listed_together(groups: int) -> None:
    """The same tokens, with the states of several rows one after the other."""
    case = make_case()
    expected, rows = judge(case), ROWS // groups
    sources = case.sources + LENGTH * (jnp.arange(ROWS) % rows)[:, None]
    lists = (x.reshape(groups, -1) for x in (sources, case.targets, case.weights))
    seen = ours(Case(case.hidden, case.head, *lists), rows * LISTED, tile=Tile(11, 20))
    assert_close(seen._replace(logps=seen.logps.reshape(ROWS, LISTED)), expected)


@pytest.mark.parametrize("vocab", [1, 5, 48])
def test_one_pass_over_the_logits_gives_the_sums_of_three(vocab: int) -> None:
    """What GPUs run; also for a block that brings nothing new."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 3, vocab)) * 30, jnp.float32)
    so_far = logps._Sums(*(jnp.asarray(rng.normal(size=(2, 3)) ** 2, jnp.float32) for _ in range(3)))
    mine = jnp.arange(vocab) == jnp.asarray(rng.integers(0, vocab, (2, 3, 1)))
    for new in (True, jnp.arange(vocab) >= vocab // 2, jnp.zeros(vocab, bool)):
        args = so_far, logits, new, mine & new
        for a, b in zip(jax.jit(logps.sum_up_at_once)(*args), jax.jit(logps._sum_up)(*args), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(("platform", "reductions"), [("cuda", 1), ("tpu", 3), ("cpu", 3)])
def test_gpus_alone_take_one_pass(platform: str, reductions: int) -> None:
    sums = logps._Sums(*[jax.ShapeDtypeStruct((1, 4), jnp.float32)] * 3)
    block = jax.ShapeDtypeStruct((1, 4, 64), jnp.float32), True, jax.ShapeDtypeStruct((1, 4, 64), jnp.bool_)
    text = jax.jit(logps._sum_up).trace(sums, *block).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.reduce(") == reductions


@pytest.mark.mesh
@pytest.mark.parametrize("sizes", [(1, 1, 1), *MESHES])
def test_one_pass_on_meshes(sizes: tuple[int, int, int]) -> None:
    case = make_case()

    def at_once(*args: Any, **_: Any) -> Any:
        return logps.sum_up_at_once(*args)

    with (
        patch.object(logps, "_sum_up", at_once),
        use_layout(build_layout(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])),
    ):
        seen = jax.device_get(jax.jit(partial(ours.__wrapped__, tile=Tile(5, VOCAB)))(case))
    assert_close(seen, judge(case), 1e-5)


def test_a_state_that_predicts_two_tokens_has_the_sum_of_their_gradients() -> None:
    """The last state of a prompt predicts the first token of both completions."""
    case = make_case()
    sources = jnp.broadcast_to(jnp.arange(LISTED), case.sources.shape)
    shared = case._replace(sources=sources.at[:, 8].set(3), hidden=case.hidden.at[:, 8].set(case.hidden[:, 3]))
    apart = shared._replace(sources=sources)
    together, alone = ours(shared), ours(apart)
    np.testing.assert_array_equal(together.logps, alone.logps)
    both = np.asarray(alone.d_hidden)[:, 3] + np.asarray(alone.d_hidden)[:, 8]
    np.testing.assert_allclose(np.asarray(together.d_hidden)[:, 3], both, rtol=1e-6, atol=1e-6)
    assert not np.any(np.asarray(together.d_hidden)[:, 8])
    assert np.abs(both - np.asarray(alone.d_hidden)[:, 3]).max() > 1e-2


# --- gradients so far ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [Tile(3, VOCAB), Tile(3, 20), None])
@pytest.mark.parametrize("listed", [0, 16])
def test_the_gradient_of_the_table_adds_to_what_is_there(tile: Tile | None, listed: int) -> None:
    case = make_case()
    so_far = jnp.asarray(np.random.default_rng(5).normal(size=case.head.shape), jnp.float32)
    expected = judge(case, listed)
    seen = ours(case, listed, so_far, tile)
    assert_close(seen, expected._replace(d_head=np.asarray(so_far, np.float64) + expected.d_head))


def test_with_gradients_so_far_the_table_itself_has_none() -> None:
    """By design: whoever differentiates with respect to the table then would count its gradient twice."""
    case, so_far = make_case(), jnp.zeros((VOCAB, DIM))

    def total(head: jax.Array, so_far: jax.Array | None) -> jax.Array:
        return token_logps(case.hidden, head, case.sources, case.targets, jnp.asarray(LISTED), so_far).sum()

    assert not np.any(np.asarray(jax.grad(total)(case.head, so_far)))
    assert np.any(np.asarray(jax.grad(total)(case.head, None)))


def test_gradients_so_far_in_bfloat16_are_rounded_once() -> None:
    """Chunks add in float32. Rounded after each chunk, as the twin does, most of what is small would be lost."""
    case = make_case()
    small = case._replace(weights=case.weights * 1e-2)
    so_far = jnp.full((VOCAB, DIM), 4.0, jnp.bfloat16)
    own = judge(small).d_head
    assert np.mean(np.abs(own) > 2**-6) > 0.1, "half a unit of 4.0 in bfloat16: some sums must move"
    expected = (so_far.astype(jnp.float32) + jnp.asarray(own, jnp.float32)).astype(jnp.bfloat16)
    for tile in (Tile(1, VOCAB), Tile(3, 20), None):
        seen = ours(small, LISTED, so_far, tile).d_head
        assert seen.dtype == jnp.bfloat16
        # One unit where float32 sums of another order fall on both sides of a rounding border.
        differing = np.asarray(seen, np.float32) != np.asarray(expected, np.float32)
        assert differing.mean() < 0.01
    step_by_step = so_far
    for k in range(LISTED):
        one = Case(*small[:2], *(x[:, k : k + 1] for x in small[2:]))
        step_by_step = ours(one, 1, step_by_step).d_head
    assert (np.asarray(step_by_step, np.float32) != np.asarray(expected, np.float32)).mean() > 0.1


def test_bfloat16_states_give_float32_log_probs() -> None:
    case = make_case()
    half = case._replace(hidden=case.hidden.astype(jnp.bfloat16))
    rounded = case._replace(
        hidden=half.hidden.astype(jnp.float32), head=case.head.astype(jnp.bfloat16).astype(jnp.float32)
    )
    seen = ours(half)
    assert seen.logps.dtype == jnp.float32 and seen.d_hidden.dtype == jnp.bfloat16 and seen.d_head.dtype == jnp.float32
    # The products of bfloat16 numbers are exact in float32: only the sums differ.
    np.testing.assert_allclose(seen.logps, judge(rounded).logps, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(seen.logps) - judge(case).logps).max() > 1e-3


# --- meshes -------------------------------------------------------------------------------------------------


def on_mesh(case: Case, sizes: tuple[int, int, int], tile: Tile | None, head_grads: Any = None) -> Judged:
    with use_layout(build_layout(MeshConfig(*sizes))):
        return jax.device_get(ours(case, LISTED, head_grads, tile))


@pytest.mark.mesh
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("tile", [Tile(5, VOCAB), None])
def test_results_do_not_depend_on_the_mesh(sizes: tuple[int, int, int], tile: Tile | None) -> None:
    case, so_far = make_case(), jnp.ones((VOCAB, DIM))
    one_device = ours(case, tile=tile)
    assert_close(on_mesh(case, sizes, tile), one_device, 1e-5)
    expected = one_device._replace(d_head=1 + np.asarray(one_device.d_head))
    assert_close(on_mesh(case, sizes, tile, so_far), expected, 1e-5)


@pytest.mark.mesh
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("vocab", [44, 50])
def test_a_vocabulary_that_the_mesh_does_not_cut_evenly(sizes: tuple[int, int, int], vocab: int) -> None:
    """Eight devices cut 48: neither 44 (four do) nor 50 (two do)."""
    case = make_case(vocab)
    assert_close(on_mesh(case, sizes, None), judge(case), 1e-5)


def compiled_on_mesh(vocab: int) -> str:
    case = jax.eval_shape(lambda: make_case(vocab))
    with use_layout(build_layout(MeshConfig(1, 2, 4))):
        return ours.lower(case, LISTED, None, Tile(4, vocab)).compile().as_text()


@pytest.mark.mesh
def test_each_device_makes_the_logits_of_its_slice_of_the_vocabulary() -> None:
    """48 over fsdp x tensor: 6 ids a device, of all 8 rows. 44 are filled up to 48."""
    even, uneven = compiled_on_mesh(48), compiled_on_mesh(44)
    assert "f32[8,4,6]" in even and "f32[4,4,11]" not in even
    assert "f32[8,4,6]" in uneven and "f32[4,4,11]" not in uneven


# --- memory -------------------------------------------------------------------------------------------------


def temp_bytes(vocab: int, length: int, dim: int, tile: Tile | None, naive: bool = False) -> int:
    """Of the compiled value and gradient, without running it."""

    def plain(hidden: Any, head: Any, sources: Any, targets: Any) -> Any:
        states = jnp.take_along_axis(hidden, sources[..., None], axis=1)
        logps = jax.nn.log_softmax(jnp.einsum("rcd,vd->rcv", states, head))
        return jnp.take_along_axis(logps, targets[..., None], axis=-1).sum()

    def chunked(hidden: Any, head: Any, sources: Any, targets: Any) -> Any:
        return token_logps(hidden, head, sources, targets, jnp.asarray(length), tile=tile).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, length, dim), (vocab, dim))]
    lists = [jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2
    grad = jax.jit(jax.value_and_grad(plain if naive else chunked, (0, 1)))
    return grad.lower(*shapes, *lists).compile().memory_analysis().temp_size_in_bytes


def test_the_logits_of_all_tokens_never_exist() -> None:
    vocab, length, dim = 49152, 4096, 16
    logits = 4 * vocab * length
    assert temp_bytes(vocab, length, dim, Tile(64, vocab)) < logits / 20
    assert temp_bytes(vocab, length, dim, Tile(256, 4096)) < logits / 50, "what is there besides: gradients, lists"
    assert temp_bytes(vocab, length, dim, None) < 0.6 * logits, "an accelerator's tile: 128 MiB at a time"
    assert temp_bytes(vocab, length, dim, None, naive=True) > logits, "the twin: all at once"
