"""Turns an encoded photograph into a square array: draws a crop, decodes it and resizes it.

OpenCV decodes and resizes: it was the fastest per core of the libraries measured
(experiments/speed). It reads JPEG, grey and CMYK JPEG, and the PNG files that ImageNet has under a
JPEG's name. Faults that the pixels do not show, such as a truncated file, are found in the bytes
before decoding, since libjpeg only prints a warning and fills the rest of the image with grey. A
JPEG whose coded data are damaged before a sound end is not found out: nothing in it tells.

Boxes are (left, top, width, height) in whole pixels of the full image. Flips and normalisation are
done on the device (see `augment`).
"""

import math
from collections.abc import Iterator

import cv2
import numpy as np

from bigbatch.mistake import Mistake

# Part of the generator's key: no other random numbers of the same seed come from this stream.
CROP_TAG = 0x63726F70

RESAMPLE = {"bicubic": cv2.INTER_CUBIC, "bilinear": cv2.INTER_LINEAR}
REDUCED = {
    8: cv2.IMREAD_REDUCED_COLOR_8,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    1: cv2.IMREAD_COLOR,
}

# Many images are decoded at once, one per core, so threads inside each call would only compete for
# the cores. Their number changes no pixel. But bicubic pixels differ by one level between versions
# of OpenCV and between instruction sets, so a streamed run gives the same bits only with the same
# version and kind of processor.
cv2.setNumThreads(0)


def uniforms(seed: int, epoch: int, position: int) -> Iterator[float]:
    """Yields random numbers, uniform in [0, 1), for one example, without end.

    They depend on nothing but the arguments. They come from the raw stream of a counter-based bit
    generator, which NumPy keeps the same in all releases (NEP 19); its samplers may change.

    Args:
        seed: of the run, in [0, 2**32).
        epoch: of the example, counted from 0.
        position: of the example in its epoch, counted from 0.
    """
    key = np.array([CROP_TAG << 32 | seed, epoch], np.uint64)
    # The lowest word counts the draws, so the position is put into a higher one.
    stream = np.random.Philox(key=key, counter=np.array([0, position, 0, 0], np.uint64))
    while True:
        # Most boxes are accepted at the first try, which takes four draws.
        for raw in stream.random_raw(8).tolist():
            yield (raw >> 11) * 2.0**-53


def random_resized_crop_box(
    width: int,
    height: int,
    draws: Iterator[float],
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draws a random box in the image, to be resized to a square.

    The method of Szegedy et al., "Going deeper with convolutions", section 6, as Goyal et al. use
    it: the box's share of the area is uniform and its aspect ratio log-uniform (so that upright and
    oblong boxes are equally likely). Both are drawn again until the box fits, up to 10 times. If no
    box fits, the result is the largest centred box whose ratio is within the limits.

    Args:
        width, height: of the image, in pixels.
        draws: random numbers, uniform in [0, 1).
        area: least and largest share of the image's area.
        ratio: least and largest width/height.
    """
    least, span = math.log(ratio[0]), math.log(ratio[1] / ratio[0])
    for _ in range(10):
        pixels = (area[0] + next(draws) * (area[1] - area[0])) * width * height
        shape = math.exp(least + next(draws) * span)
        w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < w <= width and 0 < h <= height:
            return _randomly_positioned(width, height, w, h, draws)
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def inception_crop_box(
    width: int,
    height: int,
    draws: Iterator[float],
    area: tuple[float, float] = (0.05, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    covered: float = 0.1,
) -> tuple[int, int, int, int]:
    """Draws the distorted crop with which tf-slim trains Inception networks.

    The method of TensorFlow's `sample_distorted_bounding_box`, with the whole image as the object:
    the aspect ratio is uniform, then the height is uniform among those that keep the area within
    its limits and the box within the image. After 100 tries without a valid box the result is the
    whole image. Small boxes are likelier than with `random_resized_crop_box`.

    Args:
        width, height: of the image, in pixels.
        draws: random numbers, uniform in [0, 1).
        area: least and largest share of the image's area.
        ratio: least and largest width/height.
        covered: least share of the object that the box must cover.
    """
    pixels = width * height
    for _ in range(100):
        shape = ratio[0] + next(draws) * (ratio[1] - ratio[0])
        tall, low = (round(math.sqrt(share * pixels / shape)) for share in reversed(area))
        highest = min(height, int((width + 0.5) / shape), tall)
        lowest = min(highest, low)
        h = lowest + int(next(draws) * (highest - lowest + 1))
        w = round(h * shape)
        fits = 0 < w <= width and 0 < h
        if fits and max(area[0], covered) * pixels <= w * h <= area[1] * pixels:
            return _randomly_positioned(width, height, w, h, draws)
    return 0, 0, width, height


def eval_box(
    width: int, height: int, share: float, style: str
) -> tuple[int, int, int, int]:
    """The central box of the image that is used in evaluation, to be resized to a square.

    Args:
        width, height: of the image, in pixels.
        share: the box's share of a side.
        style: "goyal": a square whose side is `share` of the shorter side. A share of 0.875 does
            in one step what "resize the shorter side to 256, crop the central 224" does in two.
            "inception": `share` of each side, so the aspect ratio is not kept; tf-slim's central
            fraction is 0.875 too. "none": the whole image.
    """
    if style == "none":
        return 0, 0, width, height
    w, h = (width, height) if style == "inception" else (min(width, height),) * 2
    w, h = max(1, round(share * w)), max(1, round(share * h))
    return (width - w) // 2, (height - h) // 2, w, h


def dimensions(encoded: bytes) -> tuple[int, int]:
    """Width and height of a JPEG or PNG image in pixels, from its header.

    Raises:
        Mistake: if the bytes are neither format or are truncated, or if a side is 0.
    """
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        if encoded.rfind(b"IEND") < 24:
            raise Mistake("the image is truncated: a PNG file without its end")
        width, height = (int.from_bytes(encoded[at : at + 4], "big") for at in (16, 20))
        if not width or not height:
            raise Mistake(f"a PNG image of {width} x {height} pixels")
        return width, height
    if encoded[:3] != b"\xff\xd8\xff":
        raise Mistake(f"not a JPEG or PNG image: it starts with {encoded[:8]!r}")
    width = height = 0
    at = 2  # index in `encoded`
    while True:
        # The segments before the coded data. Bytes between segments are skipped, as by libjpeg.
        at = encoded.find(b"\xff", at)
        if at < 0 or at + 9 > len(encoded):
            raise Mistake("the image is truncated: a JPEG file that stops in its header")
        marker = encoded[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # no segment follows
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height = int.from_bytes(encoded[at + 5 : at + 7], "big")
            width = int.from_bytes(encoded[at + 7 : at + 9], "big")
        if marker == 0xDA:  # start of scan
            break
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    # In coded data 0xFF is followed by 0x00 or a restart marker, so only the end has these bytes.
    if encoded.rfind(b"\xff\xd9", at) < 0:
        raise Mistake("the image is truncated: a JPEG file without its end")
    if not width or not height:
        raise Mistake(f"a JPEG image of {width} x {height} pixels")
    return width, height


def decode(
    encoded: bytes, box: tuple[int, int, int, int], size: int, resample: str
) -> np.ndarray:
    """Decodes the pixels of `box` and resizes them: uint8 (size, size, 3), red first.

    If both sides of the box are at least 2, 4 or 8 times `size`, libjpeg's inverse transform makes
    an image that is smaller by that factor, and the box is rounded to whole pixels of it. The box
    is then resized without a low-pass filter, as TensorFlow and Torch7 do by default, with
    half-pixel centres. An orientation in the EXIF data is ignored.

    Args:
        encoded: a JPEG or PNG file.
        box: (left, top, width, height), inside the image.
        size: side of the output in pixels.
        resample: "bicubic" or "bilinear".

    Raises:
        Mistake: if the bytes cannot be decoded.
    """
    left, top, width, height = box
    factor = next((f for f in REDUCED if min(width, height) >= f * size), 1)
    flags = REDUCED[factor] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as error:
        raise Mistake(f"the image cannot be decoded: {error}") from error
    if image is None:
        raise Mistake("the image cannot be decoded: OpenCV does not know its format")
    rows = slice(round(top / factor), round((top + height) / factor))
    columns = slice(round(left / factor), round((left + width) / factor))
    cropped = cv2.resize(image[rows, columns], (size, size), interpolation=RESAMPLE[resample])
    return cv2.cvtColor(cropped, cv2.COLOR_BGR2RGB)


def _randomly_positioned(
    width: int, height: int, w: int, h: int, draws: Iterator[float]
) -> tuple[int, int, int, int]:
    """A box of w x h pixels at a uniformly drawn position in the image."""
    left = int(next(draws) * (width - w + 1))
    top = int(next(draws) * (height - h + 1))
    return left, top, w, h
