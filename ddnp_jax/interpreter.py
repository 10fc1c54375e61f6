"""Evaluates the traced program (jaxpr) of a network with masks in front of its layers, or in full precision."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from ddnp_jax.topology import jaxprs

Change = Callable[[jax.Array], jax.Array]  # maps the input of a layer to the input that is used instead


def evaluate(function: Callable[..., Any], interpreter: "Interpreter", *args: Any) -> Any:
    """Traces a function and evaluates its program."""
    result_tree = None

    def flat(*leaves: Any) -> list[Any]:
        nonlocal result_tree
        results, result_tree = jax.tree.flatten(function(*jax.tree.unflatten(tree, leaves)))
        return results

    leaves, tree = jax.tree.flatten(args)
    closed = jax.make_jaxpr(flat)(*leaves)
    return jax.tree.unflatten(result_tree, interpreter.run(closed.jaxpr, closed.consts, leaves))


class Interpreter:
    """Evaluates a program, and changes the inputs of some of its convolutions and matrix products."""

    def __init__(
        self,
        changes: Mapping[int, tuple[int, Change]] | None = None,
        kernel_shapes: Mapping[int, tuple[int, ...]] | None = None,
        *,
        keeps_rematerialization: bool = True,
    ) -> None:
        """Creates an interpreter.

        Args:
          changes: (index of the operand, function that changes it) by the number of the contraction.
          kernel_shapes: Shapes that the kernels must have, by the number of the contraction.
          keeps_rematerialization: Whether parts of the program inside `jax.checkpoint` remain inside it.
        """
        self._changes, self._kernel_shapes = changes or {}, kernel_shapes or {}
        self._keeps_rematerialization = keeps_rematerialization

    def run(self, jaxpr: core.Jaxpr, consts: Iterable[Any], args: Iterable[Any], first: int = 0) -> list[Any]:
        """Evaluates a program.

        Args:
          jaxpr: The program.
          consts: Its constants.
          args: Its arguments.
          first: Number of its first contraction.
        """
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        unchanged: list[core.JaxprEqn] = []  # computed together, which is faster than one at a time
        for eqn in jaxpr.eqns:
            number, first = first, first + jaxprs.count(eqn)
            if self._is_unchanged(number, first):
                unchanged.append(eqn)
                continue
            _compute_together(jaxpr, unchanged, known)
            unchanged = []
            operands = [atom.val if isinstance(atom, core.Literal) else known[atom] for atom in eqn.invars]
            known.update(zip(eqn.outvars, self._results(jaxpr, eqn, operands, number), strict=True))
        _compute_together(jaxpr, unchanged, known)
        return [atom.val if isinstance(atom, core.Literal) else known[atom] for atom in jaxpr.outvars]

    def _results(self, jaxpr: core.Jaxpr, eqn: core.JaxprEqn, operands: list[Any], first: int) -> list[Any]:
        program = jaxprs.program_of(eqn)
        if program is not None:
            return self._enter(eqn, program, operands, first)
        if eqn.primitive.name in jaxprs.CONTRACTIONS and first in self._changes:
            operand, change = self._changes[first]
            expected, found = self._kernel_shapes.get(first), jaxprs.shape_of(eqn.invars[1 - operand])
            if expected is not None and expected != found:
                raise ValueError(
                    f"the network's program differs from the one that was traced: a kernel has shape {found} instead "
                    f"of {expected}; trace the network again, with the arguments that it is called with now."
                )
            operands[operand] = change(operands[operand])
        return self.compute(jaxpr, eqn, operands)

    def _is_unchanged(self, first: int, end: int) -> bool:
        """Whether an equation with the contractions `first` to `end` - 1 is computed without changes."""
        return not any(number in self._changes for number in range(first, end))

    def _enter(self, eqn: core.JaxprEqn, program: Any, operands: list[Any], first: int) -> list[Any]:
        jaxpr, consts = program

        def run(*args: Any) -> list[Any]:
            return self.run(jaxpr, consts, args, first)

        if eqn.primitive.name in jaxprs.REMATERIALIZED and self._keeps_rematerialization:
            return jax.checkpoint(run, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])(*operands)
        return run(*operands)

    def compute(self, jaxpr: core.Jaxpr, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
        """Computes one equation of a program without changes."""
        known = {atom: value for atom, value in zip(eqn.invars, operands, strict=True) if _is_variable(atom)}
        _compute_together(jaxpr, [eqn], known)
        return [known[result] for result in eqn.outvars]


def _compute_together(jaxpr: core.Jaxpr, eqns: list[core.JaxprEqn], known: dict[Any, Any]) -> None:
    """Computes equations of a program from the values in `known`, and adds their results to `known`."""
    if not eqns:
        return
    results = [result for eqn in eqns for result in eqn.outvars]
    operands = dict.fromkeys(atom for eqn in eqns for atom in eqn.invars if _is_variable(atom) and atom in known)
    part = jaxpr.replace(constvars=[], invars=list(operands), outvars=results, eqns=eqns, effects=jaxpr.effects)
    values = core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))(*(known[atom] for atom in operands))
    known.update(zip(results, values, strict=True))


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


class FullPrecision(Interpreter):
    """Computes in float32 everything that a network computes in bfloat16 or another type of less than 32 bits."""

    def run(self, jaxpr: core.Jaxpr, consts: Iterable[Any], args: Iterable[Any], first: int = 0) -> list[Any]:
        """Evaluates a program, after converting its constants and arguments to float32."""
        return super().run(jaxpr, map(_widened, consts), map(_widened, args), first)

    def compute(self, jaxpr: core.Jaxpr, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
        """Computes one equation in float32. Equations that hold loops or branches are computed without changes."""
        name = eqn.primitive.name
        if name == "reduce_precision":
            return operands
        if name in _FIXED_TYPES or any(map(jaxprs.is_program, jax.tree.leaves(_programs(eqn)))):
            operands = [
                _of_type(value, jaxprs.dtype_of(atom)) for value, atom in zip(operands, eqn.invars, strict=True)
            ]
        else:
            eqn = eqn.replace(params=_wide_params(name, eqn.params), invars=list(map(_wide_literal, eqn.invars)))
            operands = list(map(_widened, operands))
        return list(map(_widened, super().compute(jaxpr, eqn, operands)))

    def _is_unchanged(self, first: int, end: int) -> bool:
        return False


class Portable(FullPrecision):
    """Computes in float32, and in its default form what has a form of its own for each platform."""

    def compute(self, jaxpr: core.Jaxpr, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
        """Computes one equation; which platform it runs on makes no difference."""
        if eqn.primitive.name == "platform_index":
            return [np.int32(0)]  # not looked at: the branch is known
        branch = jaxprs.default_branch_of(eqn)
        return super().compute(jaxpr, eqn, operands) if branch is None else self.run(*branch, operands[1:])


_FIXED_TYPES = ("bitcast_convert_type", "ffi_call", "pure_callback", "io_callback")


def _programs(eqn: core.JaxprEqn) -> list[Any]:
    return jax.tree.leaves(list(eqn.params.values()), is_leaf=jaxprs.is_program)


def _wide_type(dtype: Any) -> Any:
    """Returns float32 for a shorter floating-point type, and any other type unchanged."""
    is_short = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return np.dtype(np.float32) if is_short else dtype


def _widened(value: Any) -> Any:
    dtype = getattr(value, "dtype", None)
    return value if dtype is None or _wide_type(dtype) == dtype else value.astype(np.float32)


def _of_type(value: Any, dtype: Any) -> Any:
    return value if getattr(value, "dtype", dtype) == dtype else value.astype(dtype)


def _wide_literal(atom: Any) -> Any:
    return core.Literal(_widened(np.asarray(atom.val)), atom.aval) if isinstance(atom, core.Literal) else atom


def _wide_params(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    wide = {
        key: _wide_type(value)
        for key, value in params.items()
        if key in ("new_dtype", "dtype", "preferred_element_type") and value is not None
    }
    if name in jaxprs.CONTRACTIONS:
        wide["precision"] = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    return {**params, **wide}
