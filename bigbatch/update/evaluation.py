"""What a network's task measures of it over the whole test set, and what it makes of examples."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from bigbatch.data import augment
from bigbatch.data.feed import Feed
from bigbatch.data.resident import fields_of
from bigbatch.job.devices import compiler_options
from bigbatch.tasks import contract, measures
from bigbatch.update import network, pieces, sharding


def make_evaluate(config: ConfigDict, net: network.Network, mesh: Mesh) -> Callable:
    """Makes the jitted function `(params, batch_stats, test, batch) -> {name: (sum, weight)}`.

    The result is what the task reports, added up over one batch of all devices.

    `test` has the test set's fields as `Rows`, replicated; it is {} if the test set is streamed.
    `batch` has `record` (int32, -1 for padding) and, if the test set is streamed, its fields.
    """
    task = contract.task_of(config)
    split = sharding.split_of(config, net.params, mesh)
    gather = pieces.gatherer(split)

    def evaluate(params: Any, batch_stats: Any, test: Mapping, batch: Mapping) -> measures.Reported:
        record = batch["record"]
        fields = fields_of(test, batch, jnp.maximum(record, 0))
        outputs, targets = outputs_of(
            config, task, net, params, batch_stats, fields, record, gather)
        own = measures.add_up(config, task, outputs, targets, record >= 0).reported
        vector, unravel = ravel_pytree(own)
        return unravel(jax.lax.psum(vector, mesh.axis_names))

    mapped = jax.shard_map(
        evaluate, mesh=mesh, in_specs=(split.at_rest(), P(), P(), P(mesh.axis_names)),
        out_specs=P(), check_vma=False,
    )
    return jax.jit(mapped, compiler_options=compiler_options(mesh, config.deterministic))


def outputs_of(
    config: ConfigDict, task: contract.Task, net: network.Network, params: Any, batch_stats: Any,
    fields_B: Mapping[str, jax.Array], record_B: jax.Array, gather: network.Gather | None = None,
) -> tuple[Any, Any]:
    """What the network makes of examples as they are in the data set, in evaluation.

    Args:
        config: of the run.
        task: its task.
        net: its network.
        params: its parameters.
        batch_stats: its running statistics.
        fields_B: the arrays of the examples, by name.
        record_B: their numbers in the test set, from which the keys that the task gets follow.
        gather: see `network.Network.apply`, where the parameters are in pieces.

    Returns:
        What the network returns, and the task's targets.
    """
    key = jax.random.key(0, impl="threefry2x32")  # the same in every evaluation
    keys = augment.example_keys(key, jnp.zeros_like(record_B), record_B)
    inputs, targets = contract.prepare(config, task, fields_B, keys, False)
    outputs, _ = net.apply(params, batch_stats, inputs, False, keys, gather)
    return outputs, targets


def networks_of(
    state: Mapping[str, Any], before_gather: Callable[[], None] = lambda: None
) -> dict[str, tuple[Any, Any]]:
    """The parameters and running statistics to evaluate, by the end of the names of their results.

    Args:
        state: the fields of an `update.State`.
        before_gather: called before the average is gathered, where it is in pieces and the
            parameters are not; its exceptions are not caught.

    Returns:
        "" for the weights, and "_average" for their average, if the run keeps one.
    """
    found = {"": (state["params"], state["batch_stats"])}
    if average := state.get("average"):
        params = average["params"]
        if sharding.is_split(params) and not sharding.is_split(state["params"]):
            before_gather()
            lie = jax.tree.map(lambda leaf: leaf.sharding, state["params"])
            params = jax.jit(_same, out_shardings=lie)(params)
        found["_average"] = params, average["batch_stats"]
    return found


def _same(tree: Any) -> Any:
    return tree


def whole_test_set(
    config: ConfigDict, program: Callable, networks: Mapping[str, tuple[Any, Any]], fed: Feed,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Evaluates every test example once: `test_loss`, and `test_...` of all else that is reported.

    Args:
        config: of the run.
        program: the function that `make_evaluate` returns, jitted or compiled.
        networks: see `networks_of`; all of them see a batch before the next one is asked for.
        fed: the feed that yields the test set.
        before_batch: called before each batch; its exceptions are not caught.

    Returns:
        The means for each network, whose key their names end with; nan for what has no weight.

    Raises:
        Mistake: if a record cannot be read or decoded, or if no example counts for the loss.
    """
    task = contract.task_of(config)
    parts: dict[str, list[measures.Reported]] = {end: [] for end in networks}
    last: list[measures.Reported] = []
    for batch in fed.evaluation():
        before_batch()
        before, last = last, [program(*one, fed.test, batch) for one in networks.values()]
        for end, part in zip(networks, last, strict=True):
            parts[end].append(part)
        # At most two batches are on the devices, so that a stop is noticed soon.
        jax.block_until_ready(before)
    found: dict[str, float] = {}
    for end, of_batches in parts.items():
        whole = jax.tree.map(
            lambda *of_one: sum(map(float, of_one)), *jax.device_get(of_batches))
        if not whole["loss"][1]:  # the same in all processes
            raise fed.none_of_use("the test set")
        means = {name: measures.ratio(*pair) for name, pair in whole.items()}
        found |= measures.results(config, task, means, "test_", end)
    return found
