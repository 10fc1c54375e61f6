"""The budgets of the papers: FLOPs, reachable reductions and values of p for all their networks, as Markdown tables.

    python -m experiments.budgets

T_all are the FLOPs of the entire network per image, T_total those of its prunable layers, and p is the fraction of
T_total that remains; reductions are fractions of T_all. The smallest network keeps one channel per gate. All numbers
follow from the topology, without computations on a device.
"""

from typing import NamedTuple

from ddnp_jax import models, trace
from ddnp_jax.cost import flops
from ddnp_jax.pipeline.report import CONVENTIONS, table
from ddnp_jax.topology import Topology
from experiments import launch


class Data(NamedTuple):
    """A data set with the size of its images and its number of classes."""

    name: str
    image_shape: tuple[int, int, int]
    classes: int


class Pair(NamedTuple):
    """A network and a data set of the papers.

    Attributes:
      network: Name of the network in the papers.
      model: Name of the network in `models.create`.
      data: The data set.
      ddnp: Values of p in DDNP Table A1.
      nppm: Values of p in NPPM Table 1.
      printed: (p, removed percentage of all FLOPs) as printed in a paper.
    """

    network: str
    model: str
    data: Data
    ddnp: tuple[float, ...]
    nppm: tuple[float, ...]
    printed: tuple[tuple[float, float], ...] = ()


CIFAR10 = Data("CIFAR-10", (32, 32, 3), 10)
IMAGENET = Data("ImageNet", (224, 224, 3), 1000)
PAIRS = (
    Pair("ResNet-56", "resnet56", CIFAR10, (0.48,), (0.50,)),
    Pair("MobileNetV2", "mobilenet_v2_cifar", CIFAR10, (0.56,), (0.55,)),
    Pair("ResNet-34", "resnet34", IMAGENET, (0.55,), (0.50,)),
    Pair("ResNet-50", "resnet50", IMAGENET, (0.38, 0.31), (0.38,), ((0.38, 55.0), (0.31, 62.0))),
    Pair("ResNet-101", "resnet101", IMAGENET, (), (0.42,)),
    Pair("MobileNetV2", "mobilenet_v2", IMAGENET, (0.67,), (0.63,)),
    Pair("MobileNetV3-small", "mobilenet_v3_small", IMAGENET, (0.75,), ()),
    # NPPM does not state which of these three networks it prunes.
    Pair("ShuffleNetV2+ small", "shufflenet_v2_plus_small", IMAGENET, (), (0.70,)),
    Pair("ShuffleNetV2+ medium", "shufflenet_v2_plus_medium", IMAGENET, (), (0.70,)),
    Pair("ShuffleNetV2+ large", "shufflenet_v2_plus_large", IMAGENET, (), (0.70,)),
)


def topology(pair: Pair) -> Topology:
    """Traces the network of a pair."""
    return trace(models.create(pair.model, pair.data.classes), pair.data.image_shape)


def budgets_table(topologies: dict[Pair, Topology], convention: str) -> str:
    """Table of T_all, T_total, the smallest reachable network, and the reduction for each p of the papers."""
    header = ["network", "data set", "T_all (M)", "T_total (M)", "T_total / T_all (%)", "smallest p"]
    header += ["largest reduction (%)", "p (DDNP)", "reduction (%)", "p (NPPM)", "reduction (%)"]
    rows = []
    for pair, network in topologies.items():
        ones = [1] * len(network.gates)
        whole, prunable = flops.total(network, None, convention), flops.prunable(network, None, convention)
        rows.append(
            [
                *(pair.network, pair.data.name, f"{whole / 1e6:,.2f}", f"{prunable / 1e6:,.2f}"),
                f"{100 * prunable / whole:.2f}",
                f"{flops.prunable(network, ones, convention) / prunable:.4f}",
                f"{100 * (1 - flops.total(network, ones, convention) / whole):.1f}",
            ]
        )
        for values in (pair.ddnp, pair.nppm):
            reductions = (100 * flops.reduction_for_p(network, p, convention) for p in values)
            rows[-1] += [" / ".join(f"{p:.2f}" for p in values) or "-"]
            rows[-1] += [" / ".join(f"{reduction:.1f}" for reduction in reductions) or "-"]
    return table(header, rows, text_columns=2)


def printed_table(topologies: dict[Pair, Topology]) -> str:
    """Table of the reductions that a paper prints for its p: the actual reduction, and the p for the printed one."""
    header = ["network", "counted as", "p", "reduction (%)", "printed (%)", "difference", "p of the printed reduction"]
    rows = []
    for pair, network in topologies.items():
        for p, printed in pair.printed:
            for convention in CONVENTIONS:
                reduction = 100 * flops.reduction_for_p(network, p, convention)
                wanted = flops.p_for_reduction(network, printed / 100, convention)
                figures = (f"{reduction:.1f}", f"{printed:.1f}", f"{reduction - printed:+.1f}", f"{wanted:.4f}")
                rows.append([pair.network, convention, f"{p:.2f}", *figures])
    return table(header, rows, text_columns=2)


def main() -> None:
    """Prints the tables."""
    topologies = {pair: topology(pair) for pair in PAIRS}
    for convention, meaning in CONVENTIONS.items():
        print(f"FLOPs as `{convention}`: {meaning}.\n\n{budgets_table(topologies, convention)}\n")
    print(f"Reductions that a paper prints beside its p:\n\n{printed_table(topologies)}")


if __name__ == "__main__":
    launch.Parser(prog="python -m experiments.budgets", description=__doc__.splitlines()[0]).parse_args()
    main()
