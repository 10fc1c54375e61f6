"""What a run has shown, as one typed record: what `report.json` holds."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ddnp_jax.config import Stage

# What `report.json` holds besides the fields of `Report`: figures that follow from these.
_DERIVED = (
    *("delta_top1", "delta_top5", "delta_control_top1", "delta_control_top5"),
    *("flops_reduction", "params_reduction", "p_reached", "flops_speedup", "speedups"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost that the budget counts.

    Attributes:
      kind: Kind of the budget: "flops", "params" or "latency".
      unit: Unit of both costs.
      before: Cost of the unpruned network.
      after: Cost of the pruned one: of a latency budget the measured time, if it was measured on this device.
      predicted: What the latency table predicted where `after` was measured; None elsewhere.
    """

    kind: str
    unit: str
    before: float
    after: float
    predicted: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Measured time of a forward pass on one device.

    Attributes:
      batch: Number of images.
      before: Milliseconds of the unpruned network.
      after: Milliseconds of the pruned one.
      runtime: What computed it.
    """

    batch: int
    before: float
    after: float
    runtime: str = "XLA"

    @property
    def speedup(self) -> float:
        """How many times as fast the pruned network is."""
        return self.before / self.after


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A file: its length, and what it was when it was written."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """The pruned network in another format.

    Attributes:
      files: The files by their paths in the workdir, that of the network first.
      compared_images: Number of test images, as pixels, over which its outputs were compared with the network's.
      max_difference: Largest difference of an output.
      argmax_agreement: Fraction of the predictions that are the same.
      top1: Its own accuracy over all test images in percent; None where it computes what the network does.
    """

    files: Mapping[str, File]
    compared_images: int
    max_difference: float
    argmax_agreement: float
    top1: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """How near the cut network is to the masked one; see `compact.Verification`."""

    max_difference: float
    argmax_agreement: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerStage:
    """One number per stage."""

    base: float
    search: float
    finetune: float
    control: float = 0

    def of(self, stage: Stage) -> float:
        """The number of a stage."""
        return getattr(self, stage)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What a stage learned from.

    Attributes:
      images: Number of its training images.
      steps: Number of steps that it took.
      batch_size: Images per update, over all devices.
      learning_rates: Highest learning rate of each optimizer, by the optimizer's name.
    """

    images: int
    steps: int
    batch_size: int
    learning_rates: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a run; percent for accuracies (of the test set) and reductions."""

    method: str
    variant: str = "default"  # name of the method's form
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # "section.field" -> value; without paths
    model: str
    dataset: str
    preprocessing: Mapping[str, Any] | None = None  # what is done to an image first, `Dataset.serving`
    seed: int
    p: float  # part of the budgeted cost that may remain
    budget: Cost
    flops_convention: str  # "macs" or "authors"
    base_top1: float  # with the weights that the search starts from
    base_top5: float
    control_top1: float | None = None  # the base, fine-tuned as the pruned network was; None if not configured
    control_top5: float | None = None
    unfinetuned_top1: float  # the pruned network before fine-tuning
    unfinetuned_top5: float
    pruned_top1: float
    pruned_top5: float
    best_pruned_validation_top1: float | None = None  # in fine-tuning, on held-out images; None where none was logged
    held_out_images: int | None = None  # training images that the best checkpoint is selected on
    test_images: int
    flops_total_before: float  # entire network
    flops_total_after: float
    flops_prunable_before: float  # the layers that pruning can touch
    flops_prunable_after: float
    params_before: int
    params_after: int
    gate_names: tuple[str, ...]
    widths_before: tuple[int, ...]  # channels of each gate
    widths: tuple[int, ...]
    seconds: PerStage  # over all runs of the stage; 0 where it was not run
    epochs: PerStage  # as configured, also where the stage was not run
    training: Mapping[str, Training] = dataclasses.field(default_factory=dict)  # of stages that took steps
    batch_norm: str  # where batch statistics are taken: "synced" or "per device"
    precision: str
    devices: str  # on which fine-tuning ended
    latency_ms: Latency  # of a device's share of an evaluation batch
    latency_devices: str = ""  # on one of which it was measured; "" in older reports, which measured it on `devices`
    other_latencies: tuple[Latency, ...] = ()  # of single images, and in other runtimes
    verification: Verification
    exports: Mapping[str, Export] = dataclasses.field(default_factory=dict)  # by format
    notes: tuple[str, ...]

    @property
    def method_name(self) -> str:
        """The method, and the names of its form that are not the method's own."""
        forms = [name for name in self.variant.split(",") if name not in ("default", self.method)]
        return f"{self.method} ({','.join(forms)})" if forms else self.method

    @property
    def p_name(self) -> str:
        """p, and what it is a part of where that is not the FLOPs."""
        return f"{self.p:g}" if self.budget.kind == "flops" else f"{self.p:g} ({self.budget.kind})"

    @property
    def title(self) -> str:
        """One line that names the run."""
        return f"{self.method_name}, {self.model} on {self.dataset}, p = {self.p_name}"

    @property
    def has_top5(self) -> bool:
        """Whether top-5 accuracies say something: of up to five classes they are always 100 %."""
        return (self.preprocessing or {}).get("num_classes", 1000) > 5

    @property
    def delta_top1(self) -> float:
        """Points of accuracy by which the pruned network is above the base."""
        return self.pruned_top1 - self.base_top1

    @property
    def delta_top5(self) -> float:
        """The same of top-5 accuracy."""
        return self.pruned_top5 - self.base_top5

    @property
    def control(self) -> tuple[float, float] | None:
        """Top-1 and top-5 accuracy of the base, fine-tuned in the same way; None if not configured."""
        top1, top5 = self.control_top1, self.control_top5
        return None if top1 is None or top5 is None else (top1, top5)

    @property
    def delta_control_top1(self) -> float | None:
        """Points of accuracy by which the pruned network is above that base."""
        return self.pruned_top1 - self.control[0] if self.control else None

    @property
    def delta_control_top5(self) -> float | None:
        """The same of top-5 accuracy."""
        return self.pruned_top5 - self.control[1] if self.control else None

    @property
    def flops_reduction(self) -> float:
        """Fraction of the entire network's FLOPs that is removed."""
        return 100 * (1 - self.flops_total_after / self.flops_total_before)

    @property
    def latency_measured_on(self) -> str:
        """What `latency_ms` is of: how many images, and on which device."""
        devices = self.latency_devices or self.devices
        where = devices if devices.startswith("1 x ") else f"one of {devices}"
        return f"a batch of {self.latency_ms.batch} on {where}"

    @property
    def flops_speedup(self) -> float:
        """How many times as fast the pruned network would be if FLOPs alone took time."""
        return self.flops_total_before / self.flops_total_after

    @property
    def latencies(self) -> tuple[Latency, ...]:
        """All measured times, by runtime and batch."""
        runtimes = list(dict.fromkeys(each.runtime for each in (self.latency_ms, *self.other_latencies)))
        return tuple(
            sorted(
                (self.latency_ms, *self.other_latencies), key=lambda each: (runtimes.index(each.runtime), each.batch)
            )
        )

    @property
    def speedups(self) -> tuple[dict[str, Any], ...]:
        """Measured speed-ups, and the part that each is of what the FLOPs imply."""
        return tuple(
            {
                "runtime": each.runtime,
                "batch": each.batch,
                "speedup": each.speedup,
                "part_of_flops_speedup": each.speedup / self.flops_speedup,
            }
            for each in self.latencies
        )

    @property
    def params_reduction(self) -> float:
        """Part of the parameters that is removed."""
        return 100 * (1 - self.params_after / self.params_before)

    @property
    def p_reached(self) -> float:
        """Part of the budgeted cost that remains."""
        return self.budget.after / self.budget.before

    def was_run(self, stage: Stage) -> bool:
        """Whether a stage took steps; reports of older versions say it by their seconds alone."""
        return stage in self.training if self.training else self.seconds.of(stage) > 0

    def to_json(self) -> dict[str, Any]:
        """What `report.json` holds, in values of JSON."""
        values = dataclasses.asdict(self) | {name: getattr(self, name) for name in _DERIVED}
        return json.loads(json.dumps(values))
