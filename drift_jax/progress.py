"""What a person sees while a run works: a bar per stage with rate and time left, and the closing table."""

from __future__ import annotations

import abc
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import jax
from rich import box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

_SECONDS_BETWEEN_SAMPLES = 60.0
_SAMPLE_LINES, _SAMPLE_WIDTH = 6, 500  # at most so many lines and characters


class StageProgress(abc.ABC):
    """Counts the units (rows, updates, ...) of one stage; made by `stage_progress`."""

    def __init__(self, description: str, total: int | None, unit: str, clock: Callable[[], float]) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.count = 0
        self.text = ""
        self._clock = clock
        self._start = clock()
        self._last_sample: float | None = None
        self._marks: deque[tuple[float, int]] = deque([(self._start, 0)], maxlen=50)

    def advance(self, count: int = 1, text: str | None = None) -> None:
        """`count` more units are done; `text` replaces the live text, such as "loss 0.512"."""
        self.count += count
        self.text = self.text if text is None else printable(text)  # such as a server's last line
        self._marks.append((self._clock(), self.count))
        if len(self._marks) == 3 and self._marks[0][1] == 0:
            self._marks.popleft()  # the first unit waits for compilation; its time says nothing of the rest
        self._show()

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return self._clock() - self._start

    @property
    def rate(self) -> float | None:
        """Units per second over the last updates; None before the first."""
        (first_time, first_count), (last_time, last_count) = self._marks[0], self._marks[-1]
        return (last_count - first_count) / (last_time - first_time) if last_time > first_time else None

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None while there is no rate, or no total."""
        return (self.total - self.count) / self.rate if self.rate and self.total is not None else None

    def status(self) -> str:
        """Count, rate, time gone, time left and the live text in one line."""
        rate = f"{self.rate:.3g}/s" if self.rate else "--/s"
        times = f"{_clock_text(self.seconds)} gone, {_clock_text(self.seconds_left)} left"
        return self._line(f"{rate}, {times}")

    def ending(self, word: str) -> str:
        """The same for a stage that is over; the rate is then that of the whole stage."""
        rate = f"{self.count / self.seconds:.3g}/s" if self.seconds > 0 else "--/s"
        return self._line(f"{rate}, {word} {_clock_text(self.seconds)}")

    def _line(self, times: str) -> str:
        count = str(self.count) if self.total is None else f"{self.count}/{self.total}"
        return f"{count} {self.unit}, {times}" + (f", {self.text}" if self.text else "")

    def show_sample(self, parts: Mapping[str, str]) -> None:
        """Prints an example of what is being made, such as {"prompt": ..., "sampled": ...}: the first and one a minute.

        Of the last text the first lines are shown, of those before it the last line only.
        """
        now = self._clock()
        if self._last_sample is not None and now - self._last_sample < _SECONDS_BETWEEN_SAMPLES:
            return
        self._last_sample = now
        *above, (name, text) = parts.items()
        last_lines = {key: printable(value).rpartition("\n")[2] for key, value in above}
        shown = {key: line if len(line) <= 100 else f"{line[:97]}..." for key, line in last_lines.items()}
        shown[name] = printable(text[:_SAMPLE_WIDTH], _SAMPLE_LINES).replace("\n", "\n    ")
        self._print("\n  ".join([f"{self.description}, an example", *map(": ".join, shown.items())]))

    @abc.abstractmethod
    def _show(self) -> None: ...

    @abc.abstractmethod
    def _print(self, text: str) -> None: ...


@final
class _BarProgress(StageProgress):
    """A live bar; `bar` draws and refreshes it, also between two updates."""

    def __init__(
        self, bar: Progress, description: str, total: int | None, unit: str, clock: Callable[[], float]
    ) -> None:
        super().__init__(description, total, unit, clock)
        self._bar = bar
        self._task = bar.add_task(description, total=total, status=self.status)

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.count)

    def _print(self, text: str) -> None:
        self._bar.console.print(Text(text), soft_wrap=True)  # above the bar


@final
class _StatusColumn(ProgressColumn):
    """Redrawn twice a second, so that the time goes on during a long step."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis", ratio=1))

    def render(self, task: Task) -> Text:
        return Text(f"{task.description}: {task.fields['status']()}")


@final
class _LineProgress(StageProgress):
    """For logs: a line when `seconds_between` have passed, and one at the end."""

    def __init__(
        self,
        console: Console,
        seconds_between: float,
        description: str,
        total: int | None,
        unit: str,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(description, total, unit, clock)
        self._console, self._seconds_between = console, seconds_between
        self._last_line = self._start

    def _show(self) -> None:
        if self._clock() - self._last_line >= self._seconds_between and self.count != self.total:
            self._last_line = self._clock()
            self.print_line(self.status())

    def print_line(self, text: str) -> None:
        self._print(f"{self.description}: {text}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def stage_progress(
    description: str,
    total: int | None,
    unit: str = "steps",
    *,
    console: Console | None = None,
    seconds_between_lines: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[StageProgress]:
    """A bar on a terminal; elsewhere a line every `seconds_between_lines` and one at the end.

    Args:
      total: units this process will do from now on. A resumed stage passes what is left, so that the rate
        and the time left are those of the work in front of it. None: not known.
      unit: plural noun for the count, such as "rows".

    Processes other than 0 of a multi-host run print nothing.
    """
    console = console or Console(emoji=False)
    if jax.process_index() != 0:
        console = Console(quiet=True)
    if console.is_terminal:
        columns = (BarColumn(bar_width=16), _StatusColumn())
        with Progress(*columns, console=console, refresh_per_second=2, expand=True) as bar:
            yield _BarProgress(bar, description, total, unit, clock)
        return
    lines = _LineProgress(console, seconds_between_lines, description, total, unit, clock)
    word = "stopped after"
    try:
        yield lines
        word = "done in"
    finally:
        lines.print_line(lines.ending(word))


def printable(text: str, lines: int | None = None) -> str:
    """Text of a model for a terminal: no control characters, which could move the cursor, and at most so many lines."""
    return "\n".join(_without_controls(text.strip()).splitlines()[:lines])


def _without_controls(text: str) -> str:
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


@final
class PrintableOnly(RenderHook):
    """For every console of the command: what it prints holds no control character but those of rich itself.

    Messages quote rows of chat logs, answers of servers and names in files; an escape sequence among them could clear
    the screen, set its title or write to the clipboard.
    """

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [one if isinstance(one, Control) else _Printable(one) for one in renderables]


@final
class _Printable:
    def __init__(self, what: ConsoleRenderable) -> None:
        self._what = what

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._what, options):
            yield segment if segment.control else Segment(_without_controls(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._what)


def _clock_text(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True)
class StageSummary:
    """One row of the closing table; None is shown as a dash."""

    stage: str
    pairs: int | None = None
    drops: Mapping[str, int] = field(default_factory=dict)  # reason -> rows
    loss: float | None = None
    eval_margins: float | None = None  # eval_rewards/margins, on held-out pairs
    eval_accuracies: float | None = None  # eval_rewards/accuracies, on held-out pairs
    tokens_per_second: float | None = None
    seconds: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `SUMMARY_COLUMNS`."""
        drops = ", ".join(f"{count} {reason}" for reason, count in self.drops.items() if count) or "none"
        return (
            self.stage,
            _cell(self.pairs, "d"),
            "-" if self.pairs is None and not self.drops else drops,
            _cell(self.loss, ".4f"),
            _cell(self.eval_margins, "+.4f"),
            _cell(self.eval_accuracies, ".3f"),
            _cell(self.tokens_per_second, ",.0f"),
            _cell(self.seconds, ",.1f"),
        )


SUMMARY_COLUMNS = (
    "stage",
    "pairs",
    "drops",
    "loss",
    "eval_rewards/margins",
    "eval_rewards/accuracies",
    "tokens/s",
    "seconds",
)


def summary_table(rows: Sequence[StageSummary], title: str | None = None) -> Table:
    """The closing table for a rich console."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fits 80 columns
    for column in SUMMARY_COLUMNS:
        header = column.replace("eval_rewards/", "eval_\nrewards/\n")
        left = column in ("stage", "drops")
        table.add_column(header, justify="left" if left else "right", no_wrap=column != "drops", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row.cells()))
    return table


def summary_markdown(rows: Sequence[StageSummary]) -> str:
    """The same table as GitHub Markdown."""
    aligned = ["---" if column in ("stage", "drops") else "---:" for column in SUMMARY_COLUMNS]
    lines = [SUMMARY_COLUMNS, aligned, *(row.cells() for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
