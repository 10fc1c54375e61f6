"""Removes channels from a network, and verifies the smaller network against the masked one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax.interpreter import FullPrecision, evaluate
from ddnp_jax.masking import apply_masked
from ddnp_jax.models.layers import Backbone
from ddnp_jax.networks import (
    LeafPath,
    Network,
    Outputs,
    Resizing,
    as_network,
    first_line,
    flatten,
    picked,
    replace_leaves,
)
from ddnp_jax.topology import Selection, Topology, jaxprs, variable_shapes

Rebuild = Callable[[tuple[int, ...]], Any]  # builds the smaller network from the channels per gate


class Verification(NamedTuple):
    """How close the outputs of a smaller network are to those of the masked one.

    Attributes:
      max_difference: Largest absolute difference of an output.
      argmax_agreement: Fraction of the predictions (argmax along the last axis) that agree.
    """

    max_difference: float
    argmax_agreement: float


def compact(
    model: Any, variables: Any, selection: Selection, topology: Topology, rebuild: Rebuild | None = None
) -> tuple[Any, Any]:
    """Removes the channels that are not selected from a network.

    A linen module is returned wrapped in `ddnp_jax.Resized`, an ordinary module that gives the layers their new sizes;
    this library's own models are returned with smaller `widths`; an nnx module as a smaller copy that holds its
    variables. A function must accept the smaller variables unchanged. If the network's code has hard-coded channel
    counts, `rebuild` builds the smaller network.

    Args:
      model: The network, of any kind that `trace` takes.
      variables: Variables of the network; None for an nnx module, which holds them.
      selection: The channels to keep.
      topology: Topology of `model`, as returned by `trace`.
      rebuild: Builds the smaller network from the channels per gate, in the order of `topology.gates`.

    Returns:
      The smaller network and its variables (None for an nnx module), without any masks.

    Raises:
      ValueError: The selection does not match, or the network cannot be called with the smaller variables.
    """
    network = _network(model, topology)
    variables = network.variables(variables)
    topology.check(variables)
    leaves = flatten(variables)
    for (path, axis), stays in selection.positions(topology).items():
        leaves[path] = np.take(np.asarray(leaves[path]), stays, axis)
    leaves = {path: jnp.array(leaf) for path, leaf in leaves.items()}  # copies, independent of the given variables
    cut = replace_leaves(variables, leaves)
    small = _smaller(
        network, variables, {path: np.shape(leaf) for path, leaf in leaves.items()}, topology, selection, rebuild
    )
    _check_sizes(small, cut, topology, is_rebuilt=rebuild is not None)
    _check_program(network, variables, small, cut, topology)
    return small.bind(cut)


def _network(model: Any, topology: Topology) -> Network:
    return as_network(model, **dict(topology.call_kwargs))


def _image(topology: Topology) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *topology.input_shape), jnp.float32)


def _smaller(
    network: Network,
    variables: Any,
    shapes: Mapping[LeafPath, tuple[int, ...]],
    topology: Topology,
    selection: Selection,
    rebuild: Rebuild | None,
) -> Network:
    """Builds the smaller network, which does not hold the pruned variables yet."""
    if rebuild is not None:
        return _network(rebuild(selection.widths), topology)
    if isinstance(network.model, Backbone) and len(network.model.inner_widths) == len(selection.widths):
        return _network(network.model.clone(widths=selection.widths), topology)
    resizing = _resizing(shapes, topology)
    if not resizing.shapes:
        return network
    return _network(network.with_sizes(network.sizes(resizing, variables, _image(topology))), topology)


def _resizing(shapes: Mapping[LeafPath, tuple[int, ...]], topology: Topology) -> Resizing:
    changed = {
        variable.path: (variable.shape, shapes[variable.path])
        for variable in topology.variables
        if variable.shape != shapes[variable.path]
    }
    groups = {}
    for layer in topology.layers:
        if layer.groups > 1 and layer.path in changed:
            old, new = changed[layer.path]
            groups[layer.path] = (layer.groups, layer.groups * int(np.prod(new)) // int(np.prod(old)))
    return Resizing(changed, groups)


def _check_sizes(small: Network, cut: Any, topology: Topology, is_rebuilt: bool) -> None:
    """Compares the shapes that the smaller network expects, where known, with those of the pruned variables."""
    if small.kind == "function" or (small.kind == "nnx" and not is_rebuilt):
        return
    expected = {path: np.shape(leaf) for path, leaf in flatten(variable_shapes(small, _image(topology))).items()}
    found = {path: np.shape(leaf) for path, leaf in flatten(cut).items()}
    for path in expected | found:
        if expected.get(path) != found.get(path):
            raise ValueError(
                f"the smaller model expects {'/'.join(path)} with shape {expected.get(path)}, the cut gives "
                f"{found.get(path)}; "
                + (
                    "its numbers of channels must be the widths, in the order of `topology.gates`."
                    if is_rebuilt
                    else "its code sets the size of this layer itself: pass rebuild=, a function of the widths, or "
                    "leave the gate unpruned with keep=."
                )
            )


def _check_program(network: Network, variables: Any, small: Network, cut: Any, topology: Topology) -> None:
    """Raises if the smaller network cannot be called or computes something else; both networks are only traced."""
    image = _image(topology)
    whole = jax.make_jaxpr(network.evaluate)(variables, image)
    try:
        smaller = jax.make_jaxpr(small.evaluate)(cut, image)
    except Exception as error:  # the network's own code may raise any error
        raise ValueError(
            f"{network.name} cannot be called with fewer channels ({first_line(error)}); its code has hard-coded "
            "numbers of channels: pass rebuild=, a function of the widths, or leave these gates unpruned with keep=."
        ) from error
    if [leaf.shape for leaf in whole.out_avals] != [leaf.shape for leaf in smaller.out_avals]:
        raise ValueError(
            f"{network.name} returns other shapes with fewer channels; pass rebuild=, a function of the widths."
        )
    before, after = (jaxprs.arithmetic(program.jaxpr) for program in (whole, smaller))
    differing = [
        f"{after[name]} {name} instead of {before[name]}" for name in before | after if before[name] != after[name]
    ]
    if differing:
        raise ValueError(
            f"{network.name} computes something else with fewer channels ({', '.join(differing)}), because its "
            "code depends on numbers of channels; change the code, or leave these gates unpruned with keep=."
        )


def verify(
    model: Any,
    variables: Any,
    small_model: Any,
    small_variables: Any,
    selection: Selection,
    topology: Topology,
    images: Any,
    tolerance: float = 1e-4,
    outputs: Outputs = None,
) -> Verification:
    """Verifies that a smaller network computes the same as the masked network that it was made from.

    Both compute in float32, even if their modules specify a lower precision: in bfloat16, a different summation order
    would hide real differences. All variables must be finite; a forward pass might not reveal NaN, because a ReLU can
    turn it into 0.

    Args:
      model: The unpruned network.
      variables: Variables of the unpruned network; None for an nnx module.
      small_model: The smaller network.
      small_variables: Variables of the smaller network; None for an nnx module.
      selection: The channels that are kept.
      topology: Topology of the unpruned network, as returned by `trace`.
      images: Images (N, *topology.input_shape).
      tolerance: Maximum difference of an output, relative to the largest absolute value of that output of the masked
        network.
      outputs: Key, index or function that selects the outputs to compare; None for all of them.

    Returns:
      The largest difference, and the fraction of predictions that agree.

    Raises:
      ValueError: The networks differ by more than the tolerance, or a variable or output is not finite.
    """
    whole, small = _network(model, topology), _network(small_model, topology)
    variables, small_variables = whole.variables(variables), small.variables(small_variables)
    check_finite(variables, "the network")
    check_finite(small_variables, "the smaller network")
    masks = selection.masks(topology)
    # The masks are arguments, so that the cache of compiled programs has one program for all selections.
    masked = jax.jit(lambda v, x, masks: apply_masked(model, v, x, masks, topology, interpreter=FullPrecision))
    cut = jax.jit(lambda v, x: evaluate(small.evaluate, FullPrecision(), v, x))
    images = jnp.asarray(images)
    pairs = [
        [np.asarray(leaf) for leaf in jax.tree.leaves(found if outputs is None else picked(found, outputs))]
        for found in (masked(variables, images, masks), cut(small_variables, images))
    ]
    return compare_outputs(list(zip(*pairs, strict=True)), tolerance, "the smaller network", "the masked one")


def compare_outputs(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], tolerance: float, which: str, reference: str
) -> Verification:
    """Compares the outputs of two forms of a network.

    Args:
      pairs: Reference and actual value of each output, of the same shape and of any type of numbers.
      tolerance: Maximum difference, relative to the output's largest absolute value.
      which: Name of the compared network in messages.
      reference: Name of the reference network in messages.

    Raises:
      ValueError: An output differs by more than the tolerance, or is not finite.
    """
    # Booleans cannot be subtracted, and differences of unsigned numbers would wrap around.
    pairs = [(_floating(masked), _floating(cut)) for masked, cut in pairs]
    differences = [float(np.max(np.abs(masked - cut))) for masked, cut in pairs]
    agreement = float(np.mean(np.concatenate([np.ravel(a.argmax(-1) == b.argmax(-1)) for a, b in pairs])))
    for (masked, _), difference in zip(pairs, differences, strict=True):
        allowed = tolerance * float(np.max(np.abs(masked)))
        if not difference <= allowed:  # NaN too
            raise ValueError(
                f"{which} does not compute what {reference} does: logits differ by up to "
                f"{difference:.3g} (allowed: {allowed:.3g}), and {agreement:.2%} of the predictions agree."
            )
    return Verification(max(differences), agreement)


def _floating(array: np.ndarray) -> np.ndarray:
    return array.astype(np.result_type(array, np.float32))


def check_finite(variables: Any, whose: str) -> None:
    """Raises if a variable is NaN or infinite.

    Args:
      variables: Variables of a network.
      whose: Name of the network in the message.

    Raises:
      ValueError: A variable is not finite; the message names the first one.
    """
    for path, leaf in flatten(variables).items():
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            bad = np.size(leaf) - int(np.isfinite(np.asarray(leaf, np.float32)).sum())
            if bad:
                raise ValueError(
                    f"variable {'/'.join(path)} of {whose} has {bad} values that are NaN or infinite; give weights "
                    "that are finite."
                )


def rehearse(
    model: Any,
    variables: Any,
    topology: Topology,
    smallest: tuple[int, ...],
    rebuild: Rebuild | None = None,
) -> tuple[Any, Any]:
    """Prunes a network at random and verifies it, so that a network that cannot be pruned fails before the search.

    Args:
      model: The network.
      variables: Variables of the network; None for an nnx module.
      topology: Topology of `model`, as returned by `trace`.
      smallest: Minimum number of channels per gate.
      rebuild: Builds the smaller network, as for `compact`.

    Returns:
      A smaller network and its variables, as `compact` returns them.

    Raises:
      ValueError: The network cannot be pruned; the message names the gates at which it fails.
    """
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, *topology.input_shape)).astype(np.float32)

    def cut(widths: Sequence[int]) -> tuple[Selection, tuple[Any, Any]]:
        kept = (rng.choice(whole, width, replace=False) for whole, width in zip(topology.widths, widths, strict=True))
        selection = Selection(tuple(tuple(sorted(map(int, each))) for each in kept))
        return selection, compact(model, variables, selection, topology, rebuild)

    def attempt(gates: set[int]) -> tuple[Any, Any]:
        # Widths that differ as much as possible, so that swapped widths do not match by chance.
        selection, small = cut(
            [
                least + (3 * i + 1) % (channels - least) if channels > least and i in gates else channels
                for i, (channels, least) in enumerate(zip(topology.widths, smallest, strict=True))
            ]
        )
        verify(model, variables, *small, selection, topology, images)
        return small

    everything = set(range(len(topology.gates)))
    try:
        small = attempt(everything)
    except ValueError as error:
        names = [topology.gates[i].name for i in sorted(everything) if rebuild is None and _fails(attempt, i)]
        if not names:
            raise
        listed = ", ".join(map(repr, names))
        raise ValueError(f"{error} It happens at the gates {listed}: keep=({listed},) leaves them unpruned.") from error
    # Also try equal widths, because code that compares widths may branch differently.
    common = max(*smallest, min(topology.widths) // 2)
    cut([min(common, channels) for channels in topology.widths])
    return small


def _fails(attempt: Callable[[set[int]], Any], gate: int) -> bool:
    try:
        attempt({gate})
    except ValueError:
        return True
    return False
