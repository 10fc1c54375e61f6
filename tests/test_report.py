import itertools
import json
import runpy
import sys

import pytest

from ddnp_jax.cost import flops
from ddnp_jax.pipeline import report

RESULTS = {
    "method": "ddnp",
    "model": "resnet20",
    "dataset": "CIFAR-10 (JPEG)",
    "seed": 3,
    "p": 0.5,
    "flops_convention": "macs",
    "budget": {"kind": "flops", "unit": "prunable FLOPs (macs)", "before": 38_000_000, "after": 19_000_000},
    "base_top1": 92.0,
    "base_top5": 99.75,
    "unfinetuned_top1": 61.25,
    "unfinetuned_top5": 95.5,
    "pruned_top1": 91.5,
    "pruned_top5": 99.875,
    "test_images": 8000,
    "flops_total_before": 40_000_000,
    "flops_total_after": 21_000_000,
    "flops_prunable_before": 38_000_000,
    "flops_prunable_after": 19_000_000,
    "params_before": 272_000,
    "params_after": 136_000,
    "gate_names": ["layer1_0/conv1", "layer2_0/conv1"],
    "widths_before": [16, 32],
    "widths": [10, 12],
    "seconds": {"base": 0.0, "search": 1234.6, "finetune": 60.2},
    "epochs": {"base": 200, "search": 200, "finetune": 5},
    "batch_norm": "per device",
    "precision": "float32",
    "devices": "1 x cpu",
    "latency_ms": {"batch": 128, "before": 80.0, "after": 60.0},
    "verification": {"max_difference": 3.25e-6, "argmax_agreement": 1.0},
    "notes": ["fine-tuning shortened: 5 epochs"],
}
SEARCH = [
    {"stage": "base", "step": 5, "epoch": 1.0, "loss": 2.0, "top1": 20.0},
    {"stage": "search", "step": 10, "epoch": 0.5, "top1": 90.0, "remaining": 0.9},
    {"stage": "search", "step": 20, "epoch": 1.0, "top1": 85.0, "remaining": 0.55},
    {"stage": "search", "step": 20, "validation_top1": 70.0, "validation_top5": 97.0, "validation_loss": 1.0},
    {"stage": "finetune", "step": 7, "epoch": 1.0, "loss": 1.0, "top1": 88.0},
]


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SEARCH))
    return tmp_path


def text(workdir, **changes):
    report.write(workdir, RESULTS | changes)
    return (workdir / "report.md").read_text()


def test_json_is_results_and_what_follows_from_them(workdir):
    returned = report.write(workdir, RESULTS)
    written = json.loads((workdir / "report.json").read_text())
    assert written == returned
    derived = {key: value for key, value in written.items() if key not in RESULTS}
    assert derived == {
        "delta_top1": -0.5,
        "delta_top5": 0.125,
        "flops_reduction": pytest.approx(47.5),
        "params_reduction": 50.0,
        "p_reached": 0.5,
    }
    assert {key: written[key] for key in RESULTS} == RESULTS


def test_markdown_states_the_result(workdir):
    written = text(workdir)
    assert written.startswith("# ddnp, resnet20 on CIFAR-10 (JPEG), p = 0.5\n")
    assert (
        "| network                    | top-1 (%) | top-5 (%) |    FLOPs | parameters | latency (ms) |\n"
        "| -------------------------- | --------: | --------: | -------: | ---------: | -----------: |\n"
        "| base                       |     92.00 |     99.75 | 40.000 M |    0.272 M |        80.00 |\n"
        "| pruned, before fine-tuning |     61.25 |     95.50 | 21.000 M |    0.136 M |        60.00 |\n"
        "| pruned, after fine-tuning  |     91.50 |     99.88 | 21.000 M |    0.136 M |        60.00 |\n"
        "| change, base to fine-tuned |     -0.50 |     +0.12 | -47.50 % |   -50.00 % |     -25.00 % |\n"
    ) in written
    assert "FLOPs: multiply-accumulates of convolutions and dense layers; whole network." in written
    assert "Latency: forward pass of a batch of 128 on 1 x cpu." in written
    assert "over all 8,000 test images" in written
    assert "differ by at most 3.2e-06; 100.00 % of the predictions agree" in written
    assert "Batch-norm statistics in training: per device. Precision: float32." in written
    assert "## Notes\n\n- fine-tuning shortened: 5 epochs\n" in written


def test_latency_is_that_of_one_device(workdir):
    assert "Latency: forward pass of a batch of 128 on one of 8 x H100." in text(workdir, devices="8 x H100")


def test_markdown_tables_of_time_and_widths(workdir):
    written = text(workdir)
    assert (
        "| stage         | epochs | seconds |\n"
        "| ------------- | -----: | ------: |\n"
        "| base training |      - | not run |\n"
        "| search        |    200 |   1,235 |\n"
        "| fine-tuning   |      5 |      60 |\n"
        "| all           |        |   1,295 |\n"
    ) in written
    assert (
        "| gate             | before | after | kept (%) |\n"
        "| ---------------- | -----: | ----: | -------: |\n"
        "| `layer1_0/conv1` |     16 |    10 |     62.5 |\n"
        "| `layer2_0/conv1` |     32 |    12 |     37.5 |\n"
        "| all              |     48 |    22 |     45.8 |\n"
    ) in written


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        (19_000_000, "Reached: p = 0.5000, 19.000 M. The difference is less than one channel of average cost."),
        (18_300_000, "The difference is less than one channel"),  # a channel is 38 M / 48 = 0.792 M
        (17_000_000, "by more than one channel's rounding**: 2.000 M are unused, 2.5 times an average channel"),
        (19_500_000, "Reached: p = 0.5132, 19.500 M. **The budget is exceeded by 0.500 M.**"),
    ],
)
def test_budget_wanted_and_reached(workdir, after, sentence):
    written = text(workdir, budget=RESULTS["budget"] | {"after": after})
    assert "Wanted: at most p = 0.5000 of 38.000 M prunable FLOPs (macs), 19.000 M." in written
    assert sentence in written


def test_budget_in_parameters(workdir):
    budget = {"kind": "params", "unit": "parameters", "before": 272_000, "after": 136_000}
    written = text(workdir, budget=budget)
    assert written.startswith("# ddnp, resnet20 on CIFAR-10 (JPEG), p = 0.5 (params)\n")
    assert "p = 0.5000 of 0.272 M parameters, 0.136 M. Reached: p = 0.5000, 0.136 M. The difference" in written
    assert "47.50 % of the FLOPs and 50.00 % of the parameters removed" in written


def test_budget_in_latency_says_what_was_predicted_and_measured(workdir):
    budget = {"kind": "latency", "unit": "ms (batch 128, cpu)", "before": 50.0, "after": 24.9}
    written = text(workdir, budget=budget)
    assert "p = 0.5000 of 50.000 ms (batch 128, cpu), 25.000. Reached: p = 0.4980, 24.900. " in written
    assert (
        "each measured by itself (-50.20 %); the whole network was measured at 80.000 ms before and 60.000 ms after "
        "(-25.00 %, batch 128)."
    ) in written
    assert "(-50.20 %); the whole network was not measured." in text(workdir, budget=budget, latency_ms=None)
    assert "-47.50 % |   -50.00 % |     -25.00 % |" in written  # FLOPs, parameters and latency, whatever the budget


def test_what_was_not_measured_or_is_optional(workdir):
    written = text(workdir, latency_ms=None, notes=[], variant="authors", best_pruned_validation_top1=93.456)
    assert "Latency was not measured." in written
    assert "| base                       |     92.00 |     99.75 | 40.000 M |    0.272 M |            - |\n" in written
    assert "## Notes" not in written
    assert written.startswith("# ddnp (authors), resnet20")
    assert "held-out training images (it reached 93.46 % there in fine-tuning)" in written


def test_no_negative_zero(workdir):
    assert "(+0.00 points)" in text(workdir, pruned_top1=91.999)


def test_every_convention_is_explained():
    assert set(report.CONVENTIONS) == set(flops.CONVENTIONS)


def test_pictures(workdir):
    written = text(workdir)
    for name in ("widths.png", "search.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG\r\n")
        assert f"]({name})" in written


def test_one_shot_methods_have_no_search_picture(workdir):
    (workdir / "metrics.jsonl").write_text(json.dumps(SEARCH[0]) + "\n")
    written = text(workdir, method="magnitude", variant="magnitude")
    assert written.startswith("# magnitude, resnet20")
    assert not (workdir / "search.png").exists()
    assert "search.png" not in written
    assert "This method has no search; it selects in one shot." in written


def test_search_picture_shows_the_search_alone():
    figure = report._search_figure(RESULTS, [line for line in SEARCH if line["stage"] == "search"])
    accuracy, remaining = figure.axes
    assert [list(map(list, curve.get_data())) for curve in accuracy.lines] == [[[10, 20], [90.0, 85.0]], [[20], [70.0]]]
    curve, budget = remaining.lines
    assert list(curve.get_xdata()) == [10, 20]
    assert list(curve.get_ydata()) == pytest.approx([90.0, 55.0])
    assert list(budget.get_ydata()) == [50.0, 50.0]
    assert accuracy.get_ylabel() == "top-1 accuracy (%)"
    assert remaining.get_ylabel() == "prunable FLOPs (macs) (%)"


@pytest.mark.parametrize("blocks", [3, 18])
def test_widths_picture_has_every_gate_inside_the_picture(blocks):
    names = [f"layer{stage}_{block}/conv1" for stage in (1, 2, 3) for block in range(blocks)]
    before = [channels for channels in (16, 32, 64) for _ in range(blocks)]
    after = [channels // 2 for channels in before]
    figure = report._widths_figure(RESULTS | {"gate_names": names, "widths_before": before, "widths": after})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert [bar.get_height() for bar in axes.patches] == before + after
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))  # legible: none overlap
    assert all(box.y0 > 0 for box in boxes)
    title = axes.title.get_window_extent()
    assert title.x0 > 0 and title.x1 < figure.bbox.width


@pytest.mark.parametrize("key", ["p", "widths", "pruned_top5"])
def test_a_missing_key_is_named(workdir, key):
    results = {name: value for name, value in RESULTS.items() if name != key}
    with pytest.raises(ValueError, match=f"^results has no '{key}'; every report needs it.$"):
        report.write(workdir, results)
    assert not (workdir / "report.json").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seconds": {"base": 1.0, "search": 1.0}}, "results has no 'seconds.finetune'"),
        ({"latency_ms": {"batch": 1, "before": 2.0}}, "results has no 'latency_ms.after'"),
        ({"flops_convention": "flops"}, "flops_convention='flops' is unknown to the report; use 'macs' or 'authors'"),
        ({"widths": [10]}, "gate_names has 2, widths_before has 2, widths has 1 entries"),
    ],
)
def test_results_that_contradict_themselves(workdir, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        report.write(workdir, RESULTS | changes)


def test_a_damaged_log_is_named_with_its_line(workdir):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sea')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 6, is not JSON"):
        report.write(workdir, RESULTS)


def reported(**changes):
    results = RESULTS | changes
    return results | report._derived(results)


def test_compare_takes_mean_and_deviation_over_seeds():
    seeds = [
        reported(seed=0, pruned_top1=91.0),
        reported(seed=1, pruned_top1=91.5, flops_total_after=20_000_000),
        reported(seed=2, pruned_top1=92.5, flops_total_after=22_000_000),
    ]
    one = reported(method="magnitude", variant="magnitude", pruned_top1=90.0)
    header, rule, ddnp, magnitude, *rest = report.compare([seeds[0], one, *seeds[1:]]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (header, ddnp, magnitude)]
    columns = {name: (a, b) for name, a, b in zip(*cells, strict=True)}
    assert columns == {
        "method": ("ddnp", "magnitude"),
        "model": ("resnet20", "resnet20"),
        "data set": ("CIFAR-10 (JPEG)", "CIFAR-10 (JPEG)"),
        "p": ("0.5", "0.5"),
        "FLOPs as": ("macs", "macs"),
        "fine-tuning epochs": ("5", "5"),
        "seeds": ("3", "1"),
        "FLOPs removed (%)": ("47.50 ± 2.50", "47.50"),
        "parameters removed (%)": ("50.00 ± 0.00", "50.00"),
        "base top-1 (%)": ("92.00 ± 0.00", "92.00"),
        "before fine-tuning": ("61.25 ± 0.00", "61.25"),
        "after fine-tuning": ("91.67 ± 0.76", "90.00"),
        "change": ("-0.33 ± 0.76", "-2.00"),
        "seconds": ("1295 ± 0", "1295"),
    }
    assert len({len(line) for line in (header, rule, ddnp, magnitude)}) == 1
    assert rest == [
        "",
        "Several seeds: mean ± sample standard deviation. Accuracies: test set, last epoch. Seconds: all stages.",
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"p": 0.4},
        {"variant": "scalar"},
        {"dataset": "CIFAR-10"},
        {"flops_convention": "authors"},
        {"budget": RESULTS["budget"] | {"kind": "params"}},
        {"epochs": {"base": 200, "search": 200, "finetune": 50}},
    ],
)
def test_compare_averages_only_what_differs_in_the_seed_alone(other):
    lines = report.compare([reported(seed=0), reported(seed=1, **other)]).splitlines()
    assert [line.split("|")[7].strip() for line in lines[2:4]] == ["1", "1"]


def test_compare_refuses_the_same_seed_twice():
    with pytest.raises(
        ValueError, match=r"Two reports of ddnp on resnet20 with p=0\.5 have seed 3; give each run once"
    ):
        report.compare([reported(), reported()])


def test_compare_names_the_report_and_key_that_is_missing():
    incomplete = {name: value for name, value in reported(seed=4).items() if name != "delta_top1"}
    with pytest.raises(ValueError, match="report 2 has no 'delta_top1'; every report"):
        report.compare([reported(), incomplete])


def test_a_report_that_cannot_be_compared_is_named(tmp_path, monkeypatch):
    damaged = tmp_path / "report.json"
    damaged.write_text("{")
    for path, message in ((damaged, f"error: {damaged} is not JSON"), (tmp_path / "none.json", "none.json")):
        monkeypatch.setattr(sys, "argv", ["compare", str(path)])
        with pytest.raises(SystemExit, match=message):
            runpy.run_module("experiments.compare", run_name="__main__")
