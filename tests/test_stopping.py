"""What a signal does to one process: at once, at the end of what is held, or for good."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from drift_jax import stopping
from drift_jax.stopping import Stopped


@pytest.fixture(autouse=True)
def heeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also where the tests run in the background of a shell, whose children ignore Ctrl-C, or by nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    closed = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with stopping.heed_signals():
        yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, closed)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=str)
def test_where_nothing_is_held_it_is_at_once(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    assert not stopping.reached()
    with pytest.raises(Stopped):
        send(number)
    assert capfd.readouterr().err.startswith(f"{number.name}: ending once what is done is kept.")


def test_what_is_held_is_done_first() -> None:
    done = []
    with pytest.raises(Stopped), stopping.held():
        with stopping.held():
            send(signal.SIGTERM)
            done.append("inner")
        done.append("outer")
        assert stopping.reached()
    assert done == ["inner", "outer"]


def test_an_error_is_not_replaced() -> None:
    with pytest.raises(ValueError), stopping.held():
        send(signal.SIGTERM)
        raise ValueError


def test_ctrl_c_twice_ends_also_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_SAME_S", 0.0)
    with pytest.raises(KeyboardInterrupt), stopping.held():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stopping.asked()
        send(signal.SIGINT)


def test_two_senders_of_one_ctrl_c_are_one() -> None:
    with pytest.raises(Stopped), stopping.held():
        send(signal.SIGINT)
        send(signal.SIGINT)


class Collected:
    """Python shows errors of `__del__`, and of callbacks of its collector, and goes on."""

    def __del__(self) -> None:
        send(signal.SIGTERM)
        time.sleep(0)  # a handler runs between two steps of Python


def test_a_request_that_comes_where_errors_are_lost_is_made_again() -> None:
    with pytest.raises(Stopped):
        Collected()
        time.sleep(10)


def test_what_else_is_lost_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: lost.append(what.exc_type))

    class Broken:
        def __del__(self) -> None:
            raise ValueError

    with stopping.heed_signals():
        Broken()
    Broken()
    assert lost == [ValueError, ValueError]
    assert not stopping.asked()
