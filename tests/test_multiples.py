"""The fastest multiple: what is timed, what is chosen, and the file; never a measured time."""

import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from ddnp_jax import prune
from ddnp_jax.cost import flops, multiples
from ddnp_jax.cost.budget import Budget
from ddnp_jax.cost.multiples import MultipleTimes
from ddnp_jax.cost.network_times import NetworkTimer
from ddnp_jax.topology import trace

MODEL = zoo.VGG(features=(64, 64, 40, 7))
TIMER = NetworkTimer(MODEL, trace(MODEL, (16, 16, 3)), 4)


def times(**ms):
    return MultipleTimes(
        "abacus", 4, "xla", {name.removeprefix("m"): value for name, value in ms.items()}, TIMER.topology.widths
    )


@pytest.mark.parametrize(
    ("ms", "fastest"),
    [
        ({"m1": 10.0}, 1),
        ({"m1": 10.0, "m4": 9.9, "m8": 9.85}, 1),  # within the noise
        ({"m1": 10.0, "m4": 9.0, "m8": 8.9, "m16": 9.5}, 4),  # 8 saves no 2 % more
        ({"m1": 62.87, "m4": 49.33, "m8": 49.92, "m16": 46.57, "m32": 46.14}, 16),
        ({"m1": 10.0, "m16": 11.0, "m32": 7.0}, 32),
    ],
)
def test_a_coarser_multiple_must_be_faster(ms, fastest):
    assert times(**ms).fastest() == fastest


def test_networks_of_the_same_flops_are_timed(monkeypatch):
    """In tiles of 16 channels, multiples of 16 are fastest; the last gate has 7 channels, and is unpruned from 8 on."""
    timed = []

    def tiled(self, every_widths):
        timed.extend(every_widths)
        return [float(flops.total(TIMER.topology, [-(-width // 16) * 16 for width in w])) for w in every_widths]

    monkeypatch.setattr(NetworkTimer, "ms", tiled)
    found = multiples.measure(TIMER)
    assert (found.device, found.batch, found.runtime) == (TIMER.device, 4, "xla")
    assert found.fastest() == 16
    assert [int(name) for name in found.ms] == [1, 4, 8, 16, 32]
    half = flops.prunable(TIMER.topology) / 2
    for multiple, pair in zip(multiples.MULTIPLES, np.reshape(timed, (5, 2, 4)).tolist(), strict=True):
        for widths in pair:
            assert flops.prunable(TIMER.topology, widths) <= half
            for width, channels in zip(widths, TIMER.topology.widths, strict=True):
                assert width % multiple == 0 or width == channels


def test_multiples_without_a_network_are_left_out(monkeypatch):
    narrow = zoo.VGG(features=(8, 8, 8, 8))
    monkeypatch.setattr(NetworkTimer, "ms", lambda self, every_widths: [1.0] * len(every_widths))
    found = multiples.measure(NetworkTimer(narrow, trace(narrow, (16, 16, 3)), 4))
    assert [int(name) for name in found.ms] == [1, 4]  # from 8 on nothing could be cut


def test_networks_that_cannot_be_halved_are_timed_at_their_smallest(monkeypatch):
    """The first gate has 2 channels of the 32 that the last layer reads; the other 30 stay."""

    class Joined(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.concatenate([nn.Conv(n, (1, 1), use_bias=False, name=f"conv{n}")(x) for n in (2, 30)], -1)
            return nn.Dense(5, use_bias=False, name="head")(x.mean((1, 2)))

    timed = []
    monkeypatch.setattr(NetworkTimer, "ms", lambda self, every: timed.extend(every) or [1.0] * len(every))
    timer = NetworkTimer(Joined(), trace(Joined(), (1, 1, 3), keep=("conv30",)), 4)
    found = multiples.measure(timer)
    assert found.p == 0.9519  # (3 + 31 * 5) / (6 + 32 * 5), rounded up
    assert timed == [(1,), (1,)]
    assert "(2 networks with 95% of the prunable FLOPs, batch 4" in found.describe(1)


def test_they_are_measured_once_and_then_read(monkeypatch, tmp_path):
    path = tmp_path / "run" / "multiple.json"
    monkeypatch.setattr(multiples, "measure", lambda timer: times(m1=10.0, m8=8.0))
    assert multiples.measured_once(path, TIMER) == times(m1=10.0, m8=8.0)
    monkeypatch.setattr(multiples, "measure", lambda timer: pytest.fail("measured again"))
    assert multiples.measured_once(path, TIMER) == multiples.load(path) == times(m1=10.0, m8=8.0)
    assert multiples.load(path).describe(8) == (
        "Widths are multiples of 8, the fastest that can meet the budget (2 networks with 50% of the prunable FLOPs, "
        "batch 4, abacus): 10.00 ms with multiples of 1, 8.00 ms with multiples of 8."
    )


WIDER = zoo.VGG(features=(64, 64, 40, 8))


@pytest.mark.parametrize(
    ("timer", "said"),
    [
        (dataclasses.replace(TIMER, batch=8), "this run has 8 in xla and 175;"),
        (dataclasses.replace(TIMER, runtime="onnx"), "this run has 4 in onnx and 175;"),
        (NetworkTimer(WIDER, trace(WIDER, (16, 16, 3)), 4), "this run has 4 in xla and 176;"),
    ],
)
def test_times_of_another_run_are_refused(timer, said, monkeypatch, tmp_path):
    path = tmp_path / "multiple.json"
    monkeypatch.setattr(multiples, "measure", lambda timer: times(m1=10.0, m8=8.0))
    multiples.measured_once(path, TIMER)
    with pytest.raises(ValueError) as error:
        multiples.measured_once(path, timer)
    assert str(error.value) == (
        f"{path} was measured with 4 images per call in xla and 175 channels, {said} delete it, and it is measured "
        "again."
    )


@pytest.mark.parametrize(("p", "multiple"), [(0.28, 32), (0.27, 16), (0.075, 16), (0.07, 8), (0.01, 1)])
def test_only_multiples_at_which_the_budget_can_be_met_are_chosen(p, multiple):
    """The smallest networks in multiples of 8, 16 and 32 have 0.0212, 0.0749 and 0.2795 of the prunable FLOPs."""
    budget = Budget(TIMER.topology, p)
    chosen = multiples.at_fastest(budget, times(m1=10.0, m8=8.0, m16=6.0, m32=4.0))
    assert chosen == dataclasses.replace(budget, multiple=multiple)
    chosen.check()


@pytest.mark.parametrize(
    ("ms", "reason"),
    [
        ({"3": 1.0, "1": 1.0}, "'3' is not one of"),
        ({"8": 1.0}, "ms must have positive numbers of milliseconds, of the multiple 1 among others"),
        ({"1": 0.0}, "ms must have positive numbers"),
        ({"1": "fast"}, "ms.1='fast' must be a number"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_sentence(ms, reason, tmp_path):
    path = tmp_path / "multiple.json"
    path.write_text(json.dumps({"device": "abacus", "batch": 4, "runtime": "xla", "ms": ms, "channels": [64]}))
    with pytest.raises(ValueError) as error:
        multiples.load(path)
    assert str(error.value).startswith(f"{path} holds no times of multiples (")
    assert reason in str(error.value)
    assert str(error.value).endswith("; delete it, and they are measured again.")


def test_prune_takes_the_fastest_multiple(monkeypatch):
    batches = [(np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32), np.arange(4))]
    variables = zoo.randomized(MODEL, (16, 16, 3))
    asked = []

    def measure(timer):
        asked.append((timer.batch, timer.runtime))
        return times(m1=10.0, m16=8.0)

    monkeypatch.setattr(multiples, "measure", measure)
    pruned = prune(MODEL, variables, batches, method="uniform", multiple="auto")
    assert asked == [(4, "xla")]
    assert pruned.budget.multiple == 16
    widths = zip(pruned.selection.widths, TIMER.topology.widths, strict=True)
    assert all(width % 16 == 0 or width == channels for width, channels in widths)
    asked.clear()
    with pytest.raises(ValueError, match=r"p=0\.0 must be in"):
        prune(MODEL, variables, batches, p=0.0, method="uniform", multiple="auto")
    assert asked == []
