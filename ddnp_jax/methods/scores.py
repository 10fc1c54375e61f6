"""Methods that score channels, one function per score.

A score is a function of (evidence, gate) that returns (C_l,); more important channels have larger values. `Evidence`
provides its inputs. To add a score, write the function and register it in `SCORES`. Any score can be combined with any
allocation of widths.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax.methods.allocations import ALLOCATIONS
from ddnp_jax.methods.base import Importance, Measured, Problem, Search, no_step
from ddnp_jax.methods.evidence import Evidence
from ddnp_jax.parallel import ONE_DEVICE, Devices

_LOG_STEP = 0.5  # of the integral in `nuclear_losses`
_BATCH = 32  # images whose matrices are decomposed together


# ---- the scores


def uniform(evidence: Evidence, gate: int) -> np.ndarray:
    """Random numbers: the baseline that every method must beat."""
    if evidence.rng is None:
        raise ValueError("this score draws random numbers; give rng.")
    return evidence.rng.random(evidence.topology.gates[gate].channels)


def magnitude(evidence: Evidence, gate: int) -> np.ndarray:
    """L1 norm of the kernels that produce the channel (Li et al. 2017)."""
    return np.sum([np.abs(kernel).sum(axis=1) for kernel in evidence.filters(gate)], axis=0)


def bn_scale(evidence: Evidence, gate: int) -> np.ndarray:
    """Absolute scale of the channel's batch normalization (Liu et al. 2017); the sum of several, as those of a group.

    Raises:
      ValueError: The gate has no normalization with a scale.
    """
    scales = evidence.norm_scales(gate)
    if not scales:
        name = evidence.topology.gates[gate].name
        raise ValueError(f"gate {name} has no normalization with a scale; score its channels by another method.")
    return np.sum([np.abs(scale).sum(axis=1) for scale in scales], axis=0)


def fpgm(evidence: Evidence, gate: int) -> np.ndarray:
    """Sum of the Euclidean distances to the gate's other filters (He et al. 2019): the most redundant are removed."""
    filters = np.concatenate(evidence.filters(gate), axis=1)
    return np.array([np.linalg.norm(filters - one, axis=1).sum() for one in filters])


def taylor(evidence: Evidence, gate: int) -> jax.Array:
    """Mean over images of the absolute gradient of the loss with respect to the mask (Molchanov et al. 2017)."""
    return jnp.mean(jnp.abs(evidence.gradients[gate]), axis=0)


def lamp(evidence: Evidence, gate: int) -> np.ndarray:
    """Squared norm of the filter, divided by the sum of all squared norms that are at least as large (Lee et al. 2021).

    This is LAMP, applied to channels. The largest filter of every gate has the score 1, so that a ranking over all
    gates removes no gate completely.
    """
    squares = np.sum([np.square(kernel).sum(axis=1) for kernel in evidence.filters(gate)], axis=0)
    order = np.argsort(-squares, kind="stable")
    found = np.empty_like(squares)
    found[order] = squares[order] / np.maximum(np.cumsum(squares[order]), np.finfo(squares.dtype).tiny)
    return found


def hrank(evidence: Evidence, gate: int) -> jax.Array:
    """Mean over images of the matrix rank of the channel's feature map (HRank, Lin et al. 2020).

    If several blocks add to the same channels, the score is the mean over the blocks, which keep the same channels; of
    channels in groups, it is the mean over the maps of the group.

    Raises:
      ValueError: The layers read the gate's channels after pooling or flattening, so that there are no feature maps, or
        the images have no height and width.
    """
    maps = _feature_maps(evidence, gate)
    if not maps:
        name, read = evidence.topology.gates[gate].name, evidence.features[gate][0].shape
        raise ValueError(
            f"the channels of gate {name} are read as {read}, not as maps of several pixels with height and width, and "
            "have no ranks to compare; leave the gate unpruned with keep=, or use another method."
        )
    ranks = [jnp.linalg.matrix_rank(jnp.moveaxis(each, (1, 2), (-2, -1))).astype(jnp.float32) for each in maps]
    return jnp.mean(jnp.stack([jnp.mean(each, axis=(0, 1)) for each in ranks]), axis=0)


def chip(evidence: Evidence, gate: int) -> jax.Array:
    """Mean over images of the loss of nuclear norm when the channel's feature map is zero (CHIP, Sui et al. 2021).

    If several blocks add to the same channels, the score is the mean over the blocks, which keep the same channels. In
    the authors' code each block keeps its own. All maps of channels in a group are set to zero together, as one row of
    the matrix. Where the layers read the channels only after pooling or flattening, what they read is the map.
    """
    maps = _feature_maps(evidence, gate) or evidence.features[gate]
    by_channel = [jnp.moveaxis(each, -1, 1).reshape(len(each), each.shape[-1], -1) for each in maps]
    losses = [jax.lax.map(nuclear_losses, each, batch_size=_BATCH) for each in by_channel]
    return jnp.mean(jnp.stack([jnp.mean(each, axis=0) for each in losses]), axis=0)


def _feature_maps(evidence: Evidence, gate: int) -> list[jax.Array]:
    """The gate's features with height and width, of more than one pixel: (N, H, W, m, C_l), with m maps per channel."""
    if len(evidence.topology.input_shape) != 3:
        return []
    features = evidence.features[gate]
    maps = [each if each.ndim == 5 else each[..., None, :] for each in features if each.ndim in (4, 5)]
    return [each for each in maps if each.shape[1] * each.shape[2] > 1]


def cc(evidence: Evidence, gate: int) -> list[jax.Array]:
    """The inputs of `information_loss`, the channel pruning score of CC (Li et al. 2021)."""
    return evidence.consuming_kernels(gate, evidence.kernel_effects)


def information_loss(effects: list[jax.Array]) -> np.ndarray:
    """CC's information loss of every channel: Σ (g ⊙ (W' - W))² over the layers that read the channel.

    W' is the kernel W without the channel.

    Args:
      effects: g ⊙ W of each of these layers, (C_l, n), where g is the mean gradient over all images.

    Returns:
      Scores (C_l,).
    """
    return np.sum([np.square(np.float64(each)).sum(axis=1) for each in effects], axis=0)


def nuclear_losses(rows: jax.Array) -> jax.Array:
    """Decrease of the nuclear norm of a matrix when a row is set to zero, for every row.

    The nuclear norm is tr(M^½) = 2/π ∫ tr(M (M + t²)⁻¹) dt over t > 0, where M is a Gram matrix. Setting a row to zero
    changes M by a matrix of rank one. The change of the integrand therefore has a closed form (Sherman and Morrison),
    which needs only one decomposition of M for all rows. As a function of ln t it is smooth, and decreases like t and
    1/t at the two ends: the trapezoid rule with steps of 1/2 is accurate to float32, and the sums beyond the ends are
    geometric series.

    Args:
      rows: Matrix (C, n).

    Returns:
      The decreases (C,), at least 0.
    """
    t = jnp.exp(_LOG_STEP * jnp.arange(-24, 15))  # in units of the largest singular value
    factors = (rows, rows.T) if rows.shape[0] <= rows.shape[1] else (rows.T, rows)
    # eigh reads only one triangle. jaxlib 0.12 cannot compile its symmetrization with the fusion `eltwise`.
    gram = jnp.matmul(*factors, precision=jax.lax.Precision.HIGHEST)
    squares, vectors = jnp.linalg.eigh(gram, symmetrize_input=False)
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
      of: The score: (evidence, gate) -> (C_l,), or a pytree from which `of_mean` computes it.
      needs_images: Whether `of` reads features or gradients; it must then be a pure JAX function, and its results are
        averaged over all images.
      like: (evidence, gate) -> arrays with the structure and shapes of what `of` returns.
      of_mean: Average of the results of `of` over all images -> (C_l,).
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
    "cc": Score(cc, needs_images=True, like=Evidence.consuming_kernels, of_mean=information_loss),
}


# ---- scores as searches


class State(flax.struct.PyTreeNode):
    """The state of a score that needs images.

    Attributes:
      step: Number of steps taken, int32.
      images: Number of images seen, float32; if there are several devices, only those seen by one device.
      sums: Sums of the results of `Score.of` over these images, per gate.
    """

    step: jax.Array
    images: jax.Array
    sums: tuple[Any, ...]


def build(score: Score, problem: Problem) -> Search:
    """Builds the search of a score: it has one step per batch, or no steps if the score needs no images."""
    fields = problem.config
    fields.check(problem.topology)
    build_one = _over_images if score.needs_images else _of_weights
    allocation = ALLOCATIONS[fields.allocation]
    return build_one(score, problem)._replace(widths=lambda importance, budget: allocation(importance, budget, fields))


def _of_weights(score: Score, problem: Problem) -> Search:
    def propose(state: jax.Array) -> tuple[Importance, None]:
        evidence = Evidence(problem.topology, problem.variables, np.random.default_rng(np.asarray(state)))
        return tuple(np.asarray(score.of(evidence, gate)) for gate in range(len(problem.topology.gates))), None

    return Search(steps=0, init=jax.random.key_data, step=no_step, propose=propose)


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
