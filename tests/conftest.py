"""Set-up of every test: fake devices, shapes checked at run time, and the demo model for those who ask."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.version import Version

if "PYTEST_XDIST_WORKER" in os.environ:
    # torch's threads wait for each other by spinning: beside another worker two of them are slower than one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if (
    "JAX_PLATFORMS" not in os.environ
    and "PYTEST_XDIST_WORKER" not in os.environ
    and Version(metadata.version("jaxlib")) < Version("0.11")
):
    # Most of the time was that of LLVM and of the emitter of fusions. Sharding, collectives and products of a program
    # are the same without; the fusions are others, and a scatter becomes a loop. Also in the commands that tests
    # start. What XLA_FLAGS says already is said last, and JAX_PLATFORMS=cpu leaves all as users have it. Later versions
    # have no such emitter to turn off (the process ends at the flag), and at level 0 last bits depend on the mesh.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    quick += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax
import pytest
from beartype import BeartypeConf, beartype
from filelock import FileLock
from jaxtyping import install_import_hook

REPO = Path(__file__).resolve().parent.parent

# Eight devices, for every mesh of up to eight; an array without a sharding stays on the first one.
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile the same small programs again and again: across files, runs, pytest-xdist's workers and the commands
# that tests start, which find the directory in the environment.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / "jax_test"))
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# A command that is started again and again compiles all of its programs each time, small ones too.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
# At once: a test that asks for another number, as the first that uses JAX, would have it for all that follow.
jax.devices()

# Tracing makes objects by the million that live as long as their program: looking through them every 700 allocations
# was a tenth of the time.
gc.set_threshold(50_000, 20, 100)

# Every signature of drift_jax is checked on every call; so this comes before drift_jax is imported.
# beartype, because typeguard 4 reads the shape in Float[Array, "B T"] as Python source and fails on it.
# An int may stand where a float is asked for, as PEP 484 has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
install_import_hook("drift_jax", "tests.conftest.checked")


@pytest.fixture(autouse=True)
def programs_of_this_test() -> None:
    """A test that replaces part of a program must not get the one that the test before has traced."""
    from drift_jax import compiled

    compiled._LAST.clear()


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The converted demo model: in DRIFT_DEMO_MODEL or `.cache/demo_model`, fetched when it is not there."""
    out = Path(os.environ.get("DRIFT_DEMO_MODEL", REPO / ".cache" / "demo_model"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(out.name + ".lock")):  # pytest-xdist: one process fetches, the others wait
        script = REPO / "scripts" / "get_demo_model.py"
        subprocess.run([sys.executable, str(script), "--out", str(out)], check=True, cwd=REPO)
    return out
