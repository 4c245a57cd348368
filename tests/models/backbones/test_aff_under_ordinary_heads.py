"""AutoFocusFormer with maps made of its tokens, under ordinary detectors and segmentors."""

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from torch import nn

SIZE = (64, 96)
BACKBONE = {
    'type': 'boltz_mm.AFF',
    'arch': {'embed_dims': (8, 16, 16, 32), 'depths': (1, 1, 1, 1), 'num_heads': (2, 2, 2, 4)},
    'cluster_size': 4,
    'nbhd_size': 12,
}
WIDTHS = [8, 16, 16, 32]
NECK = {'type': 'boltz_mm.PointsToGrid'}


def detection_samples() -> list[DetDataSample]:
    masks = torch.zeros(1, *SIZE, dtype=torch.uint8)
    masks[:, 8:40, 16:56] = 1
    samples = []
    for _ in range(2):
        instances = InstanceData(
            bboxes=torch.tensor([[16.0, 8, 56, 40]]), labels=torch.tensor([1]), masks=BitmapMasks(masks.numpy(), *SIZE)
        )
        meta = dict.fromkeys(('img_shape', 'ori_shape', 'batch_input_shape', 'pad_shape'), SIZE)
        samples.append(DetDataSample(metainfo={**meta, 'scale_factor': (1.0, 1.0)}, gt_instances=instances))
    return samples


def learn_and_predict(model: nn.Module, samples: list) -> list:
    """One loss, whose gradient reaches the first layer and the importance scores, and predictions."""
    image = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    model.train()
    model.parse_losses(model.loss(image, samples))[0].backward()
    for parameter in (model.backbone.patch_embed.proj1.weight, model.backbone.layers[0].prob_net.weight):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        return model.predict(image, samples)


def build(cfg: dict, scope: str) -> nn.Module:
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(ConfigDict(cfg))


def test_mask_rcnn_with_fpn() -> None:
    cfg = get_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    narrow = {'in_channels': 16, 'num_classes': 3}
    cfg.merge_from_dict({
        'model.roi_head.bbox_head': {**narrow, 'fc_out_channels': 16},
        'model.roi_head.mask_head': {**narrow, 'conv_out_channels': 16},
        'model.roi_head.bbox_roi_extractor.out_channels': 16,
        'model.roi_head.mask_roi_extractor.out_channels': 16,
        'model.rpn_head': {'in_channels': 16, 'feat_channels': 16},
    })  # fmt: skip
    cfg.model.backbone = BACKBONE
    cfg.model.neck = [NECK, {'type': 'FPN', 'in_channels': WIDTHS, 'out_channels': 16, 'num_outs': 5}]
    cfg.model.data_preprocessor = None
    results = learn_and_predict(build(cfg.model, 'mmdet'), detection_samples())
    assert results[0].pred_instances.masks.shape[1:] == SIZE


def test_boxer() -> None:
    levels = {'embed_dims': 32, 'num_heads': 4, 'num_levels': 4, 'feedforward_channels': 48}
    model = build(
        {
            'type': 'boltz_mm.BoxeR',
            'num_queries': 12,
            'backbone': {**BACKBONE, 'out_indices': (1, 2, 3)},
            'neck': [
                {**NECK, 'levels': (1, 2, 3)},
                {'type': 'boltz_mm.BoxeRNeck', 'in_channels': WIDTHS[1:], 'out_channels': 32, 'num_outs': 4},
            ],
            'positional_encoding': {'embed_dims': 32, 'ref_size': 4},
            'encoder': {'num_layers': 1, 'layer_cfg': levels},
            'decoder': {'num_layers': 1, 'layer_cfg': {**levels, 'with_mask': True}},
            'bbox_head': {'type': 'boltz_mm.BoxeRHead', 'num_classes': 3, 'embed_dims': 32, 'with_mask': True},
        },
        'boltz_mm',
    )
    results = learn_and_predict(model, detection_samples())
    assert results[1].pred_instances.masks.shape[1:] == SIZE


def test_segformer_head() -> None:
    model = build(
        {
            'type': 'EncoderDecoder',
            'backbone': BACKBONE,
            'neck': NECK,
            'decode_head': {
                'type': 'SegformerHead',
                'in_channels': WIDTHS,
                'in_index': [0, 1, 2, 3],
                'channels': 16,
                'num_classes': 4,
                'norm_cfg': {'type': 'BN'},
                'align_corners': False,
                'loss_decode': {'type': 'CrossEntropyLoss'},
            },
            'test_cfg': {'mode': 'whole'},
        },
        'mmseg',
    )
    meta = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), SIZE)
    labels = torch.randint(4, (1, *SIZE), generator=torch.Generator().manual_seed(1))
    samples = [SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=labels)) for _ in range(2)]
    results = learn_and_predict(model, samples)
    assert results[0].pred_sem_seg.data.shape == (1, *SIZE)
