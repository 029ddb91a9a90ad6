"""How fast a server is asked: requests spread evenly over a minute, by whatever number of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import final

from drift_jax.errors import EndpointError


class StoppedError(EndpointError):
    """A request was not sent, since nobody waits for its answer any more."""


@final
class Pace:
    """Lets requests through one by one, 60 / `per_minute` seconds apart; threads share it.

    Evenly, and not as many as a minute allows at once: a run that is started again would otherwise begin with a burst,
    whatever the one before it had sent.

    Args:
      per_minute: None lets all through at once.
      clock, sleep: seconds; `sleep` is by default one that `stop` ends.
    """

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._apart = 60.0 / per_minute if per_minute else 0.0
        self._stopped = threading.Event()
        self._clock, self._sleep = clock, sleep or self._stopped.wait
        self._lock, self._next = threading.Lock(), clock()
        self.passed = 0  # requests let through

    def wait(self) -> None:
        """Returns when the next request may be sent. Raises `StoppedError` once it is stopped."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + self._apart
        self.pause(start - now)
        with self._lock:
            self.passed += 1

    def pause(self, seconds: float) -> None:
        """Sleeps, such as before a request is sent again. Raises `StoppedError` as `wait` does."""
        if seconds > 0:
            self._sleep(seconds)
        if self._stopped.is_set():
            raise StoppedError("stopped before the request was sent.", passing=False)

    def stop(self) -> None:
        """Whoever waits, or comes later, gets a `StoppedError`."""
        self._stopped.set()
