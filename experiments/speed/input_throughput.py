"""How many images a second one core decodes, crops and resizes, beside TensorFlow's pipeline.

    python -m experiments.speed.input_throughput --data_dir=FOLDER [--record=PATH]

FOLDER is the TFDS data_dir that holds imagenet2012. TensorFlow's rows need `pip install
tensorflow-cpu` beside the requirements; without it they say that it is not installed. The record in
experiments/records/input_throughput.json is from this command.

The rows "bigbatch, bicubic" and "bigbatch, bilinear" decode and resize in a loop. "bigbatch,
stream" is the whole pipeline, from the run's order to microbatches, in one thread, and compares
with TensorFlow's pipeline. Every row gets the same 400 photographs, in memory as they are encoded,
and random-resized crops (the same ones, but for the stream, which draws its own), and makes 224 x
224 pixels. TensorFlow does this as in Flax's ImageNet example: it decodes the crop only, then
resizes without a low-pass filter, in a tf.data pipeline of one thread. All rows run on one core and
take turns in each of 15 repeats, so ratios within a repeat are paired; the table has medians and
ranges over the repeats. Seconds are the process's processor time, all threads together, so other
work on the machine disturbs little.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from bigbatch.data import decode, photographs, sources, streaming
from bigbatch.data.examples import Field
from experiments import provenance
from experiments.command_line import one_line_errors
from experiments.machine import own_cores
from experiments.speed.measure import Measurement, markdown, paired, ratios

IMAGES, REPEATS = 400, 15
SIZE, CLASSES = 224, 1000
BASIS = "TensorFlow, bicubic"


def read_photographs(folder: str) -> list[bytes]:
    """The first training photographs, as they are encoded."""
    data = ConfigDict({"name": "imagenet2012", "dir": folder, "num_classes": CLASSES})
    records = sources.tfds_records(sources.open_tfds(data), data.name, f"train[:{IMAGES}]")
    return [record["image"] for record in records]


def stream(images: list[bytes]) -> Callable[[], None]:
    """All of bigbatch's work: order, crops drawn and decoded, microbatches; in one thread."""
    records = [{"image": image, "label": 0} for image in images]
    reader = photographs.Photographs(
        records=records, split="train", train=True, seed=0, classes=CLASSES, size=SIZE,
        style="goyal", eval_share=0.875, resample="bicubic", skip=False,
    )
    fields = {"images": Field((SIZE, SIZE, 3), np.uint8), "labels": Field((), np.int32)}
    split = streaming.Split(reader, fields, True, 0)
    slots = np.arange(len(images) // 50 * 50).reshape(-1, 50)
    stretch = streaming.Stretch(split, 0, 1, slots.size, slots)

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
    """What `bigbatch.data.streaming` does with each record, without drawing the box."""

    def run() -> None:
        for image, box in zip(images, boxes, strict=True):
            decode.dimensions(image)
            decode.decode(image, box, SIZE, resample)

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
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", required=True, help="TFDS data_dir that holds imagenet2012")
    parser.add_argument("--record", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # before TensorFlow's threads start
        os.sched_setaffinity(0, {max(own_cores())})
    with one_line_errors("experiments.speed.input_throughput"):
        images = read_photographs(options.data_dir)
    boxes = draw_boxes(images)
    rows = {
        "bigbatch, bicubic": ours(images, boxes, "bicubic"),
        "bigbatch, bilinear": ours(images, boxes, "bilinear"),
        BASIS: tensorflow(images, boxes, "bicubic"),
        "TensorFlow, bilinear": tensorflow(images, boxes, "bilinear"),
        "bigbatch, stream": stream(images),
    }
    seconds = paired({name: run for name, run in rows.items() if run}, REPEATS, time.process_time)
    measurements = []
    for name in rows:
        speeds = [round(len(images) / spent, 1) for spent in seconds.get(name, [])]
        measurements.append(Measurement(
            name, "images a second", "", "images/s", speeds, "" if speeds else "not installed"))
        if speeds and BASIS in seconds:
            measurements.append(Measurement(name, f"speed over that of {BASIS}", "", "x",
                                            ratios(seconds[BASIS], seconds[name])))
    record = provenance.describe(
        provenance.command_line("experiments.speed.input_throughput")) | {
        "images": len(images), "mean_bytes": round(statistics.mean(map(len, images))),
        "mean_pixels": round(statistics.mean(math.prod(decode.dimensions(i)) for i in images)),
        "size": SIZE, "load": round(os.getloadavg()[0], 1),
        "measurements": [row._asdict() for row in measurements],
    }
    print(f"{len(images)} photographs of {record['mean_bytes'] / 1e3:.0f} kB to {SIZE} x {SIZE} on "
          f"one core; {record['versions']}")
    print(markdown(measurements, record["hardware"]))
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
