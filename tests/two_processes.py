"""One process of a small distributed run; test_parallel.py runs one or two of them and compares the results.

Arguments: port, number of processes, this process's index, folder for the results. Together the processes have two
devices, so that one process and two must come to the same numbers.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from ddnp_jax import parallel
from ddnp_jax.checkpoint import Checkpoints
from ddnp_jax.pipeline.workdir import claim_workdir
from ddnp_jax.preemption import PreemptionGuard
from tests.test_parallel import make_problem, sgd


def descend(mode, mine, weights, rate):
    """Two chunks of descent on this process's part of the batches."""
    step = parallel.data_parallel(sgd, mode=mode)
    state, constants, chunk = parallel.replicate(weights), parallel.replicate(rate), parallel.shard_batches(mine)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            state, metrics = step(state, constants, chunk)
    return state, metrics


def fails(call):
    """Whether a call ends in an OSError."""
    try:
        call()
    except OSError:
        return True
    return False


def main(port, num_processes, process_id, folder):
    """Runs this process's part of everything that needs more than one process."""
    if num_processes > 1:
        parallel.initialize(True, f"127.0.0.1:{port}", num_processes, process_id)
    assert jax.device_count() == 2 and jax.process_count() == num_processes

    weights, rate, batches = make_problem(batch=8)
    mine = jax.tree.map(lambda x: np.split(x, num_processes, axis=1)[process_id], batches)
    results = {}
    for mode in ("shard_map", "pmap"):
        state, metrics = descend(mode, mine, weights, rate)
        fetched, losses = parallel.fetch((state, metrics))
        results |= {f"{mode}/w": fetched["w"], f"{mode}/b": fetched["b"], f"{mode}/loss": losses}

    with PreemptionGuard() as guard, jax.transfer_guard("disallow"):
        results["asked by none"] = guard.stop_requested()
        if process_id == num_processes - 1:
            guard._request(15, None)
        results["asked by the last"] = guard.stop_requested()

    workdir = Path(folder) / str(num_processes)
    claim_workdir(workdir, {"seed": 1})
    written = Path(folder) / f"{num_processes} written"
    parallel.on_first_process(lambda: written.write_text(str(process_id)))
    results["written by"] = int(written.read_text())
    results["failed everywhere"] = fails(lambda: parallel.on_first_process((written / "no folder").touch))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, state, metric=0.5)
        checkpoints.save(2, state, metric=0.6)
    if process_id == 0:
        (workdir / "2" / "record" / "metadata").unlink()
    parallel.any_process(False)
    with Checkpoints(workdir) as checkpoints:
        results["restored step"], restored = checkpoints.restore(weights)
        checkpoints.save(2, state)
    results["restored w"] = restored["w"]
    np.savez(f"{folder}/{num_processes}-{process_id}.npz", **results)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
