"""The head in mmdet's own detector: training, prediction, targets, images of every kind."""

import copy
import traceback

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.structures import InstanceData, PixelData
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from boltz_mm.models.heads.point_mask2former_head import PointMask2FormerHead, upsample_masks

ARCH = {'embed_dims': [8, 12, 16, 24], 'depths': [1, 1, 1, 1], 'num_heads': [2, 3, 2, 4]}
HEAD = {
    'in_channels': ARCH['embed_dims'],
    'feat_channels': 16,
    'out_channels': 16,
    'num_queries': 6,
    'pixel_decoder': {'num_heads': 4, 'num_layers': 1, 'feedforward_channels': 16},
    'transformer_decoder': {'num_heads': 4, 'num_layers': 3, 'feedforward_channels': 16},
}


def build(things: int = 3, stuff: int = 2, **head) -> nn.Module:
    torch.manual_seed(0)
    classes = {'num_things_classes': things, 'num_stuff_classes': stuff}
    preprocessor = dict(type='mmdet.DetDataPreprocessor', pad_size_divisor=32, pad_mask=True, pad_seg=True)
    return MMENGINE_MODELS.build(
        ConfigDict(
            type='mmdet.Mask2Former',
            data_preprocessor={**preprocessor, 'mean': [0.0] * 3, 'std': [1.0] * 3, 'seg_pad_value': 255},
            backbone=dict(type='boltz_mm.AFF', arch=ARCH, cluster_size=4, nbhd_size=12, per_image=True),
            panoptic_head={'type': 'boltz_mm.PointMask2FormerHead', **HEAD, **classes, **head},
            panoptic_fusion_head={'type': 'boltz_mm.PointMaskFusionHead', **classes},
            train_cfg=dict(num_points=32),
            test_cfg=dict(panoptic_on=stuff > 0, instance_on=True, object_mask_thr=0.01, iou_thr=0.0),
        )
    )


def sample(height: int, width: int, objects: int, semantic: bool = True) -> DetDataSample:
    data = DetDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(2 * height, 2 * width)))
    masks = np.zeros((objects, height, width), np.uint8)
    for i in range(objects):
        masks[i, 4 * i : 4 * i + 12, 2:20] = 1
    data.gt_instances = InstanceData(labels=torch.arange(objects) % 3, masks=BitmapMasks(masks, height, width))
    if semantic:
        data.gt_sem_seg = PixelData(sem_seg=torch.full((1, height, width), 4))
    return data


def batch(*samples: DetDataSample) -> dict:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(3, *s.img_shape, generator=generator) for s in samples]
    return {'inputs': images, 'data_samples': list(samples)}


@pytest.mark.parametrize('semantic', [True, False])
def test_trains_with_and_without_objects(semantic: bool) -> None:
    model = build(stuff=2 if semantic else 0).train()
    data = model.data_preprocessor(batch(sample(60, 90, 3, semantic), sample(64, 70, 0, semantic)), True)
    losses = model(**data, mode='loss')
    assert list(losses)[:3] == ['loss_cls', 'loss_mask', 'loss_dice']
    assert len(losses) == 12
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_predicts_in_the_original_size() -> None:
    model = build().eval()
    with torch.no_grad():
        results = model.test_step(batch(sample(60, 90, 0), sample(64, 70, 0)))
    assert [r.pred_panoptic_seg.sem_seg.shape for r in results] == [(1, 120, 180), (1, 128, 140)]
    assert results[1].pred_instances.masks.shape[1:] == (128, 140)
    assert results[0].pred_instances.labels.max() < 3


def test_a_result_depends_on_the_batch_unless_told_otherwise() -> None:
    data = batch(sample(64, 64, 0), sample(64, 96, 0))
    # Same padded size with and without company, so that only the company tells the runs apart.
    inputs = torch.zeros(2, 3, 64, 96)
    for image, x in zip(inputs, data['inputs'], strict=True):
        image[:, :, : x.shape[-1]] = x
    same = {}
    for per_image in (False, True):
        model = build(per_image=per_image).eval()
        with torch.no_grad():
            head, feats = model.panoptic_head, model.extract_feat(inputs)
            for level in feats[1:]:
                level.pos[0].clamp_(max=9)
            alone = tuple(f._replace(feat=f.feat[:1], pos=f.pos[:1]) for f in feats)
            same[per_image] = torch.allclose(head(feats)[1][-1][0], head(alone)[1][-1][0], atol=1e-4)
    assert same == {False: False, True: True}


def test_targets_are_objects_then_stuff_in_ascending_order() -> None:
    head = PointMask2FormerHead(**HEAD, num_things_classes=2, num_stuff_classes=3)
    area = torch.tensor([[4, 2, 255, 0, 1, 4, 3, 9]])
    masks = BitmapMasks(np.array([[[0, 0, 0, 1, 0, 0, 0, 0]]], np.uint8), 1, 8)
    instances = InstanceData(labels=torch.tensor([0]), masks=masks)
    [target] = head.preprocess_gt([instances], [PixelData(sem_seg=area[None])])
    assert target.labels.tolist() == [0, 2, 3, 4]
    assert target.masks.dtype == torch.bool
    assert [m[0].nonzero()[:, 0].tolist() for m in target.masks] == [[3], [1], [6], [0, 5]]
    [target] = head.preprocess_gt([instances], [None])
    assert target.labels.tolist() == [0]
    tensors = InstanceData(labels=torch.tensor([1, 4]), masks=torch.ones(2, 1, 8))
    assert head.preprocess_gt([tensors], [None])[0].labels.tolist() == [1, 4]


def test_masks_of_odd_images_are_cut_where_the_backbone_padded() -> None:
    masks = torch.randn(1, 2, 3, 5)
    full = upsample_masks(masks, (12, 20))
    assert torch.equal(upsample_masks(masks, (10, 17)), full[..., :10, :17])
    with pytest.raises(ValueError, match='images of 64 x 20 pixels do not give masks of 3 x 5 cells'):
        upsample_masks(masks, (64, 20))


@pytest.mark.parametrize('size', [(32, 32), (1, 200), (40, 8)])
def test_images_of_any_size_train_and_predict(size: tuple[int, int]) -> None:
    model = build().train()
    data = batch(sample(*size, 1), sample(*size, 0))
    losses = model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')
    assert sum(losses.values()).isfinite()
    with torch.no_grad():
        [result, _] = model.eval().test_step(data)
    assert result.pred_panoptic_seg.shape == (2 * size[0], 2 * size[1])


def test_nan_pixels_are_named_in_training_and_harmless_at_inference() -> None:
    model = build().train()
    data = batch(sample(64, 64, 2))
    data['inputs'][0][:, 5, 5] = float('nan')
    with pytest.raises(FloatingPointError, match='matching costs are NaN'):
        model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')
    with torch.no_grad():
        [result] = model.eval().test_step(data)
    assert result.pred_panoptic_seg.sem_seg.unique().tolist() == [5]


def test_trains_under_autocast() -> None:
    model = build().train()
    data = model.data_preprocessor(batch(sample(64, 64, 2)), True)
    torch.manual_seed(0)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model(**data, mode='loss')
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class ReadBack(TorchDispatchMode):
    """Refuses what would wait for a device, where models do it (operators look at their input on the CPU only)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in ('_local_scalar_dense', 'nonzero', 'masked_select', '_unique2', 'unique_dim')
        if name == 'index':
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if waits:
            places = [f.filename for f in traceback.extract_stack() if '/boltz_mm/' in f.filename]
            assert '/boltz_mm/models/' not in places[-1], f'{name} in {places[-1]}'
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('last_only', [False, True])
def test_nothing_is_read_back_from_the_device(last_only: bool) -> None:
    model = build().eval()
    with torch.no_grad():
        feats = model.extract_feat(torch.randn(1, 3, 64, 96))
        model.panoptic_head(feats)  # what the size tells is made once, partly on the CPU
        with ReadBack():
            model.panoptic_head(feats, last_only=last_only)
            instances = InstanceData(labels=torch.zeros(0), masks=torch.zeros(0, 4, 4))
            with pytest.raises(AssertionError, match='unique'):
                model.panoptic_head.preprocess_gt([instances], [PixelData(sem_seg=torch.zeros(1, 4, 4))])


def test_settings_reach_the_parts() -> None:
    head = PointMask2FormerHead(**HEAD, train_cfg=dict(num_points=7, importance_sample_ratio=0.5), per_image=True)
    assert head.criterion.num_points == 7
    assert head.criterion.num_uncertain == 3
    assert head.pixel_decoder.position.per_image
    assert head.predictor.position.per_image
    assert not any(name.startswith('criterion') for name in head.state_dict())


@pytest.mark.slow
def test_learns_two_images() -> None:
    model = build(stuff=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    data = model.data_preprocessor(batch(sample(64, 64, 2, False), sample(64, 64, 1, False)), True)
    history = []
    for _ in range(60):
        losses = model(**data, mode='loss')
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(sum(losses[f'loss_{term}'].item() for term in ('cls', 'mask', 'dice')))
    assert sum(history[-5:]) < 0.3 * sum(history[:5])
