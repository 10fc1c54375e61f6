"""DDNP's Figure A1 and the output functions of its Figure 4 for one network: searches with several settings.

The settings vary λ, ρ, the parameterizations of importance and width, the generators' inputs and the output function.

    python -m experiments.ddnp_figures --config=configs/cifar10_r56.py --workdir=runs/ddnp_figures --seeds=3

Writes `figures.png`, `curves.csv` and `summary.md`. `--config.search.epochs=...` shortens the searches.
"""

from ml_collections import ConfigDict

from configs import default
from ddnp_jax import losses
from experiments import launch, sweep
from experiments.sweep import Panel

FULL = "λ = 4, ρ = 1, g_s and g_k"  # this setting is in every plot
BASE = {
    "search.resource_weight": 4.0,
    "search.tie_weight": 1.0,
    "search.importance": "generator",
    "search.width": "generator",
    "search.learned_inputs": False,
    "search.output": "sigmoid",
}
LAMBDAS = {f"λ = {value:g}": {**BASE, "search.resource_weight": value} for value in (0.25, 1.0, 16.0)}
RHOS = {f"ρ = {value:g}": {**BASE, "search.tie_weight": value} for value in (0.0, 0.1, 10.0)}
SCALARS = default.SEARCHES["scalar"][1]
FORMS = {
    "Fix S": {**BASE, "search.importance": "l1"},
    "Fix k": {**BASE, "search.width": "half"},
    "channel-wise-s": {**BASE, **{name: value for name, value in SCALARS.items() if "importance" in name}},
    "layer-wise-k": {**BASE, **{name: value for name, value in SCALARS.items() if "width" in name}},
    "channel-wise-ks": {**BASE, **SCALARS},
}
INPUTS = {"learned inputs": {**BASE, "search.learned_inputs": True}}
OUTPUTS = {name: {**BASE, "search.output": output} for name, output in (("|s̄|", "abs"), ("s̄²", "square"))}
SETTINGS = {FULL: BASE, **LAMBDAS, **RHOS, **FORMS, **INPUTS, **OUTPUTS}


def panels(config: ConfigDict) -> tuple[Panel, ...]:
    """Returns the plots; R is divided by its value for the unpruned network, log(1 / p) with the default R.

    Raises:
      ValueError: R of the unpruned network is 0.
    """
    whole = float(losses.resource(config.search.resource_loss, 1.0, 1.0, config.budget.p))
    if not whole:
        raise ValueError(f"budget.p={config.budget.p} leaves nothing to remove; this figure needs budget.p below 1.")
    return (
        Panel("(a) resource weight λ", *sweep.TEST_TOP1, (FULL, *LAMBDAS)),
        Panel("(b) resource weight λ", "resource_loss", "R / R of the whole", (FULL, *LAMBDAS), 1 / whole),
        Panel("(c) tie ρ", *sweep.TEST_TOP1, (FULL, *RHOS)),
        Panel("(d) what is learned", *sweep.TEST_TOP1, (FULL, *FORMS)),
        Panel("(e) inputs of the generators", *sweep.TEST_TOP1, (FULL, *INPUTS)),
        Panel("Fig. 4: output function", *sweep.TEST_TOP1, (FULL, *OUTPUTS)),
    )


def draw(config: ConfigDict, workdir: str) -> str:
    """Runs the searches and plots their curves."""
    return sweep.draw(config, workdir, "DDNP Fig. A1", SETTINGS, panels(config))


if __name__ == "__main__":
    launch.run("configs/cifar10_r56.py", draw)
