"""Exact evaluation: every image is counted once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddnp_jax import data, parallel
from ddnp_jax.preemption import PreemptionGuard
from ddnp_jax.training.steps import without_leading_axis


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
      guard: Ends an evaluation, between two batches, where the run was asked to stop.

    Returns:
      (variables, indices of images) -> {"top1", "top5"} in percent and the mean cross-entropy "loss".
    """

    def totals(sums: Any, constants: Any, host_batches: Any) -> tuple[Any, dict]:
        host_batch, valid = without_leading_axis(host_batches)
        pixels, labels = images.batch(constants["images"], host_batch, None)
        counted = _counted(forward(constants["variables"], pixels).astype(jnp.float32), labels)
        added = jax.tree.map(lambda x: parallel.sum_over_devices(jnp.sum(jnp.where(valid, x, 0.0))), counted)
        return jax.tree.map(jnp.add, sums, added), {}

    add_batch = parallel.data_parallel(totals, mode=mode)

    def evaluate(variables: Any, indices: np.ndarray) -> dict[str, float]:
        batches = data.evaluation_batches(indices, batch_size, process=parallel.process())
        constants = {"images": images.on_devices, "variables": parallel.replicate(variables)}
        sums = parallel.replicate({"top1": np.float32(0), "top5": np.float32(0), "loss": np.float32(0)})
        with data.read_ahead(batches, lambda b: (images.read(b[0], None), b[1]), images.threads, 1) as chunks:
            for host_batches in chunks:
                if guard is not None:
                    guard.check("stopped in an evaluation; the same command resumes from the last checkpoint.")
                sums, _ = add_batch(sums, constants, parallel.shard_batches(host_batches))
        return {name: float(value) / len(indices) for name, value in parallel.fetch(sums).items()}

    return evaluate


def _counted(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """What each image adds, (N,)."""
    top = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == labels[:, None]
    return {
        "top1": 100.0 * top[:, 0],
        "top5": 100.0 * jnp.any(top, axis=-1),
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    }
