import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from test_ddnp import (
    CLASSES,
    IMAGES,
    LABELS,
    SIZE,
    VARIABLES,
    WIDTHS,
    Tiny,
    assert_a_step_keeps_shapes_and_types,
    compiled,
    convolutions,
    leaves,
    reference_forward,
    topology,
    weight_gradients,
)
from test_predictor import dense, make_variables, reference_table_2
from torch.nn import functional

from ddnp_jax import methods
from ddnp_jax.cost.budget import Budget
from ddnp_jax.methods import masks
from ddnp_jax.methods.nppm import memory as episodic
from ddnp_jax.methods.nppm import search as nppm
from ddnp_jax.methods.nppm.predictor import PREDICTORS

D = sum(WIDTHS)
NO_LOSS = methods.Measured(jnp.float32(0), jnp.float32(0), {})


def make_problem(p=0.4, steps=10, **fields):
    config = methods.configure("nppm", fields)
    return methods.Problem(Tiny(), VARIABLES, topology(), Budget(topology(), p), config, steps)


def make_search(problem, monkeypatch=None):
    """Builds the search; with `monkeypatch`, it uses gradient descent with rate 1, so that changes are gradients."""
    if monkeypatch:
        monkeypatch.setattr(optax, "adamw", lambda rate, weight_decay: optax.sgd(1.0))
    return nppm.build(problem)


def step_of(search, state, seed=7):
    return compiled(search)(state, VARIABLES, (IMAGES, LABELS), jax.random.key(seed))


def with_memory(state, count, seed=3):
    rng = np.random.default_rng(seed)
    memory = state.memory
    for _ in range(count):
        memory = episodic.add(memory, np.float32(rng.integers(0, 2, D)), np.float32(rng.random()), steps=1)
    return state.replace(memory=memory)


# The projection


@pytest.mark.parametrize("seed", range(4))
def test_projection_is_orthogonal_gate_by_gate(seed):
    widths = (3, 1, 7, 16)
    rng = np.random.default_rng(seed)
    gradient, onto = (np.float32(rng.normal(size=sum(widths))) for _ in range(2))
    onto[3:4] = 0  # a gate without a gradient of the loss
    found = np.asarray(nppm.project(gradient, onto, widths))
    start = 0
    for width in widths:
        part = slice(start, start + width)
        p, base = gradient[part].astype(np.float64), onto[part].astype(np.float64)
        wanted = p - (base @ p) / (base @ base) * base if base.any() else p
        np.testing.assert_allclose(found[part], wanted, atol=1e-5)
        assert abs(found[part] @ base) < 1e-5
        start += width


def test_projection_of_a_tiny_gradient_is_finite():
    onto = np.float32([1e-30, -1e-30, 0, 2])
    found = nppm.project(np.float32([1, 2, 3, 4]), onto, (2, 2))
    np.testing.assert_allclose(found, [1, 2, 3, 0], atol=1e-6)


# One step against the equations, written in PyTorch


def predict(form, variables, gates, train):
    """Logits of PN in PyTorch."""
    if form == "gru":
        return reference_table_2(variables, gates, WIDTHS, train)[0]
    return dense(variables["params"]["head"], gates)[:, 0]


def reference_step(state, config, key, p):
    """The three gradients of the gates, per term."""
    theta = torch.tensor(np.asarray(state.gates), requires_grad=True)
    gate_key, noise_key, _ = jax.random.split(key, 3)  # the order in which the step draws
    gumbel = torch.tensor(np.asarray(jax.random.gumbel(gate_key, (D,))))
    noise = torch.tensor(np.asarray(jax.random.normal(noise_key, (D,))))
    relaxed = torch.sigmoid((theta + gumbel + 3) / 0.4)
    hard = relaxed + ((relaxed >= 0.5).float() - relaxed).detach()
    masks = torch.split(hard, WIDTHS)
    logits, _ = reference_forward(masks)
    cross_entropy = functional.cross_entropy(logits, torch.tensor(LABELS))
    a, b = (mask.sum() for mask in masks)
    pixels = SIZE * SIZE
    ratio = (pixels * 27 * a + pixels * 9 * a * b + CLASSES * b) / (
        pixels * 27 * 8 + pixels * 9 * 8 * 24 + CLASSES * 24
    )
    resource = torch.clamp(ratio / p, min=1).log()
    judged = torch.clip(relaxed + config.predictor_noise * noise, 0, 1)
    performance = -torch.sigmoid(predict(config.predictor, state.predictor, judged[None], train=False)[0]).log()
    terms = {"cross_entropy": cross_entropy, "resource": config.resource_weight * resource, "performance": performance}
    gradients = {name: torch.autograd.grad(term, theta, retain_graph=True)[0].numpy() for name, term in terms.items()}
    accuracy = (logits.argmax(-1) == torch.tensor(LABELS)).float().mean().item()
    return terms, gradients, hard.detach().numpy(), accuracy


def orthogonal(gradient, onto):
    parts = zip(np.split(gradient, [WIDTHS[0]]), np.split(onto, [WIDTHS[0]]), strict=True)
    return np.concatenate([g - (base @ g) / (base @ base) * base for g, base in parts])


@pytest.mark.parametrize(
    ("form", "loss", "projection"), [("linear", "absolute", True), ("gru", "squared", True), ("gru", "absolute", False)]
)
def test_one_step_matches_the_equations(form, loss, projection, monkeypatch):
    # A small σ, so that PN's gradient is not clipped away.
    problem = make_problem(
        predictor=form,
        predictor_loss=loss,
        projection=projection,
        predictor_noise=0.2,
        predictor_batch_size=4,
        memory_size=9,
        memory_steps=1,
    )
    search = make_search(problem, monkeypatch)
    state = search.init(jax.random.key(0))
    rng = np.random.default_rng(5)
    gates = np.float32(rng.normal(-3.0, 0.4, D))
    predictor = make_variables(PREDICTORS[form](WIDTHS))
    state = with_memory(state.replace(gates=gates, predictor=predictor), 6)
    after, metrics = step_of(search, state, seed=11)

    terms, wanted, hard, accuracy = reference_step(state, problem.config, jax.random.key(11), p=0.4)
    assert 0.3 < hard.mean() < 0.8
    for name in wanted:
        assert np.max(np.abs(wanted[name])) > 1e-3, name
    own = orthogonal(wanted["performance"], wanted["cross_entropy"]) if projection else wanted["performance"]
    update = wanted["cross_entropy"] + wanted["resource"] + own
    np.testing.assert_allclose(gates - after.gates, update, atol=5e-6, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], sum(terms.values()).item(), rtol=1e-5)
    predicted = torch.sigmoid(predict(form, state.predictor, torch.tensor(hard)[None], train=False)).item()
    np.testing.assert_allclose(metrics["predicted_top1"], 100 * predicted, rtol=1e-4)
    np.testing.assert_allclose(metrics["prediction_error"], 100 * abs(predicted - accuracy), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(after.memory.gates[6], hard)
    np.testing.assert_allclose(after.memory.accuracy[6], accuracy, rtol=1e-6)

    # PN's own step: its error on what the memory gives.
    drawn, known = episodic.sample(after.memory, jax.random.split(jax.random.key(11), 3)[2], 4, balanced=True)
    head = predictor["params"]["head"]
    kernel = torch.tensor(head["kernel"], requires_grad=True)
    params = {**predictor["params"], "head": {**head, "kernel": kernel}}
    logits = predict(form, {**predictor, "params": params}, torch.tensor(np.asarray(drawn)), train=True)
    error = torch.sigmoid(logits) - torch.tensor(np.asarray(known))
    objective = {"absolute": error.abs(), "squared": error**2}[loss].mean()
    objective.backward()
    np.testing.assert_allclose(metrics["predictor_loss"], objective.item(), rtol=1e-5)
    moved = head["kernel"] - after.predictor["params"]["head"]["kernel"]
    np.testing.assert_allclose(moved, kernel.grad.numpy(), atol=1e-6)


def test_pn_waits_until_the_memory_has_more_than_a_batch(monkeypatch):
    search = make_search(make_problem(predictor_batch_size=3, memory_size=8, memory_steps=2), monkeypatch)
    start = search.init(jax.random.key(0))
    alone = make_search(make_problem(predictor="none"), monkeypatch)
    state, counts, moved = start, [], []
    for seed in range(8):
        after, metrics = step_of(search, state, seed)
        counts.append(int(after.memory.count))
        now, before = leaves(after.predictor), leaves(state.predictor)
        changed = [name for name in now if np.any(now[name] != before[name])]
        assert not changed or any("batch_stats" in name for name in changed)
        moved.append(bool(changed))
        without = step_of(alone, alone.init(jax.random.key(0)).replace(gates=state.gates), seed)[0]
        np.testing.assert_array_equal(after.gates, without.gates)  # PN has no say before it has learned
        assert np.isfinite(metrics["predictor_loss"]) == moved[-1]
        state = after
    assert counts == [0, 1, 1, 2, 2, 3, 3, 4]
    assert moved == [False] * 7 + [True]
    after, _ = step_of(search, state, seed=8)
    without = step_of(alone, alone.init(jax.random.key(0)).replace(gates=state.gates), 8)[0]
    assert np.any(after.gates != without.gates)


def test_four_devices_take_the_step_of_one():
    search = make_search(make_problem(predictor_batch_size=4, memory_size=9))
    state = with_memory(search.init(jax.random.key(0)), 6)
    batch = (IMAGES, LABELS), jax.random.key(7)
    one, metrics_of_one = compiled(search)(state, VARIABLES, *batch)
    four, metrics_of_four = compiled(search, devices=4)(state, VARIABLES, *batch)
    for name, value in (leaves(one) | leaves(metrics_of_one)).items():
        np.testing.assert_allclose((leaves(four) | leaves(metrics_of_four))[name], value, atol=2e-4, err_msg=name)


def test_the_resource_term_alone_leads_to_the_budget(monkeypatch):
    monkeypatch.setattr(nppm._NPPM, "task", lambda self, gates, *_: (0.0 * jnp.sum(gates), NO_LOSS))
    problem = make_problem(predictor="none", steps=400, resource_loss="log_abs", p=0.3, initial_deviation=0.01)
    search = make_search(problem)
    state, step, remaining = search.init(jax.random.key(0)), compiled(search), []
    for seed in range(400):
        state, metrics = step(state, VARIABLES, (IMAGES, LABELS), jax.random.key(seed))
        remaining.append(float(metrics["remaining"]))
    assert remaining[0] == 1.0
    assert abs(np.mean(remaining[300:]) - 0.3) < 0.05


def test_an_accuracy_that_rounds_to_zero_has_a_finite_gradient():
    search = make_search(make_problem(predictor="linear", predictor_noise=0.0))
    own = search.init.__self__
    hopeless = {"params": {"head": {"kernel": np.full((D, 1), -9.0, np.float32), "bias": np.float32([-50.0])}}}
    gates = jnp.full(D, -3.0)
    (value, _), gradient = jax.value_and_grad(own.performance, has_aux=True)(
        gates, hopeless, jax.random.key(0), jax.random.key(1)
    )
    assert 50 < value < 400
    assert np.all(np.isfinite(gradient)) and np.all(gradient > 0)


def test_proposal_keeps_the_gates_that_are_open_more_often_than_not():
    search = make_search(make_problem(predictor="none"))
    gates = np.float32([-2, -3.4, -3.36, 0, -9, -2.9, -5, -3.37, *[-4.0] * 24])
    importance, k = search.propose(search.init(jax.random.key(0)).replace(gates=gates))
    np.testing.assert_array_equal(importance[0], gates[:8])
    np.testing.assert_allclose(k, [4 / 8, 1 / 24])  # a closed gate proposes one channel
    drawn = [masks.relaxed_bernoulli(jnp.full(20_000, theta), jax.random.key(1)) for theta in gates[1:3]]
    open_often = 1 - np.exp(-np.exp(np.float64(gates[1:3]) + 3))  # how often g >= -θ - 3
    np.testing.assert_allclose([np.mean(gate >= 0.5) for gate in drawn], open_often, atol=0.02)
    assert open_often[0] < 0.5 < open_often[1]


def ended(p, **fields):
    """The remark of a search whose gates leave 8 of 8 and 6 of 24 channels open, 4 of the others nearly."""
    search = make_search(make_problem(p=p, predictor="none", **fields))
    gates = np.float32([0] * 8 + [0] * 6 + [-3.4] * 4 + [-9] * 14)
    (said,) = search.ended(search.init(jax.random.key(0)).replace(gates=gates))
    return said


def test_a_search_says_whether_it_has_reached_the_budget():
    # T at 8 and 6 channels is 972 * 8 + 324 * 48 + 5 * 6 = 23,358 of 70,104; -3.4 is open with a probability of 0.488.
    undecided = "and 12.5 % of the channels are undecided (open with a probability between 1/4 and 3/4)."
    found = "the network of the open gates has 0.3332 of the cost, R is"
    assert ended(0.33) == f"The search has converged: {found} 0.0096, {undecided}"
    assert ended(0.3) == (
        f"The search has not converged: {found} 0.1049, {undecided} What helps: more than 10 steps; "
        "optimizer.learning_rate=0.05 raised; resource_weight=4 raised, where R has stopped falling."
    )
    below = "more than 10 steps; resource_loss=log_abs, by which a cost below the budget counts too."
    assert ended(0.4) == f"The search has not converged: {found} 0.0000, {undecided} What helps: {below}"
    assert ended(0.4, resource_loss="log_abs").endswith("What helps: more than 10 steps.")


def test_gates_start_as_wide_as_asked_for():
    for fields, deviation in (({}, 1.0), ({"initial_deviation": 0.01}, 0.01)):
        gates = make_search(make_problem(predictor="none", **fields)).init(jax.random.key(0)).gates
        assert np.std(gates) == pytest.approx(deviation, rel=0.3)
        assert len(np.unique(gates)) == D


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predictor": "lstm"}, "predictor='lstm' is unknown; use one of 'none', 'gru', 'authors', 'linear'"),
        ({"predictor_loss": "huber"}, "predictor_loss='huber' is unknown; use one of 'absolute', 'squared'"),
        ({"memory_steps": 0}, "memory_steps=0 must be at least 1"),
        ({"predictor_batch_size": 0}, "predictor_batch_size=0 must be at least 1"),
        ({"predictor_noise": -1.0}, "predictor_noise=-1.0 must be at least 0"),
        ({"initial_deviation": -1.0}, "initial_deviation=-1.0 must be at least 0"),
        ({"decay_at": 80}, r"decay_at=80.* must be in \(0, 1\]"),
        ({"memory_size": 64}, "memory_size=64 must be above predictor_batch_size=64"),
    ],
)
def test_refusals_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        nppm.build(make_problem(**fields))


def test_dg_has_no_memory_to_refuse():
    assert nppm.build(make_problem(predictor="none", memory_size=1)).notes == ()


def test_a_search_that_is_too_short_for_pn_says_so():
    def notes(steps):
        return nppm.build(make_problem(steps=steps, predictor_batch_size=3, memory_steps=2)).notes

    assert notes(9) == notes(100) == ()  # the ninth step finds four pairs
    (note,) = notes(8)
    assert "more than 3 pairs (before the last step it held 3): the result is that of DG" in note


def test_defaults_are_the_authors():
    assert methods.METHODS["nppm"].job_fields == {"augment": True}
    assert methods.default_fields("nppm") == {
        "resource_loss": "log_max",
        "resource_weight": 4.0,
        "initial_deviation": 1.0,
        "optimizer": {"learning_rate": 0.05, "weight_decay": 0.01},
        "decay_at": 0.8,
        "predictor": "gru",
        "predictor_loss": "absolute",
        "predictor_batch_size": 64,
        "predictor_optimizer": {"learning_rate": 0.001, "weight_decay": 0.001},
        "predictor_noise": 15.0,
        "projection": True,
        "memory_size": 500,
        "memory_steps": 2,
        "memory_balanced": True,
    }


def test_the_gates_rate_falls_at_four_fifths():
    optimizer = nppm.make_optimizer(nppm.Fields(), steps=10)
    gates = jnp.array([2.0])
    state, moves = optimizer.init(gates), []
    for _ in range(10):  # a constant gradient makes Adam's step the learning rate; the decay adds 0.01 of the gate
        updates, state = optimizer.update(jnp.ones(1), state, gates)
        moves.append(-updates[0])
    np.testing.assert_allclose(moves, 1.02 * np.array([0.05] * 8 + [0.005] * 2), rtol=1e-4)


@pytest.mark.parametrize("form", ["none", *PREDICTORS])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_keeps_shapes_and_types_so_that_it_can_be_scanned(form, dtype):
    assert_a_step_keeps_shapes_and_types(nppm.build(make_problem(predictor=form)._replace(model=Tiny(dtype))))


def test_no_weight_gradient_of_the_backbone_is_computed():
    shapes = convolutions(nppm.build(make_problem()))
    assert len(shapes) == 3  # two forward, and back through the second to the first gate
    assert not weight_gradients(shapes)


def test_every_device_holds_the_same_gates_predictor_and_memory():
    search = nppm.build(make_problem(memory_size=4, memory_steps=1, predictor_batch_size=2))
    state = search.init(jax.random.key(0))
    for n in range(6):  # PN takes part in the last three, the memory is full in the last two
        state, metrics = compiled(search, devices=4)(state, VARIABLES, (IMAGES, LABELS), jax.random.key(n))
    assert int(state.memory.count) == 4 and np.isfinite(metrics["predictor_loss"])
    for path, leaf in jax.tree_util.tree_leaves_with_path((state, metrics)):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(others) == 3
        for other in others:
            np.testing.assert_array_equal(other, first, err_msg=jax.tree_util.keystr(path))


def test_seeds_at_once_are_searches_of_their_own():
    # Of a batch of two, batch norm leaves PN of Table 2 gradients that are rounding alone.
    search = nppm.build(make_problem(memory_size=4, memory_steps=1, predictor_batch_size=2, predictor="linear"))
    seeds = (3, 5)
    states = [search.init(jax.random.key(seed)) for seed in seeds]
    state, step = methods.over_seeds(search, seeds)
    for n in range(4):  # PN takes part in the last
        state, metrics = compiled(search._replace(step=step))(state, VARIABLES, (IMAGES, LABELS), jax.random.key(n))
        keys = [jax.random.fold_in(jax.random.key(n), seed) for seed in seeds]
        found = [compiled(search)(own, VARIABLES, (IMAGES, LABELS), key) for own, key in zip(states, keys, strict=True)]
        states, own_metrics = [list(part) for part in zip(*found, strict=True)]
        assert metrics["loss"] == pytest.approx(np.mean([own["loss"] for own in own_metrics]), rel=1e-5)
        for seed, own in zip(seeds, own_metrics, strict=True):
            mine = {name: float(x) for name, x in metrics.items() if name.startswith(f"seed{seed}/")}
            wanted = {f"seed{seed}/{name}": float(x) for name, x in own.items()}
            assert mine == pytest.approx(wanted, rel=1e-4, abs=1e-5, nan_ok=True)
    assert own_metrics[0]["predictor_loss"] > 0
    assert int(state.step) == 4
    for place, own in enumerate(states):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), state.of(place), own)
    assert np.abs(states[0].gates - states[1].gates).max() > 1e-2
