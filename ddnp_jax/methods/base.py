"""What methods are given and what they are: `Problem` and `Search`, and what becomes of a search's proposal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ddnp_jax import losses
from ddnp_jax.cost.budget import Budget
from ddnp_jax.masking import Observe, apply_masked
from ddnp_jax.topology import Selection, Topology


class Problem(NamedTuple):
    """What a method is given.

    Attributes:
      model: the backbone.
      variables: its trained variables; they stay as they are.
      topology: of the model.
      budget: what may remain.
      config: the `search` section of the configuration.
      steps: number of search steps.
    """

    model: nn.Module
    variables: Any
    topology: Topology
    budget: Budget
    config: ml_collections.ConfigDict
    steps: int

    def classification(
        self, masks: Sequence[jax.Array], variables: Any, batch: Any, observe: Observe | None = None
    ) -> dict[str, jax.Array]:
        """The frozen network's "cross_entropy" and "top1" in percent on a batch of (images, labels), masked."""
        images, labels = batch
        logits = apply_masked(self.model, variables, images, masks, self.topology, observe=observe)
        return {
            "cross_entropy": losses.cross_entropy(logits.astype(jnp.float32), labels),
            "top1": 100.0 * jnp.mean(jnp.argmax(logits, -1) == labels),
        }

    def resource(self, widths: jax.Array) -> dict[str, jax.Array]:
        """The "resource_loss" R of widths (L,), in channels, and the share of the budgeted cost that is "remaining"."""
        remaining, total = self.budget.cost(widths), self.budget.total
        return {
            "remaining": remaining / total,
            "resource_loss": losses.resource(self.config.resource_loss, remaining, total, self.budget.p),
        }


class Search(NamedTuple):
    """A method's search over batches, as pure functions.

    Attributes:
      steps: number of steps; 0 for one-shot methods.
      init: rng -> state, any pytree of arrays.
      step: (state, variables, (images, labels), rng) -> (state, metrics), seen from one device: images are normalized
        floats (N, H, W, C), `rng` is the same on all devices, means are taken over the mapped axis "data".
      propose: state on the host -> importances (C_l,) per gate and widths k (L,) in (0, 1].
      notes: sentences for the report.
    """

    steps: int
    init: Callable[[jax.Array], Any]
    step: Callable[..., tuple[Any, dict[str, jax.Array]]]
    propose: Callable[[Any], tuple[tuple[np.ndarray, ...], np.ndarray]]
    notes: tuple[str, ...] = ()


class Seeds(flax.struct.PyTreeNode):
    """The state of one search from several seeds at once.

    Attributes:
      step: number of steps taken, int32.
      states: of all seeds, along a leading axis.
    """

    step: jax.Array
    states: Any

    def of(self, place: int) -> Any:
        """The state of one seed, by its place among them."""
        return jax.tree.map(lambda x: x[place], self.states)


def over_seeds(search: Search, seeds: Sequence[int]) -> tuple[Seeds, Callable[..., Any]]:
    """The same search from several seeds, as one `jax.vmap`: all see the same batches, each draws for itself.

    Args:
      search: with at least one step.
      seeds: of the initial states and of what the steps draw.

    Returns:
      The state before the first step, and the step. Its metrics are "loss", the mean over the seeds, and every metric
      of each seed under `seed_metric`.
    """

    def step(state: Seeds, variables: Any, batch: Any, rng: jax.Array) -> tuple[Seeds, dict[str, jax.Array]]:
        rngs = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, jnp.array(seeds))
        states, metrics = jax.vmap(search.step, in_axes=(0, None, None, 0))(state.states, variables, batch, rngs)
        named = {seed_metric(seed, name): values[i] for name, values in metrics.items() for i, seed in enumerate(seeds)}
        return Seeds(state.step + 1, states), {"loss": jnp.mean(metrics["loss"]), **named}

    states = [search.init(jax.random.key(seed)) for seed in seeds]
    return Seeds(jnp.int32(0), jax.tree.map(lambda *parts: jnp.stack(parts), *states)), step


def seed_metric(seed: int, name: str) -> str:
    """The name of a seed's metric where several are searched at once."""
    return f"seed{seed}/{name}"


def refuse_unknown(config: ml_collections.ConfigDict, choices: Mapping[str, Sequence[str]]) -> None:
    """Refuses values of the `search` section that are not among the choices of their field.

    Raises:
      ValueError: names the field and what it may be.
    """
    for field, known in choices.items():
        if config[field] not in known:
            raise ValueError(f"search.{field}={config[field]!r} is unknown; use one of {', '.join(known)}.")


def proposed_cost(search: Search, state: Any, budget: Budget) -> float:
    """T of the widths that a search proposes in `state`, rounded but not yet fitted to the budget."""
    return budget.cost(budget.round(np.asarray(search.propose(state)[1])))


def select(search: Search, state: Any, budget: Budget) -> Selection:
    """The channels that a search proposes in `state`: integer widths that meet the budget, best-ranked channels.

    Args:
      search: of any method.
      state: its state, on the host.
      budget: to be met.

    Returns:
      The kept channels per gate; equal importances keep channel order.
    """
    importance, k = search.propose(state)
    order = (np.argsort(-np.asarray(scores), kind="stable") for scores in importance)
    widths = budget.fit(np.asarray(k))
    return Selection(tuple(tuple(sorted(map(int, o[:width]))) for o, width in zip(order, widths, strict=True)))
