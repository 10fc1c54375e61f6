"""The examples run as users run them, and save a smaller network within the budget."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from flax import nnx

import ddnp_jax
from ddnp_jax import flops

EXAMPLES = Path(__file__).parents[1] / "examples"
# As for users, but with few optimizations, as for the other tests.
ONE_DEVICE = os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=1")
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in an empty folder, and returns what it prints and its names."""

    def run(name):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name])
        names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, names

    return run


def numbers(pattern, printed):
    found = re.search(pattern, printed)
    assert found, printed
    return [float(each.replace(",", "")) for each in found.groups()]


def check_cost(before, after, shape, variables=None, smaller_variables=None):
    """At most half of the prunable FLOPs, and more than 45 %: a budget is met and used."""
    whole = ddnp_jax.trace(before, shape, variables=variables)
    small = ddnp_jax.trace(after, shape, variables=smaller_variables)
    assert 0.45 * flops.prunable(whole) < flops.prunable(small) <= 0.5 * flops.prunable(whole)
    return flops.total(whole), flops.total(small)


def test_every_example_is_short_and_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"prune_linen", "prune_nnx", "own_training_loop", "image_folder", "detection_head"}
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60 for name in names)


def test_prune_linen(run):
    printed, names = run("prune_linen")
    base, cut, tuned, loaded = numbers(
        r"base: (\S+) %\ncut: (\S+) %\nfine-tuned: (\S+) %\n[^~]*loaded again: (\S+) %", printed
    )
    assert base > 96 and cut > 85 and tuned > 96 and loaded == tuned
    readme = (EXAMPLES.parent / "README.md").read_text()
    written = readme.partition("```text\n")[2].partition("```")[0]
    assert re.sub(r"[\d.,]+", "#", written) == re.sub(r"[\d.,]+", "#", printed)  # the numbers are those of one machine
    network = names["Network"]
    model, _ = ddnp_jax.load_pruned("pruned_linen", model=network())
    assert check_cost(network(), model, (8, 8, 1)) == tuple(numbers(r"accumulates: (\S+) -> (\S+) \(", printed))


def test_prune_nnx(run):
    printed, names = run("prune_nnx")
    base, tuned = numbers(r"base: (\S+) %, cut: \S+ %, fine-tuned: (\S+) %", printed)
    assert base > 96 and tuned > 96
    network = names["Network"]
    model, variables = ddnp_jax.load_pruned("pruned_nnx", model=network(nnx.Rngs(1)))
    assert variables is None
    assert model.stem.out_features == numbers(r"stem: (\d+) of 32", printed)[0] < 32  # the residual stream
    check_cost(network(nnx.Rngs(1)), model, (8, 8, 1))


def test_own_training_loop(run):
    printed, names = run("own_training_loop")
    base, tuned = numbers(r"base: (\S+) %\ncut: \S+ %\nfine-tuned: (\S+) %", printed)
    assert base > 90 and tuned > 88
    network = names["network"]
    _, params = ddnp_jax.load_pruned("pruned_own_loop", model=network)
    before, after = numbers(r"FLOPs: (\S+) -> (\S+)\n", printed)
    assert before == 64 * 9 * (16 + 16 * 32 + 32 * 32) + 320  # three convolutions at 8 x 8 pixels, and the classifier
    assert after == flops.total(ddnp_jax.trace(network, (8, 8, 1), variables=params)) <= before / 2


def test_image_folder(tmp_path):
    """In a separate process, because the job uses all devices, and eight devices on few cores may time out."""
    command = [sys.executable, str(EXAMPLES / "image_folder.py")]
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    printed = done.stdout
    assert "576 training and 144 test images of class 0, class 1, class 2, class 3" in printed, done.stderr[-2000:]
    base, tuned = numbers(r"top-1: (\S+) -> (\S+) %", printed)
    assert base > 95 and tuned > 95
    report = json.loads((tmp_path / "run_folder/report.json").read_text())
    assert (report["method"], report["dataset"], report["test_images"]) == ("taylor", "digits", 144)
    assert 0.45 < report["p_reached"] <= 0.5
    assert numbers(r"FLOPs: (\S+) -> (\S+);", printed) == [report["flops_total_before"], report["flops_total_after"]]


def test_detection_head(run):
    printed, names = run("detection_head")
    base, right, tuned, still_right = numbers(
        r"base: loss (\S+), (\S+) % .*\n.*\nfine-tuned: loss (\S+), (\S+) %", printed
    )
    assert base < 0.6 and right > 80 and tuned < 1.2 * base and still_right > right - 3
    detector = names["Detector"]
    model, variables = ddnp_jax.load_pruned("pruned_detector", model=detector())
    outputs = model.apply(variables, np.zeros((2, 32, 32, 1), np.float32))
    assert {name: each.shape for name, each in outputs.items()} == {"middle": (2, 8, 8), "size": (2, 8, 8)}
    check_cost(detector(), model, (32, 32, 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4 and notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), cell.id
    written = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#\s]+)\)", written)
    assert links and all((EXAMPLES / link).exists() for link in links)


def test_tour(tmp_path, monkeypatch):
    """Runs the notebook completely in a separate kernel with one device, as for its users."""
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own, which puts plots into the notebook
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    plots = {cell.id for cell in cells if "plt.show()" in cell.source}
    assert plots == {"load", "train", "sweep_plot", "history_plot", "widths_plot", "timing_plot"}
    shown = {cell.id for cell in cells if any("image/png" in output.get("data", {}) for output in cell.outputs)}
    assert shown == plots
    outputs = [output for cell in cells for output in cell.outputs if output.output_type == "stream"]
    assert {output.name for output in outputs} == {"stdout"}  # no warnings
    printed = "".join(output.text for output in outputs)
    (base,) = numbers(r"base: (\S+) %", printed)
    cut, scored = numbers(r"before fine-tuning: (\S+) %\ntaylor at this budget: (\S+) %", printed)
    tuned, other, control = numbers(
        r"\nfine-tuned: (\S+) %\ntaylor, fine-tuned: (\S+) %\nunpruned, .*: (\S+) %", printed
    )
    assert base > 96 and cut > 85 > scored and tuned > 96 and other > 90 and control > 96
    three = ", ".join([r"(\S+) %"] * 3)
    taylor, uniform = (numbers(rf"{method}: {three}", printed) for method in ("taylor", "uniform"))
    assert np.mean(taylor) > np.mean(uniform) + 5
    assert numbers(r"loaded again: (\S+) %", printed) == [tuned]
    assert len(re.findall(r"batch of \d+: \S+ -> \S+ ms", printed)) == 4
    before, after = numbers(r"accumulates: (\S+) -> (\S+) \(", printed)
    assert 0.45 * before < after <= 0.5 * before
    assert json.loads((tmp_path / "pruned_tour/model.json").read_text())["sizes"]
