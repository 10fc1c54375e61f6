import contextlib
import csv
import json
from types import SimpleNamespace

import flax.linen as nn
import numpy as np
import pytest

from configs import digits_r20
from ddnp_jax import models
from ddnp_jax.training import loop
from ddnp_jax.training.log import MetricsLog
from experiments import ddnp_figures, nppm_figures, shared, sweep
from tests.small_job import Own, tiny

CURVES = {
    ("PN", 0): [{"stage": "search", "step": 10, "loss": 2.0}, {"stage": "search", "step": 10, "test_top1": 50.0}],
    ("PN", 1): [{"stage": "search", "step": 10, "loss": 4.0}, {"stage": "search", "step": 20, "loss": 1.0}],
    ("DG", 0): [{"stage": "search", "step": 10, "loss": 7.0}],
}


def test_mean_and_deviation_over_seeds():
    steps, mean, deviation = sweep.mean_and_deviation(CURVES, "PN", "loss")
    np.testing.assert_array_equal(steps, [10, 20])
    np.testing.assert_allclose(mean, [3.0, 1.0])
    np.testing.assert_allclose(deviation, [np.sqrt(2), 0.0])


def test_summary_gives_the_last_values():
    lines = sweep.summary(CURVES, ["loss", "test_top1"]).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["PN", "1.000 ± 0.000", "50.000 ± 0.000"]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == ["DG", "7.000", "-"]


def test_publish_writes_a_plot_with_a_line_per_setting(tmp_path):
    panels = (sweep.Panel("a", "loss", "loss", ("PN", "DG"), scale=2.0), sweep.Panel("b", "test_top1", "%", ("PN",)))
    sweep.publish(tmp_path, "title", panels, CURVES)
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    left, right = sweep.figure("title", panels, CURVES).axes
    assert [line.get_label() for line in left.lines] == ["PN", "DG"]
    np.testing.assert_allclose(left.lines[0].get_ydata(), [6.0, 2.0])
    assert len(right.lines) == 1
    assert sweep.figure("title", panels, CURVES).get_suptitle() == "title; 2 seeds, mean and standard deviation"
    one = {key: lines for key, lines in CURVES.items() if key[1] == 0}
    assert sweep.figure("title", panels, one).get_suptitle() == "title; one seed"


@pytest.mark.parametrize(("figures", "argument"), [(ddnp_figures, ""), (nppm_figures, "nppm")])
def test_every_setting_is_a_field_that_exists_and_every_panel_draws_settings(figures, argument):
    config = digits_r20.get_config(argument)
    for fields in figures.SETTINGS.values():
        sweep.setting_config(config, fields, seed=1)  # a locked configuration refuses unknown fields
    panels = figures.PANELS if argument else figures.panels(config)
    assert {name for panel in panels for name in panel.settings} == set(figures.SETTINGS)


def test_a_figure_of_another_method_is_refused():
    with pytest.raises(
        ValueError, match=r"this figure sets search\.predictor, which search\.method='ddnp' lacks; give"
    ):
        sweep.setting_config(digits_r20.get_config("ddnp"), nppm_figures.PN, seed=0)


def test_a_setting_changes_nothing_else():
    config = digits_r20.get_config("nppm")
    own = sweep.setting_config(config, {"search.predictor": "none"}, seed=3)
    assert (own.search.predictor, own.seed, own.search.test_curve) == ("none", 3, True)
    own.update_from_flattened_dict({"search.predictor": "gru", "seed": 0, "search.test_curve": False})
    assert own.to_dict() == config.to_dict()


@pytest.mark.parametrize(("kind", "whole"), [("log_abs", 0.6931472), ("abs", 0.5), ("square", 0.25)])
def test_r_is_1_for_the_whole_network(kind, whole):
    config = digits_r20.get_config()
    config.search.resource_loss = kind
    config.budget.p = 0.5
    scales = {panel.metric: panel.scale for panel in ddnp_figures.panels(config)}
    assert scales == {"test_top1": 1.0, "resource_loss": pytest.approx(1 / whole)}
    config.budget.p = 1.0
    with pytest.raises(ValueError, match=r"budget\.p=1\.0 leaves nothing to remove"):
        ddnp_figures.panels(config)


def command_line(monkeypatch, seeds, *settings):
    for flag, value in (("SEEDS", seeds), ("AT_ONCE", 2), ("CHOSEN", settings)):
        monkeypatch.setattr(sweep, flag, SimpleNamespace(value=value))


class Sized(nn.Module):
    widths: tuple

    @nn.compact
    def __call__(self, x, train):
        return Own(self.widths)(x, train)


def test_a_part_of_a_figure_goes_on_and_keeps_its_base(tmp_path, monkeypatch):
    config = tiny(str(tmp_path / "data"), "nppm")
    config.search.update(memory_steps=1, predictor_batch_size=2)
    monkeypatch.setattr(models, "create", lambda name, classes, **attributes: Sized((20, 12)))
    command_line(monkeypatch, 2, "DG", "PN")
    nppm_figures.draw(config, tmp_path / "run")
    curves, summary = ((tmp_path / "run" / name).read_text() for name in ("curves.csv", "summary.md"))
    with (tmp_path / "run" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    learned = [(row["setting"], row["seed"], row["step"]) for row in rows if row.get("predictor_loss")]
    assert learned == [("PN", seed, step) for seed in "01" for step in "34"]  # of four steps
    assert {(row["setting"], row["seed"]) for row in rows if row["test_top1"]} == {
        (setting, seed) for setting in ("DG", "PN") for seed in "01"
    }
    assert [line.split("|")[1].strip() for line in summary.splitlines()] == ["setting", "-" * 7, "DG", "PN"]
    monkeypatch.setattr(loop, "_dispatch", None)  # no step is taken again
    nppm_figures.draw(config, tmp_path / "run")
    assert (tmp_path / "run" / "curves.csv").read_text() == curves
    config.data.search_fraction = 0.5
    with pytest.raises(ValueError, match=r"run/base belongs .*\n.*data\.search_fraction: workdir has 0\.6"):
        nppm_figures.draw(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["PM"], r"--setting='PM' is unknown; use one of 'PN', 'DG'"),
        (["DG", "LR"], r"no plot of the figure shows only the settings of --setting"),
    ],
)
def test_settings_that_make_no_plot_are_refused(settings, message, tmp_path, monkeypatch):
    command_line(monkeypatch, 1, *settings)
    with pytest.raises(ValueError, match=message):
        nppm_figures.draw(digits_r20.get_config("nppm"), tmp_path)


def test_the_searches_share_a_base(tmp_path, monkeypatch):
    searched = []

    class Job:
        def __init__(self, config, workdir):
            self.config, self.workdir, self.weights = config, workdir, config.base.weights
            self.log, self.guard = MetricsLog(workdir / "metrics.jsonl"), contextlib.nullcontext()
            self.network = SimpleNamespace(bind=lambda variables: (None, variables))

    def search(job, variables, seeds):
        searched.append((job.config.search.predictor, job.config.seed, [*seeds], variables))
        job.workdir.mkdir(parents=True)
        own = {f"seed{seed}/loss": float(seed) for seed in seeds}
        lines = [{"stage": "base", "step": 1}, {"stage": "search", "step": 5, "loss": 9.0, **own}]
        (job.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(sweep.pipeline, "prepare", Job)
    monkeypatch.setattr(sweep.pipeline, "base", lambda job: None)
    monkeypatch.setattr(sweep.pipeline, "search_curves", search)
    monkeypatch.setattr(shared, "save_pruned", lambda path, model, variables: None)
    settings = {"PN": {}, "DG": {"search.predictor": "none"}}
    curves = sweep.run(digits_r20.get_config("nppm"), tmp_path, settings, seeds=3, at_once=2)
    network = str(tmp_path / "base" / "network")
    assert searched == [(p, g[0], g, network) for p in ("gru", "none") for g in ([0, 1], [2])]
    assert curves["DG", 1] == [{"step": 5, "loss": 1.0}]
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[4] == {"setting": "DG", "seed": "1", "step": "5", "loss": "1.0"}
