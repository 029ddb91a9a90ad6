"""`drift plan`: rows for meshes that fit, do not fit or cannot be split; the search; what the command writes."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from rich.console import Console

from drift_jax.cli import plan as command
from drift_jax.config import load_config
from drift_jax.errors import ConfigError, ModelError, StageError
from drift_jax.models.architecture import qwen_config_from_hf
from drift_jax.models.published import ARCHITECTURES, find_architecture
from drift_jax.plan import search
from drift_jax.plan.collectives import Traffic
from drift_jax.plan.hlo import Instruction
from drift_jax.plan.programs import Programs, build_programs, sampling_layout_of
from drift_jax.plan.rows import Parts, Row, plan_row, read_need
from drift_jax.plan.show import print_plan, render_page
from tests.plan.tiny_plan import ARCHITECTURE, eight_devices, raw_config, tiny_config, write_model

pytestmark = pytest.mark.mesh

GIB = 2**30


@pytest.fixture(scope="module")
def row() -> Row:
    """Of four devices along fsdp and two along tensor, two micro-batches."""
    config = tiny_config(mesh={"fsdp": 4, "tensor": 2}, train={"batch_size": 16, "accumulation_steps": 2})
    return plan_row(config, ARCHITECTURE, eight_devices())


def test_row_of_a_mesh_that_fits(row: Row) -> None:
    assert row.fits and row.mesh == {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1} and row.micro_batches == 2
    assert set(row.programs) == {"train", "reference", "sampler"}
    assert row.hbm_gib_per_chip == max(row.programs.values())
    assert row.limit_gib == pytest.approx(80e9 / GIB)
    assert row.tokens_per_step == 16 * (64 + 2 * 128)
    assert row.bound_step_s and row.estimated_step_s and row.bound_step_s < row.estimated_step_s
    kinds = {(sent.kind, sent.axis) for sent in row.collectives}
    assert ("all-gather", "fsdp") in kinds and ("all-reduce", "tensor") in kinds


def test_parts_of_the_memory_are_those_of_the_arrays(row: Row) -> None:
    assert row.parts is not None
    assert sum(row.parts) == pytest.approx(row.programs["train"])
    model = qwen_config_from_hf(ARCHITECTURE)
    # Norms and kv biases are not split 8 ways.
    assert row.parts.parameters == pytest.approx(model.num_parameters * 4 / 8 / GIB, rel=0.02)
    assert row.parts.gradients == row.parts.parameters
    assert row.parts.optimizer == pytest.approx(row.parts.parameters, rel=1e-3)
    # The input of each of 3 layers: 640 tokens of 72 in float32 on each of the four devices that rows are split over.
    assert row.parts.activations * GIB == 3 * 640 * 72 * 4


def test_row_as_json(row: Row) -> None:
    plain = json.loads(json.dumps(row.to_json()))
    asked = {"mesh", "fits", "hbm_gib_per_chip", "limit_gib", "estimated_step_s", "bound_step_s", "collectives"}
    assert asked <= set(plain)
    assert set(plain["parts"]) == {"parameters", "optimizer", "gradients", "activations", "temporaries"}
    assert set(plain["collectives"][0]) == {"kind", "axis", "count", "bytes"}


def test_more_micro_batches_send_the_weights_more_often(row: Row) -> None:
    once = tiny_config(mesh={"fsdp": 4, "tensor": 2})
    other = plan_row(once, ARCHITECTURE, eight_devices(), names=["train"])

    def gathers(row: Row) -> float:
        return sum(sent.count for sent in row.collectives if (sent.kind, sent.axis) == ("all-gather", "fsdp"))

    assert 1.5 * gathers(other) < gathers(row) <= 2 * gathers(other)
    assert other.parts and row.parts and other.parts.activations == 2 * row.parts.activations


def test_what_is_over_the_budget_does_not_fit() -> None:
    config = tiny_config(mesh={"fsdp": 8})
    row = plan_row(config, ARCHITECTURE, eight_devices(hbm_gib=0.001), names=["reference"])
    assert not row.fits and row.note == f"reference does not fit: needs {row.hbm_gib_per_chip:.2f} of 0.00 GiB"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"mesh": {"fsdp": 1, "tensor": 8}}, "'heads' of size 4 cannot be split 8 ways"),
        ({"mesh": {"fsdp": 3, "tensor": 1}}, "needs 3 devices, 8 are here"),
        ({"train": {"batch_size": 16, "accumulation_steps": 4}}, "4 pairs cannot be split over 8 devices"),
        ({"sampling": {"batch_size": 10}}, r"sampling.batch_size \(10\) cannot be split over 4 devices"),
        (
            {"sampling": {"tensor_parallel": 8}},
            r"tensor_parallel \(8\) must divide .*sample .8.*heads .4.*\. 4 would",
        ),
    ],
)
def test_what_cannot_be_split_is_a_row(sections: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = plan_row(tiny_config(**sections), ARCHITECTURE, eight_devices(), names=["sampler"])
    assert not row.fits and row.hbm_gib_per_chip is None
    assert row.note.startswith("cannot be split: ")
    assert re.search(words, row.note), row.note


MESSAGES = [
    ("Ran out of memory in memory space hbm. Used 16.11G of 15.75G hbm. Exceeded hbm capacity by 367.1M.", 16.11),
    ("Total hbm usage >= 34.50G:\n    reserved        258.00M\n    program          16.10G", 34.5),
    (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (190.73G) exceeds available HBM "
        "(15.75G).",
        190.73,
    ),
    ("Out of memory while trying to allocate 512.00MiB.", 0.5),
    ("something else", None),
]


@pytest.mark.parametrize(("message", "need"), MESSAGES)
def test_needs_in_the_words_of_the_compiler(message: str, need: float | None) -> None:
    assert read_need(message) == need


@pytest.mark.parametrize(("message", "need"), MESSAGES)
def test_compiler_out_of_memory_is_a_row(message: str, need: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Programs, name: str) -> Any:
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    monkeypatch.setattr(Programs, "compile", fail)
    row = plan_row(tiny_config(mesh={"fsdp": 8}), ARCHITECTURE, eight_devices())
    assert not row.fits and row.hbm_gib_per_chip == need
    if need:
        assert row.note == f"train does not fit: needs {need:.2f} of 74.51 GiB"
    else:
        assert row.note.startswith("train does not fit: needs RESOURCE_EXHAUSTED: something else")


def test_other_failures_of_the_compiler_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Programs, name: str) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(Programs, "compile", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        plan_row(tiny_config(mesh={"fsdp": 8}), ARCHITECTURE, eight_devices())


def test_sampler_is_planned_for_one_host_where_it_would_sample_there() -> None:
    """Of two hosts with four devices each."""
    whole, model = eight_devices(), qwen_config_from_hf(ARCHITECTURE)
    hosts = dataclasses.replace(whole, host=whole.devices[:4])
    assert sampling_layout_of(tiny_config(), model, whole).devices == 8
    assert sampling_layout_of(tiny_config(), model, hosts).devices == 4
    assert sampling_layout_of(tiny_config(sampling={"batch_size": 8, "per_host": False}), model, hosts).devices == 8
    # A policy that does not fit on the four is sampled from by all.
    chip = dataclasses.replace(hosts.chip, limit_gib=model.num_parameters * 4 / 4 / GIB)
    assert sampling_layout_of(tiny_config(), model, dataclasses.replace(hosts, chip=chip)).devices == 8


def test_longest_batch_is_what_the_loader_makes() -> None:
    programs = build_programs(tiny_config(mesh={"fsdp": 8}), ARCHITECTURE, eight_devices())
    spans = programs.batch.spans
    assert ((spans.prompt_stop > spans.prompt_start).sum(axis=2) % 320 == 0).all()  # whole pairs of 64 + 2 x 128
    # A device lists 2 pairs x 2 x 128 tokens. Its share of 256 x 4096 logits is 956 tokens x 1096 words, so chunks have
    # 512 tokens.
    assert (programs.batch.owners >= 0).sum(axis=2).max() == 512 and programs.chunks == 1


def test_flops_of_the_attention_kernel() -> None:
    config = tiny_config(
        mesh={"fsdp": 4, "tensor": 2}, data={"max_length": 768, "max_prompt_length": 256}, train={"batch_size": 4}
    )
    programs = build_programs(config, ARCHITECTURE, eight_devices())
    assert programs.batch.ids.shape == (1, 4, 1280)  # one pair of 256 + 2 x 512 in a row
    # Blocks of 256: chosen reversed (2), prompt (1), rejected (2). The chosen side sees what stands behind it up to the
    # prompt's end (3 + 2), the prompt itself (1), the rejected side the prompt and what stands before it (2 + 3).
    seen, spans = 11 * 256**2, {"dkv": 4, "dq": 3, "fwd": 2}
    for name, products in spans.items():
        assert programs.kernel_flops(kernel(name)) == 2 * products * 2 * 18 * seen
    assert programs.kernel_flops(kernel("unknown")) == 0.0


def kernel(name: str) -> Instruction:
    operands = "operand_layout_constraints={s32[1,5,5]{2,1,0}, bf16[2,1280,18]{2,1,0}, bf16[1,1280,18]{2,1,0}}"
    attributes = f'{operands}, metadata={{op_name="jit(f)/splash_mha_{name}_no_residuals/pallas_call"}}'
    return Instruction("kernel", "bf16[2,1280,18]{2,1,0}", "custom-call", (), "", attributes)


# --- search --------------------------------------------------------------------------------------------------


def fake_row(config: Any, architecture: Any, where: Any, names: Any = (), needs: Any = None) -> Row:
    """More memory with fewer micro-batches, more time with more; the sampler needs little."""
    mesh = config.mesh
    gib = needs(config) if "train" in names else 1.0
    seconds = config.train.accumulation_steps * (1.0 if config.model.remat == "dots" else 1.2) + mesh.tensor / 10
    fits = gib <= where.chip.limit_gib
    note = "" if fits else f"does not fit: needs {gib:.2f} of {where.chip.limit_gib:.2f} GiB"
    programs = dict.fromkeys(names, gib)
    sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "tensor", "sequence")}
    return Row(
        sizes,
        config.train.accumulation_steps,
        config.model.remat,
        fits,
        where.chip.limit_gib,
        gib,
        programs,
        estimated_step_s=seconds,
        bound_step_s=0.5,
        note=note,
    )


def run_fake_search(monkeypatch: pytest.MonkeyPatch, needs: Any, max_compiles: int = 8) -> search.Choice:
    monkeypatch.setattr(search, "plan_row", lambda *args, **kw: fake_row(*args, **kw, needs=needs))
    return search.search(tiny_config(), ARCHITECTURE, eight_devices(), max_compiles)


def test_search_names_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = run_fake_search(
        monkeypatch, lambda c: 80.0 if c.train.accumulation_steps == 1 and c.model.remat == "dots" else 10.0
    )
    assert choice.best is not None and choice.config is not None and choice.best.fits
    times = [row.estimated_step_s for row in choice.rows if row.fits]
    assert choice.best.estimated_step_s == min(time for time in times if time)
    assert choice.best.mesh.items() <= dataclasses.asdict(choice.config.mesh).items()
    assert choice.config.train.accumulation_steps == choice.best.accumulation_steps
    assert choice.why.startswith("best: ") and "estimated" in choice.why
    tried = [(tuple(row.mesh.values()), row.accumulation_steps, row.remat) for row in choice.rows]
    assert len(set(tried)) == len(tried) <= 8
    # Where dots fits, layer is not compiled for the same mesh.
    fitting = {mesh for (mesh, _, remat), row in zip(tried, choice.rows, strict=True) if row.fits and remat == "dots"}
    assert fitting and not any(mesh in fitting and remat == "layer" for mesh, _, remat in tried)


def test_search_without_anything_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = run_fake_search(monkeypatch, lambda c: 100.0 / c.mesh.fsdp + 75, max_compiles=3)
    assert choice.best is None and choice.config is None and len(choice.rows) == 3
    assert "none of 3 compiled choices fits" in choice.why and "Take more chips" in choice.why


def test_search_of_a_batch_that_no_mesh_splits() -> None:
    odd = {**ARCHITECTURE, "hidden_size": 75, "head_dim": 18}
    with pytest.raises(ConfigError, match=r"no mesh over 8 devices divides .* train.batch_size \(1\)"):
        search.search(tiny_config(train={"batch_size": 1}), odd, eight_devices(), 2)
    with pytest.raises(ConfigError, match=r"sampling.batch_size \(1\) cannot be split over 4 devices"):
        search.search(tiny_config(sampling={"batch_size": 1}), ARCHITECTURE, eight_devices(), 2)


def test_rows_are_cut_where_there_are_fewer_than_devices() -> None:
    candidates = search.list_candidates(
        tiny_config(train={"batch_size": 2}), qwen_config_from_hf(ARCHITECTURE), eight_devices()
    )
    assert {c.mesh.sequence for c in candidates} == {1, 2, 4, 8}
    assert all(c.mesh.rows <= 2 for c in candidates)


def test_candidates_divide_everything() -> None:
    config, model = tiny_config(), qwen_config_from_hf(ARCHITECTURE)
    candidates = search.list_candidates(config, model, eight_devices())
    assert candidates
    for c in candidates:
        assert c.mesh.rows * c.mesh.tensor == 8 and c.mesh.tensor in (1, 2, 4) and c.mesh.sequence == 1
        assert 16 // c.accumulation_steps % c.mesh.rows == 0
    assert {c.remat for c in candidates} == {"dots", "layer"}  # fake devices have no host memory


# --- models and slices ---------------------------------------------------------------------------------------

BILLIONS = {
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.544,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62,
    "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76,
    "qwen2.5-72b": 72.71,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
}


def test_published_sizes() -> None:
    counts = {name: qwen_config_from_hf(raw).num_parameters / 1e9 for name, raw in ARCHITECTURES.items()}
    assert counts == pytest.approx(BILLIONS, rel=2e-3)


def test_model_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_architecture(str(write_model(tmp_path))) == ARCHITECTURE
    for name in ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B", "qwen2.5-7b"):
        assert find_architecture(name) == ARCHITECTURES["qwen2.5-7b"]
    assert find_architecture("Qwen/Qwen3-8B-Base") == ARCHITECTURES["qwen3-8b"]
    with pytest.raises(ModelError, match=r"no model directory at \./nowhere"):
        find_architecture("./nowhere")

    import huggingface_hub

    def offline(*args: Any, **kw: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    # A longer context has another rope: not the model of the table.
    with pytest.raises(ModelError, match=r"the hub did not give its config.json \(OSError: no network\)"):
        find_architecture("Qwen/Qwen2.5-7B-Instruct-1M")


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("# mine\n" + yaml.safe_dump(raw_config(str(write_model(tmp_path)))))
    return path


def test_json_and_nothing_else(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.plan(config_file, devices=8, as_json=True, overrides=["mesh.tensor=2"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["fits"] and row["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}


def test_search_writes_the_users_keys_with_the_best(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search, "plan_row", lambda *args, **kw: fake_row(*args, **kw, needs=lambda c: 10.0))
    out, page = tmp_path / "chosen.yaml", tmp_path / "plan.html"
    command.plan(config_file, devices=8, search=True, write=out, html=page, overrides=["train.beta=0.2"])
    before, after = load_config(config_file), load_config(out)
    assert after.train.beta == 0.2 and after.mesh != before.mesh
    assert dataclasses.replace(after, mesh=before.mesh, train=before.train, model=before.model) == before
    assert set(yaml.safe_load(out.read_text())) == set(raw_config()) | {"mesh"}
    shown = capsys.readouterr().out
    assert "best: " in shown and "written: " in shown
    assert page.read_text().startswith("<!doctype html>")
    assert not list(tmp_path.glob(".*tmp"))


def test_what_is_asked_for_must_make_sense(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--write writes what --search finds"):
        command.plan(config_file, devices=8, write=tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="give --topology"):
        command.plan(config_file)
    with pytest.raises(ConfigError, match="give --topology"):
        command.plan(config_file, topology="v5e:4x4", devices=8)
    with pytest.raises(ConfigError, match="--hbm-gib goes with --devices"):
        command.plan(config_file, topology="v5e:4x4", hbm_gib=16.0)


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="cannot write"):
        command._write(tmp_path / "nowhere" / "x.yaml", "text")


def test_number_of_fake_devices_is_set_before_jax_starts(config_file: Path) -> None:
    code = f"""
from pathlib import Path
from drift_jax.cli.plan import plan
plan(Path({str(config_file)!r}), devices=16, as_json=True, overrides=["train.batch_size=8"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["mesh"]["fsdp"] == 16 and "8 pairs cannot be split over 16 devices" in row["note"]


# --- what is shown -------------------------------------------------------------------------------------------


def shown_rows() -> list[Row]:
    parts = Parts(2.0, 2.0, 2.0, 1.0, 3.0)
    traffic = (Traffic("all-gather", "fsdp", 56.0, 3.0 * GIB),)
    mesh = {"data": 1, "fsdp": 8, "tensor": 2}
    fitting = Row(mesh, 2, "layer", True, 15.75, 10.0, {"train": 10.0, "sampler": 3.0}, parts, estimated_step_s=2.0)
    fitting = dataclasses.replace(fitting, bound_step_s=1.0, collectives=traffic, about="by <the> compiler")
    note = "train does not fit: needs 20.00 of 15.75 GiB"
    return [fitting, Row(mesh, 1, "dots", False, 15.75, 20.0, {"train": 20.0}, note=note)]


def test_tables_fit_a_terminal() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    print_plan(shown_rows(), console, "run.yaml on v5e:4x4")
    text = console.export_text()
    assert "…" not in text
    assert "fsdp=8 tensor=2 acc=2 layer" in text and "all-gather" in text and "needs 20.00 of 15.75 GiB" in text


def test_page_is_self_contained_and_escaped() -> None:
    page = render_page(shown_rows(), "<script>alert(1)</script>", "best & only")
    assert "<script" not in page and "&lt;script&gt;" in page and "by &lt;the&gt; compiler" in page
    assert "http" not in page and page.count("<svg") == 2 and "best &amp; only" in page
    assert "activations: 1.00 GiB" in page and "limit 15.75 GiB" in page and "20.00 GiB, does not fit" in page
