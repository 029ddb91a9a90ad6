"""`drift doctor`: devices, versions, free memory and missing extras of this machine, each with its remedy.

Nothing here needs an optional package, a network or a configuration, and a broken jax is a line of the report
rather than a traceback.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.markers import UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.markup import escape
from rich.table import Table

DISTRIBUTION = "drift-jax"
CORE_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
Status = Literal["ok", "note", "warning", "error"]
# Extras that do not go beside the package: vLLM pins versions of its own, and where JAX finds libtpu, every command
# looks for a TPU first.
_APART = {
    "vllm": "in an environment of its own: python -m venv ~/vllm && ~/vllm/bin/pip install vllm; then name it, "
    "vllm.python: /home/ME/vllm/bin/python",
    "plan": f'in an environment of its own: python -m venv ~/plan && ~/plan/bin/pip install "{DISTRIBUTION}[plan]"; '
    "then ~/plan/bin/drift plan",
}
_STYLES: dict[Status, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True)
class Check:
    """One line of the report; `remedy` is what to do about it, empty when there is nothing to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def collect_checks(directory: str | Path = ".", device_root: str | Path = "/dev") -> list[Check]:
    """Every check, in the order shown.

    Args:
      directory: where a run would write; its free disk is reported.
      device_root: where the system lists its device files.
    """
    devices = _check_devices()
    return [
        *devices,
        *_check_accelerator_unused(devices, Path(device_root)),
        *_check_versions(),
        *_check_memory(),
        _check_disk(Path(directory)),
        *_check_extras(),
    ]


def render_checks(checks: Sequence[Check]) -> Table:
    """The report for a rich console."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for check in checks:
        remedy = f"\n[bold]->[/bold] {escape(check.remedy)}" if check.remedy else ""
        style = _STYLES[check.status]
        table.add_row(f"[{style}]{check.status}[/{style}]", escape(check.name), escape(check.detail) + remedy)
    return table


def run_doctor(console: Console | None = None) -> int:
    """Prints the report. Returns the exit code: 1 when jax cannot make an array, else 0."""
    checks = collect_checks()
    (console or Console()).print(render_checks(checks))
    return int(any(check.status == "error" for check in checks))


# --- devices ----------------------------------------------------------------------------------------------


def _check_devices() -> list[Check]:
    try:
        import jax
        import jax.numpy as jnp

        jnp.ones(()).block_until_ready()
        devices = jax.devices()
    except Exception as error:  # whatever a broken installation or driver raises
        remedy = "install again in a fresh virtual environment; on a GPU machine see whether nvidia-smi works."
        return [Check("jax", "error", f"cannot make an array: {type(error).__name__}: {error}", remedy)]
    first = devices[0]
    here = f", {jax.local_device_count()} on this host" if jax.process_count() > 1 else ""
    checks = [Check("devices", "ok", f"{len(devices)} x {first.device_kind} ({first.platform}){here}")]
    for device in jax.local_devices():
        stats = _read_memory_stats(device)
        if "bytes_limit" in stats:
            limit, used = stats["bytes_limit"] / 2**30, stats.get("bytes_in_use", 0) / 2**30
            detail = f"{limit - used:.1f} of {limit:.1f} GiB free for jax"
            checks.append(Check(f"device {device.id} memory", "ok", detail))
    return [*checks, _check_attention(first.platform)]


def _check_attention(platform: str) -> Check:
    """The attention back end that `attention: auto` means here, and what the others lack."""
    from drift_jax.models.attention import BACKENDS, resolve_attention

    chosen = resolve_attention("auto", platform).name
    missing = [
        f"{backend.name} needs a {backend.needs.upper()}"
        for backend in BACKENDS.values()
        if backend.needs not in (None, platform)
    ]
    return Check("attention", "ok", "; ".join([f"auto is {chosen} on {platform}", *missing]))


def _read_memory_stats(device: Any) -> dict[str, int]:
    try:
        return device.memory_stats() or {}
    except Exception:  # a backend without statistics says so in several ways
        return {}


def _check_accelerator_unused(devices: Sequence[Check], device_root: Path) -> Iterator[Check]:
    """An accelerator that this machine has and jax does not use: the most common silent slowness."""
    if not any("(cpu)" in check.detail for check in devices):
        return
    found = []
    if (device_root / "nvidia0").exists() or shutil.which("nvidia-smi"):
        found.append(("NVIDIA GPU", "cuda", "nvidia-smi lists it"))
    if any(device_root.glob("accel*")) or any(device_root.glob("vfio/[0-9]*")):
        found.append(("TPU", "tpu", "no other process holds it"))
    for name, extra, working in found:
        yield Check(
            name,
            "warning",
            "this machine seems to have one, but jax uses the CPU",
            f'pip install "{DISTRIBUTION}[{extra}]". If that is installed: see that {working} and that '
            "JAX_PLATFORMS is not set.",
        )


# --- versions, memory, disk -------------------------------------------------------------------------------


def _check_versions() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in CORE_PACKAGES:
        version = _read_version(name)
        if version is None:
            yield Check(name, "warning", "not installed", f'pip install "{DISTRIBUTION}"')
        else:
            yield Check(name, "ok", version)


def _read_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    yield Check("host memory", "ok", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")
    limit = _read_container_limit()
    if limit is not None and limit < memory.total:
        yield Check("container memory", "note", f"this container may use {limit / 2**30:.1f} GiB")


def _read_container_limit(path: str = "/sys/fs/cgroup/memory.max") -> int | None:
    """Bytes; None without a limit (the file then says "max", or is not there)."""
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _check_disk(directory: Path) -> Check:
    usage = shutil.disk_usage(directory)
    detail = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in {directory.resolve()}"
    if usage.free < 5 * 2**30:
        return Check("disk", "warning", detail, "make room: every stage keeps checkpoints and an exported policy.")
    return Check("disk", "ok", detail)


# --- extras -----------------------------------------------------------------------------------------------


def _check_extras() -> Iterator[Check]:
    """The extras are read from the package's own metadata, so this list cannot fall behind pyproject.toml."""
    try:
        extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        detail = f"the package {DISTRIBUTION} is not installed, only its files are on the path"
        yield Check("extras", "warning", detail, "pip install -e . in the checkout")
        return
    for extra in extras:
        missing = sorted(set(_find_missing(Requirement(f"{DISTRIBUTION}[{extra}]"))))
        if missing:
            detail = f"missing {', '.join(missing)}"
            remedy = _APART.get(extra, f'pip install "{DISTRIBUTION}[{extra}]"')
            yield Check(f"extra {extra}", "note", detail, remedy)
        else:
            yield Check(f"extra {extra}", "ok", "installed")


def _find_missing(requirement: Requirement) -> Iterator[str]:
    """Packages that the extras of `requirement` ask for and that are absent or of a wrong version.

    Follows extras of extras (`jax[cuda]`), not the ordinary dependencies of an installed package.
    """
    version = _read_version(requirement.name)
    if version is None:
        yield requirement.name
        return
    if not requirement.specifier.contains(version, prereleases=True):
        yield f"{requirement.name}{requirement.specifier} (found {version})"
        return
    for text in importlib.metadata.requires(requirement.name) or []:
        for extra in requirement.extras:
            needed = _parse_requirement(text, extra)
            if needed is not None:
                yield from _find_missing(needed)


def _parse_requirement(text: str, extra: str) -> Requirement | None:
    """The requirement when only `extra` brings it in on this machine, else None."""
    try:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            return None
        return requirement if marker.evaluate({"extra": canonicalize_name(extra)}) else None
    except (InvalidRequirement, UndefinedEnvironmentName):
        return None
