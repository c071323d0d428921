"""Whether a network keeps ghost batches apart, told from its traced operations alone.

The network is traced on two ghost batches, and each operation is followed with the answer to one
question: on which ghost batches do the entries of this array depend? (Random numbers for a whole
batch that are drawn from one key depend on the places of all of its examples.) Nothing is computed
or compiled, so it takes milliseconds whatever the network and the size of its images. The price is
that the answer is a lower bound. Of operations that are not listed here, of loops over examples,
and where a constant that differs between examples may mask them, nothing is claimed. So what is
refused mixes examples, and what passes was not seen to.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from bigbatch.mistake import Mistake
from bigbatch.update import dependence_rules as rules
from bigbatch.update.dependence import Dependence, by_ghost, constant, joined, relabelled
from bigbatch.update.user_lines import is_users


def of_inputs(shape: Sequence[int]) -> Dependence:
    """That of an array with the examples on its first axis; a single number depends on none."""
    if not shape:
        return Dependence()
    return Dependence(0, {0: by_ghost(shape[0])}, frozenset(range(len(shape))))


def is_apart(found: Dependence, shape: Sequence[int]) -> bool:
    """Whether no entry depends on another ghost batch than its own, by its place on axis 0."""
    if not shape:
        return found.none
    strange = [~by_ghost(shape[0]) & (found.everywhere | found.along.get(0, np.uint8(0)))]
    others = [found.along[axis] for axis in found.along if axis]
    return not np.any(strange) and not any(bits.any() for bits in others)


def refuse_mixing(name: str, found: Any, shapes: Any, remedy: str) -> None:
    """Raises Mistake if a ghost batch's results were seen to depend on other examples.

    Args:
        name: of what was traced.
        found: a tree of dependences, from `trace`.
        shapes: those of their arrays.
        remedy: what to look at in the place of the other examples.
    """
    if one := _mixing(found, shapes):
        raise Mistake(
            f"{name} mixes the examples of a batch{one.origin and ' at ' + one.origin}, so its "
            "result would depend on how a batch is cut over devices and microbatches; look at one "
            f"example at a time, {remedy}; draw random numbers from the keys it is called with, "
            "one per example."
        )


def _mixing(found: Any, shapes: Any) -> Dependence | None:
    """The first of a tree's dependences that is not apart; None if all are."""
    dependences = jax.tree.leaves(found, is_leaf=lambda one: isinstance(one, Dependence))
    return next((one for one, leaf in zip(dependences, jax.tree.leaves(shapes), strict=True)
                 if not is_apart(one, leaf.shape)), None)


def follow(jaxpr: core.Jaxpr, inputs: Sequence[Dependence]) -> list[Dependence]:
    """The dependences of the results of `jaxpr` on those of its inputs; constants have none."""
    known: dict[Any, Dependence] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Dependence:
        if isinstance(atom, core.Literal):
            return Dependence()
        return known.get(atom) or constant(atom.aval.shape)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        for variable, result in zip(equation.outvars, _results(equation, operands), strict=True):
            known[variable] = result
    return [read(atom) for atom in jaxpr.outvars]


def _results(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """The dependences of an equation's results, with the user's line if it is the first to mix."""
    name = equation.primitive.name
    rule = RULES.get(name, rules.unknown)
    try:
        results = rule(equation, operands)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
        # A release of JAX may give an operation other parameters, which is no mistake of a user's.
        results = rules.unknown(equation, operands)
    if all(operand.none for operand in operands):
        drawn = name == "random_bits" or any(operand.drawn for operand in operands)
        return [result._replace(drawn=drawn or result.drawn) for result in results]
    origins = [operand.origin for operand in operands if operand.origin]
    for at, result in enumerate(results):
        if result.mixed and not result.origin:
            origin = origins[0] if origins else _line_of(equation)
            results[at] = result._replace(origin=origin)
    return results


def _line_of(equation: Any) -> str:
    """The user's line that asked for an equation: the innermost outside of the libraries."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if is_users(frame.file_name):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


def _call(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    key = next(key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params)
    inner = equation.params[key]
    inner = getattr(inner, "jaxpr", inner)
    return follow(inner, operands)


def _cond(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """What the results of any branch depend on, and the choice between them."""
    chosen, *given = operands
    branches = [follow(getattr(branch, "jaxpr", branch), given)
                for branch in equation.params["branches"]]
    either = [joined(results) for results in zip(*branches, strict=True)]
    return [one._replace(everywhere=one.everywhere | chosen.everywhere) for one in either]


def _scan(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """A few rounds of the loop's body; of arrays it runs over, the axis it runs over is dropped."""
    parameters = equation.params
    if "num_consts" in parameters:
        constants, carried = parameters["num_consts"], parameters["num_carry"]
    else:  # since JAX 0.12
        constants, carried, _ = (len(list(tree.vals)) for tree in parameters["ft_in"].unpack())
    inner = getattr(parameters["jaxpr"], "jaxpr", parameters["jaxpr"])
    before, carry, over = (operands[:constants], operands[constants : constants + carried],
                           operands[constants + carried :])
    over = [relabelled(one, lambda axis: axis - 1 if axis else None) for one in over]
    results = [*carry, *(constant(out.aval.shape) for out in equation.outvars[carried:])]
    for _ in range(min(parameters["length"], 3)):
        results = follow(inner, [*before, *carry, *over])
        carry = results[:carried]
    stacked = [relabelled(one, lambda axis: axis + 1)._replace(origin=one.origin)
               for one in results[carried:]]
    return [*carry, *stacked]


# Those of operations that hold others go beside those of all others.
RULES = rules.RULES | {
    **dict.fromkeys(
        ["jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
         "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"], _call),
    "scan": _scan, "cond": _cond,
}


def trace(function: Callable, constants: Any, *of_examples: Any) -> tuple[Any, Any]:
    """Traces `function(constants, *of_examples)` on `GHOSTS` ghost batches.

    Args:
        function: returns a tree of arrays.
        constants: a tree of shapes.
        of_examples: trees of shapes, each with the examples of all ghost batches on its first axis.

    Returns:
        The shapes of the results, and a tree with the `Dependence` of each.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(constants, *of_examples)
    known = [constant(leaf.shape) for leaf in jax.tree.leaves(constants)]
    known += [of_inputs(leaf.shape) for leaf in jax.tree.leaves(of_examples)]
    found = follow(closed.jaxpr, known)
    return shapes, jax.tree.unflatten(jax.tree.structure(shapes), found)
