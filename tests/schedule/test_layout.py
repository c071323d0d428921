"""Dealing ghost batches: each has one slot, in order, whatever the devices and passes."""

import itertools

import numpy as np
import pytest

from bigbatch.schedule.layout import Layout, ghosts_by_slot, lay_out_examples, make_layout

GHOST = 4


def all_layouts():
    for ghosts, devices, microbatches in itertools.product(
        (1, 2, 3, 5, 8, 9, 25, 64), (1, 2, 3, 4, 8, 16), (1, 2, 3, 4, 100)
    ):
        yield make_layout(ghosts * GHOST, GHOST, devices, 1, microbatches)


def test_every_ghost_batch_has_one_slot_and_devices_take_them_in_runs():
    for layout in all_layouts():
        records_KxDxS = ghosts_by_slot(layout)
        assert records_KxDxS.shape == (layout.microbatches, layout.devices, layout.slots)
        # Device after device, pass after pass: the order of the update.
        in_order = records_KxDxS.transpose(1, 0, 2).reshape(-1)
        np.testing.assert_array_equal(
            in_order[in_order >= 0], np.arange(layout.ghosts), err_msg=str(layout))
        assert (in_order[in_order < 0] == -1).all()
        assert layout.idle_share == pytest.approx((in_order < 0).mean()), layout


def test_no_device_takes_more_than_its_share_and_no_pass_is_idle():
    for layout in all_layouts():
        filled_KxD = (ghosts_by_slot(layout) >= 0).sum(axis=2)
        share = -(-layout.ghosts // layout.devices)
        assert filled_KxD.sum(axis=0).max() == share, layout
        assert (filled_KxD.max(axis=1) > 0).all(), f"{layout} has a pass without work"


def test_passes_by_hand_are_of_one_size():
    for ghosts, devices, wanted in itertools.product((1, 5, 8, 25), (1, 3, 8), (1, 2, 3, 4, 100)):
        layout = make_layout(ghosts * GHOST, GHOST, devices, 1, wanted)
        share = -(-ghosts // devices)
        assert layout.microbatches <= wanted
        # Passes of one size: 5 ghost batches in 4 passes are 2 + 2 + 1.
        assert layout.slots == -(-share // min(wanted, share))
        assert layout.microbatches == -(-share // layout.slots)


@pytest.mark.parametrize(("batch", "devices", "most", "passes", "slots", "idle"), [
    (640, 8, 1024, 1, 1, 3 / 8),  # the paper's 640 in ghost batches of 128, on 8 devices
    (128, 1, 1024, 1, 1, 0),
    (1024, 1, 1024, 1, 8, 0),
    (1152, 1, 1024, 3, 3, 0),  # 3 + 3 + 3, and neither 8 + 1 nor 5 + 4
    (1152, 1, 1151, 3, 3, 0),
    (3200, 1, 1024, 5, 5, 0),  # 25 ghost batches: 4 passes of 7 would be 11 % idle
    (16_000, 1, 1024, 25, 5, 0),
    (16_256, 1, 1024, 16, 8, 1 / 128),  # 127 is prime, and passes of 1 leave a device unused
    (896, 1, 512, 2, 4, 1 / 8),  # likewise 7
    (128_384, 1, 1024, 126, 8, 5 / 1008),  # 251 passes of 4 would have 1 padding slot for these 5
    (5120, 8, 128, 5, 1, 0),
    (65_536, 1, 1024, 64, 8, 0),
])
def test_the_passes_that_take_least_time(batch, devices, most, passes, slots, idle):
    ghosts = batch // 128
    layout = make_layout(batch, 128, devices, most, 0)
    assert layout == Layout(ghosts, devices, passes, slots)
    assert layout.idle_share == pytest.approx(idle)
    assert layout.slots * 128 <= most


def test_more_passes_are_taken_only_for_fewer_padding_slots():
    """Beside as few passes as fit, which take ceil(each / most), for every count and limit."""
    for ghosts, devices, most in itertools.product(range(1, 130), (1, 3, 8), (1, 2, 5, 8, 64)):
        layout = make_layout(ghosts * GHOST, GHOST, devices, most * GHOST, 0)
        each = -(-ghosts // devices)
        fewest = -(-each // most)
        assert layout.slots <= most
        assert fewest <= layout.microbatches <= 2 * fewest
        more, saved = (layout.microbatches - fewest,
                       fewest * -(-each // fewest) - layout.microbatches * layout.slots)
        assert saved >= more / 8, layout


def test_a_ghost_batch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="max_per_device_batch is 100, less than a ghost batch of "
                                         "128.*raise it to 128"):
        make_layout(640, 128, 1, 100, 0)
    assert make_layout(640, 128, 1, 100, 5).microbatches == 5  # by hand it is not read


def test_rows_show_each_example_at_its_slot():
    for layout in all_layouts():
        batch = layout.ghosts * GHOST
        records_Bx3 = np.random.default_rng(0).permutation(3 * batch).reshape(batch, 3)
        found = []
        examples_MxSx4 = lay_out_examples(records_Bx3.astype(np.int32), layout, GHOST)
        for records_DxS, rows in zip(ghosts_by_slot(layout), examples_MxSx4, strict=True):
            assert rows.dtype == np.int32
            assert rows.shape == (layout.devices * layout.slots * GHOST, 4)
            empty = rows[:, 3] < 0
            assert (np.repeat(records_DxS.ravel() < 0, GHOST) == empty).all()
            # What an empty slot shows is thrown away, but the network must be able to take it.
            assert np.isin(rows[empty, 0], records_Bx3[:, 0]).all()
            found.append(rows[~empty])
        found = np.concatenate(found)
        # By the ghost batches after its own, and its place in it, an example is where it was.
        in_order = found[np.argsort(-found[:, 3], kind="stable")]
        np.testing.assert_array_equal(in_order[:, :3], records_Bx3)
        np.testing.assert_array_equal(
            in_order[:, 3], np.repeat(np.arange(layout.ghosts)[::-1], GHOST))
