"""Writes the network of a run's last checkpoint, or an earlier one, to one file, for use without
this package.

    python -m bigbatch.export --workdir=DIR --format=npz|safetensors|stablehlo --output=FILE \\
        [--at=EXAMPLES_SEEN] [--average]

or, where the package is installed, `bigbatch-export` in the place of `python -m bigbatch.export`.
docs/models.md says what is in the files and how they are read.
"""

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax import export

from bigbatch import checkpoint, command_line
from bigbatch.mistake import Mistake
from bigbatch.update.initial_weights import names

LIBRARIES = {"safetensors": ["safetensors.numpy"], "stablehlo": ["flatbuffers"]}  # not required
PLATFORMS = ("cpu", "cuda", "tpu")  # that a StableHLO file runs on


class Request(NamedTuple):
    """What one asks for beside the format."""

    output: Path
    batch_size: int  # of a StableHLO program; 0 for any


def export_run(
    workdir: str | Path, format: str, output: str | Path, batch_size: int = 0,
    examples_seen: int | None = None, average: bool = False,
) -> dict[str, Any]:
    """Writes a checkpoint in `workdir` to `output`, in place of what is there.

    Args:
        workdir: of a run, finished or not; a folder, or gs://bucket/path.
        format: one of `FORMATS`.
        output: the file to write.
        batch_size: images in a call of the StableHLO program; 0 for any number.
        examples_seen: the checkpoint's position; None for the newest whole one.
        average: see `checkpoint.load_model`.

    Returns:
        `output`, `format`, `bytes`, and `parameters`, the number of them.

    Raises:
        Mistake: if something is missing or cannot be written in this format.
    """
    if format not in FORMATS:
        raise Mistake(f"--format is {format!r}; allowed are {', '.join(FORMATS)}.")
    if batch_size < 0 or (batch_size and format != "stablehlo"):
        raise Mistake(
            f"--batch_size is {batch_size}; it must be 0 (any number of images) or more, and only "
            "--format=stablehlo has one."
        )
    for library in LIBRARIES.get(format, ()):
        _imported(library, format)
    path = Path(output).expanduser().absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise Mistake(f"--output is {output}; it must be a file in a folder that is there.")
    model = checkpoint.load_model(workdir, examples_seen, average)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        FORMATS[format](model, Request(unfinished, batch_size))
        os.replace(unfinished, path)
    except OSError as error:
        raise Mistake(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return {"output": str(path), "format": format, "bytes": path.stat().st_size,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params))}


def named(model: checkpoint.Model) -> dict[str, np.ndarray]:
    """All arrays of a network by name, such as params/head/kernel."""
    return names({"params": model.params, "batch_stats": model.batch_stats})


def _write_npz(model: checkpoint.Model, request: Request) -> None:
    with request.output.open("wb") as file:
        np.savez(file, config=np.array(model.config.to_json()), **named(model))


def _imported(library: str, format: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        name = library.partition(".")[0]
        raise Mistake(
            f"--format={format} needs the library {name}, which is not installed: pip install "
            f"{name}, or '.[export]' in a checkout, or take --format=npz."
        ) from None


def _write_safetensors(model: checkpoint.Model, request: Request) -> None:
    metadata: Mapping[str, str] = {"config": model.config.to_json()}
    _imported(*LIBRARIES["safetensors"], "safetensors").save_file(
        named(model), request.output, metadata=metadata)


def _write_stablehlo(model: checkpoint.Model, request: Request) -> None:
    """A function of the images alone, with the parameters as its constants."""
    if not model.takes_images:
        raise Mistake(
            f"--format=stablehlo writes a function of images, and the examples of "
            f"{model.config.task} have none; take --format=npz or safetensors."
        )
    data = model.config.data
    side = data.image_size
    batch = request.batch_size or export.symbolic_shape("batch")[0]
    images = jax.ShapeDtypeStruct((batch, side, side, len(data.mean)), np.uint8)

    def logits(images: jax.Array) -> jax.Array:
        return model.logits(model.params, model.batch_stats, images)

    try:
        exported = export.export(jax.jit(logits), platforms=PLATFORMS)(images)
    except Exception as error:
        if request.batch_size:
            raise
        first = str(error).strip().partition("\n")[0]
        raise Mistake(
            f"{model.config.network} cannot be exported for any number of images ({first}); give "
            "--batch_size=N for one number, or write x.shape[0] instead of len(x) in the model."
        ) from error
    request.output.write_bytes(exported.serialize())


FORMATS: dict[str, Callable[[checkpoint.Model, Request], None]] = {
    "npz": _write_npz, "safetensors": _write_safetensors, "stablehlo": _write_stablehlo,
}


def main(arguments: Sequence[str]) -> None:
    """Writes what was asked for and prints one JSON object about it."""
    given = flags.FLAGS
    for key, what in (("workdir", "the folder of the run"), ("output", "the file to write")):
        if not given[key].value:
            raise Mistake(f"--{key} is missing: {what}.")
    written = export_run(given.workdir, given.format, given.output, given.batch_size, given.at,
                         given.average)
    print(json.dumps(written))


def define_flags() -> None:
    """Only of the program itself, as in `evaluate`."""
    flags.DEFINE_string("workdir", None, "Folder of the run to export, or gs://bucket/path.")
    flags.DEFINE_string("format", "npz", f"One of {', '.join(FORMATS)}.")
    flags.DEFINE_string("output", None, "The file to write; one that is there is replaced.")
    flags.DEFINE_bool("average", False, "The average of the weights that a run with ema keeps.")
    flags.DEFINE_integer(
        "at", None, "Position (examples seen) of the checkpoint to export; the newest without.")
    flags.DEFINE_integer("batch_size", 0, "Of stablehlo: images in a call; 0 for any number.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
