"""Exact evaluation: every image is counted once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddnp_jax import data, parallel
from ddnp_jax.convolutions import with_fast_convolutions
from ddnp_jax.preemption import PreemptionGuard
from ddnp_jax.training.steps import Batch, without_leading_axis


def evaluator(
    forward: Callable[[Any, jax.Array], jax.Array],
    images: data.Images,
    batch_size: int,
    mode: str,
    guard: PreemptionGuard | None = None,
) -> Callable[[Any, np.ndarray], dict[str, float]]:
    """Exact evaluation, every image counted once.

    Args:
      forward: (variables, normalized images) -> logits (N, K).
      images: Images to evaluate on.
      batch_size: Images per batch over all devices; the last batch is padded and the padding not counted.
      mode: Mode of `parallel.data_parallel`.
      guard: Ends an evaluation between two batches if the run was requested to stop.

    Returns:
      (variables, indices of images) -> {"top1", "top5"} in percent and the mean cross-entropy "loss".
    """
    forward = with_fast_convolutions(forward)

    def counted(variables: Any, batch: Batch) -> dict[str, jax.Array]:
        pixels, labels = batch
        return _counted(forward(variables, pixels).astype(jnp.float32), labels)

    sums = image_sums(counted, images, batch_size, mode, guard)

    def evaluate(variables: Any, indices: np.ndarray) -> dict[str, float]:
        return {name: float(value) / len(indices) for name, value in sums(variables, indices).items()}

    return evaluate


def image_sums(
    of: Callable[[Any, Batch], Any],
    images: data.Images,
    batch_size: int,
    mode: str,
    guard: PreemptionGuard | None = None,
) -> Callable[[Any, np.ndarray], Any]:
    """Sums over images, every image counted once.

    Args:
      of: (variables, (normalized images, labels)) -> pytree of arrays (N, ...), values of each image.
      images: Source of the images.
      batch_size: As for `evaluator`.
      mode: As for `evaluator`.
      guard: As for `evaluator`.

    Returns:
      (variables, indices of images) -> pytree of the sums (...), float64.
    """

    def add(state: Any, constants: Any, host_batches: Any) -> tuple[Any, Any]:
        host_batch, valid = without_leading_axis(host_batches)

        def total(values: jax.Array) -> jax.Array:
            is_real = valid.reshape(-1, *[1] * (values.ndim - 1))
            return parallel.sum_over_devices(jnp.sum(jnp.where(is_real, values, 0.0), axis=0))

        batch = images.batch(constants["images"], host_batch, None)
        return state, jax.tree.map(total, of(constants["variables"], batch))

    add_batch = parallel.data_parallel(add, mode=mode)

    def sums(variables: Any, indices: np.ndarray) -> Any:
        batches = data.evaluation_batches(indices, batch_size, process=parallel.process())
        constants = {"images": images.on_devices, "variables": parallel.replicate(variables)}
        found = []
        with data.read_ahead(batches, lambda b: (images.read(b[0], None), b[1]), images.threads, 1) as chunks:
            for host_batches in chunks:
                if guard is not None:
                    guard.check("stopped in an evaluation; the same command resumes from the last checkpoint.")
                found.append(add_batch((), constants, parallel.shard_batches(host_batches))[1])
        return jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *parallel.fetch(found))

    return sums


def _counted(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """What each image adds, (N,)."""
    top = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == labels[:, None]
    return {
        "top1": 100.0 * top[:, 0],
        "top5": 100.0 * jnp.any(top, axis=-1),
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    }
