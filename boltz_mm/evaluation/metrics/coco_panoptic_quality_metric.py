"""mmdet's ``CocoPanopticMetric`` without the package ``panopticapi``, which no package index has."""

import os
import os.path as osp
import warnings
from collections.abc import Sequence
from typing import Any

import mmcv
import numpy as np
from mmdet.evaluation.functional import INSTANCE_OFFSET
from mmdet.evaluation.metrics import CocoPanopticMetric
from mmdet.evaluation.metrics.coco_panoptic_metric import parse_pq_results, print_panoptic_table
from mmengine.evaluator import BaseMetric
from mmengine.fileio import dump, get_local_path
from mmengine.logging import MMLogger

from boltz_mm.datasets.checked_coco import DatasetError
from boltz_mm.datasets.coco_panoptic import CheckedPanopticCOCO, id2rgb, labels_of_categories, read_segment_ids
from boltz_mm.evaluation.panoptic_quality import VOID, Segment, panoptic_counts, panoptic_quality
from boltz_mm.registry import METRICS


@METRICS.register_module()
class CocoPanopticQualityMetric(CocoPanopticMetric):
    """PQ, SQ and RQ of all classes, of things and of stuff, in percent, as ``CocoPanopticMetric`` names them.

    Predictions are what mmdet's panoptic heads give: ``pred_panoptic_seg.sem_seg`` ``[1, H, W]``, each pixel
    ``label + 1000 * instance``, the number of classes (or ``ignore_index``) for void.

    Args:
        ann_file: Panoptic annotation file of the dataset.
        seg_prefix: Folder of its pictures of ids.
        classwise: Print a table of all classes too.
        format_only: Only write the predictions.
        outfile_prefix: Write predictions in COCO's layout, to ``<outfile_prefix>.panoptic.json`` and the folder
            ``<outfile_prefix>.panoptic``.
        backend_args: Where files are read, see ``mmengine.fileio``.
        collect_device: As in ``CocoPanopticMetric``.
        prefix: As in ``CocoPanopticMetric``.

    Raises:
        DatasetError: The annotation file or a picture cannot be used, or an evaluated image is not listed.
        ValueError: ``format_only`` without ``outfile_prefix``.
    """

    def __init__(
        self,
        ann_file: str,
        seg_prefix: str,
        classwise: bool = False,
        format_only: bool = False,
        outfile_prefix: str | None = None,
        backend_args: dict | None = None,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        BaseMetric.__init__(self, collect_device=collect_device, prefix=prefix)  # the parent wants panopticapi
        if format_only and outfile_prefix is None:
            raise ValueError('format_only needs outfile_prefix')
        self.ann_file, self.seg_prefix = ann_file, seg_prefix
        self.classwise, self.format_only, self.outfile_prefix = classwise, format_only, outfile_prefix
        self.backend_args = backend_args
        with get_local_path(ann_file, backend_args=backend_args) as path:
            self._coco_api = CheckedPanopticCOCO(path)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Hold the predictions of a batch against the truth.

        Args:
            data_batch: Not used.
            data_samples: With ``img_id`` and ``pred_panoptic_seg``.
        """
        labels = self._labels()
        category_of = {label: number for number, label in labels.items()}
        for sample in data_samples:
            image_id = sample['img_id']
            if image_id not in self._coco_api.imgs:
                raise DatasetError(f'{self.ann_file}: image {image_id!r} was evaluated but is not listed')
            ids, segments = self._prediction(sample)
            counts = None if self.format_only else self._counts(image_id, ids, segments, labels)
            annotation = self._write(image_id, ids, segments, category_of) if self.outfile_prefix else None
            self.results.append((image_id, counts, annotation))

    def _labels(self) -> dict[int, int]:
        try:
            return labels_of_categories(self.dataset_meta, self._coco_api.dataset['categories'])
        except DatasetError as error:
            raise DatasetError(f'{self.ann_file}: {error}') from None

    def _prediction(self, sample: dict) -> tuple[np.ndarray, list[Segment]]:
        """Ids ``[H, W]``, from 1, and their segments."""
        found = sample['pred_panoptic_seg']
        values, ids = np.unique(np.asarray(found['sem_seg'].cpu()).squeeze(0), return_inverse=True)
        labels = values % INSTANCE_OFFSET
        voids = {len(self.dataset_meta['classes']), found.get('ignore_index', len(self.dataset_meta['classes']))}
        numbers = np.where(np.isin(labels, list(voids)), VOID, np.arange(1, len(values) + 1))
        segments = [Segment(int(n), int(label)) for n, label in zip(numbers, labels, strict=True) if n != VOID]
        return numbers[ids].reshape(found['sem_seg'].shape[-2:]), segments

    def _counts(self, image_id: Any, ids: np.ndarray, segments: list[Segment], labels: dict[int, int]) -> np.ndarray:
        name = self._coco_api.imgs[image_id].get('segm_file')
        if name is None:
            raise DatasetError(f'{self.ann_file}: image {image_id!r} has no panoptic annotation')
        path = osp.join(self.seg_prefix, name)
        where = f'image {image_id!r} of {self.ann_file}'
        truth = [
            Segment(segment['id'], labels[segment['category_id']], bool(segment['iscrowd']))
            for segment in self._coco_api.imgToAnns[image_id]
            if segment['category_id'] in labels
        ]
        try:
            true_ids = read_segment_ids(path, self.backend_args)
        except DatasetError as error:
            raise DatasetError(f'{where}: {error}') from None
        try:
            return panoptic_counts(true_ids, truth, ids, segments, len(self.dataset_meta['classes']))
        except ValueError as error:
            raise DatasetError(f'{where}: {path}: {error}') from None

    def _write(self, image_id: Any, ids: np.ndarray, segments: list[Segment], category_of: dict[int, int]) -> dict:
        """Write one picture of ids; returns its annotation."""
        name = f'{osp.splitext(osp.basename(self._coco_api.imgs[image_id]["file_name"]))[0]}.png'
        mmcv.imwrite(id2rgb(ids)[..., ::-1], osp.join(f'{self.outfile_prefix}.panoptic', name))
        areas = np.bincount(ids.ravel())
        rows = [{'id': s.id, 'category_id': category_of[s.category], 'area': int(areas[s.id])} for s in segments]
        return {'image_id': image_id, 'file_name': name, 'segments_info': rows}

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The metrics of all processed images.

        Args:
            results: Triples of image id, counts and annotation, as :meth:`process` makes them.
        """
        logger = MMLogger.get_current_instance()
        if self.outfile_prefix:
            path = f'{self.outfile_prefix}.panoptic.json'
            os.makedirs(osp.dirname(osp.abspath(path)), exist_ok=True)
            dump({'annotations': [annotation for _, _, annotation in results]}, path)
            logger.info(f'predictions are in {path}')
        if self.format_only:
            return {}
        if len(results) < len(self._coco_api.imgs):
            warnings.warn(
                f'{self.ann_file} lists {len(self._coco_api.imgs)} images, of which {len(results)} were evaluated; the '
                'others do not count',
                stacklevel=2,
            )
        quality = panoptic_quality(np.sum([counts for _, counts, _ in results], axis=0))
        classes, things = self.dataset_meta['classes'], self.dataset_meta['thing_classes']
        is_thing = np.array([name in things for name in classes])
        groups = {'All': np.ones(len(classes), dtype=bool), 'Things': is_thing, 'Stuff': ~is_thing}
        table = {name: _mean(quality[chosen]) for name, chosen in groups.items()}
        rows = {name: _mean(quality[i : i + 1]) for i, name in enumerate(classes)} if self.classwise else None
        print_panoptic_table(table, rows, logger=logger)
        return parse_pq_results(table)


def _mean(quality: np.ndarray) -> dict[str, float]:
    """Mean of the classes that occur, and their number; 0 if none does."""
    found = quality[~np.isnan(quality[:, 0])]
    pq, sq, rq = found.mean(axis=0).tolist() if len(found) else (0.0, 0.0, 0.0)
    return {'pq': pq, 'sq': sq, 'rq': rq, 'n': len(found)}
