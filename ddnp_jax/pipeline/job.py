"""The main job: base weights, search, compaction, fine-tuning and report, each stage resumable from the workdir."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import ml_collections
import numpy as np
import optax

from ddnp_jax import checkpoint, data, fields, methods, models, parallel, torch_weights, training
from ddnp_jax.compact import compact, rehearse, verify
from ddnp_jax.cost import flops, latency
from ddnp_jax.cost.budget import Budget, make_budget
from ddnp_jax.masking import apply_masked
from ddnp_jax.networks import as_network
from ddnp_jax.pipeline import report
from ddnp_jax.saved import load_pruned, save_pruned
from ddnp_jax.topology import Selection, Topology, trace

Rebuild = Callable[[tuple[int, ...]], nn.Module]

_MAY_DIFFER = ("data.threads",)  # fields of the configuration that may change when a run goes on
_WRITTEN = ("results.json", "metrics.jsonl", *fields.STAGES)  # in a workdir that has been used

# What results.json holds of a stage and of what is made of it before the next.
_RESULTS = {
    "base": ("base",),
    "search": ("proposed_p", "search_notes", "verification", "unfinetuned"),
    "finetune": ("pruned", "latency_ms"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What every stage needs; made and checked before any device work.

    Attributes:
      config: the whole configuration.
      workdir: where everything is written.
      dataset: images and their splits.
      name: of the model.
      model: the unpruned network.
      rebuild: makes the smaller module from the channels per gate; None where the model has `widths`.
      topology: of the model.
      budget: what may remain.
      weights: the unpruned network's, of `base.weights`; None where it is trained.
      log: metrics.jsonl.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    dataset: data.Dataset
    name: str
    model: nn.Module
    rebuild: Rebuild | None
    topology: Topology
    budget: Budget
    weights: Any
    log: training.MetricsLog

    def stage_steps(self, section: str) -> tuple[int, int]:
        """(steps in all, steps per epoch) of a section of the configuration; an update may take several."""
        config = self.config[section]
        updates = data.steps_per_epoch(len(_indices(self.dataset, section)), config.batch_size)
        per_epoch = updates * config.get("micro_batches", 1)
        return config.epochs * per_epoch, per_epoch

    def send(self, section: str, augment: bool, first: int, last: int) -> Any:
        """What is sent to the devices for the steps `first` to `last` - 1 of a stage, this process's part."""
        config, images = self.config[section], self.dataset.train
        batches = data.batches(
            _indices(self.dataset, section), fields.step_batch(config), self.config.seed, process=parallel.process()
        )
        read = functools.partial(images.read, seed=self.config.seed if augment else None)
        return data.read_ahead(batches[first:last], read, images.threads, config.chunk_steps)

    def constants(self, step_constants: Any) -> dict[str, Any]:
        """The constants of `training.over_chunk` on every device."""
        return {"images": self.dataset.train.on_devices, "step": parallel.replicate(step_constants)}


def _indices(dataset: data.Dataset, section: str) -> np.ndarray:
    """Training images of a stage: base training leaves the search's images out, fine-tuning adds them."""
    splits = dataset.splits
    if section == "search":
        return splits["search"]
    return splits["train"] if section == "base" else np.sort(np.concatenate([splits["train"], splits["search"]]))


def prepare(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    model: nn.Module | None = None,
    rebuild: Rebuild | None = None,
) -> Run:
    """Checks the whole configuration and reads data and given weights; arguments as for `run`.

    Raises:
      ValueError: a field is wrong, the budget cannot be met, the weights are not the model's, or the workdir belongs to
        another run.
    """
    fields.check(config)
    dataset = data.load(config.data)
    _check_splits(config, dataset)
    name = config.model.name if model is None else type(model).__name__
    if model is None:
        attributes = {**config.model.attributes, "dtype": fields.computation_dtype(config.precision)}
        model = models.create(config.model.name, dataset.num_classes, **attributes)
    elif config.precision != "float32":
        raise ValueError(f"precision={config.precision!r} is for this library's models; give {name} its own data type.")
    topology = trace(model, dataset.image_shape)
    workdir = Path(workdir)
    measured = functools.partial(latency.measured_once, workdir / "latency.json", model, topology, _local_batch(config))
    identity = config.to_dict()
    _check_workdir(workdir, identity)  # a measured budget writes its table there
    weights = _given_weights(config.base.weights, model, topology)
    budget = make_budget(config.budget, topology, measured)
    _check_rebuild(model, rebuild, topology, budget)
    checkpoint.claim_workdir(workdir, identity, _MAY_DIFFER)
    log = training.MetricsLog(workdir / "metrics.jsonl")
    return Run(config, workdir, dataset, name, model, rebuild, topology, budget, weights, log)


def _check_workdir(workdir: Path, identity: dict[str, Any]) -> None:
    checkpoint.check_workdir(workdir, identity, _MAY_DIFFER)
    left = [name for name in _WRITTEN if (workdir / name).exists()]
    if left and not (workdir / "config.json").exists():
        raise ValueError(
            f"{workdir} has {left[0]} of a run but not its config.json; put it back, or use another workdir."
        )


def _check_rebuild(model: nn.Module, rebuild: Rebuild | None, topology: Topology, budget: Budget) -> None:
    """Cuts random variables, so that a module that cannot be cut is refused before it is trained."""
    if rebuild is None and hasattr(model, "widths"):
        return
    rng = np.random.default_rng(0)
    drawn = {variable.path: abs(rng.normal(size=variable.shape)).astype(np.float32) for variable in topology.variables}
    rehearse(model, flax.traverse_util.unflatten_dict(drawn), topology, budget.smallest_widths, rebuild)


def _check_splits(config: ml_collections.ConfigDict, dataset: data.Dataset) -> None:
    """Refuses splits that a stage would miss later: a batch that they do not fill, or none to choose by."""
    for section in fields.STAGES[1:] if config.base.weights else fields.STAGES:
        found, batch_size = len(_indices(dataset, section)), config[section].batch_size
        if found < batch_size:
            raise ValueError(
                f"data.search_fraction={config.data.search_fraction} of data.train_split={config.data.train_split!r} "
                f"leaves {found} images to {section}, fewer than {section}.batch_size={batch_size}; divide the images "
                "differently, or take smaller batches."
            )
    if not len(dataset.splits["validation"]):
        raise ValueError(
            f"data.validation_fraction={config.data.validation_fraction} holds out no image to choose the best "
            "checkpoint by; hold out some."
        )


def run(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    model: nn.Module | None = None,
    rebuild: Rebuild | None = None,
) -> dict[str, Any]:
    """Runs or continues the main job.

    Args:
      config: the experiment.
      workdir: where everything is written.
      model: a module of your own, called with (images, train); None for the backbone that `config.model` names.
      rebuild: makes your module from the channels per gate; not needed where it has an attribute `widths`.

    Returns:
      What `report.json` holds.
    """
    job = prepare(config, workdir, model, rebuild)
    if jax.process_index() == 0:
        print(job.topology.describe())
    variables = base(job)
    selection = search(job, variables)
    small_model, small_variables = cut(job, variables, selection)
    tuned = finetune(job, variables, small_model, small_variables)
    parallel.on_first_process(lambda: save_pruned(job.workdir / "pruned", small_model, tuned))
    return report.write(job.workdir, summarize(job, selection))


def base(job: Run) -> Any:
    """The trained weights of the unpruned network: from the workdir, from `base.weights`, or trained from scratch."""
    variables = job.weights or _train(job, "base", job.model, _initial_variables(job))
    _once(job, "base", lambda: _test(job, job.model, variables))
    return variables


def _given_weights(path: str, model: nn.Module, topology: Topology) -> Any:
    """Weights of `model` from a PyTorch checkpoint, or from a folder written by `save_pruned`; None for ''."""
    if not path:
        return None
    file = Path(path).expanduser()
    if not file.exists():
        raise ValueError(f"base.weights={path!r} does not exist; give a PyTorch checkpoint, or '' to train.")
    if not file.is_dir():
        return torch_weights.load(file, model, topology.input_shape)
    _, variables = load_pruned(file, model)
    try:
        topology.check(variables)
    except ValueError as error:
        raise ValueError(f"base.weights={path!r} is of another network: {error}") from error
    return variables


def search(job: Run, variables: Any) -> Selection:
    """Learns which channels stay; writes selection.json."""
    method = _method(job, variables)
    state = method.init(jax.random.key(job.config.seed))
    if method.steps:
        evaluate = _cut_evaluator(job, method, variables)
        state = _run_stage(job, "search", method.step, state, variables, evaluate)
    _once(job, "proposed_p", lambda: methods.proposed_cost(method, state, job.budget) / job.budget.total)
    _once(job, "search_notes", lambda: method.notes)
    selection = methods.select(method, state, job.budget)
    parallel.on_first_process(lambda: selection.save(job.workdir / "selection.json"))
    return selection


def search_curves(job: Run, variables: Any, seeds: Sequence[int]) -> None:
    """Searches from several seeds at once, for the log alone: `methods.seed_metric` names what it holds of each.

    The order of the images and their augmentation are those of the configuration's seed, the same for all.

    Raises:
      ValueError: the workdir's search has other seeds.
    """
    begun = _once(job, "seeds", lambda: list(seeds))
    if begun != list(seeds):
        raise ValueError(f"{job.workdir} searches from seeds {begun}, not {list(seeds)}; use another workdir.")
    method = _method(job, variables)
    evaluate_one = _cut_evaluator(job, method, variables)

    def evaluate(state: methods.Seeds) -> dict[str, float]:
        found = {seed: evaluate_one(state.of(place)) for place, seed in enumerate(seeds)}
        named = {methods.seed_metric(seed, k): value for seed, metrics in found.items() for k, value in metrics.items()}
        return named | {"validation_top1": float(np.mean([m["validation_top1"] for m in found.values()]))}

    state, step = methods.over_seeds(method, seeds)
    _run_stage(job, "search", step, state, variables, evaluate)


def _method(job: Run, variables: Any) -> methods.Search:
    steps, _ = job.stage_steps("search")
    problem = methods.Problem(job.model, variables, job.topology, job.budget, job.config.search, steps)
    return methods.build(job.config.search.method, problem)


def _cut_evaluator(job: Run, method: methods.Search, variables: Any) -> Callable[[Any], dict[str, float]]:
    """What the network that a search's state proposes does, on held-out images and, where asked for, on the test's."""
    held_out = _masked_evaluator(job, job.dataset.train)
    test = _masked_evaluator(job, job.dataset.test)

    def evaluate(state: Any) -> dict[str, float]:
        masks = methods.select(method, state, job.budget).masks(job.topology)
        constants = {"variables": variables, "masks": masks}
        found = _named("validation", held_out(constants, job.dataset.splits["validation"]))
        if job.config.search.test_curve:
            found |= _named("test", test(constants, np.arange(len(job.dataset.test))))
        return found

    return evaluate


def cut(job: Run, variables: Any, selection: Selection) -> tuple[nn.Module, Any]:
    """Removes the channels, proves that nothing else changed, and re-estimates batch statistics if asked to."""
    small_model, small_variables = compact(job.model, variables, selection, job.topology, job.rebuild)
    images = job.dataset.test.first(_local_batch(job.config))
    verification = verify(job.model, variables, small_model, small_variables, selection, job.topology, images)
    _once(job, "verification", verification._asdict)
    if job.config.finetune.recalibration_steps:
        small_variables = _recalibrate(job, small_model, small_variables)
    _once(job, "unfinetuned", lambda: _test(job, small_model, small_variables))
    return small_model, small_variables


def finetune(job: Run, variables: Any, small_model: nn.Module, small_variables: Any) -> Any:
    """Trains the smaller network with the base trainer."""
    teacher = job.model if job.config.finetune.distillation_weight else None
    tuned = _train(job, "finetune", small_model, small_variables, teacher, variables if teacher else {})
    _once(job, "pruned", lambda: _test(job, small_model, tuned))
    _once(job, "latency_ms", lambda: _latency(job, [(job.model, variables), (small_model, tuned)]))
    return tuned


def summarize(job: Run, selection: Selection) -> dict[str, Any]:
    """Everything that the report says, as one flat dictionary."""
    config, topology, results = job.config, job.topology, _results(job)
    convention, budget = config.budget.convention, job.budget
    return {
        "method": config.search.method,
        "variant": config.variant,
        "model": job.name,
        "dataset": data.label(config.data),
        "seed": config.seed,
        "p": budget.p,
        "budget": {
            "kind": config.budget.kind,
            "unit": budget.counted.unit,
            "before": budget.total,
            "after": budget.cost(selection.widths),
        },
        "flops_convention": convention,
        **{f"{stage}_{k}": results[stage][k] for stage in ("base", "unfinetuned", "pruned") for k in ("top1", "top5")},
        "best_pruned_validation_top1": job.log.best("finetune"),
        "test_images": len(job.dataset.test),
        "flops_total_before": flops.total(topology, None, convention),
        "flops_total_after": flops.total(topology, selection.widths, convention),
        "flops_prunable_before": flops.prunable(topology, None, convention),
        "flops_prunable_after": flops.prunable(topology, selection.widths, convention),
        "params_before": flops.parameters(topology),
        "params_after": flops.parameters(topology, selection.widths),
        "gate_names": [gate.name for gate in topology.gates],
        "widths_before": list(topology.widths),
        "widths": list(selection.widths),
        "seconds": {stage: training.seconds(job.workdir / stage) for stage in fields.STAGES},
        "epochs": {stage: config[stage].epochs for stage in fields.STAGES},
        "batch_norm": "synced" if _syncs(job, job.model) else "per device",
        "precision": np.dtype(getattr(job.model, "dtype", None) or np.float32).name,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "latency_ms": results["latency_ms"],
        "verification": results["verification"],
        "notes": [*config.notes, *results["search_notes"], *_fitted(job, results["proposed_p"])],
    }


def _fitted(job: Run, proposed: float) -> list[str]:
    """Says so where the search's own widths miss the budget by more than the rounding of one channel."""
    channel = job.budget.total / sum(job.topology.widths)
    if not (job.workdir / "search").exists() or abs(proposed - job.budget.p) * job.budget.total <= channel:
        return []
    return [
        f"The search ended at {proposed:.4f} of the {job.budget.counted.unit}; its widths were fitted to the budget."
    ]


def _initial_variables(job: Run) -> Any:
    images = np.zeros((1, *job.dataset.image_shape), np.float32)
    return jax.jit(as_network(job.model).initial)(jax.random.key(job.config.seed), images)


def _train(
    job: Run, section: str, model: nn.Module, variables: Any, teacher: nn.Module | None = None, constants: Any = None
) -> Any:
    """One run of the trainer; returns the variables after the last step."""
    config = job.config[section]
    test = _evaluator(job, model, job.dataset.train)
    optimizer = training.make_optimizer(config, job.stage_steps(section)[1])
    state = _run_stage(
        job,
        section,
        training.train_step(_in_training(job, model), optimizer, config, teacher),
        training.init_state(variables, optimizer),
        constants,
        lambda state: _named("validation", test(training.variables(state), job.dataset.splits["validation"])),
    )
    return training.variables(state)


def _in_training(job: Run, model: nn.Module) -> nn.Module:
    """The model with batch statistics as the configuration wants them: of one device, or of all."""
    return model.clone(bn_axis_name=parallel.AXIS) if _syncs(job, model) else model


def _syncs(job: Run, model: nn.Module) -> bool:
    return job.config.parallel.sync_batch_norm and hasattr(model, "bn_axis_name")


def _run_stage(
    job: Run,
    section: str,
    step: training.Step,
    state: Any,
    constants: Any,
    evaluate: Callable[[Any], dict[str, float]],
) -> Any:
    config = job.config[section]
    steps, per_epoch = job.stage_steps(section)
    batch_size, folder = fields.step_batch(config), job.workdir / section
    stage = training.Stage(section, folder, steps, per_epoch, batch_size, config.chunk_steps, config.save_every)
    chunk = _over_devices(job, step, config.augment)

    def send(first: int) -> Any:  # called only where there are steps to take
        _forget(job, section)
        return job.send(section, config.augment, first, steps)

    return training.run(stage, chunk, state, job.constants(constants), send, evaluate, job.log)


def _over_devices(job: Run, step: training.Step, augment: bool) -> Callable[..., Any]:
    chunk = training.over_chunk(step, job.dataset.train, job.config.seed, augment)
    return parallel.data_parallel(chunk, mode=job.config.parallel.mode)


def _recalibrate(job: Run, model: nn.Module, variables: Any) -> Any:
    chunk = _over_devices(job, training.recalibration_step(_in_training(job, model)), augment=False)
    state = parallel.replicate(training.init_state(variables, optax.identity()))
    with job.send("finetune", False, 0, job.config.finetune.recalibration_steps) as chunks:
        for sent in chunks:
            state, _ = chunk(state, job.constants(None), parallel.shard_batches(sent))
    return training.variables(parallel.fetch(state))


def _evaluator(job: Run, model: nn.Module, images: data.Images) -> Callable[..., dict[str, float]]:
    def forward(variables: Any, pixels: jax.Array) -> jax.Array:
        return model.apply(variables, pixels, train=False)

    return training.evaluator(forward, images, job.config.eval_batch_size, job.config.parallel.mode)


def _masked_evaluator(job: Run, images: data.Images) -> Callable[..., dict[str, float]]:
    def forward(constants: Any, pixels: jax.Array) -> jax.Array:
        return apply_masked(job.model, constants["variables"], pixels, constants["masks"], job.topology)

    return training.evaluator(forward, images, job.config.eval_batch_size, job.config.parallel.mode)


def _named(images: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{images}_{name}": value for name, value in metrics.items()}


def _test(job: Run, model: nn.Module, variables: Any) -> dict[str, float]:
    test = job.dataset.test
    return _evaluator(job, model, test)(variables, np.arange(len(test)))


def _local_batch(config: ml_collections.ConfigDict) -> int:
    """Images of an evaluation batch that one device takes."""
    return config.eval_batch_size // jax.device_count()


def _latency(job: Run, networks: list[tuple[nn.Module, Any]]) -> dict[str, float]:
    """Median milliseconds of a device's share of an evaluation batch, whole and pruned network in turn."""
    batch = _local_batch(job.config)
    images = jax.device_put(np.zeros((batch, *job.dataset.image_shape), np.float32))
    calls = [
        functools.partial(jax.jit(functools.partial(m.apply, train=False)), jax.device_put(v)) for m, v in networks
    ]
    times = [[_seconds(call, images) for call in calls] for _ in range(8)]
    before, after = 1e3 * np.median(times[1:], axis=0)  # the first turn compiles
    return {"batch": batch, "before": float(before), "after": float(after)}


def _seconds(call: Callable[[Any], Any], images: jax.Array) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call(images))
    return time.perf_counter() - started


def _results(job: Run) -> dict[str, Any]:
    path = job.workdir / "results.json"
    return checkpoint.read_json(path) if path.exists() else {}


def _forget(job: Run, section: str) -> None:
    """Drops the results of a stage that takes steps, perhaps again, and of those after it."""
    stale = {name for stage in fields.STAGES[fields.STAGES.index(section) :] for name in _RESULTS[stage]}
    kept = {name: value for name, value in _results(job).items() if name not in stale}
    parallel.on_first_process(lambda: checkpoint.write_json_atomic(job.workdir / "results.json", kept))


def _once(job: Run, name: str, compute: Callable[[], Any]) -> Any:
    """Keeps the result of a finished stage in results.json, so that a resumed run does not measure it again."""
    results = _results(job)
    if parallel.any_process(name not in results):  # all processes measure, or none
        results[name] = compute()
        parallel.on_first_process(lambda: checkpoint.write_json_atomic(job.workdir / "results.json", results))
    return results[name]
