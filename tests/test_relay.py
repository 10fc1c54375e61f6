"""The effect of a process's end on the others of a run, with two processes that only wait for each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddnp_jax import ending
from tests.test_parallel import free_port

ROOT = Path(__file__).parents[1]
WAITS = """
import sys, time
from ddnp_jax import parallel, relay
relay.JOINING_SECONDS, relay.GRACE_SECONDS = map(int, sys.argv[3:])
parallel.initialize(True, f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
print("joined", flush=True)
sys.stdin.read()
"""
ERRS = """
import sys
from ddnp_jax import parallel, relay
from experiments import launch

def job(config, workdir):
    if parallel.process()[0] == 0:
        raise ValueError("this one has no data.")
    sys.stdin.read()

relay.GRACE_SECONDS = 0
launch.run("configs/digits_r20.py", job)
"""
TALKS = """
import builtins, os, sys
from ddnp_jax import parallel
from experiments import launch

def job(config, workdir):
    for _ in range(3):  # gloo connects them
        parallel.any_process(False)
    if parallel.process()[0] == int(os.environ["KILLED"]):
        os.kill(os.getpid(), 9)
    try:
        while True:
            parallel.any_process(False)
    except RuntimeError as error:
        raise getattr(builtins, os.environ["KIND"])(*error.args)

launch.run("configs/digits_r20.py", job)
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """Exit code and output of a process that ends although its input stays open."""
    said = process.stderr.read()
    return process.wait(), said


@pytest.fixture
def pair():
    processes = []

    def started(code, arguments):
        processes.extend(start(code, *own) for own in arguments)
        return processes

    yield started
    for process in processes:
        process.kill()
        with process:  # closes its pipes
            pass


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_one_sentence(pair, killed):
    port = free_port()
    processes = pair(WAITS, [(port, number, 3600, 0) for number in (0, 1)])
    assert [process.stdout.readline() for process in processes] == ["joined\n"] * 2
    processes[killed].kill()
    sentence = "another process of the run ended; start all of them again to resume.\n"
    assert ended(processes[1 - killed]) == (ending.RESUMABLE, sentence)


def test_processes_that_end_in_order_say_nothing(pair):
    port = free_port()
    # With no time to end, the second process may see the first one's end before its own.
    processes = pair(WAITS, [(port, number, 3600, 3600) for number in (0, 1)])
    assert [process.stdout.readline() for process in processes] == ["joined\n"] * 2
    processes[0].stdin.close()  # it waits for the other one
    processes[1].stdin.close()
    assert [ended(process) for process in processes] == [(0, "")] * 2


def test_a_process_that_waits_for_the_others_in_vain_says_so(pair):
    for number in (0, 1):
        (process,) = pair(WAITS, [(free_port(), number, 1, 0)])[number:]
        sentence = "the other processes of the run did not connect within 1 s; start all of them again to resume.\n"
        assert ended(process) == (ending.RESUMABLE, sentence)


def test_an_error_of_one_process_is_said_by_it_and_ends_the_other(pair):
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    flags = ["--workdir=unused", "--distributed", "--num_processes=2", address]
    first, second = pair(ERRS, [(*flags, f"--process_id={number}") for number in (0, 1)])
    assert ended(first) == (1, "error: this one has no data.\n")
    assert ended(second) == (
        ending.RESUMABLE,
        "another process of the run ended; start all of them again to resume.\n",
    )


@pytest.mark.parametrize(("killed", "kind"), [(0, "RuntimeError"), (1, "ValueError")])
def test_what_all_processes_do_fails_with_one_sentence(pair, monkeypatch, killed, kind):
    monkeypatch.setenv("KILLED", str(killed))
    monkeypatch.setenv("KIND", kind)
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    flags = ["--workdir=unused", "--distributed", "--num_processes=2", address]
    code, said = ended(pair(TALKS, [(*flags, f"--process_id={number}") for number in (0, 1)])[1 - killed])
    assert code == ending.RESUMABLE
    assert said.startswith("another process of the run ended") and said.endswith("start all of them again to resume.\n")
    assert said.count("\n") == 1
