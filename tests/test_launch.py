"""Experiments from another working directory than the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def refusal(folder, *arguments):
    command = [sys.executable, *arguments, "--workdir=run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("experiment", [["-m", "experiments.digits_r20"], [str(ROOT / "experiments/digits_r20.py")]])
def test_configuration_of_the_checkout_is_found_from_elsewhere(tmp_path, experiment):
    error = refusal(tmp_path, *experiment, "--config=configs/digits_r20.py", "--config.model.name=none")
    assert error.startswith("error: model 'none' is unknown")


@pytest.mark.parametrize("config", [["--config=nowhere.py:tiny"], ["--config", "nowhere.py"]])
def test_missing_configuration_ends_in_a_sentence(tmp_path, config):
    error = refusal(tmp_path, "-m", "experiments.digits_r20", *config, "--config.budget.p=0.4")
    assert error == f"error: --config=nowhere.py is no file, here or in {ROOT}; configs/ holds those that there are.\n"


def test_configuration_beside_the_user_comes_first(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits_r20.py").write_text("def get_config():\n    raise SystemExit('error: mine')\n")
    error = refusal(tmp_path, "-m", "experiments.digits_r20", "--config=configs/digits_r20.py")
    assert error == "error: mine\n"


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config=configs/digits_r20.py:nonsense", "the configuration's argument 'nonsense' is unknown; use ddnp, "),
        ("--workdir=", "--workdir is empty; give the folder of the run."),
        ("--workdir=gs://bucket/run", "workdir=gs://bucket/run is an address and no folder; mount what it names"),
        ("extra", "'extra' is no flag; give fields as --config.FIELD=VALUE"),
        ("--config.base.epochs=abc", "flag --config.base.epochs=abc: invalid literal for int()"),
        ("--config.parallel.cpu_fusions=foo", "parallel.cpu_fusions names 'foo', which is unknown; join some of "),
        ("--config.model.name=resnet18", "model 'resnet18' does not take the attributes shortcut='subsample'"),
        ("--config.seed=99999999999999999999", "seed=99999999999999999999 must be below 2**63."),
    ],
)
def test_bad_arguments_end_in_one_sentence_before_any_work(tmp_path, argument, sentence):
    command = [sys.executable, "-m", "experiments.digits_r20", "--workdir=run", argument]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sentence}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_everything_is_imported_ends_in_a_sentence(tmp_path):
    (tmp_path / "mine.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, "-m", "experiments.digits_r20", "--config=mine.py", "--workdir=run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted; the same command resumes what was saved.\n")
