"""Compares PyTorch's network and this library's on the same test images with the same trained weights.

    python -m experiments.compare_pytorch --config=configs/cifar10_r56.py --torch_checkpoint=resnet56-base.pth.tar

reports the differences of the logits and predictions, and the accuracy and speed of both networks; with `--workdir`, it
also saves them to `compare_pytorch.json`. The configuration selects the network and the data; its `eval_batch_size` and
`precision` are used too. The speed is that of the forward pass only, with the batch already on its device. The two
networks alternate batch by batch, so that a slowdown of the machine affects both. On a GPU both use TensorFloat-32 by
default, which changes the logits; with JAX_DEFAULT_MATMUL_PRECISION=float32, this library computes exactly.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import launch

if TYPE_CHECKING:
    from ddnp_jax.config import Config

_CHECKPOINT = flags.DEFINE_string("torch_checkpoint", None, "PyTorch weights for the network of --config.")

PYTORCH, OURS = "PyTorch", "ddnp_jax"

Forward = Callable[[np.ndarray], tuple[np.ndarray, float]]  # images (N, H, W, C) -> logits (N, K), seconds


def our_forward(config: "Config", checkpoint: str, num_classes: int, image_shape: tuple[int, ...]) -> Forward:
    """Returns the forward pass of this library's network, with every batch split over all devices.

    Raises:
      ValueError: The checkpoint does not match the network.
    """
    import jax

    from ddnp_jax import models, parallel, torch_weights

    attributes = {**config.model.attributes, "dtype": config.dtype}
    model = models.create(config.model.name, num_classes, **attributes)
    variables = parallel.replicate(torch_weights.load(checkpoint, model, image_shape))
    split = jax.sharding.NamedSharding(parallel.mesh(), jax.sharding.PartitionSpec(parallel.AXIS))
    apply = jax.jit(lambda variables, x: model.apply(variables, x, train=False))

    def forward(images: np.ndarray) -> tuple[np.ndarray, float]:
        x = jax.block_until_ready(jax.device_put(images, split))
        started = time.perf_counter()
        logits = jax.block_until_ready(apply(variables, x))
        return np.asarray(logits, np.float32), time.perf_counter() - started

    return forward


def pytorch_forward(config: "Config", checkpoint: str, num_classes: int, channels: int, on_gpu: bool) -> Forward:
    """Returns the forward pass of PyTorch's network, in the channels-last memory format."""
    import torch

    from ddnp_jax import torch_weights
    from experiments import pytorch_models

    module = pytorch_models.create(config.model.name, num_classes, channels=channels, **config.model.attributes)
    wanted = module.state_dict()
    state = torch_weights.rename_aliases(torch_weights.read(checkpoint, wanted), wanted)
    module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.items()})
    device = torch.device("cuda" if on_gpu else "cpu")
    module = module.to(device, memory_format=torch.channels_last).eval()

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def forward(images: np.ndarray) -> tuple[np.ndarray, float]:
        x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # channels last in memory, as the images are
        with torch.inference_mode():
            started = wait()
            logits = module(x)
            seconds = wait() - started
        return logits.cpu().numpy(), seconds

    return forward


def compare(config: "Config", checkpoint: str) -> dict[str, Any]:
    """Runs all test images through both networks; returns their `statistics`, images per second and devices.

    Raises:
      ValueError: A field is invalid, or the checkpoint does not match the network.
      OSError: The data or the checkpoint do not exist.
      ImportError: PyTorch is not installed.
    """
    import jax
    import torch
    from tqdm import tqdm

    from ddnp_jax import data, parallel, torch_files

    parallel.check_batch(config.eval_batch_size, "eval_batch_size")
    torch_files.check(checkpoint)
    dataset = data.load(config.data)
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    sides = {
        OURS: our_forward(config, checkpoint, dataset.num_classes, dataset.image_shape),
        PYTORCH: pytorch_forward(config, checkpoint, dataset.num_classes, dataset.image_shape[-1], on_gpu),
    }
    logits: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    labels = []
    batches = data.evaluation_batches(np.arange(len(dataset.test)), config.eval_batch_size)
    for indices, valid in tqdm(batches, desc="comparing", unit="batch"):
        batch = dataset.test.batch(dataset.test.on_devices, dataset.test.read(indices, None), None)
        images, targets = map(np.array, batch)  # copies, because PyTorch warns about read-only arrays
        labels.append(targets[valid])
        for name, forward in sides.items():
            if not logits[name]:
                forward(images)  # compiles
            out, taken = forward(images)
            logits[name].append(out[valid])
            seconds[name].append(taken)
    figures = statistics({name: np.concatenate(each) for name, each in logits.items()}, np.concatenate(labels))
    for name, taken in seconds.items():
        figures[name]["images_per_s"] = config.eval_batch_size / float(np.median(taken))
    figures[OURS]["on"] = f"JAX {jax.__version__}, {parallel.description()}"
    device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    figures[PYTORCH]["on"] = f"PyTorch {torch.__version__}, {device}"
    return {"model": config.model.name, "dataset": dataset.name, "batch": config.eval_batch_size, **figures}


def statistics(logits: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, Any]:
    """Compares the outputs of two networks with each other and with the labels.

    Args:
      logits: Logits (N, K) of `OURS` and of `PYTORCH`.
      labels: Labels (N,).

    Returns:
      "images"; "max_difference" and "mean_difference" of the logits; "agreement" of the predictions in percent; and
      for each network its "top1" and "top5" in percent.
    """
    difference = np.abs(logits[OURS] - logits[PYTORCH])
    order = {name: np.argsort(-each, axis=1, kind="stable") for name, each in logits.items()}
    hits = {name: each[:, :5] == labels[:, None] for name, each in order.items()}
    return {
        "images": len(labels),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "agreement": 100 * float(np.mean(order[OURS][:, 0] == order[PYTORCH][:, 0])),
        **{
            name: {"top1": 100 * float(np.mean(hit[:, 0])), "top5": 100 * float(np.mean(hit.any(axis=1)))}
            for name, hit in hits.items()
        },
    }


def summary(figures: Mapping[str, Any]) -> str:
    """The results of `compare` as text."""
    from ddnp_jax.pipeline.report import table

    header = ["network", "on", "top-1 (%)", "top-5 (%)", "images/s"]
    rows = [
        [name, own["on"], f"{own['top1']:.3f}", f"{own['top5']:.3f}", f"{own['images_per_s']:.0f}"]
        for name, own in ((name, figures[name]) for name in (PYTORCH, OURS))
    ]
    n, batch = figures["images"], figures["batch"]
    largest, mean = figures["max_difference"], figures["mean_difference"]
    return (
        f"{figures['model']} on {n:,} test images of {figures['dataset']}, batch {batch}.\n\n"
        f"{table(header, rows, text_columns=2)}\n\n"
        f"Predictions agree on {figures['agreement']:.3f} % of the images; "
        f"logits differ by {largest:.2g} at most and {mean:.2g} on average."
    )


def main(config: ConfigDict, workdir: str | None) -> str:
    """Compares the networks, and saves the results if a workdir is given."""
    from ddnp_jax import files, pipeline
    from ddnp_jax.config import typed

    with pipeline.locked(workdir) if workdir else contextlib.nullcontext():
        figures = compare(typed(config), _CHECKPOINT.value)
        if workdir:
            files.write_json(Path(workdir) / "compare_pytorch.json", figures)
    return summary(figures)


if __name__ == "__main__":
    launch.run("configs/cifar10_r56.py", main, required=("torch_checkpoint",))
