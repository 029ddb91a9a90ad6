"""`make bench`, with a Python that only notes what it is asked to run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (REPO / "scripts").glob("bench_*.py"))
# Notes the script, its options and PYTHONPATH's folder; bench_load fails, bench_mine without its file.
STUB = """#!/usr/bin/env bash
echo "$(basename "$1") ${*:2} path=$(basename "${PYTHONPATH:-}")" >> NOTES
case $1 in
    */make_wildfeedback.py) touch "$3" ;;
    */bench_mine.py) [[ -f $2 ]] ;;
    */bench_load.py) exit 3 ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def bench(folder: Path, *words: str) -> tuple[int, str, list[str]]:
    """Exit code of `make bench`, what it says on standard error, and the notes."""
    venv, notes = folder / "venv", folder / "notes"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text(STUB.replace("NOTES", str(notes)))
    (venv / "bin/python").chmod(0o755)
    for stamp in ("all", "tpu-compiler", "gpu-compiler"):
        (venv / f".installed-{stamp}").touch()
    # `make test` hands its own variables down.
    handed = ("ARGS", "SCRIPT", "WORKERS", "PYTHONPATH", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL")
    environment = {key: value for key, value in os.environ.items() if key not in handed}
    command = ["make", "bench", f"VENV={venv}", *words]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr, notes.read_text().splitlines() if notes.exists() else []


def test_all_run_with_what_they_need_and_a_failure_is_told_at_the_end(tmp_path: Path) -> None:
    code, said, notes = bench(tmp_path)
    ran = [line.split()[0] for line in notes]
    assert code != 0 and "failed: load\n" in said
    assert ran[0] == "get_demo_model.py" and [name for name in ran if name in SCRIPTS] == SCRIPTS
    paths = {line.split()[0]: line.rpartition("path=")[2] for line in notes}
    assert {name: path for name, path in paths.items() if path} == {
        "bench_memory.py": "tpu_compiler",
        "bench_sampler_mesh.py": "gpu_compiler",
    }


def test_options_go_to_the_script_that_is_named(tmp_path: Path) -> None:
    code, said, notes = bench(tmp_path / "one", "SCRIPT=step", "ARGS=--pairs 8")
    assert code == 0, said
    assert [line.split(" path=")[0] for line in notes] == ["get_demo_model.py ", "bench_step.py --pairs 8"]
    code, said, notes = bench(tmp_path / "none", "ARGS=--pairs 8")
    assert code != 0 and "name one, such as SCRIPT=step" in said and not notes
