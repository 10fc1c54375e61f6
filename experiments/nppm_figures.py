"""Figures 1 and 2 of NPPM's supplement for one network: searches with NPPM and with the variants in these figures.

    python -m experiments.nppm_figures --config=configs/cifar10_r56.py:nppm --workdir=runs/nppm_figures --seeds=3

Writes `figures.png`, `curves.csv` and `summary.md`. For Figure 2 (c, d), use `configs/cifar10_mbv2.py:nppm_mobilenet`,
which has no projection, and `--setting=PN --setting=DG`. `--config.search.epochs=...` shortens the searches.
"""

from ml_collections import ConfigDict

from experiments import launch, sweep
from experiments.sweep import Panel

PN = {"search.predictor": "gru", "search.memory_balanced": True}
SETTINGS = {
    "PN": PN,
    "DG": {**PN, "search.predictor": "none"},
    "LR": {**PN, "search.predictor": "linear"},
    "PN, no memory sampling": {**PN, "search.memory_balanced": False},
    "PN, no projection": {**PN, "search.projection": False},
}
PANELS = (
    Panel("Fig. 1 left: settings", *sweep.TEST_TOP1, tuple(SETTINGS)),
    Panel("Fig. 1 right: PN", "predictor_loss", "loss of PN", ("PN",)),
    Panel("Fig. 2 (a/c): accuracy", *sweep.TEST_TOP1, ("PN", "DG")),
    Panel("Fig. 2 (b/d): classification loss", "test_loss", "test cross-entropy, cut to p", ("PN", "DG")),
)


def draw(config: ConfigDict, workdir: str) -> str:
    """Runs the searches and plots their curves."""
    return sweep.draw(config, workdir, "NPPM", SETTINGS, PANELS)


if __name__ == "__main__":
    launch.run("configs/cifar10_r56.py:nppm", draw)
