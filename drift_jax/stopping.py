"""Being asked to stop: SIGTERM, SIGINT or SIGHUP means to keep what is done and to end with exit code 75.

Where nothing of worth would be lost, the signal ends the work at once, as Ctrl-C does: rows of a journal are on disk
when they are there. Training first finishes its update and saves (`held`, `reached`).

Processes of one run must come to the same collectives, so there the signal only leaves a note, and every process
learns of it from the coordination service. They stop together: in a loop that all go through at an update that they
agree on (`reached`), elsewhere at the next point where they exchange words (distributed.py). What a process does
alone in between may be left at any time (`local`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import FrameType
from typing import Any, TypeVar, final

T = TypeVar("T")
K = TypeVar("K")

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the exit code of a process that was asked to stop
_SAME_S = 0.5  # signals that follow so soon are one: a launcher and a terminal may both send it
_TOGETHER_S = 10  # how long processes wait for each other before they end
_LOOK_S = 0.25  # between two looks at what the other processes have said
_AGAIN_S = 0.05  # until what swallowed a request is over
_LAST_ANSWERS_S = 8  # for answers that are on their way when the run is to stop
_KEY, _CALLS = "drift_jax/stop", "drift_jax/stop_calls"


@final
class Stopped(BaseException):
    """Asked to stop; all that was done is kept. No `Exception`, so that no library takes it for its own."""


@final
class _Note:
    """What this process knows of a request to stop."""

    def __init__(self) -> None:
        self.asked: str | None = None  # by what
        self.raised = False
        self.interrupted: float | None = None  # when SIGINT came first
        self.held = self.local = 0
        self.several: Any = None  # the client of the coordination service
        self.calls = 0  # of `reached`
        self.stop_at: int | None = None
        self.lock = threading.Lock()
        self.over = threading.Event()  # the end of this process: nothing is asked of the service from there on
        self.threads: list[threading.Thread] = []


_note = _Note()


@contextlib.contextmanager
def heed_signals() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP ask to stop while the block runs. A second SIGINT is a `KeyboardInterrupt`."""
    global _note
    _note, before = _Note(), {}
    if threading.current_thread() is threading.main_thread():
        # What a launcher has us ignore (nohup, the background of a shell), stays ignored.
        numbers = [
            n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN
        ]
        before = {number: signal.signal(number, _on_signal) for number in numbers}
    shown = sys.unraisablehook

    def lost(what: sys.UnraisableHookArgs) -> None:
        if issubclass(what.exc_type, Stopped):
            _start(_ask_again, _note)
        else:
            shown(what)

    sys.unraisablehook = lost
    try:
        yield
    finally:
        if sys.unraisablehook is lost:  # else somebody's has it in hand, and passes on what is not theirs
            sys.unraisablehook = shown
        _note.over.set()
        # Python ends a thread inside the service's client by an exception, which C++ takes for a reason to abort.
        for thread in _note.threads:
            thread.join(_TOGETHER_S)
        for number, handler in before.items():
            signal.signal(number, handler)


def join_processes() -> None:
    """From here on this process stops together with the others of its run, if there are any."""
    import jax
    from jax._src import distributed  # the client of the coordination service has no public name

    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    _note.several = distributed.global_state.client
    _start(_listen, _note, jax.process_index(), jax.process_count())
    if _note.asked:  # before there was anybody to tell
        _start(_announce, _note)


def _start(target: Callable[..., None], note: _Note, *args: int) -> None:
    note.threads.append(threading.Thread(target=target, args=(note, *args), daemon=True))
    note.threads[-1].start()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A request to stop waits for the end of the block, or for whoever asks `reached` in it."""
    if threading.current_thread() is not threading.main_thread():  # signals come to the main one alone
        yield
        return
    _note.held += 1
    try:
        yield
    finally:
        _note.held -= 1
    check()


@contextlib.contextmanager
def local() -> Iterator[None]:
    """Work of this process alone, which may be left at any time also where there are several processes."""
    _note.local += 1
    try:
        check()
        yield
    finally:
        _note.local -= 1


def check() -> None:
    """Raises `Stopped` where that is asked for and nothing is held."""
    if _note.asked and _may_raise():
        _raise()


def asked() -> bool:
    """Whether this process is to stop; of several, they may learn of it at different times."""
    return _note.asked is not None


def shared() -> bool:
    """What a process says of itself where all of them exchange words: whether it is to stop and nothing is held."""
    return _note.asked is not None and _note.held == 0


def reached() -> bool:
    """Whether to stop here. Of several processes all must ask equally often; all get the same answers.

    After a request the largest number of calls that any of them has made is agreed on, and the next call is the one.
    """
    if _note.several is None:
        return asked()
    with _note.lock:  # nobody goes past while the agreement is made
        _note.calls += 1
        return _note.stop_at is not None and _note.calls >= _note.stop_at


def late_answers(pool: ThreadPoolExecutor, futures: Mapping[Future[T], K]) -> dict[K, T]:
    """What is answered while the run is to stop: it is paid for, but it is not waited for as long as it may take."""
    pool.shutdown(wait=False, cancel_futures=True)
    # Those that were never begun do not count as done for `wait`.
    done, _ = wait([future for future in futures if not future.cancelled()], timeout=_LAST_ANSWERS_S)
    return {futures[f]: f.result() for f in done if f.exception() is None}


def leave_together() -> None:
    """Waits for the other processes to be about to end as well; not for ever, as they may be gone."""
    import jax

    if _note.several is None:
        return
    with contextlib.suppress(Exception):
        _note.several.wait_at_barrier(f"{_KEY}/end", _TOGETHER_S * 1000)
        if jax.process_index() == 0:
            time.sleep(1)  # it is the one that others are connected to: they end first


def _on_signal(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if number == signal.SIGINT:
        if _note.interrupted is not None and now - _note.interrupted > _SAME_S:
            signal.default_int_handler(number, frame)
        _note.interrupted = _note.interrupted or now
    if _note.asked is None:
        _note.asked = signal.Signals(number).name
        if _note.several is not None:
            _start(_announce, _note)
        # Not by print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):  # a terminal that was closed
            os.write(2, f"{_note.asked}: ending once what is done is kept. Ctrl-C again ends at once.\n".encode())
    if _may_raise() and not _note.raised:
        _raise()


def _may_raise() -> bool:
    return _note.held == 0 and (_note.several is None or _note.local > 0)


def _raise() -> None:
    _note.raised = True
    raise Stopped


def _ask_again(note: _Note) -> None:
    """The signal came while Python called something whose errors nobody gets, such as a callback of its collector."""
    note.raised = False
    if not note.over.wait(_AGAIN_S):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _announce(note: _Note) -> None:
    with contextlib.suppress(Exception):  # another process has said it before, or is gone
        note.several.key_value_set(_KEY, note.asked)


def _listen(note: _Note, index: int, count: int) -> None:
    """Waits for the request of any process, and agrees with all on the call of `reached` that is the last one.

    JAX's own protocol (`reached_preemption_sync_point`) hears SIGTERM alone, and Orbax tells it of the updates that
    were saved, from a thread of its own: in between a process would be believed to be further back than it is.
    """
    why = None
    while why is None:
        if note.over.wait(_LOOK_S):
            return
        try:
            why = note.several.key_value_try_get(_KEY)
        except Exception as error:
            if "NOT_FOUND" not in str(error):
                return  # the run ends
    with note.lock, contextlib.suppress(Exception):
        note.several.key_value_set(f"{_CALLS}/{index}", str(note.calls))
        note.several.wait_at_barrier(_CALLS, _TOGETHER_S * 1000)
        told = [note.several.blocking_key_value_get(f"{_CALLS}/{i}", 1000) for i in range(count)]
        note.stop_at = max(map(int, told)) + 1
    note.asked = note.asked or why
    if note.local and not note.held:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
