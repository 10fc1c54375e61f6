"""The high-level interface: takes a trained network, images and a budget, and returns a smaller network."""

import dataclasses
import difflib
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any, Literal

import numpy as np

from ddnp_jax import methods
from ddnp_jax.compact import Rebuild, Verification, check_finite, compact, rehearse, verify
from ddnp_jax.cost import flops, multiples
from ddnp_jax.cost.budget import Budget, floors_of
from ddnp_jax.cost.correction import correct
from ddnp_jax.cost.network_times import NetworkTimer
from ddnp_jax.losses import Loss
from ddnp_jax.networks import Outputs, as_network
from ddnp_jax.topology import Gate, Keep, Selection, Topology, trace
from ddnp_jax.training.fitting import TargetsCheck, checked_batch
from ddnp_jax.training.steps import Batch

VERIFIED_IMAGES = 64  # images of the first batch that the pruned network is verified on

Floors = int | float | Mapping[str, int | float] | Callable[[Gate], int | float] | None


@dataclasses.dataclass(frozen=True, repr=False)
class Pruned:
    """A pruned network, before fine-tuning.

    Attributes:
      model: The smaller network.
      variables: Its variables; None for an nnx module, which holds them.
      selection: The channels that were kept.
      topology: Topology of the unpruned network.
      history: Every metric over the steps of the search, (steps,); empty for methods that need no images. "loss" is the
        objective; of the masked network on the step's batch, "top1" is the accuracy in percent and "cross_entropy" the
        default loss, or "task_loss" a custom one; DDNP and NPPM have "remaining", the fraction of the prunable cost.
      budget: The budget that was met.
      verification: How close the smaller network's outputs are to the masked network's.
      notes: Remarks on the search, for example whether it has converged.
    """

    model: Any
    variables: Any
    selection: Selection
    topology: Topology
    history: dict[str, np.ndarray]
    budget: Budget
    verification: Verification
    notes: tuple[str, ...]

    @property
    def flops_kept(self) -> float:
        """Fraction of all the network's FLOPs that are kept, in (0, 1]; the budget counts only the prunable ones."""
        return flops.total(self.topology, self.selection.widths) / flops.total(self.topology)

    def __repr__(self) -> str:
        """As `describe`; a complete representation would fill pages."""
        return self.describe()

    def describe(self) -> str:
        """Returns the sizes before and after, the widths of all gates and the result of the verification, as text."""
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
    keep: Keep = (),
    floors: Floors = None,
    multiple: int | Literal["auto"] = 1,
    rebuild: Rebuild | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    **fields: Any,
) -> Pruned:
    """Prunes the channels of a trained network to a budget.

    The network is traced, the method decides which channels to keep, the others are removed, and the smaller network
    is verified to compute the same as the masked one. Fine-tune it afterwards, with `ddnp_jax.fit` or your own code.

    Args:
      model: A flax.linen module, a flax.nnx module, or a function `(variables, images) -> outputs`.
      variables: Trained variables; None for an nnx module, which holds them.
      batches: Reusable iterable, such as a list, of batches (images, targets) of arrays with images (N, H, W, C).
        Methods that need no images use only the first batch, for verification.
      p: Fraction of the prunable FLOPs to keep, in (0, 1]; `flops.p_for_reduction` computes it from the fraction of the
        total FLOPs to remove.
      method: Name of the method; one of `ddnp_jax.methods.METHODS`.
      steps: Number of search steps, one batch each; None for the method's default. Ignored by methods that need no
        images.
      seed: Random seed of the search.
      loss: Loss `(outputs, targets) -> scalar` that the network was trained with; None for the cross-entropy with
        integer labels.
      outputs: Which of the network's outputs to use: a key, an index, or a function of them; None if there is only one.
      performance: `(outputs, targets) -> scalar` in [0, 1] that NPPM's predictor learns; None for the accuracy with the
        default loss, and exp(-loss) with a custom one.
      input_shape: Shape of one image; None to take it from the first batch.
      budget: A budget of another kind, as from `latency_budget`, whose `topology` is then used; it replaces `p`,
        `residual`, `keep`, `floors` and `multiple`.
      residual: Whether channels that are added to those of other layers may be removed too.
      keep: Names of gates to leave unpruned, a single name, or a predicate on gates.
      floors: Minimum width of every gate, as a number of channels (integer) or a fraction (below 1): one value for all
        gates, a mapping by gate name, or a function of the gate.
      multiple: Widths are multiples of this, except those of unpruned gates; "auto" for the multiple that is fastest on
        the current device for batches of the first one's size, which is measured (`cost.multiples`).
      rebuild: Builds the smaller network from the channels per gate; for networks with hard-coded channel counts.
      call_kwargs: Additional keyword arguments for every call of the network.
      progress: Whether to print progress.
      **fields: Fields of the method.

    Returns:
      The smaller network, with the record of the search.

    Raises:
      ValueError: An argument is invalid, the budget cannot be met, or the network cannot be resized; raised before the
        search.
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
        traced = trace(model, shape, variables=own, residual=residual, keep=keep, **(call_kwargs or {}))
        exact = 1 if multiple == "auto" else multiple
        budget = Budget(traced, p, multiple=exact, floors=floors_of(traced, floors))
        if multiple == "auto":
            budget.check()  # before anything is measured
            timer = NetworkTimer(model, traced, len(images), variables=own, rebuild=rebuild)
            budget = multiples.at_fastest(budget, multiples.measure(timer))
    budget.check()
    topology = budget.topology
    check = TargetsCheck(network, own, loss, outputs, performance)
    check(first)
    rehearse(model, variables, topology, budget.smallest_widths, rebuild)
    problem = methods.Problem(model, own, topology, budget, config, steps, loss, outputs, performance)
    search = methods.build(method, problem)
    state, history = methods.run_search(search, own, batches, seed, progress, check)
    correction = correct(budget, lambda each: methods.select(search, state, each).widths)
    if correction is not None:
        budget = budget.with_savings(correction.savings)
    selection = methods.select(search, state, budget)
    small = compact(model, variables, selection, topology, rebuild)
    verification = verify(model, variables, *small, selection, topology, images[:VERIFIED_IMAGES])
    timed = () if correction is None else (correction.describe(),)
    notes = (*search.notes, *search.ended(state), *timed)
    return Pruned(*small, selection, topology, history, budget, verification, notes)


def _check_names(method: str, fields: Mapping[str, Any]) -> None:
    """Raises for a misspelled argument of `prune`, which would otherwise be taken for a field of the method."""
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
    """Returns the first batch and all batches, without losing the first batch of an iterator."""
    iterator = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError("batches is empty; give batches (images, targets) of arrays.") from None
    return first, itertools.chain([first], iterator) if iterator is batches else batches
