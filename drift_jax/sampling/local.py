"""The sampler in JAX: batched prefill, then a decode loop that stays on the device until every row has ended.

Rows of a batch have prompts of the same bucket of lengths and fill it from the left; generated tokens go to the
slots after the bucket, so all rows write the same slot. The empty slots in between are masked.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from drift_jax.models.policy import Policy, bind
from drift_jax.models.qwen import KVCache
from drift_jax.sampling.base import Completion, OnBatch, Sampler, SampleRequest, SamplingParams
from drift_jax.sampling.draw import draw_tokens, row_keys, row_words
from drift_jax.sharding import build_sharding, check_sampling_batch, put, replicated, use_layout

_SHORTEST_BUCKET = 64


class _Decoding(NamedTuple):
    """State of the decode loop; `tokens` are the new ones."""

    step: Int[Array, ""]
    tokens: Int[Array, "B M"]
    logps: Float[Array, "B M"]
    last: Int[Array, "B"]
    done: Bool[Array, "B"]
    cache: KVCache


def prompt_bucket(length: int) -> int:
    """The padded length of a prompt: the next power of two, at least 64. Few lengths mean few compilations."""
    return max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def generate(
    graphdef: Any,
    params: dict[str, Any],
    sampling: SamplingParams,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: Key[Array, "B"],
) -> tuple[Int[Array, "B M"], Float[Array, "B M"]]:
    """Prompts, right-padded to T -> up to M = max_new_tokens new tokens each, and their log-probs.

    After an EOS the row is filled with it.

    Rows of length 0 are padding of the batch: they are done from the start.
    """
    model = bind(graphdef, params)
    rows, width = ids.shape
    slots = width + sampling.max_new_tokens
    eos = jnp.asarray(sampling.eos_ids, jnp.int32)
    draw = partial(draw_tokens, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)

    def next_token(logits: Float[Array, "B V"], step: Int[Array, ""]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
        logits = jnp.where(jnp.arange(logits.shape[1]) < sampling.vocab_size, logits, -jnp.inf)
        token = draw(logits, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step))
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]

    def record(
        state: _Decoding, drawn: tuple[Int[Array, "B"], Float[Array, "B"]], step: Int[Array, ""], cache: KVCache
    ) -> _Decoding:
        token = jnp.where(state.done, state.last, drawn[0])
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, step))
        logps = jax.lax.dynamic_update_slice(state.logps, drawn[1][:, None], (0, step))
        return _Decoding(step + 1, tokens, logps, token, state.done | jnp.isin(token, eos), cache)

    def go_on(state: _Decoding) -> Bool[Array, ""]:
        return (state.step < sampling.max_new_tokens) & ~jnp.all(state.done)

    def decode_one(state: _Decoding) -> _Decoding:
        index = jnp.arange(slots)
        slot = width + state.step - 1
        mask = (index < lengths[:, None]) | ((index >= width) & (index <= slot))
        hidden, cache = model.decode(state.last, lengths + state.step - 1, state.cache, slot, mask)
        return record(state, next_token(model.logits(hidden), state.step), state.step, cache)

    hidden, cache = model.prefill(ids, slots)
    last_hidden = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    zero = jnp.zeros((), jnp.int32)
    empty = jnp.full((rows, sampling.max_new_tokens), eos[0])
    start = _Decoding(zero, empty, jnp.zeros(empty.shape), jnp.full(rows, eos[0]), lengths == 0, cache)
    first = record(start, next_token(model.logits(last_hidden), zero), zero, cache)
    ended = jax.lax.while_loop(go_on, decode_one, first)
    return ended.tokens, ended.logps


@final
class LocalSampler(Sampler):
    """Samples with the policy's weights in this process."""

    def __init__(self, policy: Policy, batch_size: int) -> None:
        check_sampling_batch(policy.layout, batch_size)
        self.ways = policy.layout.ways("batch")
        self.policy = policy
        self.batch_size = batch_size
        # Every process of the mesh reads all tokens.
        everywhere = replicated(policy.layout)
        self.jitted_generate = jax.jit(partial(generate, policy.graphdef), static_argnums=1, out_shardings=everywhere)

    def sample(
        self, requests: Iterable[SampleRequest], params: SamplingParams, on_batch: OnBatch | None = None
    ) -> list[Completion]:
        requests = list(requests)
        # Rows are grouped by bucket, shortest first: which rows share a batch changes no row's tokens.
        order = sorted(range(len(requests)), key=lambda i: prompt_bucket(len(requests[i].prompt_ids)))
        done: dict[int, Completion] = {}
        for group in self._batches(requests, order):
            completions = self._sample_batch([requests[i] for i in group], params)
            done |= dict(zip(group, completions, strict=True))
            if on_batch is not None:
                on_batch(completions)
        return [done[i] for i in range(len(requests))]

    def _batches(self, requests: list[SampleRequest], order: list[int]) -> Iterable[list[int]]:
        group: list[int] = []
        for i in order:
            bucket = prompt_bucket(len(requests[i].prompt_ids))
            if group and (len(group) == self.batch_size or bucket != prompt_bucket(len(requests[group[0]].prompt_ids))):
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    def _sample_batch(self, requests: list[SampleRequest], params: SamplingParams) -> list[Completion]:
        width = prompt_bucket(max(len(r.prompt_ids) for r in requests))
        # The last batch of a bucket is often small; a power of two keeps the number of compiled shapes low.
        rows = min(self.batch_size, self.ways * (1 << (-(-len(requests) // self.ways) - 1).bit_length()))
        ids = np.zeros((rows, width), np.int32)
        lengths = np.zeros(rows, np.int32)
        words = np.zeros((rows, 2), np.uint32)
        words[: len(requests)] = row_words((r.row_id, r.sample) for r in requests)
        for row, request in enumerate(requests):
            ids[row, : len(request.prompt_ids)] = request.prompt_ids
            lengths[row] = len(request.prompt_ids)
        layout = self.policy.layout
        with use_layout(layout):
            by_row = build_sharding(layout, ("batch", None), ids.shape, "prompts")
            one = build_sharding(layout, ("batch",), lengths.shape, "prompts")
            tokens, logps = self.jitted_generate(
                self.policy.params,
                params,
                put(ids, by_row),
                put(lengths, one),
                row_keys(params.seed, put(words, by_row)),
            )
        rows = zip(requests, np.asarray(tokens), np.asarray(logps), strict=False)
        return [_completion(*row, params) for row in rows]


def _completion(request: SampleRequest, row: np.ndarray, logps: np.ndarray, params: SamplingParams) -> Completion:
    ended = np.flatnonzero(np.isin(row, params.eos_ids))
    length = ended[0] + 1 if len(ended) else len(row)
    reason = "stop" if len(ended) else "length"
    ids, token_logps = tuple(row[:length].tolist()), tuple(logps[:length].tolist())
    return Completion(request.row_id, request.sample, ids, reason, token_logps)
