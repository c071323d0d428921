"""Lowers the programs of a run for the shapes of their inputs, without compiling them."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bigbatch.data import feed
from bigbatch.job.devices import replicated
from bigbatch.programs.compilation import Kind, Program
from bigbatch.schedule.rates import Rates
from bigbatch.tasks import contract
from bigbatch.update import evaluation, network, sharding, update


def lowering(
    config: ConfigDict, net: network.Network, mesh: Mesh, state: update.State,
    resident: Mapping, test: Mapping, prepare: Callable | None = None,
) -> Callable[[Program], jax.stages.Lowered]:
    """Returns a function that lowers any program of a run.

    Args:
        config: of the run.
        net: its network.
        mesh: the devices, which may be those of an absent TPU slice.
        state: shapes of the state; see `update.abstract_state`.
        resident: shapes of `feed.Feed.resident`.
        test: shapes of `feed.Feed.test`.
        prepare: see `update.make_update`.
    """
    functions = update.make_update(config, net, mesh, prepare)
    fields = contract.fields_of(config, contract.task_of(config))

    def lower(program: Program) -> jax.stages.Lowered:
        if program.kind is Kind.INIT:
            shardings = None
            if sharding.is_split(state):
                shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
            return update.make_init(config, net, shardings).lower(
                jax.ShapeDtypeStruct((), np.uint32))
        if program.kind is Kind.EVALUATE:
            return evaluation.make_evaluate(config, net, mesh).lower(
                state.params, state.batch_stats, test,
                feed.evaluation_shapes(config, fields, mesh))
        batch = feed.update_shapes(config, fields, mesh, program.slots)
        return lower_update(functions, program.kind, mesh, state, resident, batch)

    return lower


def lower_update(
    functions: update.Update, kind: Kind, mesh: Mesh, state: update.State, resident: Mapping,
    batch: Mapping,
) -> jax.stages.Lowered:
    """Lowers one of the three programs of an update, or that which measures its noise.

    Args:
        functions: see `update.make_update`.
        kind: UPDATE, ACCUMULATE, APPLY or MEASURE.
        mesh: the devices.
        state: shapes of the state, or arrays.
        resident: the same of `feed.Feed.resident`.
        batch: the same of a microbatch; not read for APPLY and MEASURE.
    """
    def scalar(dtype: np.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))

    number = scalar(jax.tree.leaves(state.params)[0].dtype)
    rates = Rates(*[number] * len(Rates._fields))
    if kind is Kind.UPDATE:
        return functions.update.lower(state, resident, batch, rates)
    if kind is Kind.MEASURE:
        return functions.measure.lower(functions.sums)
    if kind is Kind.APPLY:
        return functions.apply.lower(state, functions.sums, rates)
    return functions.accumulate.lower(state, functions.sums, resident, batch, scalar(np.bool_))
