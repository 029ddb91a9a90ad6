"""`drift run` with vLLM: a chain of processes, so that a server and the trainer never hold the accelerator together.

A process gives an accelerator's memory back when it ends. So the process that was started stays small and starts
others, one after the other, each for the stages up to the next change between sampling and all else. Running again
always resumes, so each is the same `drift run`. Those that sample do not touch the accelerator.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from drift_jax.errors import DriftError
from drift_jax.parts import NEXT_PART, Part
from drift_jax.stopping import STOPPED


def samples_with_vllm(config: Path | None, overrides: list[str] | None) -> bool:
    """Whether the engine is vLLM, as far as it can be read; what cannot be read is said by whoever uses it."""
    from drift_jax.config import apply_override, read_yaml

    raw: dict[str, Any] = {}
    with contextlib.suppress(DriftError):
        raw = {} if config is None else read_yaml(config)
        for override in overrides or ():
            apply_override(raw, override)
    sampling = raw.get("sampling")
    return isinstance(sampling, dict) and sampling.get("engine") == "vllm"


def leave_accelerator() -> None:
    """Must come before the first use of a device. The environment stays as it is: servers and probes need it."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def prepare_sample(given: dict[str, Any]) -> bool:
    """For `drift sample`, before the processes of a run join: with vLLM this one needs no accelerator."""
    if samples_with_vllm(given["config"], given["overrides"]):
        leave_accelerator()
    return False


def run_in_parts(given: dict[str, Any]) -> bool:
    """For `drift run`, before the processes of a run join. True when the whole run was done here, in parts.

    Raises `SystemExit` with the exit code of the part that did not end well, which has said why, or was stopped.
    """
    from drift_jax.sampling.supervise import die_with_parent

    if given["part"] is not None:
        die_with_parent()
        # What the shell of a background job has us ignore, the one who hands it on does not send.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if given["part"] == "sampling":
            leave_accelerator()
        return False
    if not samples_with_vllm(given["config"], given["overrides"]):
        return False
    with tempfile.TemporaryDirectory(prefix="drift-parts-") as folder, _handing_on() as relay:
        part = Part("training", Path(folder))
        part.begin()
        code = NEXT_PART
        while code == NEXT_PART:
            code = _run_part(part, sys.argv[1:], given, relay)
            part = part.other()
    if code:
        raise SystemExit(code)
    return True


@final
class _Relay:
    """Signals that this process got, and the part that they are handed on to."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int, _: object) -> None:
        self.got.append(number)
        if self.child is not None:
            self.child.send_signal(number)


@contextlib.contextmanager
def _handing_on() -> Iterator[_Relay]:
    """Signals to end go to the part that runs, which saves what is done; this process waits for it."""
    relay, numbers = _Relay(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # `nohup` ignores SIGHUP, and so do we then.
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, relay) for number in heeded}
    try:
        yield relay
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_part(part: Part, words: list[str], given: dict[str, Any], relay: _Relay) -> int:
    """The exit code of one part; above 128 that of a signal."""
    if relay.got:  # between two parts
        return STOPPED
    if part.kind == "sampling":
        # As the part before has resolved it: a handbook file's batch is known by the devices, which are not seen here.
        names = ("distributed", "coordinator", "num_processes", "process_id")
        options = [(f"--{name.replace('_', '-')}", str(given[name])) for name in names if given[name] is not None]
        words = ["run", str(part.config_file), *(word for option in options for word in option)]
    words = [*words, "--part", part.kind, "--part-folder", str(part.folder)]
    # A process group of its own: a signal of the terminal comes to us alone, and is handed on once.
    child = subprocess.Popen([sys.executable, "-m", "drift_jax", *words], process_group=0)
    relay.child = child
    for number in relay.got:  # while it was being started
        child.send_signal(number)
    code = child.wait()
    if len(relay.got) == 1 and code in (NEXT_PART, -relay.got[0], 128 + relay.got[0]):
        return STOPPED  # it had just ended, or had not begun to listen
    return code if code >= 0 else 128 - code
