"""Memory per chip of the real DPO step on a TPU slice that is not there, as one line of JSON.

    python scripts/bench_memory.py --model qwen2.5-7b --topology v5e:4x4 [--pairs 32] [--set KEY=VALUE ...]

`drift plan` for one program and without a config: the TPU compiler compiles the very step that `drift train` runs, for
the whole slice, on a batch of the worst case: every pair with the longest prompt and the longest completions. What does
not fit is a line that says so. Needs libtpu (`pip install 'drift-jax[plan]'`), no TPU. Sizes in GiB, time in seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # runs from a checkout that is not installed

from drift_jax.config import RunConfig, apply_override, build_config  # noqa: E402
from drift_jax.errors import DriftError  # noqa: E402
from drift_jax.plan.slices import open_slice  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-7b", help="a name of drift_jax/models/published.py")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of an update")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--completion", type=int, default=1024, help="tokens of each completion")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="config keys, as in drift train"
    )
    parser.add_argument("--hlo", type=Path, help="where the compiled program is written as text")
    args = parser.parse_args()
    try:
        print(json.dumps(measure(args)))
    except DriftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    where = open_slice(args.topology)  # before JAX starts
    import jax

    from drift_jax.models.published import find_architecture
    from drift_jax.plan.rows import plan_row

    config, write = choose_config(args), lambda _, text: args.hlo.write_text(text, encoding="utf-8")
    architecture = find_architecture(config.model.path)
    row = plan_row(config, architecture, where, ["train"], on_text=write if args.hlo else None)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True)
    asked = {"model": args.model, "topology": args.topology, "set": args.set}
    return asked | row.to_json() | {"commit": commit.stdout.strip(), "versions": {"jax": jax.__version__}}


def choose_config(args: argparse.Namespace) -> RunConfig:
    raw: dict[str, Any] = {
        "run_dir": "unused",
        "model": {"path": args.model},
        "train": {"batch_size": args.pairs},
        "data": {"max_length": args.prompt + args.completion, "max_prompt_length": args.prompt},
    }
    for override in args.set:
        apply_override(raw, override)
    return build_config(raw)


if __name__ == "__main__":
    sys.exit(main())
