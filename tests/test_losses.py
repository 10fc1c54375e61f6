import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from ddnp_jax import losses

RNG = np.random.default_rng(0)
LOGITS = np.float32(RNG.normal(0, 3, (6, 5)))
TEACHER = np.float32(RNG.normal(0, 3, (6, 5)))
LABELS = np.array([0, 4, 2, 2, 1, 3])


def assert_value_and_gradient_match_pytorch(f, reference):
    logits = torch.tensor(LOGITS, requires_grad=True)
    wanted = reference(logits)
    wanted.backward()
    value, gradient = jax.jit(jax.value_and_grad(f))(LOGITS)
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, logits.grad, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_matches_pytorch(smoothing):
    assert_value_and_gradient_match_pytorch(
        lambda logits: losses.cross_entropy(logits, LABELS, smoothing),
        lambda logits: functional.cross_entropy(logits, torch.tensor(LABELS), label_smoothing=smoothing),
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_matches_pytorch(temperature):
    def reference(logits):
        student = functional.log_softmax(logits / temperature, -1)
        teacher = functional.softmax(torch.tensor(TEACHER) / temperature, -1)
        return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean")

    assert_value_and_gradient_match_pytorch(lambda x: losses.distillation(x, TEACHER, temperature), reference)


def test_distillation_from_itself_is_nothing():
    value, gradient = jax.value_and_grad(losses.distillation)(LOGITS, LOGITS, 2.0)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, np.zeros((6, 5)), atol=1e-6)


# R at T = 75, 50 and 25 of T_total = 100 with p = 0.5, and dR/dT at 75 and 25

RESOURCE = {
    "log_abs": ([0.40546511, 0.0, 0.69314718], [1 / 75, -1 / 25]),
    "log_max": ([0.40546511, 0.0, 0.0], [1 / 75, 0.0]),
    "abs": ([0.25, 0.0, 0.25], [0.01, -0.01]),
    "square": ([0.0625, 0.0, 0.0625], [0.005, -0.005]),
}


@pytest.mark.parametrize("kind", RESOURCE)
def test_resource_literal(kind):
    values, gradients = RESOURCE[kind]
    found = [losses.resource(kind, jnp.float32(cost), 100.0, 0.5) for cost in (75, 50, 25)]
    np.testing.assert_allclose(found, values, atol=1e-7)
    slopes = [jax.grad(losses.resource, argnums=1)(kind, jnp.float32(cost), 100.0, 0.5) for cost in (75, 25)]
    np.testing.assert_allclose(slopes, gradients, atol=1e-8)


@pytest.mark.parametrize("kind", RESOURCE)
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_resource_gradient_matches_finite_differences(kind, share):
    total, p, step = 125.5e6, 0.48, 1e4  # a ResNet-56's

    def reference(cost):
        ratio = cost / (p * total)
        return {
            "log_abs": abs(np.log(ratio)),
            "log_max": np.log(max(ratio, 1.0)),
            "abs": abs(cost / total - p),
            "square": (cost / total - p) ** 2,
        }[kind]

    cost = share * total
    value, gradient = jax.value_and_grad(losses.resource, argnums=1)(kind, jnp.float32(cost), total, p)
    np.testing.assert_allclose(value, reference(cost), rtol=1e-5)
    wanted = (reference(cost + step) - reference(cost - step)) / (2 * step)
    np.testing.assert_allclose(gradient * total, wanted * total, rtol=1e-4)


def test_resource_of_unknown_kind_is_refused():
    with pytest.raises(
        ValueError, match=r"^resource_loss='log' is unknown; use one of log_abs, log_max, abs, square\.$"
    ):
        losses.resource("log", jnp.float32(1), 1.0, 0.5)


tie = jax.jit(losses.tie)
GATES = (jnp.array([0.4, 0.6, 0.5, 0.1]), jnp.array([0.9, 0.8]))  # 1/2 and all of them open


def test_tie_literal():
    value = tie(GATES, jnp.array([0.7, 0.4]), jax.random.key(0), 0.0)
    np.testing.assert_allclose(value, np.log(1.2) + np.log(1.6), rtol=1e-6)


def test_tie_moves_widths_towards_the_open_gates_and_gates_not_at_all():
    k = jnp.array([0.7, 0.4])
    by_gates, by_k = jax.grad(tie, argnums=(0, 1))(GATES, k, jax.random.key(0), 0.0)
    for gradient in by_gates:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))
    np.testing.assert_allclose(by_k, [1 / 1.2, -1 / 1.6], rtol=1e-6)  # descent lowers 0.7 to 1/2 and raises 0.4 to 1


def test_tie_gradient_matches_finite_differences():
    key, step = jax.random.key(3), 1e-2
    k = np.float32([0.6, 0.3])
    gradient = jax.grad(tie, argnums=1)(GATES, k, key)
    for gate in range(2):
        shift = np.float32(step * np.eye(2)[gate])
        slope = (tie(GATES, k + shift, key) - tie(GATES, k - shift, key)) / (2 * step)
        np.testing.assert_allclose(gradient[gate], slope, rtol=1e-3)


def test_tie_noise_is_uniform_and_drawn_per_gate():
    gates, k = (np.ones(4, np.float32),) * 20, np.full(20, 0.5, np.float32)
    by_k = jax.vmap(jax.grad(losses.tie, argnums=1), in_axes=(None, None, 0))
    # The gradient with respect to k_l is -1 / (1 + |1 - 0.5 + u_l|).
    u = -1 / np.float64(jax.jit(by_k)(gates, k, jax.random.split(jax.random.key(0), 250))) - 1.5
    assert -0.02001 <= np.min(u) < -0.0198 and 0.0198 < np.max(u) <= 0.02001
    np.testing.assert_allclose(np.mean(u), 0, atol=5e-4)
    np.testing.assert_allclose(np.var(u), 0.04**2 / 12, rtol=0.05)
    assert np.min(np.std(u, axis=1)) > 0.005  # gates of one step differ
