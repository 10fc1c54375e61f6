import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddnp_jax import losses
from ddnp_jax.config import BudgetConfig
from ddnp_jax.cost import flops, kinds, multiples
from ddnp_jax.cost.budget import Budget, Cost
from ddnp_jax.cost.latency import LatencyTable, LayerTimes
from ddnp_jax.cost.network_times import NetworkTimer
from ddnp_jax.topology import Extent, Gate, Layer, Slice, Topology, Variable


def topology(widths, layers):
    """A network of 1x1 convolutions (name, inputs, outputs, positions, in_gate, out_gate), without biases."""
    paths = [("params", name, "kernel") for name, *_ in layers]
    shapes = [(1, 1, inputs, outputs) for _, inputs, outputs, *_ in layers]
    slices = [[] for _ in widths]
    for path, (_, _, _, _, in_gate, out_gate) in zip(paths, layers, strict=True):
        for axis, gate in ((2, in_gate), (3, out_gate)):
            if gate is not None:
                slices[gate].append(Slice(path, axis))

    def extent(channels, gate):
        return Extent(channels) if gate is None else Extent(0, ((gate, 1),))

    return Topology(
        input_shape=(1, 1, 1),
        call_kwargs=(),
        gates=tuple(Gate(f"gate{i}", c, tuple(slices[i]), (), ()) for i, c in enumerate(widths)),
        layers=tuple(
            Layer(name, path, i, 0, shape, 1, positions, extent(inputs, in_gate), extent(outputs, out_gate))
            for i, (path, shape, (name, inputs, outputs, positions, in_gate, out_gate)) in enumerate(
                zip(paths, shapes, layers, strict=True)
            )
        ),
        unprunable=(),
        variables=tuple(Variable(path, shape, True) for path, shape in zip(paths, shapes, strict=True)),
    )


# T = a + 3 b for widths (a, b), at most 10 each
TWO = topology((10, 10), [("first", 1, 10, 1, None, 0), ("second", 10, 3, 1, 1, None)])


@st.composite
def problems(draw):
    """(topology of a chain of gates, fractions k)."""
    widths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    positions = draw(st.lists(st.integers(1, 50), min_size=len(widths) + 1, max_size=len(widths) + 1))
    ends = [(3, None), *((c, i) for i, c in enumerate(widths)), (5, None)]
    layers = [
        (f"layer{i}", ends[i][0], ends[i + 1][0], positions[i], ends[i][1], ends[i + 1][1])
        for i in range(len(widths) + 1)
    ]
    k = draw(st.lists(st.floats(0.01, 1.0), min_size=len(widths), max_size=len(widths)))
    return topology(tuple(widths), layers), k


def chain_cost(network, widths):
    """T, layer by layer."""
    ends = [3, *widths, 5]
    return sum(layer.positions * a * b for layer, a, b in zip(network.layers, ends[:-1], ends[1:], strict=True))


def config(**fields):
    return BudgetConfig(**{"p": 0.25} | fields)


def make_budget(section, network, measured, multiple_times=lambda: pytest.fail("only multiple=0 is measured")):
    return kinds.make_budget(section, NetworkTimer(None, network, 32), measured, multiple_times)


def no_table(points, multiple):
    pytest.fail("only a budget in latency needs a table")


# Of TWO: 4 ms for the first layer's one channel and 1 more for each further; the second layer is fastest at width 5.
TIMES = LatencyTable(
    "abacus",
    32,
    (
        LayerTimes("first", (1, 1, 1, 10), 1, (), (1, 10), ((4.0, 13.0),)),
        LayerTimes("second", (1, 1, 10, 3), 1, (1, 5, 10), (), ((6.0,), (2.0,), (7.0,))),
    ),
)


# fit


@pytest.mark.parametrize(
    ("p", "k", "widths"),
    [
        (1.0, (0.2, 0.9), (10, 10)),
        (0.5, (0.9, 0.4), (8, 4)),  # scaled by 0.875 to (7.9, 3.5): T = 20
        (0.49, (0.9, 0.4), (10, 3)),  # scaled to just below 0.875: (8, 3), and 2 more fit where b + 1 does not
        (0.5, (0.5, 0.5), (5, 5)),
        (0.5, (1.0, 1e-3), (10, 3)),  # b is kept at 1 until a is whole
        (0.1, (0.5, 0.5), (1, 1)),
    ],
)
def test_fit_literal(p, k, widths):
    assert Budget(TWO, p).fit(k) == widths


def test_fit_to_multiples_literal():
    assert Budget(TWO, 0.65, multiple=4).fit((0.8, 0.4)) == (10, 4)  # whole gates need not be multiples
    assert Budget(TWO, 0.5, multiple=4).fit((0.8, 0.4)) == (8, 4)


@settings(max_examples=150, deadline=None)
@given(problems(), st.floats(0, 1), st.sampled_from([1, 2, 8]), st.sampled_from(["macs", "authors"]))
def test_fit_meets_the_budget_and_leaves_no_room(problem, share, multiple, convention):
    network, k = problem
    counted = Cost(functools.partial(flops.prunable, convention=convention))
    smallest = Budget(network, 1.0, counted, multiple)
    least = smallest.cost(smallest.smallest_widths) / smallest.total
    budget = Budget(network, min(least + share * (1 - least) + 1e-12, 1.0), counted, multiple)
    budget.check()
    widths = budget.fit(k)
    assert all(isinstance(width, int) for width in widths)
    cost = flops.prunable(network, widths, convention)
    assert cost <= budget.p * flops.prunable(network, None, convention)
    if convention == "macs":
        assert cost == chain_cost(network, widths)
    for gate, (width, channels) in enumerate(zip(widths, network.widths, strict=True)):
        assert 1 <= width <= channels
        assert width % multiple == 0 or width == channels
        if width < channels:
            wider = list(widths)
            wider[gate] = min(width + multiple, channels)
            assert flops.prunable(network, wider, convention) > budget.wanted


@settings(max_examples=50, deadline=None)
@given(problems())
def test_fit_is_rounding_where_rounding_meets_the_budget_exactly(problem):
    network, k = problem
    rounded = tuple(max(int(np.floor(f * c + 0.5)), 1) for f, c in zip(k, network.widths, strict=True))
    p = chain_cost(network, rounded) / chain_cost(network, network.widths)
    assert Budget(network, min(p * (1 + 1e-9), 1.0)).fit(k) == rounded


def costs(network):
    """(name, unpruned network's cost, cost of widths); some costs increase with the widths, others do not."""
    bumps = np.random.default_rng(0).uniform(0.5, 1.5, (len(network.widths), 41))
    return {
        "parameters": flops.parameters,
        "bumpy": lambda _, widths: float(sum(bumps[i, width] * width for i, width in enumerate(widths))),
        "random": lambda _, widths: float(sum(bumps[i, width] for i, width in enumerate(widths))),
    }


@settings(max_examples=150, deadline=None)
@given(problems(), st.floats(0, 1), st.sampled_from([1, 3]), st.sampled_from(["parameters", "bumpy", "random"]))
def test_fit_needs_nothing_of_the_cost_but_its_value(problem, share, multiple, name):
    network, k = problem
    cost = costs(network)[name]
    smallest = [min(multiple, channels) for channels in network.widths]
    least = cost(network, smallest) / cost(network, network.widths)
    budget = Budget(network, least + share * (1 - least) + 1e-9, Cost(cost), multiple)
    widths = budget.fit(k)
    assert cost(network, widths) <= budget.wanted
    for gate, (width, channels) in enumerate(zip(widths, network.widths, strict=True)):
        assert width in {*range(multiple, channels, multiple), channels}
        wider = [*widths[:gate], min(width + multiple, channels), *widths[gate + 1 :]]
        assert width == channels or cost(network, wider) > budget.wanted


@settings(max_examples=100, deadline=None)
@given(problems(), st.floats(0.5, 1), st.sampled_from([1, 3]))
def test_no_larger_factor_meets_the_budget(problem, p, multiple):
    """If the cost decreases while widths grow, all factors on a fine grid are worse than the start of `fit`."""
    network, k = problem
    cost = costs(network)["random"]
    budget = Budget(network, p, Cost(cost), multiple)
    largest = max(1 / np.array(k)) * multiple * 2
    meeting = [f for f in np.linspace(0, largest, 400) if cost(network, budget.round(np.array(k) * f)) <= budget.wanted]
    if meeting:
        at_least = budget.round(np.array(k) * max(meeting))
        assert all(a >= b for a, b in zip(budget.fit(k), at_least, strict=True))


def test_fit_to_a_measured_table_literal():
    # Scaled together (a, b) is whole at 20 ms, and below that never at most 14 ms before (5, 5): 8 + 2 ms. The room of
    # 4 ms is filled in turn with a channel of a (1 ms) and one of b (1 ms), a first.
    budget = make_budget(config(kind="latency", p=0.7), TWO, lambda points, multiple: TIMES)
    assert (budget.total, budget.wanted) == (20.0, 14.0)
    assert budget.cost((5, 5)) == 10.0
    assert budget.fit((1.0, 1.0)) == (7, 7)
    # A bisection over the factor would end below (5, 5): at (1, 1) the second layer is slower than at (3, 3).
    assert budget.cost((1, 1)) == 10.0
    assert budget.cost((3, 3)) == 10.0


# check


def test_budget_in_flops():
    budget = Budget(TWO, 0.25)
    assert (budget.total, budget.wanted, budget.cost((4, 2)), budget.smallest_widths) == (40, 10, 10, (1, 1))
    # The authors' convention adds 3 per output of `first`, which shrinks with its gate, and 3 x 3 for `second`.
    authors = make_budget(config(convention="authors"), TWO, no_table)
    assert (authors.total, authors.cost((4, 2))) == (40 + 30 + 9, 10 + 12 + 9)


def test_a_budget_that_can_be_met_passes():
    for p in (0.1, 0.5, 1.0):
        Budget(TWO, p).check()


@pytest.mark.parametrize("p", [0.0, -0.5, 1.01, float("nan")])
def test_p_outside_its_range_is_refused(p):
    message = f"p={p} must be in (0, 1]: the fraction of the cost that remains."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Budget(TWO, p).check()


def test_a_budget_below_the_smallest_network_is_refused():
    message = (
        "p=0.05 cannot be met: it wants 2 prunable FLOPs (macs), but the smallest network (widths 1 or whole) "
        "has 4 and 4 parameters, the largest 40 and 40 parameters; use p of at least 0.1000."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Budget(TWO, 0.05).check()
    with pytest.raises(
        ValueError, match=r"has 32 and 32 parameters, .* use p of at least 0\.8000, or a multiple below 8\.$"
    ):
        Budget(TWO, 0.5, multiple=8).check()


@settings(max_examples=50, deadline=None)
@given(problems())
def test_the_p_that_the_refusal_names_is_accepted(problem):
    network, _ = problem
    try:
        Budget(network, 1e-9).check()
    except ValueError as error:
        Budget(network, float(re.search(r"at least ([\d.]+)\.$", str(error))[1])).check()
    else:
        pytest.fail("one billionth of the network was accepted")


def test_a_multiple_below_one_is_refused():
    with pytest.raises(ValueError, match=r"^multiple=0 must be a whole number of at least 1\.$"):
        Budget(TWO, 0.5, multiple=0).check()


def test_a_network_without_gates_is_refused():
    with pytest.raises(ValueError, match=r"^the network has no gate to prune; these stay unpruned: no layer was"):
        Budget(topology((), [("only", 1, 10, 1, None, None)]), 0.5).check()


# kinds


def test_budget_in_parameters():
    budget = make_budget(config(kind="params", p=0.5), TWO, no_table)
    assert (budget.total, budget.wanted, budget.cost((4, 2))) == (40, 20, 4 + 6)
    assert budget.fit((0.5, 0.5)) == (5, 5)


def test_a_parameter_budget_below_the_smallest_network_is_refused():
    message = (
        "budget.p=0.05 cannot be met: it wants 2 parameters, but the smallest network (widths 1 or whole) has 4, the "
        "largest 40; use p of at least 0.1000."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_budget(config(kind="params", p=0.05), TWO, no_table)


def test_a_latency_budget_below_the_smallest_network_is_refused():
    message = (
        "budget.p=0.45 cannot be met: it wants 9 ms (batch 32, abacus), but the smallest network (widths 1 or whole) "
        "has 10 and 4 parameters, the largest 20 and 40 parameters; use p of at least 0.5000."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_budget(config(kind="latency", p=0.45), TWO, lambda points, multiple: TIMES)


def test_a_table_by_which_the_smallest_network_is_the_slowest_is_refused():
    slow = LayerTimes("first", (1, 1, 1, 10), 1, (), (1, 10), ((40.0, 13.0),))
    table = LatencyTable("abacus", 32, (slow, TIMES.layers[1]))
    with pytest.raises(ValueError, match=r"has 46 and 4 parameters, the largest 20 and 40 parameters; no p does\.$"):
        make_budget(config(kind="latency", p=1.0), TWO, lambda points, multiple: table)


def test_the_table_is_asked_for_with_the_fields_of_the_configuration():
    asked = []

    def measured(points, multiple):
        asked.append((points, multiple))
        return TIMES

    make_budget(config(kind="latency", p=1.0, latency_points=7, multiple=2), TWO, measured)
    assert asked == [(7, 2)]


def test_a_multiple_of_zero_is_the_fastest_one():
    asked = []

    def measured(points, multiple):
        asked.append(multiple)
        return TIMES

    fours = multiples.MultipleTimes("abacus", 32, "xla", {"1": 10.0, "4": 8.0}, TWO.widths)
    budget = make_budget(config(kind="latency", p=1.0, multiple=0), TWO, measured, lambda: fours)
    assert (budget.multiple, asked) == (4, [4])
    assert make_budget(config(p=0.5, multiple=0), TWO, no_table, lambda: fours).multiple == 4
    smallest = Budget(TWO, 1.0).least_p
    assert make_budget(config(p=smallest, multiple=0), TWO, no_table, lambda: fours).multiple == 1
    with pytest.raises(ValueError, match="the network has no gate to prune"):  # before anything is measured
        make_budget(config(multiple=0), topology((), [("only", 3, 5, 1, None, None)]), no_table)


def test_what_is_unused_has_a_reason_only_where_no_gate_can_be_wider():
    budget = Budget(TWO, 0.7, multiple=5)
    filled = budget.fit((1.0, 0.5))
    assert filled == (10, 5)  # 25 of 28
    assert budget.describe(filled).splitlines()[3] == (
        "  11% of the budget is unused: at these widths no gate can be a step wider within it."
    )
    assert budget.describe((5, 5)).splitlines()[3] == "  29% of the budget is unused."


def test_a_network_without_gates_is_refused_before_anything_is_measured():
    nothing = topology((), [("only", 1, 10, 1, None, None)])
    with pytest.raises(ValueError, match=r"^the network has no gate to prune"):
        make_budget(config(kind="latency"), nothing, no_table)


@pytest.mark.parametrize(("kind", "p"), [("flops", 0.3), ("params", 0.3), ("latency", 0.6)])
def test_gradient_descent_on_the_resource_loss_reaches_the_budget(kind, p):
    budget = make_budget(config(kind=kind, p=p), TWO, lambda points, multiple: TIMES)
    optimizer = optax.adam(0.02)

    def loss(logits):
        return losses.resource("square", budget.cost(10 * jax.nn.sigmoid(logits)), budget.total, budget.p)

    def step(_, carry):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits), state)
        return optax.apply_updates(logits, updates), state

    start = jnp.full(2, 3.0)
    logits, _ = jax.jit(lambda carry: jax.lax.fori_loop(0, 500, step, carry))((start, optimizer.init(start)))
    k = jax.nn.sigmoid(logits)
    assert float(budget.cost(10 * k)) == pytest.approx(budget.wanted, rel=0.02)
    widths = budget.fit(np.asarray(k))
    assert budget.cost(widths) <= budget.wanted
    np.testing.assert_allclose(widths, 10 * k, atol=1.01)


@pytest.mark.parametrize("kind", ["flops", "params", "latency"])
def test_a_traced_cost_is_the_integer_one_and_its_slope(kind):
    budget = make_budget(config(kind=kind, p=1.0), TWO, lambda points, multiple: TIMES)
    cost = jax.jit(jax.value_and_grad(budget.cost))
    slopes = {"flops": [1, 3], "params": [1, 3], "latency": [1, -1]}
    for widths in [(2, 3), (9, 4)]:
        value, slope = cost(jnp.array(widths, jnp.float32))
        assert float(value) == pytest.approx(budget.cost(widths), rel=1e-6)
        assert slope.tolist() == slopes[kind]


def test_a_budget_in_latency_finds_the_fastest_multiple(monkeypatch):
    fours = multiples.MultipleTimes("abacus", 32, "xla", {"1": 10.0, "4": 8.0}, TWO.widths)
    monkeypatch.setattr(multiples, "measure", lambda timer: fours)
    assert kinds.latency_budget(NetworkTimer(None, TWO, 32), 0.9, "auto", table=TIMES).multiple == 4
    with pytest.raises(ValueError, match=r"multiple='fast' must be a whole number"):
        kinds.latency_budget(NetworkTimer(None, TWO, 32), 0.9, "fast", table=TIMES)


def test_a_budget_in_latency_is_checked_before_it_is_measured(monkeypatch):
    monkeypatch.setattr(kinds.latency, "measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"p=1\.5 must be in"):
        kinds.latency_budget(NetworkTimer(None, TWO, 32), 1.5)
