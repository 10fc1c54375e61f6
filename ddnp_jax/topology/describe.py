"""Text description of a topology."""

from collections.abc import Iterator

from ddnp_jax.cost import flops
from ddnp_jax.topology.propagation import RESIDUAL
from ddnp_jax.topology.types import Extent, Topology

LISTED = 60  # layers up to which each one is listed
CHANNELS = "channels"


def describe(topology: Topology) -> str:
    """Gates, layers, what stays unpruned and why, and a summary.

    Long networks get a line per reason instead of a line per layer.
    """
    is_long = len(topology.layers) > LISTED
    lines = [f"gates: {len(topology.gates)}", *_gates(topology)]
    lines += [f"layers: {len(topology.layers)}", *(() if is_long else _layers(topology))]
    lines += [f"stays unpruned: {len(topology.unprunable)}", *_whole(topology, is_long), *_residual(topology)]
    return "\n".join([*lines, *_summary(topology)])


def _gates(topology: Topology) -> Iterator[str]:
    for i, gate in enumerate(topology.gates):
        consumers = ", ".join(dict.fromkeys(topology.layers[consumer.layer].name for consumer in gate.consumers))
        yield f"  {i}  {gate.name}: {gate.channels} {_unit(topology, i)}, read by {consumers}"


def _unit(topology: Topology, gate: int) -> str:
    """What is removed: channels, or whole groups of them."""
    producer = next((layer.outputs for layer in topology.layers if gate in layer.outputs.gates), Extent(0))
    size = dict(producer.counts).get(gate, 1)
    return CHANNELS if size == 1 else f"groups of {size} channels"


def _layers(topology: Topology) -> Iterator[str]:
    for layer in topology.layers:
        ends = {"from": layer.inputs.gates, "to": layer.outputs.gates}
        gates = "".join(f", {end} gate {gate}" for end, gates in ends.items() for gate in gates)
        yield f"  {layer.name}: kernel {layer.kernel_shape}, {layer.positions} positions{gates}"


def _whole(topology: Topology, is_long: bool) -> Iterator[str]:
    if not is_long:
        yield from (f"  {names}: {reason}" for names, reason in topology.unprunable)
        return
    by_kind: dict[str, list[str]] = {}
    for names, reason in topology.unprunable:
        kinds = "; ".join(part.partition(" (")[0] for part in reason.split("; "))
        by_kind.setdefault(kinds, []).extend(names.split(", "))
    for kind, layers in by_kind.items():
        shown = ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")
        yield f"  {kind}: {len(layers)} layers ({shown})"


def _residual(topology: Topology) -> Iterator[str]:
    if any(RESIDUAL in reason for _, reason in topology.unprunable):
        yield "  residual=True (--residual, or budget.residual of a configuration) includes residual additions."


def _summary(topology: Topology) -> Iterator[str]:
    total, parameters = flops.total(topology), flops.parameters(topology)
    smallest = [1] * len(topology.gates)
    least, least_parameters = flops.total(topology, smallest), flops.parameters(topology, smallest)
    share = 100 * flops.prunable(topology) / max(total, 1)
    has_groups = any(_unit(topology, gate) != CHANNELS for gate in range(len(topology.gates)))
    units = "channels and groups of channels" if has_groups else CHANNELS
    yield (
        f"summary: {len(topology.gates)} gates with {sum(topology.widths)} {units}; {share:.1f} % of the "
        f"{total / 1e6:,.2f} M multiply-accumulates are in layers that can be pruned."
    )
    yield (
        f"  smallest reachable: {least / 1e6:,.2f} M multiply-accumulates ({100 * least / max(total, 1):.1f} %), "
        f"{least_parameters / 1e6:,.3f} M of {parameters / 1e6:,.3f} M parameters "
        f"({100 * least_parameters / max(parameters, 1):.1f} %)."
    )
