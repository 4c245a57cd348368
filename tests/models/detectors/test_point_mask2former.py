"""The detector that keeps semantic results."""

import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as MMENGINE_MODELS

from tests.models.heads.test_point_mask2former_head import ARCH, HEAD


def test_keeps_all_three_results() -> None:
    torch.manual_seed(0)
    classes = dict(num_things_classes=2, num_stuff_classes=2)
    model = MMENGINE_MODELS.build(
        ConfigDict(
            type='boltz_mm.PointMask2Former',
            data_preprocessor=dict(type='mmdet.DetDataPreprocessor', pad_size_divisor=32),
            backbone=dict(type='boltz_mm.AFF', arch=ARCH, cluster_size=4, nbhd_size=12),
            panoptic_head=dict(type='boltz_mm.PointMask2FormerHead', **HEAD, **classes),
            panoptic_fusion_head=dict(type='boltz_mm.PointMaskFusionHead', **classes),
            test_cfg=dict(panoptic_on=True, instance_on=True, semantic_on=True),
        )
    ).eval()
    sample = DetDataSample(metainfo=dict(img_shape=(50, 60), ori_shape=(25, 30)))
    with torch.no_grad():
        [result] = model.test_step(dict(inputs=[torch.rand(3, 50, 60)], data_samples=[sample]))
    assert result.pred_sem_seg.sem_seg.shape == result.pred_panoptic_seg.sem_seg.shape == (1, 25, 30)
    assert result.pred_instances.masks.shape[1:] == (25, 30)
    assert torch.equal(result.pred_sem_seg.sem_seg[0], result.pred_sem_seg.logits.argmax(0))
