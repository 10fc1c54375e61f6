"""The configuration of an experiment: every field with its type, default, meaning and limits.

    config = Config(budget=BudgetConfig(p=0.4), search=SearchConfig.of("nppm", epochs=50))
    pipeline.run(config, "runs/mine", model=model, dataset=dataset)

On the command line, the same names follow `--config.`; the files in `configs/` contain only values. The fields of a
search method are defined in its class `Fields`, in `ddnp_jax/methods/`.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np

from ddnp_jax import cpu, methods, parallel
from ddnp_jax.cost import flops, network_times
from ddnp_jax.export import FILES
from ddnp_jax.fields import advice, check_limits, choice, filled, names, number, several
from ddnp_jax.training.steps import SCHEDULES

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Stage = Literal["base", "search", "finetune", "control"]
STAGES: tuple[Stage, ...] = ("base", "search", "finetune", "control")
PRECISIONS: Mapping[str, Any] = {"float32": np.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, unless you pass your own.

    Attributes:
      name: Name of a model in `ddnp_jax.models.names()`, or MODULE:NAME: a flax module, its class, or a function that
        returns one.
      attributes: Additional attributes of the module.
    """

    name: str = "resnet56"
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set, unless you pass your own.

    Attributes:
      name: Name of a TFDS data set, or 'folder' for image files.
      label: Name of the data set in reports; '' for the data set's own name.
      data_dir: Folder of images or of prepared TFDS data; '' for TFDS's default, with download.
      train_split: TFDS split of training images; 'train[:2000]' for the first 2,000.
      test_split: TFDS split of test images; '' for 'test', or 'validation' if there is none.
      test_fraction: Fraction of every class that is held out for testing, in a folder without test images.
      seed: Random seed of the held-out splits.
      search_fraction: Fraction of the training images for the search, held out from base training.
      validation_fraction: Fraction of the training images for selecting the best checkpoint, never trained on.
      mean: Mean per channel of images in [0, 1]; () for the usual one of the data set.
      std: Standard deviation per channel, likewise.
      bgr: Whether the network takes BGR images; mean and std are in its channel order.
      pad: Pixels of zero padding per side before random crops of small images.
      flip: Whether half of the training images are mirrored.
      crop_size: Side in pixels of the crops of photographs.
      resize_size: Shorter side of a photograph before the center crop of evaluation.
      threads: Number of decoder threads; 0 for one per core.
    """

    name: str = "cifar10"
    label: str = ""
    data_dir: str = ""
    train_split: str = "train"
    test_split: str = ""
    test_fraction: float = number(0.2, above=0, below=1)
    seed: int = number(0, least=0, bits=63)
    search_fraction: float = number(0.05, least=0, below=1, about="a fraction of the training images")
    validation_fraction: float = number(0.02, least=0, below=1, about="a fraction of the training images")
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = number((), above=0)
    bgr: bool = False
    pad: int = number(4, least=0, about="a number of pixels")
    flip: bool = True
    crop_size: int = number(224, least=1)
    resize_size: int = number(256, least=1)
    threads: int = number(0, least=0, about="how many threads; 0 is one per core")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How much of the network to keep.

    Attributes:
      kind: What is counted: 'flops' (of prunable layers), 'params' or 'latency'.
      p: Fraction of the cost that remains.
      convention: How FLOPs are counted: 'macs', or 'authors' with 3 more per output element.
      residual: Whether channels of residual streams may be removed too, one set for all blocks of a stage.
      multiple: Widths are multiples of this, except those of unpruned gates; 0 for the fastest on the device, which is
        measured.
      latency_points: Widths per gate at which layers are timed, for 'latency'.
      latency_batch: Images per call of what is measured for 'latency' and for multiple=0; 0 for a device's share of an
        evaluation batch.
      runtime: Where times are measured: 'xla', or 'onnx' for ONNX Runtime on the CPU.
    """

    kind: str = choice("flops", "flops", "params", "latency")
    p: float = number(0.5, above=0, most=1, about="the fraction of the cost that remains")
    convention: str = choice("macs", *flops.CONVENTIONS)
    residual: bool = False
    multiple: int = number(1, least=0)
    latency_points: int = number(5, least=2)
    latency_batch: int = number(0, least=0)
    runtime: str = choice(network_times.XLA, *network_times.RUNTIMES)

    @property
    def runtime_of_times(self) -> str | None:
        """The runtime in which networks are timed for the budget; None if nothing is measured for it."""
        return self.runtime if self.kind == "latency" or not self.multiple else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """SGD with momentum, for base training and fine-tuning.

    Attributes:
      epochs: Passes over the stage's training images.
      batch_size: Images per update, over all devices.
      micro_batches: Micro-batches per update, for gradient accumulation.
      learning_rate: Peak learning rate, for this batch size.
      momentum: Momentum of SGD.
      weight_decay: Coefficient of L2 regularization of every parameter.
      warmup_epochs: Epochs of linear warm-up from 0.
      schedule: Learning rate over the run: 'constant', 'step' (x0.1 at decay_at) or 'cosine' (to 0).
      decay_at: When the 'step' schedule decays, as fractions of the run.
      label_smoothing: Label smoothing of the cross-entropy.
      augment: Whether to crop and flip at random, as configured in `data`.
      chunk_steps: Steps per dispatch; the run logs and stops only between chunks.
      save_every: Chunks between checkpoints and evaluations on held-out training images.
    """

    epochs: int = number(200, least=1)
    batch_size: int = number(128, least=1)
    micro_batches: int = number(1, least=1)
    learning_rate: float = number(0.1, least=0.0)
    momentum: float = number(0.9, least=0.0, most=1.0)
    weight_decay: float = number(1e-4, least=0.0)
    warmup_epochs: float = number(0.0, least=0.0)
    schedule: str = choice("step", *SCHEDULES)
    decay_at: tuple[float, ...] = number((0.5, 0.75), above=0, most=1, about="fractions of the run")
    label_smoothing: float = number(0.0, least=0.0, most=1.0)
    augment: bool = True
    chunk_steps: int = number(50, least=1)
    save_every: int = number(8, least=1)

    @property
    def step_batch(self) -> int:
        """Images per step, over all devices."""
        return self.batch_size // self.micro_batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig(TrainerConfig):
    """Base training.

    Attributes:
      weights: Path of a PyTorch checkpoint or of a folder written by `save_pruned`; '' to train from scratch.
    """

    weights: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainerConfig):
    """Fine-tuning of the pruned network.

    Attributes:
      epochs: Passes over the training images, search images included; 0 to skip fine-tuning.
      control: Whether to fine-tune the unpruned network too, for a fair comparison.
      warmup_epochs: Epochs of linear warm-up from 0.
      distillation_weight: Weight of the distillation from the unpruned network.
      distillation_temperature: Temperature of the distillation loss.
      recalibration_steps: Number of batches for re-estimating batch statistics before fine-tuning.
    """

    epochs: int = number(200, least=0)
    control: bool = False
    warmup_epochs: float = number(5.0, least=0.0)
    distillation_weight: float = number(0.0, least=0.0, most=1.0)
    distillation_temperature: float = number(4.0, least=1e-3)
    recalibration_steps: int = number(0, least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search; on the command line and in config.json, the method's fields are on the same level as these.

    Attributes:
      method: Name of the method, one of `ddnp_jax.methods.METHODS`.
      epochs: Passes over the search images; always 1 for scores.
      images: How many of the search images are used, drawn at random; 0 for all.
      batch_size: Images per step, over all devices.
      augment: Whether to crop and flip at random, as configured in `data`.
      chunk_steps: Steps per dispatch.
      save_every: Chunks between checkpoints and evaluations.
      test_curve: Whether to log test accuracy at every checkpoint too, for plots only.
      fields: Fields of the method by name, where they differ from its defaults; those of other methods are ignored.
    """

    method: str = choice("ddnp", *methods.METHODS)
    epochs: int = number(200, least=1)
    images: int = number(0, least=0)
    batch_size: int = number(256, least=1)
    augment: bool = False
    chunk_steps: int = number(10, least=1)
    save_every: int = number(10, least=1)
    test_curve: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, method: str, **values: Any) -> "SearchConfig":
        """Returns the section for a method, with that method's defaults.

        Args:
          method: One of `ddnp_jax.methods.METHODS`.
          **values: Values of fields of this class and of the method.

        Raises:
          ValueError: The method or a field is unknown, or a value is invalid.
        """
        chosen = methods.find(method)
        common, own = _parted({**chosen.job_fields, **values})
        fields = methods.default_fields(method)
        if unknown := [name for name in own if name not in fields]:
            known = [name for name in (*names(cls), *fields) if name not in ("method", "fields")]
            raise ValueError(f"search.{unknown[0]} is not a field of {method!r}; {advice(unknown[0], known)}")
        filled(chosen.fields(), own, "search.")
        return filled(cls(method=method), {**common, "fields": own}, "search.")

    @property
    def micro_batches(self) -> int:
        """Micro-batches per update; the search does not accumulate gradients."""
        return 1

    @property
    def step_batch(self) -> int:
        """Images per step, over all devices."""
        return self.batch_size

    def method_fields(self) -> Any:
        """Returns the fields of the method, an instance of its class `Fields`.

        Raises:
          ValueError: A value is invalid; the message names the field and its limits.
        """
        known = methods.default_fields(self.method)
        own = {name: value for name, value in self.fields.items() if name in known}
        try:
            return filled(methods.find(self.method).fields(), own)
        except ValueError as error:
            raise ValueError(f"search.{error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How work is distributed over devices.

    Attributes:
      mode: How steps are distributed: 'shard_map' or 'pmap'; the results are the same.
      sync_batch_norm: Whether batch statistics are those of all devices, not of each.
      cpu_fusions: What XLA:CPU may fuse, as for `configure_cpu`.
    """

    mode: str = choice("shard_map", *parallel.MODES)
    sync_batch_norm: bool = True
    cpu_fusions: str = cpu.AUTO


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment.

    Attributes:
      seed: Random seed of weights, order, augmentation and search; that of the held-out splits is data.seed.
      variant: Name of this variant in reports.
      precision: Data type of the computation, 'float32' or 'bfloat16'; parameters stay float32.
      eval_batch_size: Images per evaluation step, over all devices.
      notes: Remarks to include in the report.
      export: Comma-separated formats to export the pruned network to.
      model: The network.
      data: The data set.
      budget: How much of the network to keep.
      base: Base training.
      search: The search.
      finetune: Fine-tuning.
      parallel: The devices.
    """

    seed: int = number(0, least=0, bits=63)
    variant: str = "default"
    precision: str = choice("float32", *PRECISIONS)
    eval_batch_size: int = number(512, least=1)
    notes: tuple[str, ...] = ()
    export: str = several(*FILES)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    budget: BudgetConfig = BudgetConfig()
    base: BaseConfig = BaseConfig()
    search: SearchConfig = SearchConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    parallel: ParallelConfig = ParallelConfig()

    @property
    def dtype(self) -> Any:
        """The data type of the computation."""
        return PRECISIONS[self.precision]

    def stage(self, name: Stage) -> BaseConfig | SearchConfig | FinetuneConfig:
        """The section of a stage; the control uses that of fine-tuning."""
        return getattr(self, "finetune" if name == "control" else name)


def shared_search_fields() -> dict[str, Any]:
    """Fields that several methods have, with their defaults.

    A section `search` has them whatever its method is, so that the method may be changed on the command line.
    """
    return dataclasses.asdict(methods.ResourceFields()) | methods.default_fields("uniform")


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries, the method's fields beside the others of `search`."""
    values = dataclasses.asdict(config)
    values["search"] |= values["search"].pop("fields")
    return values


def typed(config: "Config | ConfigDict | Mapping[str, Any]") -> Config:
    """Converts a configuration of any form to a `Config` with every field of its method.

    Raises:
      ValueError: A field is unknown, a value has the wrong type, or a field of the method is missing.
    """
    if isinstance(config, Config):
        found = filled(Config(), {name: getattr(config, name) for name in names(config)})
    else:
        values = dict(config if isinstance(config, Mapping) else config.to_dict())
        if isinstance(section := values.get("search"), Mapping):
            common, own = _parted(section)
            values["search"] = {**common, "fields": own}
        found = filled(Config(), values)
    check_limits(found.search, "search.")
    if not isinstance(config, Config):
        _check_has_fields(found.search)
    return dataclasses.replace(found, search=_completed(found.search))


def _parted(section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `SearchConfig`, and those of methods."""
    known = {*names(SearchConfig)} - {"fields"}
    common = {name: value for name, value in section.items() if name in known}
    return common, {name: value for name, value in section.items() if name not in known}


def _check_has_fields(search: SearchConfig) -> None:
    """Raises where the method alone was changed: its fields are missing, and common ones may have other defaults."""
    for name in methods.default_fields(search.method):
        if name not in search.fields:
            raise ValueError(
                f"search.method={search.method!r} needs search.{name}, which this configuration lacks; choose the "
                f"method by the configuration's argument, --config=FILE.py:{search.method}."
            )


def _completed(search: SearchConfig) -> SearchConfig:
    """The search with every field of its method, and with those that several methods have."""
    of_methods = {name for method in methods.METHODS for name in methods.default_fields(method)}
    if unknown := [name for name in search.fields if name not in of_methods]:
        known = ", ".join(methods.default_fields(search.method))
        raise ValueError(f"search.{unknown[0]} is not a field of the method {search.method!r}; its fields are {known}.")
    own = dataclasses.asdict(search.method_fields())
    epochs = methods.find(search.method).passes or search.epochs
    return dataclasses.replace(search, epochs=epochs, fields={**shared_search_fields(), **search.fields, **own})


def check(config: Config) -> None:
    """Checks a configuration by itself, before devices, data and network are known.

    Raises:
      ValueError: The field, its value and what it may be are named.
    """
    check_limits(config)
    config.search.method_fields()
    for name, trainer in (("base", config.base), ("finetune", config.finetune)):
        if trainer.batch_size % trainer.micro_batches:
            raise ValueError(
                f"{name}.batch_size={trainer.batch_size} has no {name}.micro_batches={trainer.micro_batches} equal "
                "parts."
            )
        if trainer.warmup_epochs >= trainer.epochs > 0:
            raise ValueError(
                f"{name}.warmup_epochs={trainer.warmup_epochs} must be below the {trainer.epochs} epochs of the stage; "
                "give fewer."
            )
