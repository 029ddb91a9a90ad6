"""Our Qwen against transformers' on the same files, and on several meshes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from drift_jax.config import MeshConfig
from drift_jax.models.attention import attend_by_xla
from drift_jax.models.hf import load_params, load_qwen_config
from drift_jax.models.intervals import KeySpans
from drift_jax.models.logps import Tile, token_logps
from drift_jax.models.qwen import declare_qwen
from drift_jax.models.stack import REMAT
from drift_jax.sharding import Layout, build_layout, use_layout
from tests.tiny_models import VOCAB, build_tiny_model

KINDS = {"qwen2": ("qwen2", False), "qwen2-tied": ("qwen2", True), "qwen3": ("qwen3", False)}


@pytest.fixture(scope="module", params=KINDS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, tied = KINDS[request.param]
    return build_tiny_model(tmp_path_factory.mktemp("model") / request.param, kind, tied)


def single_device() -> Layout:
    return build_layout(MeshConfig(), jax.devices()[:1])


def load(model_dir: Path, layout: Layout | None = None):
    graphdef, _ = declare_qwen(load_qwen_config(model_dir))
    return graphdef, load_params(model_dir, layout or single_device())


def positions_like(ids: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


@partial(jax.jit, static_argnums=0)
def our_logits(graphdef, params, ids: jax.Array, positions: Any = None, spans: Any = None) -> jax.Array:
    model = nnx.merge(graphdef, params)
    positions = positions_like(ids) if positions is None else positions
    packed = {} if spans is None else {"seen": spans, "attend": attend_by_xla}
    return model.logits(model.hidden(ids, positions, **packed))


def random_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def torch_logits(model_dir: Path, ids: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def test_logits_equal_transformers(model_dir: Path) -> None:
    ids = random_ids(3, 40)
    expected = torch_logits(model_dir, ids)
    assert 3 < np.abs(expected).max() < 100, "the checkpoint must make logits large enough to matter"
    np.testing.assert_allclose(our_logits(*load(model_dir), jnp.asarray(ids)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("broken", ["bias", "norm", "rope"])
def test_a_broken_part_is_seen(model_dir: Path, broken: str) -> None:
    """The negative twin: dropping a bias, a norm scale or the positions moves logits far beyond the tolerance."""
    ids = random_ids(3, 40)
    graphdef, params = load(model_dir)
    attention = params["blocks"]["attention"]
    name = "q_bias" if "q_bias" in attention else "q_norm"
    if broken == "bias":
        attention[name] = attention[name] * 0
    elif broken == "norm":
        params["blocks"]["mlp_norm"] = jnp.ones_like(params["blocks"]["mlp_norm"])
    positions = positions_like(jnp.asarray(ids)) * (0 if broken == "rope" else 1)
    logits = our_logits(graphdef, params, jnp.asarray(ids), positions)
    assert np.abs(np.asarray(logits) - torch_logits(model_dir, ids)).max() > 1e-2


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_logits_do_not_depend_on_the_mesh(model_dir: Path, sizes: tuple[int, int, int]) -> None:
    ids = jnp.asarray(random_ids(8, 24))
    layout = build_layout(MeshConfig(*sizes))
    graphdef, params = load(model_dir, layout)
    with use_layout(layout):
        sharded = our_logits(graphdef, params, ids)
    np.testing.assert_allclose(np.asarray(sharded), our_logits(*load(model_dir), ids), atol=2e-5)


# --- packed rows --------------------------------------------------------------------------------------------

# Two pairs of (prompt, chosen, rejected) tokens in a row of 40, then 6 of padding.
SIZES = ((5, 7, 4), (6, 3, 9))


def pack(ids: np.ndarray, mistake: str = "") -> tuple[jax.Array, KeySpans, list[tuple[np.ndarray, np.ndarray]]]:
    """Positions and spans of the row `ids`, and of each sequence its ids and where they stand."""
    length = len(ids)
    positions, spans = np.zeros(length, np.int32), KeySpans(*(np.arange(length, dtype=np.int32) for _ in range(3)))
    sequences, start = [], 0
    for prompt, *completions in SIZES:
        stop = own = start + prompt
        positions[start:stop], spans.own_start[start:stop] = np.arange(prompt), start
        for size in completions:
            first = prompt + (own - stop if mistake == "positions" else 0)
            positions[own : own + size] = np.arange(first, first + size)
            spans.own_start[own : own + size] = stop if mistake == "sides" else own
            places = np.r_[start:stop, own : own + size]
            sequences.append((ids[places], places))
            own += size
        spans.prompt_start[start:own] = 0 if mistake == "pairs" else start
        spans.prompt_stop[start:own] = stop
        start = own
    return jnp.asarray(positions)[None], jax.tree.map(lambda x: jnp.asarray(x)[None], spans), sequences


@pytest.mark.parametrize("mistake", ["", "positions", "sides", "pairs"])
def test_packed_rows_equal_sequences_that_are_alone(model_dir: Path, mistake: str) -> None:
    """Negative twins: positions that go on behind the chosen side, sides and pairs that see what is before them."""
    ids = random_ids(1, 40)[0]
    graphdef, params = load(model_dir)
    positions, spans, sequences = pack(ids, mistake)
    packed = np.asarray(our_logits(graphdef, params, jnp.asarray(ids)[None], positions, spans))[0]
    errors = [np.abs(packed[places] - torch_logits(model_dir, alone[None])[0]).max() for alone, places in sequences]
    assert max(errors) < 1e-4 if not mistake else max(errors) > 1e-2


# --- gradients ----------------------------------------------------------------------------------------------


def next_token_loss(graphdef, params: Any, grads: Any, ids: jax.Array, remat: str) -> jax.Array:
    """Mean NLL of what comes next; the gradients go to `grads`, if there are any."""
    model = nnx.merge(graphdef, params)
    rows, length = ids.shape
    sources = jnp.broadcast_to(jnp.arange(length - 1), (rows, length - 1))
    hidden = model.hidden(ids, positions_like(ids), remat=remat, grads=grads)
    lists = sources, ids[:, 1:], jnp.asarray(length - 1)
    return -token_logps(hidden, model.output_table, *lists, model.output_grads(grads)).mean()


@partial(jax.jit, static_argnums=(0, 4))
def gradients(graphdef, params: Any, grads: Any, ids: jax.Array, remat: str) -> Any:
    """Of the parameters, added to `grads` if there are any."""
    return jax.grad(next_token_loss, 1 if grads is None else 2)(graphdef, params, grads, ids, remat)


def assert_close(seen: Any, expected: Any) -> None:
    for a, b in zip(*map(jax.tree.leaves, (seen, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def torch_gradients(model_dir: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    batch = torch.from_numpy(ids)
    model(batch, labels=batch).loss.backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("remat", REMAT)
def test_gradients_equal_transformers(model_dir: Path, remat: str) -> None:
    """Of the embedding, of the last norm and of one product of every layer, for every choice of what is kept."""
    ids = random_ids(2, 16)
    graphdef, params = load(model_dir)
    grads = gradients(graphdef, params, None, jnp.asarray(ids), remat)
    expected = torch_gradients(model_dir, ids)
    pad = load_qwen_config(model_dir).pad_token_id
    trained = np.arange(VOCAB) != pad
    ours = {"model.embed_tokens.weight": grads["embed"], "model.norm.weight": grads["norm"]}
    ours |= {f"model.layers.{i}.mlp.up_proj.weight": up.T for i, up in enumerate(grads["blocks"]["mlp"]["up"])}
    for name, seen in ours.items():
        rows = trained if "embed" in name else slice(None)
        seen, wanted = np.asarray(seen)[rows], expected[name][rows]
        np.testing.assert_allclose(seen, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_gradients_so_far_grow_by_those_of_the_model(model_dir: Path) -> None:
    """Every parameter's gradient goes to its sum once; a tied table has two uses and is counted once."""
    ids = jnp.asarray(random_ids(2, 16))
    graphdef, params = load(model_dir)
    own = gradients(graphdef, params, None, ids, "layer")
    so_far = jax.tree.map(lambda p: jnp.full_like(p, 0.25), params)
    assert_close(gradients(graphdef, params, so_far, ids, "layer"), jax.tree.map(jnp.add, so_far, own))


def test_a_tied_table_whose_sum_is_counted_twice_is_seen(tmp_path: Path) -> None:
    """The negative twin: both uses of the table start from the sum so far."""
    ids = jnp.asarray(random_ids(2, 16))
    graphdef, params = load(build_tiny_model(tmp_path / "tied", "qwen2", tied=True))
    so_far = jax.tree.map(lambda p: jnp.full_like(p, 0.25), params)
    right = gradients(graphdef, params, so_far, ids, "none")
    with patch("drift_jax.models.qwen.from_zero", lambda grads: grads):
        wrong = jax.jit(jax.grad(next_token_loss, 2), static_argnums=(0, 4))(graphdef, params, so_far, ids, "none")
    np.testing.assert_allclose(wrong["embed"] - right["embed"], 0.25, atol=1e-5)


@pytest.mark.mesh
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_gradients_do_not_depend_on_the_mesh(model_dir: Path, sizes: tuple[int, int, int]) -> None:
    ids = jnp.asarray(random_ids(8, 16))
    graphdef, params = load(model_dir)
    expected = gradients(graphdef, params, None, ids, "layer")
    layout = build_layout(MeshConfig(*sizes))
    _, split = load(model_dir, layout)
    with use_layout(layout):
        grads = gradients(graphdef, split, jax.tree.map(jnp.zeros_like, split), ids, "layer")
    assert_close(jax.device_get(grads), expected)


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_token_logps_equal_log_softmax_for_every_tile(model_dir: Path, chunk: int) -> None:
    ids = jnp.asarray(random_ids(2, 17))
    graphdef, params = load(model_dir)
    model = nnx.merge(graphdef, params)
    hidden = model.hidden(ids, positions_like(ids))
    expected = torch.log_softmax(torch.from_numpy(torch_logits(model_dir, np.asarray(ids))).double(), -1)
    expected = expected[:, :-1].gather(-1, torch.from_numpy(np.asarray(ids))[:, 1:, None])[..., 0]
    lists = positions_like(ids[:, 1:]), ids[:, 1:], jnp.asarray(16)
    np.testing.assert_allclose(
        token_logps(hidden, model.output_table, *lists, tile=Tile(chunk, 3 * chunk)), expected, atol=2e-5
    )


# --- dtypes ------------------------------------------------------------------------------------


def test_bfloat16_compute_stays_near_float32(model_dir: Path) -> None:
    ids = jnp.asarray(random_ids(2, 16))
    graphdef, params = load(model_dir)
    half, _ = declare_qwen(load_qwen_config(model_dir), dtype=jnp.bfloat16)
    exact, rough = our_logits(graphdef, params, ids), our_logits(half, params, ids)
    assert rough.dtype == jnp.float32
    error = np.abs(np.asarray(exact - rough)).max()
    assert 0 < error < 0.1 * np.abs(exact).max()
