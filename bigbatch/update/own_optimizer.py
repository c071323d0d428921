"""An optimizer of the user's own, which `config.optimizer.name` names by its dotted path.

The path names a function that returns an `optax.GradientTransformation`, as Optax's own `scale_by_`
functions are: without a learning rate, which every update applies after it. docs/optimizers.md has
examples.
"""

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from bigbatch import dotted
from bigbatch.mistake import Mistake
from bigbatch.schedule.rates import Rates
from bigbatch.update import elementwise
from bigbatch.update.user_lines import is_users

Tree = Any
INPUTS = ("momentum", "beta2", "weight_decay")  # texts in the options that stand for a rate
KEY = "config.optimizer.name"


def is_own(config: ConfigDict) -> bool:
    """Whether the config names its optimizer by a dotted path."""
    return dotted.is_dotted(config.optimizer.name)


def decays_itself(config: ConfigDict) -> bool:
    """Whether the optimizer is given the weight decay, so that the update adds none to it."""
    return "weight_decay" in config.optimizer.options.values()


def make(config: ConfigDict, rates: Rates) -> optax.GradientTransformation:
    """Calls the function of `config.optimizer.name` with `config.optimizer.options`.

    Args:
        config: of the run.
        rates: scalar arrays, which take the places of the `INPUTS` in the options.

    Raises:
        Mistake: if the path does not exist, the options do not fit the function, it raises an
            exception, or what it returns is no optimizer. The message has the user's line.
    """
    name, options = config.optimizer.name, config.optimizer.options.to_dict()
    function = dotted.resolve(name, KEY)
    _check_options(function, name, options)
    given = {key: getattr(rates, value) if value in INPUTS else value
             for key, value in options.items()}
    with _naming_the_line(name):
        made = function(**given)
    if not isinstance(made, optax.GradientTransformation):
        raise Mistake(
            f"{KEY} is {name!r}, which returns a {type(made).__name__}{_where(function)}; it must "
            "return an optax.GradientTransformation, such as optax.chain(...) of others."
        )
    return made


def check(config: ConfigDict, params: Tree) -> None:
    """Traces the first step and an update of the optimizer; nothing is computed.

    Args:
        config: of the run; if it names no optimizer by a path, nothing is done.
        params: shapes of the parameters.

    Raises:
        Mistake: see `make`; or if the optimizer's functions raise an exception, its steps are not
            like the parameters, or an update changes the tree, shapes or types of its state; or if
            `config.sharding` asks for a split state and the optimizer is not elementwise.
    """
    if not is_own(config):
        return
    name = config.optimizer.name
    number = jax.ShapeDtypeStruct((), jax.tree.leaves(params)[0].dtype)
    rates = Rates(*[number] * len(Rates._fields))

    def first(rates: Rates, params: Tree) -> Tree:
        made = make(config, rates)
        with _naming_the_line(name):
            return made.init(params)

    def step(rates: Rates, gradient: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        made = make(config, rates)
        with _naming_the_line(name):
            return made.update(gradient, state, params)

    with _naming_the_line(name):  # also of what JAX says of the results
        state = jax.eval_shape(first, rates, params)
        steps, after = jax.eval_shape(step, rates, params, state, params)
    where = _where(dotted.resolve(name, KEY))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == jnp.bool_):
            raise Mistake(
                f"{name}{where} keeps {leaf.dtype} at {_path(path)} of its state, which no "
                "checkpoint holds; keep numbers (of a random key its jax.random.key_data)."
            )
    _check_same(state, after, f"{name}{where}: an update changes its state", types=True)
    _check_same(params, steps, f"{name}{where}: its steps are not like the parameters", types=False)
    if config.sharding.optimizer or config.sharding.parameters:
        traced = jax.make_jaxpr(step)(rates, params, state, params).jaxpr
        if operation := elementwise.first_other(traced):
            raise Mistake(
                f"config.sharding asks for a split state, but {name}{where} does not look at one "
                f"number of a parameter at a time (it has the operation {operation}), so no device "
                "can make the step of its own piece. Set sharding.optimizer and sharding.parameters"
                " to False, or take an elementwise optimizer, such as adam."
            )


def _check_options(function: Callable, name: str, options: dict[str, Any]) -> None:
    rate = next((key for key, value in options.items()
                 if "learning_rate" in (key, value if isinstance(value, str) else "")), None)
    if rate:
        raise Mistake(
            f"config.optimizer.options.{rate} is {options[rate]!r}, but the learning rate is not "
            f"for {name}: recipe.learning_rate multiplies its steps, and takes them downhill. Name "
            "a function without a rate, such as optax.scale_by_lion in the place of optax.lion."
        )
    try:
        signature = inspect.signature(function)
        signature.bind(**options)
    except TypeError as error:
        allowed = [key for key in signature.parameters if key != "learning_rate"]
        hint = (" It takes a learning rate, which an optimizer here must not: name one of Optax's "
                "scale_by_ functions." if "learning_rate" in signature.parameters else "")
        raise Mistake(
            f"{name}{_where(function)} cannot be called with config.optimizer.options "
            f"{options}: {error}; it takes {', '.join(allowed) or 'nothing'}.{hint}"
        ) from None


@contextlib.contextmanager
def _naming_the_line(name: str) -> Iterator[None]:
    """Turns an exception of an optimizer's code into a Mistake with the user's last line."""
    try:
        yield
    except Mistake:
        raise
    except Exception as error:
        lines = [f"{frame.f_code.co_filename}:{line}"
                 for frame, line in traceback.walk_tb(error.__traceback__)
                 if is_users(frame.f_code.co_filename)]
        told = " ".join(str(error).split())
        hint = ""
        if isinstance(error, jax.errors.ConcretizationTypeError):
            told = "it asks for the value of a number that is an input of the compiled update"
            hint = (f" Options that are {', '.join(INPUTS)} have no value while the update is "
                    "compiled: compute with them by jax.numpy, without `if`.")
        raise Mistake(
            f"{name} fails{' at ' + lines[-1] if lines else ''}: {type(error).__name__}: "
            f"{told[:300]}.{hint}"
        ) from error


def _where(function: Callable) -> str:
    """The place of the user's function, as " (file:line)"; "" for one of a library."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or not is_users(code.co_filename):
        return ""
    return f" ({code.co_filename}:{code.co_firstlineno})"


def _check_same(before: Tree, after: Tree, what: str, types: bool) -> None:
    """Raises Mistake if two trees differ in structure, shapes, or `types`."""
    old, new = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (before, after))
    for path in [*old, *(path for path in new if path not in old)]:
        one, other = old.get(path), new.get(path)
        if one is None or other is None:
            there = "is missing after it" if other is None else "was not there before it"
            raise Mistake(f"{what}: {_path(path)} {there}.")
        if one.shape != other.shape or (types and one.dtype != other.dtype):
            raise Mistake(
                f"{what}: {_path(path)} is {_described(one)} before it and {_described(other)} "
                "after it; both must be the same."
            )
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise Mistake(f"{what}: its leaves stay, but the containers around them do not.")


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path) or "the whole of it"


def _described(leaf: jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
