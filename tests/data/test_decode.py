"""Crops: drawn from an example's place in the run, decoded and resized as a full decode would."""

import io
import math
import statistics
from functools import cache

import cv2
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from bigbatch.data import decode, sources
from tests.support.sample_data import data_dir

WIDTH, HEIGHT = 500, 375
GOLDEN_GOYAL = [(13, 96, 287, 222), (2, 12, 385, 357), (86, 22, 318, 319), (182, 33, 299, 308)]
GOLDEN_INCEPTION = [
    (46, 115, 337, 254), (3, 68, 314, 270), (121, 55, 243, 233), (250, 76, 223, 221)]


@cache
def photographs() -> list[bytes]:
    """40 of the sample's training photographs, encoded."""
    data = ConfigDict(
        {"name": "imagenet2012", "dir": data_dir("imagenet2012"), "num_classes": 1000})
    records = sources.tfds_records(sources.open_tfds(data), data.name, "train")
    return [records[record]["image"] for record in range(0, 400, 10)]


def full_decode(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def drawn_boxes(crop, count: int = 4000, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    return np.array([crop(*size, decode.uniforms(0, 0, place)) for place in range(count)])


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def interpolated(pixels: np.ndarray, box, height: int, width: int) -> np.ndarray:
    """`box` of `pixels`, bilinear between the centres of pixels, without a low-pass filter."""
    left, top, box_width, box_height = box
    part = pixels[top : top + box_height, left : left + box_width].astype(float)
    for axis, count in ((0, height), (1, width)):
        length = part.shape[axis]
        at = np.clip((np.arange(count) + 0.5) * length / count - 0.5, 0, length - 1)
        low = np.minimum(at.astype(int), max(length - 2, 0))
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        above = np.minimum(low + 1, length - 1)
        part = part.take(low, axis) * (1 - share) + part.take(above, axis) * share
    return part


def smooth_picture(mode: str, width: int = 600, height: int = 480) -> Image.Image:
    """Gradients that no resampling filter disagrees about."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    return picture.quantize(dither=Image.Dither.NONE) if mode == "P" else picture.convert(mode)


def encode(picture: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


# The draws.


def philox(key: tuple[int, int], counter: list[int]) -> list[int]:
    """One block of Philox 4x64-10 (Salmon et al., SC 2011): four words of 64 bits."""
    mask = 2**64 - 1
    for _ in range(10):
        first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [
            second >> 64 ^ counter[1] ^ key[0], second & mask,
            first >> 64 ^ counter[3] ^ key[1], first & mask,
        ]
        key = (key[0] + 0x9E3779B97F4A7C15 & mask, key[1] + 0xBB67AE8584CAA73B & mask)
    return counter


@pytest.mark.parametrize("seed, epoch, place", [(0, 0, 0), (3, 89, 1_281_166), (2**32 - 1, 5, 17)])
def test_the_draws_are_philox_keyed_by_seed_epoch_and_place(seed, epoch, place):
    draws = decode.uniforms(seed, epoch, place)
    key = (int.from_bytes(b"crop", "big") << 32 | seed, epoch)
    # NumPy counts up before it draws, so the first block is number 1.
    words = [word for block in range(1, 6) for word in philox(key, [block, place, 0, 0])]
    assert [next(draws) for _ in words] == [(word >> 11) / 2**53 for word in words]


def test_the_crops_of_a_run_do_not_change_between_releases():
    """If this fails, crops have changed and runs can no longer be continued: undo that."""
    goyal = [decode.random_resized_crop_box(WIDTH, HEIGHT, decode.uniforms(0, 1, place))
             for place in range(4)]
    inception = [decode.inception_crop_box(WIDTH, HEIGHT, decode.uniforms(0, 1, place))
                 for place in range(4)]
    assert goyal == GOLDEN_GOYAL
    assert inception == GOLDEN_INCEPTION


def test_another_seed_epoch_or_place_draws_another_crop():
    draws = {next(decode.uniforms(*key)) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(draws) == 4


# The boxes.


@pytest.mark.parametrize("crop", [decode.random_resized_crop_box, decode.inception_crop_box])
@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (HEIGHT, WIDTH), (1000, 20), (20, 1000), (1, 1)])
def test_every_box_lies_inside_the_image(crop, size):
    for left, top, width, height in drawn_boxes(crop, 300, size).tolist():
        assert left >= 0 and top >= 0 and width >= 1 and height >= 1
        assert left + width <= size[0] and top + height <= size[1]


def test_random_resized_crops_have_uniform_areas_and_log_uniform_ratios():
    # A square image large enough that nearly every first draw fits, so that none is conditioned.
    boxes = drawn_boxes(decode.random_resized_crop_box, size=(2000, 2000))
    area = boxes[:, 2] * boxes[:, 3] / 2000**2
    small = area < 0.5  # always fit: the largest is 0.5 x 4/3 of the side squared
    assert 0.0795 < area.min() < 0.085 and area.max() <= 1.0
    assert np.mean(area[small]) == pytest.approx((0.08 + 0.5) / 2, abs=0.01)
    log_ratio = np.log(boxes[small, 2] / boxes[small, 3])
    assert np.abs(log_ratio).max() < math.log(4 / 3) + 0.01
    assert np.mean(log_ratio) == pytest.approx(0, abs=0.01)
    assert np.std(log_ratio) == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.03)


def test_a_crop_stands_anywhere_with_equal_chance():
    boxes = drawn_boxes(decode.random_resized_crop_box)
    free = WIDTH - boxes[:, 2]
    share = boxes[free > 50, 0] / free[free > 50]
    assert share.min() < 0.01 and share.max() > 0.99
    assert np.mean(share) == pytest.approx(0.5, abs=0.015)


def test_where_no_random_crop_fits_it_is_the_centre_with_the_ratio_clamped():
    draws = iter([0.999] * 40)  # whole area, widest: never inside a standing image
    assert decode.random_resized_crop_box(100, 400, draws) == (0, 133, 100, 133)
    draws = iter([0.999, 0.0] * 20)
    assert decode.random_resized_crop_box(400, 100, draws) == (133, 0, 133, 100)


def test_inception_crops_are_distributed_as_tensorflows():
    """Against quantiles of `tf.image.stateless_sample_distorted_bounding_box` (TensorFlow 2.21):

    6 000 draws for 500 x 375 with min_object_covered 0.1, area 0.05 to 1 and ratio 3/4 to 4/3.
    """
    boxes = drawn_boxes(decode.inception_crop_box)
    at = [0.1, 0.25, 0.5, 0.75, 0.9]
    area, ratio = boxes[:, 2] * boxes[:, 3] / (WIDTH * HEIGHT), boxes[:, 2] / boxes[:, 3]
    np.testing.assert_allclose(
        np.quantile(area, at), [0.138, 0.203, 0.354, 0.538, 0.695], atol=0.02)
    np.testing.assert_allclose(
        np.quantile(ratio, at), [0.812, 0.905, 1.046, 1.19, 1.277], atol=0.02)
    np.testing.assert_allclose(np.quantile(boxes[:, 3], at), [159, 193, 254, 316, 352], atol=6)
    assert area.min() >= 0.1


def test_an_inception_crop_that_never_fits_is_the_whole_image():
    # Of an image 50 times as long as it is high no allowed box covers a tenth.
    assert decode.inception_crop_box(1000, 20, decode.uniforms(0, 0, 0)) == (0, 0, 1000, 20)


def test_the_evaluation_boxes():
    assert decode.eval_box(500, 375, 0.875, "goyal") == (86, 23, 328, 328)
    assert decode.eval_box(375, 500, 0.875, "goyal") == (23, 86, 328, 328)
    assert decode.eval_box(256, 256, 0.875, "goyal") == (16, 16, 224, 224)
    assert decode.eval_box(400, 200, 0.875, "inception") == (25, 12, 350, 175)
    assert decode.eval_box(32, 32, 0.5, "none") == (0, 0, 32, 32)
    assert decode.eval_box(1, 1, 0.875, "goyal") == (0, 0, 1, 1)


# The pixels.


def test_a_crop_is_the_full_image_cropped_and_interpolated():
    for place, encoded in enumerate(photographs()):
        pixels = full_decode(encoded)
        size = pixels.shape[1], pixels.shape[0]
        assert decode.dimensions(encoded) == size
        box = decode.random_resized_crop_box(*size, decode.uniforms(0, 0, place))
        got = decode.decode(encoded, box, 224, "bilinear")
        assert got.shape == (224, 224, 3) and got.dtype == np.uint8 and got.flags.c_contiguous
        if min(box[2:]) < 448:  # else decoded at half the size
            assert mean_difference(got, interpolated(pixels, box, 224, 224)) < 0.6


def test_a_crop_is_close_to_pillows():
    """Whose filter is wider where it shrinks: photographs differ by a few of 255 levels."""
    differences = []
    for place, encoded in enumerate(photographs()):
        pixels = full_decode(encoded)
        box = decode.random_resized_crop_box(
            pixels.shape[1], pixels.shape[0], decode.uniforms(0, 0, place))
        left, top, width, height = box
        expected = Image.fromarray(pixels).resize(
            (224, 224), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        got = decode.decode(encoded, box, 224, "bicubic")
        differences.append(mean_difference(got, np.asarray(expected)))
    assert statistics.mean(differences) < 3 and max(differences) < 12


def test_at_its_own_size_a_crop_is_the_decoded_pixels():
    encoded = photographs()[0]
    pixels = full_decode(encoded)
    got = decode.decode(encoded, (40, 30, 224, 224), 224, "bicubic")
    # Two builds of libjpeg-turbo may round the last bit differently.
    assert mean_difference(got, pixels[30:254, 40:264]) < 0.1


def test_the_pixels_do_not_depend_on_opencvs_threads():
    """So a run is the same whatever OpenCV was built or set to use."""
    def decoded(threads: int) -> list[np.ndarray]:
        cv2.setNumThreads(threads)
        return [
            decode.decode(encoded, (10, 20, 300, 280), size, resample)
            for encoded in photographs()[:5] for size in (100, 600) for resample in decode.RESAMPLE
        ]

    try:
        for several, one in zip(decoded(8), decoded(0), strict=True):
            np.testing.assert_array_equal(several, one)
    finally:
        cv2.setNumThreads(0)


@pytest.mark.parametrize("size", [48, 100, 112])
def test_decoding_smaller_shows_the_same_part_of_the_image(size):
    """Scaled decoding (2, 4 and 8 times smaller) against the full image with a low-pass filter."""
    for encoded in photographs()[:10]:
        pixels = full_decode(encoded)
        width, height = pixels.shape[1], pixels.shape[0]
        box = (13, 7, width - 20, height - 11)
        expected = Image.fromarray(pixels).resize(
            (size, size), Image.Resampling.BICUBIC, box=(13, 7, 13 + box[2], 7 + box[3]))
        got = decode.decode(encoded, box, size, "bicubic")
        assert mean_difference(got, np.asarray(expected)) < 10
        # Were the box misplaced by a pixel of the output, this would be far nearer.
        moved = np.roll(np.asarray(expected), 2, axis=(0, 1))
        assert mean_difference(got, np.asarray(expected)) < 0.7 * mean_difference(got, moved)


def test_the_evaluation_crop_is_resize_shorter_side_then_centre_crop():
    differences = []
    for encoded in photographs():
        pixels = full_decode(encoded)
        height, width = pixels.shape[:2]
        scale = 256 / min(width, height)
        wide, high = round(width * scale), round(height * scale)
        left, top = (wide - 224) // 2, (high - 224) // 2
        whole = interpolated(pixels, (0, 0, width, height), high, wide)
        expected = whole[top : top + 224, left : left + 224]
        got = decode.decode(
            encoded, decode.eval_box(width, height, 0.875, "goyal"), 224, "bilinear")
        # The box is in whole pixels of the photograph, so it may be off by half of one.
        differences.append(mean_difference(got, expected))
        moved = min(mean_difference(got, np.roll(expected, 4, axis)) for axis in (0, 1))
        assert differences[-1] < 0.6 * moved
    assert statistics.mean(differences) < 4.5


@pytest.mark.parametrize(
    "mode, kind", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("L", "PNG"),
                   ("RGBA", "PNG"), ("P", "PNG")])
@pytest.mark.parametrize("size", [64, 224])
def test_every_kind_of_image_that_imagenet_has_is_read(mode, kind, size):
    picture = smooth_picture(mode)
    encoded = encode(picture, kind)
    assert decode.dimensions(encoded) == (600, 480)
    got = decode.decode(encoded, (30, 20, 540, 440), size, "bicubic")
    expected = picture.convert("RGB").resize(
        (size, size), Image.Resampling.BICUBIC, box=(30, 20, 570, 460))
    # A palette of 256 colours has steps that each filter smooths in its own way.
    assert mean_difference(got, np.asarray(expected)) < (6 if mode == "P" else 2.5)


def test_progressive_files_and_restart_markers_and_thumbnails_are_read():
    picture = smooth_picture("RGB")
    plain = decode.decode(encode(picture, quality=90), (0, 0, 600, 480), 224, "bilinear")
    thumbnail = encode(picture.resize((64, 64)))
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    with_thumbnail = encode(picture, quality=90)
    with_thumbnail = with_thumbnail[:2] + segment + with_thumbnail[2:]
    for encoded in (
        encode(picture, quality=90, progressive=True),
        encode(picture, quality=90, restart_marker_blocks=2),
        with_thumbnail,
        encode(picture, quality=90) + bytes(1000),  # some files are padded
    ):
        assert decode.dimensions(encoded) == (600, 480)
        got = decode.decode(encoded, (0, 0, 600, 480), 224, "bilinear")
        assert mean_difference(got, plain) < 0.5


def test_an_orientation_in_the_metadata_is_not_applied():
    picture = smooth_picture("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = decode.decode(encode(picture, exif=exif), (0, 0, 600, 480), 64, "bicubic")
    plain = decode.decode(encode(picture), (0, 0, 600, 480), 64, "bicubic")
    np.testing.assert_array_equal(turned, plain)


# What is refused.


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_image_is_refused_wherever_it_stops(kind):
    encoded = encode(smooth_picture("RGB", 120, 90), kind)
    for length in [9, 25, 60, len(encoded) // 2, len(encoded) - 100, len(encoded) - 12]:
        with pytest.raises(ValueError, match="truncated"):
            decode.dimensions(encoded[:length])


def test_a_truncated_photograph_is_refused():
    encoded = photographs()[0]
    with pytest.raises(ValueError, match="truncated"):
        decode.dimensions(encoded[: int(0.9 * len(encoded))])


@pytest.mark.parametrize("encoded", [b"", b"\xff\xd8", b"GIF89a" + bytes(100), b"<html></html>"])
def test_what_is_no_image_is_refused(encoded):
    with pytest.raises(ValueError, match="not a JPEG or PNG"):
        decode.dimensions(encoded)


def test_a_header_without_an_image_is_refused():
    encoded = encode(smooth_picture("RGB", 120, 90))
    start = encoded.index(b"\xff\xc0")
    broken = encoded[: start + 5] + bytes(4) + encoded[start + 9 :]
    png = encode(smooth_picture("RGB", 6, 4), "PNG")
    for at, sides in ((16, "0 x 4"), (20, "6 x 0")):  # one side in the header is set to 0
        with pytest.raises(ValueError, match=f"a PNG image of {sides} pixels"):
            decode.dimensions(png[:at] + bytes(4) + png[at + 4 :])
    with pytest.raises(ValueError, match="0 x 0"):
        decode.dimensions(broken)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode.decode(broken, (0, 0, 10, 10), 8, "bicubic")
