"""Checkpoint files: where the weights are, messages about it, and harmful files, which are refused."""

import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddnp_jax import torch_weights

NAMES = ("conv.weight", "fc.weight")


def state(prefix=""):
    return {f"{prefix}conv.weight": torch.ones(2, 1, 3, 3), f"{prefix}fc.weight": torch.full((4, 2), 2.0)}


def assert_read(checkpoint, wanted=()):
    read = torch_weights.read(checkpoint, wanted)
    assert tuple(read) == NAMES
    np.testing.assert_array_equal(read["fc.weight"], np.full((4, 2), 2, np.float32))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "model_ema"])
def test_the_key_that_holds_the_weights_is_said(tmp_path, capsys, key):
    torch.save({key: state(), "epoch": 3}, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth")
    assert capsys.readouterr() == ("", f"{tmp_path / 'a.pth'}: the weights under {key!r} are used.\n")


def test_of_two_sets_of_weights_the_one_that_is_taken_is_said(capsys):
    assert_read({"model_ema": {"n_averaged": torch.tensor(7), **state("module.")}, "model": state()})
    line = "the state dict: the weights under 'model' are used, not those under 'model_ema'.\n"
    assert capsys.readouterr().err == line


def test_counters_of_averaged_models_are_no_weights():
    assert_read({"model_ema": {"n_averaged": torch.tensor(7), **state("module.")}})


@pytest.mark.parametrize(
    ("prefix", "removed"),
    [
        ("module.", ["module."]),
        ("_orig_mod.", ["_orig_mod."]),
        ("backbone.", ["backbone."]),
        ("module._orig_mod.", ["module.", "_orig_mod."]),
        ("_orig_mod.module.backbone.", ["_orig_mod.", "module.", "backbone."]),
    ],
)
def test_prefixes_are_removed_and_said(capsys, prefix, removed):
    assert_read(state(prefix))
    lines = [f"the state dict: the prefix {each!r} is removed from the names.\n" for each in removed]
    assert capsys.readouterr().err == "".join(lines)


def test_a_prefix_that_the_model_has_itself_stays(capsys):
    given = state("backbone.")
    assert set(torch_weights.read(given, wanted=set(given))) == set(given)
    assert capsys.readouterr().err == ""


def refusal(checkpoint):
    with pytest.raises(ValueError) as caught:
        torch_weights.read(checkpoint)
    return str(caught.value)


def test_a_tensor_with_and_without_its_prefix_is_refused():
    assert refusal({**state("module."), **state()}) == (
        "the state dict holds both 'module.conv.weight' and 'conv.weight', which are the same name without "
        "prefixes; give a state dict with only one of them."
    )


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, np.int8, np.complex64, np.bool_]
)
def test_numbers_that_are_no_weights_are_refused(dtype):
    own = isinstance(dtype, torch.dtype)
    other = torch.ones(3, dtype=dtype) if own else np.ones(3, dtype)
    assert refusal({**state(), "other": other}) == (
        f"the state dict holds 'other' of type {other.dtype}, and weights must be floating-point numbers; "
        "give a state dict without quantization and without other tensors."
    )


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused(tmp_path, number):
    bad = torch.zeros(5, dtype=torch.float64)
    bad[1:3] = number
    save_file({**state(), "bad": bad}, tmp_path / "a.safetensors")
    for checkpoint, source in (({**state(), "bad": bad}, "the state dict"), (tmp_path / "a.safetensors",) * 2):
        assert refusal(checkpoint) == (
            f"{source} holds 'bad' with 2 values that are NaN or infinite in float32; give weights that are finite."
        )


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.ones(3, device="meta")])
def test_tensors_without_dense_numbers_are_refused(tensor):
    assert refusal({"a": tensor}) == "the state dict holds 'a', which is sparse or without data; give a dense tensor."


def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"archive/data/{i}", bytes(2**24))

    def unpacked(*_):
        raise AssertionError("the file was unpacked")

    monkeypatch.setattr(zipfile.ZipFile, "open", unpacked)
    assert path.stat().st_size < 2**17
    assert refusal(path) == (
        f"{path} would take 67,108,864 bytes when it is unpacked, more than 10 times its size; files of weights do "
        "not. Download it again from a source that you trust."
    )


def test_a_tensor_that_repeats_a_few_numbers_without_end_is_refused(tmp_path):
    torch.save({"a": torch.ones(1, dtype=torch.float16).expand(2**15, 2**15)}, tmp_path / "a.pth")
    assert "would take 4,294,967,296 bytes when it is unpacked" in refusal(tmp_path / "a.pth")


def test_weights_that_are_shared_or_shorter_than_float32_are_no_bomb(tmp_path):
    weight = torch.ones(2**22, dtype=torch.float8_e4m3fn)
    torch.save({"a": weight, "b": weight}, tmp_path / "a.pth")
    assert {len(array) for array in torch_weights.read(tmp_path / "a.pth").values()} == {2**22}
