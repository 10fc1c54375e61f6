"""A graceful stop: SIGTERM and Ctrl-C request it, and the run ends at a point where it is saved."""

import os
import signal
import subprocess
import sys

import pytest

from ddnp_jax.preemption import Preempted, PreemptionGuard


def test_sigterm_and_ctrl_c_ask_the_loop_to_stop():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with PreemptionGuard() as guard:
            done = 0
            for _ in range(10):
                if guard.stop_requested():
                    break
                done += 1
                if done == 3:
                    os.kill(os.getpid(), number)
                    os.kill(os.getpid(), signal.SIGTERM)  # a repeated one does not interrupt the saving
            assert done == 3
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_run_that_was_asked_to_stop_ends_with_its_message(capsys):
    guard = PreemptionGuard()
    guard.check("nobody asked")
    with pytest.raises(Preempted, match=r"^saved at step 3$") as stop, guard:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            guard.check("saved at step 3")
        finally:
            assert capsys.readouterr().err == ""  # a progress bar may be open, and a file being written
    assert stop.value.code == 75
    assert capsys.readouterr().err == "saved at step 3\n"


STOPPED = """
import os, signal
from ddnp_jax.preemption import PreemptionGuard
with PreemptionGuard() as guard:
    os.kill(os.getpid(), signal.SIGINT)
    guard.check("saved")
"""


def test_an_uncaught_stop_is_the_process_exit_code():
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "saved\n")
