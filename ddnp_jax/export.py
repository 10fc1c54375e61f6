"""Exports networks to StableHLO and ONNX; every export is read back and compared before it is written.

    export.onnx("network.onnx", pruned.model, pruned.variables, images)
    export.onnx_int8("network_int8.onnx", pruned.model, pruned.variables, images, calibration)
    export.stablehlo("network.stablehlo", pruned.model, pruned.variables, images)

The batch size is dynamic. With `serving`, which `Dataset.serving` returns and a run saves as `pruned/serving.json`, the
exported network takes pixels and normalizes them itself, and its metadata describe its input and the meaning of its
outputs. A run exports with `--config.export`. For PyTorch: `ddnp_jax.torch_weights.save`.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from ddnp_jax import files, jax2onnx_repairs
from ddnp_jax.compact import Verification, check_finite, compare_outputs
from ddnp_jax.extras import needed_by
from ddnp_jax.interpreter import FullPrecision, Portable, evaluate
from ddnp_jax.networks import Network, as_network, first_line

# Files that a run writes, by format; StableHLO has its metadata in a separate file.
FILES = {
    "onnx": ("network.onnx",),
    "onnx_int8": ("network_int8.onnx",),
    "stablehlo": ("network.stablehlo", "network.stablehlo.json"),
}
SERVING_FILE = "serving.json"  # beside a network that a run saved: the preprocessing of its images
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # of the largest output, as in `verify`
CALIBRATION_BATCH = 32  # images that are in memory at once, with all their activations
_METADATA = "ddnp_jax"  # key of an ONNX file's metadata
_PACKAGES = {"onnx": ("jax2onnx", "onnx", "onnxruntime"), "stablehlo": ("flatbuffers",)}  # by extra

Serving = Mapping[str, Any]


def check_installed(form: str) -> None:
    """Checks that the packages that a format needs are installed, without importing them.

    Args:
      form: One of `FILES`.

    Raises:
      ModuleNotFoundError: A package is missing; the message gives the command that installs it.
    """
    extra = form.partition("_")[0]
    with needed_by(f"export={form!r}", extra):
        for package in _PACKAGES[extra]:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(name=package)


def stablehlo(
    path: str | Path,
    model: Any,
    variables: Any,
    images: Any,
    *,
    serving: Serving | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> Verification:
    """Exports a network as a StableHLO artifact, which `jax.export.deserialize` reads without this library or flax.

    JAX guarantees compatibility of artifacts only for a limited time; use `save_pruned` for archiving. The metadata are
    written to `PATH.json`.

    Args:
      path: Path of the file.
      model: The network, of any kind that `trace` takes; evaluation mode is exported.
      variables: Variables of the network; None for an nnx module, which holds them.
      images: Images (N, H, W, C) for the comparison: as the network takes them, or pixels if `serving` is given.
      serving: Preprocessing to include, as returned by `Dataset.serving`; None for none.
      platforms: Target platforms.

    Returns:
      How close the outputs of the exported network are to those of the original.

    Raises:
      ModuleNotFoundError: flatbuffers is missing.
      ValueError: A variable is not finite, or the outputs differ by more than 1e-4 of the largest.
    """
    with needed_by("export to StableHLO", "stablehlo"):
        import flatbuffers  # noqa: F401  # which jax.export writes with
    served = _Served(model, variables, images, serving)
    batch, *_ = jax.export.symbolic_shape("batch")
    image = jax.ShapeDtypeStruct((batch, *served.images.shape[1:]), jnp.float32)
    artifact = jax.export.export(jax.jit(served.apply), platforms=list(platforms))(image).serialize()
    read = jax.export.deserialize(bytearray(artifact))
    found = served.compared(read.call)
    files.write_json(f"{path}.json", served.metadata())
    files.write_bytes(path, bytes(artifact))
    return found


def onnx(path: str | Path, model: Any, variables: Any, images: Any, *, serving: Serving | None = None) -> Verification:
    """Exports a network as an ONNX file, and compares it in ONNX Runtime on the CPU.

    Inputs stay (N, H, W, C). The file computes in float32, even if the network specifies a lower precision. The
    metadata are stored in the file, as JSON.

    Args:
      path: Path of the file.
      model: As for `stablehlo`.
      variables: As for `stablehlo`.
      images: As for `stablehlo`.
      serving: As for `stablehlo`.

    Returns:
      How close the outputs of the exported network are to those of the original.

    Raises:
      ModuleNotFoundError: jax2onnx, onnx or onnxruntime is missing.
      ValueError: jax2onnx or ONNX Runtime does not support the network, a variable is not finite, or the outputs differ
        by more than 1e-4 of the largest.
    """
    served = _InFloat32(model, variables, images, serving)
    content = _converted(served)
    found = served.compared(_computed(content))
    files.write_bytes(path, content)
    return found


def onnx_int8(
    path: str | Path,
    model: Any,
    variables: Any,
    images: Any,
    calibration: Any,
    *,
    serving: Serving | None = None,
) -> Verification:
    """Exports a network as an ONNX file in 8 bits, using ONNX Runtime's static quantization.

    Weights get a scale per channel, activations one per tensor, from their minimum and maximum over the calibration
    images. The difference of the outputs is not limited; evaluate the accuracy of the exported network.

    Args:
      path: Path of the file.
      model: As for `stablehlo`.
      variables: As for `stablehlo`.
      images: As for `stablehlo`.
      calibration: A few hundred images (N, H, W, C) like `images`, not taken from the test set.
      serving: As for `stablehlo`.

    Returns:
      How close the outputs of the exported network are to those of the original.

    Raises:
      ModuleNotFoundError: jax2onnx, onnx or onnxruntime is missing.
      ValueError: There are no calibration images, jax2onnx or ONNX Runtime does not support the network, or a
        variable or an output is not finite.
    """
    with needed_by("export to ONNX", "onnx"):
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference
    if not len(calibration):
        raise ValueError("calibration contains no images; give a few hundred that are not from the test set.")
    served = _InFloat32(model, variables, images, serving)
    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, small = (Path(folder, name) for name in ("whole.onnx", "prepared.onnx", "small.onnx"))
        whole.write_bytes(_converted(served))
        with _quiet():
            # Puts batch normalization into the convolutions, which are quantized then with the scale that they have.
            shape_inference.quant_pre_process(whole, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(prepared, small, _Calibration(prepared, calibration), per_channel=True)
        content = small.read_bytes()
    found = served.compared(_computed(content), math.inf)
    files.write_bytes(path, content)
    return found


def in_onnx_runtime(function: Callable[[jax.Array], Any], shape: Sequence[int]) -> Callable[[Any], list[np.ndarray]]:
    """Converts a function of one float32 array to one computed by ONNX Runtime on the CPU, in float32 as by `onnx`.

    Args:
      function: The function, whose constants become part of it.
      shape: Shape of the array.

    Raises:
      ModuleNotFoundError: jax2onnx, onnx or onnxruntime is missing.
      ValueError: jax2onnx cannot convert the function.
    """
    wide = functools.partial(evaluate, function, Portable())
    return _computed(_graph(wide, tuple(shape), "the function").SerializeToString())


def read_onnx(path: str | Path) -> Callable[[Any], list[np.ndarray]]:
    """Loads an ONNX file as a function from images (N, H, W, C) to outputs, computed by ONNX Runtime on the CPU.

    Raises:
      ModuleNotFoundError: onnxruntime is missing.
    """
    return _computed(Path(path).read_bytes())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's errors alone; it warns of every padding whose size depends on that of the image."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # what it starts with


def _computed(content: bytes) -> Callable[[Any], list[np.ndarray]]:
    with needed_by("ONNX", "onnx"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    # Otherwise its threads keep spinning after a run and take cores from what runs next: sessions that are timed in
    # turn took up to 2.4 times as long as alone.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with _quiet():
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: np.asarray(images, np.float32)})


def _converted(served: "_Served") -> bytes:
    """The content of an ONNX file."""
    proto = _graph(served.apply, ("batch", *served.images.shape[1:]), served.network.name)
    proto.metadata_props.add(key=_METADATA, value=json.dumps(served.metadata()))
    content = proto.SerializeToString()
    try:
        _computed(content)(served.images[:1])
    except Exception as error:  # whatever ONNX Runtime does not know
        raise _not_onnx(served.network.name, error) from error
    return content


def _graph(function: Callable[[jax.Array], Any], shape: tuple[int | str, ...], name: str) -> Any:
    # It logs a traceback for every optional package that is missing, among them some that no network here needs.
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)
    with needed_by("export to ONNX", "onnx"):
        import jax2onnx

    def apply(images: jax.Array) -> Any:
        with jax2onnx_repairs.flax_pools():
            return function(images)

    try:
        # Its convolutions need rank promotion.
        with jax2onnx_repairs.sound_passes(), jax2onnx_repairs.kept_cumsum(), jax.numpy_rank_promotion("allow"):
            return jax2onnx.to_onnx(apply, [shape], model_name="ddnp_jax")
    except Exception as error:  # whatever jax2onnx does not know
        raise _not_onnx(name, error) from error


def _not_onnx(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"{name} cannot be written as ONNX ({first_line(error)}); export it to StableHLO, which takes every network."
    )


class _Calibration:
    """Gives ONNX Runtime's quantization images batch by batch."""

    def __init__(self, path: Path, images: Any) -> None:
        import onnx

        self._name = onnx.load(path).graph.input[0].name
        self._batches: Iterator[Any] = iter(
            np.array_split(np.asarray(images, np.float32), math.ceil(len(images) / CALIBRATION_BATCH))
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


class _Served:
    """A network, what is done to its images first, and images to compare with."""

    def __init__(self, model: Any, variables: Any, images: Any, serving: Serving | None) -> None:
        self.network: Network = as_network(model)
        self.variables = self.network.variables(variables)
        self.images = np.asarray(images, np.float32)
        self.serving = serving
        check_finite(self.variables, self.network.name)

    def apply(self, images: jax.Array) -> Any:
        """The outputs of images, or of pixels where they are normalized here."""
        if self.serving is not None:
            mean, std = (jnp.asarray(self.serving[name], jnp.float32).reshape(1, 1, 1, -1) for name in ("mean", "std"))
            images = (self.serving["scale"] * images - mean) / std
        return self.network.evaluate(self.variables, images)

    def metadata(self) -> dict[str, Any]:
        """What the file needs to be used."""
        return {"input_shape": list(self.images.shape[1:]), "normalizes": self.serving is not None} | dict(
            self.serving or {}
        )

    def compared(self, read: Callable[[Any], Any], tolerance: float = TOLERANCE) -> Verification:
        """The outputs of what was read back against the network's."""
        whole = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(self.apply)(self.images))]
        found = [np.asarray(leaf) for leaf in jax.tree.leaves(read(self.images))]
        return compare_outputs([*zip(whole, found, strict=True)], tolerance, "the exported network", "the network")


class _InFloat32(_Served):
    """The same in float32: ONNX Runtime knows few operations in shorter types, and accelerators shorten products."""

    def apply(self, images: jax.Array) -> Any:
        """The outputs of images, or of pixels where they are normalized here."""
        return evaluate(super().apply, FullPrecision(), images)
