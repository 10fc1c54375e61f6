"""Ending a process from any thread, with a one-sentence message and an exit code."""

import os
import sys
import threading
from typing import NoReturn

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"; a script that requeues jobs can tell it from an error

_leaving = threading.Lock()


def leave(code: int, message: str) -> NoReturn:
    """Ends the process immediately: threads of JAX and orbax may be waiting, for example for other processes."""
    _leaving.acquire()  # and never released: of several threads that leave, one says why
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


def leave_to_resume(reason: str) -> NoReturn:
    """Ends a process that cannot continue without the other processes of its run."""
    leave(RESUMABLE, f"{reason}; start all of them again to resume.")
