"""The three-line use: a trained network, images and a budget in, a smaller network out."""

import dataclasses
import difflib
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np

from ddnp_jax import methods
from ddnp_jax.compact import Rebuild, Verification, check_finite, compact, rehearse, verify
from ddnp_jax.cost.budget import Budget, floors_of
from ddnp_jax.losses import Loss
from ddnp_jax.networks import Outputs, as_network
from ddnp_jax.topology import Gate, Selection, Topology, trace
from ddnp_jax.training.fitting import TargetsCheck, checked_batch
from ddnp_jax.training.steps import Batch

VERIFIED_IMAGES = 64  # of the first batch, with which the cut is verified

Floors = int | float | Mapping[str, int | float] | Callable[[Gate], int | float] | None


@dataclasses.dataclass(frozen=True, repr=False)
class Pruned:
    """A pruned network; it is not fine-tuned yet.

    Attributes:
      model: The smaller network.
      variables: Its variables; None of an nnx module, which holds them.
      selection: The channels that stayed.
      topology: Topology of the unpruned network.
      history: Every metric over the steps of the search, (steps,); empty of methods that need no images.
      budget: The budget that was met.
      verification: How near the smaller network is to the masked one.
      notes: What is worth knowing of the search, for example whether it has converged.
    """

    model: Any
    variables: Any
    selection: Selection
    topology: Topology
    history: dict[str, np.ndarray]
    budget: Budget
    verification: Verification
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        """As `describe`: all that it holds would fill pages."""
        return self.describe()

    def describe(self) -> str:
        """Sizes before and after, the widths of all gates and how the cut was verified, as text."""
        difference = f"largest difference to the masked network: {self.verification.max_difference:.1e}"
        return "\n".join([self.budget.describe(self.selection.widths), difference, *self.notes])


def prune(
    model: Any,
    variables: Any,
    batches: Iterable[Batch],
    p: float = 0.5,
    *,
    method: str = "ddnp",
    steps: int | None = None,
    seed: int = 0,
    loss: Loss | None = None,
    outputs: Outputs = None,
    performance: Loss | None = None,
    input_shape: tuple[int, ...] | None = None,
    budget: Budget | None = None,
    residual: bool = False,
    keep: Iterable[str] | Callable[[Gate], bool] = (),
    floors: Floors = None,
    multiple: int = 1,
    rebuild: Rebuild | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    **fields: Any,
) -> Pruned:
    """Removes channels of a trained network, as many as a budget asks for.

    The network is traced, the method searches which channels stay, they are cut out, and the smaller network is proved
    to compute what the masked one does. Fine-tune it afterwards, with `ddnp_jax.fit` or with your own code.

    Args:
      model: A flax.linen module, a flax.nnx module, or a function `(variables, images) -> outputs`.
      variables: Trained variables; None of an nnx module, which holds them.
      batches: Batches (images, targets) of arrays, images (N, H, W, C), in a list or anything else that can be read
        again and again. Methods that need no images read the first one, with which the cut is verified.
      p: Part of the prunable FLOPs that remains, in (0, 1]; `flops.p_for_reduction` gives it for a part of the whole
        network that is to go.
      method: Name of the method; `ddnp_jax.methods.METHODS` lists them.
      steps: Steps of the search, one batch each; None takes the method's own number. Methods that need no images take
        none.
      seed: Seed of everything that is drawn.
      loss: Loss `(outputs, targets) -> scalar` that the network was trained for; None is the cross-entropy of integer
        labels.
      outputs: Which of the network's outputs count: a key, an index, or a function of them; None where there is one.
      performance: `(outputs, targets) -> scalar` in [0, 1], which NPPM's predictor learns; None is the accuracy of the
        default loss, and exp(-loss) of an own one.
      input_shape: Shape of one image; None takes that of the first batch.
      budget: A budget of another kind, whose `topology` is then taken; it replaces `p`, `residual`, `keep`, `floors`
        and `multiple`.
      residual: Whether channels that are added to those of other layers may be removed too.
      keep: Names of gates that stay whole, or a function that says so of a gate.
      floors: Least that stays of every gate: channels (whole numbers) or a part (fractions below 1), one for all
        gates, by the gate's name, or as a function of the gate.
      multiple: Widths are multiples of this, except whole gates.
      rebuild: Makes the smaller network from the channels per gate, where its code computes with numbers of its own.
      call_kwargs: Further keyword arguments of every call of the network.
      progress: Whether to report on the way.
      **fields: Fields of the method.

    Returns:
      The smaller network, and how it was found.

    Raises:
      ValueError: An argument is wrong, the budget cannot be met, or the network cannot be cut; before any search.
    """
    _check_names(method, fields)
    config = methods.configure(method, fields)
    steps = _steps(method, steps)
    network = as_network(model, **(call_kwargs or {}))
    own = network.variables(variables)
    check_finite(own, network.name)
    first, batches = _first(batches)
    images, _ = checked_batch(first)
    if budget is None:
        shape = tuple(images.shape[1:] if input_shape is None else input_shape)
        kept = (keep,) if isinstance(keep, str) else keep if callable(keep) else tuple(keep)
        traced = trace(model, shape, variables=own, residual=residual, keep=kept, **(call_kwargs or {}))
        budget = Budget(traced, p, multiple=multiple, floors=floors_of(traced, floors))
    budget.check()
    topology = budget.topology
    check = TargetsCheck(network, own, loss, outputs, performance)
    check(first)
    rehearse(model, variables, topology, budget.smallest_widths, rebuild)
    problem = methods.Problem(model, own, topology, budget, config, steps, loss, outputs, performance)
    search = methods.build(method, problem)
    state, history = methods.run_search(search, own, batches, seed, progress, check)
    selection = methods.select(search, state, budget)
    small = compact(model, variables, selection, topology, rebuild)
    verification = verify(model, variables, *small, selection, topology, images[:VERIFIED_IMAGES])
    notes = (*search.notes, *search.ended(state))
    return Pruned(*small, selection, topology, history, budget, verification, notes)


def _check_names(method: str, fields: Mapping[str, Any]) -> None:
    """Raises for a misspelt argument of `prune`, which would otherwise count as a field of the method."""
    own = methods.default_fields(method)
    known = [*own, *(name for name in inspect.signature(prune).parameters if name != "fields")]
    for name in fields:
        close = difflib.get_close_matches(name, known, 1)
        if name not in own and close:
            raise ValueError(f"prune has no argument {name!r} and {method} no such field; did you mean {close[0]!r}?")


def _steps(method: str, steps: Any) -> int:
    default = methods.find(method).steps
    if steps is None or default == 0:
        return default
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps={steps!r} must be a whole number of at least 1: {method} searches on batches.")
    return int(steps)


def _first(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and all batches; an iterator is not asked for its first one twice."""
    iterator = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError("batches holds no batch; give (images, targets) of arrays.") from None
    return first, itertools.chain([first], iterator) if iterator is batches else batches
