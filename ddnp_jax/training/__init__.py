"""Steps, schedules and the loop of every stage: base training, search and fine-tuning run through `run`."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from tqdm import tqdm

from ddnp_jax import data, files, losses, parallel
from ddnp_jax.checkpoint import Checkpoints, PreemptionGuard

# One step, seen from one device: (state, constants, (images, labels), rng) -> (state, metrics). Images are normalized
# floats (N, H, W, C); `rng` is the same on all devices; means are taken over the mapped axis "data"; metrics hold at
# least the scalar "loss".
Step = Callable[[Any, Any, tuple[jax.Array, jax.Array], jax.Array], tuple[Any, dict[str, jax.Array]]]


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def variables(state: TrainState) -> dict[str, Any]:
    """The model's variables in `state`."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def schedule(config: ml_collections.ConfigDict, updates_per_epoch: int) -> optax.Schedule:
    """Linear warm-up from 0, then step decay (x0.1 at the fractions `decay_at` of the whole run) or cosine to 0.

    Raises:
      ValueError: names the field that is wrong.
    """
    if config.warmup_epochs >= config.epochs > 0:
        raise ValueError(f"warmup_epochs={config.warmup_epochs} must be below the {config.epochs} epochs of the stage.")
    if not all(0 < fraction <= 1 for fraction in config.decay_at):
        raise ValueError(f"decay_at={tuple(config.decay_at)} must be fractions of the run, in (0, 1].")
    steps = config.epochs * updates_per_epoch
    warmup = round(config.warmup_epochs * updates_per_epoch)
    match config.schedule:
        case "step":
            boundaries = {round(fraction * steps) - warmup: 0.1 for fraction in config.decay_at}
            main = optax.piecewise_constant_schedule(config.learning_rate, boundaries)
        case "cosine":
            main = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1))
        case other:
            raise ValueError(f"schedule={other!r} is unknown; use 'step' or 'cosine'.")
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, max(warmup, 1)), main], [warmup])


def make_optimizer(config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with momentum; weight decay is added to the gradient, for every parameter.

    With `micro_batches` the gradients of as many steps are averaged and the last of them updates the parameters, which
    is the update of the whole batch. Batch statistics are those of a step: of its part of the batch alone, and averaged
    once per step.

    Args:
      config: a section of the trainer.
      steps_per_epoch: `micro_batches` for each update.
    """
    updates_per_epoch = steps_per_epoch // config.micro_batches
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule(config, updates_per_epoch), momentum=config.momentum),
    )
    if config.micro_batches == 1:
        return optimizer
    return optax.MultiSteps(optimizer, config.micro_batches).gradient_transformation()


def init_state(model_variables: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    params = model_variables["params"]
    return TrainState(jnp.int32(0), params, model_variables.get("batch_stats", {}), optimizer.init(params))


def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    teacher: nn.Module | None = None,
) -> Step:
    """The training step of `model`.

    Args:
      model: trained in training mode; batch statistics are averaged over devices after each step.
      optimizer: of the parameters.
      config: with `label_smoothing` and, for a teacher, `distillation_weight` and `distillation_temperature`.
      teacher: the unpruned network; its variables are then the step's constants.
    """

    def objective(params: Any, state: TrainState, constants: Any, batch: Any, rngs: Any) -> tuple[jax.Array, Any]:
        images, labels = batch
        state_variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(state_variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
        logits = logits.astype(jnp.float32)
        loss = losses.cross_entropy(logits, labels, config.label_smoothing)
        if teacher is not None:
            teacher_logits = teacher.apply(constants, images, train=False).astype(jnp.float32)
            soft = losses.distillation(logits, teacher_logits, config.distillation_temperature)
            loss = (1.0 - config.distillation_weight) * loss + config.distillation_weight * soft
        metrics = {"loss": loss, "top1": 100.0 * jnp.mean(jnp.argmax(logits, -1) == labels)}
        return loss, (metrics, updated["batch_stats"])

    def step(state: TrainState, constants: Any, batch: Any, rng: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        gradient, rngs = jax.grad(objective, has_aux=True), _model_rngs(rng)
        gradients, (metrics, batch_stats) = gradient(state.params, state, constants, batch, rngs)
        gradients, metrics, batch_stats = jax.lax.pmean((gradients, metrics, batch_stats), "data")
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return step


def _model_rngs(rng: jax.Array) -> dict[str, jax.Array]:
    """What a model of the user's may draw from in training mode, other numbers on every device."""
    return {"dropout": jax.random.fold_in(rng, jax.lax.axis_index("data"))}


def recalibration_step(model: nn.Module) -> Step:
    """Re-estimates batch statistics in training mode; nothing else changes."""

    def step(state: TrainState, constants: Any, batch: Any, rng: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        del constants
        _, updated = model.apply(variables(state), batch[0], train=True, mutable=["batch_stats"], rngs=_model_rngs(rng))
        batch_stats = jax.lax.pmean(updated["batch_stats"], "data")
        return state.replace(step=state.step + 1, batch_stats=batch_stats), {"loss": jnp.float32(0)}

    return step


def over_chunk(step: Step, images: data.Images, seed: int, augment: bool) -> Callable[..., Any]:
    """A step on batches of images as one scan: (state, constants, sent) -> (state, metrics (length,)).

    `constants` are {"images", "step"}: `images.on_devices` and the step's own constants; `sent` is what `images.read`
    made of `length` batches. Random numbers depend on (seed, state.step) alone, those of an augmentation on the device
    on the device too.
    """

    def body(state: Any, constants: Any, sent: Any) -> tuple[Any, dict[str, jax.Array]]:
        rng, augment_rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        augment_rng = jax.random.fold_in(augment_rng, jax.lax.axis_index("data")) if augment else None
        return step(state, constants["step"], images.batch(constants["images"], sent, augment_rng), rng)

    def run(state: Any, constants: Any, sent: Any) -> tuple[Any, dict[str, jax.Array]]:
        if len(jax.tree.leaves(sent)[0]) > 1:
            return jax.lax.scan(lambda carry, one: body(carry, constants, one), state, sent)
        state, metrics = body(state, constants, _without_leading_axis(sent))  # a scan of one step is a loop to XLA too
        return state, jax.tree.map(lambda value: value[None], metrics)

    return run


def _without_leading_axis(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def evaluator(
    forward: Callable[[Any, jax.Array], jax.Array], images: data.Images, batch_size: int, mode: str
) -> Callable[[Any, np.ndarray], dict[str, float]]:
    """Exact evaluation, every image counted once.

    Args:
      forward: (variables, normalized images) -> logits (N, K).
      images: what to evaluate on.
      batch_size: over all devices; the last batch is padded and the padding not counted.
      mode: of `parallel.data_parallel`.

    Returns:
      (variables, indices of images) -> {"top1", "top5"} in percent and the mean cross-entropy "loss".
    """

    def totals(sums: Any, constants: Any, sent: Any) -> tuple[Any, dict]:
        sent, valid = _without_leading_axis(sent)
        pixels, labels = images.batch(constants["images"], sent, None)
        logits = forward(constants["variables"], pixels).astype(jnp.float32)
        top = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == labels[:, None]
        counted = {
            "top1": 100.0 * top[:, 0],
            "top5": 100.0 * jnp.any(top, axis=-1),
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
        }
        added = jax.tree.map(lambda x: jax.lax.psum(jnp.sum(jnp.where(valid, x, 0.0)), "data"), counted)
        return jax.tree.map(jnp.add, sums, added), {}

    add_batch = parallel.data_parallel(totals, mode=mode)

    def evaluate(variables: Any, indices: np.ndarray) -> dict[str, float]:
        batches = data.evaluation_batches(indices, batch_size, process=parallel.process())
        constants = {"images": images.on_devices, "variables": parallel.replicate(variables)}
        sums = parallel.replicate({"top1": np.float32(0), "top5": np.float32(0), "loss": np.float32(0)})
        with data.read_ahead(batches, lambda b: (images.read(b[0], None), b[1]), images.threads, 1) as sent:
            for one in sent:
                sums, _ = add_batch(sums, constants, parallel.shard_batches(one))
        return {name: float(value) / len(indices) for name, value in parallel.fetch(sums).items()}

    return evaluate


class Preempted(SystemExit):
    """The run was asked to stop, saved its state and ends; the same command goes on from there."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the run, one folder of the workdir.

    Attributes:
      name: "base", "search" or "finetune".
      folder: of its checkpoints.
      steps: in all.
      steps_per_epoch: for the log.
      batch_size: images per step over all devices, for the log.
      chunk_steps: steps per dispatch.
      save_every: chunks between checkpoints and evaluations.
    """

    name: str
    folder: Path
    steps: int
    steps_per_epoch: int
    batch_size: int
    chunk_steps: int
    save_every: int


class MetricsLog:
    """`metrics.jsonl`: one line per chunk and per evaluation; a resumed stage rewrites those after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def rewind(self, stage: str, step: int) -> None:
        """Drops the lines of `stage` after `step`: they will be written again."""
        if jax.process_index() == 0 and self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            entries = ((line, json.loads(line)) for line in lines if line.endswith("\n"))
            kept = [line for line, entry in entries if entry["stage"] != stage or entry["step"] <= step]
            files.write_text(self._path, "".join(kept))

    def best(self, stage: str) -> float | None:
        """Highest top-1 accuracy of a stage on held-out training images, in percent; None of no steps."""
        entries = map(json.loads, self._path.read_text().splitlines() if self._path.exists() else ())
        found = [
            entry["validation_top1"] for entry in entries if entry["stage"] == stage and "validation_top1" in entry
        ]
        return max(found, default=None)

    def write(self, stage: str, step: int, **values: Any) -> None:
        """Appends one line."""
        if jax.process_index() == 0:
            with self._path.open("a") as file:
                file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")


def check_finite(stage: str, first_step: int, metrics: dict[str, np.ndarray]) -> None:
    """Stops at a loss that is not a number.

    Raises:
      FloatingPointError: names the stage and the step.
    """
    bad = np.flatnonzero(~np.isfinite(metrics["loss"]))
    if bad.size:
        raise _not_finite(f"the loss of stage {stage!r} is {metrics['loss'][bad[0]]} at step {first_step + bad[0] + 1}")


def check_state(stage: str, step: int, state: Any) -> None:
    """Stops before a state is saved that is not finite: an infinite gradient shows in the loss one step later only.

    Raises:
      FloatingPointError: names the stage and the step.
    """
    floats = (x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating))
    if not all(np.all(np.isfinite(x)) for x in floats):
        raise _not_finite(f"the state of stage {stage!r} is no longer finite after step {step}")


def _not_finite(what: str) -> FloatingPointError:
    return FloatingPointError(
        f"{what}; the last good checkpoint is kept: lower the learning rate or look at the data, and start in another "
        "workdir."
    )


def run(
    stage: Stage,
    chunk: Callable[..., Any],
    state: Any,
    constants: Any,
    send: Callable[[int], contextlib.AbstractContextManager[Iterator[Any]]],
    evaluate: Callable[[Any], dict[str, float]],
    log: MetricsLog,
) -> Any:
    """Runs a stage to its end, from its newest undamaged checkpoint if there is one.

    The log gets the mean of every metric over the steps of a chunk that have it; NaN says that a step has none.

    Args:
      stage: what to run.
      chunk: `over_chunk` mapped over devices by `parallel.data_parallel`.
      state: before the first step, on the host.
      constants: of `chunk`, replicated.
      send: step -> what is sent for the chunks from there to the end of the stage, of `data.read_ahead`.
      evaluate: state -> what is logged with a checkpoint; by "validation_top1", of held-out training images, the best
        one is chosen.
      log: of the run.

    Returns:
      The state after the last step, on the host.

    Raises:
      FloatingPointError: the loss or the state became NaN or infinite.
      Preempted: SIGTERM came; the state is saved.
    """
    with contextlib.ExitStack() as stack:
        checkpoints, guard, bar = map(
            stack.enter_context, (Checkpoints(stage.folder), PreemptionGuard(), _progress(stage))
        )
        step, state = checkpoints.restore(state) or (0, state)
        bar.initial = bar.n = step  # what was done before does not count for the rate
        if step == stage.steps:
            return state
        log.rewind(stage.name, step)
        clock = _Clock(stage.folder / "seconds.json")
        state = parallel.replicate(state)
        chunks = stack.enter_context(send(step))
        ready = _to_devices(next(chunks))
        while step < stage.steps:
            started = time.monotonic()
            state, measured = _dispatch(chunk, state, constants, ready)
            ready = _to_devices(next(chunks, None))  # while the devices compute
            metrics = jax.tree.map(lambda *parts: np.concatenate(parts), *parallel.fetch(measured))
            check_finite(stage.name, step, metrics)
            length = len(metrics["loss"])
            step += length
            rate = length * stage.batch_size / (time.monotonic() - started)
            known = {name: values[~np.isnan(values)] for name, values in metrics.items()}
            means = {name: float(np.mean(values)) for name, values in known.items() if values.size}
            log.write(stage.name, step, epoch=step / stage.steps_per_epoch, images_per_s=round(rate, 1), **means)
            bar.set_postfix_str(f"loss {means['loss']:.3f}, {rate:.0f} images/s", refresh=False)
            bar.update(length)
            due = step == stage.steps or (step // stage.chunk_steps) % stage.save_every == 0
            stop = guard.stop_requested() and step < stage.steps
            if due or stop:
                on_host = parallel.fetch(state)
                check_state(stage.name, step, on_host)
                held_out = evaluate(on_host) if due else {}
                if due:
                    log.write(stage.name, step, **held_out)
                checkpoints.save(step, on_host, metric=held_out.get("validation_top1"))
                clock.save()
            if stop:
                raise Preempted(f"stage {stage.name!r} is saved at step {step}; the same command goes on.")
        return parallel.fetch(state)


def _progress(stage: Stage) -> tqdm:
    return tqdm(total=stage.steps, desc=stage.name, unit="step", disable=jax.process_index() > 0)


def _to_devices(sent: Any) -> list[Any]:
    """What is sent for a chunk, as one part per dispatch, on its way to the devices; nothing for None.

    XLA:CPU runs the gradient of a convolution some twenty times slower in the body of a loop, so there every step is a
    dispatch of its own; elsewhere the chunk is one.
    """
    if sent is None:
        return []
    if jax.default_backend() != "cpu":
        return [parallel.shard_batches(sent)]
    steps = len(jax.tree.leaves(sent)[0])
    return [parallel.shard_batches(jax.tree.map(lambda x: x[i : i + 1], sent)) for i in range(steps)]  # noqa: B023


def _dispatch(chunk: Callable[..., Any], state: Any, constants: Any, parts: list[Any]) -> tuple[Any, list[Any]]:
    """Starts a chunk; returns the state and the metrics of each part, on the devices."""
    measured = []
    for part in parts:
        state, metrics = chunk(state, constants, part)
        measured.append(metrics)
    return state, measured


class _Clock:
    """Seconds that a stage took over all its runs, up to the last checkpoint of each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = seconds(path.parent)
        self._started = time.monotonic()

    def save(self) -> None:
        if jax.process_index() == 0:
            files.write_json(self._path, self._before + time.monotonic() - self._started)


def seconds(folder: Path) -> float:
    """Seconds that the stage in `folder` took, over all its runs."""
    path = folder / "seconds.json"
    return files.read_json(path) if path.exists() else 0.0
