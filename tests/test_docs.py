"""The documentation is correct: its Python code runs, its links exist, and its reference names existing objects."""

import functools
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from ml_collections import ConfigDict

import ddnp_jax
from configs import cifar10_r56
from ddnp_jax import methods, pipeline
from experiments.pytorch_resnet import CifarResNet
from tests import counted_device
from tests.test_data_folder import fill

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def fields_of(config):
    for name, value in config.items():
        nested = fields_of(value) if isinstance(value, ConfigDict) else ()
        yield from (name, *(f"{name}.{each}" for each in nested))


def resnet20():
    return CifarResNet(20, "subsample")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Names that pages assume: a network, batches, a folder of images; searches take a few steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "for_pytorch").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "for_pytorch")
    monkeypatch.delitem(sys.modules, "pytorch_layers", raising=False)
    fit = ddnp_jax.fit
    monkeypatch.setattr(ddnp_jax, "fit", lambda *given, steps, **fields: fit(*given, steps=min(steps, 2), **fields))
    fields = functools.partial(methods.METHODS["ddnp"].fields, importance="scalar", width="scalar")
    monkeypatch.setitem(methods.METHODS, "ddnp", methods.METHODS["ddnp"]._replace(steps=2, fields=fields))
    counted_device.use(monkeypatch)
    monkeypatch.setattr(pipeline, "run", pipeline.prepare)  # which checks all that a run needs, and trains nothing
    model, rng = zoo.PreActResNet(), np.random.default_rng(0)
    variables = zoo.randomized(model, (32, 32, 3))
    images = rng.normal(size=(8, 32, 32, 3)).astype(np.float32)
    topology = ddnp_jax.trace(model, (32, 32, 3))
    Path("runs/mine").mkdir(parents=True)
    ddnp_jax.Selection.first([width - 1 for width in topology.widths]).save("runs/mine/selection.json")
    ddnp_jax.save_pruned("my_weights", model, variables)
    fill(Path("photographs"), *(f"{label}/{i}.png" for label in "abcdefg" for i in range(20)), size=(32, 32))
    torch.save(resnet20().state_dict(), "resnet20.pth")
    return {
        "ddnp_jax": ddnp_jax,
        "np": np,
        "MyModel": zoo.PreActResNet,
        "ResNet20": resnet20,
        "model": model,
        "variables": variables,
        "images": images,
        "batches": [(images, np.arange(8) % 7)],
    }


@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page)], ids=lambda page: page.stem)
def test_python_of_a_page_runs_from_top_to_bottom(page, names):
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_the_readmes_python_is_that_of_an_example_that_is_run():
    (block,) = blocks(ROOT / "README.md")
    assert block in (ROOT / "examples" / "prune_linen.py").read_text()
    assert not blocks(ROOT / "CONTRIBUTING.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for named in re.findall(r"`((?:configs|examples|experiments|results|tests|docs|ddnp_jax)/[\w./]+)`", text):
        assert (ROOT / named).exists(), named


def test_the_reference_names_what_there_is():
    named = [name for page in DOCS for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    assert "ddnp_jax.prune" in named
    for name in named:
        module, _, attribute = name.rpartition(".")
        shown = getattr(importlib.import_module(module), attribute)
        # Of a module and its function of the same name, the short name would show the module.
        if inspect.isfunction(shown) and shown.__module__.endswith(f".{shown.__name__}"):
            assert name == f"{shown.__module__}.{shown.__name__}"


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "reference" / "library.md").read_text()
    referred = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    elsewhere = {"config", "methods", "models"}
    assert set(ddnp_jax.__all__) - referred <= elsewhere


def test_commands_name_experiments_and_configurations_that_there_are():
    text = "\n".join(page.read_text() for page in PAGES)
    modules = set(re.findall(r"experiments\.(?!md)\w+", text))
    assert "experiments.table_a4" in modules
    assert not [name for name in modules if importlib.util.find_spec(name) is None]
    assert not [name for name in re.findall(r"configs/\w+\.py", text) if not (ROOT / name).exists()]


def test_fields_set_in_commands_are_those_of_some_method():
    text = "\n".join(page.read_text() for page in [*PAGES, *ROOT.glob("results/*/README.md")])
    named = set(re.findall(r"--config\.([\w.]*\w)", text))
    assert {"budget.p", "search.width_optimizer.learning_rate"} < named
    configs = [cifar10_r56.get_config(method) for method in ("ddnp", "nppm", "chip", "stored")]
    known = {name for config in configs for name in fields_of(config)}
    assert not named - known


def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="`pip install -e .[docs]` brings mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
