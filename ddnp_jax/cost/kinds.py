"""Budgets of every kind: in FLOPs, parameters or latency, with widths in any multiple or in the fastest."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from ddnp_jax.cost import flops, latency, multiples
from ddnp_jax.cost.budget import Budget, Cost, check_fields, flops_cost
from ddnp_jax.cost.latency import LatencyTable
from ddnp_jax.cost.multiples import MultipleTimes
from ddnp_jax.cost.network_times import NetworkTimer

if TYPE_CHECKING:
    from ddnp_jax.config import BudgetConfig


def latency_budget(
    timer: NetworkTimer,
    p: float,
    multiple: int | Literal["auto"] = 1,
    *,
    floors: tuple[int, ...] = (),
    table: LatencyTable | None = None,
) -> Budget:
    """Makes a budget in latency.

    Args:
      timer: Times the network.
      p: Fraction in (0, 1] of the unpruned network's time to keep.
      multiple: As for `Budget`; "auto" for the multiple that is fastest, which `timer` measures.
      floors: As for `Budget`.
      table: Latency table of the network; None to measure it, which takes a minute or so. What a search proposes is
        timed only if the table is of the device of `timer`.

    Raises:
      ValueError: p or `multiple` is invalid, or there is nothing to prune; raised before anything is measured.
    """
    check_fields(timer.topology, p, 1 if multiple == "auto" else multiple)
    unit = multiples.measure(timer).fastest() if multiple == "auto" else multiple
    table = latency.measure(timer, multiple=unit) if table is None else table
    cost = Cost(table.ms, f"ms (batch {table.batch}, {table.device})", ",.4g")
    return Budget(timer.topology, p, cost, unit, floors, timer if table.device == timer.device else None)


def make_budget(
    config: "BudgetConfig",
    timer: NetworkTimer,
    measured: Callable[..., LatencyTable],
    multiple_times: Callable[[], MultipleTimes],
) -> Budget:
    """Makes the budget of a configuration's `budget` section.

    Args:
      config: The section, already checked.
      timer: Times the network.
      measured: (points=, multiple=) -> the latency table; called only for kind 'latency', after all checks that do
        not need it.
      multiple_times: () -> times of the multiples; called only where `config.multiple` is 0, after the same checks.

    Raises:
      ValueError: There is nothing to prune, or the budget cannot be met.
    """
    check_fields(timer.topology, config.p, config.multiple or 1)
    if config.kind == "latency":
        multiple = config.multiple or multiple_times().fastest()
        table = measured(points=config.latency_points, multiple=multiple)
        return _checked(latency_budget(timer, config.p, multiple, table=table))
    budget = _checked(Budget(timer.topology, config.p, _cost(config), config.multiple or 1))
    return budget if config.multiple else multiples.at_fastest(budget, multiple_times())


def _checked(budget: Budget) -> Budget:
    try:
        budget.check()
    except ValueError as error:
        raise ValueError(f"budget.{error}") from error
    return budget


def _cost(config: "BudgetConfig") -> Cost:
    return Cost(flops.parameters, "parameters") if config.kind == "params" else flops_cost(config.convention)
