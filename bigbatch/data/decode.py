"""One encoded photograph becomes one square array: the crop is drawn, decoded and resized.

OpenCV decodes and resizes, the fastest per core of what was measured (experiments/speed). It reads
JPEG, grey and CMYK JPEG, and the PNG files that ImageNet has under a JPEG's name. What cannot be
told from the pixels, such as a truncated file, is refused from the bytes before decoding: libjpeg
itself only prints a warning and fills the rest with grey.

Boxes are (left, top, width, height) in whole pixels of the full image. Flips and normalisation are
the device's.
"""

import math
from collections.abc import Iterator

import cv2
import numpy as np

from bigbatch.mistake import Mistake

# Tells the crops from everything else that follows from the same seed.
CROP_TAG = 0x63726F70

RESAMPLE = {"bicubic": cv2.INTER_CUBIC, "bilinear": cv2.INTER_LINEAR}
REDUCED = {
    8: cv2.IMREAD_REDUCED_COLOR_8,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    1: cv2.IMREAD_COLOR,
}

# Many images are decoded at once, one a core; a pool inside each call would only contend. It
# changes no pixel. But bicubic pixels differ by a level between OpenCV's versions and between
# instruction sets, so a streamed run keeps its bits on one version and kind of processor.
cv2.setNumThreads(0)


def uniforms(seed: int, epoch: int, place: int) -> Iterator[float]:
    """The endless draws, uniform in [0, 1), for the example at `place` of `epoch`.

    They follow from the example's place in the run and nothing else. From the raw stream of a
    counter-based bit generator, which NumPy keeps fixed (NEP 19); its samplers may change.

    Args:
        seed: of the run, in [0, 2**32).
        epoch: counted from 0.
        place: in the epoch's order, counted from 0.
    """
    key = np.array([CROP_TAG << 32 | seed, epoch], np.uint64)
    # The lowest word counts the draws, so places must differ in a higher one.
    stream = np.random.Philox(key=key, counter=np.array([0, place, 0, 0], np.uint64))
    while True:
        # An accepted first try takes four draws, and that is most images.
        for raw in stream.random_raw(8).tolist():
            yield (raw >> 11) * 2.0**-53


def random_resized_crop_box(
    width: int,
    height: int,
    draws: Iterator[float],
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A random part of the image, to be resized to a square.

    Szegedy et al., "Going deeper with convolutions", section 6, as Goyal et al. train with it: the
    share of the area is uniform, the aspect ratio uniform in its logarithm (so that lying and
    standing are equally likely), both drawn again, up to 10 times, until the box fits. If none
    does, the box is the largest in the centre whose ratio lies within the limits.

    Args:
        width, height: of the image, in pixels.
        draws: uniform in [0, 1).
        area: least and largest share of the image.
        ratio: least and largest width/height.
    """
    least, span = math.log(ratio[0]), math.log(ratio[1] / ratio[0])
    for _ in range(10):
        pixels = (area[0] + next(draws) * (area[1] - area[0])) * width * height
        shape = math.exp(least + next(draws) * span)
        w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < w <= width and 0 < h <= height:
            return _placed(width, height, w, h, draws)
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
    """The distorted crop that tf-slim trains Inception networks with.

    As TensorFlow's `sample_distorted_bounding_box` does it, with the whole image for the object:
    the aspect ratio is uniform, then the height is uniform among those that keep the area within
    its limits and the box within the image. Up to 100 tries, then the whole image. Small boxes are
    likelier than under `random_resized_crop_box`.

    Args:
        width, height: of the image, in pixels.
        draws: uniform in [0, 1).
        area: least and largest share of the image.
        ratio: least and largest width/height.
        covered: least share of the object that must be seen; a smaller box is drawn again.
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
            return _placed(width, height, w, h, draws)
    return 0, 0, width, height


def eval_box(
    width: int, height: int, share: float, style: str
) -> tuple[int, int, int, int]:
    """The part of the image a network is evaluated on, to be resized to a square.

    The image's centre. Style "goyal": `share` of the shorter side, a square; "resize the shorter
    side to 256, crop the central 224" is a share of 0.875, with both folded into one step. Style
    "inception": of each side, so the aspect ratio is not kept; tf-slim's central fraction is 0.875
    too. Style "none": the whole image.
    """
    if style == "none":
        return 0, 0, width, height
    w, h = (width, height) if style == "inception" else (min(width, height),) * 2
    w, h = max(1, round(share * w)), max(1, round(share * h))
    return (width - w) // 2, (height - h) // 2, w, h


def dimensions(encoded: bytes) -> tuple[int, int]:
    """Width and height of a JPEG or PNG image, from its header.

    Raises:
        Mistake: if it is neither, or it stops before its end.
    """
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        if encoded.rfind(b"IEND") < 24:
            raise Mistake("the image is truncated: a PNG file without its end")
        return int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big")
    if encoded[:3] != b"\xff\xd8\xff":
        raise Mistake(f"not a JPEG or PNG image: it starts with {encoded[:8]!r}")
    width = height = 0
    place = 2
    while True:
        # Segments up to the entropy-coded data. Like libjpeg, pass over bytes that belong to none.
        place = encoded.find(b"\xff", place)
        if place < 0 or place + 9 > len(encoded):
            raise Mistake("the image is truncated: a JPEG file that stops in its header")
        marker = encoded[place + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # stand alone, or are filling
            place += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height = int.from_bytes(encoded[place + 5 : place + 7], "big")
            width = int.from_bytes(encoded[place + 7 : place + 9], "big")
        if marker == 0xDA:  # start of scan
            break
        place += 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
    # Inside coded data 0xFF is always followed by 0x00, so this can only be the end of the image.
    if encoded.rfind(b"\xff\xd9", place) < 0:
        raise Mistake("the image is truncated: a JPEG file without its end")
    if not width or not height:
        raise Mistake(f"a JPEG image of {width} x {height} pixels")
    return width, height


def decode(
    encoded: bytes, box: tuple[int, int, int, int], size: int, resample: str
) -> np.ndarray:
    """The pixels of `box`, resized: uint8 (size, size, 3), red first.

    Decoded no larger than needed: where the box is two, four or eight times `size`, libjpeg's
    inverse transform makes an image smaller by that, and the box is rounded to its pixels. What is
    left is a factor below two, and is resized without a low-pass filter, as TensorFlow and Torch7
    do by default; half-pixel centres. An orientation in the EXIF data is not applied.

    Args:
        encoded: a JPEG or PNG file.
        box: (left, top, width, height), inside the image.
        size: of the output.
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
        raise Mistake("the image cannot be decoded: OpenCV does not know its kind")
    rows = slice(round(top / factor), round((top + height) / factor))
    columns = slice(round(left / factor), round((left + width) / factor))
    cropped = cv2.resize(image[rows, columns], (size, size), interpolation=RESAMPLE[resample])
    return cv2.cvtColor(cropped, cv2.COLOR_BGR2RGB)


def _placed(
    width: int, height: int, w: int, h: int, draws: Iterator[float]
) -> tuple[int, int, int, int]:
    """A box of w x h at a uniformly drawn place in the image."""
    left = int(next(draws) * (width - w + 1))
    top = int(next(draws) * (height - h + 1))
    return left, top, w, h
