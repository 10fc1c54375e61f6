"""Experiments from another working directory than the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {  # given as configurations
    "README.md": b"a title\n",
    "image.png": b"\x89PNG\r\n\x1a\n\0",
    "empty.py": b"",
    "three.py": b"def get_config(): return 3\n",
    "imports.py": b"import nowhere\n",
}


def refusal(folder, *arguments):
    command = [sys.executable, *arguments, "--workdir=run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("chosen", ["", "elsewhere"])
def test_compiled_programs_are_kept_in_the_users_cache_or_where_the_environment_says(tmp_path, chosen):
    code = (
        "import jax; from configs import digits_r20; from experiments import launch; "
        "launch.configure(digits_r20.get_config()); print(jax.config.jax_compilation_cache_dir)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]  # the tests' own
    environment |= {"JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/{chosen}"} if chosen else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{tmp_path}/{chosen or 'ddnp_jax/xla'}"


@pytest.mark.parametrize("experiment", [["-m", "experiments.digits_r20"], [str(ROOT / "experiments/digits_r20.py")]])
def test_configuration_of_the_checkout_is_found_from_elsewhere(tmp_path, experiment):
    error = refusal(tmp_path, *experiment, "--config=configs/digits_r20.py", "--config.model.name=none")
    last = error.splitlines()[-1]  # where the machine is busy, a progress bar comes first
    assert last.startswith("error: model 'none' is unknown")


@pytest.mark.parametrize("config", [["--config=nowhere.py:tiny"], ["--config", "nowhere.py"]])
def test_missing_configuration_ends_in_a_sentence(tmp_path, config):
    error = refusal(tmp_path, "-m", "experiments.digits_r20", *config, "--config.budget.p=0.4")
    assert (
        error == f"error: --config=nowhere.py is not a file, here or in {ROOT}; see configs/ for the available files.\n"
    )


def test_configuration_beside_the_user_comes_first(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits_r20.py").write_text("def get_config():\n    raise SystemExit('error: mine')\n")
    error = refusal(tmp_path, "-m", "experiments.digits_r20", "--config=configs/digits_r20.py")
    assert error == "error: mine\n"


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config=configs/digits_r20.py:nonsense", "the configuration's argument 'nonsense' is unknown; use ddnp, "),
        ("--workdir=", "--workdir is empty; give the folder of the run."),
        ("--workdir=gs://bucket/run", "workdir=gs://bucket/run is a URL, not a folder; mount the storage"),
        ("extra", "'extra' is not a flag; give fields as --config.FIELD=VALUE"),
        ("--config.base.epochs=abc", "flag --config.base.epochs=abc: invalid literal for int()"),
        ("--config.parallel.cpu_fusions=foo", "parallel.cpu_fusions names 'foo', which is unknown; join some of "),
        ("--config.model.name=resnet18", "model 'resnet18' does not take the attributes shortcut='subsample'"),
        ("--config.data.flip=maybe", "flag --config.data.flip=maybe must be True or False.\n"),
        ("--config=README.md", "--config=README.md is not valid Python (invalid syntax (README.md, line 1)); repair"),
        ("--config=image.png", "--config=image.png is not valid Python (source code string cannot contain null bytes)"),
        ("--config=empty.py", "--config names a file without get_config(); copy one of configs/.\n"),
        ("--config=three.py", "the configuration of --config has no 'eval_batch_size'; start from that of configs/"),
        ("--config=three.py:x", "the file of --config takes no argument; leave out the colon and what follows it.\n"),
        ("--config=imports.py", "the file of --config cannot import a module (No module named 'nowhere')."),
        ("--config.seed=99999999999999999999", "seed=99999999999999999999 must be below 2**63."),
    ],
)
def test_bad_arguments_end_in_one_sentence_before_any_work(tmp_path, argument, sentence):
    command = [sys.executable, "-m", "experiments.digits_r20", "--workdir=run", argument]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sentence}")
    assert done.stderr.count("\n") == 1
    assert not [file for file in tmp_path.iterdir() if file.name not in (*FILES, "__pycache__")]


def test_missing_workdir_and_foreign_platform_end_in_one_sentence(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "nonsense"}
    for arguments, sentence in (
        ((), "--workdir is missing; give the folder of the run."),
        (("--workdir=run",), "JAX finds no device of JAX_PLATFORMS='nonsense' ("),
    ):
        command = [sys.executable, "-m", "experiments.digits_r20", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {sentence}")
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_everything_is_imported_ends_in_a_sentence(tmp_path):
    # The loop: Python may handle the signal a little later.
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "os.kill(os.getpid(), signal.SIGINT)\nwhile True:\n    pass\n"
    )
    command = [sys.executable, "-m", "experiments.digits_r20", "--config=mine.py", "--workdir=run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted; the same command resumes what was saved.\n")


FULL = """
from experiments import launch

def job(config, workdir):
    class Waiter:
        def __del__(self):
            raise RuntimeError("Event loop is closed")
    Waiter()
    raise ValueError("Error writing: Failed to write [os_error_code='28'] [tensorstore_spec='...']")

launch.run("configs/digits_r20.py", job)
"""


def test_a_full_disk_ends_in_a_sentence_whatever_orbax_says_of_it(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FULL, "--workdir=run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    sentence = "error: [Errno 28] No space left on device; files that were saved before are unchanged.\n"
    assert (done.returncode, done.stderr) == (1, sentence)
