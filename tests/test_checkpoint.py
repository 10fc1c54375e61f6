import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ddnp_jax import parallel
from ddnp_jax.checkpoint import Checkpoints

# After a failed read, a thread of orbax may still call into the event loop that orbax has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parents[1]


class Optimizer(NamedTuple):
    count: np.ndarray
    nothing: tuple
    momentum: dict


def make_state(seed=0):
    """Every kind of leaf that a run has, one of them large enough to be stored uncompressed."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((64, 64), dtype=np.float32)
    return {
        "params": {"conv/1": {"kernel": kernel}, "half": kernel[0].astype(jnp.bfloat16), "empty": np.zeros((0, 3))},
        "optimizer": Optimizer(np.int32(seed).reshape(()), (), {"kernel": kernel * np.float32(np.nan)}),
        "rng": np.array([seed, 2**32 - 1], np.uint32),
        "flags": np.array([True, False]),
        "images": rng.integers(0, 256, (5, 4), dtype=np.uint8),
        "moments": [np.float64(1) / np.arange(1, 4), None],
    }


def assert_same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def fill(directory, metrics=(None, None)):
    """Saves make_state(step) with these metrics as steps 1, 2, ..."""
    with Checkpoints(directory) as checkpoints:
        for step, metric in enumerate(metrics, start=1):
            checkpoints.save(step, make_state(step), metric)


def steps_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def warnings_logged():
    """The project's and orbax's warnings; absl keeps its logger apart from pytest's."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("absl")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_restores_every_kind_of_leaf_bit_for_bit(tmp_path, warnings_logged):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state()) is None
        checkpoints.save(3, make_state(3))
        step, state = checkpoints.restore(make_state())
        assert step == 3
        assert_same(state, make_state(3))
    with Checkpoints(tmp_path) as checkpoints:
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state())
        assert_same(checkpoints.restore(template)[1], make_state(3))
        assert checkpoints.restore_best(template) is None  # saved without a metric
    assert warnings_logged == []


def test_saves_what_was_on_the_devices_even_if_it_is_donated_next(tmp_path):
    state = parallel.replicate({"x": np.arange(100_000, dtype=np.float32)})
    double = jax.jit(lambda state: {"x": state["x"] * 2}, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        state = double(state)
        checkpoints.save(2, state)
        state = double(state)
        _, restored = checkpoints.restore(state)
    np.testing.assert_array_equal(restored["x"], np.arange(100_000, dtype=np.float32) * 2)
    with Checkpoints(tmp_path) as checkpoints:
        shutil.rmtree(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(state)[1]["x"], np.arange(100_000, dtype=np.float32))


def test_keeps_the_latest_and_the_best(tmp_path):
    fill(tmp_path, metrics=(0.1, 0.9, 0.3, None, 0.2, 0.8))
    assert steps_in(tmp_path) == ["2", "5", "6"]
    with Checkpoints(tmp_path) as checkpoints:  # what is best is known after a restart too
        assert checkpoints.restore_best(make_state())[0] == 2
        checkpoints.save(7, make_state(7), 0.9)
        step, state = checkpoints.restore_best(make_state())
        assert step == 7  # the newest of equals
        assert_same(state, make_state(7))
        checkpoints.save(8, make_state(8))
        checkpoints.save(9, make_state(9))
        assert checkpoints.restore(make_state())[0] == 9
    assert steps_in(tmp_path) == ["7", "8", "9"]


def files_of(step_directory):
    return sorted(path for path in step_directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damage_to_any_file_is_harmless_or_noticed(tmp_path, damage, warnings_logged):
    """Any damage to any file gives exactly the newest state, or exactly the previous one and a warning."""
    whole = tmp_path / "whole"
    fill(whole)
    outcomes = []
    for i, path in enumerate(files_of(whole / "2")):
        copy = tmp_path / str(i)
        shutil.copytree(whole, copy)
        target, content = copy / path.relative_to(whole), bytearray(path.read_bytes())
        if damage == "missing":
            target.unlink()
        else:
            half = len(content) // 2
            if damage == "truncated":
                del content[half:]
            elif content:
                content[half] ^= 1
            target.write_bytes(content)
        warnings_logged.clear()
        with Checkpoints(copy) as checkpoints:
            step, state = checkpoints.restore(make_state())
        assert_same(state, make_state(step))
        noticed = f"Checkpoint 2 in {copy} is damaged and set aside: "
        assert any(line.startswith(noticed) for line in warnings_logged) == (step == 1)
        assert steps_in(copy) == (["1", "2"] if step == 2 else ["1", "2.damaged"])
        outcomes.append(step)
    assert {1, 2} == set(outcomes)


def flip_a_bit_of_the_kernel(directory):
    """Flips one bit in the stored bytes of the largest leaf, which orbax does not notice."""
    path = max(files_of(directory), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_passes_orbax_and_is_caught_by_the_checksum(tmp_path, warnings_logged):
    fill(tmp_path)
    flip_a_bit_of_the_kernel(tmp_path / "2")
    kernel = make_state(2)["params"]["conv/1"]["kernel"]
    with ocp.StandardCheckpointer() as plain:
        arrays = plain.restore(tmp_path / "2" / "arrays")
    assert not np.array_equal(arrays["params/conv/1/kernel"], kernel)  # restored without a word, and wrong
    with Checkpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore(make_state())
    assert step == 1
    assert_same(state, make_state(1))
    assert warnings_logged[-1] == (
        f"Checkpoint 2 in {tmp_path} is damaged and set aside: "
        "leaf params/conv/1/kernel does not have the SHA-256 that it was saved with"
    )


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again_and_nothing_is_lost(tmp_path):
    fill(tmp_path)
    for aside in (["2.damaged"], ["2.damaged", "2.damaged2"]):
        flip_a_bit_of_the_kernel(tmp_path / "2")
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.restore(make_state())[0] == 1
            checkpoints.save(2, make_state(2))
            assert checkpoints.restore(make_state())[0] == 2
        assert steps_in(tmp_path) == ["1", "2", *aside]
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(make_state())[1], make_state(2))


def test_a_damaged_best_is_named_and_the_next_best_used(tmp_path, warnings_logged):
    fill(tmp_path, metrics=(0.9, 0.5, 0.6))
    (tmp_path / "1" / "record" / "metadata").write_text('{"metric": 0.1}')
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state())[0] == 3
        checkpoints.save(4, make_state(4), 0.1)
        checkpoints.save(5, make_state(5), np.float32(0.2))
    assert steps_in(tmp_path) == ["1", "3", "4", "5"]  # the damaged one may have been the best: it is not just dropped
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_best(make_state())[0] == 3
        assert checkpoints.restore(make_state())[0] == 5
    assert steps_in(tmp_path) == ["1.damaged", "3", "4", "5"]
    assert warnings_logged[-1].startswith(f"Checkpoint 1 in {tmp_path} is damaged and set aside: KeyError: 'sha256'")


def test_a_changed_record_is_damage(tmp_path):
    fill(tmp_path, metrics=(0.1, 0.2))
    path = tmp_path / "2" / "record" / "metadata"
    path.write_text(path.read_text().replace('"metric": 0.2', '"metric": 0.3'))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state())[0] == 1


def test_all_damaged_is_an_error_and_leaves_them_where_they_are(tmp_path):
    fill(tmp_path)
    flip_a_bit_of_the_kernel(tmp_path / "1")
    shutil.rmtree(tmp_path / "2" / "arrays")
    for _ in range(2):  # the next run does not start from scratch either
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError) as error:
            checkpoints.restore(make_state())
        assert str(error.value).startswith(f"Every checkpoint in {tmp_path} is damaged (2: ")
        assert "1: leaf params/conv/1/kernel does not have the SHA-256" in str(error.value)
    assert steps_in(tmp_path) == ["1", "2"]


def test_a_checkpoint_of_another_model_names_the_first_differing_leaf(tmp_path):
    fill(tmp_path)
    state = make_state()
    state["params"]["conv/1"]["kernel"] = np.zeros((64, 32), np.float32)
    message = (
        f"Checkpoint 2 in {tmp_path} is of another model: leaf params/conv/1/kernel is (64, 64) float32 there "
        "and (64, 32) float32 here; use the config that wrote it, or another workdir."
    )
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError) as error:
            checkpoints.restore(state)
        assert str(error.value) == message
        with pytest.raises(ValueError, match=r"leaf rng is \(2,\) uint32 there and absent here"):
            checkpoints.restore({name: x for name, x in make_state().items() if name != "rng"})
        with pytest.raises(ValueError, match=r"leaf extra is absent there and \(\) float32 here"):
            checkpoints.restore(make_state() | {"extra": np.float32(0)})
        assert checkpoints.restore(make_state())[0] == 2
    assert steps_in(tmp_path) == ["1", "2"]


def test_a_step_below_the_latest_is_saved_too(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(5))
        checkpoints.save(3, make_state(3))
    assert steps_in(tmp_path) == ["3", "5"]


def test_a_step_holds_one_state(tmp_path):
    fill(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, make_state(2))  # stopped right after a save: the same again
        with pytest.raises(ValueError, match=f"Checkpoint 2 in {tmp_path} holds another state; restore before"):
            checkpoints.save(2, make_state(5))
        with pytest.raises(ValueError, match="metric=nan of step 3 is not finite"):
            checkpoints.save(3, make_state(3), float("nan"))
        with pytest.raises(ValueError, match="Two leaves of the state are both named a/b; rename"):
            checkpoints.save(3, {"a/b": np.zeros(2), "a": {"b": np.zeros(2)}})
        assert_same(checkpoints.restore(make_state())[1], make_state(2))


KILLED = """
import os, signal, sys
from ddnp_jax.checkpoint import Checkpoints
from tests.test_checkpoint import make_state

directory, event, name = sys.argv[1:]
with Checkpoints(directory) as checkpoints:
    checkpoints.save(1, make_state(1))
    checkpoints.restore(make_state())

    def hook(what, arguments):
        if what == event and f"{directory}/2" in str(arguments[0]) and name in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    checkpoints.save(2, make_state(2))
"""


def test_a_kill_at_any_moment_of_a_save_leaves_the_one_before(tmp_path):
    # Killed by itself as the save makes its folder, opens a file of the record, and gives the finished folder its name.
    moments = [("os.mkdir", ""), ("open", "record"), ("os.rename", "")]
    command = [sys.executable, "-c", KILLED]
    children = [
        subprocess.Popen([*command, str(tmp_path / event), event, name], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for event, name in moments
    ]
    for child, (event, _) in zip(children, moments, strict=True):
        _, errors = child.communicate(timeout=3600)
        assert child.returncode == -signal.SIGKILL, errors
        assert "2" not in steps_in(tmp_path / event)
        with Checkpoints(tmp_path / event) as checkpoints:
            step, state = checkpoints.restore(make_state())
            assert step == 1
            assert_same(state, make_state(1))
            checkpoints.save(3, make_state(3))
        assert steps_in(tmp_path / event) == ["1", "3"]  # nor is anything unfinished left behind
        with Checkpoints(tmp_path / event) as checkpoints:
            checkpoints.save(2, make_state(2))
        assert steps_in(tmp_path / event) == ["2", "3"]
