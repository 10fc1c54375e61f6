"""Steps, schedules and the loop of every stage: base training, search and fine-tuning run through `run`."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
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

from ddnp_jax import data, losses, parallel
from ddnp_jax.checkpoint import Checkpoints, PreemptionGuard, write_json_atomic

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


def schedule(config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Linear warm-up from 0, then step decay (x0.1 at the fractions `decay_at` of the whole run) or cosine to 0."""
    steps = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
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
    """SGD with momentum; weight decay is added to the gradient, for every parameter."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule(config, steps_per_epoch), momentum=config.momentum),
    )


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

    def objective(params: Any, state: TrainState, constants: Any, batch: Any) -> tuple[jax.Array, Any]:
        images, labels = batch
        state_variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(state_variables, images, train=True, mutable=["batch_stats"])
        logits = logits.astype(jnp.float32)
        loss = losses.cross_entropy(logits, labels, config.label_smoothing)
        if teacher is not None:
            teacher_logits = teacher.apply(constants, images, train=False).astype(jnp.float32)
            soft = losses.distillation(logits, teacher_logits, config.distillation_temperature)
            loss = (1.0 - config.distillation_weight) * loss + config.distillation_weight * soft
        metrics = {"loss": loss, "top1": 100.0 * jnp.mean(jnp.argmax(logits, -1) == labels)}
        return loss, (metrics, updated["batch_stats"])

    def step(state: TrainState, constants: Any, batch: Any, rng: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        del rng
        gradients, (metrics, batch_stats) = jax.grad(objective, has_aux=True)(state.params, state, constants, batch)
        gradients, metrics, batch_stats = jax.lax.pmean((gradients, metrics, batch_stats), "data")
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return step


def recalibration_step(model: nn.Module) -> Step:
    """Re-estimates batch statistics in training mode; nothing else changes."""

    def step(state: TrainState, constants: Any, batch: Any, rng: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        del constants, rng
        _, updated = model.apply(variables(state), batch[0], train=True, mutable=["batch_stats"])
        batch_stats = jax.lax.pmean(updated["batch_stats"], "data")
        return state.replace(step=state.step + 1, batch_stats=batch_stats), {"loss": jnp.float32(0)}

    return step


def over_chunk(step: Step, pixels: ml_collections.ConfigDict, seed: int, augment: bool) -> Callable[..., Any]:
    """A step on index batches as one scan: (state, constants, (length, batch) indices) -> (state, metrics (length,)).

    `pixels` is the `data` section: mean, std, pad and flip.
    `constants` are {"images", "labels", "step"}: the data set on the device and the step's own constants. Random
    numbers depend on (seed, state.step) alone, those of the augmentation on the device too.
    """

    def body(state: Any, constants: Any, indices: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        rng, augment_rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        images = constants["images"][indices]
        if augment:
            augment_rng = jax.random.fold_in(augment_rng, jax.lax.axis_index("data"))
            images = data.augment(augment_rng, images, pixels.pad, pixels.flip)
        batch = data.normalize(images, pixels.mean, pixels.std), constants["labels"][indices]
        return step(state, constants["step"], batch, rng)

    def run(state: Any, constants: Any, indices: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        if len(indices) > 1:
            return jax.lax.scan(lambda carry, index: body(carry, constants, index), state, indices)
        state, metrics = body(state, constants, indices[0])  # a scan of one step is still a loop to XLA
        return state, jax.tree.map(lambda value: value[None], metrics)

    return run


def evaluator(
    forward: Callable[[Any, jax.Array], jax.Array], pixels: ml_collections.ConfigDict, batch_size: int, mode: str
) -> Callable[[Any, np.ndarray, np.ndarray], dict[str, float]]:
    """Exact evaluation over every image.

    Args:
      forward: (variables, normalized images) -> logits (N, K).
      pixels: the `data` section: mean and std.
      batch_size: over all devices; the last batch is padded and the padding not counted.
      mode: of `parallel.data_parallel`.

    Returns:
      (variables, uint8 images, labels) -> {"top1", "top5"} in percent and the mean cross-entropy "loss".
    """

    def totals(sums: Any, constants: Any, batches: Any) -> tuple[Any, dict]:
        def body(sums: Any, batch: Any) -> tuple[Any, None]:
            indices, valid = batch
            images = data.normalize(constants["images"][indices], pixels.mean, pixels.std)
            logits = forward(constants["variables"], images).astype(jnp.float32)
            labels = constants["labels"][indices]
            top = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == labels[:, None]
            counted = {
                "top1": 100.0 * top[:, 0],
                "top5": 100.0 * jnp.any(top, axis=-1),
                "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
            }
            added = jax.tree.map(lambda x: jax.lax.psum(jnp.sum(jnp.where(valid, x, 0.0)), "data"), counted)
            return jax.tree.map(jnp.add, sums, added), None

        return jax.lax.scan(body, sums, batches)[0], {}

    run_all = parallel.data_parallel(totals, mode=mode)

    def evaluate(model_variables: Any, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        rank, count = jax.process_index(), jax.process_count()
        indices, valid = (np.split(a, count, axis=1)[rank] for a in data.evaluation_batches(len(labels), batch_size))
        constants = parallel.replicate({"variables": model_variables, "images": images, "labels": labels})
        zeros = parallel.replicate({"top1": np.float32(0), "top5": np.float32(0), "loss": np.float32(0)})
        sums, _ = run_all(zeros, constants, parallel.shard_batches((indices, valid)))
        return {name: float(value) / len(labels) for name, value in parallel.fetch(sums).items()}

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
      steps_per_epoch: for the progress bar and the log.
      chunk_steps: steps per dispatch.
      save_every: chunks between checkpoints and evaluations.
    """

    name: str
    folder: Path
    steps: int
    steps_per_epoch: int
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
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            temporary.replace(self._path)

    def best(self, stage: str) -> float:
        """Highest top-1 accuracy of a stage on held-out training images, in percent."""
        entries = map(json.loads, self._path.read_text().splitlines())
        return max(
            entry["validation_top1"] for entry in entries if entry["stage"] == stage and "validation_top1" in entry
        )

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
    batches: Sequence[np.ndarray],
    evaluate: Callable[[Any], dict[str, float]],
    log: MetricsLog,
) -> Any:
    """Runs a stage to its end, from its newest undamaged checkpoint if there is one.

    Args:
      stage: what to run.
      chunk: `over_chunk` mapped over devices by `parallel.data_parallel`.
      state: before the first step, on the host.
      constants: of `chunk`, replicated.
      batches: of `data.batches`.
      evaluate: state -> what is logged with a checkpoint; by "validation_top1", of held-out training images, the best
        one is chosen.
      log: of the run.

    Returns:
      The state after the last step, on the host.

    Raises:
      FloatingPointError: the loss or the state became NaN or infinite.
      Preempted: SIGTERM came; the state is saved.
    """
    with Checkpoints(stage.folder) as checkpoints, PreemptionGuard() as guard, _progress(stage) as bar:
        step, state = checkpoints.restore(state) or (0, state)
        bar.initial = bar.n = step  # what was done before does not count for the rate
        if step == stage.steps:
            return state
        log.rewind(stage.name, step)
        clock = _Clock(stage.folder / "seconds.json")
        state = parallel.replicate(state)
        while step < stage.steps:
            started = time.monotonic()
            indices = data.chunk(batches, step, min(stage.chunk_steps, stage.steps - step))
            state, metrics = _dispatch(chunk, state, constants, indices)
            rate = indices.size * jax.process_count() / (time.monotonic() - started)
            check_finite(stage.name, step, metrics)
            step += len(indices)
            means = {name: float(np.mean(values)) for name, values in metrics.items()}
            log.write(stage.name, step, epoch=step / stage.steps_per_epoch, images_per_s=round(rate, 1), **means)
            bar.set_postfix_str(f"loss {means['loss']:.3f}, {rate:.0f} images/s", refresh=False)
            bar.update(len(indices))
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


def _dispatch(
    chunk: Callable[..., Any], state: Any, constants: Any, indices: np.ndarray
) -> tuple[Any, dict[str, np.ndarray]]:
    """Runs a chunk; returns the state on the devices and the metrics (length,) on the host.

    XLA:CPU runs the gradient of a convolution some twenty times slower in the body of a loop, so there every step is a
    dispatch of its own; elsewhere the chunk is one.
    """
    dispatches = len(indices) if jax.default_backend() == "cpu" else 1
    metrics = []
    for part in np.split(indices, dispatches):
        state, measured = chunk(state, constants, parallel.shard_batches(part))
        metrics.append(measured)
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *parallel.fetch(metrics))


class _Clock:
    """Seconds that a stage took over all its runs, up to the last checkpoint of each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = seconds(path.parent)
        self._started = time.monotonic()

    def save(self) -> None:
        if jax.process_index() == 0:
            write_json_atomic(self._path, self._before + time.monotonic() - self._started)


def seconds(folder: Path) -> float:
    """Seconds that the stage in `folder` took, over all its runs."""
    path = folder / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else 0.0
