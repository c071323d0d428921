"""Which examples make up an update, and how they are augmented."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbatch.data import augment
from bigbatch.data.resident import lay_out
from bigbatch.schedule import order


# --- order ---------------------------------------------------------------------------------------
def test_the_order_is_the_one_of_runs_already_begun():
    """A golden test: a NumPy release or a change here that moves the order must fail.

    A run finds its next examples from (seed, epoch) alone, so with another order a continued run
    would see some examples twice in an epoch and others never, and no test of one installation
    could tell. Changing these values breaks the continuing of every run there is.
    """
    assert order.permutation(0, 0, 10).tolist() == [2, 0, 9, 8, 1, 6, 3, 4, 5, 7]
    assert order.permutation(0, 1, 10).tolist() == [0, 7, 6, 4, 9, 1, 3, 2, 8, 5]
    assert order.permutation(2**32 - 1, 7, 10).tolist() == [3, 8, 5, 1, 0, 9, 4, 2, 6, 7]
    whole = order.permutation(3, 2, 50_000)
    assert zlib.crc32(whole.astype("<i4").tobytes()) == 2334440199


@pytest.mark.parametrize("examples", [1, 2, 97, 5000])
def test_an_epoch_is_a_permutation_of_its_own(examples):
    first = order.permutation(5, 0, examples)
    assert first.dtype == np.int32
    np.testing.assert_array_equal(np.sort(first), np.arange(examples))
    if examples > 90:
        for seed, epoch in ((5, 1), (6, 0), (0, 5)):
            same = np.mean(order.permutation(seed, epoch, examples) == first)
            assert same < 0.1, f"seed {seed} epoch {epoch} repeats seed 5 epoch 0"


def test_the_cached_order_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        order.permutation(0, 0, 10)[0] = 1


@pytest.mark.parametrize("examples", [1, 7, 64, 100])
def test_every_example_of_an_epoch_is_seen_once_whatever_the_batches(examples):
    """Batches that grow, divide nothing and span several epochs give one and the same walk."""
    batches = np.random.default_rng(examples).integers(1, 3 * examples, 40).tolist()
    parts, start = [], 0
    for batch in batches:
        parts.append(order.records(11, start, batch, examples))
        start += batch
    walk = np.concatenate(parts)
    np.testing.assert_array_equal(walk, order.records(11, 0, start, examples))
    np.testing.assert_array_equal(walk[:, 1] * examples + walk[:, 2], np.arange(start))
    for epoch in range(start // examples):
        seen = np.sort(walk[walk[:, 1] == epoch, 0])
        np.testing.assert_array_equal(seen, np.arange(examples), err_msg=f"epoch {epoch}")


@pytest.mark.parametrize("examples", [1, 2, 3, 5, 8, 97, 4097, 100_003])
def test_an_order_that_no_array_holds_has_every_record_once(examples):
    positions = np.arange(examples)
    found = order.scattered(5, 0, examples, positions)
    np.testing.assert_array_equal(np.sort(found), positions)
    # A position's record does not depend on what else is asked for.
    some = np.random.default_rng(0).integers(0, examples, 50)
    np.testing.assert_array_equal(order.scattered(5, 0, examples, some), found[some])
    if examples > 90:
        for seed, epoch in ((5, 1), (6, 0)):
            assert np.mean(order.scattered(seed, epoch, examples, positions) == found) < 0.1
        assert abs(np.corrcoef(positions, found)[0, 1]) < 4 / examples**0.5


def test_an_order_that_no_array_holds_spreads_every_part_over_all():
    """Of 300 orders of 1000: how many of each tenth of the positions come from which tenth."""
    table, positions = np.zeros((10, 10)), np.arange(1000)
    for seed in range(300):
        found = order.scattered(seed, 0, 1000, positions)
        np.add.at(table, (positions // 100, found // 100), 1)
    # chi squared with 81 degrees of freedom, from below its 0.01 to its 0.99 quantile.
    assert 53 < ((table - 3000) ** 2 / 3000).sum() < 114


def test_an_order_that_no_array_holds_is_the_one_of_runs_already_begun():
    """See above: with another order, runs of more than 1e8 examples could not be continued."""
    assert order.scattered(3, 1, 10, np.arange(10)).tolist() == [4, 7, 6, 8, 0, 2, 1, 9, 5, 3]
    found = order.scattered(0, 0, 2**31 - 1, np.arange(10**5, 2 * 10**5))
    assert zlib.crc32(found.astype("<i8").tobytes()) == 1795247821


def test_beyond_a_hundred_million_examples_nothing_of_their_number_is_in_memory(monkeypatch):
    monkeypatch.delattr(order, "permutation")
    examples = 2 * 10**9
    walk = order.records(7, examples - 5000, 10_000, examples)
    assert (walk[:, 1] == np.repeat([0, 1], 5000)).all()
    for epoch, first in ((0, examples - 5000), (1, 0)):
        own = walk[walk[:, 1] == epoch]
        assert len(np.unique(own[:, 0])) == 5000 and own[:, 0].min() >= 0
        assert own[:, 2].tolist() == list(range(first, first + 5000))
        np.testing.assert_array_equal(
            own[:, 0], order.scattered(7, epoch, examples, own[:, 2]))


def test_no_records_are_an_empty_array():
    assert order.records(0, 5, 0, 10).shape == (0, 3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: order.permutation(-1, 0, 10), "seed is -1"),
    (lambda: order.permutation(2**32, 0, 10), "seed is 4294967296"),
    (lambda: order.permutation(0, -1, 10), "epoch is -1"),
    (lambda: order.permutation(0, 0, 0), "there are 0 examples"),
    (lambda: order.records(0, 0, 1, 2**31), "2147483648 examples; there must be from 1 to 2..31"),
    (lambda: order.records(0, -1, 5, 10), "start is -1"),
    (lambda: order.records(0, 0, 5, 0), "there are 0 examples"),
])
def test_orders_that_do_not_exist_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- augmentation --------------------------------------------------------------------------------
def noise(*shape):
    """Random uint8 images on the device."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def run_key(seed=0):
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 3)


def keys_of(count, epoch=0, seed=0):
    return augment.example_keys(run_key(seed), jnp.full(count, epoch), jnp.arange(count))


def reference_pictures(image, pad, crop, flip):
    """Every picture an image can become, by NumPy: bytes to (row, column, flipped)."""
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    return {
        (cut[:, ::-1] if flipped else cut).tobytes(): (row, column, flipped)
        for row in range(padded.shape[0] - crop + 1)
        for column in range(padded.shape[1] - crop + 1)
        for flipped in range(1 + flip)
        for cut in [padded[row : row + crop, column : column + crop]]
    }


@pytest.mark.parametrize(("shape", "pad", "crop", "flip"), [
    ((8, 8, 3), 2, 8, True), ((8, 8, 1), 1, 8, False), ((9, 6, 3), 5, 4, True),
    ((5, 5, 2), 0, 3, True), ((1, 1, 1), 0, 1, False),
])
def test_every_picture_is_one_numpy_cuts_and_all_occur_alike(shape, pad, crop, flip):
    images = noise(3, *shape)
    references = reference_pictures(np.asarray(images[1]), pad, crop, flip)
    count = 60 * len(references)
    pictures = np.asarray(augment.crop_and_flip(
        images[jnp.ones(count, jnp.int32)], keys_of(count), pad, crop, flip
    ))
    assert pictures.dtype == np.uint8
    times = dict.fromkeys(references.values(), 0)
    for place, picture in enumerate(pictures):
        found = references.get(picture.tobytes())
        assert found is not None, f"example {place} is none of the pictures NumPy cuts"
        times[found] += 1
    # Each is a count with mean 60: 6 standard deviations leave one wrong alarm in millions.
    assert min(times.values()) > 60 - 6 * 60**0.5 and max(times.values()) < 60 + 6 * 60**0.5
    if flip:
        mirrored = sum(n for (*_, flipped), n in times.items() if flipped)
        assert abs(mirrored - count / 2) < 6 * (count / 4) ** 0.5


def test_without_a_crop_images_stay_as_they_are_but_for_the_flip():
    images = noise(20, 6, 9, 3)
    np.testing.assert_array_equal(
        augment.crop_and_flip(images, keys_of(20), 0, 0, False), images
    )
    pictures = np.asarray(augment.crop_and_flip(images, keys_of(20), 0, 0, True))
    upright = (pictures == images).all((1, 2, 3))
    mirrored = (pictures == images[:, :, ::-1]).all((1, 2, 3))
    assert (upright ^ mirrored).all() and upright.any() and mirrored.any()


def test_an_example_gets_the_same_picture_in_every_batch():
    """Batches of 1, 3 and 64, compiled or not, as records or gathered before (streaming)."""
    images = lay_out(noise(50, 8, 8, 3))
    rows = order.records(4, 30, 64, 50)
    record, epoch, place = rows.T

    def take(images, record, epoch, place):
        keys = augment.example_keys(run_key(), epoch, place)
        return augment.crop_and_flip(images.take(record), keys, 2, 8, True)

    whole = np.asarray(take(images, record, epoch, place))
    compiled = jax.jit(take)
    np.testing.assert_array_equal(compiled(images, record, epoch, place), whole)
    for size in (1, 3):
        for start in range(0, 12, size):
            part = slice(start, start + size)
            np.testing.assert_array_equal(
                compiled(images, record[part], epoch[part], place[part]), whole[part],
                err_msg=f"examples {part} in a batch of {size}",
            )
    mapped = jax.vmap(take, in_axes=(None, 0, 0, 0))
    cut = [column.reshape(4, 16) for column in (record, epoch, place)]
    np.testing.assert_array_equal(mapped(images, *cut).reshape(whole.shape), whole)
    fed = lay_out(images.take(record))
    np.testing.assert_array_equal(compiled(fed, np.arange(64), epoch, place), whole)


@pytest.mark.parametrize(("shape", "pad", "crop"), [
    ((32, 32, 3), 4, 32), ((9, 6, 3), 5, 4), ((8, 8, 1), 1, 8), ((300, 290, 2), 20, 224),
])
def test_what_a_tpu_multiplies_is_what_others_gather(shape, pad, crop):
    """To the bit, at all 256 values of a pixel."""
    height, width, _ = shape
    images, draw = noise(7, *shape), np.random.default_rng(1)
    rows = draw.integers(0, height, (7, crop), dtype=np.int32)
    cols = draw.integers(0, width, (7, crop), dtype=np.int32)
    expected = np.stack([image[np.ix_(*lines)] for image, *lines in zip(
        np.asarray(images), rows, cols, strict=True)])
    for function in (augment.lines_by_index, augment.lines_by_products):
        taken = jax.jit(function)(images, rows, cols)
        assert taken.dtype == np.uint8
        np.testing.assert_array_equal(taken, expected, err_msg=function.__name__)


def test_resident_images_are_taken_whole():
    images = noise(5, 3, 4, 2)
    record = jnp.array([4, 0, 4])
    resident = lay_out(images)
    assert resident.rows_NxP.shape == (5, 24)
    np.testing.assert_array_equal(resident.take(record), images[record])
    assert lay_out(np.zeros((0, 3, 4, 2), np.uint8)).rows_NxP.shape == (0, 24)


def test_the_augmentation_is_the_one_of_runs_already_begun():
    """A golden test, as for the order: a release of JAX that moves the draws must fail.

    The pixels of a 15x15 image number themselves, so that a 4x4 crop tells where it was cut.
    Changing these values breaks the continuing of every run that augments.
    """
    image = jnp.arange(225, dtype=jnp.uint8).reshape(1, 15, 15, 1)
    epoch, place = jnp.array([0, 0, 0, 1, 1, 204]), jnp.array([0, 1, 49_999, 0, 1, 1_281_166])
    keys = augment.example_keys(run_key(seed=7), epoch, place)
    cut = augment.crop_and_flip(image.repeat(6, axis=0), keys, 0, 4, True)
    first_rows = np.asarray(cut)[:, 0, :, 0].astype(int)
    drawn = [(*divmod(row.min(), 15), row[0] > row[1]) for row in first_rows]
    assert drawn == [
        (8, 11, True), (3, 10, False), (6, 0, True), (11, 0, False), (1, 8, False), (3, 5, False),
    ]


@pytest.mark.parametrize(("shape", "crop", "rows", "columns"), [
    ((8, 8), 0, slice(0, 8), slice(0, 8)), ((8, 8), 8, slice(0, 8), slice(0, 8)),
    ((8, 8), 4, slice(2, 6), slice(2, 6)), ((9, 6), 4, slice(2, 6), slice(1, 5)),
])
def test_evaluation_sees_the_centre(shape, crop, rows, columns):
    images = noise(5, *shape, 3)
    taken = augment.crop_centre(images, crop)
    np.testing.assert_array_equal(taken, np.asarray(images)[:, rows, columns])


@pytest.mark.parametrize(("pad", "crop", "message"), [
    (2, 0, "pad=2 and crop=0, which cuts nothing"), (8, 8, "a pad of at most 7"),
    (4, 9, "the crop may be 8 at most"), (-1, 8, "must be 0 or more"),
])
def test_windows_that_do_not_fit_are_refused(pad, crop, message):
    images = noise(1, 8, 8, 1)
    with pytest.raises(ValueError, match=message):
        augment.crop_and_flip(images, keys_of(1), pad, crop, False)


@pytest.mark.parametrize(("dtype", "tolerance"), [
    ("float32", 1e-6), ("bfloat16", 2**-8), ("float64", 1e-14),
])
def test_normalisation_is_by_channel_in_enough_digits(dtype, tolerance):
    images = noise(4, 5, 5, 3)
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    with jax.enable_x64(dtype == "float64"):
        floats = augment.normalise(images, mean, std, jnp.dtype(dtype))
        assert floats.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(floats, np.float64), (images - np.array(mean)) / np.array(std),
            rtol=tolerance, atol=tolerance,
        )
