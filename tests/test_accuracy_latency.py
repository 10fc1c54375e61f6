"""Accuracy against latency of finished runs; the device is a formula."""

import dataclasses
import json
import sys

import pytest
from test_report import REPORT

from ddnp_jax.cost import flops
from ddnp_jax.cost.network_times import NetworkTimer
from experiments import accuracy_latency
from experiments.latency import timer_of
from experiments.steps import NETWORKS

WHOLE = (16,) * 9 + (32,) * 9 + (64,) * 9
HALF = tuple(width // 2 for width in WHOLE)
GATES = tuple(f"layer{stage}_{block}/conv1" for stage in (1, 2, 3) for block in range(9))


def report_of(folder, **changes):
    values = {"model": "resnet56", "gate_names": GATES, "widths_before": WHOLE, "widths": HALF, **changes}
    folder.mkdir(parents=True)
    run = dataclasses.replace(REPORT, **values)
    (folder / "report.json").write_text(json.dumps(run.to_json()))
    return folder


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["accuracy_latency", *map(str, arguments)])
    monkeypatch.setattr(accuracy_latency.ddnp_jax, "configure_cpu", lambda: None)
    accuracy_latency.main()


def test_networks_are_timed_together_and_each_once(tmp_path, monkeypatch, capsys):
    timed = []

    def ms(self, every_widths):
        timed.append((self.batch, self.runtime, list(every_widths)))
        work = [flops.total(self.topology, widths) / flops.total(self.topology) for widths in every_widths]
        return [4.0 + 4.0 * each for each in work]  # half of the unpruned network's time is overhead

    monkeypatch.setattr(NetworkTimer, "ms", ms)
    runs = [
        report_of(tmp_path / "ddnp"),
        report_of(tmp_path / "taylor", method="taylor", pruned_top1=90.0),
        report_of(tmp_path / "uniform", method="uniform", pruned_top1=85.0, widths=(1,) * len(GATES)),
    ]
    command(monkeypatch, f"--workdir={tmp_path / 'out'}", "--batch=8", *runs)
    ones = (1,) * len(GATES)
    assert timed == [(8, "onnx", [WHOLE, HALF, ones])]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (tmp_path / "out" / "accuracy_latency.md").read_text().splitlines()
        if line.startswith("| resnet56")
    ]
    assert [line[:6] for line in lines] == [
        ["resnet56", "ddnp", "3", "92.00", "91.50", "52.5"],
        ["resnet56", "taylor", "3", "92.00", "90.00", "52.5"],
        ["resnet56", "uniform", "3", "92.00", "85.00", "52.5"],
    ]
    topology = timer_of(NETWORKS["resnet56"], 1, "onnx").topology
    for line, widths in zip(lines, (HALF, HALF, ones), strict=True):
        kept = flops.total(topology, widths) / flops.total(topology)
        assert float(line[6]) == pytest.approx(50 + 50 * kept, abs=0.051)
        assert float(line[7]) == pytest.approx(4 + 4 * kept, abs=0.0051)
    assert (tmp_path / "out" / "accuracy_latency.png").read_bytes()[:4] == b"\x89PNG"
    assert f"table: {tmp_path}/out/accuracy_latency.md" in capsys.readouterr().out


def test_runs_with_other_budgets_have_points_of_their_own():
    runs = [dataclasses.replace(REPORT, seed=seed, p=p) for p in (0.5, 0.3) for seed in (0, 1)]
    (axes,) = accuracy_latency.figure([runs], "one image in XLA").axes
    assert len(axes.containers) == 2


def test_a_plot_has_the_base_at_full_latency_and_every_method():
    runs = [
        dataclasses.replace(REPORT, method=method, pruned_top1=top1, latency_ms=REPORT.latency_ms)
        for method, top1 in (("ddnp", 91.5), ("uniform", 85.0))
    ]
    (axes,) = accuracy_latency.figure([runs], "one image in XLA").axes
    points = {
        line.get_label(): line.get_xydata().tolist() for line in axes.lines if not line.get_label().startswith("_")
    }
    assert points["base"] == [[100.0, 92.0]]
    shown = {container.get_label(): container.lines[0].get_xydata().tolist() for container in axes.containers}
    assert shown == {"ddnp": [[75.0, 91.5]], "uniform": [[75.0, 85.0]]}  # 60 of 80 ms
    assert axes.get_title() == "resnet20 on CIFAR-10 (JPEG)\n48 % fewer FLOPs, 5 epochs of fine-tuning"
    assert axes.get_xlabel() == "latency kept (%), one image in XLA"


@pytest.mark.parametrize(
    ("epochs", "tuning"),
    [
        ((0,), "before fine-tuning"),
        ((1,), "1 epoch of fine-tuning"),
        ((1, 5), "1 to 5 epochs of fine-tuning"),
    ],
)
def test_a_title_names_the_epochs(epochs, tuning):
    runs = [dataclasses.replace(REPORT, epochs=dataclasses.replace(REPORT.epochs, finetune=each)) for each in epochs]
    assert accuracy_latency.about(runs).endswith(f"% fewer FLOPs, {tuning}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "abacus"}, "the model is unknown here; use runs of resnet56, mobilenet_v2, resnet50, efficient"),
        ({"gate_names": ("layer1", *GATES[1:])}, "its gates are not those of resnet56; use runs without residual"),
    ],
)
def test_runs_of_other_networks_are_refused(changes, message, tmp_path, monkeypatch):
    folder = report_of(tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        command(monkeypatch, f"--workdir={tmp_path / 'out'}", folder)


def test_a_batch_has_at_least_one_image(tmp_path, monkeypatch):
    folder = report_of(tmp_path / "run")
    with pytest.raises(SystemExit, match="--batch=0 must be at least 1"):
        command(monkeypatch, f"--workdir={tmp_path / 'out'}", "--batch=0", folder)
