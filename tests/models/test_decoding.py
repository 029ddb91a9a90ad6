"""Prompts in a cache and one more token at a time: the logits of the whole forward, however layers are kept."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.config import MeshConfig
from drift_jax.models.attention import resolve_attention
from drift_jax.models.decoding import copy_slots, decode, grow_cache, init_cache, insert, prefill, split_layers
from drift_jax.models.policy import bind, load_policy
from drift_jax.sharding import build_layout
from tests.tiny_models import VOCAB, build_tiny_model

LENGTHS = (5, 9, 1, 12)  # of prompts; the third has nothing to prefill
ROOM = 16


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("decoding") / "m", request.param, tied=request.param == "qwen3")


@pytest.mark.parametrize("stacked,rows", [(False, 5), (True, 5), (False, 1), (True, 1)])
def test_decoding_equals_the_whole_forward(model_dir: Path, stacked: bool, rows: int) -> None:
    """Rows of several lengths in one cache, which grows on the way; row 4 is a copy of row 1. Three tokens each."""
    policy = load_policy(model_dir, build_layout(MeshConfig(), jax.devices()[:1]), "float32")
    params = policy.params if stacked else split_layers(policy.params)
    ids = np.random.default_rng(0).integers(3, VOCAB, (rows, ROOM))
    ids[-1] = ids[1 % rows]
    lengths = np.array([*LENGTHS, LENGTHS[1]])[:rows]
    ids, lengths = jnp.asarray(ids), jnp.asarray(lengths)
    packed, positions, slots, starts, at = np.zeros((1, 128), int), np.zeros((1, 128), int), [], [], 0
    for row in range(min(rows, 4)):
        stop = at + int(lengths[row]) - 1
        packed[0, at:stop], positions[0, at:stop] = ids[row, : stop - at], np.arange(stop - at)
        slots.append(row)
        starts.append(at)
        at = stop

    prompts = jax.jit(lambda p, i, at: prefill(resolve_attention("xla", "cpu"), policy.graphdef, p, i, at))(
        params, jnp.asarray(packed, jnp.int32), jnp.asarray(positions, jnp.int32)
    )
    cache = init_cache(policy.config, rows, 12, jnp.float32, stacked)
    cache = insert(cache, prompts, jnp.asarray([slots]), jnp.asarray([starts]), jnp.asarray(len(slots)))
    if rows > 4:
        cache = copy_slots(cache, jnp.asarray([[1]]), jnp.asarray([[4]]), jnp.asarray(1))
    cache = grow_cache(cache, ROOM)
    one = jax.jit(lambda p, c, i, at: decode(policy.graphdef, p, c, i, at))
    model = bind(policy.graphdef, policy.params)
    whole = model.logits(model.hidden(ids, jnp.broadcast_to(jnp.arange(ROOM), ids.shape)))
    for step in range(3):
        places = lengths - 1 + step
        logits, cache = one(params, cache, ids[jnp.arange(rows), places], places)
        np.testing.assert_allclose(logits, whole[jnp.arange(rows), places], atol=1e-4)
    # The negative twin: a token at another place is another token.
    wrong, _ = one(params, cache, ids[jnp.arange(rows), lengths + 1], lengths + 2)
    assert np.abs(np.asarray(wrong - whole[jnp.arange(rows), lengths + 1])).max() > 1e-2
