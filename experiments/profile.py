"""Where the time of a step goes: our operations beside PyTorch's, and our longest operations by shape.

    python -m experiments.profile [--network=resnet56] [--stage=search] [--batch_size=128] [--steps=3] [--longest=12]

The steps are those of `experiments.benchmark`. Everything runs on one core and in one thread, so that the times of the
operations add up to that of the compiled program. The time of an operation does not include the operations inside it
(of a loop). XLA fuses elementwise operations into the convolutions before and behind them, whose time then includes
theirs.

Times are XLA's and PyTorch's own, by their profilers. For CPUs and Linux only; PyTorch is left out where it is not
installed.
"""

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from experiments import launch
from experiments.steps import NETWORKS, OURS, check_flags, ours, pytorch

# JAX and PyTorch are imported after the process is restricted to one core.

OUTPUTS, GRADIENTS = "convolutions: outputs", "convolutions: gradients"
NORMALIZATION = "normalization, activations, additions"
MATRIX_PRODUCTS, COPIES, OTHER = "matrix products", "copies and transposes", "other"
KINDS = (OUTPUTS, GRADIENTS, NORMALIZATION, MATRIX_PRODUCTS, COPIES, OTHER)

Result = TypeVar("Result")


class Operation(NamedTuple):
    """What an instruction of a compiled program computes.

    Attributes:
      kind: One of `KINDS`.
      detail: "output", "gradient of the input" or "gradient of the kernel" of a convolution, else the kind.
      shape: Type and shape of the result, such as f32[128,32,32,16].
    """

    kind: str
    detail: str
    shape: str


class Event(NamedTuple):
    """An operation's run, in nanoseconds."""

    name: str
    start: float
    duration: float


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")  # name, shape, opcode
_DEPTHWISE = "jit(_shifted_sum)"  # a depthwise convolution on a CPU, see `ddnp_jax.models.layers`
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")


def operations(program: str, network: str) -> dict[str, Operation]:
    """The operations of a compiled program by name.

    Args:
      program: The program's text (HLO, after optimization).
      network: Name of the network's class, by which its operations are told from others.
    """
    computations: dict[str, list[re.Match[str]]] = {}  # their instructions
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            inside = computations.setdefault(start[1], [])
        elif instruction := _INSTRUCTION.match(line):
            inside.append(instruction)
    found = {}
    for instruction in itertools.chain(*computations.values()):
        fused = re.search(r"calls=%?([\w.-]+)", instruction.string)
        parts = [instruction, *(computations[fused[1]] if fused else [])]
        found[instruction[1]] = Operation(*_kind(parts, network), re.sub(r"\{[^}]*\}", "", instruction[2]))
    return found


def _kind(parts: Sequence[re.Match[str]], network: str) -> tuple[str, str]:
    """Kind and detail of an operation, from its instruction and those that are fused into it."""
    from ddnp_jax.convolutions import KERNEL_GRADIENT

    text = "\n".join(part.string for part in parts)
    opcodes = {part[3] for part in parts}
    path = match[1] if (match := re.search(r'op_name="([^"]*)"', parts[0].string)) else ""
    if KERNEL_GRADIENT in text:
        return GRADIENTS, "gradient of the kernel"
    if "convolution" in opcodes or _DEPTHWISE in text:
        labels = re.search(r"dim_labels=\w+->(\w+)", text)
        # Of a convolution with stride, XLA gives the gradients names of their own and changes their axes.
        if "base-dilated" in text:
            return GRADIENTS, "gradient of the input"
        if "window-dilated" in text or (labels and not labels[1].startswith("b")):
            return GRADIENTS, "gradient of the kernel"
        return (GRADIENTS, "gradient of the input") if "transpose(" in path else (OUTPUTS, "output")
    if opcodes <= {"fusion", "copy", "transpose", "bitcast", "parameter", "reverse"}:
        return COPIES, COPIES
    if "dot" in opcodes:
        return MATRIX_PRODUCTS, MATRIX_PRODUCTS
    kind = NORMALIZATION if network in text else OTHER
    return kind, kind


def self_times(events: Iterable[Event]) -> Counter[str]:
    """Nanoseconds by operation, without the operations inside it. The events are those of one thread."""
    total: Counter[str] = Counter()
    around: list[Event] = []
    for event in sorted(events, key=lambda e: (e.start, -e.duration)):
        while around and event.start >= around[-1].start + around[-1].duration:
            around.pop()
        if around:
            total[around[-1].name] -= event.duration  # type: ignore[assignment]
        total[event.name] += event.duration  # type: ignore[assignment]
        around.append(event)
    return total


def profile_ours(stage: str, network: str, batch_size: int, steps: int) -> dict[Operation, tuple[int, float]]:
    """Runs our steps; returns the number of runs and the milliseconds per step of every operation."""
    candidate = ours(stage, "", NETWORKS[network]._replace(batch_size=batch_size))
    from jax.extend.backend import get_backend

    for _ in range(2):  # compiles, and warms up
        candidate.run_round()
    nanoseconds: Counter[tuple[str, str]] = Counter()
    runs: Counter[tuple[str, str]] = Counter()
    for _ in range(steps):
        for program, events in _traced(candidate.run_round):
            runs.update((program, event.name) for event in events)
            nanoseconds.update({(program, name): time for name, time in self_times(events).items()})
    texts = {m.name: m.to_string() for e in get_backend().live_executables() for m in e.hlo_modules()}
    known = {program: operations(texts[program], _class_of(network)) for program in {program for program, _ in runs}}
    result: dict[Operation, tuple[int, float]] = {}
    for (program, name), time in nanoseconds.items():
        operation = known[program].get(name, Operation(OTHER, OTHER, ""))
        count, milliseconds = result.get(operation, (0, 0.0))
        result[operation] = (count + runs[program, name] // steps, milliseconds + time / 1e6 / steps)
    return result


def _traced(run: Callable[[], Any]) -> list[tuple[str, list[Event]]]:
    """Runs a step; returns programs and their events, for each thread.

    Every step has a trace of its own: a trace's records take memory between those of the step, which then clears new
    memory (0.1 to 5 s per step of ResNet-56 after the third).
    """
    import jax
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        trace = ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    found: dict[tuple[str, str], list[Event]] = {}
    for plane in trace.planes:
        for thread in plane.lines:
            for event in thread.events:
                if program := dict(event.stats).get("hlo_module"):
                    entry = Event(event.name, event.start_ns, event.duration_ns)
                    found.setdefault((thread.name, program), []).append(entry)
    return [(program, events) for (_, program), events in found.items()]


def _class_of(network: str) -> str:
    from ddnp_jax import models

    return type(models.create(network, num_classes=10)).__name__


# PyTorch's operators by kind; all others are `OTHER`.
_PYTORCH = {
    OUTPUTS: r"aten::(mkldnn_|_)?convolution|aten::(_?conv_depthwise|thnn_conv|slow_conv|_slow_conv)\w*",
    GRADIENTS: r"aten::convolution_backward",
    MATRIX_PRODUCTS: r"aten::(addmm|mm|matmul|bmm)",
    NORMALIZATION: r"aten::((native_batch_norm|clamp|hard|threshold|relu|\w*pool|mean|silu)\w*|(add|mul|sum)_?)",
    COPIES: r"aten::(copy_|cat|_to_copy|clone|contiguous)",
}


def kind_in_pytorch(operator: str) -> str:
    """The kind of an operator of PyTorch, by its name."""
    return next((kind for kind, names in _PYTORCH.items() if re.fullmatch(names, operator)), OTHER)


def profile_pytorch(stage: str, network: str, batch_size: int, steps: int) -> dict[str, float]:
    """Runs PyTorch's steps; returns the milliseconds per step by kind."""
    import torch

    candidate = pytorch(stage, network, NETWORKS[network]._replace(batch_size=batch_size), "float32", "cpu")
    for _ in range(2):
        candidate.run_round()
    result: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for _ in range(steps):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            candidate.run_round()
        for event in trace.key_averages():
            result[kind_in_pytorch(event.key)] += event.self_cpu_time_total / 1e3 / steps
    return result


def _in_process(profile: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function in a process of its own, whose memory nothing else has divided."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(profile, *arguments).result()


def tables(own: Mapping[Operation, tuple[int, float]], other: Mapping[str, float] | None, longest: int) -> str:
    """The time by kind, ours and PyTorch's, and our longest operations by shape, in Markdown."""
    from ddnp_jax.pipeline.report import markdown

    of_kind = {kind: sum(ms for o, (_, ms) in own.items() if o.kind == kind) for kind in KINDS}
    total = sum(of_kind.values())
    compared = [f"{other[kind]:.1f}" for kind in KINDS] + [f"{sum(other.values()):.1f}"] if other else ["-"] * 7
    rows = [[kind, f"{ms:.1f}", f"{100 * ms / total:.1f}"] for kind, ms in (*of_kind.items(), ("all", total))]
    kinds = markdown.table(
        ("operations", "ours, ms", "ours, %", "PyTorch, ms"), [[*r, c] for r, c in zip(rows, compared, strict=True)]
    )
    first = sorted(own.items(), key=lambda item: -item[1][1])[:longest]
    shapes = markdown.table(
        ("operation", "result", "runs", "ms", "%"),
        [[o.detail, o.shape, str(n), f"{ms:.1f}", f"{100 * ms / total:.1f}"] for o, (n, ms) in first],
        text_columns=2,
    )
    return f"{kinds}\n\n{shapes}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
      ValueError: Names the flag.
      SystemExit: A flag is unknown, or its value of another type.
    """
    parser = launch.Parser(prog="python -m experiments.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet56", help=f"one of {', '.join(NETWORKS)}")
    parser.add_argument("--stage", default="search", help=f"one of {', '.join(OURS)}")
    parser.add_argument("--batch_size", type=int, help="images per step; by default the benchmark's")
    parser.add_argument("--steps", type=int, default=3, help="steps that are profiled")
    parser.add_argument("--longest", type=int, default=12, help="rows of the second table")
    flags = parser.parse_args(arguments)
    check_flags(flags, {"stage": OURS}, counts=("steps", "longest"))
    return flags


def main() -> None:
    """Profiles and prints the tables."""
    try:
        flags = parse()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ.update(NPROC="1", JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY="true")
    what: tuple[Any, ...] = (flags.stage, flags.network, flags.batch_size, flags.steps)
    own = _in_process(profile_ours, *what)
    other = _in_process(profile_pytorch, *what) if importlib.util.find_spec("torch") else None
    print(
        f"{flags.network}, {flags.stage}, {flags.batch_size} images, one core.\n\n{tables(own, other, flags.longest)}"
    )


if __name__ == "__main__":
    main()
