"""Whether seeds of one curve train faster together, in one program, than one after the other.

    python -m experiments.speed.seeds_together --seeds=3 --config=configs/small.py:decay

One update of every seed by a program mapped over them (jax.vmap), beside the same updates one by
one. The two are checked to give the same parameters. On a CPU one by one is faster, so seeds run in
processes of their own, one a core; where an accelerator gives a number over 1 here, it is worth
writing a run for.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch.job.devices import compiler_options, make_mesh
from bigbatch.mistake import Mistake
from bigbatch.update import update
from experiments import provenance
from experiments.command_line import one_line_errors
from experiments.figures import load_config
from experiments.speed.bare import NOISE, BareUpdate
from experiments.speed.measure import Figure, paired, ratios


def seeds_together(repeats: int, short: bool) -> list[Figure]:
    """Three seeds of the laptop's curve."""
    return measure("configs/small.py:decay", 3, repeats, 2 if short else 10)


def measure(config_text: str, seeds: int, repeats: int, updates: int) -> list[Figure]:
    """The time of updates one by one over that of the same together.

    Args:
        config_text: file.py:preset,key=value,...; its images are noise here.
        seeds: 0 and on.
        repeats: of the measurement.
        updates: of each seed in a repeat.

    Raises:
        Mistake: if the first batch takes more than one pass.
        RuntimeError: if the two do not train the same.
    """
    configs = [load_config(f"{config_text},{NOISE},seed={seed}") for seed in range(seeds)]
    rows = [BareUpdate(config) for config in configs]
    if len(rows[0].batches) > 1:
        raise Mistake("the first phase's batch does not fit into one pass: nothing to map over.")
    mesh = make_mesh(jax.devices()[:1])
    # What was jitted: inside of another program it may bring no compiler options of its own.
    one = update.make_update(configs[0], rows[0].net, mesh).update.__wrapped__
    shared = {"images": None, "labels": None, "seed": 0}  # all seeds see the same images

    def stack(trees: list) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    state = stack([row.state for row in rows])
    resident = rows[0].resident | {"seed": np.arange(seeds, dtype=np.uint32)}
    given = resident, stack([row.batches[0] for row in rows]), *rows[0].rates
    program = jax.jit(
        jax.vmap(one, in_axes=(0, shared, 0, None, None)), donate_argnums=0,
        compiler_options=compiler_options(mesh)).lower(state, *given).compile()

    def together(updates: int) -> None:
        nonlocal state
        for _ in range(updates):
            state, _ = program(state, *given)
        jax.block_until_ready(state)

    def one_by_one() -> None:
        for row in rows:
            row.take(updates)

    together(1)
    for row in rows:
        row.take()
    each = stack([row.state.params for row in rows])
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(each), strict=True):
        if not np.allclose(a, b, rtol=1e-4, atol=1e-5):
            raise RuntimeError("seeds trained together are not those trained one by one.")
    seconds = paired({"together": lambda: together(updates), "one by one": one_by_one}, repeats)
    return [Figure(
        "seeds: one by one over together, in one program",
        f"{config_text}, {seeds} seeds, batch {configs[0].recipe.batch_size}", "", "x",
        ratios(seconds["one by one"], seconds["together"]), seconds=seconds)]


def main() -> None:
    """Prints the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", default="configs/small.py:decay")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--updates", type=int, default=10, help="in each repeat")
    options = parser.parse_args()
    with one_line_errors("experiments.speed.seeds_together"):
        figures = measure(options.config, options.seeds, options.repeats, options.updates)
        made = provenance.describe(
            provenance.command_line("experiments.speed.seeds_together"), [options.config])
    print(json.dumps(made | {"figures": [figure._asdict() for figure in figures]}, indent=1))


if __name__ == "__main__":
    main()
