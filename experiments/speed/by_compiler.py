"""The time and memory of an update on accelerators that are not here, by their own compilers.

    python -m experiments.speed.by_compiler [--only=TEXT,...] [--accept]

Compiles each network's update for one host of each kind, with all it does from uint8 to new
parameters; on some also with images that lie ready on the device (what the input costs), and for
ResNet-50 Flax's ImageNet example, whose images lie ready too. GPT-2 small's is beside a plain step
of Flax and Optax; its attention is XLA's, since the compiler estimates no time for kernels. Writes
the record and prints the table of docs/speed.md. Where an update has become slower or larger than
the record says by more than 3 %, it says so and ends with status 1, and the record stays; with
--accept it is written anyway. --only takes the rows whose text has all of these words, such as
ResNet-50,v5litepod-8. Programs that were compiled before are not compiled again.

The times are estimates: cycles of all instructions, without reductions between devices. For the
GPU they are the least that launches, memory or matrix units allow.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from bigbatch.data import feed
from bigbatch.job import chips
from bigbatch.job.devices import AXIS, cut, replicated
from bigbatch.mistake import Mistake
from bigbatch.models.transformer import Transformer
from bigbatch.planning import compiled, topology
from bigbatch.programs.compilation import Kind, Program
from bigbatch.programs.lowering import lower_update, lowering
from bigbatch.storage import caches
from bigbatch.tasks import contract
from bigbatch.update import network, update
from experiments import provenance
from experiments.command_line import one_line_errors
from experiments.figures import REPOSITORY, load_config
from experiments.growth import grown
from experiments.markdown_table import markdown_table
from experiments.speed import flax_resnet, plain_transformer
from experiments.speed.bare import given

RECORD = REPOSITORY / "experiments/records/updates_by_compiler.json"
CONFIGS = {
    "ResNet-50": "configs/imagenet_resnet50.py:batch_8k",
    "Inception-ResNet-V2": "configs/imagenet_inception_resnet_v2.py:figure6_decay",
    "WRN-16-4": "configs/cifar10.py:decay,dtype=bfloat16",
    "GPT-2 small": "configs/language.py:gpt_124m,model.attention=xla",
}
# Images a device: what a core of the paper's pods takes, and the most that the config allows. Of
# GPT-2 sequences of 1024 tokens.
IMAGES = {"ResNet-50": (32, 128), "Inception-ResNet-V2": (32, 64), "WRN-16-4": (128, 640)}
SEQUENCES = 16
SLICES = ("v2-8", "v5litepod-8", "v6e-8", "v3-8", "h100-1")
WHOLE, FED, FLAX, DETERMINISTIC = "whole", "fed", "flax", "deterministic"
# A case takes minutes, so not each is on each slice: with the most images, beside Flax's example,
# with fed images, and with config.deterministic.
FILLED = ("v5litepod-8", "h100-1")
BESIDE_FLAX = ("v2-8", "v5litepod-8", "v6e-8")
FED_ON = ("v2-8", "v5litepod-8")
DETERMINISTIC_ON = ("h100-1",)  # elsewhere it changes nothing


class Case(NamedTuple):
    """An update to compile."""

    network: str  # a key of CONFIGS
    slice: str
    images: int  # on each device
    # WHOLE, with FED images, DETERMINISTIC, or FLAX: that of the example, or a plain step.
    work: str


def _cases() -> Iterator[Case]:
    """The updates of the record."""
    for name, (usual, most) in IMAGES.items():
        for slice_name in SLICES:
            yield Case(name, slice_name, usual, WHOLE)
            if slice_name in FED_ON:
                yield Case(name, slice_name, usual, FED)
            if slice_name in DETERMINISTIC_ON:
                yield Case(name, slice_name, usual, DETERMINISTIC)
            if slice_name in FILLED:
                yield Case(name, slice_name, most, WHOLE)
    for slice_name in BESIDE_FLAX:
        yield Case("ResNet-50", slice_name, IMAGES["ResNet-50"][0], FLAX)
    yield Case("ResNet-50", "v5litepod-8", IMAGES["ResNet-50"][1], FLAX)
    for work in (WHOLE, FLAX):
        yield Case("GPT-2 small", "v5litepod-8", SEQUENCES, work)


CASES = list(_cases())


def lower(case: Case, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the case's update for a mesh."""
    config = load_config(CONFIGS[case.network])
    config.deterministic = case.work == DETERMINISTIC
    count, size = mesh.size * case.images, config.data.image_size

    def shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=cut(mesh))

    if case.work == FLAX and case.network == "GPT-2 small":
        return _lower_plain(config, mesh, shape((count, config.data.options.length + 1), np.int32))
    images, labels = shape((count, size, size, 3), config.dtype), shape((count,), np.int32)
    if case.work == FLAX:
        return _lower_flax(config, mesh, images, labels)
    net = network.build(config)
    state = update.abstract_state(config, net, mesh)
    fields = contract.fields_of(config, contract.task_of(config))
    resident, test = feed.resident_shapes(config, fields, mesh)
    slots = case.images // config.ghost_size
    if case.work in (WHOLE, DETERMINISTIC):
        return lowering(config, net, mesh, state, resident, test)(Program(Kind.UPDATE, slots))
    batch = {"examples": shape((count, 4), np.int32), "images": images, "labels": labels}
    return lower_update(update.make_update(config, net, mesh, given), Kind.UPDATE, mesh, state,
                        {"seed": resident["seed"]}, batch)


def _lower_flax(
    config: ConfigDict, mesh: Mesh, images: jax.ShapeDtypeStruct, labels: jax.ShapeDtypeStruct
) -> jax.stages.Lowered:
    """Lowers the step of Flax's example, one part of the batch on each device."""
    theirs = flax_resnet.ResNet(config.data.num_classes, jnp.dtype(config.dtype))
    init, step = flax_resnet.make_step(
        theirs, config.recipe.learning_rate, config.recipe.momentum,
        config.optimizer.weight_decay, AXIS)
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    made = jax.eval_shape(theirs.init, jax.random.key(0), one)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        jax.eval_shape(init, made["params"], made["batch_stats"]))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS), P(AXIS)), out_specs=P(),
                           check_vma=False)
    return jax.jit(mapped, donate_argnums=0).lower(state, images, labels)


def _lower_plain(
    config: ConfigDict, mesh: Mesh, tokens: jax.ShapeDtypeStruct
) -> jax.stages.Lowered:
    """Lowers the plain step of a language model, one part of the batch on each device."""
    module = nnx.eval_shape(lambda: Transformer(
        config.data.num_classes, jnp.dtype(config.dtype), nnx.Rngs(0), **config.model.to_dict()))
    init, step = plain_transformer.make_step(
        module, config.recipe.learning_rate, config.recipe.momentum, config.optimizer.beta2,
        config.optimizer.weight_decay, AXIS)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        jax.eval_shape(init, nnx.to_pure_dict(nnx.state(module, nnx.Param))))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(),
                           check_vma=False)
    return jax.jit(mapped, donate_argnums=0).lower(state, tokens)


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """The case's row of the record: its fields, the compiler and what `compiled.Measured` has."""
    found = topology.parse(case.slice)
    mesh = topology.make_mesh(found)
    measured = compiled.measure(
        lower(case, mesh), found.kind, mesh, folder, case.work == DETERMINISTIC)
    return case._asdict() | {"compiler": compiled.version(mesh)} | measured._asdict()


def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Time and memory of each whole update, by names; None where it does not fit.

    The compiler is in the name, so that another version of it is not compared.
    """
    return {
        f"{' '.join(map(str, _case(row)))}, {key} ({row['compiler']})":
        (row[key] if row["fits"] else None)
        for row in rows if row["work"] == WHOLE for key in ("seconds", "temporary_bytes")
    }


def _case(row: Mapping[str, Any]) -> Case:
    return Case(*(row[field] for field in Case._fields))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line of Markdown for each network, slice and number of images."""
    known = {_case(row): row for row in rows}
    return markdown_table(
        ["network", "slice", "examples a device", "ms", "of the peak", "temporary GiB",
         "GB accessed", "kernels", "over fed ready", "Flax, ms", "over Flax's time",
         "Flax, temporary GiB", "over Flax's memory", "operations, ours / Flax",
         "instructions, ours / Flax"],
        [_line(case, row, *(known.get(case._replace(work=work)) for work in (FED, FLAX)))
         for case, row in known.items() if case.work == WHOLE])


def _line(case: Case, row: Mapping, fed: Mapping | None, flax: Mapping | None) -> list[str]:
    """The cells of one whole update, beside the same with fed images and beside Flax's."""
    start = [case.network, case.slice, str(case.images)]
    if not row["fits"]:
        return [*start, "does not fit", *[""] * 11]
    peak = topology.parse(case.slice).kind.peak_flops

    def over(other: Mapping | None, key: str) -> str:
        return f"{row[key] / other[key]:.3f}" if other and other["fits"] else ""

    cells = [
        *start, f"{1000 * row['seconds']:.4g}", f"{row['flops'] / row['seconds'] / peak:.0%}",
        f"{row['temporary_bytes'] / chips.GIB:.3g}", f"{row['accessed_bytes'] / 1e9:.3g}",
        str(row["kernels"] or ""), over(fed, "seconds")]
    if not flax or not flax["fits"]:
        return [*cells, *[""] * 6]
    return [
        *cells, f"{1000 * flax['seconds']:.4g}", over(flax, "seconds"),
        f"{flax['temporary_bytes'] / chips.GIB:.3g}", over(flax, "temporary_bytes"),
        *(f"{row[key]} / {flax[key]}" for key in ("operations", "instructions"))]


def main() -> None:
    """Compiles the cases that the command line names, compares them and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="words that a row must have, with commas")
    parser.add_argument("--accept", action="store_true", help="write the record whatever has grown")
    options = parser.parse_args()
    with one_line_errors("experiments.speed.by_compiler"):
        topology.compile_elsewhere()
        words = [word for word in options.only.split(",") if word]
        chosen = [case for case in CASES if set(words) <= set(map(str, case))]
        if not chosen:
            raise Mistake(f"--only={options.only}: no row has all of these words.")
        record = provenance.describe(provenance.command_line("experiments.speed.by_compiler"))
        before = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else []
        after = []
        for case in chosen:
            print(*case, flush=True)
            row = measure(case, Path(caches.folder("plans")).expanduser())
            after.append(row | {"revision": record["revision"]})  # others may be of older ones
        if (lines := grown(numbers(before), numbers(after))) and not options.accept:
            raise RuntimeError(
                "; ".join(lines) + f" (the record says so: {RECORD.name}; --accept renews it)")
        rows = {_case(row): row for row in [*before, *after]}
        rows = [rows[case] for case in CASES if case in rows]
        RECORD.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(table(rows))


if __name__ == "__main__":
    main()
