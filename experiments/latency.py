"""Promised, predicted and measured latency of pruned networks: network x runtime x batch x budget.

    python -m experiments.latency --workdir=runs/latency [--network=resnet56] [--batch=1,32] [--runtime=xla,onnx] \
        [--p=0.6] [--residual]

Every network is cut to random widths that meet a budget, with random weights: time does not depend on the weights. Of
the FLOPs budget of the network's configuration, once with any widths and once with the fastest multiple, the table has
the speed-up that the FLOPs promise, the measured one, and their ratio. Of a latency budget with the fastest multiple it
has the fraction of time that the latency table predicts, and the measured one after the correction (`cost.correction`).
Base and pruned network are timed in turn. `latency.md` and `latency.json` are written after every row, and the same
command resumes after the last one.
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import ddnp_jax
from ddnp_jax import files, models, parallel
from ddnp_jax.cost import correction, flops, latency, multiples
from ddnp_jax.cost.budget import Budget
from ddnp_jax.cost.kinds import latency_budget
from ddnp_jax.cost.network_times import RUNTIMES, NetworkTimer
from ddnp_jax.pipeline.report import table
from ddnp_jax.topology import trace
from experiments import launch
from experiments.steps import NETWORKS, Network

HEADER = {
    "network": "network",
    "runtime": "runtime",
    "batch": "batch",
    "budget": "budget",
    "multiple": "multiple",
    "ms": "base (ms)",
    "flops_kept": "FLOPs kept (%)",
    "promised": "speed-up promised by FLOPs",
    "predicted": "time predicted (%)",
    "measured": "time measured (%)",
    "speedup": "speed-up measured",
    "ratio": "of what was promised",
}
POINTS = 4  # widths per gate at which layers are timed


def rows(name: str, runtime: str, batch: int, p: float, residual: bool) -> list[dict[str, Any]]:
    """Measures one network in one runtime at one batch: a row for each budget."""
    config = _config(NETWORKS[name])
    timer = timer_of(NETWORKS[name], batch, runtime, residual)
    topology = timer.topology
    fastest = multiples.measure(timer).fastest()
    k = np.random.default_rng(0).uniform(0.3, 1.0, len(topology.gates))
    (ms,) = timer.ms([topology.widths])
    common = {"network": name + (", residual" if residual else ""), "runtime": runtime, "batch": batch, "ms": ms}
    found = []
    for multiple in dict.fromkeys((1, fastest)):
        budget = Budget(topology, config.budget.p, multiple=multiple)
        row = {"budget": f"FLOPs, p = {budget.p:g}", "multiple": multiple}
        found.append(common | row | _measured(timer, budget.fit(k)))
    budget = latency_budget(timer, p, fastest, table=latency.measure(timer, POINTS, fastest))
    row = common | {"budget": f"latency, p = {p:g}", "multiple": fastest}
    if budget.least_p > p:
        return [*found, row | {"predicted": 100 * budget.least_p, "note": "the smallest network"}]
    found_correction = correction.correct(budget, lambda each: each.fit(k))
    widths = budget.with_savings(found_correction.savings).fit(k)
    predicted = 100 * budget.cost(widths) / budget.total
    return [*found, row | {"predicted": predicted} | _measured(timer, widths)]


def timer_of(network: Network, batch: int, runtime: str, residual: bool = False) -> NetworkTimer:
    """Times a network of `experiments.steps`, as its experiment builds it."""
    model = _model(network)
    return NetworkTimer(model, trace(model, network.image_shape, residual=residual), batch, runtime)


def _has_residual_gates(network: Network) -> bool:
    model = _model(network)
    pruned, others = (trace(model, network.image_shape, residual=residual) for residual in (True, False))
    return pruned.widths != others.widths


def _model(network: Network) -> Any:
    config = _config(network)
    return models.create(config.model.name, network.classes, **config.model.attributes)


def _config(network: Network) -> ConfigDict:
    return importlib.import_module(f"configs.{network.experiment}").get_config("")


def _measured(timer: NetworkTimer, widths: tuple[int, ...]) -> dict[str, float]:
    fraction = timer.fraction(widths)
    kept = flops.total(timer.topology, widths) / flops.total(timer.topology)
    return {
        "flops_kept": 100 * kept,
        "promised": 1 / kept,
        "measured": 100 * fraction,
        "speedup": 1 / fraction,
        "ratio": kept / fraction,
    }


def markdown(found: list[dict[str, Any]], device: str) -> str:
    """The table of all rows."""
    cells = [
        [_cell(row.get(key, row.get("note", "") if key == "measured" else "-")) for key in HEADER] for row in found
    ]
    about = "Random widths and weights; base and pruned network timed in turn"
    return f"{about}, on {device}.\n\n{table(list(HEADER.values()), cells, text_columns=4)}\n"


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def parse() -> argparse.Namespace:
    """The command line, checked; `network`, `batch` and `runtime` become lists."""
    parser = launch.Parser(prog="python -m experiments.latency", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="folder of the table")
    parser.add_argument("--network", default=",".join(NETWORKS), help="networks, separated by commas")
    parser.add_argument("--batch", default="1,32", help="images per call, separated by commas")
    parser.add_argument("--runtime", default=",".join(RUNTIMES), help="runtimes, separated by commas")
    parser.add_argument("--p", type=float, default=0.6, help="fraction of the time to keep in a latency budget")
    parser.add_argument("--residual", action="store_true", help="prune residual streams too")
    given = parser.parse_args()
    given.network, given.batch, given.runtime = (
        each.split(",") for each in (given.network, given.batch, given.runtime)
    )
    for name, known in (("network", NETWORKS), ("runtime", RUNTIMES)):
        if unknown := [each for each in getattr(given, name) if each not in known]:
            parser.error(f"--{name}={unknown[0]} is unknown; use {', '.join(known)}, separated by commas.")
    if wrong := [each for each in given.batch if not each.isdecimal() or int(each) < 1]:
        parser.error(f"--batch={wrong[0]} must be a whole number of at least 1, or several, separated by commas.")
    given.batch = [int(each) for each in given.batch]
    if not 0 < given.p <= 1:
        parser.error(f"--p={given.p} must be in (0, 1]: the fraction of the time that remains.")
    ddnp_jax.configure_cpu()
    for name in given.network if given.residual else ():
        if not _has_residual_gates(NETWORKS[name]):
            parser.error(f"--residual: {name} has no residual stream that can be pruned; leave the flag out.")
    return given


def main() -> None:
    """Measures what the command line names."""
    given = parse()
    folder = Path(given.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "latency.json"
    finished: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file.exists() else {}
    for name in given.network:
        for batch in given.batch:
            for runtime in given.runtime:
                key = f"{name} {runtime} {batch} {given.p:g}{' residual' if given.residual else ''}"
                if key not in finished:
                    finished[key] = rows(name, runtime, batch, given.p, given.residual)
                    jax.clear_caches()  # the programs of this network
                files.write_json(file, finished)
                device = f"{parallel.description()}, JAX {jax.__version__}"
                files.write_text(
                    folder / "latency.md", markdown([row for each in finished.values() for row in each], device)
                )
    print(f"table: {folder}/latency.md")


if __name__ == "__main__":
    main()
