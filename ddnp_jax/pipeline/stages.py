"""The stages of the pipeline: base training, search, pruning, fine-tuning, control. Each resumes from the workdir."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
import optax

from ddnp_jax import cpu, data, methods, parallel, training
from ddnp_jax.compact import compact, verify
from ddnp_jax.config import Stage, TrainerConfig
from ddnp_jax.cost import correction, network_times, timing
from ddnp_jax.cost.budget import Budget
from ddnp_jax.fields import listed
from ddnp_jax.masking import apply_masked
from ddnp_jax.networks import Network, as_network, picked
from ddnp_jax.pipeline import exporting
from ddnp_jax.preemption import PreemptionGuard
from ddnp_jax.topology import Selection
from ddnp_jax.training import loop
from ddnp_jax.training.evaluation import evaluator, image_sums

if TYPE_CHECKING:
    from ddnp_jax.pipeline.job import Run


def base(job: "Run") -> Any:
    """Returns the weights of the unpruned network: from the workdir, from `base.weights`, or trained from scratch."""
    variables = job.weights
    if variables is None:
        start = initial_variables(job.network, job.dataset.image_shape, job.config.seed)
        variables = _train(job, "base", job.network, start, job.made_from())
    job.results.measured("base", job.made_from(variables), lambda: _test(job, job.network, variables))
    return variables


def search(job: "Run", variables: Any) -> Selection:
    """Learns which channels to keep; writes selection.json."""
    method = _method(job, variables)
    state = methods.initial_state(method, job.config.seed)
    if method.steps:
        evaluate = _cut_evaluator(job, method, variables)
        state = _run_stage(job, "search", method.step, state, variables, evaluate, job.made_from(variables))
    made_from = job.made_from(state)
    job.results.measured("proposed_p", made_from, lambda: _proposed_p(job, method, state))
    job.results.measured("search_notes", made_from, lambda: (*method.notes, *method.ended(state)))
    job.results.measured("search_steps", made_from, lambda: method.steps)
    budget = _corrected(job, method, state, made_from)
    selection = methods.select(method, state, budget)
    parallel.on_first_process(lambda: selection.save(job.workdir / "selection.json"))
    return selection


def _corrected(job: "Run", method: methods.Search, state: Any, made_from: str) -> Budget:
    """The budget; one in this device's latency is corrected by times of the networks that the search proposes."""

    def correct() -> dict[str, float] | None:
        found = correction.correct(job.budget, lambda budget: methods.select(method, state, budget).widths)
        return None if found is None else found._asdict()

    found = job.results.measured("latency_correction", made_from, correct)
    return job.budget if found is None else job.budget.with_savings(found["savings"])


def _proposed_p(job: "Run", method: methods.Search, state: Any) -> float | None:
    cost = methods.proposed_cost(method, state, job.budget)
    return None if cost is None else cost / job.budget.total


def search_curves(job: "Run", variables: Any, seeds: Sequence[int]) -> None:
    """Searches with several seeds at once, only for the log; `methods.seed_metric` names the metrics of each seed.

    The order and augmentation of the images depend on the configuration's seed and are the same for all.

    Raises:
      ValueError: The workdir's search has other seeds.
    """
    made_from = job.made_from(variables)
    begun = job.results.measured("seeds", made_from, lambda: list(seeds))
    if begun != list(seeds):
        raise ValueError(f"{job.workdir} searches from seeds {begun}, not {list(seeds)}; use another workdir.")
    method = _method(job, variables)
    evaluate_one = _cut_evaluator(job, method, variables)

    def evaluate(state: methods.Seeds) -> dict[str, float]:
        found = {seed: evaluate_one(state.of(place)) for place, seed in enumerate(seeds)}
        named = {methods.seed_metric(seed, k): value for seed, metrics in found.items() for k, value in metrics.items()}
        return named | {"validation_top1": float(np.mean([m["validation_top1"] for m in found.values()]))}

    state, step = methods.over_seeds(method, seeds)
    _run_stage(job, "search", step, state, variables, evaluate, made_from)


def _method(job: "Run", variables: Any) -> methods.Search:
    steps, _ = job.stage_steps("search")
    fields = job.config.search.method_fields()
    problem = methods.Problem(
        job.network.model, variables, job.topology, job.budget, fields, steps, outputs=job.outputs
    )
    search = methods.build(job.config.search.method, problem)
    return search if search.survey is None else _surveyed(job, search.survey, variables)


def _surveyed(job: "Run", survey: methods.Survey, variables: Any) -> methods.Search:
    """Returns the search after its survey of the search images, which is computed once and saved for resuming."""
    config, images = job.config, job.dataset.train

    def of(variables: Any, batch: training.Batch) -> tuple[jax.Array, ...]:
        return survey.of(variables, batch[0])

    sums = image_sums(of, images, config.eval_batch_size, config.parallel.mode, job.guard)

    def take() -> list[Any]:
        return [found.tolist() for found in sums(variables, job.stage_images("search"))]

    found = job.results.measured("survey", job.made_from(variables), take)
    cpu.hand_back_freed_memory()
    return survey.then([*map(np.asarray, found)])


def _cut_evaluator(job: "Run", method: methods.Search, variables: Any) -> Callable[[Any], dict[str, float]]:
    """Evaluates the network that a search's state proposes on held-out images and, if configured, test images."""
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


def cut(job: "Run", variables: Any, selection: Selection) -> tuple[Network, Any]:
    """Removes the channels, verifies the smaller network, and re-estimates batch statistics if configured."""
    model = job.network.model
    small_model, small_variables = compact(model, variables, selection, job.topology, job.rebuild)
    images = job.dataset.test.first(job.local_batch)
    verification = verify(model, variables, small_model, small_variables, selection, job.topology, images)
    made_from = job.made_from(variables, selection.kept)
    job.results.measured("verification", made_from, verification._asdict)
    small = as_network(small_model, **dict(job.topology.call_kwargs))
    small_variables = small.variables(small_variables)
    if job.config.finetune.recalibration_steps:
        small_variables = _recalibrate(job, small, small_variables)
    job.results.measured("unfinetuned", made_from, lambda: _test(job, small, small_variables))
    return small, small_variables


def finetune(job: "Run", variables: Any, selection: Selection, small: Network, small_variables: Any) -> Any:
    """Fine-tunes the smaller network."""
    # The selection and not the smaller variables: batch statistics are re-estimated when a run resumes.
    made_from = job.made_from(variables, selection.kept)
    tuned = _tuned(job, "finetune", variables, small, small_variables, made_from)
    made_from = job.made_from(tuned)
    job.results.measured("pruned", made_from, lambda: _test(job, small, tuned))
    job.results.measured("devices", made_from, parallel.description)
    networks = [(job.network, variables), (small, tuned)]
    timed_from = job.timed_from(network_times.XLA, tuned)
    job.results.measured("latency_ms", timed_from, lambda: _latency(job, networks, job.local_batch))
    job.results.measured("latency_ms_of_one", timed_from, lambda: _latency(job, networks, 1))
    if "onnx" in exporting.timed(job.config) and "onnx" not in listed(job.config.export):
        job.results.measured(
            "latencies_in_onnx",
            job.timed_from(network_times.ONNX, tuned),
            lambda: [
                {"runtime": exporting.RUNTIMES["onnx"], **_latency(job, networks, batch, network_times.ONNX)}
                for batch in sorted({1, job.local_batch})
            ],
        )
    return tuned


def control(job: "Run", variables: Any) -> Any:
    """Fine-tunes the unpruned network from its base weights, with the same recipe as the smaller one."""
    tuned = _tuned(job, "control", variables, job.network, variables, job.made_from(variables))
    job.results.measured("control", job.made_from(tuned), lambda: _test(job, job.network, tuned))
    return tuned


def _tuned(
    job: "Run",
    stage: Literal["finetune", "control"],
    variables: Any,
    network: Network,
    start: Any,
    made_from: str,
) -> Any:
    """Fine-tunes a network from `start`; `variables` are those of the unpruned network, a possible teacher."""
    config = job.config.finetune
    teacher, constants = None, None
    if config.distillation_weight:
        teacher = training.Distillation(job.network, config.distillation_weight, config.distillation_temperature)
        constants = variables
    return _train(job, stage, network, start, made_from, teacher, constants)


def initial_variables(network: Network, image_shape: Sequence[int], seed: int) -> Any:
    """Returns the initial variables of base training."""
    images = np.zeros((1, *image_shape), np.float32)
    return cpu.jit_for_one_call(network.initial)(jax.random.key(seed), images)


def schedule(config: TrainerConfig, updates_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate schedule of a trainer section, which is given in epochs."""
    steps = config.epochs * updates_per_epoch
    warmup_steps = min(round(config.warmup_epochs * updates_per_epoch), max(steps - 1, 0))
    return training.schedule(config.schedule, config.learning_rate, steps, warmup_steps, config.decay_at)


def optimizer(config: TrainerConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Returns the SGD optimizer of a trainer section.

    Args:
      config: Section of the trainer.
      steps_per_epoch: Steps per epoch, of which each update takes `micro_batches`.
    """
    rate = schedule(config, steps_per_epoch // config.micro_batches)
    return training.sgd(rate, config.momentum, config.weight_decay, config.micro_batches)


def _train(
    job: "Run",
    stage: Literal["base", "finetune", "control"],
    network: Network,
    variables: Any,
    made_from: str,
    distillation: training.Distillation | None = None,
    constants: Any = None,
) -> Any:
    """One run of the trainer; returns the variables after the last step."""
    config = job.config.base if stage == "base" else job.config.finetune
    validate = _evaluator(job, network, job.dataset.train, guard=None)  # what comes before a checkpoint is not stopped
    sgd = optimizer(config, job.stage_steps(stage)[1])
    step = training.train_step(
        network, sgd, label_smoothing=config.label_smoothing, outputs=job.outputs, distillation=distillation
    )
    held_out = job.dataset.splits["validation"]
    state = _run_stage(
        job,
        stage,
        step,
        training.init_state(network, variables, sgd),
        constants,
        lambda state: _named("validation", validate(state.variables(network), held_out)),
        made_from,
    )
    return state.variables(network)


def _run_stage(
    job: "Run",
    name: Stage,
    step: training.Step,
    state: Any,
    constants: Any,
    evaluate: Callable[[Any], dict[str, float]],
    made_from: str,
) -> Any:
    config = job.config.stage(name)
    steps, per_epoch = job.stage_steps(name)
    folder = job.workdir / name
    stage = loop.Stage(
        name, folder, steps, per_epoch, config.step_batch, config.chunk_steps, config.save_every, made_from
    )
    chunk = _over_devices(job, step, config.augment)

    def host_batches(first: int) -> Any:
        return job.host_batches(name, config.augment, first, steps)

    state = loop.fit_stage(stage, chunk, state, job.constants(constants), host_batches, evaluate, job.log, job.guard)
    cpu.hand_back_freed_memory()
    return state


def _over_devices(job: "Run", step: training.Step, augment: bool) -> loop.Chunk:
    devices = parallel.OVER_DEVICES
    if not job.config.parallel.sync_batch_norm:
        devices = devices._replace(batch_axis=None)
    chunk = training.chunk_of(step, job.dataset.train, job.config.seed, augment, devices)
    return parallel.data_parallel(chunk, mode=job.config.parallel.mode)


def _recalibrate(job: "Run", network: Network, variables: Any) -> Any:
    chunk = _over_devices(job, training.recalibration_step(network), augment=False)
    state = parallel.replicate(training.init_state(network, variables, optax.identity()))
    with job.host_batches("finetune", False, 0, job.config.finetune.recalibration_steps) as chunks:
        for host_batches in chunks:
            state, _ = chunk(state, job.constants(None), parallel.shard_batches(host_batches))
    return parallel.fetch(state).variables(network)


def _evaluator(
    job: "Run", network: Network, images: data.Images, guard: PreemptionGuard | None
) -> Callable[..., dict[str, float]]:
    def forward(variables: Any, pixels: jax.Array) -> jax.Array:
        return picked(network.evaluate(variables, pixels), job.outputs, network.name)

    return evaluator(forward, images, job.config.eval_batch_size, job.config.parallel.mode, guard)


def _masked_evaluator(job: "Run", images: data.Images) -> Callable[..., dict[str, float]]:
    """Evaluates a masked network before a checkpoint: not stopped on a signal, so that the checkpoint is saved."""

    def forward(constants: Any, pixels: jax.Array) -> jax.Array:
        found = apply_masked(job.network.model, constants["variables"], pixels, constants["masks"], job.topology)
        return picked(found, job.outputs, job.network.name)

    return evaluator(forward, images, job.config.eval_batch_size, job.config.parallel.mode)


def _named(images: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{images}_{name}": value for name, value in metrics.items()}


def _test(job: "Run", network: Network, variables: Any) -> dict[str, float]:
    test = job.dataset.test
    return _evaluator(job, network, test, job.guard)(variables, np.arange(len(test)))


def _latency(
    job: "Run", networks: Sequence[tuple[Network, Any]], batch: int, runtime: str = network_times.XLA
) -> dict[str, float]:
    """Median milliseconds of a batch on one device, of the unpruned and of the pruned network."""
    images = jax.device_put(np.zeros((batch, *job.dataset.image_shape), np.float32))
    calls = [
        network_times.compiled(runtime, network.evaluate, jax.device_put(own), images) for network, own in networks
    ]
    before, after = timing.in_turn(calls)
    return {"batch": batch, "before": before, "after": after}
