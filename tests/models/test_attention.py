"""Attention against jax.nn.dot_product_attention with the whole mask, and the kernels against attention in XLA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drift_jax.config import MeshConfig
from drift_jax.errors import ConfigError
from drift_jax.models import splash, triton
from drift_jax.models.attention import BACKENDS, attend, attend_by_xla, attend_per_device, resolve_attention
from drift_jax.models.intervals import KeyIntervals, KeySpans, find_overlap, place_tokens, to_intervals
from drift_jax.models.xla import place_spans, split_spans
from drift_jax.sharding import build_layout, use_layout

KERNELS = {"splash": splash.attend, "triton": triton.attend}
Pair = tuple[int, int, int]  # tokens of prompt, chosen, rejected
PAIRS: list[list[Pair]] = [
    [(100, 30, 60), (3, 5, 1), (20, 170, 150)],
    [(20, 90, 10), (1, 1, 1), (60, 7, 66), (180, 70, 40)],
]


def random_qkv(length: int, heads: int = 6, kv_heads: int = 2, dim: int = 8, rows: int = 2) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = ((rows, length, heads, dim), (rows, length, kv_heads, dim), (rows, length, kv_heads, dim))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def make_spans(rows: Sequence[Sequence[Pair]], length: int) -> KeySpans:
    """Rows of pairs, padded to `length`; a pair that does not fit is left out."""
    spans = np.tile(np.arange(length, dtype=np.int32), (3, len(rows), 1))
    for row, pairs in enumerate(rows):
        start = 0
        for prompt, chosen, rejected in pairs:
            own, other, end = np.cumsum([start + prompt, chosen, rejected])
            if end > length:
                continue
            spans[0, row, start:end], spans[1, row, start:end] = start, own
            spans[2, row, start:own], spans[2, row, own:other], spans[2, row, other:end] = start, own, other
            start = end
    return KeySpans(*(jnp.asarray(x) for x in spans))


def make_mask(rows: Sequence[Sequence[Pair]], length: int) -> np.ndarray:
    """[B, T, T], written pair by pair from what a pair means."""
    mask = np.tile(np.eye(length, dtype=bool), (len(rows), 1, 1))
    for row, pairs in enumerate(rows):
        start = 0
        for prompt, *sides in pairs:
            if start + prompt + sum(sides) > length:
                continue
            own = slice(start, start + prompt)
            mask[row, own, own] = np.tri(prompt, dtype=bool)
            side_start = own.stop
            for side in sides:
                here = slice(side_start, side_start + side)
                mask[row, here, own], mask[row, here, here] = True, np.tri(side, dtype=bool)
                side_start = here.stop
            start = side_start
    return mask


def attend_whole(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[:, None], implementation="xla")


def move(x: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1)


def attend_in_order(kernel: Callable[..., jax.Array], q: Any, k: Any, v: Any, spans: KeySpans) -> jax.Array:
    """A kernel on rows as they are packed: put into its order, and the result back."""
    places, seen = to_intervals(spans)
    order = jnp.argsort(places, axis=1)
    return move(attend_per_device(kernel, *(move(x, order) for x in (q, k, v)), seen), places)


def value_and_grads(f: Callable[..., jax.Array], *qkv: jax.Array) -> list[np.ndarray]:
    """[output, dq, dk, dv] of a loss that weighs every output differently, in float32."""

    def loss(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = f(*qkv).astype(jnp.float32)
        return (jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out).sum(), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


# --- in XLA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 1100])
def test_causal_blocks_equal_the_whole(length: int) -> None:
    q, k, v = random_qkv(length)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
    np.testing.assert_allclose(attend(q, k, v), expected, atol=2e-6)


def test_gradients_equal_the_whole() -> None:
    q, k, v = random_qkv(200)
    ours = jax.grad(lambda *qkv: jnp.sin(attend(*qkv)).sum(), argnums=(0, 1, 2))(q, k, v)
    whole = lambda *qkv: jnp.sin(jax.nn.dot_product_attention(*qkv, is_causal=True, implementation="xla")).sum()  # noqa: E731
    for a, b in zip(ours, jax.grad(whole, argnums=(0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-5)


def test_a_mask_per_row() -> None:
    q, k, v = random_qkv(40)
    mask = jnp.arange(40) < jnp.asarray([[13], [40]])
    expected = jax.nn.dot_product_attention(q[:, :1], k, v, mask=mask[:, None, None], implementation="xla")
    np.testing.assert_allclose(attend(q[:, :1], k, v, mask[:, None]), expected, atol=2e-6)
    assert np.abs(attend(q[:, :1], k, v, mask[:, None])[0] - attend(q, k, v)[0, :1]).max() > 1e-2


def test_packed_rows_equal_the_whole_mask() -> None:
    q, k, v = random_qkv(300)
    spans, mask = make_spans(PAIRS, 300), make_mask(PAIRS, 300)
    ours = value_and_grads(lambda *qkv: attend_by_xla(*qkv, spans), q, k, v)
    for a, b in zip(ours, value_and_grads(lambda *qkv: attend_whole(*qkv, mask), q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-5)
    mask[0, 150, 110] = True  # one rejected token sees one chosen one
    assert np.abs(ours[0] - attend_whole(q, k, v, mask)).max() > 1e-3


def test_scores_are_not_kept_for_the_backward_pass() -> None:
    """What lies between the passes is queries, keys, values and spans; no array of T x T or of a block's scores."""
    q, k, v = random_qkv(512)
    spans, mask = make_spans(PAIRS, 512), jnp.asarray(make_mask(PAIRS, 512))

    def largest_kept(f: Callable[..., jax.Array]) -> int:
        return max(x.size for x in jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(f, *qkv)[1], q, k, v)))

    assert largest_kept(lambda *qkv: attend_by_xla(*qkv, spans)) <= q.size
    assert largest_kept(lambda *qkv: attend(*qkv, mask)) == 2 * 6 * 512 * 512


# --- intervals ---------------------------------------------------------------------------------------------

SIDES = st.integers(0, 20)
ROWS = st.lists(st.lists(st.tuples(SIDES, SIDES, SIDES).filter(any), max_size=6), min_size=2, max_size=2)


@settings(deadline=None, max_examples=60)
@given(ROWS)
@example([[(3, 0, 0), (2, 1, 1)], [(0, 2, 2), (4, 0, 3), (1, 3, 0), (0, 0, 1)]])
def test_intervals_are_the_spans_of_the_moved_row(rows: list[list[Pair]]) -> None:
    """Also with empty prompts and sides: every pair of tokens sees each other, or not, as before."""
    length = 64
    places, seen = jax.jit(to_intervals)(make_spans(rows, length))
    keys = np.arange(length)
    sees = (keys >= np.asarray(seen.start)[:, :, None]) & (keys < np.asarray(seen.stop)[:, :, None])
    for row, (to, expected) in enumerate(zip(np.asarray(places), make_mask(rows, length), strict=True)):
        np.testing.assert_array_equal(np.sort(to), keys)
        np.testing.assert_array_equal(sees[row][np.ix_(to, to)], expected)
    blocks = sees.reshape(2, 4, 16, 8, 8).any(axis=(2, 4))
    np.testing.assert_array_equal(find_overlap(seen, 16, 8, length), blocks)


def test_tokens_move_to_their_places() -> None:
    places, _ = to_intervals(make_spans([[(2, 3, 1)]], 8))
    moved = place_tokens(jnp.asarray([[10, 11, 20, 21, 22, 30, 0, 0]]), places)
    np.testing.assert_array_equal(moved, [[22, 21, 20, 10, 11, 30, 0, 0]])
    np.testing.assert_array_equal(jnp.take_along_axis(moved, places, axis=1), [[10, 11, 20, 21, 22, 30, 0, 0]])


# --- kernels, interpreted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("dim", "length"), [(64, 640), (128, 256)])  # five blocks of splash, and one
def test_kernels_equal_xla(name: str, dim: int, length: int) -> None:
    q, k, v = random_qkv(length, heads=4, dim=dim)
    spans = make_spans(PAIRS, length)
    kernel = partial(attend_in_order, partial(KERNELS[name], interpret=True))
    ours = value_and_grads(lambda *qkv: kernel(*qkv, spans), q, k, v)
    for a, b in zip(ours, value_and_grads(lambda *qkv: attend_by_xla(*qkv, spans), q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    other = make_spans([PAIRS[0], [(20, 89, 11), *PAIRS[1][1:]]], length)  # one chosen token is now a rejected one
    assert np.abs(ours[0] - attend_by_xla(q, k, v, other)).max() > 1e-2


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_in_bfloat16_are_as_close_to_float32_as_xla_is(name: str) -> None:
    q, k, v = random_qkv(256, heads=4, dim=64)
    spans = make_spans(PAIRS, 256)
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    kernel = partial(attend_in_order, partial(KERNELS[name], interpret=True))
    exact = value_and_grads(lambda *qkv: attend_by_xla(*qkv, spans), *(x.astype(jnp.float32) for x in narrow))
    xla = value_and_grads(lambda *qkv: attend_by_xla(*qkv, spans), *narrow)
    for a, b, c in zip(value_and_grads(lambda *qkv: kernel(*qkv, spans), *narrow), xla, exact, strict=True):
        assert 0 < np.linalg.norm(a - c) <= 1.25 * np.linalg.norm(b - c)


LAUNCHES = [
    triton.Launches(triton.Launch(64, 128, 4, 1), triton.Launch(128, 64, 4, 2), triton.Launch(64, 128, 4, 1), 1),
    triton.Launches(triton.Launch(128, 128, 8, 2), triton.Launch(64, 32, 4, 1), triton.Launch(32, 64, 4, 2), 2),
]


@pytest.mark.parametrize("launches", LAUNCHES)
def test_how_a_kernel_goes_through_a_row_changes_nothing(launches: triton.Launches) -> None:
    """Other blocks, and programs that add up one or two of the four query heads of a kv head."""
    q, k, v = random_qkv(384, heads=8, dim=16)
    kernel = partial(attend_in_order, partial(triton.attend, interpret=True), spans=make_spans(PAIRS, 384))
    expected = value_and_grads(kernel, q, k, v)
    with patch.object(triton, "choose_launches", lambda query: launches):
        ours = value_and_grads(kernel, q, k, v)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "dtype", "stages"),
    [
        ("9.0", jnp.bfloat16, 3),
        ("10.0", jnp.bfloat16, 3),
        ("8.0", jnp.bfloat16, 3),
        ("8.9", jnp.bfloat16, 2),
        ("12.1", jnp.bfloat16, 2),  # a GB10, and whatever else is not known
        ("9.0", jnp.float32, 1),
    ],
)
def test_blocks_fit_into_shared_memory(capability: str, dtype: Any, stages: int) -> None:
    """And divide every row that is taken. An RTX 4090 (8.9) has 99 KiB for a program, an A100 (8.0) 163."""
    query = jnp.zeros((1, 128, 2, 128), dtype)
    with patch.object(triton.jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)]):
        launches = triton.choose_launches(query)
    assert launches.forward.stages == stages
    for launch in launches[:3]:
        assert 128 % launch.queries == 128 % launch.keys == 0 and launch.stages >= 1


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from([(16, 8), (8, 16), (8, 8)]))
@example([[(8, 32, 24)], [(24, 0, 40)]], (8, 8))
def test_blocks_that_the_kernels_visit(rows: list[list[Pair]], sizes: tuple[int, int]) -> None:
    """Those of which something is seen, from both sides; and no mask only where all of it is."""
    length, launch = 64, triton.Launch(*sizes, 4, 1)
    seen = to_intervals(make_spans(rows, length))[1]
    keys = np.arange(length)
    sees = (keys >= np.asarray(seen.start)[:, :, None]) & (keys < np.asarray(seen.stop)[:, :, None])
    blocks = sees.reshape(2, length // sizes[0], sizes[0], length // sizes[1], sizes[1])
    for row in range(2):
        for i, (first, first_whole, end_whole, end) in enumerate(triton._find_keys(seen, launch)[row].tolist()):
            assert first <= first_whole <= end_whole <= end
            assert np.flatnonzero(blocks[row, i].any(axis=(0, 2))).tolist() == list(range(first, end))
            assert np.flatnonzero(blocks[row, i].all(axis=(0, 2))).tolist() == list(range(first_whole, end_whole))
        for j, (first, before, after_gap, count) in enumerate(triton._find_queries(seen, launch, length)[row].tolist()):
            visited = [first + n if n < before else after_gap + n - before for n in range(count)]
            assert visited == np.flatnonzero(blocks[row, :, :, j].any(axis=(1, 2))).tolist()


def gpus() -> list[jax.Device]:
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


@pytest.mark.skipif(not gpus(), reason="no GPU here (JAX_PLATFORMS=cuda,cpu takes one); above it runs interpreted")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_triton_on_a_gpu_equals_xla(dim: int, dtype: Any) -> None:
    spans = make_spans(PAIRS, 640)
    with jax.default_device(gpus()[0]), jax.default_matmul_precision("highest"):
        q, k, v = (x.astype(dtype) for x in random_qkv(640, heads=12, dim=dim))
        ours = value_and_grads(partial(attend_in_order, triton.attend, spans=spans), q, k, v)
        exact = value_and_grads(lambda *qkv: attend_by_xla(*qkv, spans), *(x.astype(jnp.float32) for x in (q, k, v)))
    for a, b in zip(ours, exact, strict=True):
        assert np.linalg.norm(a - b) < 6e-3 * np.linalg.norm(b)  # 8 bits, or the 10 of TF32


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.tuples(*[st.integers(1, 40)] * 3), max_size=4), min_size=1, max_size=3))
@example([[(8, 32, 24)]])  # the block of rejected tokens does not need those of chosen ones
def test_xla_goes_through_the_blocks_that_are_seen(rows: list[list[Pair]]) -> None:
    size, length = 8, 128
    seen = split_spans(place_spans(make_spans(rows, length)), size, length // size)
    expected = make_mask(rows, length).reshape(len(rows), length // size, size, length // size, size).any((0, 2, 4))
    for order, count, blocks in zip(seen.needed, seen.count, expected, strict=True):
        assert sorted(order[:count].tolist()) == np.flatnonzero(blocks).tolist()


def test_xla_computes_no_block_that_nothing_sees() -> None:
    """NaN in the chosen keys, of which rejected tokens see none: 0 x NaN would show if they were computed."""
    q, k, v = random_qkv(384, heads=2, kv_heads=1, dim=16, rows=1)
    spans = make_spans([[(128, 128, 128)]], 384)
    grads = jax.jit(jax.grad(lambda *qkv: jnp.sin(attend_by_xla(*qkv, spans)[:, 256:]).sum(), argnums=(0, 1, 2)))
    clean = grads(q, k, v)
    for grad, whole in zip(grads(q, *(x.at[:, 128:256].set(jnp.nan) for x in (k, v))), clean, strict=True):
        np.testing.assert_array_equal(grad[:, 256:], whole[:, 256:])
    poisoned = grads(q, *(x.at[:, 256].set(jnp.nan) for x in (k, v)))  # and from its own side it does spread
    assert np.isnan(poisoned[0][:, 256:]).any()


@pytest.mark.parametrize("name", KERNELS)
def test_blocks_that_nothing_sees_are_skipped(name: str) -> None:
    """NaN from the second pair on, whose blocks the first does not see: 0 x NaN would show if they were computed."""
    q, k, v = random_qkv(640, heads=2, kv_heads=1, dim=16, rows=1)
    spans = make_spans([[(28, 40, 60), (212, 100, 200)]], 640)
    poisoned = [x.at[:, 128:].set(jnp.nan) for x in (q, k, v)]
    kernel = partial(attend_in_order, partial(KERNELS[name], interpret=True))

    def loss(*qkv: jax.Array) -> jax.Array:
        return jnp.sin(kernel(*qkv, spans)[:, :128]).sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    for grad, clean in zip(grads(*poisoned), grads(q, k, v), strict=True):
        np.testing.assert_allclose(grad[:, :128], clean[:, :128], rtol=1e-6, atol=1e-6)
    poisoned = [x.at[:, 127:].set(jnp.nan) for x in (q, k, v)]  # and into its own pair it does spread
    assert np.isnan(grads(*poisoned)[0][:, :128]).any()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 4, 1), (1, 2, 1, 4)])  # 2 kv heads 4 ways, too
def test_kernels_are_split_over_the_mesh(name: str, sizes: tuple[int, int, int, int]) -> None:
    """Of a row whose tokens are split, each device's queries see keys of all of them, and some keys no query of it."""
    length = 128 * sizes[3]
    q, k, v = random_qkv(length, heads=4, dim=16, rows=8)
    spans = make_spans(
        [
            [(20 + row, 30, 40 - row), (30, 7, 9)] if sizes[3] == 1 else [(150, 70, 90), (40, 30, 30 + row)]
            for row in range(8)
        ],
        length,
    )
    _, seen = to_intervals(spans)
    kernel = partial(attend_per_device, partial(KERNELS[name], interpret=True))
    expected = value_and_grads(lambda *qkv: kernel(*qkv, seen), q, k, v)
    with use_layout(build_layout(MeshConfig(*sizes))):
        ours = value_and_grads(lambda *qkv: kernel(*qkv, seen), q, k, v)
        out = jax.jit(kernel)(q, k, v, seen)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert {shard.data.shape for shard in out.addressable_shards} == {
        (8 // (sizes[0] * sizes[1]), length // sizes[3], 4 // sizes[2], 16)
    }


def lower(kernel: Callable[..., jax.Array], dim: int, dtype: Any, platform: str) -> str:
    shapes = [jax.ShapeDtypeStruct((2, 640, heads, dim), dtype) for heads in (9, 3, 3)]
    seen = KeyIntervals(*(jax.ShapeDtypeStruct((2, 640), jnp.int32),) * 2)
    grad = jax.grad(lambda *args: kernel(*args).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    return jax.jit(grad).trace(*shapes, seen).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_lower_for_their_devices(dim: int, dtype: Any) -> None:
    """Without a device this far goes: to Mosaic for TPU, to Triton for an NVIDIA H100; forward, dQ, dK and dV."""
    assert lower(splash.attend, dim, dtype, "tpu").count("tpu_custom_call") == 3
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("one",), abstract_device=h100)):
        text = lower(triton.attend, dim, dtype, "cuda")
    for step in ("forward", "backward_query", "backward_key"):
        assert f"pair_attention_{step}" in text


def test_rows_and_heads_that_a_kernel_cannot_take() -> None:
    def call(name: str, length: int, dim: int = 64) -> None:
        q, k, v = (jax.ShapeDtypeStruct((1, length, heads, dim), jnp.bfloat16) for heads in (4, 2, 2))
        bound = jax.ShapeDtypeStruct((1, length), jnp.int32)
        jax.eval_shape(KERNELS[name], q, k, v, KeyIntervals(bound, bound))

    for name in KERNELS:
        call(name, 640)
        with pytest.raises(ConfigError, match=f"'{name}': rows of 200 tokens; the kernel takes multiples of 128"):
            call(name, 200)
    call("splash", splash.LONGEST_ROW)
    with pytest.raises(ConfigError, match="rows of 32896 tokens; the kernel takes at most 32768"):
        call("splash", splash.LONGEST_ROW + 128)
    with pytest.raises(ConfigError, match="heads of 80 numbers; the kernel takes powers of two"):
        call("triton", 256, dim=80)


# --- the choice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "platform", "expected"),
    [
        ("auto", "cpu", "xla"),
        ("auto", "tpu", "splash"),
        ("auto", "gpu", "triton"),
        ("xla", "tpu", "xla"),
        ("xla", "gpu", "xla"),
        ("splash", "tpu", "splash"),
        ("triton", "gpu", "triton"),
    ],
)
def test_the_back_end_of_a_platform(name: str, platform: str, expected: str) -> None:
    assert resolve_attention(name, platform) is BACKENDS[expected]


@pytest.mark.parametrize(("capability", "expected"), [("7.5", "xla"), ("8.0", "triton"), ("10.0", "triton")])
def test_a_gpu_that_pallas_does_not_compile_for_has_the_plain_one(capability: str, expected: str) -> None:
    with patch.object(triton.jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)]):
        assert resolve_attention("auto", "gpu").name == expected


def test_back_ends_that_are_refused() -> None:
    with pytest.raises(ConfigError, match="'splash' runs on tpu only, and the devices here are cpu.*auto .here xla"):
        resolve_attention("splash", "cpu")
    with pytest.raises(ConfigError, match="'triton' runs on gpu only, and the devices here are tpu.*auto .here splash"):
        resolve_attention("triton", "tpu")
    with pytest.raises(ConfigError, match="'flash' is not known; choose one of .*'auto', 'xla', 'splash', 'triton'"):
        resolve_attention("flash", "cpu")
