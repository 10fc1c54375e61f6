"""Checkpoints of the stages of a run, written by orbax.

Orbax saves atomically. However, it restores arrays with flipped bits without an error, and may raise any error for a
missing or truncated file. Each checkpoint therefore has a record with a SHA-256 per leaf. A checkpoint that does not
match its record is set aside, and the previous checkpoint is used.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from ddnp_jax import files, parallel


class _DamagedError(Exception):
    """Raised for a damaged checkpoint, with the reason."""


class Checkpoints:
    """The checkpoints of one stage of a run, as a context manager that waits for all writes on exit.

    The latest `keep` checkpoints and the one with the highest metric are kept. In a run with several processes, all of
    them make every call, with a directory that all of them can access.
    """

    def __init__(self, directory: str | Path, keep: int = 2, made_from: str = "") -> None:
        """Opens the directory, or creates it.

        Args:
          directory: Directory of this stage only.
          keep: Number of latest checkpoints to keep; with 2 there is one to fall back to.
          made_from: Fingerprint of the inputs of the states; checkpoints with another one are not restored. "" restores
            any.
        """
        self.directory = Path(directory).absolute()
        self._made_from = made_from
        self._metrics: dict[int, float | None] = {}
        policy = policies.AnyPreservationPolicy([policies.LatestN(keep), _KeepBest(self._metrics)])
        # The metric is in our record: orbax's own metrics have no checksum, and opening fails if their file is damaged.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, cleanup_tmp_directories=True, lightweight_initialize=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        for step in self._manager.all_steps():
            self._metrics[step] = self._metric(step)

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits until everything is written."""
        self._manager.close()

    def save(self, step: int, state: Any, metric: float | None = None) -> None:
        """Saves a pytree; the files are written in the background.

        Args:
          step: Number of the step; a state that is already saved for its step is not saved again.
          state: Pytree of arrays, replicated if they are on devices.
          metric: Metric of the state, higher is better; None if it was not evaluated.

        Raises:
          ValueError: The metric is not finite, two leaves share a name, or the step holds another state.
        """
        if metric is not None and not math.isfinite(metric):
            raise ValueError(f"metric={metric} of step {step} is not finite; save the state without a metric.")
        metric = None if metric is None else float(metric)
        leaves = {name: _key_data(x) for name, x in _named(parallel.fetch(state)).items()}
        record: dict[str, Any] = {
            "metric": metric,
            "made_from": self._made_from,
            "leaves": {name: _describe(x) | {"sha256": _sha256(x)} for name, x in leaves.items()},
        }
        if step in self._manager.all_steps():
            if self._holds(step, record["leaves"]):
                return
            raise ValueError(
                f"Checkpoint {step} in {self.directory} holds another state; "
                "restore before the first save, or use another workdir."
            )
        self._metrics[step] = metric
        arrays = {name: x for name, x in leaves.items() if x.size}  # orbax does not support empty arrays
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record | {"sha256": files.checksum(record)})
        )
        self._manager.save(step, args=args, force=True)  # without `force`, orbax skips steps below the latest one

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """Reads the newest undamaged checkpoint.

        Newer checkpoints that are damaged are logged and renamed to `<step>.damaged`, so that their steps can be saved
        again.

        Args:
          template: Pytree with the structure, shapes and dtypes of the state: arrays, or, except for random keys,
            `jax.ShapeDtypeStruct`.

        Returns:
          The step, and the state as numpy arrays with the bits that were saved; None if there is no checkpoint.

        Raises:
          ValueError: The checkpoint was made from other inputs, does not match the template (the message names the
            first leaf that differs), or all existing checkpoints are damaged.
        """
        return self._first_undamaged(sorted(self._manager.all_steps(), reverse=True), template)

    def restore_best(self, template: Any) -> tuple[int, Any] | None:
        """Reads the undamaged checkpoint with the highest metric (the newest of several), otherwise like `restore`.

        Returns:
          The step and the state; None if no checkpoint was saved with a metric.
        """
        steps = [step for step in self._manager.all_steps() if self._metrics[step] is not None]
        return self._first_undamaged(sorted(steps, key=lambda s: (self._metrics[s], s), reverse=True), template)

    def _first_undamaged(self, steps: Iterable[int], template: Any) -> tuple[int, Any] | None:
        self._manager.wait_until_finished()  # a failed save raises here, so that it does not count as damage below
        damaged: dict[int, str] = {}
        for step in steps:
            reason, state = "", None
            try:
                state = self._read(step, template)
            except _DamagedError as error:
                reason = str(error)
            if parallel.any_process(bool(reason)):
                damaged[step] = reason or "another process cannot read it"
                continue
            self._set_aside(damaged)
            return step, state
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise ValueError(
                f"Every checkpoint in {self.directory} is damaged ({reasons}); "
                "restore a good copy, or delete the directory to start this stage again."
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        for step, reason in damaged.items():
            logging.warning("Checkpoint %d in %s is damaged and set aside: %s", step, self.directory, reason)
            self._metrics.pop(step)
            names = (f"{step}.damaged{suffix}" for suffix in itertools.chain([""], itertools.count(2)))
            target = next(path for path in map(self.directory.joinpath, names) if not path.exists())
            parallel.on_first_process(functools.partial((self.directory / str(step)).rename, target))
        if damaged:
            self._manager.reload()

    def _read(self, step: int, template: Any) -> Any:
        """Reads and verifies one checkpoint, or raises `_DamagedError`."""
        record = self._record(step)
        if self._made_from and record.get("made_from", self._made_from) != self._made_from:
            raise ValueError(
                f"Checkpoint {step} in {self.directory} was made from other weights, data or settings than those that "
                "the run has now; restore the earlier ones, or delete this folder to repeat its stage."
            )
        named = _named(template)
        wanted = {name: _key_data(x) for name, x in named.items()}
        self._check_fit(step, record["leaves"], wanted)
        empty = {name: np.empty(x.shape, x.dtype) for name, x in wanted.items()}
        targets = {name: x for name, x in empty.items() if x.size}
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(targets))
        try:
            leaves = empty | self._manager.restore(step, args=args)["arrays"]
        except Exception as error:  # orbax may raise any error, even a plain Exception
            raise _DamagedError(_one_line(error)) from error
        for name in wanted:
            if _sha256(leaves[name]) != record["leaves"][name]["sha256"]:
                raise _DamagedError(f"leaf {name} does not have the SHA-256 that it was saved with")
        restored = [
            _as_key(leaves[name], like) if parallel.is_key(like) else leaves[name] for name, like in named.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(template), restored)

    def _check_fit(self, step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for name in [*wanted, *saved]:
            there = f"{tuple(saved[name]['shape'])} {saved[name]['dtype']}" if name in saved else "absent"
            here = f"{tuple(wanted[name].shape)} {wanted[name].dtype}" if name in wanted else "absent"
            if there != here:
                raise ValueError(
                    f"Checkpoint {step} in {self.directory} is of another model: leaf {name} is {there} there "
                    f"and {here} here; use the config that wrote it, or another workdir."
                )

    def _record(self, step: int) -> dict[str, Any]:
        """Reads one checkpoint's record, or raises `_DamagedError`."""
        try:
            args = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = self._manager.restore(step, args=args)["record"]
            sealed = record.pop("sha256") == files.checksum(record)
        except Exception as error:  # as above
            raise _DamagedError(_one_line(error)) from error
        if not sealed:
            raise _DamagedError("record/metadata does not have the SHA-256 that it was saved with")
        return record

    def _holds(self, step: int, leaves: Mapping[str, Any]) -> bool:
        self._manager.wait_until_finished()
        try:
            return self._record(step)["leaves"] == leaves
        except _DamagedError:
            return False

    def _metric(self, step: int) -> float | None:
        try:
            return self._record(step)["metric"]
        except _DamagedError:
            return math.inf  # it may be the best one, so `restore_best` must read it and report the damage


class _KeepBest(policies.PreservationPolicy):
    """Preserves the newest of the checkpoints with the highest metric, and those whose metric cannot be read."""

    def __init__(self, metrics: Mapping[int, float | None]) -> None:
        self._metrics = metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether to keep it."""
        metrics = {c.step: self._metrics[c.step] for c in checkpoints}
        best = max(((m, step) for step, m in metrics.items() if m not in (None, math.inf)), default=(None, None))[1]
        return [step == best or m == math.inf for step, m in metrics.items()]


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, for example 'params/conv1/kernel', in the order of the tree."""
    paths = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in jax.tree.leaves_with_path(tree)]
    leaves = {name: x if hasattr(x, "dtype") else np.asarray(x) for name, x in paths}
    if len(leaves) < len(paths):
        twice = next(name for i, (name, _) in enumerate(paths) if name in dict(paths[:i]))
        raise ValueError(f"Two leaves of the state are both named {twice}; rename one of their keys.")
    return leaves


def _key_data(x: Any) -> Any:
    """The array to save for a leaf; for random keys, their data."""
    return np.asarray(jax.random.key_data(x)) if parallel.is_key(x) else x


def _as_key(data: np.ndarray, like: Any) -> jax.Array:
    return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(like))


def _describe(x: np.ndarray) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def _sha256(x: np.ndarray) -> str:
    digest = hashlib.sha256(json.dumps(_describe(x)).encode())
    digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
