"""Every config: reads, dumps, builds, runs its pipelines; README, metafile and configs say the same."""

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from PIL import Image

from boltz_mm.datasets.shapes import instance_metainfo
from boltz_mm.registry import DATASETS, METRICS, MODELS
from tests.datasets.coco_files import coco_content, write_coco

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts)
WITH_DATA = [path for path in CONFIGS if path.parent.name == 'boxer' and 'boxer3d' not in path.name]
OFFICIAL_COCO = [path for path in WITH_DATA if path.name.endswith('_coco.py')]
METAFILES = sorted((ROOT / 'configs').rglob('metafile.yml'))


def _ids(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def _all_configs(function):
    return pytest.mark.parametrize('path', CONFIGS, ids=_ids(CONFIGS))(function)


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmdet')


def _read(path: Path) -> Config:
    """The config; its scope becomes the default one."""
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    return config


def _models() -> dict[str, dict[str, Any]]:
    loaded = itertools.chain.from_iterable(yaml.safe_load(path.read_text())['Models'] for path in METAFILES)
    return {model['Name']: model for model in loaded}


def test_there_are_configs():
    assert len(OFFICIAL_COCO) == 8
    assert len(CONFIGS) >= 10


@_all_configs
def test_dump_and_reload_give_the_same(path, tmp_path):
    config = Config.fromfile(path)
    config.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == config.to_dict()


@_all_configs
def test_model_builds_with_the_parameters_of_the_metafile(path):
    config = _read(path)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count == _models()[path.stem]['Metadata']['Parameters']


@_all_configs
def test_every_named_part_is_registered(path):
    """Whatever has a type can be found: optimizer, hooks, loops, schedulers, visualizer, metrics."""
    from mmengine.registry import (
        HOOKS,
        LOOPS,
        OPTIM_WRAPPER_CONSTRUCTORS,
        OPTIM_WRAPPERS,
        OPTIMIZERS,
        PARAM_SCHEDULERS,
        VISUALIZERS,
    )

    config = _read(path)
    hooks = [*config.default_hooks.values(), *config.get('custom_hooks', [])]
    named = [(HOOKS, hook) for hook in hooks] + [(PARAM_SCHEDULERS, one) for one in config.param_scheduler]
    named += [(LOOPS, config[key]) for key in ('train_cfg', 'val_cfg', 'test_cfg') if 'type' in (config.get(key) or {})]
    named += [(METRICS, one) for key in ('val_evaluator', 'test_evaluator') for one in _listed(config.get(key))]
    named += [(OPTIM_WRAPPERS, config.optim_wrapper), (OPTIMIZERS, config.optim_wrapper.optimizer)]
    named += [(VISUALIZERS, config.visualizer)]
    if 'constructor' in config.optim_wrapper:
        named += [(OPTIM_WRAPPER_CONSTRUCTORS, {'type': config.optim_wrapper.constructor})]
    for registry, part in named:
        kind = part['type'] if '.' in part['type'] else f'{config.default_scope}.{part["type"]}'
        assert registry.get(kind) or registry.get(part['type']), part['type']


def _listed(part: Any) -> list:
    """Nothing, one or several parts as a list."""
    return part if isinstance(part, list) else [part] if part else []


@pytest.mark.parametrize('name', ['shapes_instance', 'shapes_instance_hard'])
def test_shapes_have_the_classes_and_colours_of_the_generator(name):
    config = Config.fromfile(ROOT / 'configs' / '_base_' / 'datasets' / f'{name}.py')
    made = instance_metainfo(len(config.metainfo.classes))
    assert tuple(config.metainfo.classes) == made['classes']
    assert [tuple(color) for color in config.metainfo.palette] == made['palette']


def _at(config: Config, folder: Path) -> Config:
    """The config with a small dataset of its own classes in the place of its data."""
    classes = config.train_dataloader.dataset.get('metainfo', {}).get('classes')
    if classes:
        content = coco_content(tuple(classes), tuple(range(1, len(classes) + 1)))
    else:
        content = coco_content(('person', 'bicycle', 'airplane'), (1, 2, 5))
    ann_file = write_coco(folder, content)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.update(data_root=str(folder), ann_file=ann_file.name, data_prefix=dict(img=''))
    config.val_evaluator.ann_file = config.test_evaluator.ann_file = str(ann_file)
    return config


@pytest.mark.parametrize('path', WITH_DATA, ids=_ids(WITH_DATA))
def test_pipelines_run(path, tmp_path):
    config = _at(Config.fromfile(path), tmp_path)
    with_masks = bool(config.model.bbox_head.get('with_mask'))
    seen = 0
    for sample in DATASETS.build(config.train_dataloader.dataset):
        truth = sample['data_samples'].gt_instances
        assert ('masks' in truth) == with_masks
        height, width = sample['inputs'].shape[1:]
        assert bool((truth.bboxes.tensor <= 1e-3 + torch.tensor([width, height, width, height])).all())
        assert bool((truth.labels < config.model.bbox_head.num_classes).all())
        seen += len(truth)
    assert seen > 2
    tested = DATASETS.build(config.test_dataloader.dataset)
    assert len(tested) == 5
    assert {'img_id', 'ori_shape', 'scale_factor'} <= set(tested[0]['data_samples'].metainfo)
    assert METRICS.build(config.val_evaluator)


@pytest.mark.parametrize('path', OFFICIAL_COCO, ids=_ids(OFFICIAL_COCO))
def test_recipe_is_the_published_one(path):
    """Updates, drops, warm-up, decay, clip, batch, masks (table of the official configs)."""
    name = path.stem
    config = Config.fromfile(path)
    steps = next(one for one in config.param_scheduler if one.type == 'MultiStepLR')
    warmup = [one for one in config.param_scheduler if one.type == 'LinearLR']
    wrapper, jitter = config.optim_wrapper, 'lsj' in name
    total = int(re.search(r'(\d+)xb(\d+)', name)[1]) * config.train_dataloader.batch_size
    assert total == config.auto_scale_lr.base_batch_size == (32 if '50e' in name else 16)
    if '50e' in name:
        assert (config.train_cfg.max_epochs, steps.milestones, steps.by_epoch) == (50, [40], True)
    else:
        expected = (368750, [327778, 355092]) if jitter else (270000, [210000, 250000])
        assert (config.train_cfg.max_iters, steps.milestones) == expected
        assert config.train_dataloader.sampler.type == 'InfiniteSampler'
    assert bool(warmup) == (
        name in ('boxer_r50_8xb2-3x_coco', 'boxer_r50_mask_8xb2-3x_coco', 'boxer_r101_mask_8xb2-3x_coco')
    )
    assert wrapper.optimizer.lr == 2e-4 and wrapper.optimizer.eps == 1e-9
    assert wrapper.optimizer.weight_decay == (0.05 if jitter else 1e-4)
    assert wrapper.clip_grad.max_norm == (0.01 if jitter else 0.1)
    assert config.model.backbone.depth == int(re.search(r'_r(\d+)_', name)[1])
    layer = config.model.decoder.layer_cfg
    assert bool(layer.get('with_mask')) == ('mask' in name) == ('segm' in config.val_evaluator.metric)
    if 'mask' in name:
        assert layer.residual_mode == ('v2' if 'v2' in name else 'v1')


def test_base_names_are_unique():
    """mim looks a config up by its base name anywhere in the checkout."""
    listed = subprocess.run(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '*.py'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    files = [Path(line) for line in listed.stdout.splitlines()] or [p.relative_to(ROOT) for p in CONFIGS]
    for config in (ROOT / 'configs').rglob('*.py'):
        same = [str(file) for file in files if file.name == config.name]
        assert len(same) <= 1, same


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').rglob('*.py')), ids=lambda path: path.stem)
def test_configs_are_short(path):
    assert len(path.read_text().splitlines()) <= 120


def test_metafile_lists_every_config_once():
    listed = sorted(model['Config'] for path in METAFILES for model in yaml.safe_load(path.read_text())['Models'])
    assert listed == sorted(str(path.relative_to(ROOT)) for path in CONFIGS)
    assert all(Path(model['Config']).stem == name for name, model in _models().items())


def test_metafile_counts_training_as_the_configs_do():
    for model in _models().values():
        config, meta = Config.fromfile(ROOT / model['Config']), model['Metadata']
        assert config.train_cfg.get('max_iters') == meta.get('Iterations')
        assert config.train_cfg.get('max_epochs') == meta.get('Epochs')


def test_collections_belong_to_readmes():
    for path in METAFILES:
        content = yaml.safe_load(path.read_text())
        names = {collection['Name'] for collection in content['Collections']}
        assert {model['In Collection'] for model in content['Models']} <= names
        assert all((ROOT / collection['README']).is_file() for collection in content['Collections'])


def test_published_results_are_marked_and_come_without_weights():
    for model in _models().values():
        assert 'Weights' not in model
        if model.get('Results'):
            assert 'not reproduced' in model['Metadata']['Source of Results']


def _readme_rows() -> dict[str, dict[str, str]]:
    """Every row of the tables of configs in the READMEs, by the name of the config."""
    rows = {}
    for path in METAFILES:
        header: list[str] = []
        for line in path.with_name('README.md').read_text().splitlines():
            cells = [cell.strip() for cell in line.strip('|').split('|')] if line.startswith('| ') else []
            if cells and cells[0] == 'Config':
                header = cells
            elif not cells:
                header = []
            elif header and not cells[0].startswith(':'):
                name, file = re.fullmatch(r'\[(.+)\]\((.+)\)', cells[0]).groups()
                assert (path.parent / file).is_file() and Path(file).stem == name
                assert name not in rows
                rows[name] = dict(zip(header, cells, strict=True))
    return rows


METRIC_NAMES = ('box AP', 'mask AP', 'PQ', 'mIoU', 'Top 1 Accuracy', 'Top 5 Accuracy')


def test_readme_tables_agree_with_the_metafiles():
    rows = _readme_rows()
    assert set(rows) == set(_models())
    for name, model in _models().items():
        metrics = {key: value for result in model.get('Results', ()) for key, value in result['Metrics'].items()}
        assert rows[name]['Params (M)'] == f'{model["Metadata"]["Parameters"] / 1e6:.1f}'
        assert set(metrics) <= set(rows[name])
        for key in set(METRIC_NAMES) & set(rows[name]):
            assert rows[name][key] == str(metrics.get(key, '-'))


def _options_of_readme(marker: str, **variables: str) -> dict[str, Any]:
    """The --cfg-options of the README's command that contains ``marker``, with shell variables filled in."""
    text = (ROOT / 'configs/boxer/README.md').read_text()
    block = next(block for block in re.findall(r'```bash\n(.*?)```', text, re.DOTALL) if marker in block)
    for name, value in variables.items():
        block = block.replace(f'${name}', value)
    words = shlex.split(block.replace('\\\n', ' '))
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args(words[words.index('--cfg-options') :]).cfg_options


def test_readme_command_for_test_dev(tmp_path):
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'test2017').mkdir()
    content = coco_content(('person', 'bicycle', 'airplane'), (1, 2, 5))
    del content['annotations']
    (tmp_path / 'annotations/image_info_test-dev2017.json').write_text(json.dumps(content))
    for number in range(1, 6):
        Image.new('RGB', (40, 30)).save(tmp_path / f'test2017/{number}.png')
    config = Config.fromfile(ROOT / 'configs/boxer/boxer_r50_mask_8xb2-3x_coco.py')
    config.merge_from_dict(_options_of_readme('test-dev'))
    assert config.val_dataloader.dataset.ann_file == 'annotations/instances_val2017.json'
    config.test_dataloader.dataset.data_root = str(tmp_path)
    config.test_evaluator.ann_file = config.test_evaluator.ann_file.replace('data/coco', str(tmp_path))
    config.test_evaluator.outfile_prefix = str(tmp_path / 'out')
    dataset, metric = DATASETS.build(config.test_dataloader.dataset), METRICS.build(config.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    for sample in dataset:
        found = dict(
            bboxes=torch.tensor([[1.0, 2, 11, 7]]), labels=torch.tensor([5]), scores=torch.tensor([0.5]),
            masks=torch.ones(1, 30, 40, dtype=torch.bool),
        )  # fmt: skip
        metric.process({}, [{**sample['data_samples'].metainfo, 'pred_instances': found}])
    metric.evaluate(5)
    rows = json.loads((tmp_path / 'out.segm.json').read_text())
    assert [row['image_id'] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]['category_id'] == 5 and rows[0]['bbox'] == [1, 2, 10, 5]


@pytest.mark.slow
@pytest.mark.skipif('BOLTZ_MM_COCO100' not in os.environ, reason='BOLTZ_MM_COCO100 is not set')
def test_readme_command_for_real_images(tmp_path):
    root = str(tmp_path / 'coco100')  # mmengine takes spaces out of --cfg-options
    os.symlink(os.environ['BOLTZ_MM_COCO100'], root)
    config = Config.fromfile(ROOT / 'configs/boxer/boxer_r50_mask_8xb2-3x_coco.py')
    config.merge_from_dict(_options_of_readme('BOLTZ_MM_COCO100', BOLTZ_MM_COCO100=root))
    train, val = (DATASETS.build(loader.dataset) for loader in (config.train_dataloader, config.val_dataloader))
    assert len(train) == len(val) == 100
    for sample in train:
        assert min(sample['inputs'].shape[1:]) <= 256 and max(sample['inputs'].shape[1:]) <= 400
        assert len(sample['data_samples'].gt_instances.masks) == len(sample['data_samples'].gt_instances.labels)
    assert max(val[0]['inputs'].shape) <= 400
    assert METRICS.build(config.val_evaluator)
    assert config.model.backbone.init_cfg is None


@pytest.mark.slow
def test_mmdet_inferencer_takes_our_config(tmp_path):
    from mmdet.apis import DetInferencer

    config = ROOT / 'configs/boxer/boxer_tiny_shapes.py'
    model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    checkpoint = {'state_dict': model.state_dict(), 'meta': {'dataset_meta': {'classes': ('a', 'b', 'c')}}}
    torch.save(checkpoint, tmp_path / 'tiny.pth')
    image = np.random.default_rng(0).integers(0, 256, (100, 128, 3), dtype=np.uint8)
    inferencer = DetInferencer(str(config), str(tmp_path / 'tiny.pth'), device='cpu', show_progress=False)
    found = inferencer(image, return_vis=True, no_save_vis=True, pred_score_thr=0.0)
    prediction = found['predictions'][0]
    assert len(prediction['scores']) == len(prediction['masks']) == len(prediction['bboxes']) == 100
    assert found['visualization'][0].shape == image.shape
