"""What devices send each other in a decoding step of the JAX sampler, as one line of JSON. No device is needed.

    python scripts/bench_sampler_mesh.py [--model qwen2.5-7b] [--topology h100:8] [--rows 128] [--set KEY=VALUE ...]

The decoding loop is compiled for the whole slice (or for one host of it, where the policy fits there) twice: split as
the sampler splits it, and over `fsdp`, as training is split by default. `mb_per_step` and `fsdp_mb_per_step` are
what one device gets from others for a new token of every row, in 1e6 bytes; `ratio` is the second over the first.
Where the program over `fsdp` does not fit, `fsdp_failed` has the compiler's words.
`gib_per_device` is all that the program holds. A topology of TPUs needs libtpu, one of GPUs jax's CUDA plugin.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # runs from a checkout that is not installed

from drift_jax.config import MeshConfig, apply_override, build_config  # noqa: E402
from drift_jax.errors import DriftError  # noqa: E402
from drift_jax.plan.slices import open_slice  # noqa: E402

if TYPE_CHECKING:
    from drift_jax.plan.collectives import Collective
    from drift_jax.plan.programs import Programs
    from drift_jax.sharding import Layout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-7b", help="a name of drift_jax/models/published.py, or a directory")
    parser.add_argument("--topology", default="h100:8")
    parser.add_argument("--rows", type=int, default=128, help="rows decoded together")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="config keys, as in drift run")
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

    from drift_jax.models.architecture import qwen_config_from_hf
    from drift_jax.models.published import find_architecture
    from drift_jax.plan.programs import build_programs, sampling_layout_of
    from drift_jax.sharding import build_layout

    raw: dict[str, Any] = {"run_dir": "unused", "model": {"path": args.model}, "sampling": {"batch_size": args.rows}}
    for change in args.set:
        apply_override(raw, change)
    config, architecture = build_config(raw), find_architecture(args.model)
    model = qwen_config_from_hf(architecture, args.model)
    programs = build_programs(config, architecture, where)
    ours = sampling_layout_of(config, model, where)
    devices = ours.mesh.devices.flatten().tolist()
    bytes_ours, gib, seconds = compile_sampler(programs, ours)
    bytes_fsdp, failed = None, None
    try:
        bytes_fsdp, _, _ = compile_sampler(programs, build_layout(MeshConfig(fsdp=len(devices)), devices))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        failed = str(error).splitlines()[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True)
    return {
        "bench": "sampler_mesh",
        "model": args.model,
        "topology": args.topology,
        "rows": config.sampling.batch_size,
        "mesh": ours.sizes,
        "mb_per_step": round(bytes_ours / 1e6, 3),
        "fsdp_mb_per_step": round(bytes_fsdp / 1e6, 3) if bytes_fsdp else None,
        "ratio": round(bytes_fsdp / bytes_ours, 1) if bytes_fsdp and bytes_ours else None,
        "fsdp_failed": failed,
        "weights_mb": round(model.num_parameters * jax.numpy.dtype(config.sampling.compute_dtype).itemsize / 1e6, 3),
        "gib_per_device": round(gib, 2),
        "compile_s": round(seconds, 1),
        "commit": commit.stdout.strip(),
        "versions": {"jax": jax.__version__},
    }


def compile_sampler(programs: Programs, layout: Layout) -> tuple[float, float, float]:
    """(bytes that a device gets in a step, GiB that the program holds, seconds of its compilation)."""
    from drift_jax.plan.collectives import find_collectives
    from drift_jax.plan.hlo import read_program
    from drift_jax.plan.rows import GIB, total_bytes

    start = time.monotonic()
    compiled = programs.compile_sampler(layout)
    seconds = time.monotonic() - start
    program = read_program(compiled.as_text())
    sent = find_collectives(program, dict(layout.mesh.shape), programs.count_region)
    tokens = programs.config.sampling.max_new_tokens
    return sum(received(c) for c in sent) / tokens, total_bytes(compiled) / GIB, seconds


def received(collective: Collective) -> float:
    """Bytes that one device gets from others, on a ring: of a gather all but its own part, of a sum that twice."""
    devices = max(map(len, collective.groups), default=1)
    others = 1.0 if collective.kind == "collective-permute" else (devices - 1) / devices
    return collective.total_bytes * others * (2 if collective.kind == "all-reduce" else 1)


if __name__ == "__main__":
    sys.exit(main())
