"""What the compiled step sends, read from its text: on 8 fake devices, and by the TPU compiler for the 7B model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drift_jax import compiled
from drift_jax.config import build_config
from drift_jax.models.published import ARCHITECTURES
from drift_jax.plan.collectives import find_collectives
from drift_jax.plan.hlo import Program, read_program
from drift_jax.plan.programs import build_programs
from drift_jax.sharding import use_layout
from tests.plan.step_checks import Sizes, find_faults
from tests.plan.tiny_plan import (
    ARCHITECTURE,
    REPO,
    eight_devices,
    needs_tpu_compiler,
    run_with_tpu_compiler,
    tiny_config,
)

MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}]


@pytest.mark.mesh
@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_step_sends_neither_rows_nor_logits_nor_whole_parameters(mesh: dict[str, int]) -> None:
    config = tiny_config(mesh=mesh, train={"batch_size": 16, "accumulation_steps": 2})
    programs = build_programs(config, ARCHITECTURE, eight_devices())
    program = read_program(programs.compile("train").as_text())
    assert find_faults(program, programs.mesh_sizes, Sizes.of(programs)) == []
    # Weights are gathered all the same: within the layers' loop, for every micro-batch.
    collectives = find_collectives(program, programs.mesh_sizes, programs.count_region)
    weights = [c for c in collectives if c.kind == "all-gather" and c.axis == "fsdp" and len(c.regions) == 2]
    assert weights and all(c.executions == 2 * 3 for c in weights if c.regions[1].known == 3)


@pytest.mark.mesh
def test_a_program_of_other_sources_is_not_taken_from_the_cache() -> None:
    """JAX's persistent cache does not mind where a program was written, and loops are counted by their files."""
    config = tiny_config(mesh={"fsdp": 8}, train={"batch_size": 24, "accumulation_steps": 3})

    def loops_of_step(ours: bool) -> int:
        compiled._LAST.clear()  # else the program of before
        programs = build_programs(config, ARCHITECTURE, eight_devices())
        if ours:
            done = programs.compile("train")
        else:
            state = programs.trainer.abstract_state
            with use_layout(programs.layout):
                done = programs.trainer.jitted_step.lower(state, programs._placed_batch()).compile()
        regions = {region for visit in read_program(done.as_text() or "").walk() for region in visit.regions}
        return sum(region.sources[:1] != () and region.sources[0].endswith("step.py") for region in regions)

    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        assert loops_of_step(ours=False) == 0
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    assert loops_of_step(ours=False) == 0, "the cache has what was compiled before: without one this test shows nothing"
    assert loops_of_step(ours=True) > 0


# --- negative twins ------------------------------------------------------------------------------------------

LAYERS, EMBED, MLP, VOCAB, LENGTH = 3, 72, 160, 1096, 384
SIZES = Sizes(LAYERS, EMBED, VOCAB, (LENGTH,), ((EMBED, MLP), (VOCAB, EMBED)), 8, 1)


def compile_on_eight(function: Any, *shapes: tuple[tuple[int, ...], P]) -> Program:
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes]
    with jax.set_mesh(mesh):
        return read_program(jax.jit(function).lower(*args).compile().as_text())


def faults_of(function: Any, *shapes: tuple[tuple[int, ...], P]) -> list[str]:
    return find_faults(compile_on_eight(function, *shapes), {"fsdp": 8}, SIZES)


@pytest.mark.mesh
def test_permuted_halves_are_caught() -> None:
    rows = ((16, LENGTH, EMBED), P("fsdp"))

    def compare(x: Any) -> Any:
        """The second half of a batch against the first, as code does that has no pair axis."""
        return jax.lax.with_sharding_constraint(jnp.concatenate([x[8:], x[:8]]) - x, P("fsdp"))

    (fault,) = {fault.split(":")[0] for fault in faults_of(compare, rows)}
    assert fault == "pair halves are permuted"
    assert faults_of(lambda x: 2 * x, rows) == []


@pytest.mark.mesh
@pytest.mark.parametrize("whole", [True, False])
def test_gathered_logits_are_caught(whole: bool) -> None:
    def losses(states: Any, table: Any) -> Any:
        logits = jnp.einsum("btd,vd->btv", states, table)
        logits = jnp.tanh(jax.lax.with_sharding_constraint(logits, P(None, None, "fsdp")))
        if whole:
            logits = jax.lax.with_sharding_constraint(logits, P())
        return jax.nn.logsumexp(logits, axis=-1)

    faults = faults_of(losses, ((2, 32, EMBED), P()), ((VOCAB, EMBED), P("fsdp")))
    assert [fault.split(":")[0] for fault in faults] == ["logits are gathered"] * whole


@pytest.mark.mesh
@pytest.mark.parametrize("ahead", [True, False])
def test_parameters_gathered_ahead_of_the_loop_are_caught(ahead: bool) -> None:
    def forward(x: Any, weights: Any) -> Any:
        if ahead:
            weights = jax.lax.with_sharding_constraint(weights, P())

        def layer(x: Any, w: Any) -> tuple[Any, None]:
            # A factor that depends on x, so that the gather cannot leave the loop.
            w = jax.lax.with_sharding_constraint(w * (1 + 1e-30 * x[0, 0]), P())
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w) @ w.T, P("fsdp")), None

        return jax.lax.scan(layer, x, weights)[0]

    program = compile_on_eight(forward, ((64, EMBED), P("fsdp")), ((LAYERS, EMBED, MLP), P(None, "fsdp")))
    assert any(c.kind == "all-gather" for c in find_collectives(program, {"fsdp": 8}))
    faults = find_faults(program, {"fsdp": 8}, SIZES)
    assert [fault.split(":")[0] for fault in faults] == [
        "a whole parameter is gathered outside the layers' loop"
    ] * ahead


# --- the TPU compiler ----------------------------------------------------------------------------------------


@needs_tpu_compiler
@pytest.mark.slow
def test_7b_step_for_sixteen_tpu_chips(tmp_path: Path) -> None:
    """The published 7B recipe in two micro-batches: its memory, and what its chips send."""
    text, words = tmp_path / "step.txt", ["--set", "train.accumulation_steps=2", "--hlo", tmp_path / "step.txt"]
    words = [REPO / "scripts" / "bench_memory.py", "--model", "qwen2.5-7b", "--topology", "v5e:4x4", *words]
    row = json.loads(run_with_tpu_compiler(words, 600))
    # Each jax brings a TPU compiler of its own.
    expected = 8.66 if jax.__version_info__ < (0, 11) else 9.01
    assert row["fits"] and row["hbm_gib_per_chip"] == pytest.approx(expected, abs=0.05)
    assert row["mesh"] == {axis: 16 if axis == "fsdp" else 1 for axis in row["mesh"]}
    assert sum(row["parts"].values()) == pytest.approx(row["hbm_gib_per_chip"], abs=0.01)
    assert row["bound_step_s"] < row["estimated_step_s"] < 5 * row["bound_step_s"]
    assert row["estimate"]["uncounted"] == 0 and row["estimate"]["kernels_s"] > 0

    raw = {"run_dir": "unused", "model": {"path": "qwen2.5-7b"}, "train": {"accumulation_steps": 2}}
    sizes = sizes_of_step(raw | {"data": {"max_length": 2048, "max_prompt_length": 1024}}, row)
    assert find_faults(read_program(text.read_text()), row["mesh"], sizes) == []


def sizes_of_step(raw: dict[str, Any], row: dict[str, Any]) -> Sizes:
    """Of the step of a row, whose devices are not here: shapes as on eight of them, lengths as the row says."""
    programs = build_programs(build_config(raw), ARCHITECTURES["qwen2.5-7b"], eight_devices())
    return Sizes.of(programs)._replace(lengths=(row["row_length"],), devices=16)
