"""Mining: logs -> dsat.jsonl, sat.jsonl, seed.train.jsonl, seed.test.jsonl, stats.json, mined.html, README.md.

Rows stream through once. What is found goes to a file on disk; only hashes of it stay in memory. When all is read, the
near-duplicates are known and the files are written from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, final, runtime_checkable

import orjson
from rich.console import Console

from drift_jax.data.mining import logs, ultrafeedback, wildfeedback
from drift_jax.data.mining.card import PUBLISHED, render_card
from drift_jax.data.mining.config import Format, MiningConfig
from drift_jax.data.mining.dialogue import Complaint, Conversation, Turn
from drift_jax.data.mining.hygiene import NEAR, Hygiene, NearDuplicates, held_out, local_text
from drift_jax.data.mining.mined import KINDS, Mined, to_row
from drift_jax.data.mining.page import render_page
from drift_jax.data.mining.pii import mask
from drift_jax.data.mining.sources import BadRows, OnBadRow, Source, SourceReader
from drift_jax.data.mining.tally import Tally
from drift_jax.errors import DataError
from drift_jax.files import atomic_writer, write_json
from drift_jax.progress import StageProgress, stage_progress
from drift_jax.records import Message, Row

LABELLED = ("wildfeedback", "ultrafeedback")
FILES = ("dsat.jsonl", "sat.jsonl", "seed.train.jsonl", "seed.test.jsonl")


@runtime_checkable
class Finder(Protocol):
    """What mining asks of a detector (`drift_jax/data/mining/detect.py`)."""

    def find(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, list[Complaint]]]: ...

    def stats(self) -> dict[str, Any]: ...

    def status(self) -> str: ...


@dataclass(frozen=True)
class MineJob:
    """What is mined, and into which directory."""

    sources: tuple[Source, ...]
    log_format: Format
    out_dir: Path
    on_bad_row: OnBadRow = "stop"
    license: str | None = None  # of the rows; null: that of the published corpus of this format


def mine_stage(job: MineJob, config: MiningConfig, console: Console, detector: Finder | None = None) -> dict[str, Any]:
    """Writes everything into `job.out_dir`, the same bytes for the same input, and returns what stats.json holds.

    Args:
      detector: marks the complaints in logs without labels; formats with labels do without.

    Raises:
      BadRowsError: rows cannot be used, under `stop`.
      DataError: the input cannot be read, or holds no row; rows were broken, and the others gave no record.
    """
    if (detector is None) != (job.log_format in LABELLED):
        raise DataError(f"format {job.log_format}: a detector is for logs without labels, and those need one.")
    job.out_dir.mkdir(parents=True, exist_ok=True)
    with _spool(job.out_dir) as spool, _progress(job.sources, console, detector) as advance:
        run = _Run(job, config, spool, advance)
        for mined in run.read(detector):
            run.keep(mined)
        run.drop_near_duplicates()
        if not run.rows:
            raise DataError(f"{', '.join(s.location for s in job.sources)}: there is no row to mine.")
        run.refuse_nothing()
        tally = Tally(config.split.seed)
        files = {name: run.write(name, tally) for name in FILES}
    stats = run.stats(tally, files, detector.stats() if detector else {})
    with atomic_writer(job.out_dir / "mined.html") as page:
        page.write(render_page(stats, tally.examples))
    with atomic_writer(job.out_dir / "README.md") as card:
        card.write(render_card(stats))
    write_json(job.out_dir / "stats.json", stats)
    return stats


@contextlib.contextmanager
def _spool(directory: Path) -> Iterator[IO[bytes]]:
    """A file without a name: whatever happens, nothing of it stays."""
    with tempfile.TemporaryFile(dir=directory) as file:
        yield file


@contextlib.contextmanager
def _progress(
    sources: Sequence[Source], console: Console, detector: Finder | None
) -> Iterator[Callable[[Source, int], None]]:
    """Shows megabytes of files, or rows where a dataset is among the sources; takes a source and what came of it."""
    sizes = [source.bytes for source in sources]
    in_bytes = all(size is not None for size in sizes)
    total = max(1, sum(size or 0 for size in sizes) // 10**6) if in_bytes else None
    with stage_progress("mining", total, "MB" if in_bytes else "rows", console=console) as bar:
        yield _Advance(bar, in_bytes, detector)
        if bar.total is not None:
            bar.advance(bar.total - bar.count)  # what is left is less than one, or was packed


@final
class _Advance:
    """Passes whole megabytes on, or rows in hundreds."""

    def __init__(self, bar: StageProgress, in_bytes: bool, detector: Finder | None) -> None:
        self._bar, self._in_bytes, self._detector = bar, in_bytes, detector
        self._gone, self._step = 0, 10**6 if in_bytes else 100

    def __call__(self, source: Source, count: int) -> None:
        if self._in_bytes == (source.kind == "file"):
            self._gone += count
        steps, self._gone = divmod(self._gone, self._step)
        if steps:
            count = steps if self._in_bytes else steps * self._step
            count = count if self._bar.total is None else min(count, self._bar.total - self._bar.count)
            self._bar.advance(count, self._detector.status() if self._detector else None)


@final
class _Run:
    """What one call has read so far, and the records that it found."""

    def __init__(
        self, job: MineJob, config: MiningConfig, spool: IO[bytes], advance: Callable[[Source, int], None]
    ) -> None:
        self.rows = 0
        self._job, self._config, self._spool, self._advance = job, config, spool, advance
        self._bad = BadRows(job.on_bad_row, job.log_format, {one.name: one.location for one in job.sources})
        self._hygiene = Hygiene(config.hygiene)
        self._near = {kind: NearDuplicates(config.hygiene.max_similarity) for kind in KINDS}
        self._starts = {kind: array("Q") for kind in KINDS}  # where a record stands in the spool
        self._found: dict[str, int] = dict.fromkeys(KINDS, 0)
        self._dropped: Counter[str] = Counter()
        self._duplicates: dict[str, set[int]] = {}
        self._masked: Counter[str] = Counter()
        self._sources: list[dict[str, Any]] = []
        self._labelled = wildfeedback.LabelledConversations(config.wildfeedback, config.moderation)
        self._scored = ultrafeedback.ScoredPrompts(config.ultrafeedback)
        self._logged = None
        if job.log_format not in LABELLED:
            self._logged = logs.Conversations(job.log_format, config.moderation)

    # --- reading ---

    def read(self, detector: Finder | None) -> Iterator[Mined]:
        """All that is found, in the order of the input."""
        if self._logged is not None and detector is not None:
            for conversation, complaints in detector.find(self._conversations(self._logged)):
                for complaint in complaints:
                    yield _from_complaint(conversation, complaint)
            return
        mined = self._utterances() if self._job.log_format == "wildfeedback" else self._responses()
        for one in mined:
            yield self._mask_record(one) if self._config.hygiene.mask_pii else one

    def _readers(self, columns: Sequence[str]) -> Iterator[SourceReader]:
        """A reader per source; when the one before was read to its end, what is known of it is noted."""
        for source in self._job.sources:
            reader = SourceReader(source, columns, lambda count, source=source: self._advance(source, count))
            yield reader
            self._bad.settle(source.location, reader.rows)
            self.rows += reader.rows
            about = {"name": source.name, "rows": reader.rows, "bytes": source.bytes, "sha256": reader.sha256}
            self._sources.append(about | {"revision": source.revision})

    def _utterances(self) -> Iterator[Mined]:
        group = None
        for reader in self._readers(wildfeedback.COLUMNS):
            if reader.source.group != group:
                group = reader.source.group
                self._labelled.break_off()
            yield from self._labelled.mine(reader.source.name, reader, self._bad.add)

    def _responses(self) -> Iterator[Mined]:
        for reader in self._readers(ultrafeedback.columns(self._config.ultrafeedback)):
            yield from self._scored.mine(reader.source.name, reader, self._bad.add)

    def _conversations(self, logged: logs.Conversations) -> Iterator[Conversation]:
        for reader in self._readers(logs.columns(self._job.log_format)):
            for one in logged.read(reader.source.name, reader, self._bad.add):
                # Before a detector sees it: a judge may be somebody else's server.
                yield self._mask_conversation(one) if self._config.hygiene.mask_pii else one

    def _mask_conversation(self, one: Conversation) -> Conversation:
        turns = tuple(Turn(turn.role, mask(turn.content, self._masked)) for turn in one.turns)
        return Conversation(one.id, turns)

    def _mask_record(self, mined: Mined) -> Mined:
        texts = tuple(mask(text, self._masked) for text in mined.texts())
        return mined.with_texts(texts, _mask_json(mined.evidence, self._masked))

    # --- keeping ---

    def keep(self, mined: Mined) -> None:
        """Into the spool, unless a rule refuses it."""
        self._found[mined.kind] += 1
        reason = self._hygiene.refuse(mined)
        if reason:
            self._dropped[f"{mined.kind}: {reason}"] += 1
            return
        split = "test" if held_out(mined, self._config.split) else "train"
        self._starts[mined.kind].append(self._spool.tell())
        self._spool.write(orjson.dumps([split, to_row(mined, split), local_text(mined)]) + b"\n")
        self._near[mined.kind].add(mined)

    def drop_near_duplicates(self) -> None:
        """When all are in the spool."""
        for kind in KINDS:
            self._duplicates[kind] = self._near[kind].find(lambda i, kind=kind: self._load(kind, i)[2])
            self._dropped[f"{kind}: {NEAR}"] += len(self._duplicates[kind])

    def _load(self, kind: str, number: int) -> tuple[str, Row, str]:
        self._spool.seek(self._starts[kind][number])
        split, row, text = orjson.loads(self._spool.readline())
        return split, row, text

    def refuse_nothing(self) -> None:
        """Raises `DataError` where no record is left and rows were broken: those may have held them."""
        kept = sum(len(self._starts[kind]) - len(self._duplicates[kind]) for kind in KINDS)
        if kept or not self._bad.count:
            return
        first = self._bad.shown[0]
        left = [f"{why}: {n}" for part in self._about_input()["left_out"].values() for why, n in part.items()]
        raise DataError(
            f"no record was found: {self._bad.count:,} of {self.rows:,} rows cannot be used, the first of them "
            f"{self._bad.locations[first['source']]}:{first['row']}: {first['why']}."
            + (f" Left out besides: {'; '.join(left)}." if left else "")
            + f" Mend the rows, or take another --format than {self._job.log_format}."
        )

    # --- writing ---

    def write(self, name: str, tally: Tally) -> dict[str, Any]:
        """One of the files, held-out rows first, and what is to be said of it."""
        kind, _, rest = name.partition(".")
        splits = (rest.partition(".")[0],) if kind == "seed" else ("test", "train")
        digest, rows = hashlib.sha256(), Counter[str]()
        with atomic_writer(self._job.out_dir / name, "wb") as file:
            for wanted in splits:
                for number in range(len(self._starts[kind])):
                    if number in self._duplicates[kind]:
                        continue
                    split, row, _ = self._load(kind, number)
                    if split == wanted:
                        line = orjson.dumps(row) + b"\n"
                        file.write(line)
                        digest.update(line)
                        tally.add(kind, split, row)
                        rows[split] += 1
        return {"rows": sum(rows.values()), "test_rows": rows["test"], "sha256": digest.hexdigest()}

    def stats(self, tally: Tally, files: Mapping[str, Any], detector: Mapping[str, Any]) -> dict[str, Any]:
        """What stats.json holds: no times, so that the same input gives the same bytes."""
        config = dataclasses.asdict(self._config) | {"detector": _public(self._config.detector)}
        about = self._about_input()
        if self._logged is None:
            config.pop("detector")
        sat = sum(tally.records["sat"].values())
        notes = []
        if self._logged is not None and not sat:
            notes.append(
                "The detector marks complaints only: nothing tells which replies satisfied, so there are no SAT"
            )
            notes[-1] += " records and no seed pairs."
        if self._found["seed"] and not files["seed.test.jsonl"]["rows"]:
            notes.append("No seed pair is held out: leave data.seed_test out, or raise split.test_share.")
        if not sum(tally.records["dsat"].values()):
            where = "left_out and bad_rows" if self._bad.count else "left_out"
            notes.append(f"No DSAT record was found: the reasons in {where} say why.")
        return {
            "format": self._job.log_format,
            "sources": self._sources,
            "license": self._licence(),
            "rows": {"read": self.rows, "bad": self._bad.count},
            "bad_rows": self._bad.shown,
            **about,
            "found": self._found,
            "masked": _sorted(self._masked),
            "records": {kind: dict(counts) for kind, counts in tally.records.items()},
            "test_rows": files["dsat.jsonl"]["test_rows"],  # not that of sat.jsonl: each file has its own in `files`
            "turns": {
                kind: {str(turn): counts[turn] for turn in sorted(counts)} for kind, counts in tally.turns.items()
            },
            "lengths": tally.lengths(),
            "detector": dict(detector),
            "notes": notes,
            "files": dict(files),
            "rules": config,
        }

    def _about_input(self) -> dict[str, Any]:
        """Conversations, labels, and what was left out where."""
        hygiene = {"hygiene": _sorted(self._dropped)}
        if self._logged is not None:
            left = {"input": _sorted(self._logged.left_out), "cut before": _sorted(self._logged.cut)}
            return {"conversations": self._logged.count, "left_out": left | hygiene}
        if self._job.log_format == "ultrafeedback":
            left = {"input": _sorted(self._scored.left_out)}
            return {"conversations": self._scored.count, "left_out": left | hygiene}
        left = {"input": _sorted(self._labelled.left_out)}
        labels = {"labels": _sorted(self._labelled.labels)}
        return {"conversations": self._labelled.conversations, **labels, "left_out": left | hygiene}

    def _licence(self) -> dict[str, str | None]:
        if self._job.license:
            return {"id": self._job.license, "why": "As given by --license."}
        if self._job.log_format in PUBLISHED:
            name, dataset = PUBLISHED[self._job.log_format]
            return {"id": name, "why": f"That of {dataset}, whose format this is; other rows have their own."}
        return {"id": None, "why": "The rows do not say; give --license."}


def _from_complaint(conversation: Conversation, complaint: Complaint) -> Mined:
    turns, i = conversation.turns, complaint.turn
    if not (2 <= i < len(turns) and turns[i].role == "user" and turns[i - 1].role == "assistant"):
        raise ValueError(f"the detector marks turn {i} of {conversation.id}, which follows no reply")
    prompt = tuple(Message(turn.role, turn.content) for turn in turns[: i - 1])
    name = f"{conversation.id}#{i}"
    return Mined(
        "dsat", name, conversation.id, prompt, turns[i - 1].content, turns[i].content, evidence=complaint.evidence
    )


def _mask_json(value: Any, counts: Counter[str]) -> Any:
    if isinstance(value, str):
        return mask(value, counts)
    if isinstance(value, dict):
        return {key: _mask_json(item, counts) for key, item in value.items()}
    return value


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    """Without zeros, in the order of the alphabet."""
    return {key: counts[key] for key in sorted(counts) if counts[key]}


def _public(detector: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a detector without addresses, paths and what shapes no result: the data card is for others."""
    hidden = ("base_url", "api_key_env", "timeout_s", "concurrency")
    shown = dict(detector)
    if isinstance(shown.get("judge"), dict):
        shown["judge"] = {key: value for key, value in shown["judge"].items() if key not in hidden}
    if isinstance(shown.get("rules"), (list, tuple)):
        shown["rules"] = [Path(str(name)).name for name in shown["rules"]]
    shown.pop("requests_per_minute", None)
    return shown
