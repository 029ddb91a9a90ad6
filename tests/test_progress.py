"""The bar and its plain-text twin, and the closing table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from drift_jax import progress
from drift_jax.progress import StageSummary, stage_progress, summary_markdown, summary_table


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def log_console() -> Console:
    return Console(file=io.StringIO(), width=120)


def written(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    clock, console = Clock(), log_console()
    with stage_progress("train iter_1", 100, "steps", console=console, clock=clock) as bar:
        for step in range(100):
            clock.now += 0.5
            bar.advance(1, f"loss {step / 100:.2f}")
    lines = written(console)
    assert lines == [
        "train iter_1: 20/100 steps, 2/s, 0:10 gone, 0:40 left, loss 0.19",
        "train iter_1: 40/100 steps, 2/s, 0:20 gone, 0:30 left, loss 0.39",
        "train iter_1: 60/100 steps, 2/s, 0:30 gone, 0:20 left, loss 0.59",
        "train iter_1: 80/100 steps, 2/s, 0:40 gone, 0:10 left, loss 0.79",
        "train iter_1: 100/100 steps, 2/s, done in 0:50, loss 0.99",
    ]


def test_the_rate_forgets_the_time_that_compilation_took() -> None:
    clock, console = Clock(), log_console()
    with stage_progress("sample", 10, "rows", console=console, clock=clock) as bar:
        assert bar.rate is None and bar.seconds_left is None
        clock.now += 60
        bar.advance(2)
        assert bar.rate == pytest.approx(2 / 60)  # the first update is all there is to go by
        clock.now += 1
        bar.advance(2)
        assert bar.rate == pytest.approx(2.0) and bar.seconds_left == pytest.approx(3.0)
        clock.now += 1
        bar.advance(2)
        assert bar.rate == pytest.approx(2.0)


def test_a_stage_that_fails_says_how_far_it_came() -> None:
    clock, console = Clock(), log_console()
    with (
        pytest.raises(RuntimeError),
        stage_progress("sample", 9, "rows", console=console, clock=clock) as bar,
    ):
        clock.now += 3700
        bar.advance(3)
        raise RuntimeError
    assert written(console)[-1].startswith("sample: 3/9 rows, 0.000811/s, stopped after 1:01:40")


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    with stage_progress("train iter_1", 4, "steps", console=console, clock=clock) as bar:
        for _ in range(3):
            clock.now += 2
            bar.advance(1, "loss [0.5]")
    last = written(console)[-2]  # then the cursor comes back
    assert "━ " in last and " train iter_1: 3/4 steps, 0.5/s, 0:06 gone, 0:02 left, loss [0.5]" in last


UGLY = {"prompt": "Hi\n\nSort [1, 2].  \n", "complaint": "x" * 200, "sampled": "One\x1b[2J\n\u202etwo" + "\nline" * 9}


def test_an_example_is_shown_now_and_then_and_can_be_read() -> None:
    clock, console = Clock(), log_console()
    with stage_progress("sampling", 9, "rows", console=console, clock=clock) as bar:
        for second in range(180):
            clock.now += 1
            bar.show_sample(UGLY | {"prompt": f"{UGLY['prompt']}{second}"})
    lines = written(console)
    assert [line.strip() for line in lines if line.startswith("  prompt")] == ["prompt: 0", "prompt: 60", "prompt: 120"]
    assert lines[:6] == [
        "sampling, an example",
        "  prompt: 0",
        f"  complaint: {'x' * 97}...",
        "  sampled: One\N{REPLACEMENT CHARACTER}[2J",
        "    \N{REPLACEMENT CHARACTER}two",
        "    line",
    ]
    assert all(line.isprintable() for line in lines) and sum(line == "    line" for line in lines) == 3 * 4


def test_an_example_stands_above_the_bar_of_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    with stage_progress("sampling", 9, "rows", console=console, clock=Clock()) as bar:
        bar.show_sample(UGLY)
        bar.advance(3)
    text = "\n".join(written(console))
    assert "  prompt: Sort [1, 2]." in text and "\x1b[2J" not in text
    assert text.index("sampled: One") < text.rindex("sampling: 3/9 rows")


def test_an_empty_stage_and_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    console = log_console()
    with stage_progress("sample", 0, "rows", console=console, clock=Clock()):
        pass
    assert written(console) == ["sample: 0/0 rows, --/s, done in 0:00"]
    monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
    other = log_console()
    with stage_progress("sample", 1, "rows", console=other) as bar:
        bar.advance()
    assert written(other) == []


def test_names_keep_their_colons_where_no_console_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_progress("tokenising a:train:.jsonl", 1):
        pass
    assert capsys.readouterr().out.startswith("tokenising a:train:.jsonl: 0/1 steps")


ROWS = (
    StageSummary("seed", pairs=24, loss=0.6931, seconds=61.25),
    StageSummary(
        "iter_1",
        pairs=150,
        drops={"empty completion": 2, "hit max_new_tokens": 0, "a|b": 1},
        loss=0.5,
        eval_margins=0.125,
        eval_accuracies=0.75,
        tokens_per_second=1234.5,
        seconds=1800.0,
    ),
    StageSummary("[export]"),
)


def test_the_closing_table_as_markdown() -> None:
    head, *rest = summary_markdown(ROWS).splitlines()
    assert head == "| " + " | ".join(progress.SUMMARY_COLUMNS) + " |"
    assert rest == [
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
        "| seed | 24 | none | 0.6931 | - | - | - | 61.2 |",
        r"| iter_1 | 150 | 2 empty completion, 1 a\|b | 0.5000 | +0.1250 | 0.750 | 1,234 | 1,800.0 |",
        "| [export] | - | - | - | - | - | - | - |",
    ]


def test_the_closing_table_fits_a_console_of_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table(ROWS, title="run"))
    text = "\n".join(written(console))
    assert "…" not in text
    for cell in ("accuracies", "iter_1", "1 a|b", "+0.1250", "0.750", "1,234", "1,800.0", "[export]"):
        assert cell in text
