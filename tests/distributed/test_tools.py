"""tools/train.py and tools/test.py under torchrun and torch.distributed.launch, on BoxeR and the shapes set."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from boltz_mm.datasets.shapes import ShapesSpec, make_shapes

ROOT = Path(__file__).parents[2]
CONFIG = """
_base_ = [{base!r}]
custom_imports = dict(imports=['boltz_mm', 'boltz_mm.engine', 'failing_hook'])
data_root = {data!r}
model = dict(num_queries=20, encoder=dict(num_layers=1), decoder=dict(num_layers=1))
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1, val_interval=1)
param_scheduler = []
default_hooks = dict(checkpoint=dict(interval=1, by_epoch=True), logger=dict(interval=1))
log_processor = dict(by_epoch=True)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
    dataset=dict(data_root=data_root),
)
val_dataloader = dict(num_workers=0, persistent_workers=False, batch_size=1, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
"""
FAILING_HOOK = """
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class FailOnSecond(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if get_rank() == 1 and runner.iter == 1:
            raise ValueError('the second rank is out of order')
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def experiment(tmp_path_factory):
    """Folder with a set of 6 and 5 images (two ranks get unequal shares), a config and a hook that fails."""
    folder = tmp_path_factory.mktemp('experiment')
    make_shapes(folder / 'set', {'train': 6, 'val': 5}, ShapesSpec(size=64, empty=0.3), progress=False)
    base = ROOT / 'configs' / 'boxer' / 'boxer_tiny_shapes.py'
    (folder / 'tiny_two_ranks.py').write_text(CONFIG.format(base=str(base), data=f'{folder / "set"}/'))
    (folder / 'failing_hook.py').write_text(FAILING_HOOK)
    return folder


def _call(experiment, launcher, script, *arguments, timeout=400):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    start = {
        'none': [],
        'torchrun': ['-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={port}'],
        'launch': ['-m', 'torch.distributed.launch', '--nproc_per_node=2', f'--master_port={port}'],
    }[launcher]
    command = [sys.executable, *start, ROOT / 'tools' / script, experiment / 'tiny_two_ranks.py', *arguments]
    command += [] if launcher == 'none' else ['--launcher', 'pytorch']
    path = os.pathsep.join([str(ROOT), str(experiment)])
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=path, CUDA_VISIBLE_DEVICES='')
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=experiment)


@pytest.fixture(scope='module')
def trained(experiment):
    done = _call(experiment, 'torchrun', 'train.py', '--work-dir', experiment / 'work')
    assert done.returncode == 0, done.stderr[-4000:]
    return experiment / 'work'


def _evaluate(experiment, launcher, checkpoint, name):
    """Metrics, and for each image its id and the scores of its detections."""
    work_dir, dump = experiment / name, experiment / f'{name}.pkl'
    done = _call(experiment, launcher, 'test.py', checkpoint, '--work-dir', work_dir, '--out', dump)
    assert done.returncode == 0, done.stderr[-4000:]
    (written,) = [path for path in work_dir.glob('*/*.json') if path.stem == path.parent.name]
    metrics = {key: value for key, value in json.loads(written.read_text()).items() if 'AP' in key}
    answers = pickle.loads(dump.read_bytes())
    return metrics, [(answer['img_id'], answer['pred_instances']['scores'].tolist()) for answer in answers]


def test_torchrun_trains_with_one_image_each(trained):
    """6 images in 2 ranks of batch 1: 3 iterations; the last checkpoint is there and named."""
    assert (trained / 'last_checkpoint').read_text() == str(trained / 'epoch_1.pth')
    scalars = [json.loads(line) for path in trained.glob('*/vis_data/scalars.json') for line in path.open()]
    assert max(entry.get('iter', 0) for entry in scalars if 'loss' in entry) == 3


def test_metrics_do_not_depend_on_the_number_of_processes(trained, experiment):
    """5 images on 2 ranks: one is padded, and must not count twice. Launched with the old spelling as well."""
    alone, answers_alone = _evaluate(experiment, 'none', trained / 'epoch_1.pth', 'alone')
    both, answers_both = _evaluate(experiment, 'launch', trained / 'epoch_1.pth', 'both')
    assert alone == both and {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(alone)
    assert answers_alone == answers_both and len(answers_alone) == 5 and answers_alone[0][1]


def test_failure_of_one_rank_ends_the_job(experiment):
    begin = time.monotonic()
    options = ['--work-dir', experiment / 'failing', '--cfg-options', 'custom_hooks.0.type=FailOnSecond']
    done = _call(experiment, 'torchrun', 'train.py', *options)
    assert done.returncode != 0 and 'the second rank is out of order' in done.stderr
    # Starting takes most of it; the first rank must not wait for the timeout of gloo (30 minutes).
    assert time.monotonic() - begin < 120
