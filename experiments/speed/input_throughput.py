"""How many images a second one core decodes, crops and resizes, beside TensorFlow's pipeline.

    python -m experiments.speed.input_throughput --data_dir=FOLDER [--record=PATH]

FOLDER is the TFDS data_dir that holds imagenet2012. TensorFlow's rows need `pip install
tensorflow-cpu` beside the requirements; without it they say that it is not installed. The record in
experiments/records/input_throughput.json is from this command.

"bigbatch, bicubic" and "bilinear" decode and resize in a loop; "bigbatch, stream" is all of it,
from the run's order to microbatches, in one thread: what compares with TensorFlow's pipeline. Every
row gets the same photographs, in memory as they are encoded, and random-resized crops (the same
ones, but for the stream, which draws its own), and makes 224 x 224 pixels. TensorFlow does it as
Flax's ImageNet example: decode the crop only, then resize without a low-pass filter, in a tf.data
pipeline of one thread. Pillow decodes all and resizes with its filter. All run on one core, taking
turns in each repeat, so that ratios within a repeat are paired; the table has medians and ranges
over the repeats. Seconds are the process's processor time, all threads together, so that other work
on the machine disturbs little.
"""

import argparse
import io
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from bigbatch.data import decode, sources, streaming
from bigbatch.mistake import Mistake
from experiments import provenance
from experiments.speed.measure import Figure, markdown, paired, ratios

SIZE = 224
CLASSES = 1000
BASIS = "TensorFlow, bicubic"
DECODERS = ("numpy", "opencv-python-headless", "pillow", "tensorflow-cpu", "tensorflow")


def open_photographs(folder: str, count: int) -> sources.Records:
    """The records of the first `count` training photographs."""
    data = ConfigDict({"name": "imagenet2012", "dir": folder, "num_classes": CLASSES})
    records = sources.tfds_records(sources.open_tfds(data), data.name, f"train[:{count}]")
    records[0]  # opens the files
    return records


def stream(images: list[bytes]) -> Callable[[], None]:
    """All that bigbatch does: order, crop drawn, decoded, dealt into microbatches; one thread."""
    records = [{"image": image, "label": 0} for image in images]
    reader = streaming.Reader(
        records=records, split="train", train=True, seed=0, classes=CLASSES, size=SIZE,
        style="goyal", eval_share=0.875, resample="bicubic", skip=False,
    )
    slots = np.arange(len(images) // 50 * 50).reshape(-1, 50)
    stretch = streaming.Stretch(reader, 0, 1, slots.size, slots)

    def run() -> None:
        for _ in streaming.Stream([stretch], workers=0, threads=1):
            pass

    return run


def draw_boxes(images: list[bytes]) -> list[tuple[int, int, int, int]]:
    """A random-resized crop for each image."""
    return [
        decode.random_resized_crop_box(*decode.dimensions(image), decode.uniforms(0, 0, place))
        for place, image in enumerate(images)
    ]


def ours(images: list[bytes], boxes: list, resample: str) -> Callable[[], None]:
    """What `bigbatch.data.streaming` does with each record, but for drawing the box."""

    def run() -> None:
        for image, box in zip(images, boxes, strict=True):
            decode.dimensions(image)
            decode.decode(image, box, SIZE, resample)

    return run


def pillow(images: list[bytes], boxes: list) -> Callable[[], None]:
    """A full decode, then Pillow's bicubic filter."""

    def run() -> None:
        for image, (left, top, width, height) in zip(images, boxes, strict=True):
            picture = Image.open(io.BytesIO(image)).convert("RGB")
            box = (left, top, left + width, top + height)
            np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))

    return run


def tensorflow(images: list[bytes], boxes: list, method: str) -> Callable[[], None] | None:
    """decode_and_crop_jpeg and resize under tf.data; None where TensorFlow is not installed."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        import tensorflow as tf
    except ImportError:
        return None
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    windows = np.array([(top, left, height, width) for left, top, width, height in boxes], np.int32)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.deterministic = True

    def example(image: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
        pixels = tf.image.decode_and_crop_jpeg(image, window, channels=3)
        return tf.image.resize(pixels, (SIZE, SIZE), method=method)

    pipeline = tf.data.Dataset.from_tensor_slices((images, windows)).map(example)
    pipeline = pipeline.with_options(options)

    def run() -> None:
        for _ in pipeline:
            pass

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", required=True, help="TFDS data_dir that holds imagenet2012")
    parser.add_argument("--images", type=int, default=400, help="in a repeat; a multiple of 50")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--record", default="", help="write the results to this JSON file")
    options = parser.parse_args()
    if options.images < 50 or options.images % 50:
        parser.error("--images: a multiple of 50 is needed")
    if options.repeats < 5:
        parser.error("--repeats: at least 5 are needed for a range that says something")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before TensorFlow's threads start
    else:
        print("This system cannot pin a process to a core: ratios only are to be trusted.",
              file=sys.stderr)

    try:
        records = open_photographs(options.data_dir, options.images)
    except Mistake as error:
        parser.exit(2, f"{error}\n")
    images = [record["image"] for record in records]
    boxes = draw_boxes(images)
    rows = {
        "bigbatch, bicubic": ours(images, boxes, "bicubic"),
        "bigbatch, bilinear": ours(images, boxes, "bilinear"),
        BASIS: tensorflow(images, boxes, "bicubic"),
        "TensorFlow, bilinear": tensorflow(images, boxes, "bilinear"),
        "bigbatch, stream": stream(images),
        "Pillow, bicubic": pillow(images, boxes),
    }
    seconds = paired({name: run for name, run in rows.items() if run}, options.repeats,
                     time.process_time)
    figures = []
    for name in rows:
        if name not in seconds:
            figures.append(Figure(name, "images a second", "", "images/s", [], "not installed"))
            continue
        speeds = [round(len(images) / taken, 1) for taken in seconds[name]]
        figures.append(Figure(name, "images a second", "", "images/s", speeds))
        if BASIS in seconds:
            figures.append(Figure(name, f"speed over that of {BASIS}", "", "x",
                                  ratios(seconds[BASIS], seconds[name])))
    record = provenance.describe(provenance.command_line(
        "experiments.speed.input_throughput"), packages=DECODERS) | {
        "images": len(images), "mean_bytes": round(statistics.mean(map(len, images))),
        "mean_pixels": round(statistics.mean(math.prod(decode.dimensions(i)) for i in images)),
        "size": SIZE, "load": round(os.getloadavg()[0], 1),
        "figures": [figure._asdict() for figure in figures],
    }
    print(f"{len(images)} photographs of {record['mean_bytes'] / 1e3:.0f} kB to {SIZE} x {SIZE} on "
          f"one core; {record['versions']}")
    print(markdown(figures, record["hardware"]))
    if options.record:
        Path(options.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
