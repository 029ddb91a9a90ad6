"""Options of commands that several processes run together, and how such a command ends when one of them fails."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NoReturn, Optional

import typer

from drift_jax.errors import DriftError, PeerError
from drift_jax.stopping import STOPPED, asked, heed_signals, join_processes, leave_together

_OPTIONS: dict[str, tuple[Any, Any]] = {
    "distributed": (
        Annotated[
            Literal["auto", "on", "off"],
            typer.Option(
                help="Several processes as one run: when the cluster says so (Slurm, TPU pods, ...), always, never."
            ),
        ],
        "auto",
    ),
    "coordinator": (
        Annotated[Optional[str], typer.Option(metavar="HOST:PORT", help="Where process 0 listens for the others.")],  # noqa: UP045
        None,
    ),
    "num_processes": (Annotated[Optional[int], typer.Option(min=1, help="How many processes there are.")], None),  # noqa: UP045
    "process_id": (Annotated[Optional[int], typer.Option(min=0, help="Which of them this is, from 0.")], None),  # noqa: UP045
}


def across_processes(
    command: Callable[..., None], first: Callable[[dict[str, Any]], bool] = lambda _: False
) -> Callable[..., None]:
    """The command with the options of `_OPTIONS`; joins the other processes before it begins.

    Args:
      first: is called before that with all options; True when it has done the whole of the command's work.
    """
    own = inspect.signature(command, eval_str=True)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in _OPTIONS.items()
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        if first(given):
            return
        with heed_signals():
            from drift_jax.distributed import Processes, start_processes

            processes = Processes(*(given.pop(name) for name in _OPTIONS))
            if given.get("devices") is None:  # devices that are not here have no processes
                start_processes(processes)
                join_processes()
            with _interrupted_at_once():
                command(**given)

    whole = own.replace(parameters=[*own.parameters.values(), *more])
    # Typer looks at both; of the command's annotations it could not read the names that are known in its file only.
    run.__signature__ = whole  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {name: parameter.annotation for name, parameter in whole.parameters.items()}
    return run


def alone(command: Callable[..., None]) -> Callable[..., None]:
    """The command of one process, which ends as `stopping` says where it is asked to."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        with heed_signals(), _interrupted_at_once():
            command(**given)

    return run


@contextlib.contextmanager
def _interrupted_at_once() -> Iterator[None]:
    """The second Ctrl-C waits for nobody."""
    try:
        yield
    except KeyboardInterrupt:
        leave_peers(130)
        leave_threads(130)
        raise


def is_mine_to_tell(error: DriftError) -> bool:
    """Whether this process prints an error: the one that has it does, and process 0."""
    import jax

    return not isinstance(error, PeerError) or jax.process_index() == 0


def tell_lost_peer(error: Exception) -> None:
    """Of several processes: says that another one is gone, if that is what the error means, else where it arose.

    Raises the error again where there is one process.
    """
    import jax

    if not jax.distributed.is_initialized():
        raise error
    from drift_jax.distributed import is_lost_peer

    traceback.print_exception(error)
    if not is_lost_peer(error):
        return
    if asked():  # the others have stopped before this one could
        leave_peers(STOPPED)
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} has lost another one of this run, whose own "
        "output says why. Run the same command again on every host: it goes on from what was finished.\n"
        f"  ({type(error).__name__}: {str(error).splitlines()[0][:300]})",
        file=sys.stderr,
    )


def end_stopped() -> NoReturn:
    """Leaves with the exit code of a process that was asked to stop."""
    leave_together()
    leave_peers(STOPPED)
    leave_threads(STOPPED)
    raise SystemExit(STOPPED)


def leave_threads(code: int) -> None:
    """Ends at once where threads are left that an ordinary end would wait for: requests to a judge, a save."""
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_together(code: int) -> NoReturn:
    """Leaves with an exit code; of several processes at once, so that the others notice."""
    leave_peers(code)
    raise SystemExit(code)


def leave_peers(code: int) -> None:
    """Ends one of several processes at once; does nothing for a single one.

    An ordinary end waits for the others, which may be waiting for this process themselves.
    """
    import jax

    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
