"""Methods that score channels: one function per score, and how widths follow from scores.

A score is a function of (evidence, gate) that returns (C_l,), the larger the more a channel matters. What it can be
computed from is in `Evidence`. To add one, write the function and its line in `SCORES`.
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
from ddnp_jax.networks import flatten
from ddnp_jax.parallel import ONE_DEVICE, Devices
from ddnp_jax.topology import Gate, Slice, Topology

_LOG_STEP = 0.5  # of the integral in `nuclear_losses`


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
        return [_by_channel(self.leaves[piece.path], piece, found) for piece in found.producers]

    def norm_scales(self, gate: int) -> list[np.ndarray]:
        """The scales of normalizations of a gate's channels, each (C_l,)."""
        found = self.topology.gates[gate]
        pieces = [piece for piece in found.slices if piece.path[-1] == "scale"]
        return [_by_channel(self.leaves[piece.path], piece, found)[:, 0] for piece in pieces]

    @functools.cached_property
    def features(self) -> tuple[jax.Array, ...]:
        """The feature maps of every gate's channels, (N, ..., C_l), as the layers read them."""
        return self._observed[0]

    @functools.cached_property
    def _observed(self) -> tuple[tuple[jax.Array, ...], Measured]:
        seen: dict[int, jax.Array] = {}
        measured = self._problem.measure(self._ones, self.variables, self.batch, seen.__setitem__)
        return tuple(seen[gate] for gate in sorted(seen)), measured

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
        return (self._differentiated if "_differentiated" in self.__dict__ else self._observed)[1]


def _by_channel(leaf: Any, piece: Slice, gate: Gate) -> np.ndarray:
    """The part of a leaf that belongs to each of a gate's channels, float64 (C_l, n)."""
    moved = np.moveaxis(np.asarray(leaf, np.float64), piece.axis, 0)
    return moved[piece.span.positions(gate.channels)].reshape(gate.channels, -1)


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


def hrank(evidence: Evidence, gate: int) -> jax.Array:
    """Mean over images of the matrix rank of the channel's feature map (HRank, Lin et al. 2020).

    Raises:
      ValueError: The layers read the gate's channels pooled or flattened, so that there is no map.
    """
    features = evidence.features[gate]
    if features.ndim != 4:
        name = evidence.topology.gates[gate].name
        raise ValueError(
            f"the channels of gate {name} are read as {features.shape}, without height and width, and have no rank; "
            "keep= the gate whole, or score by another method."
        )
    return jnp.mean(jnp.linalg.matrix_rank(jnp.moveaxis(features, -1, 1)).astype(jnp.float32), axis=0)


def chip(evidence: Evidence, gate: int) -> jax.Array:
    """Mean over images of how much nuclear norm the feature maps lose without the channel's (CHIP, Sui et al. 2021)."""
    features = evidence.features[gate]
    by_channel = jnp.moveaxis(features, -1, 1).reshape(len(features), features.shape[-1], -1)
    return jnp.mean(jax.lax.map(nuclear_losses, by_channel), axis=0)


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


class Score(NamedTuple):
    """A score.

    Attributes:
      of: (evidence, gate) -> (C_l,).
      needs_images: Whether it reads features or gradients; it is then a pure JAX function, averaged over all images.
    """

    of: Callable[[Evidence, int], Any]
    needs_images: bool = False


SCORES: dict[str, Score] = {
    "uniform": Score(uniform),
    "magnitude": Score(magnitude),
    "bn_scale": Score(bn_scale),
    "fpgm": Score(fpgm),
    "taylor": Score(taylor, needs_images=True),
    "hrank": Score(hrank, needs_images=True),
    "chip": Score(chip, needs_images=True),
}


# ---- widths from scores


def per_gate(importance: Importance, budget: Budget) -> tuple[int, ...]:
    """Widths that are the same fraction of every gate."""
    return budget.fit(np.ones(len(importance)))


def over_all_gates(importance: Importance, budget: Budget) -> tuple[int, ...]:
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


RANKINGS: dict[str, Callable[[Importance, Budget], tuple[int, ...]]] = {"per_gate": per_gate, "global": over_all_gates}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """Fields of the methods that score channels.

    Attributes:
      ranking: 'per_gate', the same fraction of every gate stays; or 'global', one ranking of the channels of all gates.
    """

    ranking: str = "per_gate"

    def __post_init__(self) -> None:
        check_choices(self, {"ranking": tuple(RANKINGS)})


# ---- scores as searches


class State(flax.struct.PyTreeNode):
    """The state of a score that needs images.

    Attributes:
      step: Number of steps taken, int32.
      images: Number of images seen, float32; on one device of several, its share.
      sums: (C_l,) per gate, the scores summed over these images.
    """

    step: jax.Array
    images: jax.Array
    sums: tuple[jax.Array, ...]


def build(score: Score, problem: Problem) -> Search:
    """The search of a score: of no steps where it needs no images, else one batch per step."""
    build_one = _over_images if score.needs_images else _of_weights
    return build_one(score, problem)._replace(widths=RANKINGS[problem.config.ranking])


def _of_weights(score: Score, problem: Problem) -> Search:
    def propose(state: jax.Array) -> tuple[Importance, None]:
        evidence = Evidence(problem.topology, problem.variables, np.random.default_rng(np.asarray(state)))
        return tuple(np.asarray(score.of(evidence, gate)) for gate in range(len(problem.topology.gates))), None

    return Search(steps=0, init=jax.random.key_data, step=_no_step, propose=propose)


def _no_step(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a score of weights alone has no search step.")


def _over_images(score: Score, problem: Problem) -> Search:
    widths = problem.topology.widths

    def init(rng: jax.Array) -> State:
        del rng
        return State(jnp.int32(0), jnp.float32(0), tuple(jnp.zeros(channels) for channels in widths))

    def step(
        state: State, variables: Any, batch: Any, rng: jax.Array, devices: Devices = ONE_DEVICE
    ) -> tuple[State, dict[str, jax.Array]]:
        del rng
        evidence = Evidence(problem.topology, variables, problem=problem, batch=batch)
        scores = tuple(score.of(evidence, gate).astype(jnp.float32) for gate in range(len(widths)))
        measured = evidence.measured()
        scores, metrics = devices.mean((scores, {**measured.metrics, "loss": measured.loss}))
        count = len(batch[0])
        sums = tuple(total + count * mean for total, mean in zip(state.sums, scores, strict=True))
        return State(state.step + 1, state.images + count, sums), metrics

    def propose(state: State) -> tuple[Importance, None]:
        return tuple(np.asarray(total) / max(float(state.images), 1.0) for total in state.sums), None

    return Search(problem.steps, init, step, propose)
