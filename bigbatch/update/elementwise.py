"""Whether an optimizer looks at one number of a parameter at a time, as its traced operations say.

If it does, it makes the same step of a piece of an array as of the whole, so its state can be
split. One that takes a norm, a matrix product or random numbers does not.
"""

from collections.abc import Iterator
from typing import Any

from jax.extend import core

# Operations whose every result follows from the numbers at its own place.
ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "div", "eq",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
    "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg",
    "nextafter", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n",
    "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}
# Operations that only do what is written inside of them.
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "cond",
         "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


def first_other(jaxpr: Any) -> str:
    """The name of the first operation on arrays that is not elementwise; "" if there is none.

    Operations on scalars alone may be any: the scalars of an optimizer are whole on every device.

    Args:
        jaxpr: the optimizer's update, traced.
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inside = list(_jaxprs(equation.params))
        if name in CALLS and inside:
            if found := next(filter(None, map(first_other, inside)), ""):
                return found
            continue
        taken = {one.aval.shape for one in equation.invars} - {()}
        made = {one.aval.shape for one in equation.outvars} - {()}
        fills = name == "broadcast_in_dim" and not taken  # an array of one number
        if not (fills or not (taken | made) or (name in ELEMENTWISE and len(taken | made) == 1)):
            return name
    return ""


def _jaxprs(value: Any) -> Iterator[Any]:
    """All jaxprs within the parameters of an operation."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _jaxprs(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _jaxprs(inner)
