"""Qwen2, Qwen2.5 and Qwen3 (dense) in Flax NNX.

Every parameter is declared once, with its logical dims and its Hugging Face name and layout: abstract value,
sharding, initialisation, import and export derive from that line. The parameters of all layers are stacked on a
leading `layers` dim and scanned, so compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast, final

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from drift_jax.models.architecture import QwenConfig
from drift_jax.models.attention import attend
from drift_jax.models.linear import add_bias, linear
from drift_jax.models.norms import rms_norm
from drift_jax.models.stack import apply_layers, from_zero, look_up, track
from drift_jax.sharding import Dims, Layout, build_sharding, constrain

# How a dim of a Hugging Face tensor is made of ours: nn.Linear stores [out, in], with heads and head_dim merged.
HfDims = tuple[tuple[str, ...], ...]

# Attention over packed rows: (query, key, value, which keys each query sees) -> mixed values.
Attend = Callable[..., Float[Array, "B T N H"]]


def _weight(
    rngs: nnx.Rngs, dims: Dims, shape: tuple[int, ...], hf_name: str, hf_dims: HfDims, std: float | None
) -> nnx.Param:
    """Declares a parameter. `std` None means ones (a norm's scale)."""
    value = jnp.ones(shape) if std is None else std * jax.random.normal(rngs.params(), shape)
    return nnx.Param(value, dims=dims, hf_name=hf_name, hf_dims=hf_dims)


class Rope(NamedTuple):
    """Rotary tables, the same for every layer and head."""

    cos: Float[Array, "B T H"]
    sin: Float[Array, "B T H"]


def build_rope(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Rope:
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotary position embedding on the two halves of H (the layout of transformers, not the interleaved one)."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (table[:, :, None].astype(x.dtype) for table in rope)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


@final
class Attention(nnx.Module):
    def __init__(self, config: QwenConfig, rngs: nnx.Rngs) -> None:
        c, layers = config, config.layers
        self.eps = c.norm_eps
        for name, dim, count in (
            ("q", "heads", c.heads),
            ("k", "kv_heads", c.kv_heads),
            ("v", "kv_heads", c.kv_heads),
        ):
            hf = f"model.layers.{{}}.self_attn.{name}_proj"
            kernel = _weight(
                rngs,
                ("layers", "embed", dim, "head_dim"),
                (layers, c.embed, count, c.head_dim),
                f"{hf}.weight",
                ((dim, "head_dim"), ("embed",)),
                0.02,
            )
            setattr(self, name, kernel)
            if c.qkv_bias:
                dims = ("layers", dim, "head_dim")
                shape = (layers, count, c.head_dim)
                setattr(self, f"{name}_bias", _weight(rngs, dims, shape, f"{hf}.bias", ((dim, "head_dim"),), 0.02))
            if c.qk_norm and name in "qk":
                hf_norm = f"model.layers.{{}}.self_attn.{name}_norm.weight"
                scale = _weight(rngs, ("layers", "head_dim"), (layers, c.head_dim), hf_norm, (("head_dim",),), None)
                setattr(self, f"{name}_norm", scale)
        self.o = _weight(
            rngs,
            ("layers", "embed", "heads", "head_dim"),
            (layers, c.embed, c.heads, c.head_dim),
            "model.layers.{}.self_attn.o_proj.weight",
            (("embed",), ("heads", "head_dim")),
            0.02,
        )

    def project(self, x: Float[Array, "B T D"], name: str, heads_dim: str) -> Float[Array, "B T N H"]:
        """Queries, keys or values before the rotation, with whatever bias or norm this model has."""
        y = linear("btd,dnh->btnh", x, getattr(self, name)[...].astype(x.dtype))
        bias = getattr(self, f"{name}_bias", None)
        if bias is not None:
            y = add_bias(y, bias[...])
        norm = getattr(self, f"{name}_norm", None)
        if norm is not None:
            y = rms_norm(y, norm[...], self.eps)
        return constrain(y, "batch", "length", heads_dim, "head_dim")

    def project_all(
        self, x: Float[Array, "B T D"], rope: Rope
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        query = rotate(self.project(x, "q", "heads"), rope)
        key = rotate(self.project(x, "k", "kv_heads"), rope)
        return query, key, self.project(x, "v", "kv_heads")

    def output(self, mixed: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        # jnp.einsum sums over dims in the order of their letters: with n for heads, mixed values were turned round.
        return linear("btgh,dgh->btd", mixed, self.o[...].astype(mixed.dtype))


@final
class Mlp(nnx.Module):
    def __init__(self, config: QwenConfig, rngs: nnx.Rngs) -> None:
        c, hf = config, "model.layers.{}.mlp"
        # `down` too has `mlp` last: a chip's short slice of `embed` would be padded there, and copied to be rid of it.
        dims = ("layers", "embed", "mlp")
        shape = (c.layers, c.embed, c.mlp)
        self.gate = _weight(rngs, dims, shape, f"{hf}.gate_proj.weight", (("mlp",), ("embed",)), 0.02)
        self.up = _weight(rngs, dims, shape, f"{hf}.up_proj.weight", (("mlp",), ("embed",)), 0.02)
        self.down = _weight(rngs, dims, shape, f"{hf}.down_proj.weight", (("embed",), ("mlp",)), 0.02)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up, down = (weight[...].astype(x.dtype) for weight in (self.gate, self.up, self.down))
        wide = jax.nn.silu(linear("btd,df->btf", x, gate)) * linear("btd,df->btf", x, up)
        return linear("btf,df->btd", constrain(wide, "batch", "length", "mlp"), down)


@final
class Block(nnx.Module):
    """One decoder layer; as a member of `Qwen` its parameters hold all layers, stacked."""

    def __init__(self, config: QwenConfig, rngs: nnx.Rngs) -> None:
        self.eps = config.norm_eps
        hf, dims, shape = "model.layers.{}", ("layers", "embed"), (config.layers, config.embed)
        self.attention_norm = _weight(rngs, dims, shape, f"{hf}.input_layernorm.weight", (("embed",),), None)
        self.attention = Attention(config, rngs)
        self.mlp_norm = _weight(rngs, dims, shape, f"{hf}.post_attention_layernorm.weight", (("embed",),), None)
        self.mlp = Mlp(config, rngs)

    def finish(self, x: Float[Array, "B T D"], mixed: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        x = x + self.attention.output(mixed)
        x = x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps))
        return constrain(x, "batch", "length", "hidden")

    def __call__(
        self, x: Float[Array, "B T D"], rope: Rope, attend: Attend = attend
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
        query, key, value = self.attention.project_all(rms_norm(x, self.attention_norm[...], self.eps), rope)
        return self.finish(x, attend(query, key, value)), (key, value)


@final
class Qwen(nnx.Module):
    """The language model. `dtype` is that of activations and matmuls; parameters keep their own."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        self.dtype = dtype
        table = (config.vocab_size, config.embed)
        hf_dims = (("vocab",), ("embed",))
        self.embed = _weight(rngs, ("vocab", "embed"), table, "model.embed_tokens.weight", hf_dims, 0.02)
        self.blocks = Block(config, rngs)
        self.norm = _weight(rngs, ("embed",), (config.embed,), "model.norm.weight", (("embed",),), None)
        if not config.tied:
            self.head = _weight(rngs, ("vocab", "embed"), table, "lm_head.weight", hf_dims, 0.02)

    @property
    def output_table(self) -> Float[Array, "V D"]:
        return (self.embed if self.config.tied else self.head)[...]

    def output_grads(self, grads: dict[str, Any] | None) -> Float[Array, "V D"] | None:
        """Of gradients of all parameters those of `output_table`."""
        return None if grads is None else grads["embed" if self.config.tied else "head"]

    def hidden(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        seen: Any = None,
        *,
        attend: Attend = attend,
        remat: str = "none",
        scan: bool = True,
        grads: dict[str, Any] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of rows, after the last norm.

        Args:
          seen: which keys each query sees, handed on to `attend`; None: plain causal rows, padded on the right.
          remat: a key of `stack.REMAT`.
          scan: see `stack.apply_layers`.
          grads: None, or gradients of all parameters so far, to which theirs go (see models/stack.py).
        """
        rope = build_rope(positions, self.config.head_dim, self.config.rope_theta)
        graphdef, stacked = nnx.split(self.blocks)
        grads = grads or {"embed": None, "blocks": None, "norm": None}
        embed_grads = grads["embed"]
        if self.config.tied and embed_grads is not None:
            embed_grads = from_zero(embed_grads)  # the sum so far goes through the output table

        def layer(weights: Any, x: Array, context: tuple[Rope, Any]) -> Array:
            rope, seen = context
            over = attend if seen is None else partial(attend, seen=seen)
            return nnx.merge(graphdef, weights)(x, rope, over)[0]

        x = self._embed(ids, embed_grads)
        x: Any = apply_layers(layer, remat, nnx.to_pure_dict(stacked), grads["blocks"], x, (rope, seen), scan)
        return rms_norm(x, track(self.norm[...], grads["norm"]), self.config.norm_eps)

    def embed_tokens(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer takes."""
        return self._embed(ids)

    def finish(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """From what the last layer gives to the final hidden states."""
        return rms_norm(x, self.norm[...], self.config.norm_eps)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits. For training use `token_logps`: this one holds all of them."""
        table = self.output_table.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    def _embed(self, ids: Int[Array, "B T"], grads: Float[Array, "V D"] | None = None) -> Float[Array, "B T D"]:
        x = cast(Array, look_up(self.dtype, self.embed[...], grads, ids))
        if self.config.pad_token_id is not None and not self.config.pad_trains:
            x = jnp.where((ids == self.config.pad_token_id)[..., None], jax.lax.stop_gradient(x), x)
        return constrain(x, "batch", "length", "hidden")


class Declared(NamedTuple):
    """A parameter as declared: everything that placement, import and export need."""

    shape: tuple[int, ...]
    dims: Dims
    hf_name: str
    hf_dims: HfDims


def is_declared(node: Any) -> bool:
    """`is_leaf` for trees of `Declared`, which is itself a tuple."""
    return isinstance(node, Declared)


def declare_qwen(config: QwenConfig, dtype: DTypeLike = jnp.float32) -> tuple[Any, dict[str, Any]]:
    """(graphdef, nested dict of `Declared`): the model without any memory behind it.

    `nnx.merge(graphdef, params)` with a dict of arrays of the same structure is a working model that computes in
    `dtype`. Every call with the same sizes gives the same objects, which are not to be changed.
    """
    return _declare(config, jnp.dtype(dtype))


@lru_cache(maxsize=8)
def _declare(config: QwenConfig, dtype: Any) -> tuple[Any, dict[str, Any]]:
    model = nnx.eval_shape(lambda: Qwen(config, rngs=nnx.Rngs(0), dtype=dtype))
    graphdef, state = nnx.split(model)
    declared = jax.tree.map(
        lambda p: Declared(tuple(p.shape), p.dims, p.hf_name, p.hf_dims),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return graphdef, nnx.to_pure_dict(declared)


def param_shardings(declared: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The placement of every parameter. Raises `ConfigError` for a mesh that does not divide a dim."""
    return jax.tree.map(
        lambda p: build_sharding(layout, p.dims, p.shape, name=p.hf_name),
        declared,
        is_leaf=is_declared,
    )


def abstract_params(declared: dict[str, Any], layout: Layout, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Parameters as `jax.ShapeDtypeStruct`s with their placement: what a checkpoint is restored to."""
    return jax.tree.map(
        lambda p, sharding: jax.ShapeDtypeStruct(p.shape, dtype, sharding=sharding),
        declared,
        param_shardings(declared, layout),
        is_leaf=is_declared,
    )


def init_params(config: QwenConfig, seed: int, layout: Layout) -> dict[str, Any]:
    """Random float32 parameters, made where they will live."""
    _, declared = declare_qwen(config)

    def make() -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(Qwen(config, rngs=nnx.Rngs(seed))))

    return jax.jit(make, out_shardings=param_shardings(declared, layout))()
