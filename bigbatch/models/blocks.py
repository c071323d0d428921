"""The blocks of a deep network, as a list that can call each on parameters in pieces.

Where `config.sharding.parameters` is set, a device holds pieces of the parameters. Those outside of
such lists it gathers before the network is called. Those of a block it gathers when the block is
called, and again in the backward pass, and they are gone in between. So a device never has more
than a few blocks as a whole.

    self.blocks = Blocks([Block(...) for _ in range(depth)])      # in __init__
    for block in self.blocks.calls():                             # in __call__
        x = block(x, train)
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

Gather = Callable[[nnx.State], nnx.State]  # from a block's parameters in pieces to whole ones


class Blocks(nnx.List):
    """A list of modules that are only called, as `calls` yields them.

    Attributes:
        gathers: one for each block while its parameters are in pieces; otherwise None.
    """

    gathers: tuple[Gather, ...] | None = None

    def calls(self, recompute: bool = False) -> Iterator[Callable]:
        """Yields, for each block in turn, the function to call in its place.

        Its arguments are those of the block, by position: arrays, and Python bools such as `train`.

        Args:
            recompute: whether a block's activations are computed again in the backward pass instead
                of kept.
        """
        for number, block in enumerate(self):
            gather = self.gathers[number] if self.gathers else None
            yield _called(block, gather, recompute) if gather or recompute else block


def _called(block: nnx.Module, gather: Gather | None, recompute: bool) -> Callable:
    """Calls a block so that the backward pass makes anew what it needs of it."""
    graph, params, rest = nnx.split(block, nnx.Param, ...)

    def call(*arguments: Any) -> Any:
        def pure(params: nnx.State, rest: nnx.State, arrays: list) -> tuple[Any, nnx.State]:
            remaining = iter(arrays)
            whole = gather(params) if gather else params
            merged = nnx.merge(graph, whole, rest)
            outputs = merged(*(one if isinstance(one, bool) else next(remaining)
                               for one in arguments))
            return outputs, nnx.state(merged, nnx.BatchStat)

        arrays = [one for one in arguments if not isinstance(one, bool)]
        policy = None if recompute else _keep_activations(params, jax.eval_shape(gather, params))
        outputs, statistics = jax.checkpoint(pure, policy=policy)(params, rest, arrays)
        nnx.update(block, statistics)
        return outputs

    return call


def _keep_activations(*params: nnx.State) -> Callable[..., bool]:
    """The policy that keeps what follows from activations, and no copies of parameters.

    A policy sees the shapes that an operation takes. Where all of them are shapes of parameters, or
    scalars, its result is taken for another form of a parameter (of another type, for one), which
    is made again from the pieces. Were it an activation, it would only be computed twice.
    """
    shapes = {(), *(leaf.shape for state in params for leaf in jax.tree.leaves(state))}

    def keep(primitive: Any, *operands: Any, **_: Any) -> bool:
        return any(operand.shape not in shapes for operand in operands)

    return keep
