"""What XLA's GPU compiler makes of the stack of layers: gradients that add up in place, one slice at a time.

It compiles for an H100 that is not here, in a process of its own: JAX looks for compilers when it starts.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.models.test_stack import LAYERS
from tests.plan.tiny_plan import needs_gpu_compiler, run_with_gpu_compiler

SCRIPT = """
import sys
from drift_jax.plan.slices import open_slice
device = open_slice("h100:1").devices[0]
import jax, jax.numpy as jnp
from drift_jax.models import stack
from tests.models.test_stack import layer, make_inputs, make_weights

scan, how = sys.argv[1] == "scan", sys.argv[2]
if how == "at a known index":
    stack._add_at = lambda index, total, more: total.at[index].add(
        more.astype(total.dtype), indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")
if how == "as a matrix":
    def add(index, total, more):
        so_far = jax.lax.dynamic_index_in_dim(total, index, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, so_far + more.astype(total.dtype), index, 0)
    stack._add_at = add

context = (jnp.bfloat16(0.7), make_inputs()[1][1])

def step(weights, grads, x, ends):
    def loss(grads):
        out = stack.apply_layers(layer, "dots", weights, grads, x, context, scan)
        return jnp.sum(ends * out.astype(jnp.float32))
    return jax.lax.fori_loop(0, 3, lambda _, grads: jax.grad(loss)(grads), grads)

def place(x, dtype=None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=jax.sharding.SingleDeviceSharding(device))

weights = jax.tree.map(place, jax.eval_shape(lambda: make_weights(dim=256, wide=512)))
x = place(jnp.zeros((2, 6, 256)), jnp.bfloat16)
print(jax.jit(step, donate_argnums=1).lower(weights, weights, x, place(x, jnp.float32)).compile().as_text())
"""
STACK, SLICE = r"f32\[4,(?:256,512|512,256)\]", r"f32\[1,(?:256,512|512,256)\]"


def compile_for_gpu(folder: Path, loop: str, how: str) -> list[str]:
    """The computations of the compiled program, as text."""
    script = folder / "step.py"
    script.write_text(SCRIPT)
    return run_with_gpu_compiler([script, loop, how], 300).split("\n\n")


def find_updates(computations: list[str]) -> tuple[list[str], list[str]]:
    """Kernels that add to a slice of a stack: those that go through this slice alone, and those through all of it.

    XLA writes in place where whatever else the kernel reads of the stack is a dynamic slice at the place of the update
    (CanEmitFusedDynamicUpdateSliceInPlaceForGpu); else its kernel computes every element of the stack.
    """
    sliced, whole = [], []
    for text in computations:
        root = re.search(rf"ROOT .* = {STACK}\S* dynamic-update-slice\((%\S+), %\S+, (.*?)\)", text)
        if not root or not text.startswith("%fused"):
            continue
        stack, place = root.groups()
        others = [line for line in text.splitlines() if f"({stack}" in line and "ROOT" not in line]
        same = all(f" dynamic-slice({stack}, {place})" in line for line in others)
        (sliced if same else whole).append(text)
    return sliced, whole


def find_copies(computations: list[str]) -> list[str]:
    """Kernels that only copy a slice of a stack of gradients; weights are cast on the way."""
    copies = (rf"ROOT .* = {SLICE}\S* (?:dynamic-)?slice\(", rf"ROOT .* = {SLICE}\S* bitcast\(%(?:dynamic-)?slice")
    return [text for text in computations if any(re.search(copy, text) for copy in copies)]


@needs_gpu_compiler
@pytest.mark.parametrize(("loop", "kernels"), [("scan", 2), ("unrolled", 2 * LAYERS)])
def test_a_layer_adds_its_gradient_in_place(loop: str, kernels: int, tmp_path: Path) -> None:
    """Two products a layer; a kernel for each reads its slice and writes it, and touches nothing else of the stack."""
    computations = compile_for_gpu(tmp_path, loop, "")
    sliced, whole = find_updates(computations)
    assert len(sliced) == kernels and not whole
    assert all(" dynamic-slice(" in text for text in sliced), "what is added to must be read by the same kernel"
    assert not find_copies(computations)


@needs_gpu_compiler
def test_what_rewrites_all_layers_is_seen(tmp_path: Path) -> None:
    """The negative twins: at an index that the compiler knows it goes through the stack; a matrix it copies first."""
    assert len(find_updates(compile_for_gpu(tmp_path, "unrolled", "at a known index"))[1]) == 2 * LAYERS
    assert len(find_copies(compile_for_gpu(tmp_path, "unrolled", "as a matrix"))) == 2 * LAYERS
