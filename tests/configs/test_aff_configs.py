"""AutoFocusFormer's configs: the published recipes, pipelines on files, and a step of every small model."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

from boltz_mm.datasets.shapes import ShapesSpec, make_shapes, panoptic_metainfo, semantic_metainfo
from boltz_mm.registry import DATASETS, MODELS, TRANSFORMS
from tests.datasets.coco_files import coco_content, write_coco
from tests.datasets.panoptic_files import METAINFO, write_panoptic

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'configs/aff'
DATA = ROOT / 'configs/_base_/datasets'
CLASSIFIERS = sorted(FOLDER.glob('aff-*_in*k*.py'))
SEGMENTORS = [path for path in sorted(FOLDER.glob('point-mask2former_aff-*.py')) if 'coco100' not in path.name]
SMALL = sorted([*FOLDER.glob('aff_tiny_shapes-*.py'), *FOLDER.glob('*_shapes.py')])


def _ids(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def _read(path: Path) -> Config:
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    return config


def _variant(name: str) -> tuple[str, bool]:
    """Size of the backbone, and whether it keeps a fifth of the tokens."""
    size, fifth = re.search(r'aff-(mini|tiny|small|base)(-1-5th)?_', name).groups()
    return size, bool(fifth)


def test_there_is_a_config_of_every_published_variant():
    assert len(CLASSIFIERS) == 9 and len(SEGMENTORS) == 21 and len(SMALL) == 7


@pytest.mark.parametrize('path', CLASSIFIERS, ids=_ids(CLASSIFIERS))
def test_classification_recipe(path):
    config = _read(path)
    size, fifth = _variant(path.name)
    backbone, wrapper, [schedule] = config.model.backbone, config.optim_wrapper, config.param_scheduler
    assert backbone.arch == size + ('_1_5th' if fifth else '') + ('_384' if '384px' in path.name else '')
    gpus, batch = map(int, re.search(r'_(\d+)xb(\d+)-', path.name).groups())
    total = gpus * batch * wrapper.get('accumulative_counts', 1)
    assert batch == config.train_dataloader.batch_size and total == config.auto_scale_lr.base_batch_size
    base = {'in22k': (5e-4, 90, 5, 2.5e-4, 2.5e-3), 'pre_': (2e-5, 30, 5, 1e-3, 1e-2)}
    key = 'pre_' if 'pre_' in path.name else 'in22k' if 'in22k' in path.name else ''
    rate, epochs, warmup, start, end = base.get(key, (5e-4, 300, 20, 1e-3, 1e-2))
    assert wrapper.optimizer.lr == pytest.approx(rate * total / 512)
    assert (config.train_cfg.max_epochs, schedule.total, schedule.warmup) == (epochs, epochs, warmup)
    assert (schedule.start_ratio, schedule.min_ratio, schedule.convert_to_iter_based) == (start, end, True)
    assert wrapper.optimizer.weight_decay == (1e-8 if key == 'pre_' else 0.05)
    assert wrapper.clip_grad.max_norm == 5.0
    assert bool(config.model.get('train_cfg')) == (size != 'mini')
    assert config.train_dataloader.drop_last


@pytest.mark.parametrize('path', SEGMENTORS, ids=_ids(SEGMENTORS))
def test_segmentation_recipe(path):
    config = _read(path)
    size, fifth = _variant(path.name)
    backbone, wrapper, [schedule] = config.model.backbone, config.optim_wrapper, config.param_scheduler
    assert backbone.arch == {'base': 'base_384'}.get(size, size) + ('_1_5th' if fifth else '')
    assert backbone.nbhd_size == (144 if size == 'base' else 48)
    assert backbone.drop_path_rate == (0.0 if size == 'mini' else 0.3)
    assert backbone.get('alpha', 4.0) == (8.0 if 'cityscapes' in path.name else 4.0)
    gpus, batch = map(int, re.search(r'_(\d+)xb(\d+)-', path.name).groups())
    assert batch == config.train_dataloader.batch_size and gpus * batch == config.auto_scale_lr.base_batch_size
    assert config.train_dataloader.sampler.type == 'InfiniteSampler'
    updates, total = {'ade': (80000, 32), 'cit': (45000, 32), 'coc': (92188, 64)}[
        re.search('ade|cit|coc', path.name)[0]
    ]
    if size == 'base':
        updates, total = 90000, 16
    assert (config.train_cfg.max_iters, gpus * batch) == (updates, total)
    assert wrapper.optimizer.lr == (1e-4 if size == 'base' else 2e-4) and wrapper.optimizer.weight_decay == 0.05
    assert wrapper.clip_grad.max_norm == 0.01
    if 'coco' in path.name:
        assert (schedule.type, schedule.milestones) == ('MultiStepLR', [81945, 88773])
    else:
        assert (schedule.type, schedule.power, schedule.end) == ('PolyLR', 0.9, updates + 1)
    head = config.model.get('panoptic_head') or config.model.decode_head
    assert head.num_queries == (250 if size == 'base' else 100)
    power = (2.0, False) if 'coco' in path.name else (3.0, True)
    assert (head.pixel_decoder.power, head.pixel_decoder.learnable_power) == power


def test_groups_of_the_segmentation_recipe():
    """Norms and embeddings do not decay, the backbone learns at a tenth of the rate; all else is plain."""
    config = _read(FOLDER / 'aff_tiny_shapes-instance.py')
    model = MODELS.build(config.model)
    recipe = _read(FOLDER / 'point-mask2former_aff-tiny_8xb4-45k_cityscapes-instance.py').optim_wrapper
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = build_optim_wrapper(model, recipe).optimizer.param_groups
    groups = {names[id(group['params'][0])]: (group['lr'], group['weight_decay']) for group in found}
    slow = pytest.approx(2e-5)
    assert groups['backbone.layers.0.blocks.0.attn.blank_k'] == (slow, 0.05)
    assert groups['backbone.layers.0.blocks.0.norm1.weight'] == (slow, 0)
    assert groups['panoptic_head.predictor.query_feat.weight'] == (2e-4, 0)
    assert groups['panoptic_head.pixel_decoder.transformer.level_embed'] == (2e-4, 0.05)
    assert groups['panoptic_head.pixel_decoder.mask_features.bias'] == (2e-4, 0.05)


def _run(name: str, info: dict) -> tuple:
    """The packed training sample and test sample of the data config ``name``."""
    config = Config.fromfile(DATA / f'{name}.py')
    pipelines = (config.train_dataloader.dataset.pipeline, config.val_dataloader.dataset.pipeline)
    np.random.seed(0)
    return tuple(Compose([TRANSFORMS.build(step) for step in steps])(dict(info)) for steps in pipelines)


@pytest.mark.parametrize(('name', 'side'), [('imagenet_aff', 224), ('imagenet_aff_384', 384)])
def test_imagenet_pipelines(name, side, tmp_path):
    init_default_scope('mmpretrain')
    image = np.random.default_rng(0).integers(0, 256, (100, 140, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / 'image.png')
    train, test = _run(name, {'img_path': str(tmp_path / 'image.png'), 'gt_label': 3})
    assert train['inputs'].shape == test['inputs'].shape == (3, side, side)


def test_ade20k_pipelines(tmp_path):
    init_default_scope('mmseg')
    Image.new('RGB', (300, 200), (9, 8, 7)).save(tmp_path / 'image.jpg')
    Image.fromarray(np.full((200, 300), 5, dtype=np.uint8)).save(tmp_path / 'labels.png')
    info = {'img_path': str(tmp_path / 'image.jpg'), 'seg_map_path': str(tmp_path / 'labels.png')}
    info |= {'reduce_zero_label': True, 'label_map': None, 'seg_fields': []}
    train, test = _run('ade20k_aff', info)
    labels = train['data_samples'].gt_sem_seg.data[0]
    assert train['inputs'].shape == (3, 512, 512) and set(labels.unique().tolist()) <= {4, 255}
    padded = train['inputs'][:, labels == 255]
    assert bool((padded == 128).all())
    assert test['inputs'].shape == (3, 512, 768)
    assert test['data_samples'].gt_sem_seg.data.shape == (1, 200, 300)


def _instance_data(name: str, folder: Path, **scales: float) -> tuple[Config, list]:
    config = Config.fromfile(DATA / f'{name}.py')
    for step in config.train_dataloader.dataset.pipeline:
        if step.type == 'boltz_mm.BoxeRScaleJitter':
            step.update(scales)
    classes = ('person', 'bicycle') if 'coco' in name else ('person', 'rider')
    content = coco_content((*classes, 'car'), (1, 2, 3))
    loader = config.train_dataloader.dataset
    loader.update(data_root=str(folder), ann_file=write_coco(folder, content).name, data_prefix={'img': ''})
    loader.metainfo = {'classes': (*classes, 'car')}
    return config, list(DATASETS.build(loader))


def test_cityscapes_instance_pipeline(tmp_path):
    init_default_scope('mmdet')
    config, samples = _instance_data('cityscapes_instance_aff', tmp_path)
    for sample in samples:
        height, width = sample['inputs'].shape[1:]
        assert height == 512 and 512 <= width <= 1024
        truth = sample['data_samples'].gt_instances
        assert truth.masks.masks.shape == (len(truth.labels), height, width)
        assert truth.masks.masks.any((1, 2)).all()
    # Its evaluation needs a package that the set-up does not install, and says so.
    assert config.val_evaluator.type == 'CityScapesMetric'


def test_coco_instance_pipeline_fills_up_with_grey(tmp_path):
    init_default_scope('mmdet')
    _, samples = _instance_data('coco_instance_lsj_aff', tmp_path, min_scale=0.1, max_scale=0.9)  # never a full image
    assert {tuple(sample['inputs'].shape) for sample in samples} == {(3, 1024, 1024)}
    for sample in samples:
        height, width = sample['data_samples'].img_shape
        assert (height, width) == (1024, 1024)
        truth = sample['data_samples'].gt_instances
        assert truth.masks.masks.shape == (len(truth.labels), 1024, 1024)
    corners = torch.stack([sample['inputs'][:, -1, -1] for sample in samples])
    assert len(corners) and bool((corners == 128).all())


@pytest.mark.parametrize(
    ('name', 'shape'), [('coco_panoptic_lsj_aff', (1024, 1024)), ('cityscapes_panoptic_aff', (512, None))]
)
def test_panoptic_pipelines(name, shape, tmp_path):
    init_default_scope('mmdet')
    config = Config.fromfile(DATA / f'{name}.py').train_dataloader.dataset
    config.update(type='boltz_mm.CheckedCocoPanopticDataset', metainfo=METAINFO, data_root=str(tmp_path))
    config.update(ann_file=write_panoptic(tmp_path).name, data_prefix={'img': '', 'seg': ''})
    for sample in DATASETS.build(config):
        truth = sample['data_samples'].gt_instances
        height, width = sample['inputs'].shape[1:]
        assert height == shape[0] and width == (shape[1] or width)
        assert truth.masks.masks.shape == (len(truth.labels), height, width)
        assert set(truth.labels.tolist()) <= {0, 1, 2} and truth.masks.masks.sum(0).max() <= 1


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    make_shapes(folder, {'train': 3, 'val': 3}, ShapesSpec(size=64, max_objects=3), progress=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('path', SMALL, ids=_ids(SMALL))
def test_small_models_learn_from_a_batch_and_predict_one(path, shapes, tmp_path):
    text = re.sub(r"'data/shapes/", f"'{shapes}/", _read(path).pretty_text).replace('work_dir = ', 'old_work_dir = ')
    (tmp_path / 'config.py').write_text(text)
    config = _read(tmp_path / 'config.py')
    config.work_dir = str(tmp_path / 'work')
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    torch.manual_seed(0)
    runner = Runner.from_cfg(config)
    model = runner.model
    model.init_weights()
    wrapper = runner.build_optim_wrapper(config.optim_wrapper)
    before = model.backbone.patch_embed.proj1.weight.clone()
    losses = model.train_step(next(iter(runner.build_dataloader(config.train_dataloader))), wrapper)
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert not torch.equal(model.backbone.patch_embed.proj1.weight, before)
    model.eval()
    loader = runner.build_dataloader(config.val_dataloader)
    evaluator = runner.build_evaluator(config.val_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    for batch in loader:
        with torch.no_grad():
            evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
    assert evaluator.evaluate(3)


def test_shapes_have_the_classes_of_the_generator():
    panoptic = Config.fromfile(DATA / 'shapes_panoptic.py').metainfo
    semantic = Config.fromfile(DATA / 'shapes_semantic.py').metainfo
    for found, made in ((panoptic, panoptic_metainfo()), (semantic, semantic_metainfo())):
        assert found.to_dict() == made
    assert Config.fromfile(DATA / 'shapes_cls.py').metainfo['classes'] == panoptic['thing_classes']
