"""The cost of DDNP's generators and of NPPM's predictor and memory, in seconds per search step (DDNP suppl. C, end).

    python -m experiments.generator_cost [--rounds=20] [--only=resnet56,resnet50]

The search steps are measured in turn, each in its own process (`experiments.interleaved`). The images are synthetic, of
10 classes, and not augmented. The paper reports 0.136 -> 0.143 s per iteration for ResNet-56 on CIFAR-10 (x1.051) and
1.08 -> 1.15 s for ResNet-50 on ImageNet (x1.065), on its own hardware.
"""

from collections.abc import Mapping
from statistics import median

from ddnp_jax.pipeline.report import table
from experiments import interleaved, launch, steps
from experiments.interleaved import Measurement

NETWORKS = {
    "resnet56": steps.NETWORKS["resnet56"]._replace(batch_size=256),
    # Small images, so that it can run on a CPU.
    "resnet50": steps.NETWORKS["resnet50"]._replace(image_shape=(64, 64, 3), batch_size=64),
}
SCALARS, GENERATORS, DG, NPPM = "DDNP, scalars", "DDNP, generators", "DG", "NPPM"
STEPS = {SCALARS: "scalar", GENERATORS: "ddnp", DG: "dg", NPPM: "nppm"}  # row -> argument of the configuration
RATIOS = {
    (GENERATORS, SCALARS): "the generators",
    (NPPM, GENERATORS): "the method",
    (NPPM, DG): "PN and memory",
}


def measure(name: str, rounds: int) -> str:
    """Measures a network of `NETWORKS`; returns the results as Markdown."""
    network = NETWORKS[name]
    candidates = {step: (steps.ours, "search", argument, network) for step, argument in STEPS.items()}
    measured, about = interleaved.interleave(candidates, rounds, name)
    size = "x".join(map(str, network.image_shape[:2]))
    where = f"{about[SCALARS]['device']}, {about[SCALARS]['version']}"
    title = f"{name}, {network.batch_size} images of {size} per step, {rounds} rounds, on {where}"
    return f"{title}\n\n{tables(measured)}\n"


def tables(measured: Mapping[str, Measurement]) -> str:
    """Median seconds per step, peak memory, and the medians of `RATIOS` over all rounds, as Markdown tables."""
    rows = [[step, f"{median(own.seconds):.3f}", f"{own.peak_bytes / 2**20:.0f}"] for step, own in measured.items()]
    ratios = [
        [what, f"{step} / {other}", f"{interleaved.ratio(measured[step].seconds, measured[other].seconds):.3f}"]
        for (step, other), what in RATIOS.items()
    ]
    return (
        f"{table(['search step', 'seconds', 'peak MiB'], rows)}\n\n"
        f"{table(['what', 'steps', 'ratio of seconds'], ratios, text_columns=2)}"
    )


def main() -> None:
    """Measures the networks of the command line and prints the tables."""
    parser = launch.Parser(prog="python -m experiments.generator_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, separated by commas")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each step")
    flags = parser.parse_args()
    names = flags.only.split(",")
    if unknown := [name for name in names if name not in NETWORKS]:
        parser.error(f"--only={unknown[0]} is unknown; use {', '.join(NETWORKS)}, separated by commas.")
    if flags.rounds < 1:
        parser.error(f"--rounds={flags.rounds} must be at least 1.")
    for name in names:
        print(measure(name, flags.rounds))


if __name__ == "__main__":
    main()
