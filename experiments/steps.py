"""The steps that are measured: the run's own and PyTorch's, as candidates for `experiments.interleaved`.

Ours is the run's own code: the search step with learners, soft top-k, optimizer and all losses, the training step with
augmentation, the evaluation with its counting. PyTorch's (eager, channels_last, for bfloat16 under `torch.autocast`) is
the backbone's part, with the normalized batch already on the device: forward and backward to the masks of the frozen
network; forward, backward and SGD with momentum; forward.
"""

import argparse
import importlib
import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments import launch
from experiments.interleaved import Candidate, resident_bytes

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
BATCH_SIZE = {"search": "search.batch_size", "training": "base.batch_size", "evaluation": "eval_batch_size"}


def check_flags(flags: argparse.Namespace, known: Mapping[str, Collection[str]], counts: Collection[str]) -> None:
    """Checks flags of a command that measures steps; `batch_size` becomes the network's where it is not given.

    Args:
      flags: The flags, with `network` and `batch_size`.
      known: Values that flags may have, by name.
      counts: Names of the flags that must be at least 1, beside `batch_size`.

    Raises:
      ValueError: Names the flag.
    """
    for name, values in {"network": NETWORKS, **known}.items():
        if getattr(flags, name) not in values:
            raise ValueError(f"--{name}={getattr(flags, name)!r} is unknown; use one of {', '.join(values)}.")
    if flags.batch_size is None:
        flags.batch_size = NETWORKS[flags.network].batch_size
    for name in ("batch_size", *counts):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name}={getattr(flags, name)} must be at least 1.")


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
        "device": parallel.description(),
        "version": f"JAX {jax.__version__}",
    }
    return Candidate(_our_round(stage, typed(config), network, steps), steps, peak_bytes, about)


def _our_round(stage: str, config: "Config", network: Network, steps: int) -> Callable[[], Any]:
    import jax

    from ddnp_jax import data, models, parallel, training
    from ddnp_jax.networks import as_network
    from ddnp_jax.pipeline import stages
    from ddnp_jax.training.evaluation import evaluator

    rng = np.random.default_rng(0)
    batch_size, classes = network.batch_size, network.classes
    count = steps * batch_size
    pixels = rng.integers(0, 256, (count, *network.image_shape), np.uint8)
    preprocessing = data.Preprocessing.of(data.complete(config.data))
    images = data.InMemory(pixels, rng.integers(0, classes, count, np.int32), preprocessing)
    model = models.create(config.model.name, classes, **{**config.model.attributes, "dtype": config.dtype})
    variables = stages.initial_variables(as_network(model), network.image_shape, config.seed)
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
