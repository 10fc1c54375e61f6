"""The episodic memory of NPPM: sub-networks and their accuracies, as a pytree of fixed size."""

import flax.struct
import jax
import jax.numpy as jnp

BINS = 10  # equal parts of the stored accuracies' range, for sampling


class Memory(flax.struct.PyTreeNode):
    """Pairs of a sub-network and its accuracy; K is the capacity and D = Σ C_l.

    Attributes:
      gates: (K, D), means of zeros and ones.
      accuracy: (K,) in [0, 1].
      count: Pairs stored, int32; those are the first ones.
      pending_gates: (D,), sum over the steps that are not stored yet.
      pending_accuracy: Sum over the same steps.
      pending: Their number, int32.
    """

    gates: jax.Array
    accuracy: jax.Array
    count: jax.Array
    pending_gates: jax.Array
    pending_accuracy: jax.Array
    pending: jax.Array


def empty(capacity: int, size: int) -> Memory:
    """A memory for `capacity` pairs of networks with `size` gated channels."""
    zero = jnp.int32(0)
    return Memory(jnp.zeros((capacity, size)), jnp.zeros(capacity), zero, jnp.zeros(size), jnp.float32(0), zero)


def add(memory: Memory, gates: jax.Array, accuracy: jax.Array, steps: int) -> Memory:
    """Adds one search step.

    The mean of `steps` consecutive steps makes a pair. A full memory averages it into the stored pair of the nearest
    accuracy (the first of equals).

    Args:
      memory: Episodic memory so far.
      gates: (D,) zeros and ones, the sub-network of the step.
      accuracy: Accuracy on the step's batch, in [0, 1].
      steps: Per pair.
    """
    memory = memory.replace(
        pending_gates=memory.pending_gates + gates,
        pending_accuracy=memory.pending_accuracy + accuracy,
        pending=memory.pending + 1,
    )
    return jax.tree.map(lambda new, old: jnp.where(memory.pending == steps, new, old), _store(memory, steps), memory)


def _store(memory: Memory, steps: int) -> Memory:
    """Makes a pair of what is pending."""
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

    Balanced, 1 / (number of pairs in the same bin), so that rare accuracies are seen as often as common ones; otherwise
    the same for all. Places that hold no pair have 0. The bins are 10 equal parts from the lowest to the highest stored
    accuracy, as in the authors' code; the paper does not say of what. Of [0, 1] a late search fills four or fewer.
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
    """Draws gates (count, D) and accuracies (count,) by `weights`, with replacement."""
    drawn = jax.random.categorical(rng, jnp.log(weights(memory, balanced)), shape=(count,))
    return memory.gates[drawn], memory.accuracy[drawn]
