"""Peak host memory of loading a Hugging Face directory, and of writing one, as one line of JSON.

    python scripts/bench_load.py [--model .cache/demo_model] [--dtype float32] [--devices 1] [--export]
    python scripts/bench_load.py --shape qwen2.5-7b --dtype bfloat16 --devices 8 --export

The limit is 1.3 times the loaded parameters plus 0.5 GiB for the runtime. A fresh process measures, since the peak of
a process never falls. `peak_over_params` is that peak, runtime and all, in parameters; `ratio` leaves out what the
process had before it began. With --export the process then writes what it loaded, in the same dtype, into a folder
beside the model that is removed again, and the peak is that of both. --shape takes random weights, made by
`make_random_model.py` in .cache/ (or --model) when they are not there. `peer_peak_rss_gib` is transformers'
`from_pretrained` in a process of its own, where torch is installed (--peer transformers).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # runs from a checkout that is not installed

from drift_jax.errors import DriftError  # noqa: E402
from drift_jax.models.architecture import load_hf_config  # noqa: E402
from drift_jax.models.published import ARCHITECTURES  # noqa: E402


def measure_ours(model: Path, dtype: str, devices: int, export: bool) -> dict[str, float]:
    """Loads, and writes, in this process. Sizes in GiB, time in seconds."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    import jax.numpy as jnp

    from drift_jax.config import MeshConfig
    from drift_jax.models.hf import load_params
    from drift_jax.models.hf_export import save_hf
    from drift_jax.sharding import build_layout
    from drift_jax.telemetry import peak_rss_gib

    jnp.zeros(1).block_until_ready()
    start_rss, start = peak_rss_gib(), time.monotonic()
    params = jax.block_until_ready(load_params(model, build_layout(MeshConfig()), dtype))
    seconds, load_peak = time.monotonic() - start, peak_rss_gib()
    row: dict[str, float] = {}
    if export:
        out, start = model.with_name(model.name + ".export"), time.monotonic()
        try:
            save_hf(params, model, out, dtype)
            row |= {
                "load_peak_rss_gib": round(load_peak, 3),
                "export_seconds": round(time.monotonic() - start, 2),
                "export_gib": round(sum(file.stat().st_size for file in out.glob("*.safetensors")) / 2**30, 3),
            }
        finally:
            shutil.rmtree(out, ignore_errors=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**30
    peak = peak_rss_gib()
    limit = 1.3 * size + 0.5
    return row | {
        "params_gib": round(size, 3),
        "runtime_gib": round(start_rss, 3),
        "peak_rss_gib": round(peak, 3),
        "peak_over_params": round(peak / size, 3),
        "limit_gib": round(limit, 3),
        "ratio": round((peak - start_rss) / size, 3),
        "fits": peak <= limit,
        "seconds": round(seconds, 2),
    }


def measure_transformers(model: Path, dtype: str) -> dict[str, float]:
    """The peer: transformers and torch."""
    import torch
    from transformers import AutoModelForCausalLM

    from drift_jax.telemetry import peak_rss_gib

    start = time.monotonic()
    AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), trust_remote_code=False)
    return {"peer_peak_rss_gib": round(peak_rss_gib(), 3), "peer_seconds": round(time.monotonic() - start, 2)}


def main() -> int:
    try:
        run_benchmark()
    except DriftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_benchmark() -> None:
    """Raises `DriftError` for a model that cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: .cache/demo_model, or .cache/random-SHAPE")
    parser.add_argument("--shape", choices=tuple(ARCHITECTURES), help="random weights in the shape of this model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--devices", type=int, default=1, help="fake CPU devices that share the parameters")
    parser.add_argument("--export", action="store_true", help="also write what was loaded")
    parser.add_argument("--peer", choices=("none", "transformers"), default="none")
    parser.add_argument("--child", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.model or REPO / ".cache" / (f"random-{args.shape}" if args.shape else "demo_model")
    if args.child == "ours":
        print(json.dumps(measure_ours(model, args.dtype, args.devices, args.export)))
    elif args.child == "transformers":
        print(json.dumps(measure_transformers(model, args.dtype)))
    else:
        if args.shape:
            from scripts.make_random_model import make_random_model

            make_random_model(ARCHITECTURES[args.shape], model)
        load_hf_config(model)  # what is no model's directory is said here, not in the child
        row = {
            "bench": "load and export" if args.export else "load",
            "model": model.name,
            "dtype": args.dtype,
            "devices": args.devices,
            "peer": args.peer,
        }
        for child in ("ours", *(() if args.peer == "none" else (args.peer,))):
            words = [sys.executable, __file__, *sys.argv[1:], "--child", child]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
            if done.returncode == 2:  # it has said why
                sys.exit(2)
            done.check_returncode()
            row |= json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
