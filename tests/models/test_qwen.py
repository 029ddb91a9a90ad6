"""Our Qwen against transformers' on the same files, and on several meshes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from drift_jax.config import MeshConfig
from drift_jax.models.hf import load_params, load_qwen_config
from drift_jax.models.logps import token_logps
from drift_jax.models.qwen import declare_qwen
from drift_jax.sharding import build_mesh
from tests.tiny_models import VOCAB, build_tiny_model

KINDS = {"qwen2": ("qwen2", False), "qwen2-tied": ("qwen2", True), "qwen3": ("qwen3", False)}


@pytest.fixture(scope="module", params=KINDS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, tied = KINDS[request.param]
    return build_tiny_model(tmp_path_factory.mktemp("model") / request.param, kind, tied)


def single_mesh() -> jax.sharding.Mesh:
    return build_mesh(MeshConfig(), jax.devices()[:1])


def load(model_dir: Path, mesh: jax.sharding.Mesh | None = None):
    graphdef, _ = declare_qwen(load_qwen_config(model_dir))
    return graphdef, load_params(model_dir, mesh or single_mesh())


def positions_like(ids: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


def our_logits(graphdef, params, ids: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model.logits(model.hidden(ids, positions_like(ids)))


def random_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def torch_logits(model_dir: Path, ids: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


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
    model = nnx.merge(graphdef, params)
    positions = positions_like(jnp.asarray(ids)) * (0 if broken == "rope" else 1)
    logits = model.logits(model.hidden(jnp.asarray(ids), positions))
    assert np.abs(np.asarray(logits) - torch_logits(model_dir, ids)).max() > 1e-2


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_logits_do_not_depend_on_the_mesh(model_dir: Path, sizes: tuple[int, int, int]) -> None:
    ids = jnp.asarray(random_ids(8, 24))
    mesh = build_mesh(MeshConfig(*sizes))
    graphdef, params = load(model_dir, mesh)
    with jax.set_mesh(mesh):
        sharded = jax.jit(our_logits, static_argnums=0)(graphdef, params, ids)
    np.testing.assert_allclose(np.asarray(sharded), our_logits(*load(model_dir), ids), atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "layer"])
def test_remat_changes_no_gradient(model_dir: Path, remat: str) -> None:
    ids = jnp.asarray(random_ids(2, 16))
    graphdef, params = load(model_dir)

    def loss(params, remat):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(ids[:, :-1], positions_like(ids[:, :-1]), remat)
        return -token_logps(hidden, model.output_table, ids[:, 1:]).mean()

    grads, plain = (jax.jit(jax.grad(loss), static_argnums=1)(params, r) for r in (remat, "none"))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_token_logps_equal_log_softmax_for_every_chunk(model_dir: Path, chunk: int) -> None:
    ids = jnp.asarray(random_ids(2, 17))
    graphdef, params = load(model_dir)
    model = nnx.merge(graphdef, params)
    hidden = model.hidden(ids[:, :-1], positions_like(ids[:, :-1]))
    expected = torch.log_softmax(torch.from_numpy(torch_logits(model_dir, np.asarray(ids))).double(), -1)
    expected = expected[:, :-1].gather(-1, torch.from_numpy(np.asarray(ids))[:, 1:, None])[..., 0]
    np.testing.assert_allclose(token_logps(hidden, model.output_table, ids[:, 1:], chunk), expected, atol=2e-5)


def test_decode_with_a_cache_equals_the_whole_forward(model_dir: Path) -> None:
    """Prompts of 5 and 9 tokens, right-padded to 9; then three more tokens through the cache."""
    ids, lengths, new = jnp.asarray(random_ids(2, 12)), jnp.asarray([5, 9]), 3
    graphdef, params = load(model_dir)
    model = nnx.merge(graphdef, params)
    hidden, cache = model.prefill(ids[:, :9], 9 + new)
    for step in range(new):
        tokens = ids[jnp.arange(2), lengths + step]
        slots = jnp.arange(9 + new)
        mask = (slots < lengths[:, None]) | ((slots >= 9) & (slots <= 9 + step))
        hidden, cache = model.decode(tokens, lengths + step, cache, jnp.asarray(9 + step), mask)
        whole = our_logits(graphdef, params, ids)[jnp.arange(2), lengths + step]
        np.testing.assert_allclose(model.logits(hidden), whole, atol=1e-4)


def test_bfloat16_compute_stays_near_float32(model_dir: Path) -> None:
    ids = jnp.asarray(random_ids(2, 16))
    graphdef, params = load(model_dir)
    half, _ = declare_qwen(load_qwen_config(model_dir), dtype=jnp.bfloat16)
    exact, rough = our_logits(graphdef, params, ids), our_logits(half, params, ids)
    assert rough.dtype == jnp.float32
    error = np.abs(np.asarray(exact - rough)).max()
    assert 0 < error < 0.1 * np.abs(exact).max()
