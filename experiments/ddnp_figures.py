"""DDNP's Figure A1 for one network: searches over λ, ρ, what is learned, and the generators' inputs.

    python -m experiments.ddnp_figures --config=configs/cifar10_r56.py --workdir=runs/figures --seeds=3

Writes `figures.png`, `curves.csv` and `summary.md`. Shorter: `--config.search.epochs=...`.
"""

import math
from pathlib import Path

from ml_collections import ConfigDict

from configs import default
from ddnp_jax import data
from experiments import launch, sweep
from experiments.sweep import Panel

FULL = "λ = 4, ρ = 1, g_s and g_k"  # a member of every sweep
BASE = {
    "search.resource_weight": 4.0,
    "search.tie_weight": 1.0,
    "search.importance": "generator",
    "search.width": "generator",
    "search.learned_inputs": False,
}
LAMBDAS = {f"λ = {value:g}": {**BASE, "search.resource_weight": value} for value in (0.25, 1.0, 16.0)}
RHOS = {f"ρ = {value:g}": {**BASE, "search.tie_weight": value} for value in (0.0, 0.1, 10.0)}
FORMS = {
    "Fix S": {**BASE, "search.importance": "l1"},
    "Fix k": {**BASE, "search.width": "half"},
    "channel-wise-ks": {**BASE, **default.SEARCHES["scalar"][1]},
}
INPUTS = {"learned inputs": {**BASE, "search.learned_inputs": True}}
SETTINGS = {FULL: BASE, **LAMBDAS, **RHOS, **FORMS, **INPUTS}


def panels(p: float) -> tuple[Panel, ...]:
    """The pictures; R is normalized by its value for the whole network, log(1 / p)."""
    accuracy = ("test_top1", "test top-1 (%)")
    return (
        Panel("(a) resource weight λ", *accuracy, (FULL, *LAMBDAS)),
        Panel("(b) resource weight λ", "resource_loss", "R / log(1/p)", (FULL, *LAMBDAS), 1 / math.log(1 / p)),
        Panel("(c) tie ρ", *accuracy, (FULL, *RHOS)),
        Panel("(d) what is learned", *accuracy, (FULL, *FORMS)),
        Panel("(e) inputs of the generators", *accuracy, (FULL, *INPUTS)),
    )


def draw(config: ConfigDict, workdir: str) -> str:
    """Runs the searches and draws them."""
    curves = sweep.run(config, workdir, SETTINGS, sweep.SEEDS.value, sweep.AT_ONCE.value)
    title = f"DDNP Fig. A1, {config.model.name}, {data.label(config.data)}"
    return sweep.publish(Path(workdir), title, panels(config.budget.p), curves)


if __name__ == "__main__":
    launch.run("configs/cifar10_r56.py", draw)
