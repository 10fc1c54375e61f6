"""Training and evaluation without the pipeline: any network, on any batches, on one device."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax import losses, parallel
from ddnp_jax.compact import check_finite
from ddnp_jax.convolutions import with_fast_convolutions
from ddnp_jax.losses import Loss
from ddnp_jax.networks import Network, Outputs, as_network, picked
from ddnp_jax.training.steps import Batch, Distillation, Metrics, Step, init_state, sgd, step_rngs, train_step
from ddnp_jax.training.steps import schedule as make_schedule

Check = Callable[[Any, int], Batch]
History = dict[str, np.ndarray]  # every metric over the steps, (steps,)


class Fitted(NamedTuple):
    """A trained network.

    Attributes:
      model: The model; a flax.nnx module holds the trained variables.
      variables: The trained variables; None for a flax.nnx module.
      history: Every metric over the steps: "loss" and, with the default loss, "top1" in percent.
    """

    model: Any
    variables: Any
    history: History

    def __str__(self) -> str:
        """What the last step measured, in one line."""
        last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in self.history.items() if len(values))
        return f"{as_network(self.model).name} after {len(self.history.get('loss', ()))} steps: {last}"


def fit(
    model: Any,
    variables: Any,
    batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    label_smoothing: float = 0.0,
    loss: Loss | None = None,
    outputs: Outputs = None,
    seed: int = 0,
    teacher: tuple[Any, Any] | None = None,
    distillation_weight: float = 0.5,
    distillation_temperature: float = 4.0,
    progress: bool = True,
) -> Fitted:
    """Trains a network using SGD with momentum, for example to fine-tune it after pruning.

    Args:
      model: A flax.linen or flax.nnx module, or a function `(variables, images) -> outputs`.
      variables: Variables to start from; None for a flax.nnx module, which holds them. They are not modified.
      batches: Reusable iterable, such as a list, of batches (images, targets) of arrays.
      steps: Number of steps, one batch each.
      learning_rate: Peak learning rate, reached after the warm-up.
      momentum: Momentum of SGD.
      weight_decay: Coefficient of L2 regularization, added to the gradients.
      schedule: 'cosine' (to 0), 'step' (x0.1 at half and at three quarters of the steps), or 'constant'.
      warmup_steps: Number of steps of linear warm-up from 0.
      label_smoothing: Label smoothing of the default loss.
      loss: Loss `(outputs, targets) -> scalar`; None for the cross-entropy with integer labels.
      outputs: Which of the network's outputs to use, if there are several: a key, an index or a function.
      seed: Seed of the network's random operations in training mode, such as dropout.
      teacher: (model, variables) of a teacher network for knowledge distillation.
      distillation_weight: Weight of the distillation loss.
      distillation_temperature: Temperature of the distillation loss.
      progress: Whether to print progress.

    Returns:
      The trained network and its history.

    Raises:
      ValueError: An argument is invalid, or the batches end before the last step.
      FloatingPointError: The loss became NaN or infinite; the message names the step.
    """
    if loss is not None and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} is for the default loss; smooth the targets in loss=.")
    network = as_network(model)
    distillation, constants = None, None
    if teacher is not None:
        taught_by = as_network(teacher[0])
        constants = taught_by.variables(teacher[1])
        distillation = Distillation(taught_by, distillation_weight, distillation_temperature)
    optimizer = sgd(make_schedule(schedule, learning_rate, steps, warmup_steps), momentum, weight_decay)
    step = train_step(
        network, optimizer, label_smoothing=label_smoothing, loss=loss, outputs=outputs, distillation=distillation
    )
    state = init_state(network, network.variables(variables), optimizer)
    check = TargetsCheck(network, network.variables(variables), loss, outputs)
    state, history = take_steps(step, state, constants, batches, steps, seed, "fit" if progress else "", check)
    fitted = jax.tree.map(jnp.asarray, state.variables(network))
    return Fitted(*network.bind(fitted), history)


def evaluate(
    model: Any,
    variables: Any,
    batches: Iterable[Batch],
    *,
    loss: Loss | None = None,
    outputs: Outputs = None,
) -> dict[str, float]:
    """Evaluates a network in evaluation mode; every image counts once, whatever the sizes of the batches.

    Args:
      model: A flax.linen or flax.nnx module, or a function `(variables, images) -> outputs`.
      variables: Its variables; None for a flax.nnx module, which holds them.
      batches: Batches (images, targets) of arrays, each read once.
      loss: Loss `(outputs, targets) -> scalar`, the mean over the images; None for the cross-entropy with integer
        labels.
      outputs: Which of the network's outputs to use, if there are several: a key, an index or a function.

    Returns:
      Means over all images: "loss" and, with the default loss, the accuracy "top1" in percent.

    Raises:
      ValueError: There are no batches, a batch does not match the network or the loss, or a variable is not finite.
    """
    network = as_network(model)
    own = network.variables(variables)
    check_finite(own, network.name)
    check = TargetsCheck(network, own, loss, outputs)

    forward = with_fast_convolutions(network.evaluate)

    @jax.jit
    def measure(own: Any, images: jax.Array, targets: Any) -> Metrics:
        return losses.measure(forward(own, images), targets, loss, outputs, name=network.name)

    counts, found = [], []
    for number, batch in enumerate(batches):
        images, targets = check(batch, number)
        counts.append(len(images))
        found.append(jax.device_get(measure(own, images, targets)))
    if not found:
        raise ValueError("batches is empty; give batches (images, targets) of arrays.")
    return {name: float(np.average([each[name] for each in found], weights=counts)) for name in found[0]}


def take_steps(
    step: Step,
    state: Any,
    constants: Any,
    batches: Iterable[Batch],
    steps: int,
    seed: int,
    report_as: str = "",
    check: Check | None = None,
) -> tuple[Any, History]:
    """Runs steps on one device, with the same random numbers as the pipeline for the same seed.

    Args:
      step: The step.
      state: State before the first step; it is copied.
      constants: Constants of the step.
      batches: Reusable iterable of batches (images, targets).
      steps: Number of steps.
      seed: Seed of the steps' random keys.
      report_as: Name under which to print progress; "" to print nothing.
      check: (batch, its number) -> (images, targets), or raises ValueError; None for `checked_batch`.

    Returns:
      The state after the last step, on the host; and every metric over the steps.

    Raises:
      ValueError: The batches end before the last step.
      FloatingPointError: The loss became NaN or infinite.
    """

    def take(state: Any, constants: Any, batch: Batch, number: jax.Array) -> tuple[Any, Metrics]:
        return step(state, constants, batch, step_rngs(seed, number)[0])

    compiled = jax.jit(take, donate_argnums=0)
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
    constants = jax.tree.map(jnp.asarray, constants)
    history: list[dict[str, np.ndarray]] = []
    checked = _repeated(batches, steps, check or checked_batch)
    with _Progress(report_as, steps) as progress, contextlib.closing(checked) as repeated:
        pending = None  # read while the device computes the next step
        for number, batch in enumerate(repeated):
            state, metrics = compiled(state, constants, batch, np.int32(number))
            if pending is not None:
                history.append(_checked(pending, number))
                progress.show(number, history[-1]["loss"])
            pending = metrics
        if pending is not None:
            history.append(_checked(pending, steps))
            progress.show(steps, history[-1]["loss"])
    names = history[0] if history else {}
    return parallel.fetch(state), {name: np.array([entry[name] for entry in history]) for name in names}


def checked_batch(batch: Any, number: int = 0) -> Batch:
    """A batch (images, targets) as arrays, whatever the loss.

    Args:
      batch: The batch.
      number: Number of the batch, from 0, for messages.

    Raises:
      ValueError: It is something else, or its images are not finite; a ReLU would hide that.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"batch {number} is of type {type(batch).__name__}; a batch must be (images, targets), and several are a "
            "list or another iterable of them: [(images, targets)] for a single one."
        )
    images, targets = jnp.asarray(batch[0]), jax.tree.map(jnp.asarray, batch[1])
    if jnp.issubdtype(images.dtype, jnp.floating) and not bool(jnp.isfinite(images).all()):
        raise ValueError(f"the images of batch {number} contain NaN or infinite values; give finite images.")
    return images, targets


class TargetsCheck:
    """Checks batches, including whether the targets match the network's outputs and the loss."""

    def __init__(
        self, network: Network, variables: Any, loss: Loss | None, outputs: Outputs, performance: Loss | None = None
    ) -> None:
        """Takes the network, its variables, and `loss`, `outputs` and `performance` as in `prune`."""
        self._network, self._variables = network, jax.eval_shape(lambda: variables)
        self._loss, self._outputs, self._performance = loss, outputs, performance
        self._found: Any = None  # shapes of what the network returns for the first batch

    def __call__(self, batch: Any, number: int = 0) -> Batch:
        """As `checked_batch`.

        Raises:
          ValueError: See there; the outputs or labels do not fit the default loss; or a custom loss cannot be computed.
        """
        images, targets = checked_batch(batch, number)
        is_first = self._found is None
        if is_first:
            with self._network.calling(images):
                self._found = jax.eval_shape(self._network.evaluate, self._variables, images)
        if self._loss is None:
            logits = jax.eval_shape(lambda found: picked(found, self._outputs, self._network.name), self._found)
            losses.check_labels((len(images), *logits.shape[1:]), targets, self._network.name, number)
        if is_first:
            self._check_own(targets)
        return images, targets

    def _check_own(self, targets: Any) -> None:
        for argument, own in (("loss", self._loss), ("performance", self._performance)):
            if own is not None:
                losses.check_loss(own, self._found, targets, self._outputs, self._network.name, argument)


def _checked(metrics: Metrics, step: int) -> dict[str, np.ndarray]:
    """Fetches a step's metrics to the host and checks that its loss is finite."""
    found = jax.tree.map(np.asarray, jax.device_get(metrics))
    if not np.isfinite(found["loss"]):
        raise FloatingPointError(
            f"the loss is {found['loss']} at step {step}; lower the learning rate, or check the images and targets."
        )
    return found


def _repeated(batches: Iterable[Batch], steps: int, check: Check) -> Generator[Batch, None, None]:
    """Yields one batch per step, restarting the iterable when it ends.

    Raises:
      ValueError: The batches end and cannot be iterated again.
    """
    read = 0
    while read < steps:
        before = read
        for number, batch in enumerate(batches):
            yield check(batch, number)
            read += 1
            if read == steps:
                return
        if read == before:
            raise ValueError(
                f"the batches ended after {read} of {steps} steps and cannot be iterated again; give a list, or "
                "another reusable iterable."
            )


class _Progress:
    """Prints progress to standard error, about once a second on a terminal and ten times in total elsewhere."""

    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps = name, steps
        self._live = sys.stderr.isatty()
        self._last = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._name and self._live:
            print(file=sys.stderr)

    def show(self, step: int, loss: Any) -> None:
        if not self._name:
            return
        line = f"{self._name}: step {step} of {self._steps}, loss {loss:.4f}"
        if self._live:
            if time.monotonic() - self._last >= 1 or step == self._steps:
                self._last = time.monotonic()
                print(f"\r{line}", end="", file=sys.stderr, flush=True)
        elif step % max(self._steps // 10, 1) == 0 or step == self._steps:
            print(line, file=sys.stderr, flush=True)
