"""Describes what can be pruned in a network, exports saved networks, compares runs, and lists fields.

    python -m ddnp_jax describe resnet50 --input_shape=224,224,3 --p=0.5
    python -m ddnp_jax export runs/mine --format=onnx --output=network.onnx
    python -m ddnp_jax compare runs/one runs/two/report.json
    python -m ddnp_jax fields

`--help` after a command lists its arguments.
"""

import argparse
import ast
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from ddnp_jax import export, field_tables, files, torch_weights
from ddnp_jax.cost import flops
from ddnp_jax.cost.budget import Budget, flops_cost
from ddnp_jax.named import CLASSES, network_of
from ddnp_jax.networks import as_network
from ddnp_jax.saved import load_pruned
from ddnp_jax.topology import trace

PYTORCH = "pytorch"
COMPARED = 32  # images with which an exported network is compared
_INTERRUPTED = 130  # exit code of an interrupted shell command
# What the messages of `load_pruned` advise in Python, and what to do here instead.
_ADVICE = {
    "load_pruned(..., model=)": "--network=MODULE:NAME",
    "import its module first, or ": "",
    "pass the network with the saved value": "give the saved value as --attribute=NAME=VALUE",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
      arguments: Arguments of the command line, without the program's name; None takes those of the process.

    Raises:
      SystemExit: With a message if an argument is invalid or something is missing; with 130 on Ctrl-C.
    """
    try:
        given = _parser().parse_args(arguments)
        given.command(given)
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None


def describe(given: argparse.Namespace) -> None:
    """Shows what can be removed from a network, what stays unpruned and why, and what a budget leaves of it."""
    model, variables = network_of(given.network, dict(given.attribute))
    try:
        topology = trace(model, given.input_shape, variables=variables, residual=given.residual)
    except ValueError as error:
        shape = ",".join(map(str, given.input_shape))
        raise ValueError(f"{given.network} with --input_shape={shape}: {error}") from error
    print(topology.describe())
    whole = Budget(topology, 1.0, flops_cost(given.convention))
    if topology.gates:
        total, unit = flops.total(topology, None, given.convention), whole.counted.unit
        print(f"  {whole.total:,} of {total:,} are {unit}; the smallest p that can be met is {whole.least_p:.4f}.")
    if given.p is not None:
        budget = dataclasses.replace(whole, p=given.p)
        budget.check()
        uniform = budget.fit(np.ones(len(topology.gates)))
        print(f"\np = {given.p:g} can be met, for example by uniform widths:\n{budget.describe(uniform)}")


def export_saved(given: argparse.Namespace) -> None:
    """Exports a network saved by a run or by `save_pruned`."""
    folder = given.folder / "pruned" if (given.folder / "pruned").is_dir() else given.folder
    model, variables = _loaded(folder, given)
    wanted = "folder" if given.format == PYTORCH else "file"
    if given.output.exists() and given.output.is_dir() != (wanted == "folder"):
        raise ValueError(
            f"--output={given.output} is not a {wanted}, which --format={given.format} writes; give another path."
        )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    serving = _serving(folder / export.SERVING_FILE)
    shape = given.input_shape or (serving["input_shape"] if serving else None)
    if given.format == PYTORCH:
        torch_weights.save(given.output, model, variables, shape)
        print(f"{given.output}: {torch_weights.WEIGHTS_FILE}, {torch_weights.LAYERS_FILE}")
        return
    export.check_installed(given.format)
    images = _images(given, shape, serving)
    network = as_network(model)
    with network.calling(images):
        jax.eval_shape(network.evaluate, network.variables(variables), images)
    write = functools.partial(getattr(export, given.format), given.output, model, variables, images[:COMPARED])
    found = write(*((images,) if given.format == "onnx_int8" else ()), serving=serving)
    taken = "pixels" if serving else "images as the network does,"
    print(
        f"{given.output}: {given.output.stat().st_size:,} bytes; takes {taken} "
        f"(N, {', '.join(map(str, images.shape[1:]))}). Over {len(images[:COMPARED])} "
        f"{'images' if given.images else 'random images'} the largest difference to the network is "
        f"{found.max_difference:.1e}, and {100 * found.argmax_agreement:.1f} % of the predictions are the same."
    )


def _loaded(folder: Path, given: argparse.Namespace) -> tuple[Any, Any]:
    model, variables = network_of(given.network, dict(given.attribute)) if given.network else (None, None)
    try:
        return load_pruned(folder, model, variables)
    except ValueError as error:
        message = str(error)
        for in_python, here in _ADVICE.items():
            message = message.replace(in_python, here)
        raise ValueError(message) from error


def _serving(path: Path) -> export.Serving | None:
    """The preprocessing of images, if a run has saved it."""
    if not path.exists():
        return None
    found = files.read_json(path)
    if not isinstance(found, dict) or not {"input_shape", "scale", "mean", "std"} <= found.keys():
        raise ValueError(f"{path} does not contain the shape and normalization of images; restore a good copy.")
    return found


def _images(given: argparse.Namespace, shape: Sequence[int] | None, serving: export.Serving | None) -> np.ndarray:
    """Those of --images, or random ones for the comparison."""
    if given.images is not None:
        return _read_images(given.images)
    if given.format == "onnx_int8":
        raise ValueError(
            "--format=onnx_int8 needs --images=FILE.npy, a few hundred images that are not from the test set."
        )
    if shape is None:
        raise ValueError(
            f"{given.folder} has no {export.SERVING_FILE}; give --input_shape, as in 224,224,3, or --images=FILE.npy."
        )
    rng = np.random.default_rng(0)
    drawn = rng.random((COMPARED, *shape)) / serving["scale"] if serving else rng.normal(size=(COMPARED, *shape))
    return drawn.astype(np.float32)


def _read_images(path: Path) -> np.ndarray:
    try:
        images = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"--images={path} cannot be read ({error}); give a .npy file of images.") from error
    if not isinstance(images, np.ndarray) or images.ndim < 2 or not len(images) or images.dtype.kind not in "fiu":
        raise ValueError(f"--images={path} contains no images; give one numeric array (N, H, W, C) in a .npy file.")
    return images.astype(np.float32)


def compare(given: argparse.Namespace) -> None:
    """Prints one table of several runs, and writes the page of --html."""
    from ddnp_jax.pipeline import report

    unfinished = [path for path in given.runs if path.is_dir() and not (path / "report.json").exists()]
    ended = [path for path in given.runs if path not in unfinished] or given.runs
    if len(ended) < len(given.runs):
        print(f"left out, without a report.json: {', '.join(map(str, unfinished))}", file=sys.stderr)
    reports = [report.read(path / "report.json" if path.is_dir() else path) for path in ended]
    print(report.compare(reports))
    if given.html is not None:
        files.write_text(given.html, report.comparison_html(reports))


def fields(given: argparse.Namespace) -> None:
    """Prints every field of a configuration, with its default and meaning, as Markdown."""
    del given
    print(field_tables.page(), end="")


class _Parser(argparse.ArgumentParser):
    """Reports errors in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        raise SystemExit(f"error: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m ddnp_jax", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        added.set_defaults(command=run)
        return added

    of = command("describe", describe)
    network = f"a model of this library (of {CLASSES} classes), or MODULE:NAME: a network, its class, or a function"
    of.add_argument("network", metavar="NETWORK", help=f"{network} that returns it, or (network, variables)")
    of.add_argument("--input_shape", type=_shape, required=True, metavar="H,W,C", help="shape of one image")
    of.add_argument("--p", type=float, help="fraction of the prunable FLOPs to keep; shows uniform widths that meet it")
    of.add_argument("--residual", action="store_true", help="also allow pruning of residual streams")
    of.add_argument("--convention", choices=flops.CONVENTIONS, default="macs", help="how FLOPs are counted for p")
    _add_attribute(of)
    to = command("export", export_saved)
    to.add_argument("folder", type=Path, metavar="FOLDER", help="a run's folder, or one that save_pruned wrote")
    to.add_argument("--format", choices=[*export.FILES, PYTORCH], required=True)
    to.add_argument("--output", type=Path, required=True, metavar="PATH", help="file to write; for pytorch, a folder")
    to.add_argument(
        "--images", type=Path, metavar="FILE.npy", help="images (N, H, W, C) for the comparison and for calibration"
    )
    to.add_argument(
        "--input_shape",
        type=_shape,
        metavar="H,W,C",
        help=f"shape of one image, if there is no {export.SERVING_FILE} and no --images",
    )
    to.add_argument("--network", help="the unpruned network, if it cannot be rebuilt from the folder; as in describe")
    _add_attribute(to)
    over = command("compare", compare)
    over.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or its report.json")
    over.add_argument("--html", type=Path, metavar="PATH", help="file for an HTML page with the table and plots")
    command("fields", fields)
    return parser


def _add_attribute(parser: argparse.ArgumentParser) -> None:
    text = "constructor argument of the network, for example num_classes=10; may be repeated"
    parser.add_argument("--attribute", type=_attribute, action="append", default=[], metavar="NAME=VALUE", help=text)


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split(",") if size.strip().isdecimal())
    if len(shape) != text.count(",") + 1 or not all(shape):
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers from 1, joined by commas, as in 224,224,3.")
    return shape


def _attribute(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, as in num_classes=10.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    main()
