"""The package as users install it: the contents of the wheel, and that it works without other packages."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import ddnp_jax

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "ddnp_jax", "configs", "experiments", "tests")


def run(*command, cwd, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True)


def succeed(*command, cwd):
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy, because a build leaves files beside its sources and uses those of earlier builds."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout):
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir=wheels")
    succeed(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=checkout)
    (file,) = (checkout / "wheels").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The Python of an environment with the wheel and its requirements, in the versions installed here."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    here = {each.name: each.version for each in importlib.metadata.distributions() if each.name != "ddnp_jax"}
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in here.items()))
    succeed(python, "-m", "pip", "install", "--quiet", f"--constraint={constraints}", wheel, cwd=folder)
    return python


def test_wheel_holds_the_library_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ddnp_jax").rglob("*.py")}
    templates = {f"ddnp_jax/pipeline/report/templates/page.{ending}" for ending in ("html", "css")}
    assert names == modules | templates | {"ddnp_jax/py.typed"}


def test_wheel_needs_jax_flax_optax_and_numpy_alone(wheel):
    (described,) = importlib.metadata.distributions(path=[str(wheel)])
    needed = [re.match(r"[\w-]+", each)[0] for each in described.requires if "extra ==" not in each]
    assert sorted(needed) == ["flax", "jax", "jaxlib", "numpy", "optax"]


def test_wheel_says_its_version_licence_and_authors(wheel):
    (described,) = importlib.metadata.distributions(path=[str(wheel)])
    assert described.version == ddnp_jax.__version__
    assert described.metadata["License-Expression"] == "Apache-2.0"
    assert described.metadata["Author"] == "The ddnp_jax authors"
    (text,) = (file for file in described.files if file.name == "LICENSE")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(str(text)) == (ROOT / "LICENSE").read_bytes()


def test_networks_are_pruned_with_nothing_else_installed(bare, tmp_path):
    succeed(bare, "-I", ROOT / "tests" / "bare_install.py", cwd=tmp_path)


def test_the_command_describes_with_nothing_else_installed(bare, tmp_path):
    arguments = ("describe", "resnet20", "--input_shape=32,32,3", "--p=0.5")
    found = [
        run(*command, *arguments, cwd=tmp_path) for command in ([bare, "-m", "ddnp_jax"], [bare.parent / "ddnp_jax"])
    ]
    assert [done.returncode for done in found] == [0, 0], found[0].stderr
    assert found[0].stdout == found[1].stdout and "p = 0.5 can be met" in found[0].stdout
    done = run(bare, "-m", "ddnp_jax", "compare", "run", cwd=tmp_path)
    assert re.fullmatch(r"error: ddnp_jax\.pipeline needs \w+; run `pip install ddnp_jax\[job\]`\.\n", done.stderr)


@pytest.mark.parametrize("part", ["ddnp_jax.data", "ddnp_jax.pipeline"])
def test_what_needs_the_job_says_so(bare, tmp_path, part):
    done = run(bare, "-I", "-c", f"import ddnp_jax; {part}", cwd=tmp_path)
    assert re.fullmatch(
        rf"ModuleNotFoundError: {part} needs \w+; run `pip install ddnp_jax\[job\]`\.", done.stderr.splitlines()[-1]
    )


def test_experiments_without_the_job_end_in_a_sentence(bare, tmp_path):
    done = run(bare, "-m", "experiments.digits_r20", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert re.fullmatch(r"error: experiments need \w+; run `pip install ddnp_jax\[job\]`\.\n", done.stderr)


def test_editable_install_puts_the_checkout_on_the_path(checkout):
    succeed(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_editable('.')", cwd=checkout)
    (file,) = checkout.glob("*editable*.whl")
    with zipfile.ZipFile(file) as archive:
        (path,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".pth"))
    assert Path(path.strip()) == checkout
