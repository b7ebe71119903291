"""Which samples make which batch."""

import numpy as np
import pytest

from longtake.platform.train.order import Mixture, Order, Share

pytestmark = pytest.mark.cpu


def test_an_epoch_draws_each_clip_as_often_as_the_stage_says():
    order = Order(num_rows=7, seed=3, per_row=2)
    first, second = order.rows(0, 14), order.rows(14, 14)
    assert sorted(first) == sorted([*range(7)] * 2) == sorted(second)
    assert list(first) != list(second)
    assert list(order.rows(5, 20)) == [*first[5:], *second[:11]]


def test_a_mixture_is_exact_and_needs_no_history():
    mixture, other = Mixture((3, 1), seed=5), Mixture((3, 1), seed=6)
    whole = mixture.parts(0, 2500)
    assert [len(places) for _, places in whole[:2]] == pytest.approx([1875, 625], abs=25)
    assert sorted(np.concatenate([places for _, places in whole])) == list(range(2500))
    (_, of_second), (_, of_other) = whole[1], other.parts(0, 2500)[1]
    assert len(of_second[of_second < 2000]) == 500 and not np.array_equal(of_second[:99], of_other[:99])
    for start, count in ((0, 1), (990, 20), (1000, 7), (1999, 400)):  # any stretch goes on where the one before ended
        for (first, places), (_, all_places) in zip(mixture.parts(start, count), whole, strict=True):
            assert first == (all_places < start).sum()
            assert np.array_equal(places, all_places[(all_places >= start) & (all_places < start + count)] - start)


@pytest.mark.parametrize(
    ("weights", "says"),
    [((1, 0), "must be positive"), ((1, float("nan")), "must be positive"), ((1, 1e-6), "give at least 0.001")],
)
def test_weights_that_cannot_be_mixed_are_refused(weights, says):
    with pytest.raises(ValueError, match=says):
        Mixture(weights, 0)


def test_workers_share_a_batch_without_overlap():
    shares = [Share(rank, workers=2, micro=3) for rank in range(2)]
    starts = sorted(share.start(number) for share in shares for number in range(4))
    assert starts == [*range(0, 24, 3)]
