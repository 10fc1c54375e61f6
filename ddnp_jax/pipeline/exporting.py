"""The pruned network in the formats of `config.export`, in the workdir's `export/`: written, verified and timed."""

import functools
import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddnp_jax import data, export, parallel
from ddnp_jax.config import Config
from ddnp_jax.cost import timing
from ddnp_jax.cost.network_times import ONNX
from ddnp_jax.fields import listed
from ddnp_jax.networks import Network, picked

if TYPE_CHECKING:
    from ddnp_jax.pipeline.job import Run

_Call = Callable[[np.ndarray], Any]
_Unpruned = Callable[[], _Call]  # makes it when it is first asked for

FOLDER = "export"
CALIBRATION_IMAGES = 256  # of the search, by which a network of 8 bits gets its scales
RUNTIMES = {"onnx": "ONNX Runtime (CPU)", "onnx_int8": "ONNX Runtime (CPU), int8"}  # that are timed, by format


def write(job: "Run", base: Any, small: Network, tuned: Any) -> None:
    """Writes and measures what is not there yet, or not any more.

    Args:
      job: The run.
      base: Variables of the unpruned network, with which speed is compared.
      small: The pruned network.
      tuned: Its variables.
    """
    unpruned = functools.cache(lambda: _unpruned(job, base))  # converted once for all formats, if one is timed
    for form in listed(job.config.export):
        job.guard.check("stopped before an export; the same command resumes it.")
        job.results.measured(
            f"export_{form}",
            job.made_from(base, tuned),
            functools.partial(_on_first_process, _write, job, form, small, tuned),
            functools.partial(_is_there, job.workdir),
        )
        if form in RUNTIMES:
            job.results.measured(
                f"latencies_in_{form}",
                job.timed_from(ONNX, base, tuned),
                functools.partial(_on_first_process, _latencies, job, form, unpruned),
            )


def timed(config: Config) -> list[str]:
    """The formats in whose runtime both networks are timed: those that are exported, and that of the budget."""
    wanted = {*listed(config.export), *(("onnx",) if config.budget.runtime_of_times == ONNX else ())}
    return [form for form in RUNTIMES if form in wanted]


def _on_first_process(measure: Callable[..., Any], *args: Any) -> Any:
    """What the first process has found, which alone writes and measures; None in the others."""
    found: list[Any] = []
    parallel.on_first_process(lambda: found.append(measure(*args)))
    return found[0] if found else None


def _write(job: "Run", form: str, small: Network, tuned: Any) -> dict[str, Any]:
    folder = job.workdir / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / export.FILES[form][0]
    pixels, _ = job.dataset.test.served(np.arange(min(job.local_batch, len(job.dataset.test))))
    serving = job.dataset.serving()
    network = _logits(job, small)
    if form == "onnx_int8":
        check = export.onnx_int8(path, network, tuned, pixels, _calibration(job), serving=serving)
    else:
        check = getattr(export, form)(path, network, tuned, pixels, serving=serving)
    return {
        "files": {f"{FOLDER}/{name}": _facts(folder / name) for name in export.FILES[form]},
        "compared_images": len(pixels),
        **check._asdict(),
        "top1": _top1(job, path) if form == "onnx_int8" else None,
    }


def _logits(job: "Run", network: Network) -> Callable[[Any, Any], Any]:
    """The network as a function of its variables and images; of several outputs the one that counts."""

    def logits(variables: Any, images: Any) -> Any:
        return picked(network.evaluate(variables, images), job.outputs, network.name)

    logits.__name__ = network.name
    return logits


def _calibration(job: "Run") -> np.ndarray:
    """Pixels of search images, taken evenly: a folder holds class after class."""
    images = job.stage_images("search")
    chosen = np.linspace(0, len(images) - 1, min(CALIBRATION_IMAGES, len(images))).astype(int)
    return job.dataset.train.served(images[chosen])[0]


def _top1(job: "Run", path: Path) -> float:
    """Accuracy of an ONNX file in percent, over all test images."""
    compute, test = export.read_onnx(path), job.dataset.test
    batches = data.evaluation_batches(np.arange(len(test)), job.local_batch)
    correct = 0
    with data.read_ahead(batches, lambda b: (*test.served(b[0].image), b[1]), test.threads, 1) as chunks:
        for (pixels,), (labels,), (is_real,) in chunks:
            (logits,) = compute(pixels)
            correct += int(np.sum((logits.argmax(-1) == labels)[is_real]))
    return 100 * correct / len(test)


def _unpruned(job: "Run", base: Any) -> _Call:
    """The unpruned network in float32, in ONNX Runtime."""
    pixels, _ = job.dataset.test.served(np.arange(1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "base.onnx")
        export.onnx(path, _logits(job, job.network), base, pixels, serving=job.dataset.serving())
        return export.read_onnx(path)


def _latencies(job: "Run", form: str, unpruned: _Unpruned) -> list[dict[str, Any]]:
    """Times of the unpruned network and of an ONNX file, interleaved."""
    calls = [unpruned(), export.read_onnx(job.workdir / FOLDER / export.FILES[form][0])]
    found = []
    for batch in sorted({1, job.local_batch}):
        images = np.zeros((batch, *job.dataset.image_shape), np.float32)
        before, after = timing.in_turn([functools.partial(call, images) for call in calls])
        found.append({"runtime": RUNTIMES[form], "batch": batch, "before": before, "after": after})
    return found


def _facts(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _is_there(workdir: Path, found: Mapping[str, Any]) -> bool:
    """Whether every file of an export is there, as it was written."""
    return all((workdir / path).is_file() and _facts(workdir / path) == facts for path, facts in found["files"].items())
