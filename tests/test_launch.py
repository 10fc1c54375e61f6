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
