"""A graceful stop on SIGTERM and Ctrl-C: a run ends at the next safe point, saved and resumable."""

import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

from ddnp_jax import ending, parallel


class Preempted(SystemExit):
    """Raised when the run stops on request; the same command resumes it. Uncaught, it exits with `ending.RESUMABLE`."""

    def __init__(self, message: str) -> None:
        super().__init__(ending.RESUMABLE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class PreemptionGuard:
    """While active, SIGTERM and Ctrl-C only request a stop, so that the run can save and exit between two chunks.

    A second Ctrl-C interrupts immediately. Repeated SIGTERMs have no effect: schedulers send several. Must be entered
    in the main thread; in a run of several processes, by all of them. One that is not entered never asks to stop.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._requested = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Puts the handlers in place."""
        self._old = {number: signal.signal(number, self._request) for number in self._SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Puts the old handlers back, and says why the run was stopped: now progress bars and files are closed."""
        for number, handler in self._old.items():
            # None: it was not set from Python (jax.distributed sets one of its own), and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if isinstance(error, Preempted):
            print(error.message, file=sys.stderr, flush=True)

    def stop_requested(self) -> bool:
        """Whether any process of the run was requested to stop; all processes call this at the same point and agree."""
        return parallel.any_process(self._requested)

    def check(self, message: str) -> None:
        """Ends the run if a stop was requested; all processes call this at the same point.

        Args:
          message: What is saved, for the person who reads it; said on standard error when the guard is left.

        Raises:
          Preempted: A stop was requested.
        """
        if self.stop_requested():
            raise Preempted(message)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
