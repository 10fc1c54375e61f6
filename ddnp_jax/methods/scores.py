"""Methods that score channels: one function per score, and how widths follow from scores.

A score is a function of (evidence, gate) that returns (C_l,), the larger the more a channel matters. What it can be
computed from is in `Evidence`. To add one, write the function and its line in `SCORES`. How many channels each gate
then keeps is its allocation, one function of `ALLOCATIONS`; any score goes with any of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax.cost.budget import Budget
from ddnp_jax.methods.base import Importance, Measured, Problem, Search, check_choices
from ddnp_jax.networks import flatten, replace_leaves
from ddnp_jax.parallel import ONE_DEVICE, Devices
from ddnp_jax.topology import Gate, Slice, Topology

_LOG_STEP = 0.5  # of the integral in `nuclear_losses`
_MOST_REMOVED = 0.95  # of a gate's channels, in CC's allocation


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the channels of a network can be judged by. Only what a score asks for is computed.

    Attributes:
      topology: Topology of the network.
      variables: Its variables.
      rng: Source of random numbers, for scores that need no images.
      problem: What is to be pruned, for scores that need images.
      batch: (images, targets), for scores that need images.
    """

    topology: Topology
    variables: Any
    rng: np.random.Generator | None = None
    problem: Problem | None = None
    batch: Any = None

    @functools.cached_property
    def leaves(self) -> dict[tuple[str, ...], Any]:
        """The variables by their path."""
        return flatten(self.variables)

    def filters(self, gate: int) -> list[np.ndarray]:
        """The kernels that produce a gate's channels, each as float64 (C_l, weights of a channel)."""
        found = self.topology.gates[gate]
        return [_by_channel(np.float64(self.leaves[piece.path]), piece, found) for piece in found.producers]

    def norm_scales(self, gate: int) -> list[np.ndarray]:
        """The scales of normalizations of a gate's channels, each (C_l,)."""
        found = self.topology.gates[gate]
        pieces = [piece for piece in found.slices if piece.path[-1] == "scale"]
        return [_by_channel(np.float64(self.leaves[piece.path]), piece, found)[:, 0] for piece in pieces]

    def consuming_kernels(self, gate: int) -> list[Slice]:
        """Where the kernels of the layers that read a gate hold its channels; depthwise convolutions left out."""
        found, layers = self.topology.gates[gate], self.topology.layers
        paths = {layers[consumer.layer].path for consumer in found.consumers if layers[consumer.layer].groups == 1}
        return [piece for piece in found.slices if piece.path in paths and piece not in found.producers]

    @functools.cached_property
    def features(self) -> tuple[tuple[jax.Array, ...], ...]:
        """The features of every gate's channels, each (N, ..., C_l): one of every tensor that layers read."""
        return self._observed[0]

    @functools.cached_property
    def _observed(self) -> tuple[tuple[tuple[jax.Array, ...], ...], Measured]:
        seen: list[list[jax.Array]] = [[] for _ in self.topology.gates]
        measured = self._problem.measure(
            self._ones, self.variables, self.batch, lambda gate, features: seen[gate].append(features)
        )
        return tuple(map(tuple, seen)), measured

    @functools.cached_property
    def gradients(self) -> tuple[jax.Array, ...]:
        """The gradient of each image's loss with respect to the masks of the whole network, (N, C_l) per gate."""
        return self._differentiated[0]

    @functools.cached_property
    def _differentiated(self) -> tuple[tuple[jax.Array, ...], Measured]:
        def one(masks: tuple[jax.Array, ...], image_and_target: Any) -> tuple[jax.Array, Measured]:
            measured = self._problem.measure(masks, self.variables, jax.tree.map(lambda x: x[None], image_and_target))
            return measured.loss, measured

        gradients, measured = jax.vmap(jax.grad(one, has_aux=True), in_axes=(None, 0))(self._ones, self.batch)
        return gradients, jax.tree.map(jnp.mean, measured)

    def kernel_effects(self, gate: int) -> list[jax.Array]:
        """The kernels W that read a gate times the batch's gradients in them, g ⊙ W, each (C_l, n)."""
        found, gradients = self.topology.gates[gate], self._kernel_gradients[0]
        return [
            _by_channel(gradients[piece.path] * self.leaves[piece.path], piece, found)
            for piece in self.consuming_kernels(gate)
        ]

    @functools.cached_property
    def _kernel_gradients(self) -> tuple[dict[tuple[str, ...], jax.Array], Measured]:
        gates = range(len(self.topology.gates))
        kernels = {piece.path: self.leaves[piece.path] for gate in gates for piece in self.consuming_kernels(gate)}

        def loss(kernels: dict[tuple[str, ...], jax.Array]) -> tuple[jax.Array, Measured]:
            variables = replace_leaves(self.variables, {**self.leaves, **kernels})
            measured = self._problem.measure(self._ones, variables, self.batch)
            return measured.loss, measured

        return jax.grad(loss, has_aux=True)(kernels)

    @property
    def _problem(self) -> Problem:
        if self.problem is None:
            raise ValueError("this score needs images; give it the problem and a batch.")
        return self.problem

    @property
    def _ones(self) -> tuple[jax.Array, ...]:
        return tuple(jnp.ones(channels) for channels in self.topology.widths)

    def measured(self) -> Measured:
        """What the whole network does on the batch, at no further cost."""
        known = [name for name in ("_differentiated", "_kernel_gradients") if name in self.__dict__]
        return getattr(self, known[0] if known else "_observed")[1]


def _by_channel(leaf: Any, piece: Slice, gate: Gate) -> Any:
    """The part of a leaf that belongs to each of a gate's channels, (C_l, n)."""
    others = [axis for axis in range(leaf.ndim) if axis != piece.axis]
    return leaf.transpose(piece.axis, *others)[piece.span.positions(gate.channels)].reshape(gate.channels, -1)


# ---- the scores


def uniform(evidence: Evidence, gate: int) -> np.ndarray:
    """Random numbers: the baseline that every method must beat."""
    if evidence.rng is None:
        raise ValueError("random numbers need a source; give rng.")
    return evidence.rng.random(evidence.topology.gates[gate].channels)


def magnitude(evidence: Evidence, gate: int) -> np.ndarray:
    """L1 norm of the kernels that produce the channel (Li et al. 2017)."""
    return np.sum([np.abs(kernel).sum(axis=1) for kernel in evidence.filters(gate)], axis=0)


def bn_scale(evidence: Evidence, gate: int) -> np.ndarray:
    """Absolute scale of the channel's batch normalization (Liu et al. 2017); of several, their sum.

    Raises:
      ValueError: The gate has no normalization with a scale.
    """
    scales = evidence.norm_scales(gate)
    if not scales:
        name = evidence.topology.gates[gate].name
        raise ValueError(f"gate {name} has no normalization with a scale; score its channels by another method.")
    return np.sum(np.abs(scales), axis=0)


def fpgm(evidence: Evidence, gate: int) -> np.ndarray:
    """Sum of the Euclidean distances to the gate's other filters (He et al. 2019): the nearest to all others go."""
    filters = np.concatenate(evidence.filters(gate), axis=1)
    return np.array([np.linalg.norm(filters - one, axis=1).sum() for one in filters])


def taylor(evidence: Evidence, gate: int) -> jax.Array:
    """Mean over images of the absolute gradient of the loss with respect to the mask (Molchanov et al. 2017)."""
    return jnp.mean(jnp.abs(evidence.gradients[gate]), axis=0)


def lamp(evidence: Evidence, gate: int) -> np.ndarray:
    """Squared norm of the filter over the sum of those that are not smaller (LAMP, Lee et al. 2021, of channels).

    The largest of every gate scores 1, so that one ranking over all gates empties none.
    """
    squares = np.sum([np.square(kernel).sum(axis=1) for kernel in evidence.filters(gate)], axis=0)
    order = np.argsort(-squares, kind="stable")
    found = np.empty_like(squares)
    found[order] = squares[order] / np.maximum(np.cumsum(squares[order]), np.finfo(squares.dtype).tiny)
    return found


def hrank(evidence: Evidence, gate: int) -> jax.Array:
    """Mean over images of the matrix rank of the channel's feature map (HRank, Lin et al. 2020).

    Of channels that several blocks add to, the mean over the blocks: they share one kept set.

    Raises:
      ValueError: The layers read the gate's channels pooled or flattened, so that there is no map.
    """
    features = evidence.features[gate]
    maps = [each for each in features if each.ndim == 4]
    if not maps:
        name = evidence.topology.gates[gate].name
        raise ValueError(
            f"the channels of gate {name} are read as {features[0].shape}, without height and width, and have no rank; "
            "keep= the gate whole, or score by another method."
        )
    ranks = [jnp.linalg.matrix_rank(jnp.moveaxis(each, -1, 1)).astype(jnp.float32) for each in maps]
    return jnp.mean(jnp.stack(ranks), axis=(0, 1))


def chip(evidence: Evidence, gate: int) -> jax.Array:
    """Mean over images of how much nuclear norm the feature maps lose without the channel's (CHIP, Sui et al. 2021).

    Of channels that several blocks add to, the mean over the blocks: they share one kept set, where the authors' code
    lets each block choose its own.
    """
    features = evidence.features[gate]
    maps = [each for each in features if each.ndim == 4] or features
    by_channel = [jnp.moveaxis(each, -1, 1).reshape(len(each), each.shape[-1], -1) for each in maps]
    return jnp.mean(jnp.stack([jnp.mean(jax.lax.map(nuclear_losses, each), axis=0) for each in by_channel]), axis=0)


def cc(evidence: Evidence, gate: int) -> list[jax.Array]:
    """What the channel half of CC (Li et al. 2021) is computed from; see `information_loss`."""
    return evidence.kernel_effects(gate)


def _like_cc(evidence: Evidence, gate: int) -> list[Any]:
    found = evidence.topology.gates[gate]
    pieces = evidence.consuming_kernels(gate)
    return [_by_channel(np.asarray(evidence.leaves[piece.path]), piece, found) for piece in pieces]


def information_loss(effects: list[jax.Array]) -> np.ndarray:
    """CC's information loss Σ (g ⊙ (W' - W))² of the layers that read a channel, where W' is W without it.

    Args:
      effects: g ⊙ W of each of these layers, (C_l, n), where g is the mean gradient over all images.

    Returns:
      (C_l,).
    """
    return np.sum([np.square(np.float64(each)).sum(axis=1) for each in effects], axis=0)


def nuclear_losses(rows: jax.Array) -> jax.Array:
    """How much the nuclear norm of a matrix loses when each of its rows is set to zero.

    The nuclear norm is tr(M^½) = 2/π ∫ tr(M (M + t²)⁻¹) dt over t > 0, where M is a Gram matrix. A row changes M by a
    matrix of rank one, so that the integrand's change has a closed form (Sherman and Morrison) in one decomposition of
    M, for all rows. In ln t it is smooth and falls like t and 1/t at its ends: the trapezoid rule with steps of 1/2 is
    exact to float32, and the sums beyond its ends are geometric.

    Args:
      rows: Matrix (C, n).

    Returns:
      (C,), at least 0.
    """
    t = jnp.exp(_LOG_STEP * jnp.arange(-24, 15))  # relative to the largest singular value
    gram = (rows, rows.T) if rows.shape[0] <= rows.shape[1] else (rows.T, rows)
    squares, vectors = jnp.linalg.eigh(jnp.matmul(*gram, precision=jax.lax.Precision.HIGHEST))
    largest = jnp.maximum(squares[-1], jnp.finfo(rows.dtype).tiny)
    rounding = max(rows.shape) * jnp.finfo(rows.dtype).eps
    relative = jnp.where(squares > rounding * largest, squares / largest, 0.0)[:, None]
    resolvent = 1 / (relative + jnp.square(t)[None])  # (singular values, t)
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if rows.shape[0] <= rows.shape[1]:
        shares = jnp.square(vectors)
        change = dot(shares, relative * jnp.square(resolvent)) / dot(shares, resolvent)
    else:
        shares = jnp.square(dot(rows, vectors)) / largest
        left = jnp.maximum(1 - dot(shares, resolvent), jnp.finfo(rows.dtype).eps)
        change = jnp.square(t)[None] * dot(shares, jnp.square(resolvent)) / left
    terms = change * t[None]
    beyond = (terms[:, 0] + terms[:, -1]) / (math.exp(_LOG_STEP) - 1)
    return jnp.sqrt(largest) * 2 / math.pi * _LOG_STEP * (jnp.sum(terms, axis=-1) + beyond)


def _one_per_channel(evidence: Evidence, gate: int) -> np.ndarray:
    return np.zeros(evidence.topology.gates[gate].channels)


class Score(NamedTuple):
    """A score.

    Attributes:
      of: (evidence, gate) -> (C_l,).
      needs_images: Whether it reads features or gradients; it is then a pure JAX function, averaged over all images.
      like: (evidence, gate) -> arrays of the shapes of what `of` returns, where that is another pytree.
      of_mean: What is then done to the average over all images: that pytree -> (C_l,).
    """

    of: Callable[[Evidence, int], Any]
    needs_images: bool = False
    like: Callable[[Evidence, int], Any] = _one_per_channel
    of_mean: Callable[[Any], np.ndarray] = np.asarray


SCORES: dict[str, Score] = {
    "uniform": Score(uniform),
    "magnitude": Score(magnitude),
    "bn_scale": Score(bn_scale),
    "fpgm": Score(fpgm),
    "lamp": Score(lamp),
    "taylor": Score(taylor, needs_images=True),
    "hrank": Score(hrank, needs_images=True),
    "chip": Score(chip, needs_images=True),
    "cc": Score(cc, needs_images=True, like=_like_cc, of_mean=information_loss),
}


# ---- widths from scores


def uniform_widths(importance: Importance, budget: Budget, fields: "Fields") -> tuple[int, ...]:
    """Widths that are the same fraction of every gate."""
    return budget.fit(np.ones(len(importance)))


def by_rates(importance: Importance, budget: Budget, fields: "Fields") -> tuple[int, ...]:
    """Widths that given rates leave, all scaled by one factor to the budget."""
    return budget.fit(1 - np.array(fields.rates))


def by_fitted_losses(importance: Importance, budget: Budget, fields: "Fields") -> tuple[int, ...]:
    """CC's widths: where the least importance is lost, if what a gate loses grows exponentially with what it removes.

    What gate l loses with a fraction c of its channels is fitted by p1 exp(p2 c), weighted by the root of the loss. The
    sum over all gates is least where the slopes are the same λ: c = ln(λ / (p1 p2)) / p2, in [0, 0.95]; λ is searched
    by bisection. The importances must add up, as those of `cc` do.
    """
    fits = [_exponential(np.sort(np.asarray(scores, np.float64))) for scores in importance]

    def fractions(log_slope: float) -> np.ndarray:
        rates = [(log_slope - log_p1 - math.log(p2)) / p2 for log_p1, p2 in fits]
        return 1 - np.clip(rates, 0.0, _MOST_REMOVED)

    low = min(log_p1 + math.log(p2) for log_p1, p2 in fits)
    high = max(log_p1 + math.log(p2) + p2 for log_p1, p2 in fits)
    for _ in range(64):
        middle = (low + high) / 2
        met = budget.cost(jnp.asarray(fractions(middle) * budget.topology.widths, jnp.float32)) <= budget.wanted
        low, high = (low, middle) if met else (middle, high)
    return budget.fit(fractions(high))


def _exponential(ascending: np.ndarray) -> tuple[float, float]:
    """The fit p1 exp(p2 c), as (ln p1, p2), of what is lost with channels whose importances are in ascending order."""
    losses = np.cumsum(ascending)
    rates = np.arange(1, len(losses) + 1) / len(losses)
    known = losses > 0
    if np.unique(losses[known]).size < 2:  # no curve: one that costs what removing everything does
        return math.log(max(losses[-1], np.finfo(float).tiny)) - 1.0, 1.0
    weights = np.sqrt(losses[known] / losses[-1])
    p2, log_p1 = np.polyfit(rates[known], np.log(losses[known]), 1, w=weights)
    return float(log_p1), float(p2)


def over_all_gates(importance: Importance, budget: Budget, fields: "Fields") -> tuple[int, ...]:
    """Widths by one ranking of the channels of all gates: the most of the best-ranked that meet the budget.

    Every gate keeps at least its smallest width, and widths are rounded down to multiples where the budget says so.
    """
    gates = np.repeat(np.arange(len(importance)), [len(scores) for scores in importance])
    order = gates[np.argsort(-np.concatenate(importance), kind="stable")]
    whole = np.asarray(budget.topology.widths)

    def widths(kept: int) -> tuple[int, ...]:
        counts = np.bincount(order[:kept], minlength=len(importance))
        rounded = np.where(counts == whole, whole, counts // budget.multiple * budget.multiple)
        return tuple(map(int, np.maximum(rounded, budget.smallest_widths)))

    met, missed = 0, len(order) + 1
    while missed - met > 1:
        middle = (met + missed) // 2
        if budget.cost(widths(middle)) <= budget.wanted:
            met = middle
        else:
            missed = middle
    return widths(met)


ALLOCATIONS: dict[str, Callable[[Importance, Budget, "Fields"], tuple[int, ...]]] = {
    "uniform": uniform_widths,
    "global": over_all_gates,
    "rates": by_rates,
    "cc": by_fitted_losses,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """Fields of the methods that score channels.

    Attributes:
      allocation: How many channels each gate keeps: 'uniform', the same fraction of every gate; 'global', by one
        ranking of the channels of all gates; 'rates', as `rates` says; 'cc', where the fitted loss of importance is
        least.
      rates: Fraction of each gate's channels that is removed, in the order of `topology.gates`, for allocation 'rates':
        published rates, for example. All widths are then scaled by one factor to the budget.
    """

    allocation: str = "uniform"
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choices(self, {"allocation": tuple(ALLOCATIONS)})
        if wrong := [rate for rate in self.rates if not 0 <= rate < 1]:
            raise ValueError(f"rates holds {wrong[0]!r}; give fractions of channels to remove, in [0, 1).")

    def check(self, topology: Topology) -> None:
        """Raises for rates of another network.

        Raises:
          ValueError: Their number is not that of the gates.
        """
        if self.allocation == "rates" and len(self.rates) != len(topology.gates):
            raise ValueError(
                f"rates has {len(self.rates)} entries and the network {len(topology.gates)} gates; give one for each, "
                "in the order in which `trace(...).describe()` lists them."
            )


# ---- scores as searches


class State(flax.struct.PyTreeNode):
    """The state of a score that needs images.

    Attributes:
      step: Number of steps taken, int32.
      images: Number of images seen, float32; on one device of several, its share.
      sums: What the score is computed from, per gate, summed over these images.
    """

    step: jax.Array
    images: jax.Array
    sums: tuple[Any, ...]


def build(score: Score, problem: Problem) -> Search:
    """The search of a score: of no steps where it needs no images, else one batch per step."""
    fields = problem.config
    fields.check(problem.topology)
    build_one = _over_images if score.needs_images else _of_weights
    allocation = ALLOCATIONS[fields.allocation]
    return build_one(score, problem)._replace(widths=lambda importance, budget: allocation(importance, budget, fields))


def _of_weights(score: Score, problem: Problem) -> Search:
    def propose(state: jax.Array) -> tuple[Importance, None]:
        evidence = Evidence(problem.topology, problem.variables, np.random.default_rng(np.asarray(state)))
        return tuple(np.asarray(score.of(evidence, gate)) for gate in range(len(problem.topology.gates))), None

    return Search(steps=0, init=jax.random.key_data, step=_no_step, propose=propose)


def _no_step(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a score of weights alone has no search step.")


def _over_images(score: Score, problem: Problem) -> Search:
    def of_batch(variables: Any, batch: Any) -> tuple[tuple[Any, ...], Measured]:
        evidence = Evidence(problem.topology, variables, problem=problem, batch=batch)
        found = tuple(score.of(evidence, gate) for gate in range(len(problem.topology.gates)))
        return jax.tree.map(lambda x: x.astype(jnp.float32), found), evidence.measured()

    def init(rng: jax.Array) -> State:
        del rng
        evidence = Evidence(problem.topology, problem.variables)
        like = tuple(score.like(evidence, gate) for gate in range(len(problem.topology.gates)))
        return State(jnp.int32(0), jnp.float32(0), jax.tree.map(lambda x: jnp.zeros(x.shape), like))

    def step(
        state: State, variables: Any, batch: Any, rng: jax.Array, devices: Devices = ONE_DEVICE
    ) -> tuple[State, dict[str, jax.Array]]:
        del rng
        means, measured = of_batch(variables, batch)
        means, metrics = devices.mean((means, {**measured.metrics, "loss": measured.loss}))
        count = len(batch[0])
        sums = jax.tree.map(lambda total, mean: total + count * mean, state.sums, means)
        return State(state.step + 1, state.images + count, sums), metrics

    def propose(state: State) -> tuple[Importance, None]:
        images = max(float(state.images), 1.0)
        means = jax.tree.map(lambda total: np.asarray(total) / images, state.sums)
        return tuple(map(score.of_mean, means)), None

    return Search(problem.steps, init, step, propose)
