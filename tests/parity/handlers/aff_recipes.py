"""AutoFocusFormer's recipes: learning rates, parameter groups, and the targets made from label maps."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.models.utils import preprocess_panoptic_gt
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmseg.models.decode_heads import Mask2FormerHead
from PIL import Image

import boltz_mm.engine  # noqa: F401  registers
from boltz_mm.registry import DATASETS, TRANSFORMS
from tests.parity.case import Case, Produced
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
    # The head of ours takes this from mmseg's.
    instances, _ = Mask2FormerHead._seg_data_to_instance_data(SimpleNamespace(ignore_index=ignored), [sample])
    return {
        'out.image': packed['inputs'].flip(0),  # the model turns BGR into RGB
        'out.sem_seg': sample.gt_sem_seg.data[0],
        'out.gt_classes': instances[0].labels,
        'out.gt_masks': instances[0].masks,
    }


@handler('aff', 'data_panoptic_target')
def data_panoptic_target(case: Case) -> Produced:
    """The panoptic dataset on files, and the targets that mmdet's mask classification heads make of its sample."""
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
    labels, masks = preprocess_panoptic_gt(
        truth.labels, truth.masks, None, num_things=len(dataset.metainfo['classes']), num_stuff=0
    )
    return {'out.gt_classes': labels, 'out.gt_masks': masks}


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
