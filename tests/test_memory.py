import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddnp_jax.checkpoint import Checkpoints
from ddnp_jax.methods.nppm import memory

add = jax.jit(memory.add, static_argnames="steps")


def reference(sequence, capacity, steps):
    """The memory as a plain list of [gates, accuracy]."""
    stored = []
    for start in range(0, len(sequence) - steps + 1, steps):
        part = sequence[start : start + steps]
        gates = np.mean([g for g, _ in part], axis=0, dtype=np.float64)
        accuracy = np.mean([a for _, a in part], dtype=np.float64)
        if len(stored) < capacity:
            stored.append([gates, accuracy])
        else:
            nearest = min(range(capacity), key=lambda i: abs(stored[i][1] - accuracy))
            stored[nearest] = [(stored[nearest][0] + gates) / 2, (stored[nearest][1] + accuracy) / 2]
    return stored


def random_sequence(seed, length, size):
    rng = np.random.default_rng(seed)
    return [(np.float32(rng.integers(0, 2, size)), np.float32(rng.random())) for _ in range(length)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("capacity", "steps", "length"), [(6, 2, 60), (6, 2, 9), (4, 3, 50), (5, 1, 30)])
def test_any_sequence_is_stored_as_by_numpy(seed, capacity, steps, length):
    sequence = random_sequence(seed, length, size=9)
    held = memory.empty(capacity, 9)
    for gates, accuracy in sequence:
        held = add(held, gates, accuracy, steps=steps)
    wanted = reference(sequence, capacity, steps)
    assert held.count == len(wanted) == min(capacity, length // steps)
    np.testing.assert_allclose(held.gates[: len(wanted)], [g for g, _ in wanted], atol=1e-6)
    np.testing.assert_allclose(held.accuracy[: len(wanted)], [a for _, a in wanted], atol=1e-6)
    assert not np.any(held.gates[len(wanted) :]) and not np.any(held.accuracy[len(wanted) :])
    assert held.pending == length % steps
    np.testing.assert_array_equal(
        held.pending_gates, sum((g for g, _ in sequence[length - held.pending :]), np.zeros(9))
    )


def filled(accuracies, capacity=None):
    held = memory.empty(capacity or len(accuracies), 2)
    for i, accuracy in enumerate(accuracies):
        held = add(held, jnp.full(2, i, jnp.float32), accuracy, steps=1)
    return held


def test_weights_are_the_inverse_of_the_crowd_in_the_bin():
    held = filled([0.05, 0.11, 0.15, 0.19, 0.85, 0.81, 1.0, 0.0], capacity=10)
    thirds, halves = 1 / 3, 1 / 2
    wanted = [halves, thirds, thirds, thirds, halves, halves, 1, halves, 0, 0]
    np.testing.assert_allclose(memory.weights(held, balanced=True), wanted, rtol=1e-6)
    np.testing.assert_array_equal(memory.weights(held, balanced=False), [1] * 8 + [0] * 2)


@pytest.mark.parametrize("seed", range(4))
def test_bins_are_of_the_range_of_what_is_stored(seed):
    accuracies = np.random.default_rng(seed).uniform(0.7, 0.8, 30)
    counts, edges = np.histogram(accuracies, bins=10)  # from the lowest to the highest
    wanted = 1 / counts[np.clip(np.searchsorted(edges, accuracies, side="right") - 1, 0, 9)]
    np.testing.assert_allclose(memory.weights(filled(accuracies, 40), balanced=True), [*wanted, *[0] * 10], rtol=1e-5)
    assert len(np.unique(wanted)) > 2


def test_equal_accuracies_share_a_bin():
    np.testing.assert_allclose(memory.weights(filled([0.5, 0.5], 3), balanced=True), [1 / 2, 1 / 2, 0])
    np.testing.assert_allclose(memory.weights(filled([0.5], 2), balanced=True), [1, 0])


def test_samples_come_with_the_weights():
    held = filled([0.05, 0.15, 0.15, 0.15], capacity=6)
    draws = 40_000
    for balanced, wanted in ((True, [1 / 2, 1 / 6, 1 / 6, 1 / 6]), (False, [1 / 4] * 4)):
        gates, accuracy = memory.sample(held, jax.random.key(3), draws, balanced)
        np.testing.assert_array_equal(accuracy, held.accuracy[gates[:, 0].astype(int)])
        share = np.bincount(gates[:, 0].astype(int), minlength=4) / draws
        # Five standard deviations of a share.
        np.testing.assert_allclose(share, wanted, atol=5 * np.sqrt(0.25 / draws))


def test_a_checkpoint_holds_the_memory_bit_for_bit(tmp_path):
    held = memory.empty(4, 9)
    for gates, accuracy in random_sequence(0, 11, size=9):
        held = add(held, gates, accuracy, steps=2)
    held = jax.device_get(held)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, held, metric=None)
    with Checkpoints(tmp_path) as checkpoints:
        _, restored = checkpoints.restore(jax.tree.map(np.zeros_like, held))
    jax.tree.map(np.testing.assert_array_equal, restored, held)
