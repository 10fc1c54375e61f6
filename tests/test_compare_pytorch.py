"""The comparison with PyTorch: its statistics against manual values, and the complete command on digits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import compare_pytorch, pytorch_models
from experiments.compare_pytorch import OURS, PYTORCH
from experiments.pytorch_resnet import randomize

ROOT = Path(__file__).parents[1]


def test_statistics_by_hand():
    ours = np.array([[3, 2, 1, 0, -1, -2], [0, 1, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]], np.float32)
    theirs = ours.copy()
    theirs[1] = [1.5, 1, 0, 0, 0, 0]  # another prediction
    assert compare_pytorch.statistics({OURS: ours, PYTORCH: theirs}, np.array([0, 1, 5])) == {
        "images": 3,
        "max_difference": 1.5,
        "mean_difference": pytest.approx(1.5 / 18),
        "agreement": pytest.approx(200 / 3),
        OURS: {"top1": pytest.approx(200 / 3), "top5": pytest.approx(200 / 3)},
        PYTORCH: {"top1": pytest.approx(100 / 3), "top5": pytest.approx(200 / 3)},
    }


def run(tmp_path, *arguments):
    command = [sys.executable, "-m", "experiments.compare_pytorch", "--config=configs/digits_r20.py"]
    command += [f"--config.data.data_dir={tmp_path}", "--config.eval_batch_size=128", *arguments]
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_command_compares_the_same_weights_on_the_same_images(tmp_path):
    module = randomize(pytorch_models.create("resnet20", 10, channels=1), seed=0)
    torch.save({"net": module.state_dict()}, tmp_path / "weights.pth")
    done = run(tmp_path, f"--torch_checkpoint={tmp_path / 'weights.pth'}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "run" / "compare_pytorch.json").read_text())
    assert figures["images"] == 355
    assert figures["max_difference"] < 1e-4
    assert figures["agreement"] == 100
    assert figures[OURS]["top1"] == figures[PYTORCH]["top1"] < 40  # of random weights
    assert re.search(r"\| ddnp_jax +\| JAX .* \| +\d+\.\d{3} \| +\d+\.\d{3} \| +\d+ \|", done.stdout)
    assert "Predictions agree on 100.000 % of the images" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --torch_checkpoint is missing; give a file of PyTorch weights.\n"),
        (
            ("--torch_checkpoint=nowhere.pth",),
            "error: there is no PyTorch checkpoint nowhere.pth; give the path of an existing file.\n",
        ),
        (
            (f"--torch_checkpoint={__file__}", f"--workdir={__file__}"),
            f"error: workdir={__file__} is a file; give a folder, which is made where there is none.\n",
        ),
        (
            ("--torch_checkpoint=nowhere.pth", "--config.precison=bfloat16"),
            "--config has no field 'precison'; did you mean 'precision'?\n",
        ),
    ],
)
def test_bad_input_ends_in_a_sentence(tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_named_before_data_are_read(tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(pytorch_models.create("resnet20", 10, channels=1).state_dict(), weights)
    weights.write_bytes(weights.read_bytes()[:9000])
    done = run(tmp_path, f"--torch_checkpoint={weights}", "--config.data.name=folder", "--config.data.data_dir=nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {weights} cannot be read: it is damaged, or holds more than tensors (")
    assert done.stderr.count("\n") == 1
