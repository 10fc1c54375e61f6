"""The table of budgets against numbers that are counted manually here, and its copy in the documentation."""

import functools
import runpy
import sys
from pathlib import Path

import pytest

from ddnp_jax.cost import flops
from experiments import budgets

PAPERS = Path(__file__).parents[1] / "docs" / "papers.md"


@functools.cache
def traced(model):
    (pair,) = (pair for pair in budgets.PAIRS if pair.model == model)
    return {pair: budgets.topology(pair)}


def cells(line):
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_resnet56_by_hand():
    """Nine blocks at each of 32, 16 and 8 pixels: 18 convolutions of 9 C C, the first of a stage 9 (C / 2) C."""
    prunable = 9 * (1024 * 18 * 16 * 16 + 256 * (17 * 32 * 32 + 16 * 32) + 64 * (17 * 64 * 64 + 32 * 64))
    whole = prunable + 1024 * 27 * 16 + 640
    # one channel inside each block: a conv to it and one from it
    smallest = 9 * (1024 * 18 * 16 + 256 * (17 * 32 + 16) + 64 * (17 * 64 + 32))
    header, _, row = budgets.budgets_table(traced("resnet56"), "macs").splitlines()
    assert cells(header)[2:] == [
        *("T_all (M)", "T_total (M)", "T_total / T_all (%)", "smallest p", "largest reduction (%)"),
        *("p (DDNP)", "reduction (%)", "p (NPPM)", "reduction (%)"),
    ]
    assert cells(row) == [
        *("ResNet-56", "CIFAR-10", f"{whole / 1e6:.2f}", f"{prunable / 1e6:.2f}", f"{100 * prunable / whole:.2f}"),
        *(f"{smallest / prunable:.4f}", f"{100 * (prunable - smallest) / whole:.1f}"),
        *("0.48", f"{52 * prunable / whole:.1f}", "0.50", f"{50 * prunable / whole:.1f}"),
    ]


def test_resnet50s_printed_reductions():
    """Its prunable layers are all but the stem, the four projections and the classifier."""
    network = traced("resnet50")
    (topology,) = network.values()
    projections = 56**2 * 64 * 256 + 28**2 * 256 * 512 + 14**2 * 512 * 1024 + 7**2 * 1024 * 2048
    others = 112**2 * 147 * 64 + projections + 2048 * 1000
    whole = flops.total(topology)
    assert flops.prunable(topology) == whole - others
    rows = [cells(line) for line in budgets.printed_table(network).splitlines()[2:]]
    assert [row[1:3] + row[4:5] for row in rows] == [
        *(["macs", "0.38", "55.0"], ["authors", "0.38", "55.0"], ["macs", "0.31", "62.0"], ["authors", "0.31", "62.0"])
    ]
    for _, convention, p, reduction, printed, difference, wanted in rows:
        assert abs(float(difference)) <= 1.5
        assert float(difference) == pytest.approx(float(reduction) - float(printed), abs=0.1001)
        if convention == "macs":
            assert float(reduction) == pytest.approx(100 * (1 - float(p)) * (whole - others) / whole, abs=0.05)
            assert float(wanted) == pytest.approx(1 - float(printed) / 100 * whole / (whole - others), abs=5e-5)


def test_all_pairs_of_the_papers_are_there():
    assert {
        (pair.network.removesuffix(" small"), pair.data.name, pair.ddnp, pair.nppm) for pair in budgets.PAIRS[:8]
    } == {
        ("ResNet-56", "CIFAR-10", (0.48,), (0.50,)),
        ("MobileNetV2", "CIFAR-10", (0.56,), (0.55,)),
        ("ResNet-34", "ImageNet", (0.55,), (0.50,)),
        ("ResNet-50", "ImageNet", (0.38, 0.31), (0.38,)),
        ("ResNet-101", "ImageNet", (), (0.42,)),
        ("MobileNetV2", "ImageNet", (0.67,), (0.63,)),
        ("MobileNetV3-small", "ImageNet", (0.75,), ()),
        ("ShuffleNetV2+", "ImageNet", (), (0.70,)),
    }


@pytest.mark.parametrize("model", ["resnet56", "mobilenet_v2_cifar", "resnet50", "mobilenet_v3_small"])
def test_documentation_has_the_same_rows(model):
    network = traced(model)
    written = [cells(line) for line in PAPERS.read_text().splitlines()]
    tables = [budgets.budgets_table(network, convention) for convention in flops.CONVENTIONS]
    for row in (line for table in (*tables, budgets.printed_table(network)) for line in table.splitlines()[2:]):
        assert cells(row) in written


def test_arguments_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["budgets", "--p=3"])
    monkeypatch.delitem(sys.modules, "experiments.budgets")
    with pytest.raises(SystemExit, match=r"^error: unrecognized arguments: --p=3$"):
        runpy.run_module("experiments.budgets", run_name="__main__")
