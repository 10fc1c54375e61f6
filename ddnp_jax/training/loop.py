"""The loop of a pipeline stage (training or search), with logging, evaluation, checkpoints and resuming."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax import extras, files, parallel
from ddnp_jax.checkpoint import Checkpoints
from ddnp_jax.preemption import PreemptionGuard
from ddnp_jax.training.log import MetricsLog

with extras.needed_by("ddnp_jax.training.loop"):
    from tqdm import tqdm

Chunk = Callable[[Any, Any, Any], tuple[Any, Any]]
_SECONDS = "seconds.json"  # in the folder of a stage


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the run, one folder of the workdir.

    Attributes:
      name: "base", "search", "finetune" or "control".
      folder: Folder of its checkpoints.
      steps: Total number of steps.
      steps_per_epoch: Steps per epoch, for the log.
      batch_size: Images per step over all devices, for the log.
      chunk_steps: Steps per dispatch.
      save_every: Chunks between checkpoints and evaluations.
      made_from: Fingerprint of the stage's inputs.
    """

    name: str
    folder: Path
    steps: int
    steps_per_epoch: int
    batch_size: int
    chunk_steps: int
    save_every: int
    made_from: str = ""

    def saves_at(self, step: int) -> bool:
        """Whether the state after `step` steps is evaluated and saved."""
        return step == self.steps or (step // self.chunk_steps) % self.save_every == 0


def fit_stage(
    stage: Stage,
    chunk: Chunk,
    state: Any,
    constants: Any,
    host_batches: Callable[[int], contextlib.AbstractContextManager[Iterator[Any]]],
    evaluate: Callable[[Any], dict[str, float]],
    log: MetricsLog,
    guard: PreemptionGuard,
) -> Any:
    """Runs a stage to its end, from its newest undamaged checkpoint if there is one.

    The mean of every metric over the steps of a chunk is logged; steps where it is NaN are left out.

    Args:
      stage: Stage to run.
      chunk: `chunk_of` the stage's step, mapped over devices by `parallel.data_parallel`.
      state: State before the first step, on the host.
      constants: Constants of `chunk`, replicated.
      host_batches: Step -> what the host reads for the chunks from there to the end of the stage, of `data.read_ahead`.
      evaluate: State -> metrics to log with a checkpoint; "validation_top1", on held-out training images, determines
        the best one.
      log: Log of the run.
      guard: Requests the stage to stop; entered by the caller.

    Returns:
      The state after the last step, on the host.

    Raises:
      FloatingPointError: The loss or the state became NaN or infinite.
      Preempted: SIGTERM was received; the same command resumes the stage.
      ValueError: The checkpoints or the seconds of the stage are damaged, or were made from something else.
    """
    with Checkpoints(stage.folder, made_from=stage.made_from) as checkpoints:
        step, state = checkpoints.restore(state) or (0, state)
        clock = _Clock(stage)
        if step == stage.steps:
            return state
        log.rewind(stage.name, step)
        state = parallel.replicate(state)
        with host_batches(step) as chunks, _progress(stage, step) as bar:
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
                means = _means(metrics)
                log.write(stage.name, step, epoch=step / stage.steps_per_epoch, images_per_s=round(rate, 1), **means)
                bar.set_postfix_str(f"loss {means['loss']:.3f}, {rate:.0f} images/s", refresh=False)
                bar.update(length)
                stop = guard.stop_requested()
                if stage.saves_at(step) or stop:
                    _save(stage, step, parallel.fetch(state), checkpoints, evaluate, log)
                    clock.save()
                if stop:
                    guard.check(f"stage {stage.name!r} is saved at step {step}; the same command resumes it.")
        return parallel.fetch(state)


def _save(
    stage: Stage,
    step: int,
    state: Any,
    checkpoints: Checkpoints,
    evaluate: Callable[[Any], dict[str, float]],
    log: MetricsLog,
) -> None:
    """Saves a state, on the host, and evaluates it if that is due."""
    check_state(stage.name, step, state)
    held_out: dict[str, float] = {}
    if stage.saves_at(step):
        held_out = evaluate(state)
        log.write(stage.name, step, **held_out)
    checkpoints.save(step, state, metric=held_out.get("validation_top1"))


def _means(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of every metric over the steps that have it."""
    known = {name: values[~np.isnan(values)] for name, values in metrics.items()}
    return {name: float(np.mean(values)) for name, values in known.items() if values.size}


def check_finite(stage: str, first_step: int, metrics: Mapping[str, np.ndarray]) -> None:
    """Checks that the loss is finite.

    Raises:
      FloatingPointError: It is not; the message names the stage and step.
    """
    bad = np.flatnonzero(~np.isfinite(metrics["loss"]))
    if bad.size:
        raise _not_finite(f"the loss of stage {stage!r} is {metrics['loss'][bad[0]]} at step {first_step + bad[0] + 1}")


def check_state(stage: str, step: int, state: Any) -> None:
    """Checks that a state is finite before it is saved: an infinite gradient affects the loss only one step later.

    Raises:
      FloatingPointError: It is not; the message names the stage and step.
    """
    floats = (x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating))
    if not all(np.all(np.isfinite(x)) for x in floats):
        raise _not_finite(f"the state of stage {stage!r} is no longer finite after step {step}")


def _not_finite(what: str) -> FloatingPointError:
    return FloatingPointError(
        f"{what}; the last good checkpoint is kept: lower the learning rate or look at the data, and start in another "
        "workdir."
    )


def _progress(stage: Stage, step: int) -> tqdm:
    """A progress bar whose rate excludes the steps of an earlier process."""
    return tqdm(total=stage.steps, initial=step, desc=stage.name, unit="step", disable=jax.process_index() > 0)


def _to_devices(host_batches: Any) -> list[Any]:
    """Starts the transfer of a chunk's host batches to the devices, one part per dispatch; nothing for None.

    XLA:CPU runs the gradient of a convolution some twenty times slower in the body of a loop, so there every step is a
    dispatch of its own; elsewhere the chunk is one.
    """
    if host_batches is None:
        return []
    if jax.default_backend() != "cpu":
        return [parallel.shard_batches(host_batches)]
    steps = len(jax.tree.leaves(host_batches)[0])
    return [parallel.shard_batches(jax.tree.map(lambda x: x[i : i + 1], host_batches)) for i in range(steps)]  # noqa: B023


def _dispatch(chunk: Chunk, state: Any, constants: Any, parts: list[Any]) -> tuple[Any, list[Any]]:
    """Starts a chunk; returns the state and the metrics of each part, on the devices."""
    measured = []
    for part in parts:
        state, metrics = chunk(state, constants, part)
        measured.append(metrics)
    return state, measured


class _Clock:
    """Seconds that a stage took over all its runs, up to the last checkpoint of each."""

    def __init__(self, stage: Stage) -> None:
        self._path = stage.folder / _SECONDS
        self._made_from = stage.made_from
        known = _read_seconds(stage.folder)
        if known.get("made_from", stage.made_from) != stage.made_from:
            raise ValueError(
                f"{self._path} was made from other weights, data or settings than those that the run has now; put back "
                "the run's own, or delete it, and the report counts from here."
            )
        self._before = known["seconds"]
        self._started = time.monotonic()

    def save(self) -> None:
        spent = self._before + time.monotonic() - self._started
        if jax.process_index() == 0:
            files.write_sealed(self._path, {"seconds": spent, "made_from": self._made_from})


def seconds(folder: Path) -> float:
    """Seconds that the stage in `folder` took, over all its runs.

    Raises:
      ValueError: The file with the seconds is damaged.
    """
    return _read_seconds(folder)["seconds"]


def _read_seconds(folder: Path) -> dict[str, Any]:
    path = folder / _SECONDS
    return files.read_sealed(path) if path.exists() else {"seconds": 0.0}
