"""Every field of an experiment, with the values that most experiments share. Configurations start from this one.

The fields of a search method stand in its class `Fields`, in `ddnp_jax/methods/`.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# The searches that every configuration offers by its argument: method, and the fields that differ from its defaults.
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddnp": ("ddnp", {}),
    "authors": (
        "ddnp",
        {
            "search.bidirectional": True,
            "search.layer_norm": True,
            "search.energy_weight": 0.5,
            "search.importance_average": 0.99,
        },
    ),
    "scalar": (
        "ddnp",
        {
            "search.importance": "scalar",
            "search.width": "scalar",
            "search.importance_optimizer.learning_rate": 5e-2,
            "search.width_optimizer.learning_rate": 5e-2,
        },
    ),
    "nppm": ("nppm", {"data.search_fraction": 0.1}),
    "dg": ("nppm", {"data.search_fraction": 0.1, "search.predictor": "none"}),
    "uniform": ("uniform", {}),
    "magnitude": ("magnitude", {}),
    "bn_scale": ("bn_scale", {}),
    "fpgm": ("fpgm", {}),
    "taylor": ("taylor", {}),
}


# On a slice of the training images a test of everything but accuracy and NPPM's PN, whose memory stays too empty.
SHORT = {
    **{f"{stage}.epochs": 1 for stage in ("base", "search", "finetune")},
    **{f"{stage}.chunk_steps": 2 for stage in ("base", "search", "finetune")},
    **{f"{stage}.warmup_epochs": 0.0 for stage in ("base", "finetune")},
}
SHORT_CIFAR10 = {
    **SHORT,
    "data.train_split": "train[:2000]",
    "data.search_fraction": 0.2,
    "data.validation_fraction": 0.1,
}


def trainer(**fields: object) -> ConfigDict:
    """A section of the trainer, used for base training and for fine-tuning."""
    config = ConfigDict()
    config.epochs = 200  # passes over the stage's training images
    config.batch_size = 128  # images per update, over all devices
    config.micro_batches = 1  # steps that share an update, each on its part of the batch: for small devices
    config.learning_rate = 0.1  # of SGD, for this batch size
    config.momentum = 0.9  # of SGD
    config.weight_decay = 1e-4  # added to the gradient of every parameter
    config.warmup_epochs = 0.0  # linear warm-up from 0
    config.schedule = "step"  # 'step' (x0.1 at decay_at) or 'cosine' (to 0)
    config.decay_at = (0.5, 0.75)  # fractions of the run, for 'step'
    config.label_smoothing = 0.0  # mass that the label gives to all classes
    config.augment = True  # random crops and flips, as `data` says
    config.chunk_steps = 50  # steps per dispatch; logging and stopping happen between chunks
    config.save_every = 8  # chunks between checkpoints and evaluations on held-out training images
    config.update(fields)
    return config


def get_config() -> ConfigDict:
    """The common configuration; an experiment fills `data` and `model` and ends with `choose`."""
    config = ConfigDict()
    config.seed = 0  # of weights, order, augmentation and search; data.seed draws the splits
    config.variant = "default"  # name of this form in reports
    config.precision = "float32"  # of the computation: 'float32' or 'bfloat16'; parameters stay float32
    config.eval_batch_size = 512  # images per evaluation step, over all devices
    config.notes = ()  # sentences that the report repeats

    config.model = ConfigDict()
    config.model.name = "resnet56"  # a name that ddnp_jax.models.create knows
    config.model.attributes = ConfigDict({"shortcut": "subsample"})  # further attributes of the module

    config.data = ConfigDict()
    config.data.name = "cifar10"  # 'folder' of image files, or a data set that TFDS has prepared
    config.data.label = ""  # how reports call it; '' is its own name
    config.data.data_dir = ""  # folder of images, or of prepared TFDS data; '' is TFDS's own folder and download
    config.data.train_split = "train"  # of TFDS: the training images to use; 'train[:2000]' are the first ones
    config.data.test_split = ""  # of TFDS: the test images; '' is 'test', or else 'validation'
    config.data.test_fraction = 0.2  # of a folder without test images: held out of every class for the test
    config.data.seed = 0  # draws the held-out splits
    config.data.search_fraction = 0.05  # of the training images: read by the search, held out from base training
    config.data.validation_fraction = 0.02  # of the training images: chooses the best checkpoint, never trained on
    config.data.mean = (0.4914, 0.4822, 0.4465)  # per channel, of images in [0, 1]
    config.data.std = (0.2023, 0.1994, 0.2010)
    config.data.bgr = False  # whether the network sees blue first; mean and std are in its order
    config.data.pad = 4  # zero pixels on each side before the random crop of small images
    config.data.flip = True  # random horizontal flip
    config.data.crop_size = 224  # side of the crops that are made of photographs
    config.data.resize_size = 256  # shorter side of a photograph before the center crop of evaluation
    config.data.threads = 0  # that decode photographs, in each process; 0 is one per core

    config.budget = ConfigDict()
    config.budget.kind = "flops"  # of the prunable layers; 'params' or 'latency' (measured per layer): of the network
    config.budget.p = 0.5  # the part of it that remains, in (0, 1]
    config.budget.convention = "macs"  # 'macs' of conv and dense, or 'authors' (3 more per output element)
    config.budget.multiple = 1  # widths are multiples of this (whole gates excepted)
    config.budget.latency_points = 5  # for 'latency': widths per gate at which layers are timed

    config.base = trainer(weights="")  # weights: PyTorch checkpoint or save_pruned folder; '' trains from scratch

    config.search = search = ConfigDict()
    search.method = "ddnp"  # one of ddnp_jax.methods.METHODS, which says what its further fields are
    search.epochs = 200  # passes over the search images
    search.batch_size = 256  # images per step, over all devices
    search.augment = False  # random crops and flips, as `data` says
    search.chunk_steps = 10  # steps per dispatch
    search.save_every = 10  # chunks between checkpoints and evaluations
    search.test_curve = False  # also logs test accuracy at every checkpoint, for figures; it decides nothing
    search.resource_loss = "log_abs"  # R: 'log_abs', 'log_max', 'abs' or 'square'
    search.resource_weight = 4.0  # λ
    search.ranking = "per_gate"  # of scores: 'per_gate', the same fraction of each gate; or 'global', one ranking

    config.finetune = trainer(warmup_epochs=5.0)
    config.finetune.distillation_weight = 0.0  # share of the loss from the unpruned network's outputs
    config.finetune.distillation_temperature = 4.0  # of those outputs
    config.finetune.recalibration_steps = 0  # batches that re-estimate batch statistics before fine-tuning

    config.parallel = ConfigDict()
    config.parallel.mode = "shard_map"  # or 'pmap'; the same numbers
    config.parallel.sync_batch_norm = True  # batch statistics of the whole batch; else of each device
    # What XLA:CPU may fuse; '' leaves it to XLA. 'eltwise' halves a training step on small images.
    config.parallel.cpu_fusions = "individual_convolution,individual_dot,dot,eltwise,reduce"
    return config


def choose(
    config: ConfigDict, argument: str, p: Mapping[str, float], forms: Mapping[str, Mapping[str, Any]]
) -> ConfigDict:
    """Ends a configuration with what its argument asks for, and locks it.

    Args:
      config: with everything else filled in.
      argument: names joined by commas: at most one of `SEARCHES`, and any of `forms`; "" is DDNP.
      p: budget of each method; methods without one take DDNP's.
      forms: further forms of this experiment, the fields of each by name.

    Raises:
      ValueError: a name is unknown, or two searches are named.
    """
    from ddnp_jax import methods  # here, so that who reads only the common fields does without JAX

    words = list(filter(None, argument.split(",")))
    if unknown := [word for word in words if word not in (*SEARCHES, *forms)]:
        known = ", ".join((*SEARCHES, *forms))
        raise ValueError(f"the configuration's argument {unknown[0]!r} is unknown; use {known}.")
    searches = [word for word in words if word in SEARCHES] or ["ddnp"]
    if len(searches) > 1:
        raise ValueError(f"the configuration's argument names two searches, {' and '.join(searches)}; name one.")
    method, fields = SEARCHES[searches[0]]
    config.search.method = method
    config.search.update(ConfigDict(methods.default_fields(method)))
    config.search.update(methods.METHODS[method].job_fields)
    config.budget.p = p.get(method, p["ddnp"])
    for chosen in (fields, *(forms[word] for word in words if word in forms)):
        config.update_from_flattened_dict(chosen)
    config.variant = argument or "default"
    return config.lock()
