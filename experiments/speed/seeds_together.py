"""Whether seeds of one curve train faster together, in one program, than one after the other.

    python -m experiments.speed.seeds_together --seeds=3 --config=configs/small.py:decay

One update of every seed by a program mapped over them (jax.vmap), beside the same updates one by
one. The two are checked to give the same parameters. On a CPU one by one is faster, so seeds run in
processes of their own, one a core; where an accelerator gives a number over 1 here, it is worth
writing a run for.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch.config import make_phases, make_seatings
from bigbatch.data import feed
from bigbatch.job.devices import make_mesh, place, replicated
from bigbatch.update import network, update
from experiments import provenance
from experiments.figures import load_config


def measure(config_text: str, seeds: int, repeats: int, updates: int) -> dict[str, Any]:
    """Seconds an update of all seeds takes, together and one by one; their ratio over repeats.

    Raises:
        RuntimeError: if the two do not train the same.
    """
    config = load_config(config_text)
    mesh = make_mesh()
    phase = make_phases(config)[0]
    (seating,) = make_seatings(config, [phase], mesh.size)
    if seating.microbatches != 1:
        raise ValueError("the first phase's batch does not fit into one pass: nothing to map over.")
    net = network.build(config)
    data, random = config.data, np.random.default_rng(0)
    shape = (data.train_examples, data.image_size, data.image_size, len(data.mean))
    images = place(random.integers(0, 256, shape, np.uint8), replicated(mesh))
    labels = place(random.integers(0, data.num_classes, shape[0], np.int32), replicated(mesh))
    states, residents, batches = [], [], []
    for seed in range(seeds):
        config.seed = seed
        states.append(update.init_state(config, net))
        residents.append({"images": images, "labels": labels, "seed": np.uint32(seed)})
        fed = feed.Feed(config, mesh, residents[-1], {}, None)
        batches.append(next(fed.update(phase, seating, 0)))
    one = update.make_update(config, net, mesh).update
    shared = {"images": None, "labels": None, "seed": 0}
    mapped = jax.jit(jax.vmap(one, in_axes=(0, shared, 0, None, None)), donate_argnums=0)
    hyper = np.float32(phase.learning_rate), np.float32(phase.momentum)
    stacked = residents[0] | {"seed": np.arange(seeds, dtype=np.uint32)}

    def stack(trees: list) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def together(state: Any) -> Any:
        state, _ = mapped(state, stacked, stack_of_batches, *hyper)
        return jax.block_until_ready(state)

    def one_by_one(states: list) -> list:
        stepped = [one(*each, *hyper)[0] for each in zip(states, residents, batches, strict=True)]
        return jax.block_until_ready(stepped)

    stack_of_batches = stack(batches)
    both = {"together": (together, stack(states)), "one by one": (one_by_one, states)}
    after = {name: function(jax.tree.map(jnp.copy, start))
             for name, (function, start) in both.items()}  # compiles
    for a, b in zip(jax.tree.leaves(after["together"].params),
                    jax.tree.leaves(stack([state.params for state in after["one by one"]])),
                    strict=True):
        if not np.allclose(a, b, rtol=1e-4, atol=1e-5):
            raise RuntimeError("seeds trained together are not those trained one by one.")
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for repeat in range(-1, repeats):  # the first is not counted
        for name, (function, _) in both.items():
            after[name], took = _timed(function, after[name], updates)
            if repeat >= 0:
                seconds[name].append(took)
    ratios = [b / a for a, b in zip(seconds["together"], seconds["one by one"], strict=True)]
    return {
        "config": config_text, "seeds": seeds, "batch_size": phase.batch_size,
        "device": jax.devices()[0].device_kind, "seconds": seconds,
        "speed_together_over_one_by_one": {
            "median": statistics.median(ratios), "range": [min(ratios), max(ratios)]},
    }


def _timed(function: Callable, state: Any, updates: int) -> tuple[Any, float]:
    began = time.perf_counter()
    for _ in range(updates):
        state = function(state)
    return state, (time.perf_counter() - began) / updates


def main() -> None:
    """Prints the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", default="configs/small.py:decay")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--updates", type=int, default=10, help="in each repeat")
    options = parser.parse_args()
    try:
        measured = measure(options.config, options.seeds, options.repeats, options.updates)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"experiments.speed.seeds_together: {error}")
    made = provenance.describe(
        provenance.command_line("experiments.speed.seeds_together"), [options.config])
    print(json.dumps(made | measured, indent=1))


if __name__ == "__main__":
    main()
