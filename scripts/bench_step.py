"""Pairs per second and memory of one epoch of DPO, ours beside a peer's on the same ids, as one line of JSON.

    python scripts/bench_step.py --peer trl|tunix|none [--pairs 16] [--max-length 512] [--batch-size 4]
        [--model .cache/demo_model | --shape qwen2.5-1.5b] [--data FILE] [--dtype float32|bfloat16] [--set a.b=c ...]
        [--profile 0|N]

The pairs are real: the reply that a user complained about against the reply after the complaint, cut to half of
--max-length for the prompt and to --max-length in all. They become ids once, here, and every side gives back a hash
of the ids that its trainer got. Each side runs alone, in a process and a Python of its own; `.venv-peers/` is filled
at the first use (--peer-python names one that is there already). A peer that fails, or is not done after --peer-limit
seconds, leaves our figures on the line, its own null and `peer_failed` saying why; the exit code is then 1.

Time (`seconds`): the reference pass and one epoch, after a warm-up that compiles; not loading weights, not tokenising.
`compile_s` is the first run less the second. `peak_rss_gb` is the peak of the whole process, compiling included, in
1e9 bytes. `real_token_share`: prompt once + both completions, over all the positions that a pass computes.

`tflops` counts what a pair needs, whatever a side computes besides (padding, prompts twice, remat): per token of
prompt (once) and completions 2 FLOPs a weight of the layers' matmuls, per completion token 2 * vocabulary * width,
per query 4 * width of heads for every position it sees, in every layer; all that once for the reference pass and three
times for forward and backward. `mfu` is relative to the dense bfloat16 peak of the device; null where that is unknown
or the compute is float32.

--profile N runs our side once more under JAX's profiler and says on stderr which N kernels took the most time.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "scripts" / "peers")]  # runs from a checkout that is not installed

import jax  # noqa: E402
from environments import PeerError, peer_python  # noqa: E402
from handover import PART_NAMES, Task, hash_pairs, say  # noqa: E402

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # this process only makes ids; the accelerator is the sides'

from drift_jax.config import DataConfig, MeshConfig  # noqa: E402
from drift_jax.data.batches import epoch_order  # noqa: E402
from drift_jax.data.pairs import tokenize_pair  # noqa: E402
from drift_jax.data.rules import build_rules  # noqa: E402
from drift_jax.data.tokenizer import load_tokenizer  # noqa: E402
from drift_jax.errors import DriftError  # noqa: E402
from drift_jax.models.architecture import QwenConfig  # noqa: E402
from drift_jax.models.hf import load_qwen_config  # noqa: E402
from drift_jax.models.hf_export import save_hf  # noqa: E402
from drift_jax.models.published import ARCHITECTURES, write_architecture  # noqa: E402
from drift_jax.models.qwen import init_params  # noqa: E402
from drift_jax.plan.flops import forward_flops  # noqa: E402
from drift_jax.records import Pair, read_dsat, read_pairs  # noqa: E402
from drift_jax.sharding import build_layout  # noqa: E402

SHARED_DATA = REPO.parent / "shared" / "data" / "dsat_real.jsonl"
SAMPLE_DATA = REPO / "data" / "sample" / "compare.jsonl"
SIDES = {"trl": "trl_dpo.py", "tunix": "tunix_dpo.py"}

# Dense bfloat16 FLOPs a second, from the makers' data sheets, under the names that devices give themselves.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}

Ids = dict[str, list[int]]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        row = run_benchmark(args)
    except (DriftError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(row))
    if row["peer_failed"]:
        print(f"error: {row['peer_failed']}", file=sys.stderr)
    return 1 if row["peer_failed"] else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("none", *SIDES), default="none")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt + completion")
    parser.add_argument("--max-completion", type=int, help="tokens; default: what the prompt leaves of --max-length")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs an update, on every side")
    parser.add_argument("--peer-micro-batch", type=int, help="pairs; default: TRL the batch, Tunix 1 (4 need > 24 GB)")
    parser.add_argument("--model", type=Path, default=REPO / ".cache" / "demo_model", help="and its tokenizer")
    parser.add_argument(
        "--shape", choices=ARCHITECTURES, help="random weights of this size, with the tokenizer of --model"
    )
    parser.add_argument("--data", type=Path, help="JSONL of pairs, or of complaints with `next_assistant`")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=42, help="order of the pairs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our config")
    parser.add_argument("--trl-reference", choices=("before", "within"), default="before", help="the epoch")
    parser.add_argument(
        "--trl-checkpointing", choices=("on", "off"), default="on", help="on is TRL's own default; off: faster, larger"
    )
    parser.add_argument("--peer-python", type=Path, help="a Python that has the peer, instead of .venv-peers/")
    parser.add_argument("--peer-limit", type=float, help="seconds after which the peer is stopped")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="kernels of ours to list by their time")
    parser.add_argument("--venvs", type=Path, default=REPO / ".venv-peers", help="where peers are installed")
    args = parser.parse_args(argv)
    args.peer_micro_batch = args.peer_micro_batch or (1 if args.peer == "tunix" else args.batch_size)
    if args.pairs < 1 or args.batch_size < 1 or args.pairs % args.batch_size:
        parser.error(f"--pairs ({args.pairs}) must be a multiple of --batch-size ({args.batch_size})")
    if args.peer_micro_batch < 1 or args.batch_size % args.peer_micro_batch:
        parser.error(f"--batch-size ({args.batch_size}) must be a multiple of {args.peer_micro_batch} pairs at a time")
    return args


def run_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Runs both sides, one after the other.

    Raises:
      PeerError: our side fails, or a trainer got other ids.
      DriftError: the data or the model cannot be read.
    """
    pairs, data = load_ids(args)
    with tempfile.TemporaryDirectory() as temporary:
        model = make_model(args.shape, args.model, Path(temporary)) if args.shape else args.model
        task = Task(
            model_dir=str(model.resolve()),
            pairs=pairs,
            max_length=args.max_length,
            batch_size=args.batch_size,
            micro_batch_size=args.peer_micro_batch,
            dtype=args.dtype,
            learning_rate=args.learning_rate,
            beta=0.1,
            seed=args.seed,
            precompute=args.trl_reference == "before",
            gradient_checkpointing=args.trl_checkpointing == "on",
            overrides=args.set,
            profiled_kernels=args.profile,
        )
        flops = useful_flops(load_qwen_config(model), pairs)
        # The loader shuffles; peers take the pairs as they come, so they get them in its order.
        order = epoch_order(len(pairs), args.seed, 0)
        shuffled = dataclasses.replace(task, pairs=[pairs[i] for i in order])
        ours = run_side("ours.py", Path(sys.executable), task, Path(temporary))
        theirs, failed = None, None
        if args.peer != "none":
            try:
                python = args.peer_python or peer_python(args.peer, args.venvs)
                theirs = run_side(SIDES[args.peer], python, shuffled, Path(temporary), args.peer_limit)
            except SideError as error:  # what ours took is worth keeping
                failed = str(error)
    return describe_run(args, data) | compare(args, ours, theirs, pairs, flops) | {"peer_failed": failed}


def load_ids(args: argparse.Namespace) -> tuple[list[Ids], str]:
    """--pairs pairs as ids, and which file they are from."""
    path = args.data or (SHARED_DATA if SHARED_DATA.exists() else SAMPLE_DATA)
    config = DataConfig(max_length=args.max_length, max_prompt_length=args.max_length // 2)
    tokenizer, rules = load_tokenizer(args.model), build_rules(config)
    rows = []
    for pair in read_real_pairs(path)[: args.pairs]:
        ids = tokenize_pair(pair, tokenizer, config.max_prompt_length, config.max_length, rules)
        parts = (ids.prompt_ids, ids.chosen_ids[: args.max_completion], ids.rejected_ids[: args.max_completion])
        rows.append({name: part.tolist() for name, part in zip(PART_NAMES, parts, strict=True)})
    if len(rows) < args.pairs:
        raise PeerError(f"{path} has {len(rows)} pairs, --pairs is {args.pairs}.")
    return rows, path.name if args.data or path == SHARED_DATA else f"{path.name} ({SHARED_DATA.name} is not there)"


def read_real_pairs(path: Path) -> list[Pair]:
    """The pairs of a file in an order in which its sources are mixed: by the hash of their ids."""
    first = json.loads(path.open(encoding="utf-8").readline())
    if "chosen" in first:
        pairs = read_pairs(path).records
    else:
        answered = [record for record in read_dsat(path).records if record.extra.get("next_assistant")]
        pairs = [Pair(r.id, r.prompt, r.extra["next_assistant"], r.rejected, {}) for r in answered]
    return sorted(pairs, key=lambda pair: hashlib.sha256(pair.id.encode()).hexdigest())


def make_model(shape: str, tokenizer_dir: Path, folder: Path) -> Path:
    """A Hugging Face directory of random bfloat16 weights, with the tokenizer of another model."""
    say(f"random weights of {shape}")
    source = folder / "source"
    source.mkdir()
    for file in tokenizer_dir.glob("*token*"):
        (source / file.name).write_bytes(file.read_bytes())
    write_architecture(shape, source)
    params = init_params(load_qwen_config(source), 0, build_layout(MeshConfig(), jax.devices()[:1]))
    save_hf(params, source, folder / shape, "bfloat16")
    return folder / shape


def useful_flops(config: QwenConfig, pairs: list[Ids]) -> float:
    """FLOPs that the reference pass and one epoch need, as the top of this file counts them."""
    return 4 * sum(forward_flops(config, *(len(pair[name]) for name in PART_NAMES)) for pair in pairs)


class SideError(PeerError):
    """A side ended without a result."""


def run_side(script: str, python: Path, task: Task, folder: Path, limit_s: float | None = None) -> dict[str, Any]:
    """One side in a process of its own. Raises `SideError` when it fails, `PeerError` if its trainer got other ids."""
    file = folder / "task.json"
    file.write_text(json.dumps(dataclasses.asdict(task)))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), str(REPO / "scripts" / "peers" / script), str(file)]
    say(f"{script}: begins")
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise SideError(f"{script} was not done after {limit_s:g} s.") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SideError(f"{script} ended with {done.returncode}; what it said is above.")
    result = json.loads(lines[-1])
    if result["fed"] != hash_pairs(task.pairs):
        raise PeerError(f"{script}: its trainer got other ids than it was handed.")
    return result


def describe_run(args: argparse.Namespace, data: str) -> dict[str, Any]:
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    git = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=False)
    return {
        "bench": "step",
        "model": args.shape or args.model.name,
        "data": data,
        "pairs": args.pairs,
        "max_length": args.max_length,
        "max_completion": args.max_completion,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "commit": git.stdout.strip() or None,
    }


def compare(
    args: argparse.Namespace, ours: dict[str, Any], theirs: dict[str, Any] | None, pairs: list[Ids], flops: float
) -> dict[str, Any]:
    """Both sides under the same names, the peer's with `peer_` in front; null where there is no peer."""
    real = sum(len(pair[name]) for pair in pairs for name in PART_NAMES)
    row: dict[str, Any] = {"peer": args.peer, "ratio": None, "rss_ratio": None, "device": ours["device"]}
    if theirs:
        row["ratio"] = round(theirs["seconds"] / ours["seconds"], 3)
        row["rss_ratio"] = round(ours["peak_rss_gb"] / theirs["peak_rss_gb"], 3)
    row["real_tokens"] = real
    for prefix, side in (("", ours), ("peer_", theirs)):
        found = measures(side or {}, len(pairs), real, flops, args.dtype)
        row |= {prefix + name: value for name, value in found.items()}
    return row


def measures(side: dict[str, Any], pairs: int, real: int, flops: float, dtype: str) -> dict[str, Any]:
    """What one side's result says, in the units of the JSON line; nothing but null where there is no result."""
    seconds, computed = side.get("seconds"), side.get("computed_tokens")
    peak = known_peak(side.get("device", ""), dtype)
    return {
        "pairs_per_s": seconds and rounded(pairs / seconds),
        "real_tokens_per_s": seconds and rounded(real / seconds),
        "real_token_share": computed and rounded(real / computed),
        "tflops": seconds and rounded(flops / seconds / 1e12),
        "mfu": seconds and peak and rounded(flops / seconds / peak),
        **{name: rounded(side.get(name)) for name in ("peak_rss_gb", "peak_device_gb", "compile_s")},
        **{name: rounded(side.get(name)) for name in ("seconds", "reference_seconds", "loss", "logps_chosen")},
        **{name: side.get(name) for name in ("versions", "settings")},
    }


def rounded(value: float | None) -> float | None:
    """To six digits, which a loss needs."""
    return None if value is None else float(f"{value:.6g}")


def known_peak(device: str, dtype: str) -> float | None:
    """FLOPs a second of a device, by its name."""
    return PEAKS.get(device) if dtype == "bfloat16" else None


if __name__ == "__main__":
    sys.exit(main())
