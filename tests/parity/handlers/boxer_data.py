"""BoxeR's data, schedule and optimizer cases: transforms, augmentation, collation, annotations, learning rates."""

import json
import math
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.models import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes, bbox_xyxy_to_cxcywh
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from PIL import Image
from torch import Tensor

from boltz_mm.converters.boxer import our_key
from boltz_mm.datasets.transforms.boxer import (
    BoxeRRandomFlip,
    BoxeRResize,
    crop,
    jittered_shape,
    resized_shape,
)
from boltz_mm.datasets.transforms.draws import RecordedDraws
from boltz_mm.models.detectors.boxer import level_masks
from boltz_mm.registry import DATASETS, MODELS, TRANSFORMS
from tests.parity.case import Case, Produced
from tests.parity.registry import handler

CONFIGS = Path(__file__).parents[3] / 'configs' / 'boxer'
DETECTION_CONFIG = CONFIGS / 'boxer_r50_8xb2-3x_coco.py'
PIPELINE_CONFIGS = {
    'default': CONFIGS / 'boxer_r50_mask_8xb2-3x_coco.py',
    'lsj': CONFIGS / 'boxer_r101_mask_8xb2-5x-lsj_coco.py',
}
# What of a transform's configuration is a length in pixels.
PIXEL_KEYS = ('size', 'sizes', 'min_size', 'max_size', 'target')


def _results(case: Case) -> dict[str, Any]:
    """The case's sample as a loading pipeline would give it: BGR image, mm keys."""
    image = case.inputs['image'].numpy()
    return {
        'img': np.ascontiguousarray(image[..., ::-1]),
        'img_shape': image.shape[:2],
        'ori_shape': image.shape[:2],
        'img_id': _image_id(case),
        'gt_bboxes': HorizontalBoxes(case.inputs['boxes'].clone()),
        'gt_bboxes_labels': case.inputs['labels'].numpy(),
        'gt_masks': BitmapMasks(case.inputs['masks'].numpy().astype(np.uint8), *image.shape[:2]),
        'gt_ignore_flags': case.inputs['iscrowd'].numpy().astype(bool),
        'gt_areas': case.inputs['area'].numpy(),
    }


def _image_id(case: Case) -> int:
    """The number of the sample: an input that is stored only where it comes out again."""
    return int(case.stored['out.image_id'][0])


def _produced(results: dict[str, Any], image: Any, normalised: bool) -> Produced:
    boxes = results['gt_bboxes'].tensor
    height, width = results['img_shape']
    size = boxes.new_tensor([width, height, width, height])
    return {
        'out.image': image,
        'out.boxes': bbox_xyxy_to_cxcywh(boxes) / size if normalised else boxes,
        'out.orig_boxes': boxes,
        'out.labels': results['gt_bboxes_labels'],
        'out.masks': results['gt_masks'].masks.astype(bool),
        'out.area': results['gt_areas'],
        'out.iscrowd': results['gt_ignore_flags'].astype(np.int64),
        'out.image_id': [results['img_id']],
        'out.orig_size': list(results['ori_shape']),
        'out.size': list(results['img_shape']),
    }


def _network_input(results: dict[str, Any], mean: list[float], std: list[float]) -> Tensor:
    """The image after packing and the data preprocessor, ``[3, H, W]``."""
    packed = Compose([TRANSFORMS.build({'type': 'mmdet.PackDetInputs'})])(dict(results))
    preprocessor = DetDataPreprocessor(mean=mean, std=std, bgr_to_rgb=True)
    return preprocessor({'inputs': [packed['inputs']], 'data_samples': [packed['data_samples']]})['inputs'][0]


@handler('boxer', 'transform')
def transform(case: Case) -> Produced:
    results = _results(case)
    name, arguments = case.kwargs['op']
    steps = arguments if name == 'compose' else [[name, arguments]]
    image, normalised = None, False
    for step, options in steps:
        if step == 'resize':
            results = BoxeRResize(**options)(results)
        elif step == 'crop':
            top, left, *shape = options['region']
            results = crop(results, top, left, tuple(shape))
        elif step == 'hflip':
            results = BoxeRRandomFlip(prob=1.0)(results)
        elif step == 'to_tensor':
            image = _network_input(results, [0.0] * 3, [255.0] * 3)
        elif step == 'normalize':
            mean, std = ([255 * value for value in options[key]] for key in ('mean', 'std'))
            image, normalised = _network_input(results, mean, std), True
        else:
            raise NotImplementedError(f'no transform of ours is mapped to {step!r}')
    return _produced(results, results['img'][..., ::-1] if image is None else image, normalised)


def _for_case(step: Any, divisor: int, draws: RecordedDraws) -> Any:
    """A pipeline step of the config with its lengths divided and its draws replaced."""
    if isinstance(step, list):
        return [_for_case(inner, divisor, draws) for inner in step]
    if not isinstance(step, dict):
        return step
    made = {key: _for_case(value, divisor, draws) for key, value in step.items()}
    for key in PIXEL_KEYS:
        if key in made:
            value = made[key]
            made[key] = [v // divisor for v in value] if isinstance(value, list | tuple) else value // divisor
    if 'Random' in made.get('type', '') or 'Jitter' in made.get('type', ''):
        made['draws'] = draws
    return made


@handler('boxer', 'train_pipeline')
def train_pipeline(case: Case) -> Produced:
    init_default_scope('mmdet')
    config = Config.fromfile(PIPELINE_CONFIGS[case.kwargs['pipeline']])
    steps = [step for step in config.to_dict()['train_pipeline'] if 'BoxeR' in step['type']]
    draws = RecordedDraws(case.rand['draws'].tolist())
    results = Compose([TRANSFORMS.build(_for_case(step, case.kwargs['divisor'], draws)) for step in steps])(
        _results(case)
    )
    if draws.left:
        raise ValueError(f'{draws.left} recorded draws were not used')
    normalisation = config.model.data_preprocessor
    return _produced(results, _network_input(results, normalisation.mean, normalisation.std), normalised=True)


@handler('boxer', 'resize_sizes')
def resize_sizes(case: Case) -> Produced:
    shapes = [tuple(shape) for shape in case.inputs['hw'].tolist()]
    sizes, limits = case.inputs['size'].tolist(), case.inputs['max_size'].tolist()
    resized = [resized_shape(*row) for row in zip(shapes, sizes, [limit or None for limit in limits], strict=True)]
    jittered = [
        jittered_shape(shape, scale, (1024, 1024))
        for shape, scale in zip(shapes, case.inputs['scale'].tolist(), strict=True)
    ]
    return {'out.hw': torch.tensor(resized), 'out.lsj_hw': torch.tensor(jittered)}


@handler('boxer', 'coco_prepare')
def coco_prepare(case: Case) -> Produced:
    width, height = case.kwargs['image_size']
    image_id = _image_id(case)
    annotations = [{'id': i, 'image_id': image_id, **a} for i, a in enumerate(case.kwargs['annotations'], start=1)]
    categories = [{'id': i, 'name': str(i)} for i in sorted({a['category_id'] for a in annotations})]
    classes = [str(i) for i in range(max(c['id'] for c in categories) + 1)]
    with TemporaryDirectory() as folder:
        Image.new('RGB', (width, height)).save(Path(folder, 'image.png'))
        Path(folder, 'instances.json').write_text(
            json.dumps(
                {
                    'images': [{'id': image_id, 'file_name': 'image.png', 'width': width, 'height': height}],
                    'annotations': annotations,
                    'categories': categories,
                }
            )
        )
        dataset = DATASETS.build(
            {
                'type': 'boltz_mm.CocoCategoryIdDataset',
                'data_root': folder,
                'ann_file': 'instances.json',
                'metainfo': {'classes': classes},
                'pipeline': [
                    {'type': 'LoadImageFromFile'},
                    {'type': 'mmdet.LoadAnnotations', 'with_bbox': True, 'with_mask': True},
                ],
            }
        )
        results = dataset[0]
    return {
        'out.boxes': results['gt_bboxes'].tensor,
        'out.labels': results['gt_bboxes_labels'],
        'out.masks': results['gt_masks'].masks,
        'out.image_id': [results['img_id']],
        'out.area': torch.tensor([instance['area'] for instance in results['instances']]),
        'out.iscrowd': results['gt_ignore_flags'].astype(np.int64),
        'out.orig_size': list(results['ori_shape']),
        'out.size': list(results['img_shape']),
    }


@handler('boxer', 'collate')
def collate(case: Case) -> Produced:
    images = [case.inputs[f'image{i}'] for i in range(len(case.inputs))]
    samples = [DetDataSample(metainfo={'img_shape': tuple(image.shape[1:])}) for image in images]
    batch = DetDataPreprocessor(pad_size_divisor=1)({'inputs': images, 'data_samples': samples})
    produced: Produced = {'out.image': batch['inputs']}
    if len(images) > 1:
        shape = tuple(batch['inputs'].shape[-2:])
        masks = level_masks([shape], batch['data_samples'], torch.device('cpu'))
        # Ours gives no mask if nothing is padded, whatever the size of the batch.
        produced['out.mask'] = torch.zeros(len(images), *shape, dtype=torch.bool) if masks is None else masks[0]
    return produced


@handler('boxer', 'param_groups')
def param_groups(case: Case) -> Produced:
    init_default_scope('mmdet')
    kwargs = case.kwargs
    config = Config.fromfile(PIPELINE_CONFIGS['default'] if kwargs['use_mask'] else DETECTION_CONFIG)
    model = MODELS.build(_small_model(config.model.to_dict(), kwargs))
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    groups = {id(parameter): group for group in wrapper.param_groups for parameter in group['params']}
    parameters = dict(model.named_parameters())
    projections = len(kwargs['return_interm_layers'])
    rows = []
    for name in kwargs['_names']:
        group = groups[id(parameters[our_key(name, projections)])]
        # The stored number of the group: 0 backbone, 2 box offsets, 1 everything else.
        number = 0 if name.startswith('backbone.') else 2 if 'linear_box' in name else 1
        rows.append([number, group['lr'], group['weight_decay'], group['eps']])
    return {'out.groups': torch.tensor(rows, dtype=torch.float64)}


def _small_model(model: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The config's model at the size of the case."""
    base, dims, levels = kwargs['backbone_base_channels'], kwargs['hidden_dim'], kwargs['nlevel']
    indices = tuple(int(layer.removeprefix('layer')) - 1 for layer in kwargs['return_interm_layers'])
    expansion = 1 if kwargs['backbone_depth'] < 50 else 4
    model['backbone'] |= {
        'depth': kwargs['backbone_depth'],
        'base_channels': base,
        'stem_channels': base,
        'out_indices': indices,
        'init_cfg': None,
    }
    model['neck'] |= {
        'in_channels': [base * expansion * 2**index for index in indices],
        'out_channels': dims,
        'num_outs': levels,
    }
    layer = {
        'embed_dims': dims,
        'num_heads': kwargs['nhead'],
        'num_levels': levels,
        'feedforward_channels': kwargs['dim_feedforward'],
    }
    for name, layers in (('encoder', kwargs['enc_layers']), ('decoder', kwargs['dec_layers'])):
        model[name]['num_layers'] = layers
        model[name]['layer_cfg'] |= layer
    model['positional_encoding'] = {'embed_dims': dims, 'ref_size': kwargs['ref_size']}
    model['bbox_head'] |= {'num_classes': kwargs['num_classes'], 'embed_dims': dims}
    model['num_queries'] = kwargs['num_queries']
    return model


@handler('boxer', 'schedule')
def schedule(case: Case) -> Produced:
    updates = tuple(case.inputs['updates'].tolist())
    rates = _learning_rates(json.dumps(case.kwargs), updates)
    return {'out.lr': torch.tensor(rates, dtype=torch.float64)}


@lru_cache
def _learning_rates(kwargs: str, updates: tuple[int, ...]) -> list[list[float]]:
    options = json.loads(kwargs)
    groups = [{'params': [torch.nn.Parameter(torch.zeros(1))], 'lr': lr} for lr in options['base_lrs']]
    optimizer = torch.optim.AdamW(groups)
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args={'optimizer': optimizer}) for scheduler in _schedulers(options)
    ]
    optimizer.step()
    rates = {}
    for update in range(max(updates) + 1):
        if update in updates:
            rates[update] = [group['lr'] for group in optimizer.param_groups]
        for scheduler in schedulers:
            scheduler.step()
    return [rates[update] for update in updates]


def _schedulers(options: dict[str, Any]) -> list[dict[str, Any]]:
    """mmengine's schedulers for the official options, as the configs write them."""
    params = options['params']
    warmup = params['warmup_iterations'] if params.get('use_warmup') else 0
    made: list[dict[str, Any]] = []
    if warmup:
        factor = params['warmup_factor']
        made.append({'type': 'LinearLR', 'start_factor': factor, 'by_epoch': False, 'begin': 0, 'end': warmup + 1})
    if options['type'] == 'multi_step':
        made.append(
            {'type': 'MultiStepLR', 'milestones': params['lr_steps'], 'gamma': params['lr_ratio'], 'by_epoch': False}
        )
    elif options['type'] == 'cosine_annealing':
        made.append(
            {
                'type': 'CosineAnnealingLR',
                'T_max': params['T_max'] - warmup,
                'eta_min_ratio': params['eta_min'] / max(options['base_lrs']),
                'begin': warmup,
                'end': math.inf,
                'by_epoch': False,
            }
        )
    else:
        raise NotImplementedError(f'no schedule of ours is mapped to {options["type"]!r}')
    return made
