"""A stored selection: the channels that an earlier run kept, to be fine-tuned or exported in another way."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from ddnp_jax.cost.budget import Budget
from ddnp_jax.methods.base import Importance, Problem, Search, no_step
from ddnp_jax.topology import Selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """Fields of the method that takes a stored selection.

    Attributes:
      selection: Path of a selection of the same network, the `selection.json` of an earlier run.
    """

    selection: str = ""


def build(problem: Problem) -> Search:
    """Builds a search of no steps that proposes the channels of the stored selection.

    Raises:
      ValueError: There is no such file, its selection is that of another network, or it exceeds the budget.
    """
    kept = _read(problem)

    def init(rng: jax.Array) -> Any:
        del rng
        return kept.masks(problem.topology)  # as the state, so that results depend on the contents of the file

    def propose(state: Any) -> tuple[Importance, None]:
        return tuple(state), None

    def widths(importance: Importance, budget: Budget) -> tuple[int, ...]:
        del importance, budget
        return kept.widths

    notes = (f"The channels are those of {problem.config.selection}; nothing was searched.",)
    return Search(steps=0, init=init, step=no_step, propose=propose, notes=notes, widths=widths)


def file(selection: str) -> Path:
    """Returns the file of a selection.

    Raises:
      ValueError: There is no such file.
    """
    path = Path(selection).expanduser()
    if not path.is_file():
        raise ValueError(f"selection={selection!r} is not a file; give the selection.json of an earlier run.")
    return path


def _read(problem: Problem) -> Selection:
    name, budget = problem.config.selection, problem.budget
    path = file(name)
    try:
        kept = Selection.load(path)
        kept.check(problem.topology)
    except ValueError as error:
        raise ValueError(f"selection={name!r} does not belong to this network: {error}") from error
    cost, wanted = budget.cost(kept.widths), budget.wanted
    if budget.timer is None and cost > wanted:  # measured times differ from those that the earlier run measured
        form, unit = budget.counted.form, budget.counted.unit
        raise ValueError(
            f"selection={name!r} needs {cost:{form}} {unit}, more than the {wanted:{form}} of p={budget.p}; use p of "
            f"at least {math.ceil(1e4 * cost / budget.total) / 1e4:.4f}."
        )
    return kept
