"""The table of several methods: its rows, their budgets, and its text."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
from ml_collections import config_flags
from test_report import CONTROL, REPORT
from test_sweep import Sized

from configs import cifar10_r56, imagenet_r50
from ddnp_jax import models
from ddnp_jax.config import typed
from ddnp_jax.cost import flops
from ddnp_jax.topology import trace
from ddnp_jax.training import loop
from experiments import launch, table_a4
from tests.small_job import tiny


def changed(**changes):
    return dataclasses.replace(REPORT, **changes)


def changed_epochs(config):
    config.finetune.epochs = 7
    return config


def lines_of(markdown):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]


def test_a_row_is_the_mean_over_its_seeds_beside_the_published_one():
    config = imagenet_r50.get_config("62")
    published = table_a4.PUBLISHED["resnet50", "imagenet2012"]["chip"]
    rows = [
        table_a4.Row("chip", (changed(seed=0), changed(seed=1, pruned_top1=90.5, unfinetuned_top1=63.25)), published),
        table_a4.Row("uniform", (changed(seed=0, **CONTROL),), None),
    ]
    markdown = table_a4.markdown(config, rows)
    header, _, chip, uniform = lines_of(markdown)
    assert header[:2] == ["row", "seeds"] and header[-4:] == ["published top-1", "top-5", "Δ top-1", "FLOPs"]
    # 40 to 21 million; 272,000 to 136,000; 80 to 60 ms; the base has 92.
    assert chip[:5] == ["chip", "2", "47.50 ± 0.00", "50.00 ± 0.00", "75.00 ± 0.00"]
    assert chip[5:9] == ["62.25 ± 1.41", "91.00 ± 0.71", "99.88 ± 0.00", "-1.00 ± 0.71"]
    assert chip[9:] == ["75.26", "92.53", "-0.89", "62.8"]
    assert uniform == ["uniform", "1", "47.50", "50.00", "75.00", "61.25", "91.50", "99.88", "-0.50", *["-"] * 4]
    assert "Base: 92.00 % top-1, 99.75 % top-5 of 8,000 test images, 40.00 M multiply-accumulates" in markdown
    assert "Fine-tuned in the same way: 92.25 %." in markdown
    config.finetune.epochs = 1
    assert "Fine-tuning of every row: 1 epoch of " in table_a4.markdown(config, rows)
    found = json.loads(json.dumps(table_a4.to_json(config, rows)))
    assert found["base"]["top-1"] == 92.0
    assert found["base"]["top-1 fine-tuned in the same way"] == {"values": [92.25], "mean": 92.25, "deviation": None}
    assert (found["finetune"]["epochs"], found["finetune"]["batch_size"]) == (1, 1024)
    assert found["rows"][0]["top-1 after"] == {
        "values": [91.5, 90.5],
        "mean": 91.0,
        "deviation": pytest.approx(0.7071068),
    }
    assert found["rows"][0]["published"]["delta_top1"] == -0.89
    assert found["rows"][1]["published"] is None


@pytest.mark.parametrize(
    ("name", "p", "top1"),
    [
        ("hrank", 0.2976, 71.98),
        ("hrank,hrank_rates", 0.2976, 71.98),
        ("cc", 0.2976, 74.54),  # 62.7 % removed, 61.65 at 64 pixels: still the table's budget
        ("chip", 0.2976, 75.26),
        ("chip", 0.31, None),
        ("ddnp", 0.2976, 75.56),
        ("ddnp", 0.31, None),  # 60.9 % removed
        ("ddnp", 0.38, None),
        ("authors", 0.2976, None),
        ("scalar", 0.2976, None),
        ("hrank,global", 0.2976, None),
        ("taylor", 0.2976, None),
    ],
)
def test_only_the_same_method_at_the_same_budget_is_compared_with_the_published_one(name, p, top1):
    config = imagenet_r50.get_config("62")
    config.budget.p = p
    topology = trace(models.create("resnet50", num_classes=1000), (64, 64, 3))
    found = table_a4._published(name, SimpleNamespace(topology=topology, config=config))
    assert (None if found is None else found.top1) == top1


def test_the_base_is_not_trained_on_the_search_images_of_any_row():
    ddnp, nppm = (cifar10_r56.get_config(words) for words in ("", "nppm"))
    assert (ddnp.data.search_fraction, nppm.data.search_fraction) == (0.05, 0.1)
    assert table_a4._base_config(ddnp, [ddnp, nppm]).data.search_fraction == 0.1
    assert ddnp.data.search_fraction == 0.05
    ddnp.base.weights = "given"
    assert table_a4._base_config(ddnp, [ddnp, nppm]).data.search_fraction == 0.05


def test_without_published_figures_their_columns_are_left_out():
    markdown = table_a4.markdown(imagenet_r50.get_config(), [table_a4.Row("cc", (REPORT,), None)])
    assert lines_of(markdown)[0][-1] == "Δ top-1"
    assert "Published" not in markdown and "Fine-tuned in the same way" not in markdown


def test_every_row_removes_the_same_part_of_all_flops(tmp_path):
    model = models.create("resnet50", num_classes=10)
    whole = trace(model, (64, 64, 3))
    job = SimpleNamespace(
        topology=whole, network=SimpleNamespace(model=model), dataset=SimpleNamespace(image_shape=(64, 64, 3))
    )
    config = imagenet_r50.get_config("62")
    for words in ("nppm", "chip,chip_rates"):
        own = table_a4._row_config(imagenet_r50.get_config(f"62,{words}"), config, job, tmp_path)
        topology = trace(model, (64, 64, 3), residual=own.budget.residual)
        removed = flops.reduction_for_p(topology, own.budget.p)
        assert removed == pytest.approx(flops.reduction_for_p(whole, 0.2976), abs=1e-12)
        assert own.base.weights == str(tmp_path)


def test_a_row_adds_to_the_argument_of_the_configuration(monkeypatch):
    monkeypatch.setattr(launch.flags, "FLAGS", {"config": None})
    monkeypatch.setattr(config_flags, "get_config_filename", lambda holder: f"{imagenet_r50.__file__}:62")
    monkeypatch.setattr(config_flags, "get_override_values", lambda holder: {"finetune.epochs": 3})
    config = launch.with_arguments("chip,chip_rates")
    assert (config.search.method, config.search.allocation, config.budget.residual) == ("chip", "rates", True)
    assert (config.budget.p, config.finetune.epochs) == (0.2976, 3)


def test_a_field_of_a_method_is_set_in_the_rows_that_have_it(monkeypatch):
    monkeypatch.setattr(launch.flags, "FLAGS", {"config": None})
    monkeypatch.setattr(config_flags, "get_config_filename", lambda holder: f"{imagenet_r50.__file__}:nppm,62")
    values = {"search.decay_at": 0.5, "search.resource_weight": 3.0}
    monkeypatch.setattr(config_flags, "get_override_values", lambda holder: values)
    rows = {words: launch.with_arguments(words) for words in ("nppm", "ddnp", "chip,chip_rates", "residual")}
    assert [rows[words].search.method for words in rows] == ["nppm", "ddnp", "chip", "nppm"]
    assert [rows[words].search.get("decay_at") for words in rows] == [0.5, None, None, 0.5]
    assert [rows[words].search.resource_weight for words in rows] == [3.0, 3.0, 3.0, 3.0]
    assert {row.budget.p for row in rows.values()} == {0.2976}
    table_a4._check_set_fields(rows)
    with pytest.raises(
        ValueError, match=r"^--config\.search\.decay_at is not a field of any row; the rows are ddnp\.$"
    ):
        table_a4._check_set_fields({"ddnp": rows["ddnp"]})


def test_the_base_is_the_same_whatever_is_set_for_a_method():
    ddnp, nppm = (cifar10_r56.get_config(argument) for argument in ("62", "62,nppm"))
    for config in (ddnp, nppm):
        config.base.weights = "weights"
        config.data.search_fraction = 0.05
    ddnp.search.tie_weight, nppm.search.decay_at = 3.0, 0.5
    bases = [typed(table_a4._base_config(config, [])) for config in (ddnp, nppm)]
    assert bases[0] == bases[1]
    nppm.finetune.epochs = 7
    assert typed(table_a4._base_config(nppm, [])) != bases[0]


def test_a_table_resumes_and_takes_further_rows(tmp_path, monkeypatch):
    data = str(tmp_path / "data")
    config = tiny(data, "magnitude")
    monkeypatch.setattr(models, "create", lambda name, classes, **attributes: Sized((20, 12)))
    monkeypatch.setattr(launch, "with_arguments", lambda words: tiny(data, words))
    monkeypatch.setattr(launch, "set_fields", list)

    def make(seeds, *rows):
        monkeypatch.setattr(table_a4, "SEEDS", SimpleNamespace(value=seeds))
        monkeypatch.setattr(table_a4, "ROWS", SimpleNamespace(value=rows))
        table_a4.make(config, str(tmp_path / "run"))
        return json.loads((tmp_path / "run" / "table.json").read_text())["rows"]

    (first,) = make(1, "magnitude")
    finished = tmp_path / "run" / "magnitude" / "0"
    for path in finished.iterdir():
        if path.name not in ("config.json", "report.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(loop, "_dispatch", None)  # no step is taken again
    assert make(1, "magnitude") == [first]
    config.finetune.epochs = 7
    monkeypatch.setattr(launch, "with_arguments", lambda words: changed_epochs(tiny(data, words)))
    with pytest.raises(ValueError, match=r"belongs to a run with another config:\n  finetune.epochs: workdir has 1"):
        make(1, "magnitude")
    monkeypatch.setattr(launch, "with_arguments", lambda words: tiny(data, words))
    monkeypatch.setattr(launch, "set_fields", list)
    config.finetune.epochs = 1
    config.finetune.control = True  # which the report lacks
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        make(1, "magnitude")
    config.finetune.control = False
    monkeypatch.undo()
    monkeypatch.setattr(models, "create", lambda name, classes, **attributes: Sized((20, 12)))
    monkeypatch.setattr(launch, "with_arguments", lambda words: tiny(data, words))
    monkeypatch.setattr(launch, "set_fields", list)
    both = make(1, "magnitude", "uniform")
    assert both[0] == first
    assert [row["row"] for row in both] == ["magnitude", "uniform"]
    assert both[1]["FLOPs removed (%)"]["mean"] == pytest.approx(first["FLOPs removed (%)"]["mean"], abs=5)
    reports = [
        json.loads((tmp_path / "run" / row / "0" / "report.json").read_text()) for row in ("magnitude", "uniform")
    ]
    assert [report["pruned_top1"] for report in reports] == [row["top-1 after"]["mean"] for row in both]
    assert reports[0]["base_top1"] == reports[1]["base_top1"]

    (two,) = make(2, "magnitude")
    monkeypatch.setattr(loop, "_dispatch", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        make(2, "magnitude", "lamp")
    assert json.loads((tmp_path / "run" / "table.json").read_text())["rows"] == [two]  # with both seeds
