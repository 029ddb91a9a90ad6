"""`drift mesh`: its numbers are those of real arrays, and its text fits and can be read without colour."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from drift_jax.config import MeshConfig, RunConfig, build_config
from drift_jax.errors import ConfigError
from drift_jax.mesh.drawing import lay_out
from drift_jax.mesh.render import DIMS, format_bytes, join_ids, print_report
from drift_jax.mesh.report import MeshReport, build_report, plan_devices
from drift_jax.mesh.rows import ArrayRow, HostRow, find_axes_across
from drift_jax.models.hf import load_params
from drift_jax.sharding import STRATEGIES, build_layout
from drift_jax.stages.dpo import build_trainer
from tests.cli_runs import Drift, drift, write_yaml  # noqa: F401
from tests.conftest import REPO
from tests.processes import finish, free_port, start_one
from tests.tiny_models import build_tiny_model

pytestmark = pytest.mark.mesh


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("mesh") / "model")


@pytest.fixture(scope="module")
def odd_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes alone: a vocabulary that nothing divides, and no weights."""
    out = tmp_path_factory.mktemp("odd")
    shutil.copy(build_tiny_model(out / "model", "qwen3", vocab_size=381) / "config.json", out)
    return out


def make_config(model_dir: Path, mesh: Mapping[str, Any], **train: Any) -> RunConfig:
    return build_config({"run_dir": "r", "model": {"path": str(model_dir)}, "mesh": dict(mesh), "train": train})


def make_report(model_dir: Path, mesh: Mapping[str, Any], **train: Any) -> MeshReport:
    return build_report(make_config(model_dir, mesh, **train))


def render(report: MeshReport, width: int = 80, colour: bool = False) -> str:
    out = io.StringIO()
    kind = {"force_terminal": True, "color_system": "truecolor"} if colour else {}
    print_report(report, Console(file=out, width=width, emoji=False, **kind))
    return out.getvalue()


def rows_by_name(rows: Sequence[ArrayRow]) -> dict[str, ArrayRow]:
    return {row.name: row for row in rows}


def bytes_by_device(tree: Any) -> list[int]:
    held = {device.id: 0 for device in jax.devices()}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    return list(held.values())


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "train", "moments"),
    [
        ({"fsdp": 8}, {}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"optimizer": "adamw", "moment_dtype": "bfloat16"}, 2),
        ({"fsdp": 2, "tensor": 4}, {"master_dtype": "bfloat16", "gradient_dtype": "bfloat16"}, 1),
        ({"fsdp": 2, "tensor": 2, "sequence": 2, "rules": {"embed": []}}, {}, 1),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_arrays(
    model_dir: Path, mesh: dict[str, Any], train: dict[str, Any], moments: int
) -> None:
    config = make_config(model_dir, mesh, **train)
    report = build_report(config)
    layout = build_layout(config.mesh)
    trainer = build_trainer(config, model_dir, layout, 1)
    params = load_params(model_dir, layout, config.train.master_dtype)
    state = trainer.init_state(params)
    rows = rows_by_name(report.parameters)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        row = rows.pop(jax.tree_util.keystr(path, simple=True, separator="."))
        assert row.shape == leaf.shape
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {row.bytes_per_device}, row.name
    assert not rows
    held, gradients, optimizer, together = report.totals
    assert [held.bytes_per_device] * 8 == bytes_by_device(params)
    assert [optimizer.bytes_per_device] * 8 == bytes_by_device(state.opt_state)
    assert held.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert optimizer.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert optimizer.what.endswith(f"{moments} moment" + "s" * (moments > 1))
    ratio = np.dtype(config.train.gradient_dtype).itemsize / np.dtype(config.train.master_dtype).itemsize
    assert gradients.bytes_per_device == held.bytes_per_device * ratio
    assert together.bytes_per_device == sum(row.bytes_per_device for row in report.totals[:3])
    assert [held.dtype, gradients.dtype, optimizer.dtype] == [
        getattr(config.train, f"{kind}_dtype") for kind in ("master", "gradient", "moment")
    ]
    assert report.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_drawn_parts_are_those_that_devices_hold(model_dir: Path) -> None:
    config = make_config(model_dir, {"fsdp": 2, "tensor": 2, "sequence": 2})
    report = build_report(config, draw=("blocks.mlp.gate", "blocks.attention.k"))
    layout = build_layout(config.mesh)
    params = load_params(model_dir, layout)
    order = [device.id for device in layout.mesh.devices.flat]
    for drawing, leaf in zip(
        report.drawings, (params["blocks"]["mlp"]["gate"], params["blocks"]["attention"]["k"]), strict=False
    ):
        index = {shard.device.id: str(shard.index) for shard in leaf.addressable_shards}
        assert len(set(index.values())) == np.prod(drawing.counts) == len(set(drawing.parts))
        assert len(set(zip(drawing.parts, (index[i] for i in order), strict=True))) == len(set(drawing.parts))
    batch = report.drawings[-1]
    assert batch.counts == (2, 2) and "batch in 2 parts (fsdp), length in 2 parts (sequence)" in batch.legend
    # The mesh's order: fsdp, sequence, tensor; along tensor devices have the same rows and tokens.
    assert batch.labels == ("0.0", "0.0", "0.1", "0.1", "1.0", "1.0", "1.1", "1.1")


def test_sizes_are_enough(odd_dir: Path) -> None:
    """No weights are read, and no program runs."""
    assert make_report(odd_dir, {}).num_parameters > 100_000


# --- rules ------------------------------------------------------------------------------------------------


def test_every_dim_has_a_meaning() -> None:
    assert all(DIMS.keys() == table.keys() for table in STRATEGIES.values())


def test_a_rule_of_the_config_changes_table_and_bytes(model_dir: Path) -> None:
    plain, changed = (make_report(model_dir, {"tensor": 2, "rules": rules}) for rules in ({}, {"embed": []}))
    assert [row.dim for row in plain.rules if row.changed] == []
    (row,) = [row for row in changed.rules if row.changed]
    assert (row.dim, row.axes, row.table, row.ways) == ("embed", (), ("fsdp",), 1)
    before, after = (rows_by_name(report.parameters)["blocks.mlp.up"] for report in (plain, changed))
    assert before.spec == ((), ("fsdp",), ("tensor",)) and after.spec == ((), (), ("tensor",))
    assert after.bytes_per_device == 4 * (before.bytes_per_device or 0)
    text = render(changed)
    assert re.search(r"^embed\* +- \[fsdp\] +1 ", text, re.M) and "* by mesh.rules of the config" in text
    assert "by mesh.rules" not in render(plain)


def test_rules_from_a_file(drift: Drift, tmp_path: Path, model_dir: Path) -> None:
    raw = {"run_dir": "r", "model": {"path": str(model_dir)}, "mesh": {"tensor": 2, "rules": {"hidden": ["tensor"]}}}
    code, out, err = drift("mesh", write_yaml(tmp_path / "config.yaml", raw))
    assert code == 0, err
    assert re.search(r"^hidden\* +tensor \[-\] +2 ", out, re.M)
    assert re.search(r"^hidden states +batch \?/fsdp  length \?  hidden 64/tensor *$", out, re.M)
    raw["mesh"]["rules"] = {"mlp": ["tensor", "fsdp"]}
    code, _, err = drift("mesh", write_yaml(tmp_path / "config.yaml", raw))
    assert code == 2
    assert "MLP: dims 'batch' and 'mlp' of ('batch', 'length', 'mlp') both want mesh axis 'fsdp'" in err
    assert "Change mesh.rules.mlp or mesh.rules.batch." in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["mesh.tensor=3"], "8 devices cannot be divided by 3"),
        (["mesh.tensor=3", "mesh.fsdp=2"], "needs 6 devices, 8 are here"),
        (["mesh.tensor=8"], "dim 'heads' of size 4 cannot be split 8 ways"),
        (["mesh.strategy=fast"], "mesh.strategy 'fast' is not known"),
        (["mesh.rules={fsdp: [embed]}"], "mesh.rules.fsdp: there is no such dim"),
        (["model.path=./nowhere"], "no model directory at ./nowhere"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(
    drift: Drift,
    tmp_path: Path,
    model_dir: Path,
    changes: list[str],
    words: str,
) -> None:
    path = write_yaml(tmp_path / "config.yaml", {"run_dir": "r", "model": {"path": str(model_dir)}})
    code, out, err = drift("mesh", path, *(word for change in changes for word in ("--set", change)))
    assert code == 2 and out == "" and words in err, err


# --- notes ------------------------------------------------------------------------------------------------


def test_kv_heads_that_are_whole(model_dir: Path) -> None:
    report = make_report(model_dir, {"fsdp": 2, "tensor": 4})
    row = rows_by_name(report.parameters)["blocks.attention.k"]
    assert row.spec == ((), ("fsdp",), (), ()) and row.bytes_per_device == 3 * 32 * 2 * 16 * 4
    assert row.whole == {"kv_heads": "kv_heads 2 cannot be split 4 ways (tensor)"}
    assert not rows_by_name(report.parameters)["blocks.attention.q"].whole
    assert any(note.startswith("kv_heads 2 cannot be split 4 ways (tensor)") for note in report.notes)
    text = render(report)
    assert re.search(r"^  k +embed 64/fsdp  kv_heads 2\*  head_dim 16 +12\.0 KiB *$", text, re.M)
    assert "\n* kv_heads 2 cannot be split 4 ways (tensor)" in text


def test_a_vocabulary_that_is_padded(odd_dir: Path, model_dir: Path) -> None:
    report = make_report(odd_dir, {"tensor": 2})
    assert rows_by_name(report.parameters)["embed"].spec == ((), ("fsdp",))
    (note,) = report.notes
    assert note.startswith("vocab 381 is padded to 384 words where it meets tokens, for 8 ways (tensor x fsdp).")
    assert rows_by_name(report.activations)["logits"].shape == (None, None, 384)
    assert make_report(model_dir, {"tensor": 2}).notes == ()


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"batch": []}, "mesh axis 'fsdp' (4 devices) splits no work of the layers"),
        ({"mlp": []}, "mesh axis 'tensor' (2 devices) does not split MLP: there its devices compute the same."),
        ({"vocab_slice": ["fsdp"]}, "mesh axis 'tensor' (2 devices) does not split logits"),
        ({"mlp": [], "hidden": ["tensor"]}, None),
    ],
    ids=str,
)
def test_axes_whose_devices_do_the_same(model_dir: Path, rules: dict[str, list[str]], words: str | None) -> None:
    notes = make_report(model_dir, {"tensor": 2, "rules": rules}).notes
    assert len(notes) == (words is not None) and all(note.startswith(words or "") for note in notes)


def test_what_a_run_would_refuse_is_a_remark(model_dir: Path) -> None:
    report = make_report(model_dir, {}, batch_size=12)
    assert len(report.problems) == 1 and "= 12 pairs cannot be split over 8 devices" in report.problems[0]
    text = " ".join(render(report).split())
    assert f"drift run would refuse this: {report.problems[0]}" in text and "1.5 pairs each" in text


def test_axes_between_hosts() -> None:
    processes = np.arange(16).reshape(2, 4, 1, 2) // 4
    assert find_axes_across(("data", "fsdp", "sequence", "tensor"), processes) == ("data", "fsdp")
    assert find_axes_across(("data", "fsdp", "sequence", "tensor"), np.zeros((2, 4, 1, 2))) == ()
    assert join_ids([0, 3, 1, 2, 8]) == "0-3, 8"


def test_hosts_and_their_devices(model_dir: Path) -> None:
    report = make_report(model_dir, {"data": 2})
    assert [(host.process, host.devices) for host in report.hosts] == [(0, tuple(range(8)))]
    hosts = tuple(HostRow(i, (2 * i, 2 * i + 1)) for i in range(20))
    text = render(dataclasses.replace(report, hosts=hosts, across_hosts=("data", "fsdp")))
    assert "process 6: devices 12-13" in text and "process 7" not in text
    assert "... and 13 more, 2 devices on the last" in text
    assert "between hosts goes what is sent along data, fsdp" in text


def test_two_processes_show_their_mesh_once(tmp_path: Path, model_dir: Path) -> None:
    raw = {"run_dir": "r", "model": {"path": str(model_dir)}, "mesh": {"tensor": 2}}
    path, port = write_yaml(tmp_path / "config.yaml", raw), free_port()
    words = ["drift_jax", "mesh", path, "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id"]
    (code, text), other = finish([start_one([*words, i], 2) for i in range(2)], 120)
    assert code == 0 and other == (0, ""), (text, other)
    assert "process 0: devices" in text and "process 1: devices" in text
    assert re.search("between hosts goes what is sent along fsdp *$", text, re.M)
    assert "\ndevices  a cell per device" in text


def test_devices_in_another_order_are_drawn(model_dir: Path) -> None:
    devices = [jax.devices()[i] for i in (0, 1, 3, 2)]
    report = build_report(make_config(model_dir, {}), devices)
    assert [drawing.name for drawing in report.drawings][:2] == ["devices", "blocks.mlp.gate"]
    assert report.drawings[0].labels == ("0", "1", "3", "2") and report.hosts[0].devices == (0, 1, 3, 2)


# --- text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "mesh",
    [{}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "sequence": 2}, {"fsdp": 2, "tensor": 2, "sequence": 2}],
    ids=str,
)
def test_nothing_is_wider_than_the_terminal(model_dir: Path, mesh: dict[str, Any], width: int) -> None:
    report = make_report(model_dir, mesh)
    text = render(report, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for row in report.parameters:  # each has one line, which ends with its bytes
        name, size = row.name.rpartition(".")[2], format_bytes(row.bytes_per_device or 0)
        assert re.search(rf"^ *{name} .* {size} *$", text, re.M), row.name
    assert ("PartitionSpec" in text) == (width == 120)


def test_one_device(model_dir: Path) -> None:
    text = render(build_report(make_config(model_dir, {}), jax.devices()[:1]))
    assert "1 x cpu (cpu)" in text and "process 0: devices 0" in text and text.count("\n all ") == 2


def test_colours_are_the_parts(model_dir: Path) -> None:
    report = make_report(model_dir, {"fsdp": 4, "tensor": 2})
    text = render(report, colour=True)
    drawn = text[text.index("blocks.mlp.gate") :].split("a micro-batch")
    assert [len(set(re.findall(r"48;2;\d+;\d+;\d+", part))) for part in drawn] == [8, 4]
    assert "\x1b" not in render(report)


@pytest.mark.parametrize("cell", [3, 6])
@pytest.mark.parametrize(
    "sizes",
    [(1,), (8,), (7,), (251,), (512,), (128, 2), (2, 256), (2, 4, 2), (2, 8, 16), (3, 5, 7)],
    ids=str,
)
def test_cells_of_any_mesh_fit(sizes: tuple[int, ...], cell: int) -> None:
    axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=False))
    lines = lay_out(axes, cell, 80)
    assert [i for line in lines for i in range(line.first, line.last + 1)] == list(range(int(np.prod(sizes))))
    margin = max(len(line.label) for line in lines) + 1
    assert max(line.last - line.first + 1 for line in lines) * cell + margin <= 80
    assert len(lines) == len({line.label for line in lines})
    assert len(lines) <= max(8, 3 * np.prod(sizes) * cell / (80 - margin))


def test_devices_that_are_not_here(tmp_path: Path, model_dir: Path) -> None:
    """In a process of its own, in which JAX starts with as many; piped, so without colour and 80 columns wide."""
    raw = {"run_dir": "r", "model": {"path": str(model_dir), "attention": "splash"}, "mesh": {"tensor": 2}}
    path = write_yaml(tmp_path / "config.yaml", raw)
    hidden = {"XLA_FLAGS", "COLUMNS", "FORCE_COLOR", "JAX_NUM_CPU_DEVICES"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"PYTHONPATH": str(REPO)}
    words = [sys.executable, "-m", "drift_jax", "mesh", str(path), "--devices", "16"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "data 1 x fsdp 8 x tensor 2 x sequence 1" in done.stdout and "16, planned for" in done.stdout
    assert "\x1b" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    assert re.search(r"^fsdp 7 +7\.0 +7\.1 *$", done.stdout, re.M)
    assert list(tmp_path.iterdir()) == [path]


def test_more_devices_than_jax_has_started_with(model_dir: Path) -> None:
    assert len(plan_devices(4)) == 4
    with pytest.raises(ConfigError, match=r"--devices 16: JAX has started with 8 CPU devices"):
        plan_devices(16)


def test_json_is_one_object(drift: Drift, tmp_path: Path, model_dir: Path) -> None:
    path = write_yaml(tmp_path / "config.yaml", {"run_dir": "r", "model": {"path": str(model_dir)}})
    code, out, _ = drift("mesh", path, "--json", "--devices", 4, "--set", "mesh.data=2", "--draw", "embed")
    found = json.loads(out)
    assert code == 0 and found["planned"] and found["devices"] == 4
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1} and found["strategy"] == "data+fsdp"
    report = build_report(make_config(model_dir, {"data": 2}), jax.devices()[:4])
    assert [row["bytes_per_device"] for row in found["parameters"]] == [r.bytes_per_device for r in report.parameters]
    assert [drawing["name"] for drawing in found["drawings"]] == ["embed", "a micro-batch, rows x tokens"]
    code, _, err = drift("mesh", path, "--draw", "blocks.mlp.gates")
    assert code == 2 and "no parameter 'blocks.mlp.gates' to draw; there are embed, head, norm, blocks." in err


def test_the_mesh_of_defaults_is_that_of_a_run(model_dir: Path) -> None:
    assert make_report(model_dir, {}).mesh == build_layout(MeshConfig()).sizes
