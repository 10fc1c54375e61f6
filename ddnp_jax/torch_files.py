"""Reads PyTorch's checkpoint files as float32 arrays by name; only tensors are ever unpickled."""

import math
import os
import sys
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

# Keys under which training scripts store the state dict in a checkpoint; the first one present is used.
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "model_ema")
# Prefixes that `torch.compile`, `DataParallel` and detectors add to every name.
PREFIXES = ("_orig_mod.", "module.", "backbone.")
COUNTERS = ("num_batches_tracked", "n_averaged")  # counters of batch norm and of averaged models, not weights

# Limits of the unpacked size: LARGEST_RATIO times the size of the file, plus ALWAYS_ALLOWED bytes. `torch.save` does
# not compress, and weights of one byte become four bytes, so a file that exceeds the limit is malicious.
LARGEST_RATIO, ALWAYS_ALLOWED = 10, 2**24


class _Refused(ValueError):
    """Raised for a file that must not be unpacked."""


def read(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any], wanted: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Reads a PyTorch checkpoint without converting its layout.

    The key under which the weights are found, and prefixes that are removed, are reported on stderr.

    Args:
      path_or_state_dict: A `.safetensors` file or a file written by `torch.save`, which need the extra `torch`, or its
        contents: a state dict of tensors or numpy arrays, directly or under one of the keys in `CONTAINERS`.
      wanted: Names of the model's tensors, if known. A prefix with which one of them begins is kept.

    Returns:
      Float32 arrays with PyTorch's names, without the `PREFIXES` and without counters ("num_batches_tracked").

    Raises:
      FileNotFoundError: The file does not exist.
      ImportError: The library for reading the file is not installed.
      ValueError: The file is damaged, unpacks to far more than its size, or contains no state dict; or a tensor is not
        floating-point, not finite, or a duplicate.
    """
    given, source = path_or_state_dict, source_of(path_or_state_dict)
    if isinstance(given, Mapping):
        return _state_dict(given, source, wanted, math.inf)
    return _state_dict(_read(Path(given)), source, wanted, _allowed(Path(given)))


def source_of(path_or_state_dict: Any) -> str:
    """Name of a checkpoint in messages."""
    return "the state dict" if isinstance(path_or_state_dict, Mapping) else str(path_or_state_dict)


def check(path: str | os.PathLike) -> None:
    """Checks that a file exists and can be read; raises the same errors as `read`."""
    _read(Path(path))


def _read(path: Path) -> Any:
    """Returns the contents of a file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no PyTorch checkpoint {path}; give the path of an existing file.")
    tensors_only = path.suffix == ".safetensors"
    try:
        if tensors_only:
            from safetensors.numpy import load_file
        else:
            import torch
    except ImportError as error:
        needed = "safetensors" if tensors_only else "PyTorch"
        raise ImportError(f"reading {path} needs {needed}; run `pip install ddnp_jax[torch]`.") from error
    try:
        if tensors_only:
            return load_file(path)
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _Refused:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error) or type(error).__name__).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{path} cannot be read: it is damaged, or holds more than tensors ({reason}); "
            "download it again, or save only its state dict with torch.save."
        ) from error


def _allowed(path: Path) -> int:
    """Maximum number of bytes to which a file may unpack."""
    return LARGEST_RATIO * path.stat().st_size + ALWAYS_ALLOWED


def _check_archive(path: Path) -> None:
    """Checks the sizes before anything is unpacked, and the checksums, which PyTorch does not check.

    The checksums are computed in pieces, and reading ends at the size in the archive's directory.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _allowed(path):
            raise _Refused(_too_large(str(path), unpacked))
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _too_large(source: str, unpacked: int) -> str:
    return (
        f"{source} would take {unpacked:,} bytes when it is unpacked, more than {LARGEST_RATIO} times its size; files "
        "of weights do not. Download it again from a source that you trust."
    )


def _numpy_scalars() -> list[Any]:
    """Globals for unpickling numpy scalars, such as an accuracy beside the weights; they are safe to allow."""
    scalar = np.float64(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # in numpy 1 and numpy 2
    numbers = (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)
    return [*((scalar, f"{module}.scalar") for module in modules), np.dtype, *(type(np.dtype(n)) for n in numbers)]


def _state_dict(checkpoint: Any, source: str, wanted: Collection[str], allowed: float) -> dict[str, np.ndarray]:
    """Returns the float32 arrays of a checkpoint by name, without containers, prefixes and counters."""
    state = _unwrapped(checkpoint, source)
    tensors = {name: value for name, value in state.items() if name.rpartition(".")[2] not in COUNTERS}
    names = _short_names(tensors, wanted, source)
    needed = sum(4 * math.prod(value.shape) for value in tensors.values())
    if needed > allowed:  # a tensor can be larger than its stored numbers, which it repeats
        raise ValueError(_too_large(source, needed))
    return {names[name]: _numpy(value, f"{source} holds {name!r}") for name, value in tensors.items()}


def _unwrapped(checkpoint: Any, source: str) -> Mapping[str, Any]:
    """Returns the state dict in a checkpoint; all of its values are tensors."""
    advice = f"give a state dict, directly or under one of the keys {', '.join(CONTAINERS)}."
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{source} holds a {type(checkpoint).__name__}; {advice}")
    state = checkpoint
    while keys := [key for key in CONTAINERS if isinstance(state.get(key), Mapping)]:
        others = "".join(f", not those under {key!r}" for key in keys[1:])
        _say(f"{source}: the weights under {keys[0]!r} are used{others}.")
        state = state[keys[0]]
    for name, value in state.items():
        if not (isinstance(name, str) and hasattr(value, "shape")):
            raise ValueError(f"{source} holds {name!r}, which is not a tensor; {advice}")
    return state


def _short_names(names: Iterable[str], wanted: Collection[str], source: str) -> dict[str, str]:
    """Returns the names without prefixes, by the names with prefixes."""
    short = {name: name for name in names}
    removable = [prefix for prefix in PREFIXES if not any(name.startswith(prefix) for name in wanted)]
    while prefix := next((p for p in removable if any(name.startswith(p) for name in short.values())), None):
        _say(f"{source}: the prefix {prefix!r} is removed from the names.")
        short = {name: own.removeprefix(prefix) for name, own in short.items()}
    first: dict[str, str] = {}
    for name, own in short.items():
        if first.setdefault(own, name) != name:
            raise ValueError(
                f"{source} holds both {first[own]!r} and {name!r}, which are the same name without prefixes; give a "
                "state dict with only one of them."
            )
    return short


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _numpy(value: Any, what: str) -> np.ndarray:
    """Converts a tensor or an array to a float32 array; numpy itself supports neither bfloat16 nor devices.

    Args:
      value: The tensor or array.
      what: Beginning of the error message.

    Raises:
      ValueError: The values are not floating-point numbers, or some of them are not finite.
    """
    is_tensor = hasattr(value, "detach")
    if not (value.is_floating_point() if is_tensor else jnp.issubdtype(np.asarray(value).dtype, jnp.floating)):
        raise ValueError(
            f"{what} of type {value.dtype}, and weights must be floating-point numbers; give a state dict without "
            "quantization and without other tensors."
        )
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(value.detach().float().cpu() if is_tensor else value, np.float32)
    except (TypeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{what}, which is sparse or without data; give a dense tensor.") from error
    if bad := array.size - int(np.isfinite(array).sum()):
        raise ValueError(f"{what} with {bad} values that are NaN or infinite in float32; give weights that are finite.")
    return array
