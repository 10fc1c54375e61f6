"""The table of promised, predicted and measured latency; the device is a formula."""

import json
import sys

import pytest

from ddnp_jax.cost import multiples
from experiments import latency as experiment
from experiments.steps import NETWORKS, Network
from tests import counted_device


@pytest.fixture
def device(monkeypatch):
    """A device that is counted; multiples of 4 are fastest."""
    timed = counted_device.use(monkeypatch)
    times = multiples.MultipleTimes("abacus", 1, "xla", {"1": 10.0, "4": 8.0}, ())
    monkeypatch.setattr(multiples, "measure", lambda timer: times)
    monkeypatch.setitem(NETWORKS, "small", Network("digits_r20", (32, 32, 1), 1, 10))
    monkeypatch.setattr(experiment.ddnp_jax, "configure_cpu", lambda: None)
    return timed


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["latency", f"--workdir={folder}", "--network=small", "--batch=1", *arguments])
    experiment.main()


def test_every_budget_has_a_row(device, monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "--runtime=xla", "--p=0.75")
    any_width, in_fours, in_latency = json.loads((tmp_path / "latency.json").read_text())["small xla 1 0.75"]
    assert [row["multiple"] for row in (any_width, in_fours, in_latency)] == [1, 4, 4]
    for row in (any_width, in_fours):
        assert row["budget"] == "FLOPs, p = 0.5" and "predicted" not in row
        kept = row["flops_kept"] / 100
        assert kept == pytest.approx(0.5, abs=0.02)
        assert row["promised"] == pytest.approx(1 / kept)
        assert row["speedup"] == pytest.approx(1 / (0.5 + 0.5 * kept))
        assert row["ratio"] == pytest.approx(kept / (0.5 + 0.5 * kept))
        assert row["ms"] == 10.0
    assert in_latency["budget"] == "latency, p = 0.75"
    assert in_latency["measured"] == pytest.approx(75.0, abs=1.0)  # half of the FLOPs, whatever the table says
    assert in_latency["flops_kept"] == pytest.approx(50.0, abs=2.0)
    assert in_latency["predicted"] < 60.0
    assert f"table: {tmp_path}/latency.md" in capsys.readouterr().out


def test_a_finished_row_is_not_measured_again(device, monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--runtime=xla", "--p=0.75")
    first = json.loads((tmp_path / "latency.json").read_text())
    device.clear()
    run(monkeypatch, tmp_path, "--runtime=xla,onnx", "--p=0.75")
    assert set(device) == {"onnx"}
    second = json.loads((tmp_path / "latency.json").read_text())
    assert second["small xla 1 0.75"] == first["small xla 1 0.75"]
    text = (tmp_path / "latency.md").read_text()
    assert text.count("| small ") == 6


def test_a_budget_that_cannot_be_met_says_what_the_smallest_network_takes(device, monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--runtime=xla", "--p=0.01")
    *_, row = json.loads((tmp_path / "latency.json").read_text())["small xla 1 0.01"]
    assert row["predicted"] > 1.0 and "measured" not in row
    assert "| the smallest network |" in (tmp_path / "latency.md").read_text()


@pytest.mark.parametrize(("flag", "known"), [("network", "resnet56, mobilenet_v2, resnet50"), ("runtime", "xla, onnx")])
def test_unknown_names_are_refused(flag, known, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=f"--{flag}=abacus is unknown; use {known}, separated by commas."):
        run(monkeypatch, tmp_path, "--network=resnet56", f"--{flag}=abacus")


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--batch=1,x", "--batch=x must be a whole number of at least 1, or several, separated by commas."),
        ("--batch=0", "--batch=0 must be a whole number of at least 1, or several, separated by commas."),
        ("--p=1.5", r"--p=1.5 must be in \(0, 1\]: the fraction of the time that remains."),
    ],
)
def test_other_flags_are_checked_before_anything_is_measured(argument, sentence, device, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: {sentence}$"):
        run(monkeypatch, tmp_path / "new", "--runtime=xla", argument)
    assert not device and not (tmp_path / "new").exists()


def test_a_network_without_prunable_residual_streams_is_not_labelled_as_if_it_had_them(device, monkeypatch, tmp_path):
    sentence = "^error: --residual: small has no residual stream that can be pruned; leave the flag out.$"
    with pytest.raises(SystemExit, match=sentence):
        run(monkeypatch, tmp_path, "--runtime=xla", "--residual")
    assert not device and not (tmp_path / "latency.json").exists()
