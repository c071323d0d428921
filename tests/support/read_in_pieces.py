"""A run whose network is one large array, and a job of two processes that reads it in pieces.

    python -m tests.support.read_in_pieces WORKDIR PORT PROCESS

reads, as process PROCESS of two, the run in WORKDIR as what a new run begins with, and then
evaluates it. Prints how many MB of memory each took, and the evaluation.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from bigbatch import evaluate
from bigbatch.config import make_phases
from bigbatch.job import processes
from bigbatch.job.devices import make_mesh
from bigbatch.job.output import say
from bigbatch.storage import arrays, continuing, writing
from bigbatch.update import initial_weights, network, update
from tests.support import quadratic
from tests.support.split_states import SMALL_CHUNK, numbers, peak_of_memory

ROWS, COLUMNS = 4096, 8190  # 128 MiB; two devices can share either, eight only the rows
EVERY = ROWS // quadratic.COORDINATES
SEEN = 8  # examples at the checkpoint


class Large(nnx.Module):
    """Some of the rows of a large array, of each the first number."""

    def __init__(self, num_classes, dtype, rngs):
        self.w = nnx.Param(jnp.zeros((ROWS, COLUMNS), dtype))

    def __call__(self, points, train, keys):
        return jnp.broadcast_to(self.w[::EVERY, 0], points.shape)


def get_config() -> ConfigDict:
    """With momentum, which is as large as the array, and a rule for two devices."""
    config = quadratic.get_config()
    config.network = "tests.support.read_in_pieces.Large"
    config.optimizer.name, config.recipe.momentum = "momentum", 0.9
    config.data.train_examples = 64
    config.sharding.parameters, config.sharding.axes = True, (("w", 1),)
    return config


def save(workdir: Path) -> None:
    """A checkpoint in which the array holds 0, 1, 2, ..."""
    config = get_config()
    state = jax.device_get(update.init_state(config, network.build(config)))
    state.params["w"] = numbers((ROWS, COLUMNS)).astype(np.float32)
    run = continuing.describe_run(config, make_phases(config), continuing.Position(SEEN, 1))
    writing.save(workdir, state, run, 1, set()).result()


def test_loss() -> float:
    """Of the array; see `quadratic`."""
    return float(np.square(np.arange(0, ROWS, EVERY) * COLUMNS, dtype=np.float64).sum() / 2)


def main(workdir: str, port: str, process: str) -> None:
    """See above."""
    processes.join(f"127.0.0.1:{port}", 2, int(process), dead_peer_seconds=60)
    arrays.IN_FLIGHT_BYTES = 4 * SMALL_CHUNK
    config = get_config()
    net, whole_test_set = network.build(config), evaluate.whole_test_set
    config.init_from, config.sharding.axes = workdir, ()
    shapes = update.abstract_state(config, net, make_mesh())

    before = peak_of_memory(anew=True)
    found = initial_weights.read(config, shapes)
    say(f"beginning took {peak_of_memory() - before} MB")
    for shard in found["params/w"].addressable_shards:
        wanted = numbers((ROWS, COLUMNS), shard.index).astype(np.float32)
        np.testing.assert_array_equal(shard.data, wanted)

    def taken_until_now(*all_read):
        say(f"evaluating took {peak_of_memory() - before} MB")
        return whole_test_set(*all_read)

    evaluate.whole_test_set = taken_until_now
    before = peak_of_memory(anew=True)  # with what was read above, which is still there
    say("evaluation " + json.dumps(evaluate.evaluate_run(workdir)))
    processes.leave(0, together=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
