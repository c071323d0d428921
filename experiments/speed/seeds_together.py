"""Whether seeds of one curve train faster together, in one program, than one after the other.

    python -m experiments.speed.seeds_together [--seeds=3] [--repeats=7]

One update of every seed by a program mapped over them (jax.vmap), beside the same updates one by
one; the two must give the same parameters. On a CPU one by one is faster, so seeds run in processes
of their own, one on each core. An accelerator with a number over 1 here would be worth writing such
a run for.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import provenance
from experiments.figures import load_config
from experiments.speed.bare import NOISE, BareUpdate
from experiments.speed.measure import Measurement, beside

CONFIG = "configs/small.py:decay"


def seeds_together(repeats: int, short: bool, seeds: int = 3) -> list[Measurement]:
    """The time of a laptop's updates one by one over that of the same updates together.

    Raises:
        RuntimeError: if the two do not train the same.
    """
    updates = 2 if short else 10
    configs = [load_config(f"{CONFIG},{NOISE},seed={seed}") for seed in range(seeds)]
    rows = [BareUpdate(config) for config in configs]
    state = _stack([row.state for row in rows])
    resident = rows[0].resident | {"seed": np.arange(seeds, dtype=np.uint32)}
    shared = {"images": None, "labels": None, "seed": 0}  # all seeds see the same images
    rest = resident, _stack([row.batches[0] for row in rows]), rows[0].rates

    def mapped(update: Callable) -> Callable:
        return jax.vmap(update, in_axes=(0, shared, 0, None))

    program = rows[0].compile_with(mapped, state, *rest)

    def together(updates: int = updates) -> None:
        nonlocal state
        for _ in range(updates):
            state, _ = program(state, *rest)
        jax.block_until_ready(state)

    def one_by_one(updates: int = updates) -> None:
        for row in rows:
            row.take(updates)

    together(1)
    one_by_one(1)
    each = _stack([row.state.params for row in rows])
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(each), strict=True):
        if not np.allclose(a, b, rtol=1e-4, atol=1e-5):
            raise RuntimeError("seeds trained together are not those trained one by one.")
    return [beside(
        "seeds: one by one over together, in one program",
        f"{CONFIG}, {seeds} seeds, batch {configs[0].recipe.batch_size}", "",
        {"one by one": one_by_one, "together": together}, repeats)]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def main() -> None:
    """Measures what the command line asks for, and prints it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    for name, value in vars(options).items():
        if value < 1:
            parser.error(f"--{name} is {value}; it must be 1 or more")
    (measured,) = seeds_together(options.repeats, False, options.seeds)
    made = provenance.describe(
        provenance.command_line("experiments.speed.seeds_together"), [CONFIG])
    print(json.dumps(made | measured._asdict(), indent=1))


if __name__ == "__main__":
    main()
