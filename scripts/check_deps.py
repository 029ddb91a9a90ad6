"""Whether the lower bounds of pyproject.toml are true, and whether what is installed has known vulnerabilities.

    python scripts/check_deps.py [lowest] [audit] [--strict] [--tools .venv-deps]      `make check-deps`

`lowest` makes a fresh .venv-lowest with the lowest versions that pyproject.toml allows (uv's `lowest-direct`), runs the
debug recipe on them, and those tests that need neither torch nor a model. `audit` asks pip-audit about the packages of
this interpreter. Where the vulnerability service cannot be reached, or the index is a mirror without its data,
it says so; that is an error with --strict only. Both need the network, so neither is part of `make check`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
LOWEST = REPO / ".venv-lowest"
# Of the extras: what the tests below need.
TEST_PACKAGES = ("pytest", "pytest-xdist", "hypothesis", "beartype", "py3langid")
TESTS = (
    "tests/test_config.py",
    "tests/test_credentials.py",
    "tests/test_endpoint.py",
    "tests/test_judging.py",
    "tests/test_progress.py",
    "tests/data/test_chosen.py",
    "tests/data/test_complaint_rules.py",
    "tests/data/test_mixer.py",
    "tests/data/test_packing.py",
    "tests/data/test_prompts.py",
    "tests/data/test_tables.py",
    "tests/data/test_template_trial.py",
    "tests/data/test_tokenizer.py",
    "tests/mining/test_hygiene.py",
    "tests/mining/test_logs.py",
    "tests/mining/test_sources.py",
)
# Of these files; it makes a model with torch.
NEEDS_TORCH = ("tests/test_credentials.py::test_no_file_of_a_run_holds_a_key",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="{lowest,audit}", help="default: both")
    parser.add_argument("--strict", action="store_true", help="an audit that could not be made is an error")
    parser.add_argument("--tools", type=Path, default=REPO / ".venv-deps", help="environment with uv and pip-audit")
    args = parser.parse_args()
    what = args.what or ["lowest", "audit"]
    if unknown := set(what) - {"lowest", "audit"}:
        parser.error(f"lowest or audit, found {', '.join(sorted(unknown))}")
    bin_dir = args.tools / "bin"
    codes = []
    if "lowest" in what:
        codes.append(check_lowest(str(bin_dir / "uv")))
    if "audit" in what:
        codes.append(audit(str(bin_dir / "pip-audit"), args.strict))
    return max(codes)


def test_requirements() -> list[str]:
    """With their lower bounds."""
    extras = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return [line for lines in extras.values() for line in lines if re.split("[<>=]", line)[0] in TEST_PACKAGES]


def check_lowest(uv: str) -> int:
    """0 where the debug recipe and the tests pass on the lowest versions."""
    shutil.rmtree(LOWEST, ignore_errors=True)
    python = str(LOWEST / "bin" / "python")
    with tempfile.TemporaryDirectory(prefix="drift-lowest-") as folder:
        model, run = Path(folder) / "model", Path(folder) / "run"
        recipe = ["-m", "drift_jax", "run", "configs/debug.yaml", "--run-dir", str(run)]
        lowest = ["--resolution", "lowest-direct"]
        left_out = [f"--deselect={name}" for name in NEEDS_TORCH]
        commands = [
            [uv, "venv", "--quiet", "--python", sys.executable, str(LOWEST)],
            [uv, "pip", "install", "--quiet", "--python", python, *lowest, ".", *test_requirements()],
            [python, "scripts/make_tiny_model.py", "--out", str(model)],
            [python, *recipe, "--set", f"model.path={model}"],
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *left_out],
        ]
        environment = os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
        for command in commands:
            code = subprocess.run(command, cwd=REPO, env=environment).returncode
            if code:
                print(f"lowest versions: {' '.join(command[:6])} ended with {code}", file=sys.stderr)
                return 1
    print("lowest versions: the debug recipe and the tests pass")
    return 0


def audit(pip_audit: str, strict: bool) -> int:
    """0 where no vulnerability is known, or, unless `strict`, nothing could be learnt."""
    words = [pip_audit, "--format", "json", "--progress-spinner", "off", "--timeout", "30", "--skip-editable"]
    words += [word for path in site_packages() for word in ("--path", path)]
    done = subprocess.run(words, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
        return tell_unknown(f"pip-audit could not ask its service: {last}", strict)
    return judge_audit(packages, strict)


def judge_audit(packages: Sequence[dict[str, Any]], strict: bool) -> int:
    """What pip-audit's JSON says: 1 for a vulnerability; packages that its service does not know are named."""
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [(package, vuln) for package in packages for vuln in package.get("vulns", ())]
    for package, vuln in found:
        fixed = ", ".join(vuln.get("fix_versions") or ()) or "none"
        print(f"{package['name']} {package['version']}: {vuln['id']}; fixed in: {fixed}")
    if found:
        print(f"audit: {len(found)} known vulnerabilities", file=sys.stderr)
        return 1
    known = len(packages) - len(skipped)
    if known < len(skipped):
        reason = f"the package index has no vulnerability data for {len(skipped)} of {len(packages)} packages"
        return tell_unknown(reason, strict)
    print(f"audit: no known vulnerabilities in {known} packages; not known to the service: {', '.join(skipped) or '-'}")
    return 0


def tell_unknown(why: str, strict: bool) -> int:
    print(f"audit: SKIPPED, nothing is known: {why}.", file=sys.stderr)
    return 1 if strict else 0


def site_packages() -> list[str]:
    return [path for path in sys.path if path.endswith("site-packages")]


if __name__ == "__main__":
    sys.exit(main())
