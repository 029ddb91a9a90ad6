"""SIGKILL at random moments of a whole run, which is then continued to its end and compared with one that never was."""

from __future__ import annotations

import random
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drills.runs import Job, Witness, check_words, count_rows, differences, snapshot
from drills.server import Server

ENDS_WITHIN_S = 120.0  # the other processes of a run, once one of them is gone
RUNS_WITHIN_S = 1800.0


@dataclass
class Outcome:
    """Of one run that was killed some times."""

    kills: int = 0
    identical: bool = False
    lost: int = 0
    doubled: int = 0
    problems: list[str] = field(default_factory=list)


class Lives:
    """One run directory, and the processes that work on it: a server for each."""

    def __init__(self, servers: Sequence[Server], job: Job, folder: Path) -> None:
        self.servers, self.job = servers, job
        self.run_dir = folder / "run"
        self.logs = [folder / f"log.{index}" for index in range(len(servers))]
        folder.mkdir(parents=True)

    def start(self) -> None:
        words = self.job.words(self.run_dir)
        count = len(self.servers)
        if count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                words += ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--num-processes", count]
        for index, (server, log) in enumerate(zip(self.servers, self.logs, strict=True)):
            server.start([*words, *(["--process-id", index] if count > 1 else [])], log)

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes after at most so many seconds; None where a process is still at work."""
        deadline = time.monotonic() + seconds
        return [server.wait(max(0.0, deadline - time.monotonic())) for server in self.servers]

    def said(self) -> str:
        return "\n".join(log.read_text(encoding="utf-8") for log in self.logs if log.exists())


def run_whole(servers: Sequence[Server], job: Job, folder: Path) -> tuple[Path, float]:
    """A run that nobody ends: its directory and the seconds it took."""
    lives, start = Lives(servers, job, folder), time.monotonic()
    lives.start()
    codes = lives.wait(RUNS_WITHIN_S)
    if set(codes) != {0}:
        raise SystemExit(f"a run without any drill ended with {codes}:\n{lives.said()[-3000:]}")
    return lives.run_dir, time.monotonic() - start


def kill_and_go_on(
    servers: Sequence[Server], job: Job, folder: Path, whole: Path, seconds: float, kills: int, chance: random.Random
) -> Outcome:
    """A run that is killed up to so many times, at moments that are equally likely all over what is left of it.

    Of several processes one is killed, or all at once.

    Args:
      whole: the directory of a run that nobody ended, which took so many `seconds`.
    """
    lives, found = Lives(servers, job, folder), Outcome()
    witnesses: list[tuple[Witness, list[int]]] = []
    left = seconds
    while found.kills < kills:
        lives.start()
        moment = chance.uniform(0, left)
        time.sleep(moment)
        if not kill(lives, found, chance):
            break
        witnesses.append((Witness(lives.run_dir, len(lives.servers)), [len(_text(log)) for log in lives.logs]))
        left = max(2.0, left - moment)
    else:
        lives.start()
        codes = lives.wait(RUNS_WITHIN_S)
        if set(codes) != {0}:
            found.problems.append(f"after {found.kills} kills it ended with {codes}: {lives.said()[-600:]}")
            return found
    judge(lives, found, witnesses, whole)
    if found.identical and not found.problems:
        shutil.rmtree(folder)
    return found


def kill(lives: Lives, found: Outcome, chance: random.Random) -> bool:
    """False where the run had ended by itself before; that is no kill."""
    codes = lives.wait(0)
    if all(code is not None for code in codes):
        if set(codes) != {0}:
            found.problems.append(f"it ended by itself with {codes}")
        return False
    every = chance.random() < 0.25
    victims = [*lives.servers] if every else [chance.choice(lives.servers)]
    running = [server for server in victims if server.pid]
    ended = [server.kill() for server in running]
    found.kills += 1
    if -9 not in ended:
        found.problems.append(f"the killed ones ended with {ended}")
    for server in lives.servers:
        if server.pid and server.wait(ENDS_WITHIN_S) is None:
            found.problems.append(f"a process was still there {ENDS_WITHIN_S:.0f} seconds after another one's end")
            server.kill()
    return True


def judge(lives: Lives, found: Outcome, witnesses: Sequence[tuple[Witness, list[int]]], whole: Path) -> None:
    """Compares what is there at the end with a run that nobody ended, and asks what became of what there was."""
    texts = [_text(log) for log in lives.logs]
    for witness, lengths in witnesses:
        since = "\n".join(text[length:] for text, length in zip(texts, lengths, strict=True))
        lost, doubled, problems = witness.ask(since)
        found.lost, found.doubled, found.problems = (
            found.lost + lost,
            found.doubled + doubled,
            found.problems + problems,
        )
    lost, doubled = count_rows(lives.run_dir, whole)
    found.lost, found.doubled = found.lost + lost, found.doubled + doubled
    wrong = differences(snapshot(whole), snapshot(lives.run_dir))
    found.identical = not wrong
    found.problems += [f"{place} is not the same" for place in wrong[:10]]
    if len(lives.servers) == 1:  # that another process was lost is shown with where that was noticed
        found.problems += check_words("\n".join(texts))


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8") if log.exists() else ""
