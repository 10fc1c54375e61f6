"""NPPM's supplement, Figures 1 and 2, for one network: searches of NPPM and of what it is compared with.

    python -m experiments.nppm_figures --config=configs/cifar10_r56.py:nppm --workdir=runs/figures --seeds=3

Writes `figures.png`, `curves.csv` and `summary.md`. Figure 2 (c, d) is the same command with the configuration of
MobileNetV2. Shorter: `--config.search.epochs=...`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ddnp_jax import data
from experiments import launch, sweep
from experiments.sweep import Panel

PN = {"search.predictor": "gru", "search.memory_balanced": True, "search.projection": True}
SETTINGS = {
    "PN": PN,
    "DG": {**PN, "search.predictor": "none"},
    "LR": {**PN, "search.predictor": "linear"},
    "PN, no memory sampling": {**PN, "search.memory_balanced": False},
    "PN, no projection": {**PN, "search.projection": False},
}
PANELS = (
    Panel("Fig. 1 left: settings", "test_top1", "test top-1 (%)", tuple(SETTINGS)),
    Panel("Fig. 1 right: PN", "predictor_loss", "loss of PN", ("PN",)),
    Panel("Fig. 2 (a/c): accuracy", "test_top1", "test top-1 (%)", ("PN", "DG")),
    Panel("Fig. 2 (b/d): classification loss", "test_loss", "test cross-entropy", ("PN", "DG")),
)


def draw(config: ConfigDict, workdir: str) -> str:
    """Runs the searches and draws them."""
    curves = sweep.run(config, workdir, SETTINGS, sweep.SEEDS.value, sweep.AT_ONCE.value)
    return sweep.publish(Path(workdir), f"NPPM, {config.model.name}, {data.label(config.data)}", PANELS, curves)


if __name__ == "__main__":
    launch.run("configs/cifar10_r56.py:nppm", draw)
