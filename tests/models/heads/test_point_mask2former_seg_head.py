"""The head in mmseg's own segmentor."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from boltz_mm.models.heads.point_mask2former_seg_head import PointMask2FormerSegHead
from tests.models.heads.test_point_mask2former_head import ARCH, HEAD


def build(**test_cfg) -> nn.Module:
    torch.manual_seed(0)
    preprocessor = dict(type='mmseg.SegDataPreProcessor', size_divisor=32, test_cfg=dict(size_divisor=32))
    return MMENGINE_MODELS.build(
        ConfigDict(
            type='mmseg.EncoderDecoder',
            data_preprocessor={**preprocessor, 'seg_pad_val': 255},
            backbone=dict(type='boltz_mm.AFF', arch=ARCH, cluster_size=4, nbhd_size=12),
            decode_head=dict(
                type='boltz_mm.PointMask2FormerSegHead', **HEAD, num_classes=4, train_cfg=dict(num_points=32)
            ),
            train_cfg=dict(),
            test_cfg=test_cfg or dict(mode='whole'),
        )
    )


def sample(height: int, width: int, *labels: int) -> SegDataSample:
    meta = dict(img_shape=(height, width), ori_shape=(2 * height, 2 * width))
    area = torch.tensor(labels or (255,))[torch.arange(width) * max(len(labels), 1) // width].expand(1, height, width)
    return SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=area.clone()))


def test_targets_are_the_classes_that_are_present() -> None:
    head = PointMask2FormerSegHead(4, **HEAD)
    first, nothing = head.make_targets([sample(4, 6, 3, 255, 0), sample(4, 6)])
    assert first.labels.tolist() == [0, 3]
    assert first.masks[:, 0].tolist() == [[False] * 4 + [True] * 2, [True] * 2 + [False] * 4]
    assert len(nothing.labels) == 0
    assert nothing.masks.shape == (0, 4, 6)


def test_trains_on_an_image_without_labels_too() -> None:
    model = build().train()
    data = dict(
        inputs=[torch.rand(3, 60, 60), torch.rand(3, 60, 60)], data_samples=[sample(60, 60, 1, 2), sample(60, 60)]
    )
    losses = model(**model.data_preprocessor(data, True), mode='loss')
    assert 'decode.d2.loss_mask' in losses
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_label_beyond_the_classes_is_named() -> None:
    model = build().train()
    data = model.data_preprocessor(dict(inputs=[torch.rand(3, 64, 64)], data_samples=[sample(64, 64, 1, 4)]), True)
    with pytest.raises(ValueError, match=r'labels of image 0 must be within 0\.\.3, got \[1, 4\]'):
        model(**data, mode='loss')


@pytest.mark.parametrize('test_cfg', [dict(mode='whole'), dict(mode='slide', crop_size=(64, 64), stride=(32, 32))])
def test_predicts_in_the_original_size(test_cfg: dict) -> None:
    model = build(**test_cfg).eval()
    with torch.no_grad():
        [result] = model.test_step(dict(inputs=[torch.rand(3, 60, 90)], data_samples=[sample(60, 90, 1)]))
    assert result.pred_sem_seg.shape == result.seg_logits.shape == (120, 180)
    assert result.seg_logits.data.shape[0] == 4


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match='num_classes must be at least 2'):
        PointMask2FormerSegHead(1, **HEAD)
