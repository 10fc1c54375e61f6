"""Graceful stop on SIGTERM and Ctrl-C: the run is saved and ends at the next safe point, from which it can resume."""

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

    A second Ctrl-C interrupts immediately. Repeated SIGTERMs have no effect, because schedulers send several. The
    context must be entered in the main thread and, in a run with several processes, by all of them. Before it is
    entered, no stop is ever requested.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._requested = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Installs the signal handlers."""
        self._old = {number: signal.signal(number, self._request) for number in self._SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Restores the old handlers and prints the message of a stop; progress bars and files are closed by then."""
        for number, handler in self._old.items():
            # None: the handler was not set by Python (jax.distributed sets its own), and cannot be restored by Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if isinstance(error, Preempted):
            print(error.message, file=sys.stderr, flush=True)

    def stop_requested(self) -> bool:
        """Whether a stop was requested in any process; all processes call this at the same point and get one answer."""
        return parallel.any_process(self._requested)

    def check(self, message: str) -> None:
        """Ends the run if a stop was requested; all processes call this at the same point.

        Args:
          message: Message to the user about what is saved, printed on standard error when the context is left.

        Raises:
          Preempted: A stop was requested.
        """
        if self.stop_requested():
            raise Preempted(message)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
