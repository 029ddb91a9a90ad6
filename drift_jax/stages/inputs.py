"""What several stages open: logged records, tokenizers, policies, and the directory that no other run may be in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.data.chat_template import Thinking
from drift_jax.data.tokenizer import ChatTokenizer, check_vocab, load_tokenizer
from drift_jax.distributed import is_main, on_main
from drift_jax.errors import ConfigError, DataError
from drift_jax.methods import Record
from drift_jax.models.hf import load_qwen_config
from drift_jax.models.policy import Policy, load_policy
from drift_jax.progress import stage_progress
from drift_jax.records import LOGGED_READERS
from drift_jax.run_lock import RunLock
from drift_jax.sharding import Layout
from drift_jax.stages.draws import method_of

Summary = dict[str, Any]


@dataclass(frozen=True)
class LoggedSplit:
    """Logged records of an iteration: the first rows are held out, as the authors do."""

    test: tuple[Record, ...]
    train: tuple[Record, ...]
    skipped: int  # rows left out by --on-bad-row skip

    def rows(self) -> Iterator[tuple[str, Record]]:
        yield from (("test", record) for record in self.test)
        yield from (("train", record) for record in self.train)


def records_path(config: RunConfig) -> Path:
    """The file of the records that the method goes through.

    Raises:
      ConfigError: the key that names it is empty.
    """
    data, kind = config.data, method_of(config).records
    path = {"dsat": data.dsat, "sat": data.sat}[kind]
    if not path:
        raise ConfigError(
            f"data.{kind} is empty: method {config.recipe.method} needs a JSONL file of {kind.upper()} records. Name "
            "one, or set recipe.iterations to 0."
        )
    return Path(path)


def load_split(config: RunConfig, path: str) -> LoggedSplit:
    """Of records of the kind that the method takes.

    Raises:
      DataError: holding out `data.test_rows` leaves nothing to train on.
    """
    rows = LOGGED_READERS[method_of(config).records](path, config.data.on_bad_row)
    held_out = config.data.test_rows
    if len(rows.records) <= held_out:
        raise DataError(
            f"{path} has {len(rows.records)} usable rows and data.test_rows holds {held_out} of them out: "
            "nothing is left to train on. Lower data.test_rows or give more rows."
        )
    train = rows.records[held_out:][: config.data.max_rows]
    return LoggedSplit(rows.records[:held_out], train, rows.left_out)


def refuse_held_out(split: LoggedSplit, path: Path) -> None:
    """Raises `DataError` where records to train on are some that `drift mine` has held out."""
    places = [i for i, record in enumerate(split.train, len(split.test) + 1) if _was_held_out(record.extra)]
    if places:
        raise DataError(
            f"{path}: {len(places)} of the records to train on were held out when they were mined (meta.split is "
            f"test), such as {split.train[places[0] - len(split.test) - 1].id}: data.test_rows is {len(split.test)}. "
            f"Set it to {places[-1]}, or remove meta.split."
        )


def _was_held_out(extra: Mapping[str, Any]) -> bool:
    """By `drift mine`, so that no prompt of the test is in training in any file."""
    meta = extra.get("meta")
    return isinstance(meta, dict) and meta.get("split") == "test"


def open_tokenizer(model_dir: Path, thinking: Thinking = "template") -> ChatTokenizer:
    """The tokenizer of a model directory, checked against the model's vocabulary. `thinking`: `data.thinking`."""
    tokenizer = load_tokenizer(model_dir, thinking)
    check_vocab(tokenizer, load_qwen_config(model_dir).vocab_size)
    return tokenizer


def open_policy(model_dir: Path, layout: Layout, compute_dtype: str, param_dtype: str, console: Console) -> Policy:
    """`load_policy` with a progress bar in MB."""
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def advance(size: int, total: int) -> None:
            if not bars:
                bar = stage_progress(f"loading {model_dir.name}", max(1, total // 10**6), "MB", console=console)
                bars.append(stack.enter_context(bar))
            bars[0].advance(min(round(size / 10**6), bars[0].total - bars[0].count))

        return load_policy(model_dir, layout, compute_dtype, param_dtype, advance)


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keeps other runs out of the directory; process 0 holds the lock for all of its run.

    A directory that is made for it goes again when the block raises and has left nothing there.

    Raises:
      StageError: another process has it.
    """
    lock, is_new = RunLock(run_dir), not run_dir.exists()
    on_main(lambda: lock.acquire())
    try:
        yield
    except BaseException:
        if is_main() and is_new and [path.name for path in run_dir.iterdir()] == [lock.path.name]:
            lock.path.unlink()
            run_dir.rmdir()
        raise
    finally:
        if is_main():
            lock.release()


def report_refused(refused: list[str], config: RunConfig) -> None:
    """Raises `DataError` for rows that no tokens could be made of, unless bad rows are to be skipped."""
    if refused and config.data.on_bad_row == "error":
        shown = "\n  ".join(refused[:20])
        raise DataError(
            f"{len(refused)} rows cannot be encoded:\n  {shown}\n"
            "Mend these rows, or pass --on-bad-row skip to go on without them (they are counted)."
        )
