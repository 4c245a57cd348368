"""Panoptic quality, by the definition of the COCO panoptic task (Kirillov et al., arXiv 1801.00868).

A predicted and a true segment of one category match if their IoU is above 0.5; void pixels of the truth do not count in
the union.  A prediction without a match is a false positive, unless more than half of it lies on void or on a crowd of
its category.  Of a category::

    SQ = sum of IoU / TP        RQ = TP / (TP + FP / 2 + FN / 2)        PQ = SQ * RQ

and the values of a set of categories are the means over those that occur in truth or prediction.

Crowds: each takes no part as a segment; one crowd of a category and image is known to the rule of false positives, the
last of the list (as in the official evaluation).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

VOID = 0


class Segment(NamedTuple):
    """A segment of a panoptic picture.

    Attributes:
        id: Its number in the picture, not 0.
        category: Its category, from 0.
        is_crowd: Whether it is a crowd; of no meaning in predictions.
    """

    id: int
    category: int
    is_crowd: bool = False


def panoptic_counts(
    truth: np.ndarray,
    true_segments: Sequence[Segment],
    predicted: np.ndarray,
    predicted_segments: Sequence[Segment],
    num_categories: int,
) -> np.ndarray:
    """Count the matches of one image.

    Args:
        truth: Ids ``[H, W]``, integers; 0 is void, and ids that are not listed are no segments.
        true_segments: Segments of the truth.
        predicted: Ids ``[H, W]``, integers; 0 is void.
        predicted_segments: Segments of the prediction.
        num_categories: How many categories there are.

    Returns:
        float64 ``[num_categories, 4]``: sum of IoU, true positives, false positives, false negatives.

    Raises:
        ValueError: The pictures differ in size, or a predicted segment has no pixel or is not listed.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f'truth is {list(truth.shape)} (height, width), the prediction {list(predicted.shape)}')
    true_of, predicted_of = ({s.id: s for s in segments} for segments in (true_segments, predicted_segments))
    overlap, true_area, predicted_area = _areas(truth, predicted)
    _check_listed(predicted_of.keys(), predicted_area.keys() - {VOID})
    counts = np.zeros((num_categories, 4))
    matched_truth, matched_prediction = set(), set()
    for (true_id, predicted_id), shared in overlap.items():
        first, second = true_of.get(true_id), predicted_of.get(predicted_id)
        if first is None or second is None or first.is_crowd or first.category != second.category:
            continue
        void = overlap.get((VOID, predicted_id), 0)
        iou = shared / (predicted_area[predicted_id] + true_area[true_id] - shared - void)
        if iou > 0.5:
            counts[first.category, :2] += iou, 1
            matched_truth.add(true_id)
            matched_prediction.add(predicted_id)
    for segment in true_segments:
        if not segment.is_crowd and segment.id not in matched_truth:
            counts[segment.category, 3] += 1
    crowds = {segment.category: segment.id for segment in true_segments if segment.is_crowd}
    for segment in predicted_segments:
        nobodys = [VOID, *([crowds[segment.category]] if segment.category in crowds else [])]
        excused = sum(overlap.get((number, segment.id), 0) for number in nobodys)
        if segment.id not in matched_prediction and excused / predicted_area[segment.id] <= 0.5:
            counts[segment.category, 2] += 1
    return counts


def _areas(truth: np.ndarray, predicted: np.ndarray) -> tuple[dict[tuple[int, int], int], dict, dict]:
    """Pixels of every pair of ids, of every true id, of every predicted id."""
    true_ids, rows = np.unique(truth, return_inverse=True)
    predicted_ids, columns = np.unique(predicted, return_inverse=True)
    shape = (len(true_ids), len(predicted_ids))
    table = np.bincount(rows.ravel() * shape[1] + columns.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    true_list, predicted_list = true_ids.tolist(), predicted_ids.tolist()
    pairs = {(true_list[i], predicted_list[j]): int(table[i, j]) for i, j in zip(*np.nonzero(table), strict=True)}
    sides = [
        dict(zip(ids, table.sum(axis).tolist(), strict=True)) for ids, axis in ((true_list, 1), (predicted_list, 0))
    ]
    return pairs, sides[0], sides[1]


def _check_listed(listed: Iterable[int], present: Iterable[int]) -> None:
    listed, present = set(listed), set(present)
    if listed - present:
        raise ValueError(f'the predicted segment {min(listed - present)} has no pixel')
    if present - listed:
        raise ValueError(f'the predicted picture has the id {min(present - listed)}, which is not listed')


def panoptic_quality(counts: np.ndarray) -> np.ndarray:
    """Quality of every category.

    Args:
        counts: ``[C, 4]``, sums of what :func:`panoptic_counts` gives.

    Returns:
        float64 ``[C, 3]``: PQ, SQ, RQ in 0..1; 0 for a category without a match, NaN for one that does not occur.
    """
    iou, matched, false, missed = counts.T
    with np.errstate(invalid='ignore', divide='ignore'):
        recognition = matched / (matched + 0.5 * false + 0.5 * missed)
    segmentation = np.divide(iou, matched, out=np.zeros_like(iou), where=matched > 0)
    segmentation[np.isnan(recognition)] = np.nan
    return np.stack([segmentation * recognition, segmentation, recognition], axis=1)
