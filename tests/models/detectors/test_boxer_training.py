"""BoxeR-2D in mmengine's runner, in mmdet's inferencer and in two processes."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from mmdet.utils import reduce_mean
from mmengine.config import Config
from mmengine.runner import Runner

from boltz_mm.datasets.shapes import ShapesSpec, make_shapes
from tests.models.detectors.test_boxer import build, make_batch, total

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes') / 'set'
    make_shapes(folder, {'train': 6, 'val': 4}, ShapesSpec(size=64, empty=0.3), progress=False)
    return folder


@pytest.fixture(scope='module')
def config(shapes, tmp_path_factory):
    cfg = Config.fromfile(ROOT / 'configs' / 'boxer' / 'boxer_tiny_shapes.py')
    cfg.work_dir = str(tmp_path_factory.mktemp('work'))
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.model.num_queries = 20
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
        loader.dataset.data_root = f'{shapes}/'
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=False)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = str(shapes / 'annotations' / 'instances_val.json')
    cfg.default_hooks.checkpoint.interval = 1
    return cfg


@pytest.fixture(scope='module')
def trained(config):
    """The runner after one epoch with validation."""
    runner = Runner.from_cfg(config.copy())
    runner.train()
    return runner


@pytest.mark.slow
def test_runner_trains_and_evaluates_boxes_and_masks(trained):
    logged = trained.message_hub.log_scalars
    assert torch.isfinite(torch.tensor(logged['train/loss'].current()))
    for metric in ('coco/bbox_mAP', 'coco/segm_mAP'):
        assert 0 <= logged[f'val/{metric}'].current() <= 1


@pytest.mark.slow
def test_inferencer_of_mmdet(trained, config, shapes, tmp_path):
    from mmdet.apis import DetInferencer

    weights = Path(config.work_dir) / 'epoch_1.pth'
    inferencer = DetInferencer(model=config.copy(), weights=str(weights), device='cpu', show_progress=False)
    image = sorted((shapes / 'val').glob('*.png'))[0]
    answer = inferencer(str(image), out_dir=str(tmp_path / 'out'), no_save_pred=False)
    prediction = answer['predictions'][0]
    assert len(prediction['scores']) == len(prediction['bboxes']) == len(prediction['masks']) > 0
    assert len(list((tmp_path / 'out' / 'vis').iterdir())) == 1


def train_one_rank(rank, port, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    model = build('masks-v1').double().train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)  # no search for unused parameters
    images, samples = make_batch(num_objects=(4, 0))
    mine = slice(rank, rank + 1)  # the second process has no object
    for _ in range(2):  # a parameter without gradient would fail the second time
        model.zero_grad()
        losses = parallel(images[mine].double(), samples[mine], mode='loss')
        total(losses).backward()
    reported = {name: reduce_mean(value.detach()) for name, value in losses.items() if 'loss' in name}
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, folder / 'gradients.pth')
        torch.save(reported, folder / 'losses.pth')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_one_without_objects_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    mp.spawn(train_one_rank, (port, tmp_path), nprocs=2)
    gradients = torch.load(tmp_path / 'gradients.pth', weights_only=True)

    model = build('masks-v1').double().train()
    images, samples = make_batch(num_objects=(4, 0))
    # The mean over processes of sums divided by the mean number of objects (4 / 2) is the sum divided by 4.
    losses = model.loss(images.double(), samples)
    total(losses).backward()
    for name, value in torch.load(tmp_path / 'losses.pth', weights_only=True).items():
        torch.testing.assert_close(value, losses[name].detach(), rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # mmdet adds the float32 epsilon to each normaliser, here to 2, there to 4.
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f'{n}: {m}'
            )
