"""The training step, its state, its learning rate schedule and its optimizer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ddnp_jax import losses
from ddnp_jax.convolutions import with_fast_convolutions
from ddnp_jax.losses import Loss
from ddnp_jax.networks import Network, Outputs, picked
from ddnp_jax.parallel import ONE_DEVICE, OVER_DEVICES, Devices

Batch = tuple[Any, Any]  # images, normalized floats (N, H, W, C), and targets
Metrics = dict[str, jax.Array]


class Images(Protocol):
    """What `chunk_of` needs of a data set: `ddnp_jax.data.Images`."""

    def batch(self, on_devices: Any, sent: Any, rng: jax.Array | None) -> Batch:
        """Makes normalized images and labels of what the host has read."""


class Step(Protocol):
    """One step, seen from one device."""

    def __call__(
        self, state: Any, constants: Any, batch: Batch, rng: jax.Array, devices: Devices = ONE_DEVICE
    ) -> tuple[Any, Metrics]:
        """Takes the step.

        Args:
          state: State before the step; it counts the steps in its attribute `step`.
          constants: Inputs that do not change between steps.
          batch: This device's share of the batch.
          rng: Random key, the same on all devices.
          devices: The devices that share the batch.

        Returns:
          The state after the step and its metrics, among them the scalar "loss"; both are the same on all devices.
        """


class TrainState(flax.struct.PyTreeNode):
    """The state of training.

    Attributes:
      step: Number of steps taken, int32.
      parameters: The trainable parameters, as in `Network.split`.
      rest: The network's other variables, such as batch statistics.
      opt_state: State of the optimizer.
    """

    step: jax.Array
    parameters: Any
    rest: Any
    opt_state: Any

    def variables(self, network: Network) -> Any:
        """The network's variables."""
        return network.merge(self.parameters, self.rest)


def init_state(network: Network, variables: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    parameters, rest = network.split(variables)
    return TrainState(jnp.int32(0), parameters, rest, optimizer.init(parameters))


SCHEDULES = ("constant", "cosine", "step")


def schedule(
    kind: str, learning_rate: float, steps: int, warmup_steps: int = 0, decay_at: Sequence[float] = (0.5, 0.75)
) -> optax.Schedule:
    """Linear warm-up from 0, then a constant, step-decay or cosine-decay learning rate.

    Args:
      kind: 'constant', 'cosine', or 'step' (x0.1 at each of `decay_at`).
      learning_rate: Peak learning rate, reached after the warm-up.
      steps: Total number of updates.
      warmup_steps: Number of updates of the warm-up.
      decay_at: Fractions of `steps`.

    Raises:
      ValueError: An argument is invalid; the message names it.
    """
    if warmup_steps >= steps > 0:
        raise ValueError(f"warmup_steps={warmup_steps} must be below the {steps} steps.")
    match kind:
        case "constant":
            main = optax.constant_schedule(learning_rate)
        case "cosine":
            main = optax.cosine_decay_schedule(learning_rate, max(steps - warmup_steps, 1))
        case "step":
            check_decay(decay_at)
            boundaries = {round(fraction * steps) - warmup_steps: 0.1 for fraction in decay_at}
            main = optax.piecewise_constant_schedule(learning_rate, boundaries)
        case _:
            raise ValueError(f"schedule={kind!r} is unknown; use one of {', '.join(map(repr, SCHEDULES))}.")
    warmup = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
    return optax.join_schedules([warmup, main], [warmup_steps])


def check_decay(decay_at: Sequence[float]) -> None:
    """Checks that the moments of decay are fractions of the run.

    Raises:
      ValueError: One of them is not in (0, 1].
    """
    if not all(0 < fraction <= 1 for fraction in decay_at):
        raise ValueError(f"decay_at={tuple(decay_at)} must be fractions of the run, in (0, 1].")


def sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: float, weight_decay: float, micro_batches: int = 1
) -> optax.GradientTransformation:
    """SGD with momentum; weight decay is added to the gradient, for every parameter.

    With `micro_batches`, gradients are accumulated: those of as many steps are averaged, and the last step updates the
    parameters with the gradient of the full batch. Batch statistics are those of each micro-batch, averaged once per
    step.

    Args:
      learning_rate: Rate, or schedule over updates.
      momentum: Momentum.
      weight_decay: Coefficient of L2 regularization, added to the gradients.
      micro_batches: Number of micro-batches (steps) per update.
    """
    optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum=momentum))
    if micro_batches == 1:
        return optimizer
    return optax.MultiSteps(optimizer, micro_batches).gradient_transformation()


class Distillation(NamedTuple):
    """Knowledge distillation; the teacher's variables are the constants of the training step.

    Attributes:
      teacher: The teacher network.
      weight: Weight of the distillation loss.
      temperature: Temperature of the softmax.
    """

    teacher: Network
    weight: float
    temperature: float


def train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    loss: Loss | None = None,
    outputs: Outputs = None,
    distillation: Distillation | None = None,
) -> Step:
    """Makes the training step of a network, whose state is a `TrainState`.

    Args:
      network: Network to train; batch statistics that it computes are averaged over devices after each step.
      optimizer: Optimizer of its parameters.
      label_smoothing: Label smoothing of the default loss.
      loss: Loss `(outputs, targets) -> scalar`; None for the cross-entropy with integer labels and "top1" as a metric.
      outputs: Which of the network's outputs to use: a key, an index or a function; see `networks.picked`.
      distillation: Knowledge distillation; None for none.
    """

    def objective(
        parameters: Any, state: TrainState, constants: Any, batch: Batch, rng: jax.Array, batch_axis: str | None
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        images, targets = batch
        train = with_fast_convolutions(functools.partial(network.train, batch_axis=batch_axis))
        found, variables = train(network.merge(parameters, state.rest), images, rng)
        metrics = losses.measure(found, targets, loss, outputs, label_smoothing, network.name)
        value = metrics["loss"]
        if distillation is not None:
            soft = _soft_loss(distillation, network, found, outputs, constants, images)
            value = (1.0 - distillation.weight) * value + distillation.weight * soft
        return value, ({**metrics, "loss": value}, network.split(variables)[1])

    def step(
        state: TrainState, constants: Any, batch: Batch, rng: jax.Array, devices: Devices = ONE_DEVICE
    ) -> tuple[TrainState, Metrics]:
        own_rng = jax.random.fold_in(rng, devices.number())
        gradient = jax.grad(objective, has_aux=True)
        gradients, (metrics, rest) = gradient(state.parameters, state, constants, batch, own_rng, devices.batch_axis)
        gradients, metrics = devices.mean((gradients, metrics))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        return TrainState(state.step + 1, parameters, _mean_statistics(rest, devices), opt_state), metrics

    return step


def _soft_loss(
    distillation: Distillation, network: Network, found: Any, outputs: Outputs, teacher_variables: Any, images: Any
) -> jax.Array:
    teacher = distillation.teacher
    known = picked(teacher.evaluate(teacher_variables, images), outputs, teacher.name).astype(jnp.float32)
    logits = picked(found, outputs, network.name).astype(jnp.float32)
    return losses.distillation(logits, known, distillation.temperature)


def _mean_statistics(rest: Any, devices: Devices) -> Any:
    """Averages all floats over devices; other leaves, such as counts and random keys, are the same on all."""
    leaves, tree = jax.tree.flatten(rest)
    floats = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    means = iter(devices.mean([leaf for leaf, is_float in zip(leaves, floats, strict=True) if is_float]))
    merged = [next(means) if is_float else leaf for leaf, is_float in zip(leaves, floats, strict=True)]
    return jax.tree.unflatten(tree, merged)


def recalibration_step(network: Network) -> Step:
    """Makes a step that re-estimates batch statistics in training mode and changes nothing else."""

    def step(
        state: TrainState, constants: Any, batch: Batch, rng: jax.Array, devices: Devices = ONE_DEVICE
    ) -> tuple[TrainState, Metrics]:
        del constants
        own_rng = jax.random.fold_in(rng, devices.number())
        _, variables = network.train(state.variables(network), batch[0], own_rng, devices.batch_axis)
        rest = _mean_statistics(network.split(variables)[1], devices)
        return state.replace(step=state.step + 1, rest=rest), {"loss": jnp.float32(0)}

    return step


def step_rngs(seed: int, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The random keys of a step and of the augmentation of its batch: a function of (seed, step) alone."""
    rng, augment_rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return rng, augment_rng


def chunk_of(
    step: Step, images: Images, seed: int, augment: bool, devices: Devices = OVER_DEVICES
) -> Callable[[Any, Any, Any], tuple[Any, Metrics]]:
    """Several steps as one function: (state, constants, host_batches) -> (state, metrics (length,)), one scan.

    Args:
      step: The step.
      images: Images that the batches are of.
      seed: Seed of the random numbers, which depend on (seed, state.step) alone; those of an augmentation on the
        device depend on the device too.
      augment: Whether the images are augmented.
      devices: The devices that share each batch.

    Returns:
      A function whose `constants` are {"images", "step"}: `images.on_devices` and the step's own constants; and whose
      `host_batches` are what `images.read` made of `length` batches.
    """

    def body(state: Any, constants: Any, host_batch: Any) -> tuple[Any, Metrics]:
        rng, augment_rng = step_rngs(seed, state.step)
        own_rng = jax.random.fold_in(augment_rng, devices.number()) if augment else None
        return step(state, constants["step"], images.batch(constants["images"], host_batch, own_rng), rng, devices)

    def chunk(state: Any, constants: Any, host_batches: Any) -> tuple[Any, Metrics]:
        if len(jax.tree.leaves(host_batches)[0]) > 1:
            return jax.lax.scan(lambda carry, one: body(carry, constants, one), state, host_batches)
        state, metrics = body(
            state, constants, without_leading_axis(host_batches)
        )  # XLA treats a scan of length one as a loop too
        return state, jax.tree.map(lambda value: value[None], metrics)

    return chunk


def without_leading_axis(tree: Any) -> Any:
    """The first element along the leading axis of every array."""
    return jax.tree.map(lambda x: x[0], tree)
