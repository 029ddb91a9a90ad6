# ruff: noqa: E501  (lines of a compiled program are as long as they are)
"""The reader of compiled programs: small texts of each dialect, and programs that are really compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drift_jax.plan.collectives import find_collectives, name_axes, read_groups, sum_traffic
from drift_jax.plan.estimate import estimate, send_seconds
from drift_jax.plan.hlo import Instruction, Program, Region, Shape, read_program, read_shapes
from drift_jax.plan.slices import CHIPS

MESH = {"data": 2, "fsdp": 2, "tensor": 2}

TPU = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/drift_jax/train.py"

FunctionNames
1 "loss_and_grads"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=4 end_column=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%start (p: bf16[1,8]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
}

%step (p.1: bf16[1,8]) -> bf16[4,8] {
  %p.1 = bf16[1,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%inner_cond (t.2: (u32[], f32[1,8], u32[])) -> pred[] {
  %t.2 = (u32[]{:T(128)}, f32[1,8]{1,0:T(8,128)}, u32[]{:T(128)}) parameter(0)
  %i.2 = u32[]{:T(128)} get-tuple-element(%t.2), index=0
  %limit = u32[]{:T(128)} get-tuple-element(%t.2), index=2
  ROOT %lt.2 = pred[]{:T(512)} compare(%i.2, %limit), direction=LT
}

%inner_body (t.3: (u32[], f32[1,8], u32[])) -> (u32[], f32[1,8], u32[]) {
  %t.3 = (u32[]{:T(128)}, f32[1,8]{1,0:T(8,128)}, u32[]{:T(128)}) parameter(0)
  %i.3 = u32[]{:T(128)} get-tuple-element(%t.3), index=0
  %x.3 = f32[1,8]{1,0:T(8,128)} get-tuple-element(%t.3), index=1
  %limit.3 = u32[]{:T(128)} get-tuple-element(%t.3), index=2
  %two = u32[]{:T(128)} constant(2)
  %next.3 = u32[]{:T(128)} add(%i.3, %two)
  %half = bf16[1,8]{1,0:T(8,128)(2,1)} convert(%x.3), backend_config={"estimated_cycles":"10"}
  %spread = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%half), kind=kOutput, calls=%step, backend_config={"estimated_cycles":"100"}
  %permute-start = (f32[1,8]{1,0:T(8,128)}, f32[1,8]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x.3), channel_id=9, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %permute-done = f32[1,8]{1,0:T(8,128)S(1)} collective-permute-done(%permute-start)
  ROOT %out.3 = (u32[]{:T(128)}, f32[1,8]{1,0:T(8,128)}, u32[]{:T(128)}) tuple(%next.3, %permute-done, %limit.3)
}

%outer_cond (t.4: (s32[], f32[1,8], s32[])) -> pred[] {
  %t.4 = (s32[]{:T(128)}, f32[1,8]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i.4 = s32[]{:T(128)} get-tuple-element(%t.4), index=0
  %count.4 = s32[]{:T(128)} get-tuple-element(%t.4), index=2
  ROOT %lt.4 = pred[]{:T(512)} compare(%i.4, %count.4), direction=LT
}

%outer_body (t.5: (s32[], f32[1,8], s32[])) -> (s32[], f32[1,8], s32[]) {
  %t.5 = (s32[]{:T(128)}, f32[1,8]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i.5 = s32[]{:T(128)} get-tuple-element(%t.5), index=0
  %x.5 = f32[1,8]{1,0:T(8,128)} get-tuple-element(%t.5), index=1
  %count.5 = s32[]{:T(128)} get-tuple-element(%t.5), index=2
  %one = s32[]{:T(128)} constant(1)
  %next.5 = s32[]{:T(128)} add(%i.5, %one)
  %zero.5 = u32[]{:T(128)} constant(0)
  %eight = u32[]{:T(128)} constant(8)
  %kernel = f32[1,8]{1,0:T(8,128)} custom-call(%x.5), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": 512
}}, metadata={op_name="jit(step)/splash_mha_fwd/pallas_call"}
  %narrow = bf16[1,8]{1,0:T(8,128)(2,1)} convert(%kernel)
  %begun = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%narrow), kind=kCustom, calls=%start
  %copy.5 = u32[]{:T(128)} copy(%zero.5)
  %init.5 = (u32[]{:T(128)}, f32[1,8]{1,0:T(8,128)}, u32[]{:T(128)}) tuple(%copy.5, %kernel, %eight)
  %inner = (u32[]{:T(128)}, f32[1,8]{1,0:T(8,128)}, u32[]{:T(128)}) while(%init.5), condition=%inner_cond, body=%inner_body
  %moved = f32[1,8]{1,0:T(8,128)} get-tuple-element(%inner), index=1
  ROOT %out.5 = (s32[]{:T(128)}, f32[1,8]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%next.5, %moved, %count.5)
}

ENTRY %main (x: f32[1,8], count: s32[]) -> f32[1,8] {
  %x = f32[1,8]{1,0:T(8,128)} parameter(0)
  %count = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[1,8]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%zero, %x, %count)
  %outer = (s32[]{:T(128)}, f32[1,8]{1,0:T(8,128)}, s32[]{:T(128)}) while(%init), condition=%outer_cond, body=%outer_body, metadata={op_name="jit(step)/while" stack_frame_id=1}
  ROOT %result = f32[1,8]{1,0:T(8,128)} get-tuple-element(%outer), index=1
}
"""

GPU = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(f32[] %a, f32[] %b)
}

%async_computation (q: f32[16]) -> f32[4] {
  %q = f32[16]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[4]{0} reduce-scatter(f32[16]{0} %q), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, dimensions={0}, to_apply=%sum
}

ENTRY %main (x: f32[16], y: bf16[2,8]) -> (f32[16], bf16[8,8], f32[4]) {
  %x = f32[16]{0} parameter(0)
  %y = bf16[2,8]{1,0} parameter(1)
  %all-reduce-start = f32[16]{0} all-reduce-start(f32[16]{0} %x), channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true, to_apply=%sum, backend_config={"collective_backend_config":{"is_sync":false}}
  %all-reduce-done = f32[16]{0} all-reduce-done(f32[16]{0} %all-reduce-start)
  %all-gather-start = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(bf16[2,8]{1,0} %y), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %all-gather-done = bf16[8,8]{1,0} all-gather-done((bf16[2,8]{1,0}, bf16[8,8]{1,0}) %all-gather-start)
  %rs-start = ((f32[16]{0}), f32[4]{0}) async-start(f32[16]{0} %x), calls=%async_computation
  %rs-done = f32[4]{0} async-done(((f32[16]{0}), f32[4]{0}) %rs-start), calls=%async_computation
  ROOT %out = (f32[16]{0}, bf16[8,8]{1,0}, f32[4]{0}) tuple(%all-reduce-done, %all-gather-done, %rs-done)
}
"""


def count_three(region: Region) -> float:
    """Of loops of train.py."""
    assert region.sources == ("/somewhere/drift_jax/train.py",) and region.op_name == "jit(step)/while"
    return 3.0


def test_tpu_dialect() -> None:
    program = read_program(TPU)
    found = {c.kind: c for c in find_collectives(program, {"fsdp": 4}, count_three)}
    assert sorted(found) == ["all-gather", "collective-permute"]
    # Start and steps of the fused all-gather have one channel: it runs once a turn of the outer loop.
    gather = found["all-gather"]
    assert (gather.executions, gather.bytes, gather.axes, gather.is_async) == (3.0, 4 * 8 * 2, ("fsdp",), True)
    # The inner loop goes from 0 to 8 by 2.
    permute = found["collective-permute"]
    assert (permute.executions, permute.bytes, permute.axes) == (12.0, 8 * 4, ("fsdp",))
    assert [region.known for region in permute.regions] == [None, 4]
    assert permute.shapes == (Shape("f32", (1, 8)),)


def test_cycles_and_kernels_of_a_tpu_program() -> None:
    program, chip = read_program(TPU), CHIPS["v5e"]
    collectives = find_collectives(program, {"fsdp": 4}, count_three)
    cost = estimate(program, chip, collectives, lambda kernel: 1e9 * ("splash" in kernel.op_name), count_three)
    assert cost is not None and cost.uncounted == 0
    assert cost.compiler_s == pytest.approx(3 * 4 * 110 / 1.5e9)
    assert cost.kernels_s == pytest.approx(3 * 1e9 / (0.5 * 197e12))
    # Both collectives are hidden behind the work of their loops.
    assert cost.exposed_s == 0.0
    without = estimate(program, chip, collectives, lambda kernel: 0.0, count_three)
    assert without is not None and without.uncounted == 1 and without.exposed_s > 0.0


def test_gpu_dialect() -> None:
    traffic = sum_traffic(find_collectives(read_program(GPU), MESH))
    assert {(row.kind, row.axis): (row.count, row.bytes) for row in traffic} == {
        ("all-reduce", "tensor"): (1, 64),
        ("all-gather", "data+fsdp"): (1, 128),
        ("reduce-scatter", "fsdp+tensor"): (1, 64),
    }


def group_text(text: str) -> Instruction:
    return Instruction("x", "f32[8]{0}", "all-gather", (), "", text)


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}", ("data",)),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", ("fsdp",)),  # {0,2} {4,6} {1,3} {5,7}
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp", "tensor")),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", ("fsdp", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", ("tensor",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'a','c'}", ("data", "tensor")),
        ("replica_groups=mesh['a'=8], device_ids=(0,1,2,3,4,5,6,7) {'a':(4)2}", ("tensor",)),
        ("source_target_pairs={{0,0},{1,1}}", ()),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}, metadata={}", ("fsdp",)),
    ],
)
def test_groups_to_axes(text: str, axes: tuple[str, ...]) -> None:
    assert name_axes(read_groups(group_text(text), 8), MESH) == axes


def test_shapes() -> None:
    text = "(bf16[28,1,3072]{2,1,0:T(8,128)(2,1)S(5)}, /*index=1*/pred[], s4[3]{0}, f32[<=8]{0}, token[])"
    shapes = read_shapes(text)
    assert [shape.bytes for shape in shapes] == [28 * 3072 * 2, 1, 2, 32, 0]
    assert [shape.on_host for shape in shapes] == [True, False, False, False, False]


def test_text_without_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        read_program("HloModule nothing\n")


# --- really compiled -----------------------------------------------------------------------------------------

TURNS, WIDTH = 5, 64


def compile_exchange(turns: int, gather_again: bool = False) -> Program:
    """Every kind of collective, in a loop of known length; `gather_again`: one more, after the loop."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    whole = P(("data", "fsdp", "tensor"))

    @partial(jax.shard_map, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    def exchange(x: Any) -> Any:
        def one(x: Any, _: None) -> tuple[Any, None]:
            x = jnp.sin(jax.lax.all_gather(x, "fsdp", tiled=True))
            x = jnp.sin(jax.lax.psum_scatter(x, "fsdp", tiled=True))
            x = jnp.sin(jax.lax.psum(x, "tensor"))
            x = jnp.sin(jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]))
            x = jnp.sin(jax.lax.all_to_all(x.reshape(2, -1), ("tensor",), 0, 0, tiled=True)).reshape(-1)
            return x, None

        x, _ = jax.lax.scan(one, x, None, length=turns)
        if gather_again:
            x = jnp.cos(jax.lax.all_gather(x, "fsdp", tiled=True))[:WIDTH]
        return x

    x = jax.ShapeDtypeStruct((8 * WIDTH,), jnp.float32, sharding=NamedSharding(mesh, whole))
    return read_program(jax.jit(exchange).lower(x).compile().as_text())


@pytest.mark.mesh
def test_counts_bytes_and_axes_of_a_compiled_program() -> None:
    collectives = find_collectives(compile_exchange(TURNS), MESH)
    traffic = {(row.kind, row.axis): (row.count, row.bytes) for row in sum_traffic(collectives)}
    size = 4 * WIDTH
    assert traffic == {
        ("all-gather", "fsdp"): (TURNS, TURNS * 2 * size),
        ("reduce-scatter", "fsdp"): (TURNS, TURNS * 2 * size),
        ("all-reduce", "tensor"): (TURNS, TURNS * size),
        ("collective-permute", "data"): (TURNS, TURNS * size),
        ("all-to-all", "tensor"): (TURNS, TURNS * size),
    }
    assert all([region.known for region in c.regions] == [TURNS] for c in collectives)


@pytest.mark.mesh
def test_negative_twin_one_collective_more_is_seen() -> None:
    collectives = find_collectives(compile_exchange(TURNS, gather_again=True), MESH)
    gathers = [c for c in collectives if c.kind == "all-gather"]
    assert sorted((c.executions, len(c.regions)) for c in gathers) == [(1.0, 0), (float(TURNS), 1)]
    assert sum(c.total_bytes for c in gathers) == (TURNS + 1) * 2 * 4 * WIDTH


@pytest.mark.mesh
def test_loop_of_unknown_length_is_asked_for() -> None:
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
    def repeat(x: Any, count: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, x: jnp.sin(jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)])), x)

    text = repeat.lower(jnp.ones(8), jnp.int32(3)).compile().as_text()
    asked: list[Region] = []

    def count(region: Region) -> float:
        asked.append(region)
        return 7.0

    (permute,) = [c for c in find_collectives(read_program(text), {"fsdp": 8}, count) if c.axes]
    assert permute.executions == 7.0 and permute.axes == ("fsdp",)
    assert asked[0].known is None and asked[0].sources[0].endswith("test_hlo.py")


def test_seconds_of_a_ring() -> None:
    gather = find_collectives(read_program(GPU), MESH)
    seconds = {c.kind: send_seconds(c, CHIPS["v5e"]) for c in gather}
    assert seconds["all-gather"] == pytest.approx(128 * 3 / 4 / 90e9)
    assert seconds["all-reduce"] == pytest.approx(2 * 64 / 2 / 90e9)
