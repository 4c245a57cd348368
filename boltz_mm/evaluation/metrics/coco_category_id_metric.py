"""COCO metrics for networks whose labels are category ids, and for datasets whose file is checked.

The numbers are pycocotools' own; what is added to mmdet's ``CocoMetric`` is that no detection at all is a result
(AP 0, as pycocotools defines it) instead of an empty table, that a broken annotation file gives one clear error, and
that labels may be category ids.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from mmdet.evaluation import CocoMetric
from mmengine.fileio import get_local_path

from boltz_mm.datasets.checked_coco import CheckedCOCO, DatasetError
from boltz_mm.registry import METRICS


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """``CocoMetric`` for contiguous labels (the partner of ``CheckedCocoDataset``).

    Args:
        ann_file: Path of the annotation file.
        seen_images_only: Leave out the images of the file that the model was not shown (a dataset with ``indices``).
            Otherwise their objects count as missed, as in ``CocoMetric``, and a warning says so.
        **kwargs: As ``CocoMetric``.

    Raises:
        DatasetError: The annotation file cannot be used.
    """

    def __init__(self, ann_file: str, seen_images_only: bool = False, **kwargs) -> None:
        super().__init__(ann_file=None, **kwargs)
        self.ann_file = ann_file
        self.seen_images_only = seen_images_only
        with get_local_path(ann_file, backend_args=self.backend_args) as path:
            self._coco_api = CheckedCOCO(path)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The metrics of all processed images.

        Args:
            results: Pairs of ground truth and prediction, as :meth:`process` makes them.

        Raises:
            DatasetError: A prediction is for an image that the annotation file does not list.
        """
        seen = {prediction['img_id'] for _, prediction in results}
        unknown = seen - set(self._coco_api.imgs)
        if unknown:
            raise DatasetError(f'{self.ann_file}: image {min(unknown, key=str)!r} was evaluated but is not listed')
        if self.seen_images_only:
            self.img_ids = sorted(seen)
        elif len(seen) < len(self._coco_api.imgs):
            warnings.warn(
                f'{self.ann_file} lists {len(self._coco_api.imgs)} images, of which {len(seen)} were evaluated; the '
                'objects of the others count as missed (seen_images_only=True leaves them out)',
                stacklevel=2,
            )
        category_of = self._categories()
        # pycocotools sorts the ids; mmdet's table by class takes it that they are sorted.
        self.cat_ids = sorted(category_of.values())
        position = {label: self.cat_ids.index(number) for label, number in category_of.items()}
        return super().compute_metrics([(truth, _relabel(prediction, position)) for truth, prediction in results])

    def _categories(self) -> dict[int, int]:
        """The category id of each label that is evaluated."""
        ids = {category['name']: number for number, category in self._coco_api.cats.items()}
        return {label: ids[name] for label, name in enumerate(self.dataset_meta['classes']) if name in ids}


@METRICS.register_module()
class CocoCategoryIdMetric(CheckedCocoMetric):
    """``CocoMetric`` for labels that are category ids (the partner of ``CocoCategoryIdDataset``).

    Detections of ids that are not evaluated are dropped, as the COCO evaluation does; they have taken their place
    among the detections of the image before.

    Args:
        ann_file: Path of the annotation file.
        category_ids: Category ids to evaluate, ``None`` for those of the annotation file.
        **kwargs: As ``CocoMetric``.

    Raises:
        DatasetError: The annotation file cannot be used, or does not have one of ``category_ids``.
    """

    def __init__(self, ann_file: str, category_ids: Sequence[int] | None = None, **kwargs) -> None:
        super().__init__(ann_file, **kwargs)
        listed = self._coco_api.getCatIds()
        self.category_ids = list(listed if category_ids is None else category_ids)
        missing = set(self.category_ids) - set(listed)
        if missing:
            raise DatasetError(f'{ann_file}: no category has the id {min(missing)}')

    def _categories(self) -> dict[int, int]:
        return {number: number for number in self.category_ids}


def _relabel(prediction: dict, position: dict[int, int]) -> dict:
    """The prediction with labels as positions among the evaluated ids, without labels that are not evaluated."""
    labels = prediction['labels'].tolist()
    keep = [index for index, label in enumerate(labels) if label in position]
    kept = {**prediction, 'labels': np.array([position[labels[index]] for index in keep], dtype=np.int64)}
    for key in ('bboxes', 'scores', 'mask_scores'):
        if key in prediction:
            kept[key] = prediction[key][keep]
    if 'masks' in prediction:
        kept['masks'] = [prediction['masks'][index] for index in keep]
    return kept
