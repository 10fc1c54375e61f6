"""Speed and memory of the steps compared with PyTorch, and of loading photographs compared with plain loops.

    python -m experiments.benchmark [--network=resnet56] [--only=search,training,evaluation,data] [--batch_size=128] \
        [--precision=float32] [--rounds=10] [--data_dir=DIR] [--json=PATH]

The steps are those of one of `NETWORKS` on synthetic images. `experiments.loading` defines what is loaded; its seconds
are CPU time, summed over all threads of the process.

Everything measured runs in a separate process (`experiments.interleaved`), started with the flags that
`experiments.launch` gives a run. A round is one step on CPU and ten elsewhere, where they are one dispatch. Images/s
come from the median round, ratios are medians of each round's ratio, and peak memory is the maximum resident set of the
process (interpreter, libraries and compiler included), on a GPU the most bytes in use on the device.

Ours is the run's own code: the search step with learners, soft top-k, optimizer and all losses, the training step with
augmentation, the evaluation with its counting. PyTorch's (eager, channels_last, for bfloat16 under `torch.autocast`) is
the backbone's part, with the normalized batch already on the device: forward and backward to the masks of the frozen
network; forward, backward and SGD with momentum; forward. It is left out where PyTorch is not installed. On a machine
with several GPUs set CUDA_VISIBLE_DEVICES to one, because PyTorch uses one. Runs on GPUs by design, but was measured on
CPU only.
"""

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments import launch, loading
from experiments.interleaved import Candidate, Measurement, interleave, ratio, resident_bytes

if TYPE_CHECKING:
    from ddnp_jax.config import Config

# JAX and PyTorch are imported in the measured processes only, as `experiments.interleaved` says.


class Network(NamedTuple):
    """What the steps are measured on.

    Attributes:
      experiment: Module of `configs`.
      image_shape: Shape of an image.
      batch_size: Images per step, unless the command line says so.
      classes: Classes of the images.
      attributes: Of the network in PyTorch.
    """

    experiment: str
    image_shape: tuple[int, int, int]
    batch_size: int
    classes: int = 1000
    attributes: Mapping[str, Any] = {}


NETWORKS = {
    "resnet56": Network("cifar10_r56", (32, 32, 3), 128, 10, {"shortcut": "avgpool"}),
    "mobilenet_v2": Network("imagenet_mbv2", (224, 224, 3), 16),
    "resnet50": Network("imagenet_r50", (224, 224, 3), 16),
}
PRECISIONS = ("float32", "bfloat16")
# What is measured: stage -> name of the row -> argument of the configuration
OURS = {
    "search": {"search step, generators": "", "search step, scalars": "scalar"},
    "training": {"training step": ""},
    "evaluation": {"evaluation": ""},
}
DATA = "data"
STAGES = (*OURS, DATA)
BATCH_SIZE = {"search": "search.batch_size", "training": "base.batch_size", "evaluation": "eval_batch_size"}
PYTORCH = "PyTorch"


def steps_per_turn(platform: str) -> int:
    """One on CPU, where every step is a dispatch of its own (see `training.loop`)."""
    return 1 if platform == "cpu" else 10


def ours(stage: str, argument: str, network: Network, precision: str = "float32") -> Candidate:
    """Our candidate of a stage, as `pipeline.run` would run it.

    Args:
      stage: A key of `OURS`.
      argument: Argument of the configuration.
      network: What it is measured on; its images are shared by all devices.
      precision: One of `PRECISIONS`.
    """
    config = importlib.import_module(f"configs.{network.experiment}").get_config(argument)
    config.update_from_flattened_dict({BATCH_SIZE[stage]: network.batch_size, "precision": precision})
    launch.configure(config)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU
    import jax

    from ddnp_jax import parallel
    from ddnp_jax.config import typed

    parallel.check_devices()
    parallel.check_batch(network.batch_size, "--batch_size")
    device = jax.local_devices()[0]
    steps = steps_per_turn(device.platform)

    def peak_bytes() -> int:
        return resident_bytes() if device.platform == "cpu" else device.memory_stats()["peak_bytes_in_use"]

    about = {
        "platform": device.platform,
        "device": f"{jax.device_count()} x {device.device_kind}",
        "version": f"JAX {jax.__version__}",
    }
    return Candidate(_our_round(stage, typed(config), network, steps), steps, peak_bytes, about)


def _our_round(stage: str, config: "Config", network: Network, steps: int) -> Callable[[], Any]:
    import jax

    from ddnp_jax import data, models, parallel, training
    from ddnp_jax.networks import as_network
    from ddnp_jax.training.evaluation import evaluator

    rng = np.random.default_rng(0)
    batch_size, classes = network.batch_size, network.classes
    count = steps * batch_size
    pixels = rng.integers(0, 256, (count, *network.image_shape), np.uint8)
    preprocessing = data.Preprocessing.of(data.complete(config.data))
    images = data.InMemory(pixels, rng.integers(0, classes, count, np.int32), preprocessing)
    model = models.create(config.model.name, classes, **{**config.model.attributes, "dtype": config.dtype})
    variables = jax.jit(model.init)(jax.random.key(config.seed), np.zeros((1, *network.image_shape), np.float32))
    if stage == "evaluation":
        mode = config.parallel.mode
        evaluate = evaluator(as_network(model).evaluate, images, batch_size, mode)
        return lambda: evaluate(variables, np.arange(count))

    if stage == "search":
        step, state = _search(config, model, variables, network.image_shape)
        constants, augment = variables, False  # NPPM's would count as its step's
    else:
        step, state = _training(config, model, variables)
        constants, augment = None, config.base.augment
    devices = parallel.OVER_DEVICES
    if not config.parallel.sync_batch_norm:
        devices = devices._replace(batch_axis=None)
    chunk = training.chunk_of(step, images, config.seed, augment, devices)
    chunk = parallel.data_parallel(chunk, mode=config.parallel.mode)
    constants = {"images": images.on_devices, "step": parallel.replicate(constants)}
    state = parallel.replicate(state)
    indices = np.arange(count, dtype=np.int32).reshape(steps, batch_size)

    def run_round() -> None:
        nonlocal state
        state, metrics = chunk(state, constants, parallel.shard_batches(indices))
        jax.block_until_ready((state, metrics))

    return run_round


def _search(
    config: "Config", model: Any, variables: Any, image_shape: tuple[int, int, int]
) -> tuple[Callable[..., Any], Any]:
    import jax

    from ddnp_jax import methods, trace
    from ddnp_jax.cost.budget import Budget

    topology = trace(model, image_shape)
    budget = Budget(topology, config.budget.p)
    problem = methods.Problem(model, variables, topology, budget, config.search.method_fields(), steps=1000)
    search = methods.build(config.search.method, problem)
    return search.step, search.init(jax.random.key(config.seed))


def _training(config: "Config", model: Any, variables: Any) -> tuple[Callable[..., Any], Any]:
    from ddnp_jax import training
    from ddnp_jax.networks import as_network
    from ddnp_jax.pipeline import stages

    network, optimizer = as_network(model), stages.optimizer(config.base, steps_per_epoch=1000)
    step = training.train_step(network, optimizer, label_smoothing=config.base.label_smoothing)
    return step, training.init_state(network, variables, optimizer)


def pytorch(stage: str, name: str, network: Network, precision: str, platform: str) -> Candidate:
    """PyTorch's candidate of a stage.

    Args:
      stage: A key of `OURS`.
      name: The network's name.
      network: What it is measured on.
      precision: One of `PRECISIONS`.
      platform: Platform of JAX, "cpu" or "gpu".

    Raises:
      ValueError: JAX has a GPU and PyTorch does not.
    """
    import torch

    on_gpu = platform == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(
            f"JAX runs on a GPU, but PyTorch {torch.__version__} finds none; install PyTorch for CUDA, or set "
            "JAX_PLATFORMS=cpu to compare on the CPU."
        )
    torch.backends.cudnn.benchmark = True  # convolution algorithms by trial, as XLA chooses them
    device = torch.device("cuda" if on_gpu else "cpu")
    step = _pytorch_step(stage, name, network, device)
    steps = steps_per_turn(platform)

    def run_round() -> None:
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                step()
        if on_gpu:
            torch.cuda.synchronize()

    about = {
        "platform": platform,
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads",
        "version": f"PyTorch {torch.__version__}",
    }
    return Candidate(run_round, steps, torch.cuda.max_memory_allocated if on_gpu else resident_bytes, about)


def _pytorch_step(stage: str, name: str, network: Network, device: Any) -> Callable[[], Any]:
    import torch

    from experiments import pytorch_models

    model = pytorch_models.create(name, network.classes, **network.attributes)
    model = model.to(device, memory_format=torch.channels_last)
    batch, (height, width, channels) = network.batch_size, network.image_shape
    images = torch.randn(batch, channels, height, width, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(network.classes, (batch,), device=device)
    if stage == "search":
        model.eval().requires_grad_(False)
        layers = pytorch_models.masked_layers(model)
        masks = [torch.full((layer.in_channels,), 0.9, device=device, requires_grad=True) for layer in layers]
        return lambda: pytorch_models.mask_gradients(model, images, labels, layers, masks)
    if stage == "evaluation":
        model.eval()
        return torch.inference_mode()(lambda: model(images))
    # The values of `TrainerConfig`, of which JAX would be part.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def train() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return train


def photographs(name: str, data_dir: str, batch_size: int) -> Candidate:
    """A candidate of the loading of photographs.

    Args:
      name: `loading.OURS` or a key of `loading.LOOPS`.
      data_dir: Folder of prepared imagenet2012, or "".
      batch_size: Photographs per step.
    """
    about = {"platform": "cpu", "device": "1 core", "version": loading.VERSION}
    steps = 20  # a run starts its threads once, so their start must not weigh
    run_round = loading.make_round(name, data_dir, batch_size, steps)
    return Candidate(
        run_round, steps, resident_bytes, about, clock=time.process_time
    )  # a core's seconds, whoever else uses it


def measure(
    stage: str, flags: argparse.Namespace, with_pytorch: bool
) -> tuple[dict[str, Measurement], dict[str, dict[str, str]]]:
    """Measures a stage.

    Returns:
      By name, and for `PYTORCH` if it takes part: the measurement, and what the process says of itself.
    """
    network = NETWORKS[flags.network]._replace(batch_size=flags.batch_size)
    if stage == DATA:
        names = [n for n in (loading.OURS, *loading.LOOPS) if flags.data_dir or n != loading.READING]
        candidates = {name: (photographs, name, flags.data_dir, flags.batch_size) for name in names}
    else:
        candidates = {row: (ours, stage, form, network, flags.precision) for row, form in OURS[stage].items()}

    def others(platform: str) -> dict[str, tuple[Any, ...]]:
        compared = with_pytorch and stage != DATA and platform in ("cpu", "gpu")
        return {PYTORCH: (pytorch, stage, flags.network, network, flags.precision, platform)} if compared else {}

    return interleave(candidates, flags.rounds, stage, others)


def summarize(measured: Mapping[str, Measurement], batch_size: int) -> dict[str, dict[str, float]]:
    """The figures of a stage, per name: `images_per_s`, `peak_bytes`, and the ratio to every other by its name."""
    return {
        name: {
            "images_per_s": batch_size / median(own.seconds),
            "peak_bytes": own.peak_bytes,
            "time_over": {o: ratio(own.seconds, other.seconds) for o, other in measured.items() if o != name},
        }
        for name, own in measured.items()
    }


def table(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The figures (stage -> `summarize`) as Markdown tables, and a sentence for what they do not hold."""
    steps = {stage: figures for stage, figures in stages.items() if stage != DATA}
    parts = [_steps_table(steps)] if steps else []
    if DATA in stages:
        parts.append(_data_table(stages[DATA]))
    if "search" in stages:
        generators, scalars = OURS["search"]
        over = stages["search"][generators]["time_over"][scalars]
        parts.append(f"A search step with generators takes {over:.3f} of the time of one with scalars.")
    if not all(PYTORCH in figures for figures in steps.values()):
        parts.append("PyTorch is not installed or cannot use this device, so there is nothing to compare with.")
    return "\n\n".join(parts)


def _steps_table(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = [
        "| step | images/s | peak MiB | PyTorch images/s | PyTorch peak MiB | time / PyTorch's |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for figures in stages.values():
        other = figures.get(PYTORCH)
        for name, own in figures.items():
            if name != PYTORCH:
                over = f"{own['time_over'][PYTORCH]:.2f}" if other else "-"
                cells = [name, *_speed_and_memory(own), *_speed_and_memory(other), over]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _data_table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"| photographs | images/s per core | peak MiB | speed / {loading.REFERENCE}'s |", "|---|--:|--:|--:|"]
    reference = figures[loading.REFERENCE]["time_over"]
    for name, own in figures.items():
        speed = f"{reference[name]:.2f}" if name != loading.REFERENCE else "1.00"
        lines.append(f"| {' | '.join([name, *_speed_and_memory(own), speed])} |")
    return "\n".join(lines)


def _speed_and_memory(figures: Mapping[str, Any] | None) -> tuple[str, str]:
    if not figures:
        return "-", "-"
    speed = figures["images_per_s"]
    return f"{speed:.{0 if speed >= 100 else 1}f}", f"{figures['peak_bytes'] / 2**20:.0f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked; `only` becomes a list of stages.

    Raises:
      ValueError: Names the flag.
      SystemExit: A flag is unknown, or its value of another type.
    """
    parser = launch.Parser(prog="python -m experiments.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(STAGES), help="stages to measure, separated by commas")
    parser.add_argument("--network", default="resnet56", help=f"one of {', '.join(NETWORKS)}")
    parser.add_argument("--precision", default=PRECISIONS[0], help=f"one of {', '.join(PRECISIONS)}")
    parser.add_argument("--batch_size", type=int, help="images per step; by default 128 of CIFAR's size, else 16")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each process")
    parser.add_argument("--data_dir", default="", help="prepared imagenet2012; without it photographs are synthetic")
    parser.add_argument("--json", type=Path, help="also write every figure, and the seconds of each round, there")
    flags = parser.parse_args(arguments)
    flags.only = flags.only.split(",")
    for stage in flags.only:
        if stage not in STAGES:
            raise ValueError(f"--only={stage!r} is unknown; use {', '.join(STAGES)}, separated by commas.")
    for name, known in (("network", NETWORKS), ("precision", PRECISIONS)):
        if getattr(flags, name) not in known:
            raise ValueError(f"--{name}={getattr(flags, name)!r} is unknown; use one of {', '.join(known)}.")
    if flags.batch_size is None:
        flags.batch_size = NETWORKS[flags.network].batch_size
    for name in ("batch_size", "rounds"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name}={getattr(flags, name)} must be at least 1.")
    if flags.json and not flags.json.parent.is_dir():
        raise ValueError(f"--json={flags.json}: there is no folder {flags.json.parent}; make it first.")
    if flags.json and flags.json.is_dir():
        raise ValueError(f"--json={flags.json} is a folder; give a file in it.")
    return flags


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    try:
        flags = parse()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    with_pytorch = importlib.util.find_spec("torch") is not None
    stages, details = {}, {}
    for stage in flags.only:
        measured, about = measure(stage, flags, with_pytorch)
        stages[stage] = summarize(measured, flags.batch_size)
        details[stage] = {
            name: {**stages[stage][name], "seconds": measured[name].seconds, **about[name]} for name in measured
        }
    candidates = {
        f"{candidate['version']} on {candidate['device']}": None
        for stage in details.values()
        for candidate in stage.values()
    }
    what = f"{flags.network}, {flags.precision}, batch {flags.batch_size}, {flags.rounds} rounds"
    print(f"{what}; {'; '.join(candidates)}.\n\n{table(stages)}")
    if flags.json:
        measured_on = {name: getattr(flags, name) for name in ("network", "precision", "batch_size")}
        content = {**measured_on, "rounds": flags.rounds, "stages": details}
        flags.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
