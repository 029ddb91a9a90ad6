"""What a checkpoint costs a step, and a resume a run, as one line of JSON.

    python scripts/bench_checkpoint.py [--model .cache/demo_model] [--updates 12] [--every 4] [--batch-size 4]
        [--max-length 512] [--set a.b=c ...]

Updates on random ids of full length, each waited for; a first one compiles and is not timed. Then as many again with a
save after every --every-th, through the `Checkpointer` that a run has: what the loop waits for, and what writing in
the background takes from the steps beside it.

    stall        time that a save keeps the loop from its next update, in the time of an update
    slowdown     the updates with saves over those without, less 1: all of it, writing on the same cores included
    resume_s     checking the checksums of the newest checkpoint, and restoring it; a load of the model beside it
    resume_share (resume_s over that load's time included) of a run that takes --run-hours

The restored state is compared with the one that was saved, bit for bit, though updates went on meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # runs from a checkout that is not installed

import jax  # noqa: E402
import numpy as np  # noqa: E402

from drift_jax.checkpoint import Checkpointer  # noqa: E402
from drift_jax.config import RunConfig, apply_override, build_config  # noqa: E402
from drift_jax.data.pairs import TokenizedPair  # noqa: E402
from drift_jax.errors import DriftError  # noqa: E402
from drift_jax.models.hf import load_params, load_qwen_config  # noqa: E402
from drift_jax.sharding import build_layout  # noqa: E402
from drift_jax.stages.dpo import build_loader, build_trainer  # noqa: E402

Update = Callable[[Any, int], tuple[Any, float]]  # state and step -> state and seconds


class Saving(NamedTuple):
    """Updates with saves beside them: seconds of each update, and of each save before the next one could begin."""

    seconds: list[float]
    stalls: list[float]
    last_write_s: float
    size: int  # bytes of the last checkpoint
    digest: list[int]  # of what it holds


class Resuming(NamedTuple):
    check_s: float
    restore_s: float
    digest: list[int]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPO / ".cache" / "demo_model")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--run-hours", type=float, default=1.0)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written and removed; default: a new one")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=args.folder))
    try:
        print(json.dumps(measure(args, folder)))
    except DriftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(folder)
    return 0


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = choose_config(args, folder)
    layout, updates = build_layout(config.mesh), args.updates
    trainer = build_trainer(config, args.model, layout, 10 * updates)
    pairs = random_pairs(args.batch_size * updates, args.max_length, load_qwen_config(args.model).vocab_size)
    loader = build_loader(config, trainer, pairs)
    start = time.monotonic()
    params = jax.block_until_ready(load_params(args.model, layout, config.train.master_dtype))
    load_s = time.monotonic() - start
    state = trainer.init_state(params)
    del params

    def update(state: Any, step: int) -> tuple[Any, float]:
        start = time.monotonic()
        state = jax.block_until_ready(trainer.step(state, loader.shuffled(step))[0])
        return state, time.monotonic() - start

    state, _ = update(state, 0)
    plain = []
    for step in range(updates):
        state, seconds = update(state, step)
        plain.append(seconds)
    # Handed over: no name here keeps the state while it is restored.
    states = [state]
    del state
    saving = save_beside(args, states, update, folder / "checkpoints")
    resuming = resume(folder / "checkpoints", trainer.abstract_state)
    step_s = statistics.median(plain)
    return {
        "model": args.model.name,
        "device": jax.devices()[0].device_kind,
        "devices": layout.devices,
        "step_s": round(step_s, 4),
        "checkpoint_gb": round(saving.size / 1e9, 4),
        "saves": len(saving.stalls),
        "stall": round(statistics.median(saving.stalls) / step_s, 4),
        "stall_max": round(max(saving.stalls) / step_s, 4),
        "slowdown": round(
            (statistics.mean(saving.seconds) + sum(saving.stalls) / len(saving.seconds)) / statistics.mean(plain) - 1, 4
        ),
        "last_write_s": round(saving.last_write_s, 3),
        "resume_s": {
            "check": round(resuming.check_s, 3),
            "restore": round(resuming.restore_s, 3),
            "load": round(load_s, 3),
        },
        "resume_share": round((resuming.check_s + resuming.restore_s + load_s) / (3600 * args.run_hours), 6),
        "bit_identical": resuming.digest == saving.digest,
    }


def choose_config(args: argparse.Namespace, folder: Path) -> RunConfig:
    raw: dict[str, Any] = {
        "run_dir": str(folder),
        "model": {"path": str(args.model), "compute_dtype": "float32"},
        "data": {"max_length": args.max_length, "max_prompt_length": args.max_length // 2},
        "train": {"batch_size": args.batch_size},
    }
    for override in args.overrides:
        apply_override(raw, override)
    return build_config(raw)


def save_beside(args: argparse.Namespace, states: list[Any], update: Update, folder: Path) -> Saving:
    """Updates with saves between them. Takes the state out of `states`, which is gone when this returns."""
    state, seconds, stalls, wanted = states.pop(), [], [], []
    with Checkpointer(folder, 2) as checkpointer:
        for step in range(args.updates):
            state, took = update(state, step)
            seconds.append(took)
            if (step + 1) % args.every == 0:
                items = {"params": state.params, "optimizer": state.opt_state}
                # Sums of the bits, to compare with: a copy of the state would be as large again.
                if step + 1 + args.every > args.updates:
                    wanted = digest(items)
                start = time.monotonic()
                checkpointer.save(step + 1, items, {})
                stalls.append(time.monotonic() - start)
                del items
        # Writing of the last one goes on beside updates as that of the others did.
        for step in range(args.every):
            state, took = update(state, step)
            seconds.append(took)
        start = time.monotonic()
        checkpointer.wait()
        wait_s, last = time.monotonic() - start, checkpointer.latest_step()
    size = sum(f.stat().st_size for f in (folder / str(last)).rglob("*") if f.is_file())
    return Saving(seconds, stalls, wait_s, size, wanted)


def resume(folder: Path, abstract: Any) -> Resuming:
    """The newest checkpoint, checked and restored."""
    with Checkpointer(folder, 2) as checkpointer:
        start = time.monotonic()
        step = checkpointer.newest_whole(print)
        check_s, start = time.monotonic() - start, time.monotonic()
        assert step is not None and step == checkpointer.latest_step()
        restored = checkpointer.restore(step, {"params": abstract.params, "optimizer": abstract.opt_state})
        restored = jax.block_until_ready(restored)
        restore_s = time.monotonic() - start
    return Resuming(check_s, restore_s, digest(restored))


def digest(tree: Any) -> list[int]:
    """A number for every array that changes with any bit of it."""
    sums = []
    for leaf in jax.tree.leaves(tree):
        data = np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8)
        sums.append(hash(data.tobytes()))
    return sums


def random_pairs(count: int, length: int, vocab: int) -> list[TokenizedPair]:
    """Half of a pair's tokens are its prompt; the two completions share the rest."""
    rng = np.random.default_rng(0)
    sizes = (length // 2, length // 4, length // 4)
    return [TokenizedPair(f"p{i}", *(rng.integers(0, vocab, n).astype(np.int32) for n in sizes)) for i in range(count)]


if __name__ == "__main__":
    sys.exit(main())
