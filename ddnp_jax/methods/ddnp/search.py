"""DDNP: Disentangled Differentiable Network Pruning (Gao et al., ECCV 2022).

g_s learns which channels are important, and g_k learns how many to keep. A soft top-k mask combines both, and the third
term of the objective, eq. (9), couples them only weakly.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from ddnp_jax import losses
from ddnp_jax.fields import choice, number
from ddnp_jax.masking import apply_masked
from ddnp_jax.methods import masks
from ddnp_jax.methods.base import (
    AdamW,
    Problem,
    ResourceFields,
    Search,
    Survey,
    convergence,
    more_steps,
    off_budget,
)
from ddnp_jax.methods.ddnp import generators
from ddnp_jax.methods.ddnp.generators import Learner
from ddnp_jax.methods.evidence import Evidence
from ddnp_jax.methods.scores import magnitude
from ddnp_jax.parallel import ONE_DEVICE, Devices

OUTPUTS = {"sigmoid": jax.nn.sigmoid, "abs": jnp.abs, "square": jnp.square}

# A search has not converged if k differs from the open part of a gate by more than this.
FAR = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields(ResourceFields):
    """The fields of DDNP; the defaults follow Tables A2 and A3.

    Attributes:
      importance: Parameterization of s: 'generator' (g_s), 'scalar' (one parameter per channel), or 'l1' (fixed norms).
      width: Parameterization of k: 'generator' (g_k), 'linear' (g_k of the authors' code), 'scalar' (one parameter per
        gate), or 'half' (fixed at 0.5).
      output: Function that maps s̄ to the importance: 'sigmoid', 'abs' or 'square'. Only the ranking by it counts, so
        that the last two are the same, and both are far worse than the first (`results/cifar10_r56`).
      learned_inputs: Whether the inputs x_s and x_k are learned.
      bidirectional: Whether g_s also runs backward over the gates, as in the authors' code.
      layer_norm: Whether the GRU's outputs are layer-normalized, as in the authors' code.
      energy_weight: Weight of the feature energy E in the importance, 0.5 in the authors' code; the remaining weight
        is that of sigmoid(s̄ + g + 3), where g is the noise of the gates.
      importance_average: Decay of the running average that ranks channels for evaluation, 0.99 in the authors' code.
      tie_weight: ρ, the weight of the tie; 0 disentangles importance and width completely.
      tie_noise: Half the range of u, the noise of the tie.
      band: Half-width of the soft top-k's edge, as a fraction of the channels.
      floor: Smallest value of a mask during the search.
      importance_optimizer: AdamW of the importance; scalars need a learning rate of about 5e-2.
      width_optimizer: AdamW of the widths; the learning rate has a cosine decay to 0. A search of a few hundred steps
        needs a rate of 2e-3 to 3e-3, because the tie first increases the widths, which must then decrease through a
        saturated sigmoid.
    """

    importance: str = choice("generator", "generator", "scalar", "l1")
    width: str = choice("generator", "generator", "linear", "scalar", "half")
    output: str = choice("sigmoid", *OUTPUTS)
    learned_inputs: bool = False
    bidirectional: bool = False
    layer_norm: bool = False
    energy_weight: float = number(0.0, least=0, most=1)
    importance_average: float = number(0.0, least=0, below=1)
    tie_weight: float = number(1.0, least=0)
    tie_noise: float = number(0.02, least=0)
    band: float = number(0.05, least=0, most=1)
    floor: float = number(0.025, least=0, below=1)
    importance_optimizer: AdamW = dataclasses.field(default=AdamW(learning_rate=1e-3, weight_decay=1e-4))
    width_optimizer: AdamW = dataclasses.field(default=AdamW(learning_rate=1e-3, weight_decay=0.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance == "l1" and self.energy_weight:
            raise ValueError(f"energy_weight={self.energy_weight} must be 0 where importance='l1': norms are fixed.")


class State(flax.struct.PyTreeNode):
    """The search's state.

    Attributes:
      step: Number of steps taken, int32.
      params: {"importance", "width"}: the learned variables of g_s and g_k.
      inputs: {"importance", "width"}: their fixed variables.
      opt_state: State of AdamW.
      ranking: Running average of the importance, (C_l,) per gate; it ranks the channels when the search is evaluated.
    """

    step: jax.Array
    params: Any
    inputs: Any
    opt_state: Any
    ranking: tuple[jax.Array, ...]


def importance_learner(problem: Problem) -> Learner:
    """g_s, one scalar per channel, or the L1 norms ("Fix S"), where a channel is open if its norm is above the mean."""
    config, widths = problem.config, problem.topology.widths
    match config.importance:
        case "generator":
            module = generators.ImportanceGenerator(
                widths, config.learned_inputs, config.bidirectional, config.layer_norm
            )
            return generators.learned(module)
        case "scalar":
            return generators.learned(generators.ScalarImportance(widths))
    evidence = Evidence(problem.topology, problem.variables)
    norms = [magnitude(evidence, gate) for gate in range(len(widths))]
    standardized = ((n - n.mean()) / (n.std() + 1e-12) for n in norms)
    return generators.fixed(tuple(np.float32(z - masks.GATE_SHIFT) for z in standardized))


def width_learner(problem: Problem) -> Learner:
    """g_k of Table A3 or of the authors' code, one scalar per gate, or 0.5 everywhere ("Fix k")."""
    config, gates = problem.config, len(problem.topology.gates)
    match config.width:
        case "generator":
            return generators.learned(generators.WidthGenerator(gates, config.learned_inputs))
        case "linear":
            return generators.learned(generators.LinearWidth(gates, config.learned_inputs))
        case "scalar":
            return generators.learned(generators.ScalarWidth(gates))
    return generators.fixed(np.full(gates, 0.5, np.float32))


def make_optimizer(config: Fields, steps: int) -> optax.GradientTransformation:
    """AdamW for both learners; the learning rate of the widths has a cosine decay to 0."""
    importance, width = config.importance_optimizer, config.width_optimizer
    return optax.partition(
        {
            "importance": optax.adamw(importance.learning_rate, weight_decay=importance.weight_decay),
            "width": optax.adamw(
                optax.cosine_decay_schedule(width.learning_rate, max(steps, 1)), weight_decay=width.weight_decay
            ),
        },
        {"importance": "importance", "width": "width"},
    )


def soft_masks(
    importance: tuple[jax.Array, ...],
    gates: tuple[jax.Array, ...],
    k: jax.Array,
    config: Fields,
) -> tuple[jax.Array, ...]:
    """Soft top-k by importance, times the relaxed Bernoulli gate: m_l (C_l,) per gate."""
    return tuple(
        masks.soft_top_k(k[gate], masks.ranks(scores), config.band, config.floor) * gates[gate]
        for gate, scores in enumerate(importance)
    )


def feature_energies(problem: Problem, variables: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    """The summed squared activation of every channel of the unpruned network, (N, C_l) per gate."""
    found: dict[int, jax.Array] = {}

    def observe(gate: int, activation: jax.Array) -> None:
        squares = jnp.square(activation.astype(jnp.float32))
        # Only the input of the first layer that reads the gate counts.
        found.setdefault(gate, jnp.sum(squares, range(1, squares.ndim - 1)))

    ones = tuple(jnp.ones(channels) for channels in problem.topology.widths)
    apply_masked(problem.model, variables, images, ones, problem.topology, observe=observe)
    return tuple(found[gate] for gate in sorted(found))


@dataclasses.dataclass(frozen=True)
class _DDNP:
    """The pure functions of one search.

    Attributes:
      problem: The input of the method.
      learners: {"importance", "width"}: their parameterizations.
      optimizer: Optimizer of their parameters.
      energy: Feature energies E of the authors' code, (C_l,) per gate in [0, 1]: the mean of `feature_energies` over
        all images, divided by the largest one of the gate; None if they are not used, as in Table A2.
    """

    problem: Problem
    learners: dict[str, Learner]
    optimizer: optax.GradientTransformation
    energy: tuple[np.ndarray, ...] | None = None

    @property
    def learns_from_data(self) -> bool:
        """Whether the search uses images; False for "Fix S", which has only the second and third term of eq. (9)."""
        return self.problem.config.importance != "l1"

    def learned_values(self, params: Any, inputs: Any) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The scores s̄_l (C_l,) per gate and the widths k (L,)."""
        scores, k = (
            self.learners[name].apply({"params": params[name], **inputs[name]}) for name in ("importance", "width")
        )
        return scores, k

    @functools.cached_property
    def _compiled_values(self) -> Callable[[Any, Any], tuple[tuple[jax.Array, ...], jax.Array]]:
        """`learned_values` outside of a step, compiled once; called directly, its scan is compiled at every call."""
        return jax.jit(self.learned_values)

    def importance(self, scores: tuple[jax.Array, ...], noisy: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The importance that ranks the channels, without a gradient.

        It is the output function of s̄ or, as in the authors' code, the weighted mean of gate and energy.

        Args:
          scores: s̄_l, (C_l,) per gate.
          noisy: s̄_l + g + 3, (C_l,) per gate.
        """
        config = self.problem.config
        if self.energy is not None:
            weight = config.energy_weight
            pairs = zip(noisy, self.energy, strict=True)
            ranking = tuple((1.0 - weight) * jax.nn.sigmoid(s) + weight * energy for s, energy in pairs)
        else:  # for L1 norms always the sigmoid, which keeps their order
            ranking = tuple(map(OUTPUTS[config.output if self.learns_from_data else "sigmoid"], scores))
        return jax.lax.stop_gradient(ranking)

    def widths(self, gates: tuple[jax.Array, ...], k: jax.Array) -> jax.Array:
        """The mean of two estimates of each width, the number of open channels and k_l C_l, in channels (L,).

        With k_l C_l alone nothing would close the channels, and the tie would keep every k at 1. For fixed importances
        ("Fix S") only k_l C_l counts.
        """
        widths = k * np.asarray(self.problem.topology.widths, np.float32)
        if not self.learns_from_data:
            return widths
        return (widths + jnp.stack([jnp.sum(masks.straight_through(gate)) for gate in gates])) / 2

    def objective(
        self, values: tuple[tuple[jax.Array, ...], jax.Array], variables: Any, batch: Any, rng: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Evaluates eq. (9) at the learned values (s̄, k); returns the loss and (metrics, importance)."""
        config = self.problem.config
        scores, k = values
        *gate_rngs, tie_rng = jax.random.split(rng, len(scores) + 1)
        noisy = tuple(map(masks.noisy, scores, gate_rngs))
        gates = tuple(map(masks.relaxed, noisy))
        importance = self.importance(scores, noisy)
        metrics = self.problem.resource(self.widths(gates, k))
        metrics["tie_loss"] = losses.tie(gates, k, tie_rng, config.tie_noise)
        gaps = self.gaps(scores, k)
        metrics |= {"width_gap": jnp.mean(gaps), "largest_width_gap": jnp.max(gaps)}
        loss = config.resource_weight * metrics["resource_loss"] + config.tie_weight * metrics["tie_loss"]
        if self.learns_from_data:
            measured = self.problem.measure(soft_masks(importance, gates, k, config), variables, batch)
            metrics |= measured.metrics
            loss = loss + measured.loss
        return loss, (metrics | {"loss": loss}, importance)

    def gaps(self, scores: tuple[jax.Array, ...], k: jax.Array) -> jax.Array:
        """Absolute difference between k_l and the expected open fraction of gate l, (L,)."""
        return jnp.abs(self.open_parts(scores) - k)

    def open_parts(self, scores: tuple[jax.Array, ...]) -> jax.Array:
        """The expected fraction of open channels of every gate, (L,)."""
        return jnp.stack([jnp.mean(masks.open_probability(s)) for s in scores])

    def ended(self, state: State) -> tuple[str, ...]:
        """Reports whether the search has converged, with numbers, and gives advice if it has not.

        Empty for a search without the tie or with fixed importance or width: its k need not match the open channels.
        """
        config, topology = self.problem.config, self.problem.topology
        if config.tie_weight == 0 or not self.learns_from_data or config.width == "half":
            return ()
        scores, k = self._compiled_values(state.params, state.inputs)
        gaps = np.asarray(self.gaps(scores, k))
        widths = (self.open_parts(scores) + k) / 2 * np.asarray(topology.widths, np.float32)
        cost = {name: float(value) for name, value in self.problem.resource(widths).items()}
        found = (
            f"k and the open part of its gate differ by {gaps.mean():.3f} on average and {gaps.max():.3f} at most "
            f"({topology.gates[int(gaps.argmax())].name}), the tie Σ R_w is {np.log1p(gaps).sum():.3f}, and R is "
            f"{cost['resource_loss']:.4f} at {cost['remaining']:.4f} of the cost."
        )
        return (convergence(found, self.remedies(float(gaps.max()), cost["remaining"])),)

    def remedies(self, gap: float, remaining: float) -> list[str]:
        """Advice for a search that has not converged; empty if it has.

        Args:
          gap: The largest value of `gaps` after the search.
          remaining: The remaining fraction of the cost.
        """
        rate, found = self.problem.config.width_optimizer.learning_rate, off_budget(remaining, self.problem)
        if gap <= FAR:
            return found
        faster = [f"width_optimizer.learning_rate={rate:g} raised to 2e-3 or 3e-3"] if rate < 2e-3 else []
        return [*faster, *(found or [more_steps(self.problem)])]

    def init(self, rng: jax.Array) -> State:
        """The state before the first step."""
        rngs = zip(self.learners, jax.random.split(rng), strict=True)
        variables = {name: self.learners[name].init(key) for name, key in rngs}
        params = {name: values.get("params", {}) for name, values in variables.items()}
        inputs = {name: {c: v for c, v in values.items() if c != "params"} for name, values in variables.items()}
        scores, _ = self._compiled_values(params, inputs)
        ranking = self.importance(scores, tuple(masks.noisy(s, None) for s in scores))
        return State(jnp.int32(0), params, inputs, self.optimizer.init(params), ranking)

    def step(
        self, state: State, variables: Any, batch: Any, rng: jax.Array, devices: Devices = ONE_DEVICE
    ) -> tuple[State, dict[str, jax.Array]]:
        """One step of the search on one device."""
        values, generators_vjp = jax.vjp(lambda params: self.learned_values(params, state.inputs), state.params)
        # On CPU the generators' small operations wait long behind the backbone's large ones. The backbone therefore
        # starts after them, and the generators' gradients are computed after the mean over devices, which is taken of
        # a single vector.
        values, batch = jax.lax.optimization_barrier((values, batch))
        gradient = jax.grad(self.objective, has_aux=True)
        gradients, (metrics, importance) = gradient(values, variables, batch, rng)
        mine, unravel = ravel_pytree((gradients, metrics))
        gradients, metrics = unravel(devices.mean(mine))
        (gradients,) = generators_vjp(gradients)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        decay = self.problem.config.importance_average
        return state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            ranking=tuple(decay * r + (1.0 - decay) * i for r, i in zip(state.ranking, importance, strict=True)),
        ), metrics

    def propose(self, state: State) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Returns the running average of the importance and the current widths."""
        _, k = self._compiled_values(state.params, state.inputs)
        return tuple(map(np.asarray, state.ranking)), np.asarray(k)


def build(problem: Problem) -> Search:
    """Builds the search that `problem.config`, a `Fields`, describes; it surveys the feature energies if they count."""
    learners = {"importance": importance_learner(problem), "width": width_learner(problem)}
    ddnp = _DDNP(problem, learners, make_optimizer(problem.config, problem.steps))
    if not problem.config.energy_weight:
        return _search(ddnp)

    def with_energies(sums: Sequence[np.ndarray]) -> Search:
        energy = tuple(np.asarray(e / max(np.max(e), 1e-12), np.float32) for e in sums)
        return _search(dataclasses.replace(ddnp, energy=energy))

    survey = Survey(functools.partial(feature_energies, problem), with_energies)
    return Search(problem.steps, _too_early, _too_early, ddnp.propose, survey=survey, ended=ddnp.ended)


def _search(ddnp: _DDNP) -> Search:
    return Search(ddnp.problem.steps, ddnp.init, ddnp.step, ddnp.propose, ended=ddnp.ended)


def _too_early(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "this search needs the feature energies of all images first: continue with `search.survey.then(sums)`, where "
        "`sums` are those of `search.survey.of`, or use `methods.run_search`, which computes them."
    )
