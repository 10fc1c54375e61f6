"""The interface of pruning methods: `Problem`, `Search`, and the selection of a search's result."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax import cpu, losses
from ddnp_jax.cost.budget import Budget
from ddnp_jax.fields import check_limits, choice, number
from ddnp_jax.losses import Loss
from ddnp_jax.masking import Observe, apply_masked
from ddnp_jax.networks import Outputs
from ddnp_jax.parallel import ONE_DEVICE, Devices
from ddnp_jax.topology import Selection, Topology

Importance = tuple[np.ndarray, ...]  # (C_l,) per gate

# A search has not converged if the cost of what it found differs from the budget by more than this factor.
OFF = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Fields of an AdamW optimizer.

    Attributes:
      learning_rate: Learning rate.
      weight_decay: Weight decay.
    """

    learning_rate: float = number(1e-3, least=0)
    weight_decay: float = number(0.0, least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResourceFields:
    """Fields of every search whose loss has a resource term.

    Attributes:
      resource_loss: R: 'log_abs', 'log_max', 'abs' or 'square'; see `losses.resource`.
      resource_weight: λ, the weight of R.
    """

    resource_loss: str = choice("log_abs", *losses.RESOURCE)
    resource_weight: float = number(4.0, least=0)

    def __post_init__(self) -> None:
        check_limits(self)


class Measured(NamedTuple):
    """Results of a masked network on a batch, as scalars.

    Attributes:
      loss: The loss that the network was trained with.
      performance: Performance in [0, 1]; with the default loss, the accuracy.
      metrics: Metrics to log.
    """

    loss: jax.Array
    performance: jax.Array
    metrics: dict[str, jax.Array]


class Problem(NamedTuple):
    """The input of a method.

    Attributes:
      model: The backbone, of any kind that `trace` takes.
      variables: Its trained variables; they are not modified.
      topology: Topology of `model`, as returned by `trace`.
      budget: Budget to meet.
      config: The method's fields, as returned by `methods.configure`.
      steps: Number of search steps.
      loss: Loss `(outputs, targets) -> scalar`; None for the cross-entropy with integer labels.
      outputs: Which of the network's outputs to use: a key, an index or a function; see `networks.picked`.
      performance: `(outputs, targets) -> scalar` in [0, 1] that NPPM maximizes; None for the accuracy with the default
        loss, and exp(-loss) with a custom one.
    """

    model: Any
    variables: Any
    topology: Topology
    budget: Budget
    config: Any
    steps: int
    loss: Loss | None = None
    outputs: Outputs = None
    performance: Loss | None = None

    def measure(
        self, masks: Sequence[jax.Array], variables: Any, batch: Any, observe: Observe | None = None
    ) -> Measured:
        """Evaluates the frozen network with masks on a batch (images, targets)."""
        images, targets = batch
        found = apply_masked(self.model, variables, images, masks, self.topology, observe=observe)
        measured = losses.measure(found, targets, self.loss, self.outputs)
        loss = measured["loss"]
        if self.loss is None:
            performance, metrics = measured["top1"] / 100, {"cross_entropy": loss, "top1": measured["top1"]}
        else:
            performance, metrics = jnp.exp(-loss), {"task_loss": loss}
        if self.performance is not None:
            performance = losses.measure(found, targets, self.performance, self.outputs)["loss"]
            metrics["performance"] = performance
        return Measured(loss, performance, metrics)

    def resource(self, widths: jax.Array) -> dict[str, jax.Array]:
        """Returns the "resource_loss" R of widths (L,), in channels, and the "remaining" fraction of the cost."""
        remaining = self.budget.cost(widths)
        total = float(self.budget.total)  # an integer above 2^31, as ResNet-50's FLOPs, is too large for JAX
        return {
            "remaining": remaining / total,
            "resource_loss": losses.resource(self.config.resource_loss, remaining, total, self.budget.p),
        }


def off_budget(remaining: float, problem: Problem, faster: str = "") -> list[str]:
    """Advice for a search whose cost is not the budget; empty if it is, up to the factor `OFF`.

    Args:
      remaining: The remaining fraction of the cost after the search.
      problem: The search's problem, whose `config` has the fields of `ResourceFields`.
      faster: Advice that moves the cost in fewer steps; "" for none.
    """
    config, p = problem.config, problem.budget.p
    if remaining > OFF * p:  # gates far from 1/2 have almost no gradient, so R may stop decreasing above the budget
        stuck = f"resource_weight={config.resource_weight:g} raised, where R has stopped falling"
        return [more_steps(problem), *filter(None, [faster]), stuck]
    if OFF * remaining < p:
        below = "resource_loss=log_abs, by which a cost below the budget counts too"
        return [more_steps(problem), *([below] if config.resource_loss == "log_max" else [])]
    return []


def more_steps(problem: Problem) -> str:
    """Advice for a search that is too short."""
    return f"more than {problem.steps} steps"


def convergence(found: str, remedies: Sequence[str]) -> str:
    """The note of a search on its convergence: `found`, a sentence with numbers, and advice if there is any."""
    if remedies:
        return f"The search has not converged: {found} What helps: {'; '.join(remedies)}."
    return f"The search has converged: {found}"


class Survey(NamedTuple):
    """Statistics over all search images that a search needs before its first step.

    Attributes:
      of: (variables, images (N, ...)) -> tuple of arrays (N, ...), the values of each image.
      then: Sums of these values over all images -> the search, without a survey.
    """

    of: Callable[[Any, jax.Array], tuple[jax.Array, ...]]
    then: Callable[[Sequence[np.ndarray]], "Search"]


def no_step(*_: Any, **__: Any) -> Any:
    """The step of a search that has none; never called."""
    raise RuntimeError("a method that needs no images has no search step.")


class Search(NamedTuple):
    """A method's search over batches, as pure functions.

    Attributes:
      steps: Number of steps; 0 for methods that need no images.
      init: Random key -> state, any pytree of arrays.
      step: (state, variables, (images, targets), rng, devices) -> (state, metrics), a `training.Step`.
      propose: State on the host -> importances (C_l,) per gate, and widths k (L,) in (0, 1] or None: then they follow
        from the importances.
      notes: Remarks for the report.
      widths: (importances, budget) -> widths in channels, if `propose` returns none.
      survey: Statistics to compute before the first step; None for most methods.
      ended: State after the last step, on the host -> additional remarks for the report.
    """

    steps: int
    init: Callable[[jax.Array], Any]
    step: Callable[..., tuple[Any, dict[str, jax.Array]]]
    propose: Callable[[Any], tuple[Importance, np.ndarray | None]]
    notes: tuple[str, ...] = ()
    widths: Callable[[Importance, Budget], tuple[int, ...]] | None = None
    survey: Survey | None = None
    ended: Callable[[Any], tuple[str, ...]] = lambda state: ()


class Seeds(flax.struct.PyTreeNode):
    """The state of one search from several seeds at once.

    Attributes:
      step: Number of steps taken, int32.
      states: States of all seeds, along a leading axis.
    """

    step: jax.Array
    states: Any

    def of(self, place: int) -> Any:
        """The state of one seed, by its place among them."""
        return jax.tree.map(lambda x: x[place], self.states)


def initial_state(search: Search, seed: int) -> Any:
    """The state of a search before its first step."""
    return cpu.jit_for_one_call(search.init)(jax.random.key(seed))


def over_seeds(search: Search, seeds: Sequence[int]) -> tuple[Seeds, Callable[..., Any]]:
    """The same search from several seeds, as one `jax.vmap`: all see the same batches, each draws for itself.

    Args:
      search: Search with at least one step.
      seeds: Seeds of the initial states and of what the steps draw.

    Returns:
      The state before the first step, and the step. Its metrics are "loss", the mean over the seeds, and every metric
      of each seed under `seed_metric`.
    """

    def step(
        state: Seeds, variables: Any, batch: Any, rng: jax.Array, devices: Devices = ONE_DEVICE
    ) -> tuple[Seeds, dict[str, jax.Array]]:
        rngs = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, jnp.array(seeds))
        one = functools.partial(search.step, devices=devices)
        states, metrics = jax.vmap(one, in_axes=(0, None, None, 0))(state.states, variables, batch, rngs)
        named = {seed_metric(seed, name): values[i] for name, values in metrics.items() for i, seed in enumerate(seeds)}
        return Seeds(state.step + 1, states), {"loss": jnp.mean(metrics["loss"]), **named}

    init = cpu.jit_for_one_call(search.init)  # compiled once for all seeds
    states = [init(jax.random.key(seed)) for seed in seeds]
    return Seeds(jnp.int32(0), jax.tree.map(lambda *parts: jnp.stack(parts), *states)), step


def seed_metric(seed: int, name: str) -> str:
    """The name of a seed's metric where several are searched at once."""
    return f"seed{seed}/{name}"


def proposed_cost(search: Search, state: Any, budget: Budget) -> float | None:
    """T of the widths that a search proposes in `state`, rounded, not fitted to the budget; None if there are none."""
    _, k = search.propose(state)
    return None if k is None else budget.cost(budget.round(np.asarray(k)))


def select(search: Search, state: Any, budget: Budget) -> Selection:
    """The channels that a search proposes in `state`: integer widths that meet the budget, best-ranked channels.

    Args:
      search: Search of any method.
      state: Its state, on the host.
      budget: Budget to meet.

    Returns:
      The kept channels per gate; equal importances keep channel order.

    Raises:
      ValueError: An importance or a width that the search proposes is NaN or infinite; the message names the gate.
    """
    importance, k = search.propose(state)
    _check_finite(budget.topology, "an importance", importance)
    if k is not None:
        _check_finite(budget.topology, "a width", k)
    order = (np.argsort(-np.asarray(scores), kind="stable") for scores in importance)
    if k is not None:
        widths = budget.fit(np.asarray(k))
    elif search.widths is not None:
        widths = search.widths(importance, budget)
    else:
        raise ValueError("the search proposes no widths and has no rule for them; give it `widths`.")
    return Selection(tuple(tuple(sorted(map(int, o[:width]))) for o, width in zip(order, widths, strict=True)))


def _check_finite(topology: Topology, what: str, values: Iterable[Any]) -> None:
    for gate, each in zip(topology.gates, values, strict=True):
        if not np.all(np.isfinite(each)):
            raise ValueError(
                f"gate {gate.name}: the search gave {what} that is NaN or infinite; check that the gradients of the "
                "network's loss are finite, or use another method."
            )
