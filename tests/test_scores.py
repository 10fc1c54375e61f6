"""Scores against numpy and finite differences, and the widths that follow from scores."""

import bisect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ddnp import IMAGES, LABELS, VARIABLES, WIDTHS, Tiny, compiled, topology

import ddnp_jax
from ddnp_jax import methods
from ddnp_jax.cost.budget import Budget
from ddnp_jax.methods import allocations, scores
from ddnp_jax.methods.evidence import Evidence


def make_search(method, p=0.5, steps=2, multiple=1, **fields):
    budget = Budget(topology(), p, multiple=multiple)
    config = methods.configure(method, fields)
    return methods.build(method, methods.Problem(Tiny(), VARIABLES, topology(), budget, config, steps)), budget


def importance(method, seed=0):
    search, _ = make_search(method)
    state, _ = methods.run_search(search, VARIABLES, batches(), seed, progress=False)
    return search.propose(state)[0]


def batches():
    return [(IMAGES[:6], LABELS[:6]), (IMAGES[6:], LABELS[6:])]  # of unequal sizes


def kernel(number):
    return np.float64(VARIABLES["params"][f"conv{number}"]["kernel"])


def test_magnitude_is_the_l1_norm_of_the_filters():
    for number, found in enumerate(importance("magnitude"), 1):
        np.testing.assert_allclose(found, np.abs(kernel(number)).sum((0, 1, 2)), rtol=1e-12)


def test_batch_norm_scale():
    for number, found in enumerate(importance("bn_scale"), 1):
        scale = VARIABLES["params"][f"bn{number}"]["scale"]
        assert scale.min() > 0
        np.testing.assert_allclose(found, scale, rtol=1e-6)


def test_batch_norm_scales_of_a_group_are_added():
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name, groups in (("first", 1), ("second", 4)):
                x = nn.Conv(8, (3, 3), feature_group_count=groups, name=name)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=True, name=f"{name}_norm")(x))
            return nn.Dense(2, name="last")(x.mean((1, 2)))

    variables = Normalized().init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    for name in ("first_norm", "second_norm"):
        variables["params"][name]["scale"] = np.float32([1, -100, 3, 4, 5, -6, 7, 8])
    found = scores.bn_scale(Evidence(ddnp_jax.trace(Normalized(), (4, 4, 3)), variables), 0)
    assert found.tolist() == [202, 14, 22, 30]


def test_a_gate_without_normalization_is_named():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
            return nn.Dense(2, name="last")(x.mean((1, 2)))

    variables = Plain().init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    found = ddnp_jax.trace(Plain(), (4, 4, 3))
    with pytest.raises(ValueError, match=r"^gate first has no normalization with a scale; score"):
        scores.bn_scale(Evidence(found, variables), 0)


def test_fpgm_is_the_sum_of_distances_to_the_other_filters():
    for number, found in enumerate(importance("fpgm"), 1):
        filters = kernel(number).reshape(-1, WIDTHS[number - 1]).T
        wanted = [sum(np.sqrt(np.sum((a - b) ** 2)) for b in filters) for a in filters]
        np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_random_scores_follow_the_seed():
    first, again, other = importance("uniform", 0), importance("uniform", 0), importance("uniform", 1)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.all(a != c)


def loss_of(masks, image, label):
    """Cross-entropy of one image, float64 beside the network."""
    with jax.enable_x64(True):
        logits = ddnp_jax.apply_masked(Tiny(jnp.float64), VARIABLES, np.float64(image[None]), masks, topology())
        logits = np.asarray(logits, np.float64)[0]
    return np.log(np.sum(np.exp(logits - logits.max()))) + logits.max() - logits[label]


def test_taylor_is_the_mean_absolute_mask_gradient_of_each_image():
    ones = [np.ones(width) for width in WIDTHS]
    channels = [(0, 1), (0, 6), (1, 0), (1, 17)]
    step = 1e-4
    found = importance("taylor")
    for gate, channel in channels:
        gradients = []
        for image, label in zip(IMAGES, LABELS, strict=True):
            ends = []
            for sign in (1, -1):
                masks = [mask.copy() for mask in ones]
                masks[gate][channel] += sign * step
                ends.append(loss_of(masks, image, label))
            gradients.append((ends[0] - ends[1]) / (2 * step))
        assert min(gradients) < 0 < max(gradients)  # else the mean's absolute value would do
        np.testing.assert_allclose(found[gate][channel], np.mean(np.abs(gradients)), rtol=1e-3, atol=1e-7)


def test_scores_over_four_devices_are_those_of_one():
    search, _ = make_search("taylor")
    state, batch = search.init(jax.random.key(0)), (IMAGES, LABELS)
    one, four = (compiled(search, n)(state, VARIABLES, batch, jax.random.key(0)) for n in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one[1], four[1])
    for a, b in zip(search.propose(one[0])[0], search.propose(four[0])[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_a_score_of_features_is_one_function(monkeypatch):
    def mean_feature(evidence, gate):
        (features,) = evidence.features[gate]
        return jnp.mean(features, range(features.ndim - 1))

    monkeypatch.setitem(scores.SCORES, "mean", scores.Score(mean_feature, needs_images=True))
    problem = methods.Problem(Tiny(), VARIABLES, topology(), Budget(topology(), 0.5), allocations.Fields(), 2)
    search = scores.build(scores.SCORES["mean"], problem)
    state, history = methods.run_search(search, VARIABLES, batches(), progress=False)
    _, seen = Tiny().apply(VARIABLES, IMAGES, capture_intermediates=True, mutable=["intermediates"])
    for number, found in enumerate(search.propose(state)[0], 1):
        relu = np.maximum(seen["intermediates"][f"bn{number}"]["__call__"][0], 0)
        np.testing.assert_allclose(found, relu.mean((0, 1, 2)), rtol=1e-5)
    logits = np.asarray(seen["intermediates"]["__call__"][0])
    right = logits.argmax(-1) == LABELS
    np.testing.assert_allclose(history["top1"], [100 * right[:6].mean(), 100 * right[6:].mean()], rtol=1e-5)


def feature_maps(dtype=jnp.float32):
    """Per gate the feature maps (N, H, W, C), in float64."""
    _, seen = Tiny(dtype).apply(VARIABLES, IMAGES, capture_intermediates=True, mutable=["intermediates"])
    return [np.maximum(np.float64(seen["intermediates"][f"bn{i}"]["__call__"][0]), 0) for i in (1, 2)]


def evidence(model=None, variables=VARIABLES, images=IMAGES):
    model = model or Tiny()
    found = ddnp_jax.trace(model, images.shape[1:])
    problem = methods.Problem(model, variables, found, Budget(found, 0.5), allocations.Fields(), 1)
    return Evidence(found, variables, problem=problem, batch=(images, np.zeros(len(images), np.int32)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_hrank_is_the_mean_rank_of_the_feature_maps(dtype):
    ranks = np.linalg.matrix_rank(np.float32(feature_maps(dtype)[0]).transpose(0, 3, 1, 2)).mean(0)
    assert np.ptp(ranks) > 0
    np.testing.assert_allclose(scores.hrank(evidence(Tiny(dtype)), 0), ranks, rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"^the channels of gate conv2 are read as \(8, 24\), not as maps of several pixels with heig"
    ):
        scores.hrank(evidence(Tiny(dtype)), 1)  # behind a mean over all pixels


class Squeezed(nn.Module):
    """The first convolution is read as a map and behind a mean of all pixels, the second one only behind one."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        x = x * nn.sigmoid(nn.Conv(4, (1, 1), name="excite")(x.mean((1, 2), keepdims=True)))
        self.sow("intermediates", "scaled", x)
        x = nn.relu(nn.Conv(5, (3, 3), name="second")(x)).mean((1, 2), keepdims=True)
        self.sow("intermediates", "pooled", x)
        return nn.Conv(2, (1, 1), name="head")(x).squeeze((1, 2))


class Grouped(nn.Module):
    """Convolutions over any number of axes, the second one in groups of two channels."""

    window: tuple

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, self.window, name="first")(x))
        x = nn.relu(nn.Conv(8, self.window, feature_group_count=4, name="grouped")(x))
        self.sow("intermediates", "map", x)
        x = nn.relu(nn.Conv(3, self.window, name="last")(x))
        return nn.Dense(2, name="head")(x.mean(range(1, x.ndim - 1)))


def with_features(model, shape):
    """Evidence of a network with random weights and images, and the arrays that it sows."""
    images = np.float32(np.random.default_rng(0).normal(size=(3, *shape)))
    variables = model.init(jax.random.key(0), images)["params"]
    _, seen = model.apply({"params": variables}, images, mutable=["intermediates"])
    sown = {name: np.asarray(values[0]) for name, values in seen["intermediates"].items()}
    return evidence(model, {"params": variables}, images), sown


def test_maps_of_one_pixel_have_no_rank():
    found, sown = with_features(Squeezed(), (6, 6, 3))
    ranks = np.linalg.matrix_rank(sown["scaled"].transpose(0, 3, 1, 2)).mean(0)
    np.testing.assert_allclose(scores.hrank(found, 0), ranks, rtol=1e-6)
    losses = [without_each_row(each.reshape(36, 4).T) for each in np.float64(sown["scaled"])]
    np.testing.assert_allclose(scores.chip(found, 0), np.mean(losses, axis=0), rtol=1e-4)
    with pytest.raises(ValueError, match=r"^the channels of gate second are read as \(3, 1, 1, 5\), not as maps of "):
        scores.hrank(found, 1)
    losses = [without_each_row(each.reshape(1, 5).T) for each in np.float64(sown["pooled"])]
    np.testing.assert_allclose(scores.chip(found, 1), np.mean(losses, axis=0), rtol=1e-4)


def test_hrank_of_a_group_is_the_mean_over_its_maps():
    found, sown = with_features(Grouped((3, 3)), (6, 6, 3))
    ranks = np.linalg.matrix_rank(sown["map"].transpose(0, 3, 1, 2)).mean(0)
    assert np.ptp(ranks.reshape(4, 2), axis=1).any()
    np.testing.assert_allclose(scores.hrank(found, 0), ranks.reshape(4, 2).mean(1), rtol=1e-6)
    losses = [without_each_row(each.T.reshape(4, 72)) for each in np.float64(sown["map"].reshape(3, 36, 8))]
    np.testing.assert_allclose(scores.chip(found, 0), np.mean(losses, axis=0), rtol=1e-4)


@pytest.mark.parametrize("shape", [(9, 3), (4, 4, 4, 3)])
def test_hrank_needs_maps_with_height_and_width(shape):
    found, _ = with_features(Grouped((3,) * (len(shape) - 1)), shape)
    with pytest.raises(ValueError, match=r"^the channels of gate first are read as \(3, .*, 2, 4\), not as maps of "):
        scores.hrank(found, 0)


def without_each_row(matrix):
    """The decrease of the nuclear norm, by one singular value decomposition for each row."""
    norms = [np.linalg.norm(np.delete(matrix, i, axis=0), "nuc") for i in range(len(matrix))]
    return np.linalg.norm(matrix, "nuc") - norms


def test_chip_is_the_mean_loss_of_nuclear_norm():
    maps, pooled = feature_maps()[0], feature_maps()[1].mean((1, 2))
    losses = [without_each_row(each.reshape(-1, each.shape[-1]).T) for each in maps]
    first, second = importance("chip")
    np.testing.assert_allclose(first, np.mean(losses, axis=0), rtol=1e-4)
    assert scores.chip(evidence(Tiny(jnp.bfloat16)), 0).dtype == jnp.float32
    np.testing.assert_allclose(second, np.mean([without_each_row(each[:, None]) for each in pooled], axis=0), rtol=1e-4)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (1, 9), (9, 1), (64, 49), (30, 200)])
def test_nuclear_norms_without_each_row(shape):
    rng = np.random.default_rng(0)
    for matrix in (rng.normal(size=shape), np.maximum(rng.normal(size=shape) - 0.5, 0)):
        expected = without_each_row(matrix)
        found = scores.nuclear_losses(jnp.asarray(matrix, jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.linalg.norm(matrix, "nuc"))


def test_nuclear_norms_of_rows_that_depend_on_each_other():
    """Singular values near 0 are accurate to the square root of float32's precision."""
    for shape in ((12, 30), (12, 12), (30, 12)):
        matrix = np.random.default_rng(0).normal(size=shape)
        matrix[3], matrix[7], matrix[2] = matrix[5], 2 * matrix[5], 0
        found = np.asarray(scores.nuclear_losses(jnp.asarray(matrix, jnp.float32)))
        np.testing.assert_allclose(found, without_each_row(matrix), rtol=0, atol=1e-3 * np.linalg.norm(matrix, 2))
        assert found[2] == pytest.approx(0, abs=1e-5)


def test_lamp_divides_by_the_filters_that_are_not_smaller():
    squares = [np.square(kernel(1)).sum((0, 1, 2)), np.square(kernel(2)).sum((0, 1, 2))]
    for found, own in zip(importance("lamp"), squares, strict=True):
        np.testing.assert_allclose(found, [x / own[own >= x].sum() for x in own], rtol=1e-10)
        assert found.max() == 1


def test_cc_is_the_information_loss_of_the_layers_that_read_a_channel():
    def loss(variables):
        logits = Tiny().apply(variables, IMAGES)
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(len(LABELS)), LABELS])

    gradients = jax.grad(loss)(VARIABLES)["params"]
    weights = VARIABLES["params"]
    second = np.square(np.float64(gradients["conv2"]["kernel"]) * weights["conv2"]["kernel"]).sum((0, 1, 3))
    dense = np.square(np.float64(gradients["head"]["kernel"]) * weights["head"]["kernel"]).sum(1)
    found = importance("cc")
    np.testing.assert_allclose(found[0], second, rtol=1e-3, atol=1e-6 * second.max())
    np.testing.assert_allclose(found[1], dense, rtol=1e-3, atol=1e-6 * dense.max())


def test_cc_refuses_layers_whose_kernel_is_computed():
    class Computed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="first")(x)).mean((1, 2))
            weight, scale = (self.param(name, nn.initializers.ones, (4, 2)) for name in ("weight", "scale"))
            return nn.Dense(2, name="stored")(x) + x @ (weight * scale)

    images = IMAGES[..., :3]
    variables = Computed().init(jax.random.key(0), images)
    found = ddnp_jax.trace(Computed(), images.shape[1:])
    problem = methods.Problem(Computed(), variables, found, Budget(found, 0.5), methods.configure("cc"), 1)
    with pytest.raises(ValueError) as error:
        methods.initial_state(methods.build("cc", problem), 0)
    assert str(error.value) == (
        "gate first is read by Computed, whose kernel is computed from several parameters, so that the loss of a "
        "channel is unknown; leave the gate unpruned with keep=, or use another method."
    )


def residual_network():
    model = ddnp_jax.models.create("resnet18", num_classes=3)
    found = ddnp_jax.trace(model, (32, 32, 3), residual=True)
    names = [gate.name for gate in found.gates]
    return model, found, names


@pytest.mark.parametrize("score", ["hrank", "chip"])
def test_a_residual_stream_is_scored_by_the_mean_over_its_blocks(score):
    model, found, names = residual_network()
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), images)
    problem = methods.Problem(model, variables, found, Budget(found, 0.5), allocations.Fields(), 1)
    evidence = Evidence(found, variables, problem=problem, batch=(images, np.zeros(2, np.int32)))
    _, seen = model.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
    outputs = [seen["intermediates"][f"layer2_{i}"]["__call__"][0] for i in range(2)]  # behind the addition and ReLU
    maps = [np.float64(np.asarray(each)).transpose(0, 3, 1, 2) for each in outputs]
    if score == "hrank":
        wanted = np.mean([np.linalg.matrix_rank(np.float32(each)).mean(0) for each in maps], axis=0)
    else:
        flat = [image.reshape(128, -1) for each in maps for image in each]
        wanted = np.mean([without_each_row(rows) for rows in flat], axis=0)
    result = scores.SCORES[score].of(evidence, names.index("layer2_0/conv2"))
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-4 * wanted.max())


# Widths


@pytest.mark.parametrize("method", ["uniform", "magnitude"])
def test_one_fraction_of_every_gate(method):
    search, budget = make_search(method, p=0.4)
    chosen = [methods.select(search, search.init(jax.random.key(seed)), budget) for seed in (0, 0, 1)]
    assert search.steps == 0
    assert chosen[0] == chosen[1]
    assert (chosen[0] == chosen[2]) == (method == "magnitude")
    a, b = chosen[0].widths
    assert abs(a / 8 - b / 24) < 1 / 8
    cost = budget.cost((a, b))
    assert cost <= budget.wanted < min(budget.cost((a + 1, b)), budget.cost((a, b + 1)))
    if method == "magnitude":
        for kept, number in zip(chosen[0].kept, (1, 2), strict=True):
            norms = np.abs(kernel(number)).sum((0, 1, 2))
            assert set(kept) == set(np.argsort(norms)[-len(kept) :])
    assert methods.proposed_cost(search, search.init(jax.random.key(0)), budget) is None


def test_one_ranking_over_all_gates_is_cut_where_the_budget_is():
    search, budget = make_search("fpgm", p=0.4, allocation="global")
    selection = methods.select(search, search.init(jax.random.key(0)), budget)
    found = [
        sorted((value, gate, channel) for channel, value in enumerate(values))
        for gate, values in enumerate(search.propose(search.init(jax.random.key(0)))[0])
    ]
    ranked = sorted((entry for gate in found for entry in gate), reverse=True)

    def widths(count):
        return tuple(max(1, sum(gate == own for _, own, _ in ranked[:count])) for gate in range(2))

    count = max(n for n in range(33) if budget.cost(widths(n)) <= budget.wanted)
    assert selection.widths == widths(count)
    assert selection.kept == tuple(
        tuple(sorted(channel for _, own, channel in ranked[:count] if own == gate)) for gate in range(2)
    )
    assert budget.cost(selection.widths) > 0.9 * budget.wanted


def test_every_gate_keeps_its_smallest_width():
    scores_of = (np.arange(8.0), 100 + np.arange(24.0))
    budget = Budget(topology(), 0.5)
    # The cost of widths (a, b) is 972 a + 324 a b + 5 b, that of all 70,104.
    fields = allocations.Fields(allocation="global")
    assert allocations.over_all_gates(scores_of, budget, fields) == (3, 24)  # 26,364 of 35,052; (4, 24) would be 35,112
    assert allocations.over_all_gates(scores_of, Budget(topology(), 0.1), fields) == (1, 18)  # 6,894 of 7,010
    assert allocations.over_all_gates(scores_of, Budget(topology(), 1.0), fields) == WIDTHS


def test_global_widths_are_multiples():
    search, budget = make_search("magnitude", p=0.4, multiple=4, allocation="global")
    selection = methods.select(search, search.init(jax.random.key(0)), budget)
    assert all(width % 4 == 0 for width in selection.widths)
    assert budget.cost(selection.widths) <= budget.wanted


def test_published_rates_are_scaled_to_the_budget():
    search, budget = make_search("magnitude", p=0.4, allocation="rates", rates=(0.5, 0.75))
    selection = methods.select(search, search.init(jax.random.key(0)), budget)
    # (4, 6) would cost 11,694 of 28,041.6: below the factor 1.625, (6.5, 9.75), it is (6, 10), 25,322; then filled.
    assert selection.widths == (6, 11)  # 27,271; (7, 10) would be 29,534 and (6, 12) 29,220
    with pytest.raises(ValueError, match=r"^rates has 1 entries and the network 2 gates; give one for each, in the "):
        make_search("magnitude", allocation="rates", rates=(0.5,))
    with pytest.raises(ValueError, match=r"^rates=\(0\.5, 0\.75\) needs allocation='rates', and it is 'uniform'; "):
        make_search("magnitude", rates=(0.5, 0.75))
    with pytest.raises(ValueError, match=r"^rates=\(0\.5, 1\.0\) must be in \[0, 1\) in every entry: fractions of c"):
        methods.configure("magnitude", {"allocation": "rates", "rates": (0.5, 1.0)})


def test_fitted_losses_have_the_same_slope_at_cc_widths():
    rng = np.random.default_rng(0)
    importance = (np.exp(rng.normal(size=8)), 5 * np.exp(2 * rng.normal(size=24)))
    budget = Budget(topology(), 0.5)
    fits = []
    for values in importance:
        losses = np.cumsum(np.sort(values))
        rates = np.arange(1, len(values) + 1) / len(values)
        # Weighted least squares of ln(loss) = ln p1 + p2 c by the normal equations.
        design = np.stack([np.ones_like(rates), rates], axis=1)
        weighted = design * losses[:, None]
        fits.append(np.linalg.solve(design.T @ weighted, weighted.T @ np.log(losses)))

    def fractions(slope):
        return np.array([1 - np.clip(np.log(slope / (np.exp(a) * b)) / b, 0, 0.95) for a, b in fits])

    slopes = np.exp(np.linspace(-5, 15, 20001))
    # The first slope that meets the budget; the cost falls as the slope grows.
    best = slopes[bisect.bisect_left(slopes, True, key=lambda s: budget.cost(fractions(s) * WIDTHS) <= budget.wanted)]
    assert all(0.05 < k < 1 for k in fractions(best))  # neither is clipped: the slopes are the same
    assert allocations.by_fitted_losses(importance, budget, allocations.Fields()) == budget.fit(fractions(best))


def test_losses_without_a_curve_have_widths():
    budget = Budget(topology(), 0.5)
    for importance in ((np.zeros(8), np.ones(24)), (np.zeros(8), np.zeros(24)), (np.eye(8)[0], np.eye(24)[0])):
        widths = allocations.by_fitted_losses(importance, budget, allocations.Fields())
        assert budget.cost(widths) <= budget.wanted


def test_an_unknown_allocation_is_refused():
    with pytest.raises(ValueError, match=r"^allocation='all' is unknown; use one of 'uniform', 'global', 'rates', "):
        methods.configure("taylor", {"allocation": "all"})
    with pytest.raises(ValueError, match=r"^taylor has no field 'tie_weight'; its fields are allocation, rates\.$"):
        methods.configure("taylor", {"tie_weight": 1.0})
