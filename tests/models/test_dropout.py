"""Dropout masks that follow the example: its key and the place in the network, nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbatch.data.augment import example_keys
from bigbatch.models.dropout import dropout

RATE = 0.3
ONES = jnp.ones((12, 5, 5, 8))


def keys(epoch, places):
    places = jnp.asarray(places)
    return example_keys(jax.random.key(0), jnp.full(places.shape, epoch), places)


def masks(keys_B, tag=0):
    return np.asarray(dropout(ONES[: len(keys_B)], RATE, keys_B, True, tag)) > 0


def test_a_share_is_dropped_and_the_rest_scaled_up():
    outputs = np.asarray(dropout(ONES, RATE, keys(0, range(12)), True, 0))
    kept = outputs != 0
    np.testing.assert_allclose(outputs[kept], 1 / (1 - RATE), rtol=1e-6)
    # 2 400 draws: four standard deviations are 0.037.
    assert abs(kept.mean() - (1 - RATE)) < 0.037


def test_a_mask_does_not_depend_on_the_rest_of_the_batch():
    whole = masks(keys(2, range(12)))
    parts = [masks(keys(2, range(start, start + 3))) for start in range(0, 12, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(masks(keys(2, range(12))[::-1])[::-1], whole)


def test_masks_differ_between_examples_epochs_and_layers():
    drawn = [
        mask for epoch in range(3) for tag in range(3)
        for mask in masks(keys(epoch, range(4)), tag)
    ]
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            # Independent masks agree in 1 - 2 x 0.3 x 0.7 = 58 % of 200 places, give or take 3.5.
            assert 0.38 < np.mean(one == other) < 0.78


def test_outside_training_nothing_is_dropped():
    assert dropout(ONES, RATE, keys(0, range(12)), False, 0) is ONES
    assert dropout(ONES, 0.0, keys(0, range(12)), True, 0) is ONES


def test_the_type_stays():
    narrow = ONES.astype(jnp.bfloat16)
    assert dropout(narrow, RATE, keys(0, range(12)), True, 0).dtype == jnp.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_rates_that_are_none_are_refused(rate):
    with pytest.raises(ValueError, match=f"rate is {rate}; it must lie in"):
        dropout(ONES, rate, keys(0, range(12)), True, 0)
