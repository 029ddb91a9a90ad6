"""Optimizers, schedules and clipping against torch and transformers, step by step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from drift_jax.config import TrainConfig
from drift_jax.errors import ConfigError, DataError
from drift_jax.optim import (
    apply_gradients,
    build_optimizer,
    build_schedule,
    clip_by_global_norm,
    decay_mask,
    describe_optimizer,
    global_norm,
    total_steps,
    warmup_steps,
)

STEPS = 200
SHAPES = {"embed": (40, 8), "mlp_kernel": (8, 16), "mlp_bias": (16,), "final_norm": (8,)}


def config(**changes: Any) -> TrainConfig:
    return dataclasses.replace(TrainConfig(), **changes)


def weights() -> dict[str, np.ndarray]:
    """Weights away from 0, so that a relative error means something for each of them."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.choice([-1, 1], shape) * rng.uniform(0.01, 0.05, shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def gradients(scale: float) -> list[dict[str, np.ndarray]]:
    """Random gradients whose global norm is at times below 1 and at times above."""
    rng = np.random.default_rng(1)
    size = scale * rng.lognormal(0, 1, STEPS)
    return [{name: (s * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()} for s in size]


def hf_schedule(cfg: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    # The Trainer's own method, which reads one field: a share below 1 or a number of updates.
    arguments = SimpleNamespace(warmup_steps=cfg.warmup_steps or cfg.warmup_ratio)
    warmup = transformers.TrainingArguments.get_warmup_steps(arguments, steps) if cfg.warmup_ratio < 1 else steps
    if cfg.schedule == "constant":
        return transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    build = {
        "linear": transformers.get_linear_schedule_with_warmup,
        "cosine": transformers.get_cosine_schedule_with_warmup,
    }[cfg.schedule]
    return build(optimizer, warmup, steps)


def torch_run(
    cfg: TrainConfig,
    grads: list[dict[str, np.ndarray]],
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
    start: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Runs torch in `dtype`; after each step the weights are rounded to `stored`."""
    start = weights() if start is None else start
    params = {name: torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for name, w in start.items()}
    plain = [p for name, p in params.items() if "bias" in name or "norm" in name]
    decayed = [p for name, p in params.items() if "bias" not in name and "norm" not in name]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if cfg.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop(groups, lr=cfg.learning_rate, alpha=cfg.rmsprop_decay, eps=cfg.rmsprop_epsilon)
    else:
        betas = (cfg.adam_beta1, cfg.adam_beta2)
        optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.adam_epsilon)
    scheduler = hf_schedule(cfg, optimizer, STEPS)
    for grad in grads:
        for name, param in params.items():
            param.grad = torch.tensor(grad[name], dtype=dtype)
        torch.nn.utils.clip_grad_norm_(params.values(), cfg.max_grad_norm)
        optimizer.step()
        scheduler.step()
        for param in params.values():
            param.data = param.data.to(stored or dtype).to(dtype)
    return {name: param.detach().numpy().astype(np.float64) for name, param in params.items()}


def our_run(
    optimizer: optax.GradientTransformation,
    grads: list[dict[str, np.ndarray]],
    dtype: str,
    clip: Callable[[Any, float], tuple[Any, Any]] = clip_by_global_norm,
    max_norm: float = 1.0,
) -> dict[str, np.ndarray]:
    @jax.jit
    def step(params, state, grad):
        updates, state = optimizer.update(clip(grad, max_norm)[0], state, params)
        return optax.apply_updates(params, updates), state

    params = {name: jnp.asarray(w, dtype) for name, w in weights().items()}
    state = optimizer.init(params)
    for grad in grads:
        params, state = step(params, state, {name: jnp.asarray(g, dtype) for name, g in grad.items()})
    return {name: np.asarray(param, np.float64) for name, param in params.items()}


def parameter_error(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The worst relative difference over all parameters."""
    return max(float(np.max(np.abs(ours[k] / theirs[k] - 1))) for k in theirs)


def movement_error(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The worst difference, relative to the farthest that any weight moved: large weights cannot hide it."""
    moved = max(np.max(np.abs(theirs[k] - w)) for k, w in weights().items())
    return max(float(np.max(np.abs(ours[k] - theirs[k]))) for k in theirs) / moved


CASES = [
    config(optimizer=optimizer, schedule=schedule, weight_decay=decay, learning_rate=rate, warmup_ratio=0.1)
    for optimizer, rate in (("rmsprop", 1e-6), ("adamw", 1e-5))
    for schedule, decay in (("linear", 0.0), ("cosine", 0.1), ("constant", 0.1))
]


@pytest.mark.parametrize("cfg", CASES, ids=lambda c: f"{c.optimizer}-{c.schedule}-{c.weight_decay}")
def test_200_steps_equal_torch(cfg: TrainConfig) -> None:
    """In float64 the weights move as torch's do; in float32 they are within 1e-6 relative."""
    grads = gradients(0.05)
    theirs = torch_run(cfg, grads, torch.float64)
    assert parameter_error(weights(), theirs) > 1e-3, "the weights must move for this test to mean anything"
    with jax.enable_x64(True):
        ours = our_run(build_optimizer(cfg, STEPS), grads, "float64")
    assert movement_error(ours, theirs) < 1e-11

    ours = our_run(build_optimizer(cfg, STEPS), grads, "float32")
    # 200 roundings of a float32 weight are themselves 1e-6, so the judge stores float32 weights too.
    assert parameter_error(ours, torch_run(cfg, grads, torch.float64, stored=torch.float32)) < 1e-6
    in_float32 = torch_run(cfg, grads, torch.float32)
    if cfg.optimizer == "adamw" and cfg.weight_decay:
        # torch rounds the factor 1 - lr * decay to float32: it is farther from its own float64 than we are.
        assert parameter_error(ours, theirs) < parameter_error(in_float32, theirs) / 2
    else:
        assert parameter_error(ours, in_float32) < 1e-6


def test_200_steps_at_the_gradient_size_of_a_7b_model() -> None:
    """Gradients of 1e-5 per element, where sqrt(v) is far above epsilon but v is far below it."""
    grads = gradients(1e-5)
    for cfg in (config(learning_rate=1e-5), config(learning_rate=1e-5, optimizer="adamw")):
        theirs = torch_run(cfg, grads, torch.float64)
        with jax.enable_x64(True):
            assert movement_error(our_run(build_optimizer(cfg, STEPS), grads, "float64"), theirs) < 1e-11


def twin(scale: optax.GradientTransformation, cfg: TrainConfig) -> optax.GradientTransformation:
    return optax.chain(scale, optax.scale_by_learning_rate(build_schedule(cfg, STEPS)))


def test_optax_defaults_are_not_torch() -> None:
    """Negative twins: each departure named in optim.py moves the weights visibly."""
    cfg = config(learning_rate=1e-5)
    grads = gradients(1e-5)
    theirs = torch_run(cfg, grads, torch.float64)
    twins = {
        "defaults": optax.scale_by_rms(),
        "epsilon inside": optax.scale_by_rms(0.99, 1e-8),
        "decay 0.9": optax.scale_by_rms(0.9, 1e-8, eps_in_sqrt=False),
        "v0 = 1": optax.scale_by_rms(0.99, 1e-8, initial_scale=1.0, eps_in_sqrt=False),
        "bias correction": optax.scale_by_rms(0.99, 1e-8, eps_in_sqrt=False, bias_correction=True),
    }
    with jax.enable_x64(True):
        errors = {name: movement_error(our_run(twin(s, cfg), grads, "float64"), theirs) for name, s in twins.items()}
    assert min(errors.values()) > 0.05, errors


def test_optax_adam_loses_digits_that_ours_keeps() -> None:
    cfg = config(optimizer="adamw", schedule="constant", warmup_ratio=0.0, learning_rate=1.0)
    grad = {"w": jnp.full((3,), 1e-3)}
    zero = {"w": jnp.zeros((3,))}

    def first_update(optimizer: optax.GradientTransformation) -> float:
        return float(optimizer.update(grad, optimizer.init(zero), zero)[0]["w"][0])

    exact = -1e-3 / (1e-3 + 1e-8)
    assert first_update(build_optimizer(cfg, 10)) == pytest.approx(exact, rel=3e-7)
    assert abs(first_update(optax.adamw(1.0, weight_decay=0.0)) / exact - 1) > 3e-6


def test_weight_decay_is_coupled_in_rmsprop_and_not_in_adamw() -> None:
    """With no gradient RMSprop normalises the decay like a gradient, AdamW shrinks in proportion."""
    params = {"small": jnp.array(0.01), "large": jnp.array(1.0), "bias": jnp.array(1.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = {}
    for name in ("rmsprop", "adamw"):
        cfg = config(optimizer=name, weight_decay=0.1, schedule="constant", warmup_ratio=0.0, learning_rate=0.5)
        optimizer = build_optimizer(cfg, 10)
        updates[name] = jax.tree.map(float, optimizer.update(zeros, optimizer.init(params), params)[0])
    assert updates["rmsprop"] == pytest.approx({"small": -5.0, "large": -5.0, "bias": 0.0}, rel=1e-4)
    assert updates["adamw"] == pytest.approx({"small": -0.0005, "large": -0.05, "bias": 0.0}, rel=1e-6)


def test_clipping_is_torchs() -> None:
    for grad in (gradients(0.05)[0], gradients(5.0)[0], gradients(1e-9)[0]):
        tensors = {name: torch.nn.Parameter(torch.tensor(g, dtype=torch.float64)) for name, g in grad.items()}
        for tensor in tensors.values():
            tensor.grad = tensor.detach().clone()
        wanted_norm = float(torch.nn.utils.clip_grad_norm_(tensors.values(), 0.7))
        clipped, norm = clip_by_global_norm(jax.tree.map(jnp.asarray, grad), 0.7)
        assert float(norm) == pytest.approx(wanted_norm, rel=1e-6)
        for name, tensor in tensors.items():
            np.testing.assert_allclose(clipped[name], tensor.grad, rtol=1e-6)


def test_optax_clipping_is_not_torchs() -> None:
    """At max_norm 1e-5 torch's 1e-6 is a tenth: the coefficient is 1/1.1, optax's is 1."""
    grad = {"w": jnp.array([1e-5, 0.0])}
    ours, _ = clip_by_global_norm(grad, 1e-5)
    assert float(ours["w"][0]) == pytest.approx(1e-5 / 1.1, rel=1e-6)
    theirs, _ = optax.clip_by_global_norm(1e-5).update(grad, optax.EmptyState())
    assert float(theirs["w"][0]) == pytest.approx(1e-5, rel=1e-6)


def test_global_norm_accumulates_in_float32() -> None:
    grads = {"a": jnp.full((300, 300), 0.01, jnp.bfloat16), "b": jnp.full((7,), 2.0)}
    wanted = math.sqrt(90_000 * float(jnp.bfloat16(0.01)) ** 2 + 28)
    norm = global_norm(grads)
    assert norm.dtype == jnp.float32
    assert float(norm) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 1000])
@pytest.mark.parametrize("ratio, warmup", [(0.0, None), (0.1, None), (0.07, None), (1.0, None), (0.1, 1), (0.1, 20)])
def test_schedules_are_those_of_transformers(schedule: str, steps: int, ratio: float, warmup: int | None) -> None:
    """Every update's rate in float32 is within 1e-6 relative of transformers in float64."""
    cfg = config(schedule=schedule, warmup_ratio=ratio, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.learning_rate)
    scheduler = hf_schedule(cfg, optimizer, steps)
    wanted = [cfg.learning_rate * scheduler.lr_lambdas[0](k) for k in range(steps)]
    ours = jax.vmap(build_schedule(cfg, steps))(jnp.arange(steps))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=0)
    assert (float(ours[0]) == 0.0) == (ratio > 0)


def test_optax_schedules_lose_digits_near_the_end() -> None:
    """Why the schedules are our own: the last update of 1000, linear to 0."""
    theirs = float(optax.linear_schedule(5e-7, 0.0, 1000)(999))
    ours = float(build_schedule(config(warmup_ratio=0.0), 1000)(999))
    assert ours == pytest.approx(5e-10, rel=1e-6)
    assert abs(theirs / 5e-10 - 1) > 1e-5


def test_warmup_steps_round_like_the_trainer() -> None:
    for ratio in (0.1, 0.07, 0.03):
        # The Trainer's own method, which reads one field; building its arguments would need accelerate.
        arguments = SimpleNamespace(warmup_steps=ratio)
        for steps in range(1, 400):
            wanted = transformers.TrainingArguments.get_warmup_steps(arguments, steps)
            assert warmup_steps(config(warmup_ratio=ratio), steps) == wanted
    for number in (1, 5, 300):
        wanted = transformers.TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=number), 100)
        assert warmup_steps(config(warmup_ratio=0.5, warmup_steps=number), 100) == wanted == number
    assert warmup_steps(config(warmup_ratio=0.07), 100) == 8, "float rounding, kept because the Trainer has it"


def test_total_steps() -> None:
    assert total_steps(491, 32, 3) == 48
    assert total_steps(1, 32, 1) == 1
    assert total_steps(64, 32, 1) == 2
    assert total_steps(64, 32, 1, max_steps=5) == 5
    with pytest.raises(DataError, match="at least one pair, found 0"):
        total_steps(0, 32, 1)


def trainer_steps(pairs: int, epochs: float, limit: int | None) -> int:
    """The updates that transformers' own method counts, in batches of 32."""
    arguments = SimpleNamespace(max_steps=limit or -1, num_train_epochs=epochs, gradient_accumulation_steps=1)
    trainer = SimpleNamespace(
        get_total_train_batch_size=lambda _: 32, get_sp_size=lambda: 1, num_examples=lambda _: pairs
    )
    batches = [None] * math.ceil(pairs / 32)
    return transformers.Trainer.set_initial_training_values(trainer, arguments, batches)[-1]


def test_fractional_epochs_end_where_the_trainer_ends() -> None:
    for pairs in (1, 31, 64, 3200, 491, 10_632):
        for epochs in (0.001, 0.07, 0.5, 1, 1.1, 1.5, 2.9999, 3):
            for limit in (None, 7):
                assert total_steps(pairs, 32, epochs, limit) == trainer_steps(pairs, epochs, limit)
    assert total_steps(3200, 32, 0.07) == 8, "float rounding, kept because the Trainer has it"


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_decay_mask_excludes_what_transformers_excludes(model_type: str) -> None:
    from transformers.trainer import Trainer

    sizes = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model_config = transformers.AutoConfig.for_model(model_type, vocab_size=32, head_dim=8, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config)
    wanted = set(Trainer.get_decay_parameter_names(None, model))
    names = [name for name, _ in model.named_parameters()]
    mask = decay_mask({name: np.zeros(1, np.float32) for name in names})
    assert {name for name, decays in mask.items() if decays} == wanted & set(names)
    assert 0 < sum(mask.values()) < len(names)


def test_decay_mask_reads_the_whole_path_of_any_pytree() -> None:
    params = {"layers": [{"q_norm": {"scale": 1.0}, "q": {"kernel": 1.0, "bias": 1.0}}], "head": (1.0,)}
    assert decay_mask(params) == {
        "layers": [{"q_norm": {"scale": False}, "q": {"kernel": True, "bias": False}}],
        "head": (True,),
    }


def test_a_mask_of_the_callers_own_is_used() -> None:
    cfg = config(optimizer="adamw", weight_decay=0.1, schedule="constant", warmup_ratio=0.0, learning_rate=1.0)
    params = {"a": jnp.ones(()), "b": jnp.ones(())}
    for mask in ({"a": True, "b": False}, lambda tree: {name: name == "a" for name in tree}):
        optimizer = build_optimizer(cfg, 10, mask)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        assert jax.tree.map(float, updates) == pytest.approx({"a": -0.1, "b": 0.0})


@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_moments_are_float32_and_narrow_masters_are_refused(name: str) -> None:
    optimizer = build_optimizer(config(optimizer=name), 10)
    state = optimizer.init({"w": jnp.ones(3)})
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and set(floats) == {jnp.dtype("float32")}
    with pytest.raises(ConfigError, match=r"must be float32.*1 parameters.*'w'.*bfloat16.*train.master_dtype=bfloat16"):
        optimizer.init({"w": jnp.ones(3, jnp.bfloat16), "v": jnp.ones(3)})


def test_decay_rate_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.adam_beta2"):
        build_optimizer(config(optimizer="adamw", adam_beta2=1.0), 10)
    with pytest.raises(ConfigError, match="train.rmsprop_decay"):
        build_optimizer(config(rmsprop_decay=1.0), 10)
    with pytest.raises(ConfigError, match="at least 1 update, found 0"):
        build_optimizer(config(), 0)


def test_adam_without_momentum_is_finite() -> None:
    optimizer = build_optimizer(config(optimizer="adamw", adam_beta1=0.0, warmup_ratio=0.0), 10)
    params = {"w": jnp.ones(2)}
    updates, _ = optimizer.update({"w": jnp.full(2, 0.1)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -5e-7, rtol=1e-6)


def test_description_names_what_is_resolved() -> None:
    text = describe_optimizer(config(), 345)
    for part in (
        "rmsprop",
        "decay 0.99",
        "1e-08 outside the square root",
        "5e-07",
        "35 of 345",
        "linear to 0",
        "float32 weights, float32 moments, float32 gradients.",
    ):
        assert part in text
    text = describe_optimizer(config(warmup_steps=20, master_dtype="bfloat16"), 345)
    for part in (
        "over 20 of 345 updates",
        "bfloat16 weights rounded stochastically, float32 moments, float32 gradients.",
    ):
        assert part in text
    text = describe_optimizer(config(moment_dtype="bfloat16", gradient_dtype="bfloat16"), 345)
    assert "float32 weights, bfloat16 moments rounded stochastically, bfloat16 gradients." in text
    assert "over 20 updates, of which the stage has 9" in describe_optimizer(config(warmup_steps=20), 9)
    text = describe_optimizer(config(optimizer="adamw", weight_decay=0.1, schedule="constant", warmup_ratio=0.0), 9)
    for part in ("adamw", "0.9 and 0.999", "weight decay 0.1", "no warm-up", "then constant"):
        assert part in text


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_schedule_goes_on_where_an_update_is_left_out(moments: str) -> None:
    """Of a constant gradient RMSprop makes steps of rate / sqrt(1 - decay**n) after n gradients that counted."""
    cfg = config(on_nonfinite="skip", moment_dtype=moments, learning_rate=1e-2, warmup_steps=2, max_grad_norm=1e9)
    optimizer, schedule = build_optimizer(cfg, 10), build_schedule(cfg, 10)
    params = {"w": jnp.zeros(())}
    state, counted = optimizer.init(params), 0
    for k in range(10):
        bad = k in (0, 3, 4)
        grads, rate = {"w": jnp.float32(math.nan if bad else 3.0)}, schedule(k)
        done = apply_gradients(cfg, optimizer, params, state, grads, rate, jnp.int32(k))
        moved, params, state = float(done.params["w"] - params["w"]), done.params, done.opt_state
        counted += not bad
        expected = 0.0 if bad else -float(rate) / math.sqrt(1 - cfg.rmsprop_decay**counted)
        # Three digits of a bfloat16 moment, rounded at random and added up; the rates of two updates differ by 10 %.
        assert moved == pytest.approx(expected, rel=1e-4 if moments == "float32" else 0.03)
