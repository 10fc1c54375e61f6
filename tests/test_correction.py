"""Correcting a predicted latency by measured ones: the device is a formula, so that the right answer is known."""

import dataclasses

import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import ddnp_jax
from ddnp_jax.cost import correction, flops
from ddnp_jax.cost.budget import Budget, Cost
from ddnp_jax.topology import trace

TOPOLOGY = trace(zoo.VGG(features=(40, 80, 60, 50)), (16, 16, 3))


@dataclasses.dataclass
class Formula:
    """A device whose time is an overhead and a power of the FLOPs; the widths that were timed, in order."""

    overhead: float
    power: float

    def __post_init__(self):
        self.timed = []

    def fraction(self, widths):
        self.timed.append(tuple(widths))
        kept = flops.prunable(TOPOLOGY, widths) / flops.prunable(TOPOLOGY)
        return (self.overhead + kept**self.power) / (self.overhead + 1)


def budget(p, timer=None):
    return Budget(TOPOLOGY, p, Cost(flops.prunable, "ms"), timer=timer)


def proportional(corrected):
    return corrected.fit(np.ones(len(TOPOLOGY.gates)))


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0.7, 1.5), st.floats(0.5, 0.9))
def test_the_chosen_network_takes_the_wanted_time(overhead, power, p):
    device = Formula(overhead, power)
    if device.fraction(budget(p).smallest_widths) > p:
        return
    found = correction.correct(budget(p, device), proportional)
    widths = proportional(budget(p).with_savings(found.savings))
    assert device.fraction(widths) == found.measured == pytest.approx(p, abs=0.03)


def test_it_ends_at_the_first_network_that_is_close_enough():
    device = Formula(0.0, 1.0)  # as predicted
    found = correction.correct(budget(0.6, device), proportional)
    assert found == (1.0, pytest.approx(0.6, abs=0.01))
    assert len(device.timed) == 1


def test_savings_are_scaled_by_what_was_measured():
    """With as much overhead as work, half of the time is saved at none of the work, and a quarter at half of it."""
    device = Formula(1.0, 1.0)
    found = correction.correct(budget(0.75, device), proportional)
    assert found == (pytest.approx(0.5, abs=0.02), pytest.approx(0.75, abs=0.01))
    assert len(device.timed) == 2


def test_a_network_that_is_never_faster_is_not_scaled():
    device = Formula(1e6, 1.0)
    found = correction.correct(budget(0.6, device), proportional)
    assert found == (1.0, pytest.approx(1.0, abs=1e-3))
    assert len(device.timed) == 1


@pytest.mark.parametrize("p", [0.9, 1.0])
def test_widths_that_do_not_change_are_timed_once(p):
    """As those of a stored selection."""
    device, stored = Formula(0.0, 1.0), tuple(width // 2 for width in TOPOLOGY.widths)
    found = correction.correct(budget(p, device), lambda _: stored)
    assert found == (1.0, flops.prunable(TOPOLOGY, stored) / flops.prunable(TOPOLOGY))
    assert device.timed == [stored]


def test_the_nearest_of_all_rounds_counts():
    measured = iter((0.9, 0.63, 0.45, 0.8, 0.7))
    noisy = type("Noisy", (), {"fraction": lambda *_: next(measured)})()
    found = correction.correct(budget(0.6, noisy), proportional)
    assert found.measured == 0.63
    assert found.savings == pytest.approx(0.25, abs=0.01)  # 0.9 where 0.6 was predicted, so 0.6 at -0.6


def test_savings_of_a_budget():
    whole = budget(0.5)
    half = tuple(c // 2 for c in TOPOLOGY.widths)
    saved = whole.total - whole.cost(half)
    corrected = whole.with_savings(0.5)
    assert corrected.total == whole.total
    assert corrected.cost(half) == pytest.approx(whole.total - saved / 2, rel=1e-12)
    assert whole.with_savings(1.0).cost(half) == whole.cost(half)


def test_a_cost_that_is_exact_is_not_corrected():
    assert correction.correct(budget(0.6), lambda _: pytest.fail("nothing is chosen")) is None


def test_prune_corrects_a_budget_in_latency(monkeypatch):
    """The table predicts half of the time where three quarters are taken, so that fewer channels are kept."""
    model = zoo.VGG(features=(40, 80, 60, 50))
    batches = [(np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32), np.arange(4))]
    device = Formula(1.0, 1.0)
    pruned = ddnp_jax.prune(
        model, zoo.randomized(model, (16, 16, 3)), batches, method="uniform", budget=budget(0.75, device)
    )
    assert device.fraction(pruned.selection.widths) == pytest.approx(0.75, abs=0.01)
    assert flops.prunable(TOPOLOGY, pruned.selection.widths) == pytest.approx(flops.prunable(TOPOLOGY) / 2, rel=0.03)
    assert pruned.notes[-1] == "measured: 75.0% of the unpruned network's time, in turn with it"
