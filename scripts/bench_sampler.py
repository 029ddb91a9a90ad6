"""Tokens per second of the samplers on real prompts, one line of JSON per batch size.

    python scripts/bench_sampler.py [--model .cache/demo_model] [--peer hf|vllm|none] [--peer-python PYTHON]
        [--batches 1,8,32] [--new-tokens 64] [--max-prompt 256] [--dtype float32] [--engine local|vllm]

Prompts are those of a sample stage, of the DSAT records in --data. Of each batch size so many prompts are sampled, with
temperature 0.7 and top_p 0.9, to --new-tokens each: no EOS ends a row, so that all engines do the same work. Ours and
the peer's runs take turns in one process each, after a first one that compiles and is not counted; the best of
--repeat counts. `tokens_per_s` is new tokens over the whole time, prefill included; `prefill_s` is the time for one new
token a row, `decode_tokens_per_s` what comes after. `ratio` is ours over the peer's. The hf peer is transformers'
`generate` with a KV cache and left padding, in --peer-python (default: this one); the vllm peer is a server started
with it, by the same code as `sampling.engine: vllm`.

`bound_tokens_per_s` is what the device could do at best: its own rate of a large product and of reading memory, both
measured in this run, and the products and bytes that the prompts and each step need (scripts/peers/roof.py).
`share_of_bound` is ours relative to it, `decode_share_of_bound` that of decoding alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "scripts" / "peers")]  # runs from a checkout that is not installed

from drift_jax.errors import DriftError  # noqa: E402

if TYPE_CHECKING:
    from drift_jax.sampling.base import Sampler

TEMPERATURE, TOP_P = 0.7, 0.9
# (prompts, new tokens) -> seconds
Timed = Callable[[list[list[int]], int], float]

# Run by the peer's interpreter: reads a line of JSON {"prompts", "new"}, answers with seconds.
_HF = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]), trust_remote_code=False)
model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    width = max(map(len, job["prompts"]))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in job["prompts"]], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in job["prompts"]], device=model.device)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=float(sys.argv[3]),
            top_p=float(sys.argv[4]), top_k=0, max_new_tokens=job["new"], min_new_tokens=job["new"],
            eos_token_id=None, pad_token_id=0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert out.shape[1] == width + job["new"]
    print(json.dumps(time.perf_counter() - start), flush=True)
"""


def load_prompts(model: Path, data: Path, longest: int, count: int) -> list[list[int]]:
    from drift_jax.data.prompts import build_sampling_prompt
    from drift_jax.data.tokenizer import load_tokenizer
    from drift_jax.records import read_dsat

    tokenizer = load_tokenizer(model)
    records = read_dsat(str(data), "error").records[:count]
    if len(records) < count:
        raise SystemExit(f"{data} has {len(records)} records, {count} are needed")
    return [build_sampling_prompt(r, "chat", tokenizer, longest).ids.tolist() for r in records]


def timed_sampler(sampler: Sampler, eos_ids: tuple[int, ...], vocab_size: int) -> Timed:
    from drift_jax.sampling.base import SampleRequest, SamplingParams

    def run(prompts: list[list[int]], new: int) -> float:
        params = SamplingParams(TEMPERATURE, TOP_P, 0, new, 0, eos_ids, vocab_size)
        requests = [SampleRequest(str(i), 0, tuple(prompt)) for i, prompt in enumerate(prompts)]
        start = time.perf_counter()
        completions = sampler.sample(requests, params)
        seconds = time.perf_counter() - start
        assert all(len(c.token_ids) == new for c in completions)
        return seconds

    return run


def open_local(model: Path, dtype: str) -> Callable[[int], Timed]:
    import jax

    from drift_jax.config import MeshConfig
    from drift_jax.data.tokenizer import load_tokenizer
    from drift_jax.models.policy import load_policy
    from drift_jax.sampling.local import LocalSampler
    from drift_jax.sharding import build_layout

    policy = load_policy(model, build_layout(MeshConfig(), jax.devices()[:1]), dtype, dtype)
    vocab = load_tokenizer(model).vocab_size

    def with_batch(batch: int) -> Timed:
        return timed_sampler(LocalSampler(policy, batch), (vocab,), vocab)  # no id is an end

    return with_batch


def open_hf(model: Path, dtype: str, python: str) -> Callable[[int], Timed]:
    command = [python, "-c", _HF, str(model), dtype, str(TEMPERATURE), str(TOP_P)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    if process.stdout.readline().strip() != "ready":
        raise SystemExit("transformers did not start: see its message above")

    def run(prompts: list[list[int]], new: int) -> float:
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    return lambda batch: run


def open_vllm(model: Path, dtype: str, python: str, longest: int, new: int) -> Callable[[int], Timed]:
    """A server that lives as long as this process (see sampling/supervise.py)."""
    from rich.console import Console

    from drift_jax.config import build_config
    from drift_jax.endpoint import Retry
    from drift_jax.models.hf import load_qwen_config
    from drift_jax.sampling.server import SERVED_NAME, VllmServer
    from drift_jax.sampling.vllm import Served, VllmSampler

    config = build_config(
        {
            "run_dir": "unused",
            "model": {"path": str(model)},
            "sampling": {
                "engine": "vllm",
                "compute_dtype": dtype,
                "max_input_length": longest,
                "max_new_tokens": new,
            },
            "vllm": {"python": python},
        }
    )
    architecture = load_qwen_config(model)
    log = Path(tempfile.mkdtemp()) / "vllm.log"
    server = VllmServer(config, architecture, model, log)
    server.__enter__()
    server.start(Console(stderr=True))
    served = Served(server.connect(Retry(attempts=1)), SERVED_NAME)

    def with_batch(batch: int) -> Timed:
        sampler = VllmSampler([served], architecture.vocab_size, batch, None, print)
        return timed_sampler(sampler, (), architecture.vocab_size)

    return with_batch


def measure(timed: list[Timed | None], prompts: list[list[int]], new: int, repeat: int) -> list[dict[str, float]]:
    """Ours and the peer's in turns: seconds for one new token a row, and for all of them."""
    rows: list[dict[str, list[float]]] = [{"one": [], "all": []} for _ in timed]
    for turn in range(repeat + 1):
        for row, run in zip(rows, timed, strict=True):
            if run is None:
                continue
            seconds = {"one": run(prompts, 1), "all": run(prompts, new)}
            if turn:  # the first compiles
                for name, value in seconds.items():
                    row[name].append(value)
    found = []
    for row in rows:
        if not row["all"]:
            found.append({})
            continue
        one, whole = min(row["one"]), min(row["all"])
        found.append(
            {
                "tokens_per_s": round(len(prompts) * new / whole, 1),
                "prefill_s": round(one, 3),
                "decode_tokens_per_s": round(len(prompts) * (new - 1) / max(whole - one, 1e-9), 1),
            }
        )
    return found


def measure_bound(model: Path, dtype: str, prompts: list[int], new: int, ours: dict[str, float]) -> dict[str, float]:
    """The keys of a line that speak of the device's own limits."""
    import jax.numpy as jnp
    from roof import bound_decode_s, bound_prefill_s, measure_roof

    from drift_jax.models.hf import load_qwen_config

    roof, config, itemsize = measure_roof(dtype), load_qwen_config(model), jnp.dtype(dtype).itemsize
    prefill = bound_prefill_s(roof, config, prompts, itemsize)
    decode = bound_decode_s(roof, config, prompts, new, itemsize)
    bound, decode_bound = len(prompts) * new / (prefill + decode), len(prompts) * new / decode
    return {
        "product_gflops_per_s": round(roof.flops_per_s / 1e9, 1),
        "memory_gb_per_s": round(roof.bytes_per_s / 1e9, 1),
        "bound_tokens_per_s": round(bound, 1),
        "share_of_bound": round(ours["tokens_per_s"] / bound, 3),
        "decode_share_of_bound": round(ours["decode_tokens_per_s"] / decode_bound, 3),
    }


def main() -> int:
    try:
        run_benchmark()
    except DriftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_benchmark() -> None:
    """Raises `DriftError` for a model or data that cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPO / ".cache" / "demo_model")
    parser.add_argument("--data", type=Path, default=REPO / "data" / "sample" / "dsat.jsonl")
    parser.add_argument("--engine", choices=("local", "vllm"), default="local")
    parser.add_argument("--peer", choices=("hf", "vllm", "none"), default="none")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-prompt", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()

    def open_engine(name: str) -> Callable[[int], Timed]:
        if name == "hf":
            return open_hf(args.model, args.dtype, args.peer_python)
        if name == "vllm":
            return open_vllm(args.model, args.dtype, args.peer_python, args.max_prompt, args.new_tokens)
        return open_local(args.model, args.dtype)

    batches = [int(batch) for batch in args.batches.split(",")]
    prompts = load_prompts(args.model, args.data, args.max_prompt, max(batches))
    engine = open_engine(args.engine)
    peer = open_engine(args.peer) if args.peer != "none" else None
    for batch in batches:
        timed = [engine(batch), peer(batch) if peer else None]
        ours, theirs = measure(timed, prompts[:batch], args.new_tokens, args.repeat)
        row: dict[str, Any] = {"engine": args.engine, "batch": batch, **ours, "peer": args.peer}
        row |= {f"peer_{name}": value for name, value in theirs.items()}
        row["ratio"] = round(ours["tokens_per_s"] / theirs["tokens_per_s"], 3) if theirs else None
        lengths = [len(prompt) for prompt in prompts[:batch]]
        row |= measure_bound(args.model, args.dtype, lengths, args.new_tokens, ours)
        row |= {"new_tokens": args.new_tokens, "prompt_tokens": sum(map(len, prompts[:batch])), "dtype": args.dtype}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
