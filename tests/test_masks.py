import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddnp_jax.methods import masks

# Sizes without a band (below 20 channels), at its edge, and with one of several ranks; few, as each is compiled once.
SIZES = (1, 7, 16, 19, 20, 40, 64, 130)

ranks = jax.jit(masks.ranks)
soft_top_k = jax.jit(masks.soft_top_k, static_argnums=(2, 3))


def reference_ranks(importance):
    """For each channel, how many come before it: larger ones, and equal ones to its left."""
    return [
        sum(other > own or (other == own and j < i) for j, other in enumerate(importance))
        for i, own in enumerate(importance)
    ]


def reference_soft_top_k(k, ranks, band, floor):
    """The definition, channel by channel in float64; only K is rounded as float32 rounds it."""
    channels = len(ranks)
    kept = float(np.float32(k) * np.float32(channels))
    half_width = min(math.floor(band * channels), kept, channels - kept)
    mask = []
    for rank in ranks:
        if half_width > 0:
            x = (kept - rank) / (2 * half_width)
            value = 0.0 if x <= -0.5 else 1.0 if x >= 0.5 else -2 * x**3 + 1.5 * x + 0.5
        else:
            value = float(rank < round(kept))
        mask.append(min(value + floor, 1.0))
    return np.array(mask)


# Ranking


def test_ranks_literal():
    found = ranks(jnp.array([0.3, 0.9, 0.3, 0.5, -1.0]))
    np.testing.assert_array_equal(found, [2, 0, 3, 1, 4])
    assert found.dtype == jnp.int32


def test_equal_importances_keep_channel_order():
    np.testing.assert_array_equal(ranks(jnp.full(6, 0.5)), [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(ranks(jnp.array([0.0, 1.0, -0.0, 1.0])), [2, 0, 3, 1])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_ranks_match_reference(data):
    size = data.draw(st.sampled_from([1, 7, 40]))
    values = st.one_of(st.sampled_from([-1.0, 0.0, 0.5]), st.floats(-2, 2, width=32, allow_subnormal=False))
    importance = data.draw(st.lists(values, min_size=size, max_size=size))
    np.testing.assert_array_equal(ranks(np.float32(importance)), reference_ranks(importance))


@pytest.mark.parametrize(("count", "expected"), [(0, [0, 0, 0, 0]), (1, [0, 1, 0, 0]), (3, [1, 1, 0, 1]), (4, [1] * 4)])
def test_hard_top_k_literal(count, expected):
    mask = masks.hard_top_k(count, jnp.array([2, 0, 3, 1]))
    np.testing.assert_array_equal(mask, np.float32(expected))
    assert mask.dtype == jnp.float32


# Soft top-k: (C, k) -> the entries around the edge; those before are 1, those after 0

TABLES = {
    (64, 0.25): (14, [25 / 27, 20 / 27, 1 / 2, 7 / 27, 2 / 27]),
    (64, 0.5): (30, [25 / 27, 20 / 27, 1 / 2, 7 / 27, 2 / 27]),
    (64, 0.95): (58, [0.9967407, 0.896, 0.6952593, 0.4500741, 0.216, 0.0485926]),  # K = 60.8, r = 3
    (64, 0.99): (63, [0.8773804]),  # K = 63.36: r narrowed to 0.64
    (64, 1.0): (64, []),
    (64, 0.01): (1, [0.1226196]),  # K = 0.64: r narrowed to 0.64, so that the first channel stays whole
    (64, 0.0): (0, []),
    (40, 0.5): (19, [27 / 32, 1 / 2, 5 / 32]),  # r = 2
    (20, 0.5): (10, [1 / 2]),  # r = 1
    (20, 0.52): (10, [0.784, 0.104]),  # K = 10.4
    (19, 0.5): (10, []),  # r = 0 and K = 9.5, rounded to even
    (16, 0.25): (4, []),
    (16, 0.5): (8, []),
    (16, 0.95): (15, []),  # K = 15.2
    (16, 0.97): (16, []),  # K = 15.52
    (16, 1.0): (16, []),
    (16, 0.03): (0, []),  # K = 0.48
    (16, 0.04): (1, []),  # K = 0.64
    (1, 0.6): (1, []),
}


@pytest.mark.parametrize(("channels", "k"), TABLES)
def test_soft_top_k_literal(channels, k):
    whole, edge = TABLES[channels, k]
    expected = [1.0] * whole + edge + [0.0] * (channels - whole - len(edge))
    mask = soft_top_k(jnp.float32(k), np.arange(channels))
    np.testing.assert_allclose(mask, expected, atol=2e-6)
    assert mask.dtype == jnp.float32


def test_soft_top_k_is_in_channel_order_and_has_a_floor():
    ranks = np.array([3, 0, 19, 9, 10, 11, 1, 2, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 18])
    expected = np.where(ranks < 10, 1.0, 0.025)
    expected[4] = 0.525  # rank 10 is the middle of the edge
    np.testing.assert_allclose(soft_top_k(jnp.float32(0.5), ranks, 0.05, 0.025), expected, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_soft_top_k_matches_reference(data):
    size = data.draw(st.sampled_from(SIZES))
    k = data.draw(st.floats(0, 1, width=32, allow_subnormal=False))
    ranks = data.draw(st.permutations(range(size)))
    band, floor = data.draw(st.sampled_from([(0.05, 0.0), (0.05, 0.025), (0.2, 0.1)]))
    mask = soft_top_k(np.float32(k), np.asarray(ranks), band, floor)
    np.testing.assert_allclose(mask, reference_soft_top_k(k, ranks, band, floor), atol=1e-5)


def test_one_compilation_serves_every_width_and_ranking():
    soft = jax.jit(lambda k, importance: masks.soft_top_k(k, masks.ranks(importance)))
    for seed, k in enumerate((0.0, 0.3, 0.97, 1.0)):
        soft(jnp.float32(k), np.float32(np.random.default_rng(seed).normal(size=64)))
    assert soft._cache_size() == 1


@pytest.mark.parametrize("k", [0.0, 0.01, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("channels", [4, 64])
def test_soft_top_k_gradient_is_the_mean_of_the_masks_gradient(channels, k):
    upstream = jnp.float32(np.random.default_rng(channels).integers(-50, 50, channels))  # exact sums in float32

    def f(k, importance):
        return jnp.sum(upstream * masks.soft_top_k(k, masks.ranks(importance), 0.05, 0.025))

    importance = np.float32(np.random.default_rng(0).normal(size=channels))
    by_k, by_importance = jax.jit(jax.grad(f, argnums=(0, 1)))(jnp.float32(k), importance)
    assert by_k == np.float32(np.sum(upstream) / channels)
    assert by_k.dtype == jnp.float32
    np.testing.assert_array_equal(by_importance, np.zeros(channels))


# Gates


def test_relaxed_bernoulli_literal():
    gates = masks.relaxed_bernoulli(jnp.array([0.0, -3.0, -3.4, -2.6]), None)
    np.testing.assert_allclose(gates, [0.99944722, 0.5, 0.26894142, 0.73105858], rtol=1e-6)


def test_relaxed_bernoulli_noise_is_gumbel():
    logits = jnp.full(100_000, -8.0)  # far enough from saturation that float32 gives the noise back
    gates = np.float64(masks.relaxed_bernoulli(logits, jax.random.key(1)))
    noise = 0.4 * np.log(gates / (1 - gates)) - 3 + 8
    np.testing.assert_allclose(np.mean(noise), 0.577216, atol=0.015)
    np.testing.assert_allclose(np.var(noise), np.pi**2 / 6, atol=0.04)
    np.testing.assert_allclose(np.median(noise), -np.log(np.log(2)), atol=0.015)  # the long tail is right
    again = masks.relaxed_bernoulli(logits, jax.random.key(1))
    np.testing.assert_array_equal(np.float64(again), gates)


@pytest.mark.parametrize("rng", [None, 7])
def test_relaxed_bernoulli_gradient_matches_finite_differences(rng):
    key = None if rng is None else jax.random.key(rng)
    logits = jnp.linspace(-5.0, -1.0, 16)
    gradient = jax.grad(lambda x: jnp.sum(masks.relaxed_bernoulli(x, key)))(logits)
    step = 0.01
    above, below = (masks.relaxed_bernoulli(logits + sign * step, key) for sign in (1, -1))
    np.testing.assert_allclose(gradient, (above - below) / (2 * step), atol=5e-4)


def test_straight_through():
    gates = jnp.array([0.0, 0.3, 0.49999, 0.5, 0.7, 1.0])
    np.testing.assert_array_equal(masks.straight_through(gates), [0, 0, 0, 1, 1, 1])
    upstream = jnp.arange(6.0)
    np.testing.assert_array_equal(jax.grad(lambda g: upstream @ masks.straight_through(g))(gates), upstream)


def test_open_probability_is_how_often_gates_are_open():
    logits = np.float32([-9, -4, -3.3665129, -2, 4])
    drawn = jax.vmap(lambda key: masks.relaxed_bernoulli(jnp.asarray(logits), key))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    found = masks.open_probability(logits)
    np.testing.assert_allclose(found, np.mean(np.asarray(drawn) >= 0.5, axis=0), atol=0.015)
    np.testing.assert_allclose(found[2], 0.5, atol=1e-6)
    assert pytest.approx(-3.3665129) == masks.OPEN_FROM
