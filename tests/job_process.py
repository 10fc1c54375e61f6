"""One process of a job with several processes; test_job_over_processes.py starts all of them and compares results.

Arguments: port, number of processes, this process's index, folder of the data, workdir, and the step of the search
before which the last process gets SIGTERM (-1: none does).
"""

import os
import signal
import sys

import pytest

from ddnp_jax import parallel, pipeline
from tests.small_job import Own, interrupt_at, tiny


def main(port, num_processes, process_id, data_dir, workdir, stop):
    """Runs this process's part of the job."""
    parallel.initialize(True, f"127.0.0.1:{port}", num_processes, process_id)
    with pytest.MonkeyPatch.context() as patch:
        if process_id == num_processes - 1:
            interrupt_at(patch, "search", stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
        pipeline.run(tiny(data_dir, "scalar"), workdir, model=Own((20, 12)), rebuild=Own)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *sys.argv[4:6], int(sys.argv[6]))
