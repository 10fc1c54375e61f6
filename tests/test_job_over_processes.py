"""The whole job by two processes with four devices each, stopped in one and resumed, equals that of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ddnp_jax import ending, pipeline
from ddnp_jax.saved import load_pruned
from tests.small_job import Own, tiny
from tests.test_parallel import free_port

ROOT = Path(__file__).parents[1]


def run_processes(data_dir, workdir, stop):
    """The job of `job_process` by two processes with four devices each; returns what each one said."""
    port = free_port()
    arguments = [str(data_dir), str(workdir), str(stop)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.job_process", str(port), "2", str(i), *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
                "JAX_PLATFORMS": "cpu",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=3600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == (0 if stop < 0 else ending.RESUMABLE), output
    return outputs


def test_two_processes_stopped_and_resumed_do_the_job_of_one(tmp_path):
    one, two, data_dir = tmp_path / "one", tmp_path / "two", str(tmp_path / "tfds")
    # Eight devices in this process; scalars, because the processes would spend most of their time compiling generators.
    expected = pipeline.run(tiny(data_dir, "scalar"), one, model=Own((20, 12)), rebuild=Own)
    for output in run_processes(data_dir, two, stop=2):  # one got SIGTERM, both said so and left
        assert "stage 'search' is saved at step 3; the same command resumes it." in output
    assert not (two / "selection.json").exists()
    run_processes(data_dir, two, stop=-1)
    report = json.loads((two / "report.json").read_text())
    assert report["widths"] == expected["widths"] and report["pruned_top1"] == expected["pruned_top1"]
    assert (two / "selection.json").read_text() == (one / "selection.json").read_text()
    steps = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert len(steps[0]) == len(steps[1]) > 10
    assert [path.stat().st_size > 0 for path in sorted((two / "tensorboard").iterdir())] == [False, True]  # of one
    for ours, theirs in zip(*steps, strict=True):
        assert (ours["stage"], ours["step"]) == (theirs["stage"], theirs["step"])
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-5)
        assert ours.get("validation_top1") == theirs.get("validation_top1")  # every held-out image, by both
    ours, theirs = (load_pruned(run / "pruned", Own(tuple(report["widths"])))[1] for run in (one, two))
    # Sums of eight in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)
