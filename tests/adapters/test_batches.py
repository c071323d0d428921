"""Which examples an update takes, of orders that users may have."""

import numpy as np
import pytest

from bigbatch.adapters.batches import indexes, micro_batches
from bigbatch.mistake import Mistake
from tests.adapters.tables import TABLES


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_a_batch_may_lie_in_several_epochs(kind):
    def order(epoch):
        return kind([(example + epoch) % 3 for example in range(3)])

    assert indexes(order, 3, 1, 9) == [1, 2, 1, 2, 0, 2, 0, 1]
    assert indexes(order, 3, 4, 4) == []


def test_an_order_of_another_length_is_refused():
    with pytest.raises(Mistake, match="order of epoch 1 has 2 examples; recipe.examples is 3"):
        indexes(lambda epoch: range(3 - epoch), 3, 2, 5)


def test_micro_batches_are_counted_by_phase():
    table = TABLES["adam"]
    assert micro_batches(table, 2) == (2, 2, 4, 8)
    with pytest.raises(Mistake, match="make all batches multiples of it with Limits"):
        micro_batches(table, 3)
    with pytest.raises(Mistake, match="it must be 1 or more"):
        micro_batches(table, 0)
