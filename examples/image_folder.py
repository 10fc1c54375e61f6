"""The full pipeline on a folder of images, one sub-folder per class: train, search, prune, fine-tune, report.

If no folder is given, it writes one with scikit-learn's digits. Needs the extra `job`; takes less than a minute on two
CPU cores.
"""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from ddnp_jax import data, pipeline
from ddnp_jax.config import BaseConfig, BudgetConfig, Config, FinetuneConfig, SearchConfig


class Network(nn.Module):
    """Four convolutions and a classifier; takes 3 channels, whatever the files contain."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (N, H, W, 3) to logits (N, 4)."""
        for i, features in enumerate((16, 32, 32, 64)):
            x = nn.Conv(features, (3, 3), strides=1 + i % 2, use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{i}")(x))
        return nn.Dense(4, name="classifier")(x.mean((1, 2)))


def write_digits(folder: Path) -> None:
    """Four classes of scanned digits as PNG files."""
    scans = load_digits(n_class=4)
    for i, (scan, label) in enumerate(zip(scans.images, scans.target, strict=True)):
        (folder / f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(scan * 15.9)).save(folder / f"class {label}" / f"{i}.png")


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "digits")
if not folder.exists():
    write_digits(folder)
dataset = data.from_folder(folder, pad=1, flip=False, search_fraction=0.2, validation_fraction=0.1)
print(f"{len(dataset.train)} training and {len(dataset.test)} test images of {', '.join(dataset.class_names)}")

config = Config(
    eval_batch_size=144,
    budget=BudgetConfig(p=0.5),
    base=BaseConfig(epochs=8, batch_size=32, schedule="cosine"),
    search=SearchConfig.of("taylor", batch_size=32),
    finetune=FinetuneConfig(epochs=4, batch_size=32, warmup_epochs=0.0, schedule="cosine", learning_rate=0.02),
)
report = pipeline.run(config, "run_folder", model=Network(), dataset=dataset)
print(f"top-1: {report['base_top1']:.1f} -> {report['pruned_top1']:.1f} %")
print(f"FLOPs: {report['flops_total_before']:,} -> {report['flops_total_after']:,}; more in run_folder/report.html")
