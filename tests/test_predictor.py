import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from ddnp_jax.methods.nppm.predictor import PREDICTORS, AuthorsPredictor, LinearRegression, Predictor

WIDTHS = (5, 3, 9)
GATES = np.float32(np.random.default_rng(0).random((6, sum(WIDTHS))))


def make_variables(module, seed=1):
    """Variables at random, so that nothing is hidden by zeros and ones."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, sum(module.widths)))))

    def draw(path, x):
        return np.float32(rng.uniform(0.5, 1.5, x.shape) if path[-1].key == "var" else rng.normal(0, 0.5, x.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def torch_gru(params, inputs, hidden, reverse=False):
    """torch.nn.GRU with flax's parameters; r, z and n are PyTorch's gates in order."""
    gru = torch.nn.GRU(inputs, hidden, batch_first=True)
    bias = {name: params[name].get("bias", np.zeros(hidden, np.float32)) for name in params}
    with torch.no_grad():
        for kind, attribute in (("i", "ih"), ("h", "hh")):
            kernels = np.concatenate([params[kind + gate]["kernel"].T for gate in "rzn"])
            getattr(gru, f"weight_{attribute}_l0").copy_(torch.tensor(kernels))
            getattr(gru, f"bias_{attribute}_l0").copy_(torch.tensor(np.concatenate([bias[kind + g] for g in "rzn"])))
    return lambda x: gru(x.flip(1) if reverse else x)


def parts(gates, widths=WIDTHS):
    return torch.split(torch.as_tensor(gates), widths, dim=1)


def dense(params, x):
    return x @ torch.as_tensor(params["kernel"]) + torch.as_tensor(params["bias"])


def reference_table_2(variables, gates, widths, train):
    """Logits of PN in PyTorch, and the statistics that it normalized by; differentiable in the gates and the head."""
    params, norm = variables["params"], {k: torch.tensor(v) for k, v in variables["params"]["BatchNorm_0"].items()}
    stats = {k: torch.tensor(v) for k, v in variables["batch_stats"]["BatchNorm_0"].items()}
    rows = torch.stack([dense(params[f"fc{i}"], part) for i, part in enumerate(parts(gates, widths))], 1)
    mean, var = (rows.mean(0), rows.var(0, unbiased=False)) if train else (stats["mean"], stats["var"])
    rows = (rows - mean) / torch.sqrt(var + 1e-5)
    rows = functional.relu(rows * norm["scale"] + norm["bias"])
    outputs, _ = torch_gru(params["gru"], 16, 16)(rows)
    return dense(params["head"], outputs.mean(1))[:, 0], mean


@pytest.mark.parametrize("train", [False, True])
def test_table_2(train):
    module = Predictor(WIDTHS)
    variables = make_variables(module)
    wanted, mean = reference_table_2(variables, GATES, WIDTHS, train)
    found, updated = module.apply(variables, GATES, train=train, mutable=["batch_stats"])
    np.testing.assert_allclose(found, wanted.detach().numpy(), atol=2e-6)
    before, after = (tree["batch_stats"]["BatchNorm_0"]["mean"] for tree in (variables, updated))
    assert before.shape == (len(WIDTHS), 16)  # statistics per gate and feature
    moved = 0.9 * before + 0.1 * mean.detach().numpy() if train else before
    np.testing.assert_allclose(after, moved, atol=1e-6)


def test_authors_form():
    module = AuthorsPredictor(WIDTHS)
    variables = make_variables(module)
    params = variables["params"]
    rows = []
    for i, part in enumerate(parts(GATES)):
        kernel = torch.tensor(params[f"Dense_{i}"]["kernel"])
        (scale,) = (torch.tensor(v) for v in params[f"fc{i}"].values())
        normed = kernel / kernel.norm(dim=0) * scale
        rows.append(part @ normed + torch.tensor(params[f"Dense_{i}"]["bias"]))
    norm = {k: torch.tensor(v) for k, v in params["LayerNorm_0"].items()}
    x = functional.relu(functional.layer_norm(torch.stack(rows, 1), (128,), norm["scale"], norm["bias"], eps=1e-6))
    last = [
        torch_gru(params[name], 128, 64, reverse)(x)[1][0]
        for name, reverse in (("forward_gru", False), ("backward_gru", True))
    ]
    wanted = dense(params["head"], torch.cat(last, -1))[:, 0].detach().numpy()
    np.testing.assert_allclose(module.apply(variables, GATES), wanted, atol=5e-6)


def test_linear_regression():
    params = {
        "head": {"kernel": np.linspace(-1, 1, sum(WIDTHS), dtype=np.float32)[:, None], "bias": np.float32([0.25])}
    }
    wanted = GATES @ params["head"]["kernel"][:, 0] + 0.25
    np.testing.assert_allclose(LinearRegression(WIDTHS).apply({"params": params}, GATES), wanted, rtol=1e-5)


@pytest.mark.parametrize("name", PREDICTORS)
def test_every_form_starts_far_from_certainty(name):
    module = PREDICTORS[name](WIDTHS)
    predicted = module.apply(module.init(jax.random.key(0), jnp.asarray(GATES)), GATES)
    assert predicted.shape == (6,)
    assert np.all(np.abs(predicted) < 3)  # logits: accuracies from 5 to 95 %
