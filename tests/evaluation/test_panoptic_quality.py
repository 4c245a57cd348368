"""Panoptic quality by hand, with void, crowds, and categories that do not occur."""

import numpy as np
import pytest

from boltz_mm.evaluation.panoptic_quality import Segment, panoptic_counts, panoptic_quality


def _row(*runs: tuple[int, int]) -> np.ndarray:
    """A picture of one row: (id, how many pixels)."""
    return np.concatenate([np.full(count, number) for number, count in runs])[None]


def test_match_needs_more_than_half_and_the_category():
    truth = [Segment(1, 0), Segment(2, 1), Segment(3, 0)]
    predicted = [Segment(7, 0), Segment(8, 0), Segment(9, 0)]
    true_ids = _row((1, 10), (2, 10), (3, 10))
    # Against 1: 8 of 10 pixels.  Against 2: all, but the wrong category.  Against 3: half of the union, no more.
    predicted_ids = _row((7, 8), (8, 12), (9, 5), (0, 5))
    counts = panoptic_counts(true_ids, truth, predicted_ids, predicted, 3)
    np.testing.assert_allclose(counts, [[0.8, 1, 2, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    pq, sq, rq = panoptic_quality(counts)[0]
    assert (sq, rq) == pytest.approx((0.8, 1 / 2.5)) and pq == pytest.approx(sq * rq)
    assert panoptic_quality(counts)[1].tolist() == [0, 0, 0]
    assert np.isnan(panoptic_quality(counts)[2]).all()


def test_void_is_not_in_the_union_and_excuses_a_false_positive():
    true_ids = _row((1, 10), (0, 20))
    first = panoptic_counts(true_ids, [Segment(1, 0)], _row((5, 30)), [Segment(5, 0)], 1)
    np.testing.assert_allclose(first, [[1.0, 1, 0, 0]])
    predicted_ids = _row((5, 4), (6, 6), (6, 7), (0, 13))  # 6: seven of thirteen pixels on void
    excused = panoptic_counts(true_ids, [Segment(1, 0)], predicted_ids, [Segment(5, 0), Segment(6, 1)], 2)
    np.testing.assert_allclose(excused, [[0, 0, 1, 1], [0, 0, 0, 0]])
    half = panoptic_counts(true_ids, [Segment(1, 0)], _row((0, 4), (6, 12), (0, 14)), [Segment(6, 1)], 2)
    assert half[1, 2] == 1  # half is not more than half


def test_crowd_matches_nothing_and_excuses_its_category_alone():
    truth = [Segment(1, 0, is_crowd=True)]
    for category, false in ((0, 0), (1, 1)):
        counts = panoptic_counts(_row((1, 10), (2, 5)), truth, _row((4, 11), (0, 4)), [Segment(4, category)], 2)
        assert counts[category].tolist() == [0, 0, false, 0]
        assert counts[:, 3].sum() == 0


def test_unlisted_ids_of_the_truth_are_no_void():
    counts = panoptic_counts(_row((9, 10)), [], _row((4, 10)), [Segment(4, 0)], 1)
    assert counts.tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize(
    ('predicted_ids', 'segments', 'message'),
    [
        (_row((4, 9)), [Segment(4, 0)], 'the prediction'),
        (_row((4, 10)), [], 'the id 4, which is not listed'),
        (_row((0, 10)), [Segment(3, 0)], 'segment 3 has no pixel'),
    ],
)
def test_what_does_not_fit_raises(predicted_ids, segments, message):
    with pytest.raises(ValueError, match=message):
        panoptic_counts(_row((1, 10)), [Segment(1, 0)], predicted_ids, segments, 1)
