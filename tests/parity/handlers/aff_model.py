"""AutoFocusFormer's whole segmentors, through mmdet's and mmseg's own models."""

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import boltz_mm.models  # noqa: F401  registers
from boltz_mm.converters.aff import convert_aff, export_aff, our_segmentor_key
from tests.parity.case import Case, Produced
from tests.parity.handlers.aff_backbone import backbone_config
from tests.parity.handlers.aff_head import decoder_settings
from tests.parity.handlers.aff_losses import OFFICIAL_NAMES, named_matches, record_matches, replay
from tests.parity.registry import handler

_MEAN, _STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def head_config(kwargs: dict, **settings) -> dict:
    pixel, transformer = kwargs['pixel_decoder'], dict(kwargs['transformer_decoder'])
    decoder = decoder_settings(transformer)
    return {
        'in_channels': kwargs['backbone']['embed_dim'],
        'feat_channels': pixel['conv_dim'],
        'out_channels': decoder.pop('out_channels'),
        'num_queries': decoder.pop('num_queries'),
        'pixel_decoder': {
            'num_heads': pixel['transformer_nheads'],
            'num_layers': pixel['transformer_enc_layers'],
            'feedforward_channels': pixel['transformer_dim_feedforward'],
            'power': pixel['shepard_power'],
            'learnable_power': pixel['shepard_power_learnable'],
        },
        'transformer_decoder': decoder,
        **settings,
    }


def detector(kwargs: dict) -> nn.Module:
    things = len(kwargs.get('thing_classes', range(kwargs['num_classes'])))
    classes = {'num_things_classes': things, 'num_stuff_classes': kwargs['num_classes'] - things}
    sampling = ('num_points', 'oversample_ratio', 'importance_sample_ratio')
    return MODELS.build(
        ConfigDict(
            type='boltz_mm.PointMask2Former',
            data_preprocessor={
                'type': 'mmdet.DetDataPreprocessor',
                'mean': _MEAN,
                'std': _STD,
                'pad_size_divisor': kwargs.get('size_divisibility', 32),
                'pad_mask': True,
                'mask_pad_value': 0,
            },
            backbone=backbone_config(kwargs['backbone'], 'points'),
            panoptic_head={'type': 'boltz_mm.PointMask2FormerHead', **head_config(kwargs), **classes},
            panoptic_fusion_head={
                'type': 'boltz_mm.PointMaskFusionHead',
                'thing_classes': kwargs.get('thing_classes'),
                **classes,
            },
            train_cfg={name: kwargs[name] for name in sampling if name in kwargs},
            test_cfg={
                'panoptic_on': True,
                'instance_on': True,
                'semantic_on': True,
                'max_per_image': kwargs.get('test_topk_per_image', 100),
                'object_mask_thr': kwargs.get('object_mask_threshold', 0.8),
                'iou_thr': kwargs.get('overlap_threshold', 0.8),
            },
        )
    )


def segmentor(kwargs: dict) -> nn.Module:
    divisor = kwargs.get('size_divisibility', 32)
    return MODELS.build(
        ConfigDict(
            type='mmseg.EncoderDecoder',
            data_preprocessor={
                'type': 'mmseg.SegDataPreProcessor',
                'mean': _MEAN,
                'std': _STD,
                'size_divisor': divisor,
                'test_cfg': {'size_divisor': divisor},
            },
            backbone=backbone_config(kwargs['backbone'], 'points'),
            decode_head={
                'type': 'boltz_mm.PointMask2FormerSegHead',
                **head_config(kwargs, num_classes=kwargs['num_classes']),
            },
            train_cfg={},
            test_cfg={'mode': 'whole'},
        )
    )


def loaded(model: nn.Module, case: Case, head: str) -> nn.Module:
    state, report = convert_aff(case.weights(), model, head=head)
    if not report.complete:
        raise ValueError(str(report))
    model.load_state_dict(state)
    return model.train(case.meta.get('mode') == 'train')


@handler('aff', 'seg_full')
@torch.no_grad()
def run_seg_full(case: Case) -> Produced:
    model = loaded(detector(case.kwargs), case, 'panoptic_head')
    classes, masks = model(case.inputs['img'], [], mode='tensor')
    produced = {f'out.pred_logits{i}': value for i, value in enumerate(classes)}
    return produced | {f'out.pred_masks{i}': value for i, value in enumerate(masks)}


def images_of(case: Case) -> list[Tensor]:
    images = []
    while f'image{len(images)}' in case.inputs:
        images.append(case.inputs[f'image{len(images)}'])
    return images


@handler('aff', 'maskformer')
def run_maskformer(case: Case) -> Produced:
    return (train if case.meta['mode'] == 'train' else predict)(case)


@torch.no_grad()
def predict(case: Case) -> Produced:
    images = images_of(case)
    sizes = [tuple(case.inputs[f'out_size{i}'].tolist()) for i in range(len(images))]
    metas = [{'img_shape': tuple(x.shape[-2:]), 'ori_shape': size} for x, size in zip(images, sizes, strict=True)]
    model = loaded(detector(case.kwargs), case, 'panoptic_head')
    results = model.test_step({'inputs': images, 'data_samples': [DetDataSample(metainfo=m) for m in metas]})
    expected, produced = case.meta.get('segments_info'), {}
    for i, result in enumerate(results):
        panoptic, instances = result.pred_panoptic_seg, result.pred_instances
        if expected is not None and panoptic.segments_info != expected[i]:
            raise ValueError(f'segments {panoptic.segments_info}, stored {expected[i]}')
        produced |= {
            f'out.sem_seg{i}': result.pred_sem_seg.logits,
            f'out.panoptic_seg{i}': panoptic.segment_ids[0],
            f'out.instance_masks{i}': instances.masks,
            f'out.instance_scores{i}': instances.scores,
            f'out.instance_classes{i}': instances.labels,
        }
    # mmseg's preprocessor refuses test images of several sizes in a batch; mmdet's pads them in the same way.
    inputs = model.data_preprocessor({'inputs': images})['inputs']
    height, width = inputs.shape[-2:]
    samples = []
    for meta in metas:
        below, beside = height - meta['img_shape'][0], width - meta['img_shape'][1]
        padding = {'pad_shape': (height, width), 'img_padding_size': (0, beside, 0, below)}
        samples.append(SegDataSample(metainfo={**meta, **padding}))
    model = loaded(segmentor(case.kwargs), case, 'decode_head')
    results = model(inputs, samples, mode='predict')
    return produced | {f'out.sem_seg_after{i}': result.seg_logits.data for i, result in enumerate(results)}


def train(case: Case) -> Produced:
    model, samples, images = loaded(detector(case.kwargs), case, 'panoptic_head'), [], images_of(case)
    for i, image in enumerate(images):
        masks, labels = case.inputs[f'gt_masks{i}'], case.inputs[f'gt_classes{i}']
        samples.append(DetDataSample(metainfo={'img_shape': tuple(image.shape[-2:])}))
        samples[-1].gt_instances = InstanceData(labels=labels, masks=BitmapMasks(masks.numpy(), *image.shape[-2:]))
    criterion = model.panoptic_head.criterion
    draws, found = replay(criterion, case), record_matches(criterion)
    losses = model(**model.data_preprocessor({'inputs': images, 'data_samples': samples}, True), mode='loss')
    if next(draws, None) is not None:
        raise ValueError('the official run drew more numbers')
    total = sum(losses.values())
    total.backward()
    produced = {'out.total': total} | named_matches(found)
    for name, value in losses.items():
        layer, _, term = name.rpartition('.')
        produced[f'out.{OFFICIAL_NAMES[term]}' + (f'_{layer[1:]}' if layer else '')] = value
    parameters = dict(model.named_parameters())
    for key in case.weights()['model']:
        parameter = parameters.get(str(our_segmentor_key(key)))
        if parameter is not None:
            produced[f'grad.param.{key}'] = parameter.grad
    return produced


@handler('aff', 'keys_seg')
def run_keys(case: Case) -> Produced:
    official = {key: torch.empty(shape, device='meta') for key, shape in case.meta['state_dict'].items()}
    with torch.device('meta'):
        models = {'panoptic_head': detector(case.kwargs), 'decode_head': segmentor(case.kwargs)}
    for head, model in models.items():
        state, report = convert_aff({'model': official}, model, head=head)
        if not report.complete:
            raise ValueError(str(report))
        exported = {key: tuple(value.shape) for key, value in export_aff(model.state_dict()).items()}
        if exported != {key: tuple(value.shape) for key, value in official.items()}:
            raise ValueError('the way back does not give the official keys')
    return {'out.num_parameters': sum(p.numel() for p in models['panoptic_head'].parameters() if p.requires_grad)}
