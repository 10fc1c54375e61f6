"""The benchmark: PyTorch's search step equals ours, the numbers are correct, and errors are one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import simplejpeg
import torch

import ddnp_jax
from ddnp_jax import losses, models, torch_weights
from experiments import benchmark, generator_cost, interleaved, loading, pytorch_models, steps
from experiments.interleaved import Measurement
from experiments.pytorch_resnet import randomize


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_both_search_steps_give_the_masks_the_same_gradients(name):
    attributes = {"shortcut": "avgpool"} if name == "resnet20" else {}
    torch.manual_seed(0)
    shape = (32, 32, 3)
    rng = np.random.default_rng(0)
    images = np.float32(rng.normal(size=(4, *shape)))
    channels_first = torch.tensor(images).permute(0, 3, 1, 2)
    reference = randomize(pytorch_models.create(name, 10, **attributes), seed=0, images=channels_first)
    reference.requires_grad_(False)
    model = models.create(name, num_classes=10, **attributes)
    variables = torch_weights.load(reference.state_dict(), model)
    topology = ddnp_jax.trace(model, shape)
    labels = rng.integers(0, 10, 4)
    masks = tuple(np.float32(rng.uniform(0.1, 1, width)) for width in topology.widths)

    def loss(masks):
        return losses.cross_entropy(ddnp_jax.apply_masked(model, variables, images, masks, topology), labels)

    ours = jax.jit(jax.grad(loss))(masks)
    leaves = [torch.tensor(mask, requires_grad=True) for mask in masks]
    layers = pytorch_models.masked_layers(reference)
    theirs = pytorch_models.mask_gradients(reference, channels_first, torch.tensor(labels), layers, leaves)
    assert len(ours) == len(theirs) == {"resnet20": 9, "mobilenet_v2": 16}[name]
    for own, other in zip(ours, theirs, strict=True):
        scale = np.abs(other.numpy()).max()
        assert scale > 1e-4
        np.testing.assert_allclose(own, other.numpy(), rtol=1e-3, atol=1e-4 * scale)


def test_pytorch_masks_what_the_gates_of_resnet50_do():
    with torch.device("meta"):
        layers = pytorch_models.masked_layers(pytorch_models.create("resnet50", 1000))
    topology = ddnp_jax.trace(models.create("resnet50", num_classes=1000), (224, 224, 3))
    assert [layer.in_channels for layer in layers] == list(topology.widths)


def measured():
    return {
        "search step, generators": Measurement([1.0, 2.0, 4.0], 3 * 2**20),
        "search step, scalars": Measurement([1.0, 1.6, 5.0], 2**20),
        "PyTorch": Measurement([4.0, 1.0, 8.0], 2**19),
    }


def test_the_cost_of_generators_predictor_and_memory():
    lines = generator_cost.tables(
        {
            "DDNP, scalars": Measurement([1.0, 2.0, 4.0], 2**20),
            "DDNP, generators": Measurement([1.1, 2.4, 4.0], 3 * 2**20),
            "DG": Measurement([1.0, 1.0, 4.0], 2**20),
            "NPPM": Measurement([1.1, 1.2, 6.0], 2**20),
        }
    ).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    assert cells[3] == ["DDNP, generators", "2.400", "3"]
    assert cells[-3:] == [
        ["the generators", "DDNP, generators / DDNP, scalars", "1.100"],  # of 1.1, 1.2, 1
        ["the method", "NPPM / DDNP, generators", "1.000"],  # of 1, 0.5, 1.5
        ["PN and memory", "NPPM / DG", "1.200"],  # of 1.1, 1.2, 1.5
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=resnet65"], "--only=resnet65 is unknown; use resnet56, resnet50, separated by commas."),
        (["--rounds=0"], "--rounds=0 must be at least 1."),
    ],
)
def test_refusals_of_generator_cost(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generator_cost", *arguments])
    with pytest.raises(SystemExit) as caught:
        generator_cost.main()
    assert str(caught.value) == f"error: {message}"


def test_figures_are_medians_and_ratios_medians_of_each_rounds_ratio():
    assert benchmark.summarize(measured(), batch_size=128)["search step, generators"] == {
        "images_per_s": 64.0,
        "peak_bytes": 3 * 2**20,
        # 1, 1.25, 0.8 and 1/4, 2, 1/2; the ratio of the medians would be 1.25 and 1/2
        "time_over": {"search step, scalars": 1.0, "PyTorch": 0.5},
    }


def test_table():
    evaluation = {"evaluation": Measurement([0.5], 10 * 2**20), "PyTorch": Measurement([0.4], 2**20)}
    stages = {"search": measured(), "evaluation": evaluation}
    stages = {stage: benchmark.summarize(m, batch_size=128) for stage, m in stages.items()}
    assert benchmark.table(stages) == (
        "| step | images/s | peak MiB | PyTorch images/s | PyTorch peak MiB | time / PyTorch's |\n"
        "|---|--:|--:|--:|--:|--:|\n"
        "| search step, generators | 64.0 | 3 | 32.0 | 0 | 0.50 |\n"
        "| search step, scalars | 80.0 | 1 | 32.0 | 0 | 0.62 |\n"
        "| evaluation | 256 | 10 | 320 | 1 | 1.25 |\n"
        "\n"
        "A search step with generators takes 1.000 of the time of one with scalars."
    )


def test_table_without_pytorch_says_so():
    stages = {"training": benchmark.summarize({"training step": Measurement([0.5], 10 * 2**20)}, batch_size=128)}
    assert benchmark.table(stages) == (
        "| step | images/s | peak MiB | PyTorch images/s | PyTorch peak MiB | time / PyTorch's |\n"
        "|---|--:|--:|--:|--:|--:|\n"
        "| training step | 256 | 10 | - | - | - |\n"
        "\n"
        "PyTorch is not installed or cannot use this device, so there is nothing to compare with."
    )


def test_table_of_photographs():
    seconds = {"this project": [2.0, 2.0], "simplejpeg + cv2": [1.0, 2.0], "cv2": [4.0, 4.0], "Pillow": [8.0, 8.0]}
    stages = {"data": benchmark.summarize({n: Measurement(s, 2**20) for n, s in seconds.items()}, batch_size=128)}
    assert benchmark.table(stages) == (
        "| photographs | images/s per core | peak MiB | speed / simplejpeg + cv2's |\n"
        "|---|--:|--:|--:|\n"
        "| this project | 64.0 | 1 | 0.75 |\n"
        "| simplejpeg + cv2 | 85.3 | 1 | 1.00 |\n"
        "| cv2 | 32.0 | 1 | 0.38 |\n"
        "| Pillow | 16.0 | 1 | 0.19 |"
    )
    seconds["simplejpeg + cv2, records read"] = [2.0, 3.0]  # with a data set, the loop that reads the same records
    stages = {"data": benchmark.summarize({n: Measurement(s, 2**20) for n, s in seconds.items()}, batch_size=128)}
    lines = benchmark.table(stages).splitlines()
    assert lines[0] == "| photographs | images/s per core | peak MiB | speed / simplejpeg + cv2, records read's |"
    assert lines[2] == "| this project | 64.0 | 1 | 1.25 |"
    assert lines[-1] == "| simplejpeg + cv2, records read | 51.2 | 1 | 1.00 |"


@pytest.mark.parametrize("name", list(loading.LOOPS))
def test_loops_cut_and_mirror_what_was_drawn(name):
    rows, columns = np.mgrid[:100, :120]
    image = np.stack([2 * columns, 2 * rows, np.full((100, 120), 77)], -1).astype(np.uint8)
    encoded = simplejpeg.encode_jpeg(image, quality=98, colorsubsampling="444")
    for mirrored in (False, True):
        out = loading.LOOPS[name](encoded, lambda height, width: (height // 5, width // 4, 50, 60), mirrored)
        assert out.shape == (224, 224, 3)
        shown = out[:, ::-1] if mirrored else out
        x, y = 30 + (np.arange(224) + 0.5) / 224 * 60 - 0.5, 20 + (np.arange(224) + 0.5) / 224 * 50 - 0.5
        inner = slice(8, -8)  # Pillow does not look beyond the crop's edge, cv2 neither
        np.testing.assert_allclose(shown[:, inner, 0], np.tile(2 * x[inner], (224, 1)), atol=4)
        np.testing.assert_allclose(shown[inner, :, 1], np.tile(2 * y[inner, None], (1, 224)), atol=4)


def test_evaluation_from_the_command_line(tmp_path):
    """Two processes in turn, without any mocks."""
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "experiments.benchmark", "--only=evaluation", "--batch_size=8", "--rounds=2"]
    done = subprocess.run(
        [*command, f"--json={path}"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "| evaluation | " in done.stdout
    content = json.loads(path.read_text())
    candidates = content["stages"]["evaluation"]
    assert (content["batch_size"], content["rounds"], list(candidates)) == (8, 2, ["evaluation", "PyTorch"])
    for candidate in candidates.values():
        assert candidate["images_per_s"] == pytest.approx(8 / np.mean(candidate["seconds"]))
        assert 50 < candidate["peak_bytes"] / 2**20 < 5000


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--only=search,speed",
            "--only='speed' is unknown; use search, training, evaluation, data, separated by commas.",
        ),
        ("--rounds=0", "--rounds=0 must be at least 1."),
        ("--network=vgg", "--network='vgg' is unknown; use one of resnet56, mobilenet_v2, resnet50."),
        ("--precision=half", "--precision='half' is unknown; use one of float32, bfloat16."),
        ("--batch_size=many", "argument --batch_size: invalid int value: 'many'"),
        ("--batch=8", "unrecognized arguments: --batch=8"),
        ("--json=/", "--json=/ is a folder; give a file in it."),
        ("--json=nowhere/a.json", "--json=nowhere/a.json: there is no folder nowhere; make it first."),
    ],
)
def test_a_wrong_flag_ends_in_one_sentence(monkeypatch, argument, message):
    monkeypatch.setattr(sys, "argv", ["benchmark", argument])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert str(caught.value) == f"error: {message}"


def test_a_missing_folder_of_photographs_ends_in_one_sentence(capfd, tmp_path):
    with pytest.raises(SystemExit, match=r"^1$"):
        interleaved.Worker(loading.candidate, "this project", str(tmp_path), 8)
    assert f"\nerror: --data_dir={tmp_path} holds no imagenet2012 that TFDS has" in f"\n{capfd.readouterr().err}"


def test_a_refusal_of_a_measured_process_is_seen(capfd):
    with pytest.raises(SystemExit, match=r"^1$"):
        interleaved.Worker(steps.ours, "evaluation", "nonsense", steps.NETWORKS["resnet56"])
    said = capfd.readouterr().err
    assert said.startswith("error: the configuration's argument 'nonsense' is unknown; use ddnp, ")
    assert said.count("\n") == 1


def test_a_measured_process_that_dies_is_named_by_its_exit_code():
    with pytest.raises(SystemExit, match=r"^error: a measured process ended early \(exit code 3\)\.$"):
        interleaved.Worker(os._exit, 3)
