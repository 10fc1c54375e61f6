"""The episodic memory of NPPM: sub-networks and their accuracies, as a pytree of fixed size."""

import flax.struct
import jax
import jax.numpy as jnp

BINS = 10  # equal parts of the range of stored accuracies, for balanced sampling


class Memory(flax.struct.PyTreeNode):
    """Pairs of a sub-network and its accuracy; K is the capacity and D = Σ C_l.

    Attributes:
      gates: Sub-networks (K, D), as means of zeros and ones.
      accuracy: Their accuracies (K,) in [0, 1].
      count: Number of stored pairs, int32; they occupy the first places.
      pending_gates: Sum of the gates (D,) over the steps that are not stored yet.
      pending_accuracy: Sum of the accuracies over the same steps.
      pending: Number of these steps, int32.
    """

    gates: jax.Array
    accuracy: jax.Array
    count: jax.Array
    pending_gates: jax.Array
    pending_accuracy: jax.Array
    pending: jax.Array


def empty(capacity: int, size: int) -> Memory:
    """Returns an empty memory for `capacity` pairs, of networks with `size` prunable channels in total."""
    zero = jnp.int32(0)
    return Memory(jnp.zeros((capacity, size)), jnp.zeros(capacity), zero, jnp.zeros(size), jnp.float32(0), zero)


def add(memory: Memory, gates: jax.Array, accuracy: jax.Array, steps: int) -> Memory:
    """Adds one search step.

    A pair is the mean of `steps` consecutive steps. If the memory is full, the pair is averaged into the stored pair
    with the nearest accuracy (the first one of several).

    Args:
      memory: Episodic memory so far.
      gates: The sub-network of the step, zeros and ones (D,).
      accuracy: Accuracy on the step's batch, in [0, 1].
      steps: Number of steps per pair.
    """
    memory = memory.replace(
        pending_gates=memory.pending_gates + gates,
        pending_accuracy=memory.pending_accuracy + accuracy,
        pending=memory.pending + 1,
    )
    return jax.tree.map(lambda new, old: jnp.where(memory.pending == steps, new, old), _store(memory, steps), memory)


def _store(memory: Memory, steps: int) -> Memory:
    """Stores the mean of the pending steps as a pair."""
    capacity = len(memory.accuracy)
    gates, accuracy = memory.pending_gates / steps, memory.pending_accuracy / steps
    full = memory.count == capacity
    nearest = jnp.argmin(jnp.abs(memory.accuracy - accuracy))
    at = jnp.where(full, nearest, memory.count)
    return Memory(
        memory.gates.at[at].set(jnp.where(full, (memory.gates[nearest] + gates) / 2, gates)),
        memory.accuracy.at[at].set(jnp.where(full, (memory.accuracy[nearest] + accuracy) / 2, accuracy)),
        jnp.minimum(memory.count + 1, capacity),
        jnp.zeros_like(memory.pending_gates),
        jnp.float32(0),
        jnp.int32(0),
    )


def weights(memory: Memory, balanced: bool) -> jax.Array:
    """Relative frequency (K,) with which `sample` draws each pair.

    If balanced, it is 1 / (number of pairs in the same bin), so that rare accuracies are drawn as often as common ones;
    otherwise it is the same for all pairs. Empty places have 0. The bins are 10 equal parts from the lowest to the
    highest stored accuracy, as in the authors' code; the paper does not state the range. With 10 equal parts of [0, 1],
    a late search would fill four bins or fewer.
    """
    is_stored = jnp.arange(len(memory.accuracy)) < memory.count
    stored = is_stored.astype(jnp.float32)
    if not balanced:
        return stored
    low = jnp.min(memory.accuracy, where=is_stored, initial=jnp.inf)
    high = jnp.max(memory.accuracy, where=is_stored, initial=-jnp.inf)
    place = (memory.accuracy - low) / jnp.where(high > low, high - low, 1.0)
    bins = jnp.clip((place * BINS).astype(jnp.int32), 0, BINS - 1)
    return stored / jnp.maximum(jnp.zeros(BINS).at[bins].add(stored), 1.0)[bins]


def sample(memory: Memory, rng: jax.Array, count: int, balanced: bool) -> tuple[jax.Array, jax.Array]:
    """Draws gates (count, D) and accuracies (count,) with replacement, according to `weights`."""
    drawn = jax.random.categorical(rng, jnp.log(weights(memory, balanced)), shape=(count,))
    return memory.gates[drawn], memory.accuracy[drawn]
