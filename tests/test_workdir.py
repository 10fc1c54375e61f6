"""The folder of a run: its owner, the inputs of its results, and that only one run works in it at a time."""

import functools
import json
import os
import shutil
import subprocess
import sys

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddnp_jax import data, files
from ddnp_jax.pipeline import identity
from ddnp_jax.pipeline.results import Results
from ddnp_jax.pipeline.workdir import check_room, claim_workdir, locked
from ddnp_jax.training.log import MetricsLog


def test_a_run_goes_on_in_its_own_workdir_only(tmp_path):
    workdir = tmp_path / "new" / "run"
    config = {"seed": 0, "train": {"batch_size": 128, "widths": (1, 2)}, "parallel": {"mode": "pmap"}, "none": {}}
    claim_workdir(workdir, config)
    claim_workdir(workdir, config)
    assert json.loads((workdir / "config.json").read_text())["train"] == {"batch_size": 128, "widths": [1, 2]}
    other = {"seed": 0, "train": {"batch_size": 256, "lr": 0.1}, "parallel": {"mode": "shard_map"}, "none": {}}
    with pytest.raises(ValueError) as error:
        claim_workdir(workdir, other, ignore=("parallel", "see"))  # a prefix of fields, not of letters
    assert str(error.value) == (
        f"{workdir} belongs to a run with another config:\n"
        "  train.batch_size: workdir has 128, this run has 256\n"
        "  train.widths: workdir has [1, 2], this run has no such field\n"
        "  train.lr: workdir has no such field, this run has 0.1\n"
        "Give this run another workdir, or the workdir's values."
    )
    with pytest.raises(ValueError, match="seed: workdir has 0, this run has 1"):
        claim_workdir(workdir, config | {"seed": 1}, ignore=("see", "seed.x", "train"))
    claim_workdir(workdir, config | {"parallel": {"mode": "shard_map"}}, ignore=("parallel.mode",))
    (workdir / "config.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        claim_workdir(workdir, config)
    for other in ("[]", "null", "3"):
        (workdir / "config.json").write_text(other)
        with pytest.raises(ValueError, match=r"config\.json contains no configuration of a run; restore a good copy"):
            claim_workdir(workdir, config)
    (workdir / "config.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"config\.json contains no configuration of a run; restore a good copy, or use"
    ):
        claim_workdir(workdir, config)
    claim_workdir(tmp_path, {f"field{i}": i for i in range(50)})
    with pytest.raises(ValueError, match=r"has 9, this run has no such field\n  and 40 more\nGive this run another"):
        claim_workdir(tmp_path, {})


def test_runs_that_did_not_note_what_they_were_given_resume(tmp_path):
    claim_workdir(tmp_path, {"seed": 0})
    claim_workdir(tmp_path, {"seed": 0, "given": {"model": "Net"}})
    other = tmp_path / "other"
    claim_workdir(other, {"seed": 0, "given": {"model": "Net"}})
    with pytest.raises(ValueError, match=r"given\.model: workdir has 'Net', this run has 'Other'"):
        claim_workdir(other, {"seed": 0, "given": {"model": "Other"}})


# One run at a time

SECOND = """
import sys
from ddnp_jax.pipeline.workdir import locked
try:
    with locked(sys.argv[1]):
        print("works")
        if len(sys.argv) > 2:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
except ValueError as error:
    print(error)
"""


def in_another_process(workdir, *arguments):
    command = [sys.executable, "-c", SECOND, str(workdir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_a_second_run_in_a_workdir_is_refused_by_name(tmp_path):
    workdir = tmp_path / "run"
    with locked(workdir):
        assert f"another run works in {workdir}: process {os.getpid()} on " in in_another_process(workdir)
        with pytest.raises(ValueError, match="another run works in"), locked(workdir):
            pass
        assert json.loads((workdir / "run.lock").read_text())["process"] == os.getpid()
        (workdir / "config.json").touch()
    assert in_another_process(workdir) == "works\n"
    assert os.listdir(workdir) == ["config.json"]


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    in_another_process(tmp_path, "is killed")
    assert (tmp_path / "run.lock").exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["process"] == os.getpid()


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()
    with locked(tmp_path):
        pass
    assert tmp_path.exists()


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give a folder"), locked(tmp_path / "file"):
        pass


def test_a_workdir_that_is_deleted_under_the_run_is_named(tmp_path):
    sentence = (
        f"workdir={tmp_path}/new was moved or deleted while the run worked in it; put it back, and start the same "
        "command again."
    )
    with pytest.raises(OSError) as error, locked(tmp_path / "new"):
        shutil.rmtree(tmp_path / "new")
        files.write_text(tmp_path / "new" / "results.json", "{}")
    assert str(error.value) == sentence
    with pytest.raises(FileNotFoundError, match="no such image"), locked(tmp_path / "new"):
        raise FileNotFoundError("no such image")


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path):
    check_room(tmp_path / "new" / "run", 1000)
    with pytest.raises(
        ValueError, match=r"MiB free, and the checkpoints of a stage need some 1,048,576 MiB; make room"
    ):
        check_room(tmp_path / "new", 2**40 * 1.0)


# What was given


class Net(nn.Module):
    width: int = 3
    act: object = nn.relu

    @nn.compact
    def __call__(self, x):
        return self.act(nn.Dense(self.width)(x.reshape(len(x), -1)))


class Twin(Net):
    """The same attributes under another name."""


class NnxNet(nnx.Module):
    def __init__(self, rngs, act=nnx.relu):
        self.layer = nnx.Linear(4, 3, rngs=rngs)
        self.act = act


def test_modules_are_told_apart_by_class_and_attributes():
    modules = [
        Net(),
        Twin(),
        Net(width=4),
        Net(act=nn.gelu),
        Net(act=functools.partial(nn.gelu, approximate=False)),
        Net(act=lambda x: nn.relu(x)),
        Net(act=lambda x: nn.gelu(x)),
        Net(act=jnp.zeros(2)),
        Net(act=jnp.ones(2)),
        Net(act=(nn.Dense(3), jnp.float32)),
        Net(act=(nn.Dense(4), jnp.float32)),
        NnxNet(nnx.Rngs(0)),
        NnxNet(nnx.Rngs(0), act=nnx.gelu),
    ]
    found = [json.dumps(identity.described(module)) for module in modules]
    assert len(set(found)) == len(modules)
    assert all("0x" not in text for text in found)
    assert identity.described(Net()) == {"class": "test_workdir:Net", "act": identity.described(nn.relu), "width": 3}
    assert identity.described(NnxNet(nnx.Rngs(0))) == identity.described(NnxNet(nnx.Rngs(1)))


def arrays(seed=0, **fields):
    rng = np.random.default_rng(seed)
    part = rng.integers(0, 256, (20, 8, 8, 3)).astype(np.uint8), np.arange(20) % 4
    return data.from_arrays(part, part, mean=(0.5,) * 3, std=(0.5,) * 3, search_fraction=0.2, **fields)


def test_data_sets_are_told_apart_by_content_splits_and_preprocessing():
    found = [arrays(), arrays(seed=1), arrays(pad=2), arrays(flip=False), arrays(class_names=list("abcd"))]
    texts = [json.dumps(dataset.fingerprint(), sort_keys=True) for dataset in found]
    assert len(set(texts)) == len(texts)
    assert json.dumps(arrays(name="another").fingerprint(), sort_keys=True) == texts[0]


def test_a_digest_sees_every_bit_and_the_type():
    tree = {"a": np.zeros((2, 3), np.float32), "b": (np.arange(3), "text")}
    digest = identity.digest(tree)
    assert digest == identity.digest({"a": jnp.zeros((2, 3)), "b": (np.arange(3), "text")})
    flipped = tree["a"].copy()
    flipped.view(np.int32)[1, 1] ^= 1
    for other in (tree | {"a": flipped}, tree | {"a": tree["a"].T}, tree | {"b": (np.arange(3), "other")}):
        assert identity.digest(other) != digest


def test_fields_are_taken_out_of_nested_mappings():
    config = {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": 4}
    assert identity.stripped(config, ("a.b", "a.c.d")) == {"a": {"c": {"e": 3}}, "f": 4}


# Results


def test_a_result_is_believed_of_what_it_was_made_from_alone(tmp_path):
    results = Results(tmp_path / "results.json")
    assert results.measured("base", "one", lambda: 1) == 1
    assert Results(tmp_path / "results.json").measured("base", "one", lambda: 2) == 1
    assert results.measured("base", "two", lambda: 2) == 2
    assert results.measured("pruned", "two", lambda: None) is None
    assert results.measured("pruned", "two", lambda: 5) is None
    assert results.values() == {"base": 2, "pruned": None}


@pytest.mark.parametrize("damage", ["bit", "cut off", "null", "[]", "empty", "no checksum"])
def test_damaged_results_are_named(tmp_path, damage):
    path = tmp_path / "results.json"
    Results(path).measured("base", "one", lambda: {"top1": 91.5})
    content = path.read_text()
    damaged = {
        "bit": content.replace("91.5", "93.5"),
        "cut off": content[:-9],
        "null": "null",
        "[]": "[]",
        "empty": "",
        "no checksum": json.dumps({"base": {"made_from": "one", "value": {"top1": 93.5}}}),
    }
    path.write_text(damaged[damage])
    with pytest.raises(ValueError, match=r"results\.json is (damaged: its checksum is wrong|not JSON)"):
        Results(path).values()


def test_sealed_files_keep_their_fields(tmp_path):
    files.write_sealed(tmp_path / "a.json", {"x": [1, 2], "y": None})
    assert files.read_sealed(tmp_path / "a.json") == {"x": [1, 2], "y": None}


def test_the_log_of_another_run_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, "one").write("search", 1, loss=2.0)
    assert MetricsLog(path, "one").lines("search") == [{"stage": "search", "step": 1, "loss": 2.0}]
    with pytest.raises(ValueError, match=r"metrics\.jsonl is the log of another run; put this run's back"):
        MetricsLog(path, "two").lines("search")


def test_a_flipped_bit_in_the_log_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, "one")
    log.write("search", 1, loss=2.5, epoch=0.25)
    log.write("search", 2, loss=1.5)
    assert log.lines("search") == [
        {"stage": "search", "step": 1, "loss": 2.5, "epoch": 0.25},
        {"stage": "search", "step": 2, "loss": 1.5},
    ]
    path.write_text(path.read_text().replace("2.5", "3.5"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, has a wrong checksum; repair or delete the line\.$"):
        log.lines("search")
