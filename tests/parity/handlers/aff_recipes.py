"""AutoFocusFormer's recipes: learning rates, parameter groups, and the targets made from label maps."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from PIL import Image

import boltz_mm.engine  # noqa: F401  registers
from boltz_mm.converters.aff import our_classifier_key, our_segmentor_key
from boltz_mm.registry import DATASETS, MODELS, TRANSFORMS
from tests.parity.case import Case, Produced
from tests.parity.handlers.aff_backbone import backbone_config
from tests.parity.handlers.aff_model import detector
from tests.parity.registry import handler

SCHEDULES = Path(__file__).parents[3] / 'configs' / '_base_' / 'schedules'


def _rates(schedulers: list[dict[str, Any]], base: float, updates: list[int]) -> list[float]:
    """The learning rate that each of the updates runs at."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=base)
    built = [PARAM_SCHEDULERS.build(one, default_args={'optimizer': optimizer}) for one in schedulers]
    optimizer.step()
    found = {}
    for update in range(max(updates) + 1):
        if update in updates:
            found[update] = optimizer.param_groups[0]['lr']
        for scheduler in built:
            scheduler.step()
    return [found[update] for update in updates]


@handler('aff', 'lr_cosine')
def lr_cosine(case: Case) -> Produced:
    kwargs = case.kwargs
    [scheduler] = Config.fromfile(SCHEDULES / 'aff_in1k.py').to_dict()['param_scheduler']
    del scheduler['convert_to_iter_based']
    scheduler |= {
        'total': kwargs['epochs'] * kwargs['iters_per_epoch'],
        'warmup': kwargs['warmup_epochs'] * kwargs['iters_per_epoch'],
        'start_ratio': kwargs['warmup_lr'] / kwargs['base_lr'],
        'min_ratio': kwargs['min_lr'] / kwargs['base_lr'],
        'by_epoch': False,
    }
    # The stored rate at t is set after update t, and update t + 1 runs at it.
    first, *rates = _rates([scheduler], kwargs['base_lr'], [0, *(case.inputs['t'] + 1).tolist()])
    values = torch.tensor([first, *rates], dtype=torch.float64)
    return {'out.lr': values[1:], 'out.initial_lr': values[0]}


@handler('aff', 'lr_poly')
def lr_poly(case: Case) -> Produced:
    kwargs = case.kwargs
    schedulers = Config.fromfile(SCHEDULES / 'aff_80k.py').to_dict()['param_scheduler']
    schedulers[0] |= {'power': kwargs['power'], 'end': kwargs['max_iters'] + 1}
    if kwargs['warmup_iters'] and kwargs['warmup_factor'] != 1:
        # detectron2 multiplies; its factor reaches 1 at warmup_iters.
        schedulers.append(
            {
                'type': 'LinearLR',
                'start_factor': kwargs['warmup_factor'],
                'begin': 0,
                'end': kwargs['warmup_iters'] + 1,
                'by_epoch': False,
            }
        )
    rates = _rates(schedulers, kwargs['base_lr'], case.inputs['t'].tolist())
    return {'out.lr': torch.tensor(rates, dtype=torch.float64)}


@handler('aff', 'data_semantic_target')
def data_semantic_target(case: Case) -> Produced:
    """The pipeline of the ADE20K configs behind its augmentation, and the targets that the head makes of its sample."""
    init_default_scope('mmseg')
    side, ignored = case.kwargs['size_divisibility'], case.kwargs['ignore_label']
    image, labels = case.inputs['image'].numpy(), case.inputs['sem_seg'].numpy()
    results = {
        'img': np.ascontiguousarray(image[..., ::-1]),
        'img_shape': image.shape[:2],
        'ori_shape': image.shape[:2],
        'gt_seg_map': labels,
        'seg_fields': ['gt_seg_map'],
    }
    steps: list[dict[str, Any]] = [{'type': 'mmseg.PackSegInputs'}]
    if side > 0:
        steps.insert(0, {'type': 'Pad', 'size': (side, side), 'pad_val': {'img': 128, 'seg': ignored}})
    packed = Compose([TRANSFORMS.build(step) for step in steps])(results)
    sample = packed['data_samples']
    head = _seg_head(num_classes=int(labels.max()) + 1, ignore_index=ignored)
    [targets] = head.make_targets([sample])
    return {
        'out.image': packed['inputs'].flip(0),  # the model turns BGR into RGB
        'out.sem_seg': sample.gt_sem_seg.data[0],
        'out.gt_classes': targets.labels,
        'out.gt_masks': targets.masks,
    }


def _seg_head(**kwargs: Any) -> torch.nn.Module:
    """The smallest semantic head; its targets do not depend on its size."""
    decoders = {'num_heads': 1, 'num_layers': 1, 'feedforward_channels': 8}
    small = {'in_channels': [8] * 4, 'feat_channels': 8, 'out_channels': 8, 'num_queries': 2}
    parts = {'pixel_decoder': decoders, 'transformer_decoder': decoders}
    return MODELS.build({'type': 'boltz_mm.PointMask2FormerSegHead', **small, **parts, **kwargs})


@handler('aff', 'data_panoptic_target')
def data_panoptic_target(case: Case) -> Produced:
    """The panoptic dataset on files, and the targets that the head makes of its sample."""
    init_default_scope('mmdet')
    with TemporaryDirectory() as folder:
        dataset = DATASETS.build(_panoptic_files(Path(folder), case))
        steps = [{'type': 'LoadImageFromFile'}, {'type': 'boltz_mm.LoadPanopticSegments'}]
        side = case.kwargs['size_divisibility']
        if side > 0:
            steps.append({'type': 'Pad', 'size': (side, side), 'pad_val': {'img': 128, 'seg': 0}})
        steps += [{'type': 'boltz_mm.PanopticSegmentsToInstances'}, {'type': 'PackDetInputs'}]
        dataset.pipeline = Compose([TRANSFORMS.build(step) for step in steps])
        truth = dataset[0]['data_samples'].gt_instances
    # A map of stuff is not given: things and stuff are instances here.
    [targets] = _seg_head(num_classes=2).preprocess_gt([truth], [None])
    return {'out.gt_classes': targets.labels, 'out.gt_masks': targets.masks}


def _panoptic_files(folder: Path, case: Case) -> dict[str, Any]:
    """Write the case as a dataset of one image; returns the config of the dataset."""
    segments = case.kwargs['segments_info']
    names = [str(number) for number in range(max((one['category_id'] for one in segments), default=0) + 1)]
    height, width = case.inputs['image'].shape[:2]
    Image.fromarray(case.inputs['image'].numpy()).save(folder / 'image.png')
    Image.fromarray(case.inputs['pan_seg_rgb'].numpy()).save(folder / 'ids.png')
    content = {
        'images': [{'id': 1, 'file_name': 'image.png', 'height': height, 'width': width}],
        'annotations': [{'image_id': 1, 'file_name': 'ids.png', 'segments_info': segments}],
        'categories': [{'id': number, 'name': name, 'isthing': 1} for number, name in enumerate(names)],
    }
    (folder / 'panoptic.json').write_text(json.dumps(content))
    return {
        'type': 'boltz_mm.CheckedCocoPanopticDataset',
        'data_root': str(folder),
        'ann_file': 'panoptic.json',
        'data_prefix': {'img': '', 'seg': ''},
        'metainfo': {'classes': names, 'thing_classes': names, 'stuff_classes': []},
        'pipeline': [],
        'test_mode': True,
    }


def _groups(model: torch.nn.Module, recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The optimizer's group of every parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optim_wrapper(model, recipe).optimizer.param_groups
    return {names[id(parameter)]: group for group in groups for parameter in group['params']}


@handler('aff', 'optim_groups_cls')
def optim_groups_cls(case: Case) -> Produced:
    """The groups of the ImageNet recipe.

    Raises:
        ValueError: A parameter decays that does not officially, or the other way round.
    """
    init_default_scope('mmpretrain')
    kwargs = case.kwargs
    head = {'type': 'mmpretrain.LinearClsHead', 'num_classes': kwargs['num_classes']}
    head['in_channels'] = kwargs['embed_dim'][-1]
    model = MODELS.build(
        {'type': 'mmpretrain.ImageClassifier', 'backbone': backbone_config(kwargs, 'avg'), 'head': head}
    )
    groups = _groups(model, Config.fromfile(SCHEDULES / 'aff_in1k.py').optim_wrapper)
    counts = []
    for key in ('decay', 'no_decay'):
        chosen = {name for name, group in groups.items() if (group['weight_decay'] > 0) == (key == 'decay')}
        officially = {our_classifier_key(name) for name in case.meta[key]}
        if chosen != officially:
            raise ValueError(f'{key} differs for {sorted(chosen ^ officially)}')
        counts.append(len(chosen))
    return {'out.counts': torch.tensor(counts)}


@handler('aff', 'optim_groups_seg')
def optim_groups_seg(case: Case) -> Produced:
    """The groups of the segmentation recipe.

    Raises:
        ValueError: A rate or a decay is not the official one.
    """
    init_default_scope('mmdet')
    kwargs = case.kwargs
    recipe = Config.fromfile(SCHEDULES / 'aff_80k.py').optim_wrapper
    recipe.optimizer.update(lr=kwargs['base_lr'], weight_decay=kwargs['weight_decay'])
    recipe.paramwise_cfg.update(
        norm_decay_mult=kwargs['weight_decay_norm'] / kwargs['weight_decay'],
        embed_decay_mult=kwargs['weight_decay_embed'] / kwargs['weight_decay'],
        custom_keys={'backbone': {'lr_mult': kwargs['backbone_multiplier']}},
    )
    groups = _groups(detector(kwargs), recipe)
    ours = {name: [group['lr'], group['weight_decay']] for name, group in groups.items()}
    officially = {our_segmentor_key(name): values for name, values in case.meta['groups'].items()}
    if ours.keys() != officially.keys():
        raise ValueError(f'parameters differ: {sorted(ours.keys() ^ officially.keys())}')
    different = [name for name, values in ours.items() if not np.allclose(values, officially[name], rtol=1e-9, atol=0)]
    if different:
        raise ValueError(f'rate or decay differs, such as that of {different[0]}: {ours[different[0]]}')
    return {'out.num_groups': len({id(group) for group in groups.values()})}
