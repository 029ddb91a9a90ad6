"""Memory per chip of the real DPO step on a TPU slice that is not there, as one line of JSON.

    python scripts/bench_memory.py --model qwen2.5-7b --topology v5e:4x4 [--pairs 32] [--set KEY=VALUE ...]

The TPU compiler compiles the very step that `drift train` runs, for the whole slice, on a batch of the worst case:
every pair with the longest prompt and the longest completions. What does not fit fails with the compiler's own words.
Needs libtpu (`pip install 'drift-jax[plan]'`), no TPU. Sizes in GiB, time in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # runs from a checkout that is not installed

# HBM of a chip that programs can use, as the compiler counts it, by the name of the slice's generation.
LIMIT_GIB = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "v4": 31.75}


def build_step(args: argparse.Namespace) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """(the mesh, the trainer's jitted step, its abstract arguments, what the batch looks like)."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from drift_jax.config import apply_override, build_config
    from drift_jax.data.batches import PairLoader, batch_shardings, batch_split
    from drift_jax.data.pairs import TokenizedPair
    from drift_jax.sharding import build_layout
    from drift_jax.stages.dpo import build_trainer
    from scripts.architectures import write_architecture

    raw: dict[str, Any] = {
        "run_dir": "unused",
        "model": {"path": args.model},
        "train": {"batch_size": args.pairs},
        "data": {"max_length": args.prompt + args.completion},
    }
    for override in args.set:
        apply_override(raw, override)
    config = build_config(raw)
    layout = build_layout(
        config.mesh, topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, write_architecture(args.model, Path(folder)), layout, steps=100)
    prompt, completion = (np.zeros(count, np.int32) for count in (args.prompt, args.completion))
    pairs = [TokenizedPair(str(i), prompt, completion, completion) for i in range(args.pairs)]
    loader = PairLoader(
        pairs,
        np.zeros((args.pairs, 2)),
        args.pairs,
        config.train.accumulation_steps,
        config.data.max_length,
        split=batch_split(layout),
        tokens_per_device=config.train.tokens_per_device,
    )
    batch = loader.shuffled(0)
    placed = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        batch,
        batch_shardings(batch, layout),
    )
    rows = {"micro_batches": int(batch.micro_batches), "rows": batch.ids.shape[1], "row_length": batch.ids.shape[2]}
    return layout, trainer.jitted_step, (trainer.abstract_state, placed), rows


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import jax

    layout, step, abstract, rows = build_step(args)
    row: dict[str, Any] = {"model": args.model, "topology": args.topology, "pairs": args.pairs, "set": args.set}
    row |= rows | {"mesh": layout.sizes, "limit_gib": LIMIT_GIB[args.topology.split(":")[0]]}
    start = time.monotonic()
    try:
        with use_layout(layout):
            compiled = step.lower(*abstract).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)G of", str(error))
        return row | {"hbm_gib_per_chip": used and float(used[1]), "fits": False, "compiler": str(error)[:400]}
    m = compiled.memory_analysis()
    # The outputs are the donated arguments.
    total = (m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes) / 2**30
    if args.hlo:
        args.hlo.write_text(compiled.as_text(), encoding="utf-8")
    return row | {
        "hbm_gib_per_chip": round(total, 3),
        "fits": total <= row["limit_gib"],
        "state_gib": round(m.argument_size_in_bytes / 2**30, 3),
        "temporaries_gib": round(m.temp_size_in_bytes / 2**30, 3),
        "compile_s": round(time.monotonic() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-7b", help="a name of scripts/architectures.py")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of an update")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--completion", type=int, default=1024, help="tokens of each completion")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="config keys, as in drift train"
    )
    parser.add_argument("--hlo", type=Path, help="where the compiled program is written as text")
    args = parser.parse_args()
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ["JAX_PLATFORMS"] = "cpu"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True)
    import jax

    row = measure(args) | {"commit": commit.stdout.strip(), "versions": {"jax": jax.__version__}}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
