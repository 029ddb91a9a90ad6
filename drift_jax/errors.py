"""Errors that a user can act on.

Everything the user can cause (a bad row, a bad key, a bad file) is a `DriftError`. The command line prints
its message without a traceback and leaves with exit code 2. Anything else is a bug of ours and shows a
traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class DriftError(Exception):
    """The invariant that does not hold, the values seen, and what to do about it, in one message."""


class ConfigError(DriftError):
    """A configuration key is unknown, has the wrong type, or its value is impossible."""


class ModelError(DriftError):
    """A model directory cannot be read, or holds something this package does not compute."""


class DataError(DriftError):
    """Input data cannot be used."""


class PeerError(DriftError):
    """What went wrong on one process of a run of several; raised on all of them."""

    def __init__(self, message: str, process: int) -> None:
        self.process = process
        super().__init__(message if process == 0 else f"process {process}: {message}")


class StageError(DriftError):
    """A stage of a run cannot start or cannot finish (changed key, full disk, missing input)."""


class EndpointError(DriftError):
    """A server did not answer, or refused a request.

    Args:
      passing: whether the same request may succeed later (no connection, too many requests, a server's error).
      status: of the HTTP answer, if there was one.
      retry_after_s: how long the server asks to be left alone.
    """

    def __init__(
        self, message: str, *, passing: bool, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.passing, self.status, self.retry_after_s = passing, status, retry_after_s


class BadRowsError(DataError):
    """Rows of a JSONL file that break the format, collected over the whole file and reported together."""

    SHOWN = 20

    def __init__(
        self, path: str, problems: Sequence[tuple[int, str]], total_rows: int, whole: bool = True, hint: str = ""
    ) -> None:
        """`whole`: whether the file was read to its end; `hint`: what else may be the matter."""
        self.path = path
        self.problems = tuple(problems)
        self.total_rows = total_rows
        shown = [f"  {path}:{line}: {why}" for line, why in self.problems[: self.SHOWN]]
        hidden = len(self.problems) - len(shown)
        if hidden > 0:
            shown.append(f"  ... and {hidden} more")
        super().__init__(
            f"{len({line for line, _ in self.problems})} of {'' if whole else 'the first '}{total_rows} rows in {path} "
            "cannot be used:\n"
            + "\n".join([*shown, *([hint] if hint else [])])
            + "\nMend these rows, or pass --on-bad-row skip to go on without them (they are counted)."
        )
