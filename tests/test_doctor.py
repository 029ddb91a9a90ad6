"""`drift doctor` on healthy, broken and oddly equipped machines."""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement
from rich.console import Console

from drift_jax import doctor
from drift_jax.doctor import Check, collect_checks, render_checks, run_doctor

# What `importlib.metadata` says in these tests: installed distributions with versions and requirements.
INSTALLED = {
    "drift-jax": (
        "0.1.0",
        [
            "jax>=0.10",
            'ordinary; python_version >= "3"',  # a dependency with a marker, which no extra brings in
            'jax[cuda]; extra == "cuda"',
            'wandb>=0.23; extra == "trackers"',
            'tensorboardX>=2.6; extra == "trackers"',
            'drift-jax[trackers]; extra == "test"',
            'pytest>=9.0; extra == "test"',
            'nothing-here; extra == "windows" and sys_platform == "win32"',
            'vllm>=0.32; extra == "vllm"',
            'jax[tpu]; extra == "plan"',
        ],
    ),
    "jax": ("0.10.2", ["jaxlib", 'jax-cuda12-plugin[with-cuda]; extra == "cuda"', 'libtpu==0.0; extra == "tpu"']),
    "tensorboardX": ("2.6.4", []),
    "pytest": ("8.4", []),
}


@pytest.fixture()
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, list[str]]]:
    installed = dict(INSTALLED)

    def look_up(name: str) -> tuple[str, list[str]]:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", lambda name: look_up(name)[0])
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: look_up(name)[1])

    class Metadata:
        def get_all(self, key: str) -> list[str]:
            return ["cuda", "trackers", "test", "windows", "vllm", "plan"]

    def read_metadata(name: str) -> Metadata:
        look_up(name)
        return Metadata()

    monkeypatch.setattr(importlib.metadata, "metadata", read_metadata)
    return installed


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_report_of_this_machine(tmp_path: Path) -> None:
    checks = by_name(collect_checks(tmp_path, device_root=tmp_path))
    assert checks["devices"].detail == "8 x cpu (cpu)"
    assert checks["jax"] == Check("jax", "ok", importlib.metadata.version("jax"))
    assert checks["attention"].detail == "auto is xla on cpu; splash needs a TPU; triton needs a GPU"
    for name in ("python", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "host memory"):
        assert checks[name].status == "ok" and checks[name].detail
    assert str(tmp_path) in checks["disk"].detail
    assert run_doctor(Console(file=io.StringIO())) == 0


def test_missing_extras_come_with_their_command(packages: object, tmp_path: Path) -> None:
    checks = by_name(collect_checks(tmp_path, device_root=tmp_path))
    assert checks["extra cuda"] == Check(
        "extra cuda", "note", "missing jax-cuda12-plugin", 'pip install "drift-jax[cuda]"'
    )
    assert checks["extra trackers"].detail == "missing wandb"
    assert checks["extra test"].detail == "missing pytest>=9.0 (found 8.4), wandb"
    assert checks["extra windows"].status == "ok"  # nothing of it is for this system


@pytest.mark.parametrize("extra, command", [("vllm", "bin/pip install vllm;"), ("plan", '"drift-jax[plan]"; then')])
def test_what_belongs_in_an_environment_of_its_own_says_so(
    packages: object, tmp_path: Path, extra: str, command: str
) -> None:
    remedy = by_name(collect_checks(tmp_path, tmp_path))[f"extra {extra}"].remedy
    assert remedy.startswith("in an environment of its own: python -m venv ") and command in remedy


def test_an_installed_extra_is_ok(packages: dict[str, tuple[str, list[str]]], tmp_path: Path) -> None:
    packages["wandb"] = ("0.30", [])
    assert by_name(collect_checks(tmp_path, tmp_path))["extra trackers"] == Check("extra trackers", "ok", "installed")


def test_only_the_files_are_there(packages: dict[str, tuple[str, list[str]]], tmp_path: Path) -> None:
    del packages["drift-jax"]
    check = by_name(collect_checks(tmp_path, tmp_path))["extras"]
    assert check.status == "warning" and check.remedy.startswith("pip install -e .")


def test_the_real_extras_of_jax_are_followed() -> None:
    """`jax[cuda]` asks for a plugin package that the CPU installation of the test run does not have."""
    (missing,) = set(doctor._find_missing(Requirement("jax[cuda]")))
    assert "cuda" in missing


def make_nvidia(root: Path) -> None:
    (root / "nvidia0").touch()


def make_tpu_accel(root: Path) -> None:
    (root / "accel0").touch()


def make_tpu_vfio(root: Path) -> None:
    (root / "vfio").mkdir()
    (root / "vfio" / "0").touch()


@pytest.mark.parametrize(
    ("make", "name", "extra"),
    [(make_nvidia, "NVIDIA GPU", "cuda"), (make_tpu_accel, "TPU", "tpu"), (make_tpu_vfio, "TPU", "tpu")],
)
def test_an_accelerator_that_jax_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], name: str, extra: str
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert {"NVIDIA GPU", "TPU"}.isdisjoint(by_name(collect_checks(tmp_path, tmp_path)))
    make(tmp_path)
    check = by_name(collect_checks(tmp_path, tmp_path))[name]
    assert check.status == "warning" and f'pip install "drift-jax[{extra}]"' in check.remedy


def test_a_used_accelerator_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        device_kind, platform, id = "NVIDIA H100", "gpu", 0

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 60 * 2**30, "bytes_in_use": 6 * 2**30}

    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
    make_nvidia(tmp_path)
    checks = by_name(collect_checks(tmp_path, tmp_path))
    assert checks["devices"].detail == "1 x NVIDIA H100 (gpu)"
    assert checks["device 0 memory"].detail == "54.0 of 60.0 GiB free for jax"
    assert checks["attention"].detail == "auto is triton on gpu; splash needs a TPU"
    assert "NVIDIA GPU" not in checks


def test_a_broken_jax_is_a_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("Unable to initialize backend")

    monkeypatch.setattr(jax, "devices", fail)
    console = Console(file=io.StringIO(), width=200)
    assert run_doctor(console) == 1
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "error" in text and "RuntimeError: Unable to initialize backend" in text
    assert "transformers" in text  # the rest of the report is there


def test_a_full_disk_and_a_container_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: doctor.shutil._ntuple_diskusage(100, 99, 1))
    assert by_name(collect_checks(tmp_path, tmp_path))["disk"].status == "warning"
    limit = tmp_path / "memory.max"
    assert doctor._read_container_limit(str(limit)) is None
    limit.write_text("max\n")
    assert doctor._read_container_limit(str(limit)) is None
    limit.write_text(f"{2**30}\n")
    assert doctor._read_container_limit(str(limit)) == 2**30
    monkeypatch.setattr(doctor, "_read_container_limit", lambda: 2**30)
    detail = by_name(collect_checks(tmp_path, tmp_path))["container memory"].detail
    assert detail == "this container may use 1.0 GiB"


def test_text_from_outside_is_not_markup() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(render_checks([Check("extra [x]", "note", "[red]a[/red]", 'pip install "drift-jax[cuda]"')]))
    assert 'drift-jax[cuda]"' in console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]a[/red]" in console.file.getvalue()  # type: ignore[attr-defined]
