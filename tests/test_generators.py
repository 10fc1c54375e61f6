import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ddnp_jax.methods.ddnp import generators

WIDTHS = (3, 5, 4)


def shapes(module):
    """The module's variables as shapes; nothing is computed."""
    return jax.eval_shape(module.init, jax.random.key(0))


def names(tree):
    """{path: shape} of the leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def randomized(module):
    """Variables at random, so that biases and scales matter too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(rng.normal(0, 0.5, x.shape)), shapes(module))


def weights(kernel, scale):
    """w = g v / ||v||, one norm per output, in PyTorch's (out, in) order."""
    v = torch.tensor(np.float64(kernel).T)
    return torch.tensor(np.float64(scale))[:, None] * v / torch.linalg.norm(v, dim=1, keepdim=True)


def reference_gru(params):
    """PyTorch's GRU (eq. 1) with our weights: gates stacked as reset, update, new; only `new` has a hidden bias."""
    cells = [params[name] for name in ("gru", "backward_gru") if name in params]
    gru = torch.nn.GRU(64, 128, bidirectional=len(cells) == 2, dtype=torch.float64)
    for cell, suffix in zip(cells, ("", "_reverse"), strict=False):
        layers, scales = cell["GRUCell_0"], cell["WeightNorm_0"]
        stacked = {
            kind: torch.cat([weights(layers[n]["kernel"], scales[f"GRUCell_0/{n}/kernel/scale"]) for n in of])
            for kind, of in (("ih", ("ir", "iz", "in")), ("hh", ("hr", "hz", "hn")))
        }
        bias = {
            "ih": np.concatenate([layers[n]["bias"] for n in ("ir", "iz", "in")]),
            "hh": np.concatenate([np.zeros(256), layers["hn"]["bias"]]),
        }
        for kind in ("ih", "hh"):
            getattr(gru, f"weight_{kind}_l0{suffix}").data = stacked[kind]
            getattr(gru, f"bias_{kind}_l0{suffix}").data = torch.tensor(bias[kind], dtype=torch.float64)
    return gru


def reference_importance(variables, layer_norm):
    params = variables["params"]
    x = torch.tensor(np.float64(variables.get("inputs", params)["x"]))
    outputs = reference_gru(params)(x[:, None])[0][:, 0].detach()
    if layer_norm:
        scale, bias = (torch.tensor(np.float64(params["LayerNorm_0"][name])) for name in ("scale", "bias"))
        outputs = torch.nn.functional.layer_norm(outputs, outputs.shape[-1:], scale, bias, eps=1e-6)
    outputs = torch.relu(outputs)
    scores = []
    for gate, o in enumerate(outputs):
        layer, scale = params[f"Dense_{gate}"], params[f"fc{gate}"][f"Dense_{gate}/kernel/scale"]
        scores.append((weights(layer["kernel"], scale) @ o).numpy() + layer["bias"])
    return scores


# g_s: DDNP Table A2


def test_importance_generator_has_the_parameters_of_table_a2():
    variables = shapes(generators.ImportanceGenerator((16, 32)))
    assert names(variables["inputs"]) == {"x": (2, 64)}
    params = variables["params"]
    assert names(params["gru"]["GRUCell_0"]) == {
        **{f"i{gate}.{leaf}": shape for gate in "rzn" for leaf, shape in (("kernel", (64, 128)), ("bias", (128,)))},
        **{f"h{gate}.kernel": (128, 128) for gate in "rzn"},
        "hn.bias": (128,),
    }
    assert sorted(shape for shape in names(params["gru"]["WeightNorm_0"]).values()) == [(128,)] * 6
    assert count(params["gru"]) == 64 * 384 + 128 * 384 + 384 + 128 + 6 * 128
    for gate, channels in enumerate((16, 32)):
        assert names(params[f"Dense_{gate}"]) == {"kernel": (128, channels), "bias": (channels,)}
        assert list(names(params[f"fc{gate}"]).values()) == [(channels,)]
    assert count(params) == 75_008 + 48 * 130


def test_importance_generator_inputs_are_random_rows_of_about_unit_length():
    init = generators.ImportanceGenerator((4,) * 400).init
    x = jax.jit(lambda key: init(key)["inputs"]["x"])(jax.random.key(3))
    squares = np.sum(np.square(x), -1)  # of 64 draws with variance 1/64: mean 1, deviation sqrt(2 / 64)
    assert abs(np.mean(squares) - 1) < 4 * np.sqrt(2 / 64 / 400)
    assert np.std(squares) == pytest.approx(np.sqrt(2 / 64), rel=0.2)


@pytest.mark.parametrize("form", [{}, {"bidirectional": True, "layer_norm": True}, {"learned_inputs": True}])
def test_importance_generator_matches_pytorch(form):
    module = generators.ImportanceGenerator(WIDTHS, **form)
    variables = randomized(module)
    scores = jax.jit(module.apply)(variables)
    assert [s.shape for s in scores] == [(3,), (5,), (4,)]
    for found, wanted in zip(scores, reference_importance(variables, form.get("layer_norm", False)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_every_gate_depends_on_the_gates_before_it_and_with_two_directions_on_all():
    def reached(bidirectional):
        module = generators.ImportanceGenerator(WIDTHS, learned_inputs=True, bidirectional=bidirectional)
        variables = randomized(module)

        def first_scores(x):
            params = {"params": variables["params"] | {"x": x}}
            return jnp.stack([s[0] for s in module.apply(params)])

        jacobian = jax.jit(jax.jacrev(first_scores))(variables["params"]["x"])  # (scores' gate, inputs' gate, 64)
        return np.any(jacobian != 0, axis=-1)

    np.testing.assert_array_equal(reached(bidirectional=False), np.tri(3, dtype=bool))
    np.testing.assert_array_equal(reached(bidirectional=True), np.ones((3, 3), bool))


def test_authors_form_has_two_directions_and_layer_norm():
    plain, both, normed = (
        shapes(generators.ImportanceGenerator(WIDTHS, bidirectional=b, layer_norm=n))["params"]
        for b, n in ((False, False), (True, False), (True, True))
    )
    assert count(both) == count(plain) + 75_008 + 128 * sum(WIDTHS)
    assert count(normed) == count(both) + 2 * 256


# g_k: DDNP Table A3


def test_width_generator_has_the_parameters_of_table_a3():
    variables = shapes(generators.WidthGenerator(27))
    assert names(variables["inputs"]) == {"x": (32,)}
    assert names(variables["params"]) == {
        "Dense_0.kernel": (32, 64),
        "Dense_0.bias": (64,),
        "fc1.Dense_0/kernel/scale": (64,),
        "Dense_1.kernel": (64, 27),
        "Dense_1.bias": (27,),
        "fc2.Dense_1/kernel/scale": (27,),
    }


def test_width_generator_matches_numpy():
    module = generators.WidthGenerator(7)
    variables = randomized(module)
    params, x = variables["params"], variables["inputs"]["x"]
    w1 = weights(params["Dense_0"]["kernel"], params["fc1"]["Dense_0/kernel/scale"]).numpy()
    w2 = weights(params["Dense_1"]["kernel"], params["fc2"]["Dense_1/kernel/scale"]).numpy()
    hidden = np.maximum(w1 @ x + params["Dense_0"]["bias"], 0)
    wanted = 1 / (1 + np.exp(-(w2 @ hidden + params["Dense_1"]["bias"] + 3.0)))
    np.testing.assert_allclose(module.apply(variables), wanted, atol=1e-6)


def test_linear_width_is_one_map_of_a_fixed_input():
    module = generators.LinearWidth(5)
    assert names(shapes(module)) == {"params.fc.kernel": (5, 5), "inputs.x": (5,)}
    variables = randomized(module)
    kernel, x = variables["params"]["fc"]["kernel"], variables["inputs"]["x"]
    np.testing.assert_allclose(module.apply(variables), 1 / (1 + np.exp(-(x @ kernel + 3.0))), rtol=1e-6)


def test_linear_width_starts_as_pytorch_does():
    variables = generators.LinearWidth(100).init(jax.random.key(0))
    kernel = np.asarray(variables["params"]["fc"]["kernel"])
    limit = torch.nn.Linear(100, 100, bias=False).weight.abs().max().item()
    assert np.abs(kernel).max() == pytest.approx(limit, rel=0.01) == pytest.approx(0.1, rel=0.01)
    assert np.std(kernel) == pytest.approx(0.1 / np.sqrt(3), rel=0.02)
    assert np.std(variables["inputs"]["x"]) == pytest.approx(1.0, rel=0.25)


def test_the_search_starts_from_an_almost_whole_network():
    k = np.array(
        jax.vmap(lambda key: generators.WidthGenerator(200).init_with_output(key)[0])(
            jax.random.split(jax.random.key(0), 20)
        )
    )
    assert np.min(k) > 0.6
    np.testing.assert_allclose(np.mean(np.log(k / (1 - k))), 3.0, atol=0.2)  # sigmoid(3) = 0.9526


# Both


@pytest.mark.parametrize(
    "module",
    [generators.ImportanceGenerator(WIDTHS), generators.WidthGenerator(4)],
    ids=lambda module: type(module).__name__,
)
def test_only_direction_and_scale_of_normalized_kernels_count(module):
    variables = randomized(module)
    kernels = [path for path in names(variables["params"]) if path.endswith(".kernel")]
    assert len(kernels) == {"ImportanceGenerator": 6 + 3, "WidthGenerator": 2}[type(module).__name__]

    def change(ending, factor):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x * factor if jax.tree_util.keystr(path).endswith(ending) else x, variables
        )

    def apply(variables):
        return np.concatenate([np.atleast_1d(leaf) for leaf in jax.tree.leaves(jitted(variables))])

    jitted = jax.jit(module.apply)
    before = apply(variables)
    np.testing.assert_allclose(apply(change("['kernel']", 7.0)), before, atol=1e-5)
    assert np.max(np.abs(apply(change("scale']", 1.5)) - before)) > 1e-3


@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        (generators.ImportanceGenerator, WIDTHS),
        (generators.WidthGenerator, len(WIDTHS)),
        (generators.LinearWidth, len(WIDTHS)),
    ],
)
def test_inputs_are_learned_or_stay(kind, argument):
    fixed = shapes(kind(argument))
    learned = shapes(kind(argument, learned_inputs=True))
    assert set(fixed) == {"params", "inputs"} and set(fixed["inputs"]) == {"x"} and "x" not in fixed["params"]
    assert set(learned) == {"params"} and learned["params"]["x"].shape == fixed["inputs"]["x"].shape
    # The same variables but for x: one parameterization with the input in another place.
    assert names(learned["params"]) == names(fixed["params"]) | {"x": fixed["inputs"]["x"].shape}


# Scalars and fixed values


def test_scalar_importance_is_its_parameters():
    learner = generators.learned(generators.ScalarImportance(WIDTHS))
    variables = learner.init(jax.random.key(0))
    assert names(variables) == {"params.s0": (3,), "params.s1": (5,), "params.s2": (4,)}
    for gate, scores in enumerate(learner.apply(variables)):
        np.testing.assert_array_equal(scores, variables["params"][f"s{gate}"])
        assert len(np.unique(scores)) == len(scores)  # a first ranking without ties
        assert np.max(np.abs(scores)) < 0.05


def test_scalar_width_starts_at_sigmoid_3():
    learner = generators.learned(generators.ScalarWidth(4))
    variables = learner.init(jax.random.key(0))
    assert names(variables) == {"params.k": (4,)}
    np.testing.assert_allclose(learner.apply(variables), [0.95257413] * 4, rtol=1e-6)
    np.testing.assert_allclose(learner.apply({"params": {"k": jnp.array([-3.0, 0, 1, -5])}})[0], 0.5, rtol=1e-6)


def test_fixed_value_stays():
    value = np.array([0.5, 0.5])
    learner = generators.fixed(value)
    assert learner.init(jax.random.key(0)) == {}
    assert learner.apply({}) is value
