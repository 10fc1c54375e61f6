import functools
import itertools

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import PartitionSpec as P
from test_masks import reference_ranks, reference_soft_top_k
from torch.nn import functional

import ddnp_jax
from ddnp_jax import methods, parallel
from ddnp_jax.cost.budget import Budget
from ddnp_jax.methods import masks, searching
from ddnp_jax.methods.ddnp import search as ddnp

SIZE = 6
CLASSES = 5
WIDTHS = (8, 24)  # the first too narrow for a band, the second with a band of one rank
AUTHORS = {
    "bidirectional": True,
    "layer_norm": True,
    "energy_weight": 0.5,
    "importance_average": 0.99,
    "importance": "generator",
    "width": "linear",
}


class Tiny(nn.Module):
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        for i, width in enumerate(WIDTHS, 1):
            x = nn.Conv(width, (3, 3), use_bias=False, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype, name=f"bn{i}")(x))
        return nn.Dense(CLASSES, dtype=self.dtype, name="head")(x.mean((1, 2)))


@functools.cache
def topology():
    return ddnp_jax.trace(Tiny(), (SIZE, SIZE, 3))


def make_variables():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Tiny().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    draw = {"kernel": (0, 0.3), "scale": (1, 0.2), "bias": (0, 0.2), "mean": (0, 0.2)}

    def value(path, x):
        name = path[-1].key
        return np.float32(rng.uniform(0.5, 1.5, x.shape) if name == "var" else rng.normal(*draw[name], x.shape))

    return jax.tree_util.tree_map_with_path(value, shapes)


VARIABLES = make_variables()
RNG = np.random.default_rng(1)
IMAGES, LABELS = np.float32(RNG.normal(size=(8, SIZE, SIZE, 3))), RNG.integers(0, CLASSES, 8)


def make_config(**fields):
    return methods.configure("ddnp", {"importance": "scalar", "width": "scalar", **fields})


def make_problem(steps=10, p=0.4, model=None, **fields):
    budget = Budget(topology(), p)
    return methods.Problem(model or Tiny(), VARIABLES, topology(), budget, make_config(**fields), steps)


ENERGIES = tuple(np.float32(np.random.default_rng(2).uniform(0.1, 3, c)) for c in WIDTHS)  # summed over images


def build(problem):
    """Builds the search; in the authors' form, the feature energies are `ENERGIES`."""
    search = ddnp.build(problem)
    return search if search.survey is None else search.survey.then(ENERGIES)


@functools.cache
def compiled(search, devices=1):
    """The search's step over some devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    specs = {"in_specs": (P(), P(), P("data"), P()), "out_specs": P()}
    quick = {"xla_backend_optimization_level": "0"}  # compiling takes longer than running here
    step = functools.partial(search.step, devices=parallel.OVER_DEVICES)
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs), compiler_options=quick)


def make_state(search, seed=0):
    """The search's state with random learned variables, which is faster than the generators' initialization."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        at_random = path[0].name in ("params", "inputs")
        return np.float32(rng.normal(0, 0.3, x.shape)) if at_random else np.zeros(x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(search.init, jax.random.key(0)))


def one_step(search, state=None, seed=7, images=IMAGES):
    state = make_state(search) if state is None else state
    return state, *compiled(search)(state, VARIABLES, (images, LABELS), jax.random.key(seed))


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# One step against the equations, written in PyTorch


def reference_forward(factors):
    """Logits with masks on the inputs of the layers, and these inputs, (N, C, H, W) per gate."""
    weights = jax.tree.map(torch.tensor, VARIABLES)
    params, stats = weights["params"], weights["batch_stats"]
    x, read = torch.tensor(IMAGES).permute(0, 3, 1, 2), []
    for i, factor in enumerate(factors, 1):
        conv, bn = params[f"conv{i}"]["kernel"].permute(3, 2, 0, 1), f"bn{i}"
        x = functional.conv2d(x, conv, padding=1)
        scale, bias = params[bn]["scale"], params[bn]["bias"]
        x = functional.relu(functional.batch_norm(x, stats[bn]["mean"], stats[bn]["var"], scale, bias, eps=1e-5))
        x = x.mean((2, 3), keepdim=True) if i == len(factors) else x  # the head reads the average
        read.append(x.detach())
        x = x * factor[:, None, None]
    return x[..., 0, 0] @ params["head"]["kernel"] + params["head"]["bias"], read


def reference_step(state, config, key, p):
    """Losses and gradients of DDNP eq. (9) for scalar importance and width."""
    params = {
        k: torch.tensor(np.asarray(v), requires_grad=True)
        for k, v in (
            ("k", state.params["width"]["k"]),
            ("s0", state.params["importance"]["s0"]),
            ("s1", state.params["importance"]["s1"]),
        )
    }
    scores = [params["s0"], params["s1"]]
    *gate_keys, tie_key = jax.random.split(key, 3)  # the order in which the step draws
    noises = [torch.tensor(np.asarray(jax.random.gumbel(k, (c,)))) for k, c in zip(gate_keys, WIDTHS, strict=True)]
    u = torch.tensor(np.asarray(jax.random.uniform(tie_key, (2,), minval=-0.02, maxval=0.02)))

    gates = [torch.sigmoid((s + g + 3) / 0.4) for s, g in zip(scores, noises, strict=True)]
    k = torch.sigmoid(params["k"] + 3)
    output = {"sigmoid": torch.sigmoid, "abs": torch.abs, "square": torch.square}[config.output]
    weight = config.energy_weight
    importance = [
        (1 - weight) * torch.sigmoid(s + g + 3).detach() + weight * torch.tensor(e / e.max())
        if weight
        else output(s.detach())
        for s, g, e in zip(scores, noises, ENERGIES, strict=True)
    ]
    soft = [
        torch.tensor(reference_soft_top_k(k[i].item(), reference_ranks(s.tolist()), 0.05, 0.025), dtype=torch.float32)
        for i, s in enumerate(importance)
    ]
    for mask in soft:
        mask.requires_grad_()
    logits, _ = reference_forward([mask * gate for mask, gate in zip(soft, gates, strict=True)])
    cross_entropy = functional.cross_entropy(logits, torch.tensor(LABELS))

    hard = [gate + ((gate >= 0.5).float() - gate).detach() for gate in gates]
    a, b = ((k[i] * c + hard[i].sum()) / 2 for i, c in enumerate(WIDTHS))  # T from both width estimates
    pixels = SIZE * SIZE
    ratio = (pixels * 27 * a + pixels * 9 * a * b + CLASSES * b) / (
        pixels * 27 * 8 + pixels * 9 * 8 * 24 + CLASSES * 24
    )
    resource = {
        "log_abs": (ratio / p).log().abs(),
        "log_max": torch.clamp(ratio / p, min=1).log(),
        "abs": (ratio - p).abs(),
        "square": (ratio - p) ** 2,
    }[config.resource_loss]
    opened = torch.stack([(gate >= 0.5).float().mean() for gate in gates])
    tie = ((opened - k + u).abs() + 1).log().sum()
    loss = cross_entropy + config.resource_weight * resource + config.tie_weight * tie
    loss.backward(retain_graph=True)
    # "the mean over the C_l entries of dL/dm", where PyTorch sees a constant mask
    k.backward(torch.stack([mask.grad.mean() for mask in soft]))
    terms = {
        "loss": loss,
        "cross_entropy": cross_entropy,
        "resource_loss": resource,
        "tie_loss": tie,
        "remaining": ratio,
    }
    return {k: v.item() for k, v in terms.items()}, {k: v.grad.numpy() for k, v in params.items()}, importance


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"resource_loss": "square", "output": "abs", "tie_weight": 0.3},
        {"resource_loss": "log_max", "output": "square", "energy_weight": 0.5, "importance_average": 0.99},
        {"resource_loss": "abs", "resource_weight": 0.7, "energy_weight": 0.5},
    ],
    ids=str,
)
def test_one_step_matches_the_equations(fields, monkeypatch):
    # Plain gradient descent with rate 1: the step's change of the parameters is its gradient.
    monkeypatch.setattr(ddnp, "make_optimizer", lambda config, steps: optax.sgd(1.0))
    problem = make_problem(**fields)
    search = build(problem)
    state = make_state(search)
    rng = np.random.default_rng(5)

    def draw(x):
        return np.float32(rng.uniform(size=x.shape))

    scores = {name: np.float32(rng.normal(-2.5, 1, x.shape)) for name, x in state.params["importance"].items()}
    params = {"importance": scores, "width": {"k": np.float32([-2.2, -3.3])}}
    state = state.replace(params=params, ranking=jax.tree.map(draw, state.ranking))

    _, after, metrics = one_step(search, state, seed=11)
    terms, gradients, importance = reference_step(state, problem.config, jax.random.key(11), p=0.4)
    for name, value in terms.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    often = [np.mean(1 - np.exp(-np.exp(np.float64(s) + 3))) for s in scores.values()]  # open at g >= -s - 3
    gaps = np.abs(often - 1 / (1 + np.exp(-np.float64(params["width"]["k"]) - 3)))
    found = metrics["width_gap"], metrics["largest_width_gap"]
    np.testing.assert_allclose(found, [gaps.mean(), gaps.max()], rtol=1e-4)
    flat = {**after.params["importance"], **after.params["width"]}
    before = {**scores, **params["width"]}
    for name, gradient in gradients.items():
        assert np.max(np.abs(gradient)) > 1e-3
        np.testing.assert_allclose(before[name] - flat[name], gradient, atol=2e-6, rtol=1e-4, err_msg=name)
    for gate in range(2):
        decay = problem.config.importance_average
        wanted = decay * state.ranking[gate] + (1 - decay) * importance[gate].numpy()
        np.testing.assert_allclose(after.ranking[gate], wanted, atol=1e-6)
    assert after.step == 1


# What is learned, and what stays


@pytest.mark.parametrize("importance", ["generator", "scalar", "l1"])
@pytest.mark.parametrize("width", ["generator", "linear", "scalar", "half"])
def test_every_combination_learns_exactly_what_is_learned(importance, width):
    learned_inputs = (importance, width) in {("generator", "half"), ("l1", "generator")}
    search = ddnp.build(make_problem(importance=importance, width=width, learned_inputs=learned_inputs))
    before, after, metrics = one_step(search)
    generated = {"params"} if learned_inputs else {"params", "inputs"}
    parts = {"generator": generated, "linear": generated, "scalar": {"params"}}
    for part, kind in (("importance", importance), ("width", width)):
        held = {name for name, tree in (("params", before.params), ("inputs", before.inputs)) if tree[part]}
        assert held == parts.get(kind, set())
    for name, value in leaves(before.params).items():
        assert np.any(leaves(after.params)[name] != value), f"{name} has not changed"
    for name, value in leaves(before.inputs).items():
        np.testing.assert_array_equal(leaves(after.inputs)[name], value)
    assert ("cross_entropy" in metrics) == (importance != "l1")
    assert np.isfinite(metrics["loss"])
    scores, k = search.propose(jax.device_get(after))
    assert [s.shape for s in scores] == [(8,), (24,)] and k.shape == (2,)
    if width == "half":
        np.testing.assert_array_equal(k, [0.5, 0.5])
    else:
        assert np.all((k > 0.5) & (k < 1))
    if importance == "l1":
        for found, name in zip(scores, ("conv1", "conv2"), strict=True):
            norms = np.abs(VARIABLES["params"][name]["kernel"]).sum((0, 1, 2))
            np.testing.assert_array_equal(np.argsort(found), np.argsort(norms))


def test_fixed_importance_opens_the_gates_above_the_mean_norm():
    learner = ddnp.importance_learner(make_problem(importance="l1"))
    for logits, name in zip(learner.apply({}), ("conv1", "conv2"), strict=True):
        norms = np.abs(np.float64(VARIABLES["params"][name]["kernel"])).sum((0, 1, 2))
        np.testing.assert_allclose(logits + 3, (norms - norms.mean()) / norms.std(), atol=1e-5)
        np.testing.assert_array_equal(masks.relaxed_bernoulli(logits, None) > 0.5, norms > norms.mean())


@pytest.mark.parametrize("output", ["sigmoid", "abs", "square"])
def test_fixed_importance_ranks_by_l1_norm_whatever_the_output(output):
    search = ddnp.build(make_problem(importance="l1", output=output))
    scores, _ = search.propose(search.init(jax.random.key(0)))
    for found, name in zip(scores, ("conv1", "conv2"), strict=True):
        norms = np.abs(VARIABLES["params"][name]["kernel"]).sum((0, 1, 2))
        np.testing.assert_array_equal(np.argsort(found), np.argsort(norms))


def test_fixed_importance_uses_no_images():
    nowhere = np.full_like(IMAGES, np.nan)
    search = ddnp.build(make_problem(importance="l1"))
    _, with_images, metrics = one_step(search)
    _, without, _ = one_step(search, images=nowhere)
    assert np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, with_images, without)
    assert not convolutions(search)
    assert len(convolutions(ddnp.build(make_problem()))) == 3  # the check sees them where there are some


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def convolutions(search_or_function, *arguments):
    """Output shapes of all convolutions in a step."""
    f = search_or_function
    if not arguments:
        state = jax.eval_shape(f.init, jax.random.key(0))
        f, arguments = f.step, (state, VARIABLES, (IMAGES, LABELS), jax.random.key(0))
    closed = jax.make_jaxpr(f)(*arguments)
    found = [e for e in equations(closed.jaxpr) if e.primitive.name == "conv_general_dilated"]
    return [e.outvars[0].aval.shape for e in found]


def weight_gradients(shapes):
    """Those of the shapes that are gradients of the backbone's kernels."""
    kernels = {tuple(sorted(VARIABLES["params"][name]["kernel"].shape)) for name in ("conv1", "conv2")}
    return [shape for shape in shapes if tuple(sorted(shape)) in kernels]


def test_no_weight_gradient_of_the_backbone_is_computed():
    shapes = convolutions(build(make_problem(**AUTHORS)))
    assert len(shapes) == 3  # two forward, and back through the second to the first gate
    assert not weight_gradients(shapes)

    def whole_gradient(variables):  # the check sees weight gradients where there are some
        return jax.grad(lambda v: jnp.sum(Tiny().apply(v, IMAGES)))(variables)

    assert len(weight_gradients(convolutions(whole_gradient, VARIABLES))) == 2


def test_a_step_is_deterministic_and_follows_its_key():
    search = ddnp.build(make_problem())
    state, *first = one_step(search)
    _, *again = one_step(search, state)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    _, _, metrics = one_step(search, state, seed=8)
    assert metrics["cross_entropy"] != first[1]["cross_entropy"]
    assert metrics["tie_loss"] != first[1]["tie_loss"]


def test_four_devices_take_the_step_of_one():
    search = build(make_problem(energy_weight=0.5))
    state, one, metrics = one_step(search)
    four, metrics_of_four = compiled(search, devices=4)(state, VARIABLES, (IMAGES, LABELS), jax.random.key(7))
    for name in metrics:
        np.testing.assert_allclose(metrics_of_four[name], metrics[name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def assert_a_step_keeps_shapes_and_types(search):
    state = jax.eval_shape(search.init, jax.random.key(0))
    arguments = (state, VARIABLES, (IMAGES, LABELS), jax.random.key(0))
    after, metrics = jax.make_jaxpr(search.step, return_shape=True)(*arguments)[1]
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert all(m.shape == () and m.dtype == jnp.float32 for m in metrics.values())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_keeps_shapes_and_types_so_that_it_can_be_scanned(dtype):
    for fields in ({"importance": "generator", "width": "generator"}, AUTHORS):
        assert_a_step_keeps_shapes_and_types(build(make_problem(model=Tiny(dtype), **fields)))


# The search reaches its budget


@pytest.mark.parametrize(("width", "p"), [("scalar", 0.3), ("scalar", 0.7), ("generator", 0.3)])
def test_the_resource_term_alone_leads_to_the_budget(width, p):
    optimizer = {"learning_rate": 0.03, "weight_decay": 0.0}
    problem = make_problem(steps=300, p=p, importance="l1", width=width, tie_weight=0.0, width_optimizer=optimizer)
    search = ddnp.build(problem)

    def run(state, images):
        keys = jax.random.split(jax.random.key(0), 300)
        return jax.lax.scan(lambda s, key: search.step(s, VARIABLES, (images, LABELS), key), state, keys)

    run = jax.jit(run)
    state, metrics = run(search.init(jax.random.key(0)), IMAGES)
    start = {"scalar": 0.9124859, "generator": 0.89}[width]  # at k = sigmoid(3), and near it
    np.testing.assert_allclose(metrics["remaining"][0], start, atol={"scalar": 1e-6, "generator": 0.05}[width])
    np.testing.assert_allclose(metrics["remaining"][-1], p, atol=1e-3)
    assert problem.budget.cost(methods.select(search, state, problem.budget).widths) <= problem.budget.wanted


@pytest.mark.parametrize("kind", ["log_abs", "abs", "square"])
def test_the_resource_of_a_network_of_billions_of_flops(kind):
    """ResNet-50 at 224 pixels has more FLOPs than the largest int32."""
    side = 4096
    budget = Budget(ddnp_jax.trace(Tiny(), (side, side, 3)), 0.25)
    assert budget.total > 2**31
    config = make_config(resource_loss=kind)
    problem = methods.Problem(Tiny(), VARIABLES, budget.topology, budget, config, 10)
    found = jax.jit(problem.resource)(jnp.float32(WIDTHS) / 2)
    first, second = WIDTHS
    left = (3 * first / 2 + first * second / 4) / (3 * first + first * second)  # the classifier is too small to count
    expected = {"log_abs": np.log(left / 0.25), "abs": left - 0.25, "square": (left - 0.25) ** 2}[kind]
    np.testing.assert_allclose(found["remaining"], left, rtol=1e-5)
    np.testing.assert_allclose(found["resource_loss"], expected, rtol=1e-4)


# Whether it has converged


def ended(k, opened, p, **fields):
    """The remark of the search on widths k and fractions of open channels, (2,) each."""
    search = ddnp.build(make_problem(p=p, **fields))
    scores = {f"s{i}": np.where(np.arange(c) < n, 30, -30).astype(np.float32) for i, (c, n) in enumerate(opened)}
    logits = np.float32(np.log(k) - np.log1p(-np.float64(k)) - 3)
    return search.ended(make_state(search).replace(params={"importance": scores, "width": {"k": logits}}))


def test_a_search_says_how_far_it_has_converged():
    # T at (0.95 + 1) / 2 of 8 and 0.25 of 24 channels: 22,774.8 of 70,104.
    found = (
        "k and the open part of its gate differ by 0.025 on average and 0.050 at most (conv1), the tie Σ R_w is 0.049, "
    )
    opened = [(8, 8), (24, 6)]
    assert ended([0.95, 0.25], opened, p=0.32) == (
        f"The search has converged: {found}and R is 0.0151 at 0.3249 of the cost.",
    )
    assert ended([0.95, 0.25], opened, p=0.30) == (
        f"The search has not converged: {found}and R is 0.0796 at 0.3249 of the cost. What helps: more than 10 steps; "
        "resource_weight=4 raised, where R has stopped falling.",
    )
    (said,) = ended([0.95, 0.4], opened, p=0.9)
    assert "not converged: k and the open part of its gate differ by 0.100 on average and 0.150 at most (conv2)" in said
    assert said.endswith("What helps: width_optimizer.learning_rate=0.001 raised to 2e-3 or 3e-3; more than 10 steps.")
    (said,) = ended([0.95, 0.4], opened, p=0.9, width_optimizer={"learning_rate": 3e-3})
    assert said.endswith("What helps: more than 10 steps.")
    (said,) = ended([0.95, 0.25], opened, p=0.5, resource_loss="log_max")  # R is 0, but the cost is far from the budget
    assert "not converged" in said and "R is 0.0000 at 0.3249 of the cost" in said
    assert said.endswith("more than 10 steps; resource_loss=log_abs, by which a cost below the budget counts too.")


@pytest.mark.parametrize("fields", [{"tie_weight": 0.0}, {"width": "half"}, {"importance": "l1"}])
def test_nothing_is_said_where_k_and_gates_need_not_meet(fields):
    search = ddnp.build(make_problem(**fields))
    assert search.ended(make_state(search)) == ()


# Optimizers


def test_adamw_decays_importance_only_and_cosine_ends_at_zero():
    optimizer = ddnp.make_optimizer(make_config(), steps=8)
    params = {"importance": {"s": jnp.array([2.0])}, "width": {"k": jnp.array([2.0])}}
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    np.testing.assert_allclose(updates["importance"]["s"], [-1e-3 * 1e-4 * 2.0], rtol=1e-5)
    np.testing.assert_array_equal(updates["width"]["k"], [0.0])

    gradients, state = jax.tree.map(jnp.ones_like, params), optimizer.init(params)
    rates = []
    for _ in range(10):  # a constant gradient makes Adam's step the learning rate
        updates, state = optimizer.update(gradients, state, params)
        rates.append((-updates["importance"]["s"][0] - 2e-7, -updates["width"]["k"][0]))
    importance, width = np.transpose(rates)
    np.testing.assert_allclose(importance, [1e-3] * 10, rtol=1e-4)
    cosine = [1.0, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806, 0.0, 0.0]
    np.testing.assert_allclose(width, 1e-3 * np.array(cosine), atol=1e-8)


# The authors' importance


def test_ranking_average_literal():
    search = ddnp.build(make_problem(importance_average=0.75, energy_weight=0.5)).survey.then(
        tuple(np.full(c, 7.0) for c in WIDTHS)
    )
    state = make_state(search)
    params = state.params | {"importance": {"s0": np.full(8, 30, np.float32), "s1": np.full(24, 30, np.float32)}}
    _, after, _ = one_step(
        search, state.replace(params=params, ranking=tuple(np.full(c, 0.9, np.float32) for c in WIDTHS))
    )
    for gate in range(2):  # 0.75 * 0.9 + 0.25 * (0.5 * an open gate + 0.5 * the largest energy)
        np.testing.assert_allclose(after.ranking[gate], 0.925, rtol=1e-6)


def test_the_importance_has_no_temperature_and_starts_without_noise():
    search = build(make_problem(energy_weight=0.25))
    scores = {"s0": np.linspace(-9, 3, 8, dtype=np.float32), "s1": np.zeros(24, np.float32)}
    found = search.init.__self__.importance(tuple(scores.values()), tuple(s + 3 for s in scores.values()))
    for importance, s, e in zip(found, scores.values(), ENERGIES, strict=True):
        np.testing.assert_allclose(importance, 0.75 / (1 + np.exp(-(s + 3))) + 0.25 * e / e.max(), rtol=1e-6)


def reference_energy():
    """Mean over images of the channel's summed squared activation, divided by the gate's largest."""
    _, read = reference_forward([torch.ones(c) for c in WIDTHS])
    means = [(x**2).sum((2, 3)).mean(0).numpy() for x in read]
    return [mean / mean.max() for mean in means]


def test_the_energy_is_that_of_the_whole_network_over_all_images_whatever_the_batches(monkeypatch):
    taken = []
    monkeypatch.setattr(searching, "take_steps", lambda step, *_: (taken.append(step.__self__), {}))
    uneven = [(IMAGES[:3], LABELS[:3]), (IMAGES[3:7], LABELS[3:7]), (IMAGES[7:], LABELS[7:])]
    search = ddnp.build(make_problem(steps=2, **AUTHORS))
    methods.run_search(search, VARIABLES, uneven)
    for found, wanted in zip(taken[0].energy, reference_energy(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_endless_batches_are_surveyed_for_as_many_steps_as_there_are():
    search = ddnp.build(make_problem(steps=2, **AUTHORS))
    batches = itertools.repeat((IMAGES, LABELS))
    state, history = methods.run_search(search, VARIABLES, batches, progress=False)
    assert len(history["loss"]) == 2 and state.step == 2


def test_the_energy_comes_before_the_first_step():
    search = ddnp.build(make_problem(energy_weight=0.5))
    for function in (search.init, search.step):
        with pytest.raises(RuntimeError, match=r"continue with `search\.survey\.then"):
            function(jax.random.key(0))
    with pytest.raises(ValueError, match=r"^energy_weight=0.5 must be 0 where importance='l1': norms are fixed\.$"):
        make_config(importance="l1", energy_weight=0.5)


# Methods in general


def test_selection_keeps_the_best_ranked_channels_within_the_budget():
    scores = (np.array([0.1, 0.9, 0.5, 0.5, 0.2, 0.5, 0.0, 0.3]), np.arange(24.0))
    search = methods.Search(0, None, None, lambda state: (scores, np.array([0.5, 0.25])))
    budget = Budget(topology(), Budget(topology(), 1.0).cost((4, 6)) / Budget(topology(), 1.0).total + 1e-9)
    selection = methods.select(search, None, budget)
    assert selection.kept == ((1, 2, 3, 5), (18, 19, 20, 21, 22, 23))
    assert methods.select(search, None, Budget(topology(), 1.0)).widths == WIDTHS


def test_what_is_not_finite_is_not_selected():
    whole, nan = tuple(map(np.ones, WIDTHS)), np.full(24, np.nan)
    search = methods.Search(0, None, None, lambda state: state, widths=lambda *_: pytest.fail("too late"))
    for *state, what in (((whole[0], nan), None, "an importance"), (whole, np.array([0.5, np.inf]), "a width")):
        with pytest.raises(ValueError) as error:
            methods.select(search, state, Budget(topology(), 0.5))
        assert str(error.value) == (
            f"gate conv2: the search gave {what} that is NaN or infinite; check that the gradients of the network's "
            "loss are finite, or use another method."
        )


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match=r"^method='dnp' is unknown; choose one of .*ddnp.*magnitude.*taylor.*cc, stored\.$"
    ):
        methods.build("dnp", make_problem())
    with pytest.raises(ValueError) as error:
        methods.configure("ddnp", {"tie_wieght": 0.5})
    assert str(error.value).startswith(
        "ddnp has no field 'tie_wieght'; its fields are resource_loss, resource_weight, "
    )
    assert str(error.value).endswith("importance_optimizer, width_optimizer.")
    with pytest.raises(ValueError) as error:
        methods.configure("ddnp", {"learning_rate": 0.05})
    assert str(error.value).endswith(
        " Set that of importance_optimizer, width_optimizer, as in importance_optimizer={'learning_rate': ...}."
    )
    for field, choices in {
        "importance": "one of 'generator', 'scalar', 'l1'",
        "width": "one of 'generator', 'linear', 'scalar', 'half'",
        "output": "one of 'sigmoid', 'abs', 'square'",
        "resource_loss": "one of 'log_abs', 'log_max', 'abs', 'square'",
    }.items():
        with pytest.raises(ValueError, match=rf"^{field}='wrong' is unknown; use {choices}\.$"):
            methods.configure("ddnp", {field: "wrong"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"band": "x"}, "band='x' must be a number."),
        ({"band": -1}, "band=-1.0 must be from 0 to 1."),
        ({"floor": 3.0}, "floor=3.0 must be in [0, 1)."),
        ({"energy_weight": 5.0}, "energy_weight=5.0 must be from 0 to 1."),
        ({"importance_average": 2.0}, "importance_average=2.0 must be in [0, 1)."),
        ({"tie_weight": -1.0}, "tie_weight=-1.0 must be at least 0."),
        ({"tie_noise": -1.0}, "tie_noise=-1.0 must be at least 0."),
        ({"resource_weight": float("nan")}, "resource_weight=nan must be at least 0."),
        ({"importance_optimizer": 0.05}, "importance_optimizer=0.05 must be a section, with the fields learning_rate"),
        ({"width_optimizer": {"lr": 1.0}}, "width_optimizer.lr is not a field of the configuration; there are learn"),
        ({"width_optimizer": {"learning_rate": -1}}, "width_optimizer.learning_rate=-1.0 must be at least 0."),
    ],
)
def test_values_of_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValueError) as error:
        methods.configure("ddnp", fields)
    assert str(error.value).startswith(message)


def test_fields_have_their_defaults_unless_they_are_given():
    assert methods.configure("ddnp") == ddnp.Fields()
    config = methods.configure("ddnp", {"band": 0.1, "width_optimizer": {"learning_rate": 3e-3}})
    assert (config.band, config.floor) == (0.1, 0.025)
    assert config.width_optimizer == methods.AdamW(learning_rate=3e-3, weight_decay=0.0)
