"""The sampler in JAX: continuous batching over the slots of a KV cache.

Prompts are packed into rows of tokens and computed together, without their last token. That one is the first that the
decoding loop takes, so all drawing happens there. The loop stays on the device until enough rows have ended for others
to take their slots; what a row draws depends on its own key and place only, so neither neighbours nor the slot matter.
The cache begins with the room that the shortest prompts need, and grows in few steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from drift_jax.compiled import recall
from drift_jax.errors import ModelError
from drift_jax.models.attention import resolve_attention
from drift_jax.models.decoding import (
    KVCache,
    cache_shardings,
    compute_dtype,
    copy_slots,
    decode,
    grow_cache,
    init_cache,
    insert,
    prefill,
    split_abstract,
    split_layers,
)
from drift_jax.models.policy import Policy
from drift_jax.sampling.base import Completion, OnBatch, Sampler, SampleRequest, SamplingParams
from drift_jax.sampling.draw import draw_tokens, row_keys, row_words
from drift_jax.sampling.slots import Admission, SlotTable, round_length
from drift_jax.sharding import Layout, check_sampling_batch, put, replicated, use_layout

_BUDGET = 1024  # tokens of packed prompts a device at a time
_STEPS = 64  # tokens a row between two looks of the host, at most
# Products that run side by side, each on all cores, wait for each other: a step of 8 rows takes 115 ms instead of 70.
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": False}}
_REFILL = 8  # slots are refilled when one in so many is free


class Rows(NamedTuple):
    """What is known of each row of the cache; M is the most tokens a completion can have."""

    lengths: Int[Array, " B"]  # tokens in the cache
    last: Int[Array, " B"]  # the token that is not in it yet
    made: Int[Array, " B"]  # tokens drawn
    done: Bool[Array, " B"]
    words: UInt32[Array, "B 2"]
    tokens: Int[Array, "B M"]
    logps: Float[Array, "B M"]


class DrawRule(NamedTuple):
    """What of `SamplingParams` is part of the program."""

    temperature: float
    top_k: int
    top_p: float
    eos_ids: tuple[int, ...]
    vocab_size: int

    @staticmethod
    def of(params: SamplingParams) -> DrawRule:
        return DrawRule(params.temperature, params.top_k, params.top_p, params.eos_ids, params.vocab_size)


def init_rows(rows: int, most: int) -> Rows:
    """Rows that nothing is drawn for."""
    zeros = jnp.zeros(rows, jnp.int32)
    words = jnp.zeros((rows, 2), jnp.uint32)
    tokens = jnp.zeros((rows, most), jnp.int32)
    return Rows(zeros, zeros, zeros, jnp.ones(rows, bool), words, tokens, jnp.zeros((rows, most), jnp.float32))


def admit_rows(
    rows: Rows, fresh: Bool[Array, " B"], lengths: Int[Array, " B"], last: Int[Array, " B"], words: UInt32[Array, "B 2"]
) -> Rows:
    """The rows with new requests where `fresh`."""
    return rows._replace(
        lengths=jnp.where(fresh, lengths, rows.lengths),
        last=jnp.where(fresh, last, rows.last),
        made=jnp.where(fresh, 0, rows.made),
        done=rows.done & ~fresh,
        words=jnp.where(fresh[:, None], words, rows.words),
    )


class _Loop(NamedTuple):
    step: Int[Array, ""]
    rows: Rows
    cache: KVCache


def generate(
    graphdef: Any,
    rule: DrawRule,
    params: dict[str, Any],
    seed: Int[Array, ""],
    rows: Rows,
    cache: KVCache,
    stop_at: Int[Array, ""],
) -> tuple[Rows, KVCache]:
    """Draws tokens for all rows that are not done, until `stop_at` rows are, or the cache or the host's turn is up."""
    keys = row_keys(seed, rows.words)
    eos = jnp.asarray(rule.eos_ids, jnp.int32)
    most = rows.tokens.shape[1]
    slots = cache.slots

    def go_on(loop: _Loop) -> Bool[Array, ""]:
        rows = loop.rows
        room = jnp.all(rows.done | (rows.lengths < slots))
        return (loop.step < _STEPS) & (rows.done.sum() < stop_at) & room

    def draw_one(loop: _Loop) -> _Loop:
        rows, live = loop.rows, ~loop.rows.done
        logits, cache = decode(graphdef, params, loop.cache, rows.last, rows.lengths)
        logits = jnp.where(jnp.arange(logits.shape[1]) < rule.vocab_size, logits, -jnp.inf)
        of_token = jax.vmap(jax.random.fold_in)(keys, rows.made)
        drawn = draw_tokens(logits, of_token, rule.temperature, rule.top_k, rule.top_p)
        at = (jnp.arange(len(live)), jnp.where(live, rows.made, most))  # what has no place is not written
        made = rows.made + live
        return _Loop(
            loop.step + 1,
            rows._replace(
                lengths=rows.lengths + live,
                last=jnp.where(live, drawn.ids, rows.last),
                made=made,
                done=rows.done | jnp.isin(drawn.ids, eos) | (made >= most),
                tokens=rows.tokens.at[at].set(drawn.ids, mode="drop"),
                logps=rows.logps.at[at].set(drawn.logps, mode="drop"),
            ),
            cache,
        )

    ended = jax.lax.while_loop(go_on, draw_one, _Loop(jnp.int32(0), rows, cache))
    return ended.rows, ended.cache


def keeps_stacks(layout: Layout) -> bool:
    """Whether one program decodes all layers (see models/decoding.py)."""
    return layout.platform == "tpu"


def split_policy(policy: Policy) -> Policy:
    """The policy as the sampler takes it, without a second copy of the weights; the one that is given is used up."""
    if keeps_stacks(policy.layout):
        return policy
    return replace(policy, params=split_layers(policy.params, consume=True))


class _Programs(NamedTuple):
    """The jitted functions of a sampler, which depend on no weights."""

    init: Any
    prefill: Any
    insert: Any
    copy: Any
    grow: Any
    init_rows: Any
    admit: Any
    generate: Any


def _build_programs(policy: Policy, batch_size: int, attention: str) -> _Programs:
    graphdef, layout = policy.graphdef, policy.layout
    backend, options = resolve_attention(attention, layout.platform), _COMPILER_OPTIONS.get(layout.platform)
    # Every process of the mesh reads what was drawn. All programs give the cache the same placement: one that came
    # with another would be compiled for anew.
    everywhere, placed = replicated(layout), cache_shardings(policy.config, layout, batch_size, keeps_stacks(layout))
    return _Programs(
        init=jax.jit(init_cache, static_argnums=(0, 1, 2, 3, 4), out_shardings=placed),
        prefill=jax.jit(partial(prefill, backend, graphdef), compiler_options=options),
        insert=jax.jit(insert, donate_argnums=0, out_shardings=placed),
        copy=jax.jit(copy_slots, donate_argnums=0, out_shardings=placed),
        grow=jax.jit(grow_cache, static_argnums=1, out_shardings=placed),
        init_rows=jax.jit(init_rows, static_argnums=(0, 1), out_shardings=everywhere),
        admit=jax.jit(admit_rows, donate_argnums=0, out_shardings=everywhere),
        generate=jax.jit(
            partial(generate, graphdef),
            static_argnums=0,
            donate_argnums=(3, 4),
            out_shardings=(everywhere, placed),
            compiler_options=options,
        ),
    )


@final
class LocalSampler(Sampler):
    """Samples with the policy's weights in this process.

    Args:
      policy: from `split_policy`, or as it was loaded: then the sampler makes a copy of what it needs in another way.
      batch_size: rows decoded together; the slots of the cache.
      attention: the back end for prompts, as `model.attention`.
    """

    def __init__(self, policy: Policy, batch_size: int, attention: str = "auto") -> None:
        check_sampling_batch(policy.layout, batch_size)
        self.policy, self.batch_size = policy, batch_size
        self.parts = policy.layout.ways("batch")
        self.stacked = keeps_stacks(policy.layout)
        # A CPU computes what of the room is empty; elsewhere compiling anew costs more.
        self.room_steps = 4 if policy.layout.platform == "cpu" else 2
        self.dtype = compute_dtype(policy.graphdef, policy.params)  # of keys and values
        key = (policy.graphdef, policy.config, policy.layout.key, batch_size, attention)
        self.jitted = recall("sampler", key, partial(_build_programs, policy, batch_size, attention))
        self._params: dict[str, Any] | None = None

    @property
    def params(self) -> dict[str, Any]:
        """The weights as the programs take them."""
        if self._params is None:
            split = self.stacked or isinstance(self.policy.params["blocks"], tuple)
            self._params = self.policy.params if split else split_layers(self.policy.params)
        return self._params

    def lower(self, sampling: SamplingParams, room: int) -> jax.stages.Lowered:
        """The decoding loop for a cache of so much room, with abstract weights; its layout must be in force."""
        config, layout, rows = self.policy.config, self.policy.layout, self.batch_size
        params, everywhere = self.policy.params, replicated(layout)
        if not self.stacked:
            params = split_abstract(params)
        cache = jax.eval_shape(partial(init_cache, config, rows, room, self.dtype, self.stacked))
        placed = cache_shardings(config, layout, rows, self.stacked)

        def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        state = jax.eval_shape(partial(init_rows, rows, sampling.max_new_tokens))
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        return self.jitted.generate.lower(
            DrawRule.of(sampling),
            params,
            number,
            jax.tree.map(lambda x: place(x, everywhere), state),
            jax.tree.map(place, cache, placed),
            number,
        )

    def sample(
        self, requests: Iterable[SampleRequest], params: SamplingParams, on_batch: OnBatch | None = None
    ) -> list[Completion]:
        requests = list(requests)
        if not requests:
            return []
        done: dict[tuple[str, int], Completion] = {}
        with use_layout(self.policy.layout):
            for completions in _Session(self, requests, params).run():
                done |= {(c.row_id, c.sample): c for c in completions}
                if on_batch is not None:
                    on_batch(completions)
        return [done[request.row_id, request.sample] for request in requests]


@final
class _Session:
    """One call of `sample`: the cache, the rows and who has them."""

    def __init__(self, sampler: LocalSampler, requests: list[SampleRequest], params: SamplingParams) -> None:
        self.sampler, self.sampling = sampler, params
        self.rule = DrawRule.of(params)
        # Few requests need few slots; powers of two are few compilations.
        needed = 1 << (-(-len(requests) // sampler.parts) - 1).bit_length()
        per_part = min(sampler.batch_size // sampler.parts, needed)
        self.table = SlotTable(requests, sampler.parts, per_part, _BUDGET)
        self.everywhere = replicated(sampler.policy.layout)
        self.rows = sampler.jitted.init_rows(self.table.rows, params.max_new_tokens)
        self.cache: KVCache | None = None
        self.lengths = np.zeros(self.table.rows, np.int64)  # as the device has them

    def run(self) -> Iterable[list[Completion]]:
        while self.table.waiting or self.table.running:
            while (admission := self.table.admit()) is not None:
                self._admit(admission)
            self._make_room(1)
            idle = self.table.rows - len(self.table.running)
            enough = idle + max(1, self.table.rows // _REFILL) if self.table.waiting else self.table.rows
            self.rows, self.cache = self.sampler.jitted.generate(
                self.rule,
                self.sampler.params,
                self._put(np.int32(self.sampling.seed)),
                self.rows,
                self.cache,
                self._put(np.int32(enough)),
            )
            if completions := self._collect():
                yield completions

    def _put(self, array: np.ndarray | np.generic) -> Array:
        return put(array, self.everywhere)

    def _admit(self, admission: Admission) -> None:
        """Prompts into the cache, and the rows that decode them."""
        fresh, last = np.zeros(self.table.rows, bool), np.zeros(self.table.rows, np.int32)
        words = np.zeros((self.table.rows, 2), np.uint32)
        slots, requests = list(admission.requests), admission.requests.values()
        fresh[slots], last[slots] = True, [request.prompt_ids[-1] for request in requests]
        self.lengths[slots] = [len(request.prompt_ids) - 1 for request in requests]
        words[slots] = row_words((request.row_id, request.sample) for request in requests)
        self._make_room(0)
        sampler, lengths = self.sampler, self.lengths.astype(np.int32)
        self.rows = sampler.jitted.admit(self.rows, *map(self._put, (fresh, lengths, last, words)))
        if admission.inserts:
            prompts = sampler.jitted.prefill(sampler.params, *map(self._put, (admission.ids, admission.positions)))
            where = map(self._put, (admission.slots, admission.starts, np.int32(admission.inserts)))
            self.cache = sampler.jitted.insert(self.cache, prompts, *where)
        if admission.copies:
            which = map(self._put, (admission.sources, admission.targets, np.int32(admission.copies)))
            self.cache = sampler.jitted.copy(self.cache, *which)

    def _make_room(self, tokens: int) -> None:
        """Lets the cache have room for so many more tokens of every running row."""
        sampler = self.sampler
        longest = int(max(self.lengths[slot] for slot in self.table.running))
        needed = round_length(longest + tokens, sampler.room_steps)
        if self.cache is None:
            config, rows = sampler.policy.config, self.table.rows
            self.cache = sampler.jitted.init(config, rows, needed, sampler.dtype, sampler.stacked)
        elif self.cache.slots < needed:
            self.cache = sampler.jitted.grow(self.cache, needed)

    def _collect(self) -> list[Completion]:
        """The completions of rows that have ended since; their slots are free then."""
        done, made, lengths = (np.asarray(x) for x in (self.rows.done, self.rows.made, self.rows.lengths))
        self.lengths = lengths.astype(np.int64)
        ended = [slot for slot in self.table.running if done[slot]]
        if not ended:
            return []
        tokens, logps = np.asarray(self.rows.tokens), np.asarray(self.rows.logps)
        return [
            _completion(self.table.release(slot), tokens[slot, : made[slot]], logps[slot, : made[slot]], self.sampling)
            for slot in ended
        ]


def _completion(request: SampleRequest, ids: np.ndarray, logps: np.ndarray, params: SamplingParams) -> Completion:
    if not np.isfinite(logps).all():
        raise ModelError(
            f"the policy's logits for row {request.row_id!r} are not finite: its weights are damaged, or too large for "
            "sampling.compute_dtype. Sample with float32, or from the checkpoint before."
        )
    reason = "stop" if ids[-1] in params.eos_ids else "length"
    return Completion(request.row_id, request.sample, tuple(ids.tolist()), reason, tuple(logps.tolist()))
