"""Attention over packed rows of pairs, by back end, beside cuDNN or XLA on padded rows, as one line of JSON.

    python scripts/bench_attention.py [--heads 12 --kv-heads 2 --dim 128] [--tokens 15360] [--tune]

Lengths of pairs are drawn once (prompts of 16 to 1024 tokens, completions of 16 to 512; about those of real chats) and
packed as a step packs them. The peer is what one writes without packing: `jax.nn.dot_product_attention`, causal, on
two rows a pair, padded to the longest; cuDNN's kernel on NVIDIA GPUs, XLA elsewhere. Milliseconds are those of one
layer, the median of several runs, after one that compiles; `tflops` counts what the pairs need: 4 * heads * dim for
each query and each position that it sees forward, 2.5 times that backward. `error`: distance of the output and of the
gradients from float32 in XLA, relative to its norm, the largest of the four.

`--tune` also tries block sizes of the Triton kernels, one line to stderr for each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import jax
import jax.numpy as jnp
import numpy as np

from drift_jax.data.batches import PairLoader
from drift_jax.data.pairs import TokenizedPair
from drift_jax.models import triton
from drift_jax.models.attention import BACKENDS, AttentionBackend, resolve_attention
from drift_jax.models.intervals import KeyIntervals, KeySpans, to_intervals
from drift_jax.plan.flops import count_seen

Times = dict[str, Any]


class Case(NamedTuple):
    """Rows of pairs in the order of a back end, random queries, keys, values and cotangents."""

    arrays: tuple[jax.Array, ...]  # query [R, T, N, H], key, value [R, T, K, H], cotangent [R, T, N, H]
    seen: KeySpans | KeyIntervals


def draw_pairs(tokens: int) -> list[TokenizedPair]:
    """Pairs that fill about so many tokens."""
    rng, pairs, total = np.random.default_rng(0), [], 0
    while True:
        lengths = [int(np.exp(rng.uniform(np.log(16), np.log(most)))) for most in (1024, 512, 512)]
        total += sum(lengths)
        if total > tokens and pairs:
            return pairs
        pairs.append(TokenizedPair(str(len(pairs)), *(np.zeros(length, np.int32) for length in lengths)))


def pack(pairs: list[TokenizedPair], tokens: int, attention: str) -> KeySpans:
    count = len(pairs)
    loader = PairLoader(pairs, np.zeros((count, 2)), count, 1, 2048, tokens_per_device=tokens, attention=attention)
    batch = loader.shuffled(0)
    return KeySpans(*(jnp.concatenate(list(x[: int(batch.micro_batches)])) for x in batch.spans))


def make_case(args: argparse.Namespace, backend: AttentionBackend, spans: KeySpans) -> Case:
    arrays = random_arrays(args, *spans.own_start.shape)
    return Case(arrays, to_intervals(spans)[1] if backend.intervals else spans)


def random_arrays(args: argparse.Namespace, rows: int, length: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    shapes = [(rows, length, count, args.dim) for count in heads]
    return tuple(jax.random.normal(key, shape, args.dtype) for key, shape in zip(keys, shapes, strict=True))


def both_passes(attend: Callable[..., jax.Array], query: Any, key: Any, value: Any, grad: Any) -> tuple[jax.Array, ...]:
    """(output, dQ, dK, dV)."""
    out, pull = jax.vjp(attend, query, key, value)
    return out, *pull(grad.astype(out.dtype))


def median_ms(function: Callable[..., Any], *args: Any, runs: int = 7) -> float:
    compiled = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(attend: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], flops: float, seen: Any = ()) -> Times:
    """`seen` is an argument of what is timed: as a constant, the compiler would make lists of blocks ahead of time."""
    forward = median_ms(lambda seen, *qkv: attend(*qkv, *seen), seen, *arrays[:3])
    both = median_ms(lambda seen, *rest: both_passes(lambda *qkv: attend(*qkv, *seen), *rest), seen, *arrays)
    return {
        "forward_ms": round(forward, 3),
        "both_ms": round(both, 3),
        "forward_tflops": float(f"{flops / forward / 1e9:.3g}"),
        "both_tflops": float(f"{3.5 * flops / both / 1e9:.3g}"),
    }


def measure_backend(args: argparse.Namespace, name: str, spans: KeySpans, flops: float) -> Times:
    backend = BACKENDS[name]
    case = make_case(args, backend, spans)
    attend = partial(backend.attend, seen=case.seen)
    found = jax.jit(partial(both_passes, attend))(*case.arrays)
    with jax.default_matmul_precision("highest"):
        wide = tuple(x.astype(jnp.float32) for x in case.arrays)
        exact = jax.jit(partial(both_passes, partial(attend_exactly, seen=case.seen)))(*wide)
    errors = [
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for a, b in zip(found, exact, strict=True)
    ]
    return measure(backend.attend, case.arrays, flops, (case.seen,)) | {"error": float(f"{max(errors):.3g}")}


def attend_exactly(query: jax.Array, key: jax.Array, value: jax.Array, seen: KeySpans | KeyIntervals) -> jax.Array:
    """By the whole mask, a row at a time."""
    places = jnp.arange(query.shape[1])

    def one(row: tuple[Any, ...]) -> jax.Array:
        *qkv, bounds = row
        if isinstance(bounds, KeyIntervals):
            mask = (places >= bounds.start[:, None]) & (places < bounds.stop[:, None])
        else:
            first, last, own = (bound[:, None] for bound in bounds)
            mask = (places <= places[:, None]) & ((places >= own) | ((places >= first) & (places < last)))
        return jax.nn.dot_product_attention(*(x[None] for x in qkv), mask=mask[None, None])[0]

    return jax.lax.map(jax.checkpoint(one), (query, key, value, seen))


def measure_peer(args: argparse.Namespace, pairs: list[TokenizedPair], platform: str, flops: float) -> Times:
    longest = max(len(p.prompt_ids) + max(p.completion_lengths) for p in pairs)
    length = -(-longest // 64) * 64
    implementation = "cudnn" if platform == "gpu" and args.dtype == "bfloat16" else "xla"
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)
    arrays = random_arrays(args, 2 * len(pairs), length)
    return {"implementation": implementation, "rows": 2 * len(pairs), "row_length": length} | measure(
        attend, arrays, flops
    )


def with_launches(function: Callable[..., Any], launches: triton.Launches) -> Callable[..., Any]:
    """A kernel with other launches: a new function, or jax would take the program that it has of the old one."""

    def call(*operands: Any) -> Any:
        with patch.object(triton, "choose_launches", lambda _: launches):
            return function(*operands)

    return call


def tune(args: argparse.Namespace, spans: KeySpans, flops: float) -> None:
    """Times the three Triton kernels apart, with several ways to go through a row."""
    arrays, seen = make_case(args, BACKENDS["triton"], spans)
    query, key, value, grad = arrays
    mixed, lse = jax.jit(partial(triton._forward, False))(query, key, value, seen)
    delta = jnp.einsum("btnh,btnh->bnt", mixed, grad, preferred_element_type=jnp.float32)
    inputs = (query, key, value, *seen, grad, lse, delta)
    kernels = {
        "forward": (partial(triton._forward, False), (query, key, value, seen), 1.0),
        "query": (partial(triton._backward_query, False), inputs, 1.5),  # three products where forward has two
        "key": (partial(triton._backward_key, False), inputs, 2.0),
    }
    blocks = [(64, 32), (64, 64), (128, 64), (64, 128), (128, 128)]
    for name, (function, operands, share) in kernels.items():
        per_program = (None, 2, 1) if name == "key" else (None,)
        for sizes, warps, stages, heads in itertools.product(blocks, (4, 8), (1, 2, 3), per_program):
            launch = triton.Launch(*sizes, warps, stages)
            launches = triton.choose_launches(query)._replace(**{name: launch, "heads_per_program": heads})
            try:
                ms = median_ms(with_launches(function, launches), *operands)
                result = f"{ms:.3f} ms, {share * flops / ms / 1e9:.0f} TFLOP/s"
            except Exception as error:
                result = f"does not run: {str(error).splitlines()[0][:80]}"
            print(f"{name} {launch} heads {heads or 'all'}: {result}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128, help="of a head")
    parser.add_argument("--tokens", type=int, default=None, help="of all rows; default 15360, on a CPU 4096")
    parser.add_argument("--dtype", default=None, help="default bfloat16, on a CPU float32")
    parser.add_argument("--tune", action="store_true", help="try block sizes of the Triton kernels (on a GPU)")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    args.tokens = args.tokens or (4096 if on_cpu else 15360)
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    best = resolve_attention("auto", device.platform).name
    pairs = draw_pairs(args.tokens)
    seen = sum(count_seen(len(pair.prompt_ids), *pair.completion_lengths) for pair in pairs)
    spans, flops = pack(pairs, args.tokens, best), 4.0 * args.heads * args.dim * seen
    if args.tune:
        tune(args, spans, flops)
    row: dict[str, Any] = {"bench": "attention", "device": device.device_kind, "pairs": len(pairs), "dtype": args.dtype}
    row |= {"rows": list(spans.own_start.shape), "heads": args.heads, "kv_heads": args.kv_heads, "dim": args.dim}
    row |= {name: measure_backend(args, name, spans, flops) for name in dict.fromkeys((best, "xla"))}
    peer = measure_peer(args, pairs, device.platform, flops)
    ratio = round(peer["both_ms"] / row[best]["both_ms"], 3)
    print(json.dumps(row | {"peer": peer, "ratio": ratio, "versions": {"jax": jax.__version__}}))


if __name__ == "__main__":
    main()
