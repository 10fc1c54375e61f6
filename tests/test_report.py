import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from ddnp_jax.__main__ import main
from ddnp_jax.cost import flops
from ddnp_jax.pipeline import report
from ddnp_jax.pipeline.report import figures, text
from ddnp_jax.pipeline.report.markdown import document

ROOT = Path(__file__).parents[1]

REPORT = report.Report(
    method="ddnp",
    model="resnet20",
    dataset="CIFAR-10 (JPEG)",
    seed=3,
    p=0.5,
    budget=report.Cost(kind="flops", unit="prunable FLOPs (macs)", before=38_000_000, after=19_000_000),
    flops_convention="macs",
    base_top1=92.0,
    base_top5=99.75,
    unfinetuned_top1=61.25,
    unfinetuned_top5=95.5,
    pruned_top1=91.5,
    pruned_top5=99.875,
    test_images=8000,
    flops_total_before=40_000_000,
    flops_total_after=21_000_000,
    flops_prunable_before=38_000_000,
    flops_prunable_after=19_000_000,
    params_before=272_000,
    params_after=136_000,
    gate_names=("layer1_0/conv1", "layer2_0/conv1"),
    widths_before=(16, 32),
    widths=(10, 12),
    seconds=report.PerStage(base=0.0, search=1234.6, finetune=60.2),
    epochs=report.PerStage(base=200, search=200, finetune=5),
    training={
        "search": report.Training(
            images=2500,
            steps=2000,
            batch_size=256,
            learning_rates={"importance_optimizer": 1e-3, "width_optimizer": 5e-2},
        ),
        "finetune": report.Training(images=49_000, steps=1910, batch_size=128, learning_rates={"sgd": 0.05}),
    },
    batch_norm="per device",
    precision="float32",
    devices="1 x cpu",
    latency_ms=report.Latency(batch=128, before=80.0, after=60.0),
    verification=report.Verification(max_difference=3.25e-6, argmax_agreement=1.0),
    notes=("fine-tuning shortened: 5 epochs",),
)
CONTROL = {
    "control_top1": 92.25,
    "control_top5": 99.5,
    "seconds": dataclasses.replace(REPORT.seconds, control=90.0),
    "epochs": dataclasses.replace(REPORT.epochs, control=5),
    "training": REPORT.training | {"control": REPORT.training["finetune"]},
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


def changed(**changes):
    return dataclasses.replace(REPORT, **changes)


def markdown(**changes):
    what = changed(**changes)
    return document(what.title, text.headline(what), text.sections(what, has_curve=True))


def test_json_is_the_report_and_what_follows_from_it(workdir):
    returned = report.write(workdir, changed(**CONTROL))
    written = json.loads((workdir / "report.json").read_text())
    assert written == returned
    assert written["latency_ms"] == {"batch": 128, "before": 80.0, "after": 60.0, "runtime": "XLA"}
    assert written["seconds"] == {"base": 0.0, "search": 1234.6, "finetune": 60.2, "control": 90.0}
    assert written["widths"] == [10, 12]
    derived = {key: value for key, value in written.items() if key not in {*report.Report.__dataclass_fields__}}
    assert derived == {
        "delta_top1": -0.5,
        "delta_top5": 0.125,
        "delta_control_top1": -0.75,
        "delta_control_top5": 0.375,
        "flops_reduction": pytest.approx(47.5),
        "params_reduction": 50.0,
        "p_reached": 0.5,
        "flops_speedup": pytest.approx(40 / 21),
        "speedups": [
            {
                "runtime": "XLA",
                "batch": 128,
                "speedup": pytest.approx(4 / 3),
                "part_of_flops_speedup": pytest.approx(0.7),
            }
        ],
    }
    assert report.read(workdir / "report.json") == changed(**CONTROL)
    for name in ("widths.png", "search.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG\r\n")
        assert f"]({name})" in (workdir / "report.md").read_text()


def test_markdown_states_the_result():
    written = markdown()
    assert written.startswith(
        "# ddnp, resnet20 on CIFAR-10 (JPEG), p = 0.5\n\n"
        "ddnp pruned resnet20 on CIFAR-10 (JPEG) (seed 3): 47.50 % of the FLOPs and 50.00 % of the parameters removed, "
        "at 75.00 % of the time (batch 128, XLA), top-1 accuracy 92.00 % before and 91.50 % after (-0.50 points).\n"
    )
    assert (
        "| network                    | top-1 (%) | top-5 (%) |    FLOPs | parameters | latency (ms) |\n"
        "| -------------------------- | --------: | --------: | -------: | ---------: | -----------: |\n"
        "| base                       |     92.00 |     99.75 | 40.000 M |    0.272 M |        80.00 |\n"
        "| pruned, before fine-tuning |     61.25 |     95.50 | 21.000 M |    0.136 M |        60.00 |\n"
        "| pruned, after fine-tuning  |     91.50 |     99.88 | 21.000 M |    0.136 M |        60.00 |\n"
        "| change, base to fine-tuned |     -0.50 |     +0.12 | -47.50 % |   -50.00 % |     -25.00 % |\n"
    ) in written
    assert "FLOPs: multiply-accumulates of convolutions and dense layers; entire network." in written
    assert "Latency: forward pass of a batch of 128 on 1 x cpu." in written
    assert "over all 8,000 test images" in written
    assert "differ by at most 3.2e-06; 100.00 % of the predictions agree" in written
    assert "Batch-norm statistics in training: per device. Precision: float32." in written
    assert "## Notes\n\n- fine-tuning shortened: 5 epochs\n" in written
    assert "part of the change may come from additional training" in written
    assert "not faster" not in written


def test_with_a_control_the_change_is_that_of_two_networks_fine_tuned_in_the_same_way():
    written = markdown(**CONTROL)
    assert (
        "removed, at 75.00 % of the time (batch 128, XLA), top-1 accuracy 91.50 %, against 92.25 % of the unpruned "
        "network fine-tuned in the same way (-0.75 points) and 92.00 % of that network before it.\n"
    ) in written
    assert (
        "| base, fine-tuned in the same way |     92.25 |     99.50 | 40.000 M |    0.272 M |        80.00 |\n"
        in written
    )
    assert "| change, both fine-tuned          |     -0.75 |     +0.38 | -47.50 % |" in written
    assert (
        "| fine-tuning             | 49,000 |      5 |   128 |                             0.05 |      60 |\n"
        "| fine-tuning of the base | 49,000 |      5 |   128 |                             0.05 |      90 |\n"
        "| all                     |        |        |       |                                  |   1,385 |\n"
    ) in written
    assert "a part of the change may come" not in written


OTHERS = (
    report.Latency(batch=128, before=40.0, after=20.0, runtime="ONNX Runtime (CPU), int8"),
    report.Latency(batch=1, before=2.0, after=1.6),
)
EXPORTS = {
    "onnx_int8": report.Export(
        files={"export/network_int8.onnx": report.File(bytes=197102, sha256="ab")},
        compared_images=64,
        max_difference=0.0312,
        argmax_agreement=0.984375,
        top1=91.375,
    ),
    "stablehlo": report.Export(
        files={
            "export/network.stablehlo": report.File(bytes=568652, sha256="cd"),
            "export/network.stablehlo.json": report.File(bytes=99, sha256="ef"),
        },
        compared_images=64,
        max_difference=0.0,
        argmax_agreement=1.0,
    ),
}


def test_speed_beside_what_the_flops_imply():
    written = markdown(other_latencies=OTHERS)
    assert (
        "| runtime                  | batch | base (ms) | pruned (ms) | speed-up | FLOPs imply | ratio |\n"
        "| ------------------------ | ----: | --------: | ----------: | -------: | ----------: | ----: |\n"
        "| XLA                      |     1 |      2.00 |        1.60 |     1.25 |        1.90 |  0.66 |\n"
        "| XLA                      |   128 |     80.00 |       60.00 |     1.33 |        1.90 |  0.70 |\n"
        "| ONNX Runtime (CPU), int8 |   128 |     40.00 |       20.00 |     2.00 |        1.90 |  1.05 |\n"
    ) in written
    assert "measured / implied speed-up. For int8, the base is in float32.\n" in written
    assert "int8" not in markdown()


def test_exported_files_and_their_check(workdir):
    written = markdown(exports=EXPORTS)
    assert (
        "| file                       |   bytes | largest difference | same predictions (%) | top-1 (%) |\n"
        "| -------------------------- | ------: | -----------------: | -------------------: | --------: |\n"
        "| `export/network_int8.onnx` | 197,102 |            3.1e-02 |                98.44 |     91.38 |\n"
        "| `export/network.stablehlo` | 568,652 |            0.0e+00 |               100.00 |         - |\n"
    ) in written
    assert (
        "compared with the pruned network on 64 test images, given as pixels. Top-1: its own accuracy, over" in written
    )
    assert "Exported" not in markdown()
    report.write(workdir, changed(exports=EXPORTS, other_latencies=OTHERS))
    assert report.read(workdir / "report.json") == changed(exports=EXPORTS, other_latencies=OTHERS)


def test_latency_is_that_of_one_device():
    assert "Latency: forward pass of a batch of 128 on one of 8 x H100." in markdown(devices="8 x H100")


def test_a_network_that_is_not_faster_is_called_so():
    slow = report.Latency(batch=128, before=80.0, after=78.4)
    written = markdown(latency_ms=slow)
    assert "**The pruned network is not faster here**: 80.00 ms before, 78.40 ms after. The FLOPs fell and" in written
    assert "on its width. With `budget.kind=latency` the budget counts the measured time" in written
    assert "`budget.multiple=0` measures which multiples of channels the device computes fastest.\n" in written
    assert "not faster" not in markdown(latency_ms=dataclasses.replace(slow, after=78.3))
    assert "not faster" not in markdown(latency_ms=slow, flops_total_after=40_000_000)  # nothing was cut
    in_latency = dataclasses.replace(REPORT.budget, kind="latency")
    assert "on its width. `budget.multiple=0` measures which" in markdown(latency_ms=slow, budget=in_latency)


def test_markdown_tables_of_stages_and_widths():
    written = markdown()
    assert (
        "| stage         | images | epochs | batch |                    learning rate | seconds |\n"
        "| ------------- | -----: | -----: | ----: | -------------------------------: | ------: |\n"
        "| base training |      - |      - |     - |                                - | not run |\n"
        "| search        |  2,500 |    200 |   256 | 0.001 (importance), 0.05 (width) |   1,235 |\n"
        "| fine-tuning   | 49,000 |      5 |   128 |                             0.05 |      60 |\n"
        "| all           |        |        |       |                                  |   1,295 |\n"
    ) in written
    assert (
        "| gate             | before | after | kept (%) |\n"
        "| ---------------- | -----: | ----: | -------: |\n"
        "| `layer1_0/conv1` |     16 |    10 |     62.5 |\n"
        "| `layer2_0/conv1` |     32 |    12 |     37.5 |\n"
        "| all              |     48 |    22 |     45.8 |\n"
    ) in written


def test_cells_of_a_table_may_have_bars_and_a_single_character():
    assert report.table(("setting", "p"), [("|s|", "1"), ("s", "2")]) == (
        "| setting |  p |\n"  #
        "| ------- | -: |\n"
        "| \\|s\\|   |  1 |\n"
        "| s       |  2 |"
    )


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        (19_000_000, "Reached: p = 0.5000, 19.000 M. The difference is less than one channel of average cost."),
        (18_300_000, "The difference is less than one channel"),  # a channel is 38 M / 48 = 0.792 M
        (17_000_000, "**The budget is not fully used**: 2.000 M are left, 2.5 times an average channel"),
        (19_500_000, "Reached: p = 0.5132, 19.500 M. **The budget is exceeded by 0.500 M.**"),
    ],
)
def test_budget_wanted_and_reached(after, sentence):
    written = markdown(budget=dataclasses.replace(REPORT.budget, after=after))
    assert "Target: at most p = 0.5000 of 38.000 M prunable FLOPs (macs), 19.000 M." in written
    assert sentence in written


def test_budget_in_parameters():
    written = markdown(budget=report.Cost(kind="params", unit="parameters", before=272_000, after=136_000))
    assert written.startswith("# ddnp, resnet20 on CIFAR-10 (JPEG), p = 0.5 (params)\n")
    assert "p = 0.5000 of 0.272 M parameters, 0.136 M. Reached: p = 0.5000, 0.136 M. The difference" in written
    assert "47.50 % of the FLOPs and 50.00 % of the parameters removed" in written


def test_budget_in_latency_says_what_was_predicted_and_measured():
    written = markdown(budget=report.Cost(kind="latency", unit="ms (batch 128, cpu)", before=50.0, after=24.9))
    assert "p = 0.5000 of 50.000 ms (batch 128, cpu), 25.000. Reached: p = 0.4980, 24.900. " in written
    assert (
        "scaled to those of the entire network at several widths (-50.20 %); the entire network was measured at "
        "80.000 ms before and 60.000 ms after (-25.00 %, batch 128)."
    ) in written
    found = report.Cost(kind="latency", unit="ms (batch 1, cpu)", before=50.0, after=26.0, predicted=23.0)
    assert "parameters removed, at 52.00 % of the time (batch 1, cpu), top-1 " in markdown(budget=found)
    written = markdown(budget=found)
    assert "Reached: p = 0.5200, 26.000. The pruned network was timed in turn with the unpruned one" in written
    assert "the latency table alone predicted p = 0.4600 for them." in written
    assert "exceeded" not in written and "That is not" not in written  # a repeated measurement differs by as much
    missed = markdown(budget=dataclasses.replace(found, after=30.0))
    assert "for them. **That is not the p = 0.5000 that was wanted.**" in missed
    assert "-47.50 % |   -50.00 % |     -25.00 % |" in written  # FLOPs, parameters and latency, whatever the budget


def test_what_is_optional():
    written = markdown(notes=(), variant="authors", best_pruned_validation_top1=93.456)
    assert "## Notes" not in written
    assert written.startswith("# ddnp (authors), resnet20")
    assert "held-out training images (it reached 93.46 % there in fine-tuning)" in written
    assert "selected on held-out" in written and "selected on 1,000 held-out" in markdown(held_out_images=1000)


def test_top_5_accuracy_is_shown_of_more_than_five_classes():
    pixels = {"scale": 1 / 255, "mean": [0.5], "std": [0.25], "channel_order": "grey", "resize_size": None}
    of_six, of_five = (markdown(preprocessing={**pixels, "crop_size": None, "num_classes": n}) for n in (6, 5))
    assert "| change, base to fine-tuned |     -0.50 |     +0.12 | -47.50 % |" in of_six
    assert "| change, base to fine-tuned |     -0.50 | -47.50 % |" in of_five and "top-5" not in of_five


def test_an_unpruned_network_that_guesses_is_pointed_out():
    pixels = {"scale": 1 / 255, "mean": [0.5], "std": [0.25], "channel_order": "grey", "resize_size": None}

    def written(top1):
        return markdown(base_top1=top1, preprocessing={**pixels, "crop_size": None, "num_classes": 4})

    assert (
        "**The unpruned network is no better than guessing**: it has 29.90 % top-1, and guessing one of 4 classes "
        in (written(29.9))
    )
    assert "guessing" not in written(30.1)


def test_no_negative_zero():
    assert "(+0.00 points)" in markdown(pruned_top1=91.999)


def test_every_convention_is_explained():
    assert set(report.CONVENTIONS) == set(flops.CONVENTIONS)


def test_one_shot_methods_have_no_plot_of_a_search(workdir):
    (workdir / "metrics.jsonl").write_text(json.dumps(SEARCH[0]) + "\n")
    training = {"finetune": REPORT.training["finetune"]}
    report.write(workdir, changed(method="magnitude", variant="magnitude", training=training))
    written = (workdir / "report.md").read_text()
    assert written.startswith("# magnitude, resnet20")
    assert not (workdir / "search.png").exists()
    assert "search.png" not in written
    assert "This method has no search; it selects in one shot." in written


def test_whether_the_search_has_converged_stands_where_it_is_seen():
    far = "The search has not converged: k and the open part of its gate differ. What helps: more steps."
    written = markdown(notes=(far, "another"))
    assert (
        "\n\n**The search has not converged**: k and the open part of its gate differ. What helps: more steps.\n\n"
        in (written.partition("## Speed")[0])
    )
    assert written.count("converged") == 1 and "## Notes\n\n- another\n" in written
    near = "The search has converged: k and the open part of its gate meet."
    written = markdown(notes=(near,))
    assert f"## Search\n\n{near}\n\n![Accuracy and cost" in written
    assert written.count("converged") == 1 and "## Notes" not in written


def test_a_lost_log_is_called_lost(tmp_path):
    report.write(tmp_path, REPORT)
    written = (tmp_path / "report.md").read_text()
    assert (
        "## Search\n\nThe log of the search is lost: metrics.jsonl has no record of it, so there is no plot.\n"
        in written
    )
    assert "held-out training images (its accuracy is lost: metrics.jsonl has no record of it) and is" in written


@pytest.mark.parametrize(
    ("line", "damage"),
    [
        (b'{"stage": "sea', "is not JSON"),
        (b"\xff\n", "is not JSON"),
        (b"{}\n", "has no stage and step"),
        (b'{"stage": "search", "step": "x"}\n', "has step='x', which is not a number"),
        (b'{"stage": "base", "step": 1, "loss": [1]}\n', r"has loss=\[1\], which is not a number"),
    ],
)
def test_a_damaged_log_is_named_with_its_line(workdir, line, damage):
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 6, {damage}.*; repair or delete the line\.$"):
        report.write(workdir, REPORT)
    assert not (workdir / "report.json").exists()


def test_the_plot_of_the_search_has_accuracy_and_cost_one_above_the_other():
    figure = figures.search_figure(REPORT, [line for line in SEARCH if line["stage"] == "search"])
    figure.draw_without_rendering()
    accuracy, cost = figure.axes
    assert [list(map(list, curve.get_data())) for curve in accuracy.lines] == [[[10, 20], [90.0, 85.0]], [[20], [70.0]]]
    curve, target = cost.lines
    assert list(map(list, curve.get_data())) == [[10, 20], [0.9, 0.55]]
    assert list(target.get_ydata()) == [0.5, 0.5]
    assert target.get_label() == "target, p = 0.5"
    assert accuracy.get_xlim() == cost.get_xlim()
    above, below = accuracy.get_window_extent(), cost.get_window_extent()
    assert above.y0 > below.y1 and (above.x0, above.x1) == (below.x0, below.x1)
    assert cost.get_ylim() == (0, 1.02)
    assert (accuracy.get_ylabel(), cost.get_ylabel()) == ("top-1 accuracy (%)", "remaining cost")
    assert cost.get_legend().get_texts()[0].get_text() == "part of the prunable FLOPs (macs) that remains"


@pytest.mark.parametrize("blocks", [3, 18])
def test_the_plot_of_the_widths_has_every_gate_inside(blocks):
    names = tuple(f"layer{stage}_{block}/conv1" for stage in (1, 2, 3) for block in range(blocks))
    before = tuple(channels for channels in (16, 32, 64) for _ in range(blocks))
    after = tuple(channels // 2 for channels in before)
    what = changed(gate_names=names, widths_before=before, widths=after)
    figure = figures.titled(figures.widths_figure(what), "Channels per gate", what)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert tuple(label.get_text() for label in axes.get_xticklabels()) == names
    assert tuple(bar.get_height() for bar in axes.patches) == before + after
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))  # legible: none overlap
    assert all(box.y0 > 0 for box in boxes)
    title = figure.texts[0].get_window_extent()
    assert title.x0 > 0 and title.x1 < figure.bbox.width


def compared(*reports):
    """The cells of every row, by column."""
    header, rule, *lines = report.compare(reports).split("\n\n")[0].splitlines()
    assert {len(line) for line in (rule, *lines)} == {len(header)}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (header, *lines)]
    return {name: values for name, *values in zip(*cells, strict=True)}


def test_compare_takes_mean_and_deviation_over_seeds():
    seeds = [
        changed(**CONTROL | {"seed": 0, "pruned_top1": 91.0}),
        changed(**CONTROL | {"seed": 1, "pruned_top1": 91.5, "flops_total_after": 20_000_000}),
        changed(**CONTROL | {"seed": 2, "pruned_top1": 92.5, "flops_total_after": 22_000_000}),
    ]
    one = changed(method="magnitude", variant="magnitude", pruned_top1=90.0)
    assert compared(seeds[0], one, *seeds[1:]) == {
        "method": ["ddnp", "magnitude"],
        "model": ["resnet20", "resnet20"],
        "data set": ["CIFAR-10 (JPEG)", "CIFAR-10 (JPEG)"],
        "p": ["0.5", "0.5"],
        "FLOPs as": ["macs", "macs"],
        "fine-tuning epochs": ["5", "5"],
        "seeds": ["3", "1"],
        "FLOPs removed (%)": ["47.50 ± 2.50", "47.50"],
        "parameters removed (%)": ["50.00 ± 0.00", "50.00"],
        "base top-1 (%)": ["92.00 ± 0.00", "92.00"],
        "before fine-tuning": ["61.25 ± 0.00", "61.25"],
        "after fine-tuning": ["91.67 ± 0.76", "90.00"],
        "change": ["-0.33 ± 0.76", "-2.00"],
        "base, fine-tuned in the same way": ["92.25 ± 0.00", "-"],
        "change to that": ["-0.58 ± 0.76", "-"],
        "seconds": ["1295 ± 0", "1295"],
    }
    assert compared(seeds[0], changed(seed=1))["change to that"] == ["-"]  # not every seed has it
    assert "|\n\nSeveral seeds: mean ± sample standard deviation. Accuracies: test set, last" in report.compare([one])


@pytest.mark.parametrize(
    "other",
    [
        {"p": 0.4},
        {"variant": "scalar"},
        {"dataset": "CIFAR-10"},
        {"flops_convention": "authors"},
        {"budget": dataclasses.replace(REPORT.budget, kind="params")},
        {"epochs": dataclasses.replace(REPORT.epochs, finetune=50)},
        {"precision": "bfloat16"},
        {"training": {"finetune": dataclasses.replace(REPORT.training["finetune"], batch_size=64)}},
    ],
)
def test_compare_averages_only_what_differs_in_the_seed_alone(other):
    assert compared(changed(seed=0), changed(seed=1, **other))["seeds"] == ["1", "1"]


def test_compare_names_settings_that_have_no_column():
    settings = {"seed": 0, "search.tie_weight": 1.0, "finetune.weight_decay": 1e-4, "search.save_every": 10}
    runs = [
        changed(seed=0, settings=settings),
        changed(seed=1, settings=settings | {"seed": 1, "search.save_every": 5}),
        changed(seed=0, settings=settings | {"search.tie_weight": 2.0}),
    ]
    found = compared(*runs, changed(method="magnitude", variant="magnitude", settings=settings))
    assert found["method"] == ["ddnp, search.tie_weight=1.0", "ddnp, search.tie_weight=2.0", "magnitude"]
    assert found["seeds"] == ["2", "1", "1"]


def test_compare_refuses_the_same_seed_twice():
    with pytest.raises(
        ValueError, match=r"Two reports of ddnp on resnet20 with p=0\.5 have seed 3 and the same settings; give each"
    ):
        report.compare([REPORT, REPORT])


@pytest.mark.parametrize("name", ["nowhere/report.json", ""])
def test_compare_names_a_report_that_is_not_there(tmp_path, name):
    sentence = f"error: there is no file {tmp_path / (name or 'report.json')}; name the report.json of a run that has"
    assert compare_file(tmp_path / name) == f"{sentence} ended."


def test_reports_of_older_versions_are_read():
    results = ROOT / "results"
    paths = [*results.glob("cifar10_r56/*/report.json"), *results.glob("cifar10_r56_half/*/report.json")]
    reports = {path.parent.name: report.read(path) for path in sorted(paths)}
    assert len(reports) == len(paths) == 10
    old = reports["ddnp"]  # written before there was a choice of budgets
    assert (old.budget.kind, old.budget.before, old.p_name, old.control, old.training) == (
        "flops",
        125042688,
        "0.48",
        None,
        {},
    )
    assert reports["magnitude"].was_run("finetune") and not reports["magnitude"].was_run("search")
    columns = compared(*reports.values())
    assert columns["seeds"] == ["1", "1", "1", "1", "2", "2", "2"]
    assert columns["fine-tuning epochs"] == ["2", "2", "2", "2", "1", "1", "1"]
    assert columns["after fine-tuning"][1] == "88.40"


def compare_file(path):
    """The message of the command for a file that it cannot read."""
    with pytest.raises(SystemExit) as error:
        main(["compare", str(path)])
    return str(error.value)


def test_the_command_compares_folders_and_files(workdir, capsys):
    report.write(workdir, REPORT)
    other = workdir / "other.json"
    other.write_text(json.dumps(changed(seed=4).to_json()))
    unfinished = workdir / "unfinished"
    unfinished.mkdir()
    main(["compare", str(workdir), str(unfinished), str(other)])
    printed = capsys.readouterr()
    assert printed.out == report.compare([REPORT, changed(seed=4)]) + "\n"
    assert printed.err == f"left out, without a report.json: {unfinished}\n"
    assert compare_file(unfinished).startswith(f"error: there is no file {unfinished}/report.json")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pruned_top1": ...}, "pruned_top1 is missing"),
        ({"seconds": {"base": 1.0, "search": 1.0}}, "seconds.finetune is missing"),
        ({"latency_ms": {"batch": 1, "before": 2.0}}, "latency_ms.after is missing"),
        ({"latency_ms": None}, "latency_ms must be values by name"),
        ({"latency_ms": {"batch": 1, "before": 1.0, "after": 0.0}}, "latency_ms.after=0.0 must be above 0"),
        ({"other_latencies": {}}, "other_latencies must be a list"),
        ({"other_latencies": [{"batch": 1, "before": 2.0}]}, "other_latencies[0].after is missing"),
        ({"exports": {"onnx": {"files": {"a": {"bytes": 1}}}}}, "exports.onnx.files.a.sha256 is missing"),
        ({"training": {"base": {"images": 3}}}, "training.base.steps is missing"),
        ({"widths": [10, "a"]}, "widths=[10, 'a'] must be numbers"),
        ({"gate_names": [1]}, "gate_names=[1] must be texts"),
        ({"params_before": 0}, "params_before=0 must be above 0"),
        ({"latency_ms": {"batch": 1, "before": float("nan"), "after": 1.0}}, "latency_ms.before=nan must be above 0"),
        ({"best_pruned_validation_top1": "high"}, "best_pruned_validation_top1='high' must be a number"),
    ],
)
def test_compare_names_the_file_and_the_key_that_is_missing_or_damaged(workdir, changes, what):
    path = workdir / "report.json"
    values = {key: value for key, value in (REPORT.to_json() | changes).items() if value is not ...}
    path.write_text(json.dumps(values))
    advice = "run the command of that run again to rewrite its report."
    assert compare_file(path) == f"error: {path}: {what}; {advice}"


def test_compare_names_a_file_that_is_no_report(tmp_path):
    path = tmp_path / "report.json"
    assert str(path) in compare_file(path)
    for content, message in (
        (b"{", f"error: {path} is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "the whole must be"),
    ):
        path.write_bytes(content)
        assert message in compare_file(path)
