"""A run directory as drills see it: what in it must be the same whatever happened, and what was done already."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What measures time, names processes, or holds no result.
_PASSED_OVER = (".lock", "log.jsonl", "summary.md")
_TIMES = frozenset({"tokens_per_second", "theory/seconds", "seconds", "started", "finished", "versions", "hashes"})
_KEYS = {  # of a row, by the kind of its file
    "completions": ("id", "sample"),
    "pairs": ("id",),
    "metrics": ("step",),
    "scores": ("id",),
    "ref_logps": ("pair",),
}


@dataclass(frozen=True)
class Job:
    """`drift run` of a config, wherever its directory lies."""

    config: Path
    changes: tuple[str, ...] = ()

    def words(self, run_dir: Path) -> list[Any]:
        return ["run", self.config, "--run-dir", run_dir, *(word for c in self.changes for word in ("--set", c))]


def snapshot(run_dir: Path) -> dict[str, str]:
    """A hash of what each file says, by its place in the directory; of checkpoints which there are.

    The directory's own name and times are taken out. Weights are those of `hf`, to the last bit.
    """
    found: dict[str, str] = {}
    for path in sorted(run_dir.rglob("*")):
        place = path.relative_to(run_dir)
        if place.parts[0] == ".cache" or place.name in _PASSED_OVER or not path.is_file():
            continue
        if "checkpoints" in place.parts:
            depth = place.parts.index("checkpoints")
            found["/".join(place.parts[: depth + 2])] = "there"
        else:
            found[str(place)] = hashlib.sha256(_plain(path, run_dir)).hexdigest()
    return found


def _plain(path: Path, run_dir: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl", ".yaml"):
        data = data.replace(str(run_dir).encode(), b"RUN")
    if path.name == "metrics.jsonl":
        return json.dumps([_timeless(json.loads(line)) for line in data.splitlines()]).encode()
    if path.name == "manifest.json":
        return json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
    return data


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _timeless(of) for key, of in value.items() if key not in _TIMES}
    return value


def starred(place: str) -> str:
    """With stars for numbers and hashes: a pattern that fits the place."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "*", place)


def kind_of(place: str) -> str:
    """What a place in a run directory is called among those of its kind: whatever the stage, iteration and update.

    Of a checkpoint's files the name counts, or the folder of one that is named by a hash.
    """
    parts = starred(place).split("/")
    if "checkpoints" in parts:
        depth = parts.index("checkpoints") + 1
        tail = parts[depth:]
        tail = tail[-2:] if tail[-1:] == ["*"] else tail[-1:]
        parts = [*parts[:depth], *(["*"] if len(tail) < len(parts) - depth else []), *tail]
    if parts[0] in ("seed", "iter_*"):
        parts[0] = "STAGE"
    return "/".join(parts)


def differences(whole: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Places that are not the same in both."""
    return sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))


def keys_of(path: Path, data: bytes) -> Counter[tuple[Any, ...]]:
    """How often each row is in a file of rows; a torn last line does not count."""
    names = _KEYS.get(path.name.split(".")[0], ())
    rows = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()] if names else []
    return Counter(tuple(row.get(name) for name in names) for row in rows)


def count_rows(run_dir: Path, whole: Path) -> tuple[int, int]:
    """Rows of all files of a finished run that an uninterrupted one has and it has not; and those it has too often."""
    lost = doubled = 0
    for path in whole.rglob("*.jsonl"):
        mine = run_dir / path.relative_to(whole)
        wanted = keys_of(path, path.read_bytes())
        there = keys_of(mine, mine.read_bytes()) if mine.is_file() else Counter()
        lost += sum((wanted - there).values())
        doubled += sum((there - wanted).values())
    return lost, doubled


@dataclass
class Witness:
    """What is done at the moment it is made, such as that of a kill; asked later what became of it.

    Journals are removed once their stage is over, so they are held open: what is appended is seen all the same.
    """

    run_dir: Path
    processes: int = 1
    journals: list[tuple[Path, int, bytes]] = field(default_factory=list)  # path, handle, whole lines
    checkpoints: dict[str, int] = field(default_factory=dict)  # of stages that train: newest update
    _kept: dict[Path, Counter[Any]] = field(default_factory=dict)  # by directory, rows of its journals at the end

    def __post_init__(self) -> None:
        for path in sorted(self.run_dir.rglob("*.partial*.jsonl")):
            with suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDONLY)
                data = _read(handle)
                self.journals.append((path, handle, data[: data.rfind(b"\n") + 1]))
        for folder in self.run_dir.glob("*/checkpoints"):
            steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
            if steps and not (folder.parent / "hf").exists():
                self.checkpoints[folder.parent.name] = max(steps)

    def ask(self, said: str) -> tuple[int, int, list[str]]:
        """After the run has ended: units of work that were lost, that were done twice, and in words.

        Args:
          said: what the commands have printed since then.
        """
        lost, doubled, problems = 0, 0, []
        after = [_read(handle) for _, handle, _ in self.journals]
        for path, data in zip((path for path, _, _ in self.journals), after, strict=True):
            self._kept.setdefault(path.parent, Counter()).update(keys_of(path, data))
        for (path, handle, before), now in zip(self.journals, after, strict=True):
            os.close(handle)
            had, have = keys_of(path, before), keys_of(path, now)
            gone = 0 if now.startswith(before) else len(had)
            gone = gone or len(had) * self._given_up(path)
            lost, twice = lost + gone, sum(have.values()) - len(have)
            doubled += twice
            if gone or twice:
                problems.append(f"{path.relative_to(self.run_dir)}: {gone} rows lost, {twice} twice")
        for stage, step in self.checkpoints.items():
            # A later life may have gone further before it was ended itself.
            steps = [int(number) for number in re.findall(r"going on from the checkpoint of update (\d+)", said)]
            finished = f"{stage}/train: finished before" in said
            if step not in steps and not finished:
                lost += 1
                problems.append(f"{stage}: the checkpoint of update {step} was not gone on from")
        return lost, doubled, problems

    def _given_up(self, path: Path) -> bool:
        """Whether a stage has made its rows anew elsewhere: what it came to is not what its journals say.

        Known only where each process had its journal already.
        """
        result = path.with_name("completions.jsonl")
        journals = [other for other, _, _ in self.journals if other.parent == path.parent]
        if not path.name.startswith("completions") or not result.is_file() or len(journals) < self.processes:
            return False
        return bool(keys_of(result, result.read_bytes()).keys() - self._kept[path.parent].keys())


def _read(handle: int) -> bytes:
    return os.pread(handle, os.fstat(handle).st_size, 0)


def count_errors(said: str) -> int:
    """Lines that tell the user of an error."""
    return sum(line.startswith("error:") for line in said.splitlines())


def check_words(said: str) -> Iterator[str]:
    """What no command may print whatever happens to its files."""
    if "Traceback (most recent call last)" in said:
        where = said[said.index("Traceback (most recent call last)") :].strip().splitlines()
        yield f"a traceback: {where[-1][:300]}"
