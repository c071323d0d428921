"""The programs a run is made of, lowered for its shapes but not yet compiled."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bigbatch import compilation, evaluate, network, update
from bigbatch.data import feed
from bigbatch.devices import replicated


def lowering(
    config: ConfigDict, net: network.Network, mesh: Mesh, state: update.State,
    resident: Mapping, test: Mapping,
) -> Callable[[compilation.Key], jax.stages.Lowered]:
    """A function that lowers the program of a key (see `compilation.Key`).

    Args:
        config: of the run.
        net: its network.
        mesh: the devices; they may be those of a topology that is not there.
        state: shapes of the state, as `update.abstract_state` gives them.
        resident: shapes of what `feed.Feed.resident` holds.
        test: the same of `feed.Feed.test`.
    """
    functions = update.make_update(config, net, mesh)
    sums = update.abstract_sums(state, mesh)
    dtype = jax.tree.leaves(state.params)[0].dtype
    number = jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))
    first_pass = jax.ShapeDtypeStruct((), np.bool_, sharding=replicated(mesh))

    def lower(key: compilation.Key) -> jax.stages.Lowered:
        kind, *seats_each = key
        if kind == "init":
            return update.make_init(config, net).lower(jax.ShapeDtypeStruct((), np.uint32))
        if kind == "evaluate":
            return evaluate.make_evaluate(config, net, mesh).lower(
                state.params, state.batch_stats, test, feed.evaluation_shapes(config, mesh))
        if kind == "apply":
            return functions.apply.lower(state, sums, number, number)
        batch = feed.update_shapes(config, mesh, *seats_each)
        if kind == "update":
            return functions.update.lower(state, resident, batch, number, number)
        return functions.accumulate.lower(state, sums, resident, batch, first_pass)

    return lower
