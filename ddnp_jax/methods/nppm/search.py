"""NPPM: Network Pruning via Performance Maximization (Gao et al., CVPR 2021).

One parameter per channel decides whether the channel is kept ("differentiable gates", DG). The gates minimize the
classification loss and also maximize the prediction of a network PN, which predicts the accuracy of sub-networks and
is trained on an episodic memory of the search.

Details that the paper does not specify:

- The classification loss is computed with the rounded sub-network. The accuracy in the memory is then that of the
  stored sub-network, and one forward pass gives both. (The authors' code computes the loss with the relaxed gates, and
  stores another sample.)
- The proposed network keeps the channels whose gates are open with a probability of at least 1/2, so that it costs as
  much as the sub-networks of the search. Without the noise fewer gates are open: the proposed network then had 0.44 of
  the FLOPs when the search had 0.50.
- PN evaluates gates with its running batch statistics, as at test time. Until the memory holds more pairs than a batch
  of PN, PN neither learns nor influences the gates.
- θ is initialized with N(0, 1), and the bins of the memory cover the range of the stored accuracies, both as in the
  authors' code.

With the authors' σ = 15 most entries of a' are randomly 0 or 1, so PN is evaluated on random networks with half of the
channels. Its quality on the sub-networks of the search is logged: "predicted_top1", predicted before PN has seen the
step's sub-network, to compare with the accuracy on the batch ("top1" of the default loss), and "prediction_error", the
absolute difference between both, in percentage points.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddnp_jax import losses
from ddnp_jax.fields import choice, number
from ddnp_jax.methods import masks
from ddnp_jax.methods.base import (
    AdamW,
    Measured,
    Problem,
    ResourceFields,
    Search,
    convergence,
    off_budget,
)
from ddnp_jax.methods.nppm import memory as episodic
from ddnp_jax.methods.nppm.memory import Memory
from ddnp_jax.methods.nppm.predictor import PREDICTORS
from ddnp_jax.parallel import ONE_DEVICE, Devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields(ResourceFields):
    """The fields of NPPM; the defaults are the authors' values for CIFAR-10.

    Attributes:
      optimizer: AdamW of the gates; its learning rate is multiplied by 0.1 at `decay_at`.
      decay_at: When the learning rate decays, as a fraction of the search.
      initial_deviation: Standard deviation of the initial θ; the mean is 0.
      predictor: PN: 'gru' (Table 2), 'authors' (the authors' code), 'linear' (LR), or 'none' (DG).
      predictor_loss: Loss of PN: 'absolute' or 'squared'.
      predictor_batch_size: Number of pairs per step of PN; PN is used as soon as the memory holds more.
      predictor_optimizer: AdamW of PN.
      predictor_noise: σ, the noise on the gates that PN evaluates.
      projection: Whether PN's gradient is made orthogonal to that of the classification loss.
      memory_size: K, the number of pairs in the episodic memory.
      memory_steps: Number of consecutive search steps per pair.
      memory_balanced: Whether rare accuracies are drawn as often as common ones.
    """

    resource_loss: str = choice("log_max", *losses.RESOURCE)
    optimizer: AdamW = dataclasses.field(default=AdamW(learning_rate=5e-2, weight_decay=1e-2))
    decay_at: float = number(0.8, above=0, most=1, about="a fraction of the search")
    initial_deviation: float = number(1.0, least=0)
    predictor: str = choice("gru", "none", *PREDICTORS)
    predictor_loss: str = choice("absolute", "absolute", "squared")
    predictor_batch_size: int = number(64, least=1)
    predictor_optimizer: AdamW = dataclasses.field(default=AdamW(learning_rate=1e-3, weight_decay=1e-3))
    predictor_noise: float = number(15.0, least=0)
    projection: bool = True
    memory_size: int = number(500, least=1)
    memory_steps: int = number(2, least=1)
    memory_balanced: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predictor != "none" and self.memory_size <= self.predictor_batch_size:
            raise ValueError(
                f"memory_size={self.memory_size} must be above predictor_batch_size={self.predictor_batch_size}, or PN "
                "never learns."
            )


class State(flax.struct.PyTreeNode):
    """The search's state; D = Σ C_l.

    Attributes:
      step: Number of steps taken, int32.
      gates: θ of all channels, (D,).
      opt_state: State of the gates' AdamW.
      predictor: Variables of PN; {} without PN.
      predictor_opt_state: State of PN's AdamW; {} without PN.
      memory: Sub-networks and their accuracies; None without PN.
    """

    step: jax.Array
    gates: jax.Array
    opt_state: Any
    predictor: Any
    predictor_opt_state: Any
    memory: Memory | None


def project(gradient: jax.Array, onto: jax.Array, widths: tuple[int, ...]) -> jax.Array:
    """Removes from a gradient (D,), gate by gate, its component parallel to another gradient: NPPM suppl. C eq. (1).

    `ĝ_p = g_p - (g_Lᵀ g_p / ||g_L||²) g_L`; the gradient of a gate where `g_L` is zero does not change.
    """

    def one(g: jax.Array, base: jax.Array) -> jax.Array:
        square = base @ base
        return g - jnp.where(square > 0, (base @ g) / jnp.where(square > 0, square, 1.0), 0.0) * base

    pairs = zip(masks.split_gates(gradient, widths), masks.split_gates(onto, widths), strict=True)
    return jnp.concatenate([one(g, base) for g, base in pairs])


@dataclasses.dataclass(frozen=True)
class _NPPM:
    """The pure functions of one search.

    Attributes:
      problem: The input of the method.
      predictor: PN, or None for DG.
      optimizer: Optimizer of the gates.
      predictor_optimizer: Optimizer of PN.
    """

    problem: Problem
    predictor: nn.Module | None
    optimizer: optax.GradientTransformation
    predictor_optimizer: optax.GradientTransformation

    @property
    def network(self) -> nn.Module:
        """PN; raises if the search has none."""
        if self.predictor is None:
            raise ValueError("a search without PN predicts nothing.")
        return self.predictor

    def sub_network(self, gates: jax.Array, rng: jax.Array) -> tuple[jax.Array, ...]:
        """The relaxed gates a, rounded, (C_l,) per gate; they have the gradient of a."""
        rounded = masks.straight_through(masks.relaxed_bernoulli(gates, rng))
        return masks.split_gates(rounded, self.problem.topology.widths)

    def task(self, gates: jax.Array, variables: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, Measured]:
        """The loss of the sub-network."""
        measured = self.problem.measure(self.sub_network(gates, rng), variables, batch)
        return measured.loss, measured

    def resource(self, gates: jax.Array, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """λ R(T, p T_total), where T is the cost of the sub-network."""
        metrics = self.problem.resource(jnp.stack([jnp.sum(gate) for gate in self.sub_network(gates, rng)]))
        return self.problem.config.resource_weight * metrics["resource_loss"], metrics

    def performance(
        self, gates: jax.Array, predictor: Any, rng: jax.Array, noise_rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """log(1 / PN(a')) with a' = clip(a + σ n, 0, 1), and the accuracy that PN predicts for the sub-network."""
        relaxed = masks.relaxed_bernoulli(gates, rng)
        noise = self.problem.config.predictor_noise * jax.random.normal(noise_rng, relaxed.shape)
        rounded = jax.lax.stop_gradient(masks.straight_through(relaxed))
        asked = jnp.stack([jnp.clip(relaxed + noise, 0.0, 1.0), rounded])
        logits: Any = self.network.apply(predictor, asked)
        return -jax.nn.log_sigmoid(logits[0]), jax.nn.sigmoid(logits[1])

    def init(self, rng: jax.Array) -> State:
        """The state before the first step: almost all gates are open, and the memory is empty."""
        gate_rng, predictor_rng = jax.random.split(rng)
        size = sum(self.problem.topology.widths)
        gates = self.problem.config.initial_deviation * jax.random.normal(gate_rng, (size,))
        state = State(jnp.int32(0), gates, self.optimizer.init(gates), {}, {}, None)
        if self.predictor is None:
            return state
        predictor = self.predictor.init(predictor_rng, jnp.zeros((1, size)))
        return state.replace(
            predictor=predictor,
            predictor_opt_state=self.predictor_optimizer.init(predictor["params"]),
            memory=episodic.empty(self.problem.config.memory_size, size),
        )

    def step(
        self, state: State, variables: Any, batch: Any, rng: jax.Array, devices: Devices = ONE_DEVICE
    ) -> tuple[State, dict[str, jax.Array]]:
        """One step of the search on one device; after the first mean, all devices compute the same."""
        gate_rng, noise_rng, sample_rng = jax.random.split(rng, 3)
        of_task = jax.grad(self.task, has_aux=True)(state.gates, variables, batch, gate_rng)
        # On CPU small operations wait long behind large ones. The others therefore start after those of the backbone.
        state, (gradient, measured) = jax.lax.optimization_barrier((state, devices.mean(of_task)))
        (resource, remaining), resource_gradient = jax.value_and_grad(self.resource, has_aux=True)(
            state.gates, gate_rng
        )
        metrics = measured.metrics | remaining
        loss = measured.loss + resource
        update = gradient + resource_gradient
        if state.memory is not None:
            ready = state.memory.count > self.problem.config.predictor_batch_size
            of_performance = jax.value_and_grad(self.performance, has_aux=True)
            (performance, predicted), own = of_performance(state.gates, state.predictor, gate_rng, noise_rng)
            if self.problem.config.projection:
                own = project(own, gradient, self.problem.topology.widths)
            update = update + jnp.where(ready, own, 0.0)
            loss = loss + jnp.where(ready, performance, 0.0)
            state, predictor_loss = self.learn(state, state.memory, gate_rng, sample_rng, measured.performance)
            judged = {
                "predicted_noisy_top1": jnp.exp(-performance),
                "predicted_top1": predicted,
                "prediction_error": jnp.abs(predicted - measured.performance),
            }
            metrics |= {name: jnp.where(ready, 100 * value, jnp.nan) for name, value in judged.items()}
            metrics["predictor_loss"] = predictor_loss
        updates, opt_state = self.optimizer.update(update, state.opt_state, state.gates)
        gates = optax.apply_updates(state.gates, updates)
        return state.replace(step=state.step + 1, gates=gates, opt_state=opt_state), metrics | {"loss": loss}

    def learn(
        self, state: State, memory: Memory, gate_rng: jax.Array, sample_rng: jax.Array, accuracy: jax.Array
    ) -> tuple[State, jax.Array]:
        """Adds the step's sub-network to the memory and, once it holds enough pairs, trains PN for one step.

        Returns:
          The state, and PN's loss on its batch; NaN as long as PN is not trained.
        """
        config = self.problem.config
        stored = jnp.concatenate(self.sub_network(state.gates, gate_rng))
        memory = episodic.add(memory, stored, accuracy, config.memory_steps)
        ready = memory.count > config.predictor_batch_size
        pairs = episodic.sample(memory, sample_rng, config.predictor_batch_size, config.memory_balanced)
        gradient = jax.value_and_grad(self.predictor_objective, has_aux=True)
        (loss, statistics), gradients = gradient(state.predictor["params"], state.predictor, *pairs)
        updates, opt_state = self.predictor_optimizer.update(
            gradients, state.predictor_opt_state, state.predictor["params"]
        )
        learned = {**statistics, "params": optax.apply_updates(state.predictor["params"], updates)}, opt_state
        predictor, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ready, new, old), learned, (state.predictor, state.predictor_opt_state)
        )
        state = state.replace(memory=memory, predictor=predictor, predictor_opt_state=opt_state)
        return state, jnp.where(ready, loss, jnp.nan)

    def predictor_objective(
        self, params: Any, variables: Any, gates: jax.Array, accuracy: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Returns the mean absolute or squared error of PN, and PN's new batch statistics."""
        logits, statistics = self.network.apply(
            {**variables, "params": params}, gates, train=True, mutable=["batch_stats"]
        )
        error = {"absolute": jnp.abs, "squared": jnp.square}[self.problem.config.predictor_loss]
        return jnp.mean(error(jax.nn.sigmoid(logits) - accuracy)), statistics

    def propose(self, state: State) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """The importance θ, and the fraction of channels that are open with a probability of at least 1/2, per gate."""
        importance = tuple(map(np.asarray, masks.split_gates(state.gates, self.problem.topology.widths)))
        is_open = (np.maximum(np.sum(theta >= masks.OPEN_FROM), 1) / theta.size for theta in importance)
        return importance, np.array([*is_open])

    def ended(self, state: State) -> tuple[str, ...]:
        """Reports whether the proposed network costs what the budget allows, with numbers, and gives advice if not."""
        widths = self.propose(state)[1] * np.asarray(self.problem.topology.widths)
        cost = {name: float(value) for name, value in self.problem.resource(jnp.asarray(widths, jnp.float32)).items()}
        is_open = np.asarray(masks.open_probability(state.gates))
        undecided = 100 * np.mean((is_open > 0.25) & (is_open < 0.75))
        found = (
            f"the network of the open gates has {cost['remaining']:.4f} of the cost, R is {cost['resource_loss']:.4f}, "
            f"and {undecided:.1f} % of the channels are undecided (open with a probability between 1/4 and 3/4)."
        )
        faster = f"optimizer.learning_rate={self.problem.config.optimizer.learning_rate:g} raised"
        return (convergence(found, off_budget(cost["remaining"], self.problem, faster)),)


def make_optimizer(config: Fields, steps: int) -> optax.GradientTransformation:
    """AdamW of the gates, whose learning rate is multiplied by 0.1 after the fraction `decay_at` of the steps."""
    rate = optax.piecewise_constant_schedule(config.optimizer.learning_rate, {round(config.decay_at * steps): 0.1})
    return optax.adamw(rate, weight_decay=config.optimizer.weight_decay)


def build(problem: Problem) -> Search:
    """Builds the search that `problem.config`, a `Fields`, describes."""
    config, steps = problem.config, problem.steps
    search = _NPPM(
        problem,
        None if config.predictor == "none" else PREDICTORS[config.predictor](problem.topology.widths),
        make_optimizer(config, steps),
        optax.adamw(config.predictor_optimizer.learning_rate, weight_decay=config.predictor_optimizer.weight_decay),
    )
    return Search(steps, search.init, search.step, search.propose, _notes(config, steps), ended=search.ended)


def _notes(config: Fields, steps: int) -> tuple[str, ...]:
    pairs, needed = max(steps - 1, 0) // config.memory_steps, config.predictor_batch_size
    if config.predictor == "none" or pairs > needed:
        return ()
    return (
        f"The search was too short for PN, which is used once the memory holds more than {needed} pairs (before the "
        f"last step it held {pairs}): the result is that of DG.",
    )
