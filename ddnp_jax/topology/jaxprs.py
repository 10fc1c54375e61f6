"""Reading the program (jaxpr) of a network: which equations hold inner programs, and how its layers are numbered.

Convolutions and matrix products are numbered in the order of the program, including those of inner programs. The
numbers are therefore the same when the network is traced again with another batch size or other data types.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

CONTRACTIONS = ("conv_general_dilated", "dot_general")

# Operations that are counted to compare a program with that of the same network at other widths.
_ARITHMETIC = (*CONTRACTIONS, "add", "add_any", "concatenate", "div", "exp", "logistic", "max", "mul", "sub", "tanh")

# Equations that hold an inner program that runs once, and the parameters that may hold the program.
REMATERIALIZED = ("checkpoint", "remat", "remat2")
DIFFERENTIATED = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_CALLS = ("closed_call", "core_call", "jit", "pjit", *REMATERIALIZED, *DIFFERENTIATED)
_PROGRAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def program_of(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, tuple[Any, ...]] | None:
    """The inner program of an equation that runs it once, with its constants; None for other equations."""
    if eqn.primitive.name not in _CALLS:
        return None
    return _opened(next(eqn.params[name] for name in _PROGRAMS if name in eqn.params))


def default_branch_of(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, tuple[Any, ...]] | None:
    """The last branch of a `jax.lax.platform_dependent`, whose branches are all the same function; else None."""
    if eqn.primitive.name != "cond" or not eqn.params.get("branches_platforms"):
        return None
    return _opened(eqn.params["branches"][-1])


def _opened(program: Any) -> tuple[core.Jaxpr, tuple[Any, ...]]:
    return (program.jaxpr, tuple(program.consts)) if isinstance(program, core.ClosedJaxpr) else (program, ())


def shape_of(atom: Any) -> tuple[int, ...]:
    """Shape of an operand or a result of an equation; JAX's type annotations do not say that these are arrays."""
    return atom.aval.shape


def dtype_of(atom: Any) -> Any:
    """Data type of an operand or a result of an equation."""
    return atom.aval.dtype


def contractions(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The convolutions and matrix products of a program, in the order of their numbers."""
    for eqn in jaxpr.eqns:
        inner = program_of(eqn) or default_branch_of(eqn)
        if eqn.primitive.name in CONTRACTIONS:
            yield eqn
        elif inner is not None:
            yield from contractions(inner[0])


def count(eqn: core.JaxprEqn) -> int:
    """Number of convolutions and matrix products in an equation, including its inner program."""
    inner = program_of(eqn) or default_branch_of(eqn)
    return int(eqn.primitive.name in CONTRACTIONS) if inner is None else sum(1 for _ in contractions(inner[0]))


def arithmetic(jaxpr: core.Jaxpr) -> Counter[str]:
    """Number of each arithmetic operation in a program; operations that only rearrange arrays are not counted."""
    found = Counter(eqn.primitive.name for eqn in jaxpr.eqns if eqn.primitive.name in _ARITHMETIC)
    for eqn in jaxpr.eqns:
        for program in _programs(eqn):
            found += arithmetic(program)
    return found


def _programs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """All inner programs of an equation, including loops and branches."""
    found = jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program)
    return [_opened(program)[0] for program in found if is_program(program)]


def holds_contractions(eqn: core.JaxprEqn) -> bool:
    """Whether any inner program of an equation, including loops, has a convolution or matrix product."""
    return any(
        inner.primitive.name in CONTRACTIONS or holds_contractions(inner)
        for program in _programs(eqn)
        for inner in program.eqns
    )


def is_program(x: Any) -> bool:
    """Whether a parameter of an equation is a program."""
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)
