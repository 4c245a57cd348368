"""mmdet's ``Mask2Former`` detector with semantic results.

mmdet's own detector refuses a semantic result, which the official panoptic models give beside the others.
"""

from mmdet.models.detectors import Mask2Former
from mmdet.structures import SampleList

from boltz_mm.registry import MODELS


@MODELS.register_module()
class PointMask2Former(Mask2Former):
    """``Mask2Former`` that keeps semantic results (``test_cfg=dict(semantic_on=True)``) as ``pred_sem_seg``."""

    def add_pred_to_datasample(self, data_samples: SampleList, results_list: list[dict]) -> SampleList:
        """Store results in the samples.

        Args:
            data_samples: One for each image.
            results_list: ``pan_results``, ``ins_results`` and ``sem_results`` of each image, as far as there are any.

        Returns:
            The samples with ``pred_panoptic_seg``, ``pred_instances`` and ``pred_sem_seg``.
        """
        for sample, results in zip(data_samples, results_list, strict=True):
            if 'sem_results' in results:
                sample.pred_sem_seg = results.pop('sem_results')
        return super().add_pred_to_datasample(data_samples, results_list)
