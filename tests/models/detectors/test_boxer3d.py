"""BoxeR-3D as a whole: published size and config, losses, detections, mixed precision, errors."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor, nn

from boltz_mm.models.detectors.boxer3d import BoxeR3D
from boltz_mm.models.task_modules.box3d_overlaps import giou_3d
from boltz_mm.registry import MODELS

CONFIGS = Path(__file__).parents[3] / 'configs' / 'boxer'
RANGE = (-8.0, -8.0, -3.0, 8.0, 8.0, 5.0)
WIDTH = 32
LAYER = dict(embed_dims=WIDTH, feedforward_channels=32)


def _model(points: bool = True, **kwargs: object) -> BoxeR3D:
    torch.manual_seed(0)
    config = dict(
        encoder=dict(num_layers=1, layer_cfg=LAYER),
        decoder=dict(layer_cfg=LAYER),
        bbox_head=dict(num_classes=3, embed_dims=WIDTH,
                       bbox_coder=dict(type='boltz_mm.Box3dCoder', point_cloud_range=RANGE)),
        num_queries=12,
    )  # fmt: skip
    if points:
        config['backbone'] = dict(
            type='boltz_mm.PillarNet', voxel_size=(0.5, 0.5, 8.0), point_cloud_range=RANGE, max_points=5,
            max_voxels=500, feat_channels=(8, 16), stage_layers=(1, 1, 1), stage_channels=(8, 12, 16),
        )  # fmt: skip
        config['neck'] = dict(type='boltz_mm.BoxeRNeck', in_channels=[12, 16], out_channels=WIDTH)
    model = BoxeR3D(**(config | kwargs))
    model.init_weights()
    return model


def _clouds(*counts: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    clouds = [torch.rand((n, 5), generator=generator) for n in counts]
    for cloud in clouds:
        cloud[:, :3] = cloud[:, :3] * torch.tensor([16.0, 16.0, 8.0]) + torch.tensor(RANGE[:3])
    return clouds


def _maps(batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn((batch, WIDTH, h, w), generator=generator) for h, w in ((9, 8), (5, 4))]


def _samples(*counts: int) -> list[BaseDataElement]:
    generator = torch.Generator().manual_seed(3)
    samples = []
    for n in counts:
        boxes = torch.rand((n, 7), generator=generator)
        boxes = boxes * torch.tensor([12.0, 12, 3, 3, 2, 2, 6]) + torch.tensor([-6.0, -6, -1, 1, 1, 1, -3])
        sample = BaseDataElement()
        labels = torch.randint(3, (n,), generator=generator)
        sample.gt_instances_3d = InstanceData(bboxes_3d=boxes, labels_3d=labels)
        samples.append(sample)
    return samples


def _published() -> Config:
    (path,) = CONFIGS.glob('boxer3d_*.py')
    return Config.fromfile(path)


def test_published_size() -> None:
    neck = dict(type='boltz_mm.BoxeRNeck', in_channels=[512, 1024])
    with torch.device('meta'):
        model = BoxeR3D(backbone=dict(type='boltz_mm.PillarNet'), neck=neck)
    assert sum(p.numel() for p in model.parameters()) == 27_349_444


def test_published_config() -> None:
    config = _published()
    with DefaultScope.overwrite_default_scope(config.default_scope), torch.device('meta'):
        model = MODELS.build(config.model)
    assert sum(p.numel() for p in model.parameters()) == 27_349_444
    assert model.backbone.grid_shape == (469, 469, 1)
    assert model.backbone.max_voxels == (32000, 60000)
    assert model.bbox_head.test_cfg['max_per_sample'] == 125
    assert [loss.loss_weight for loss in (model.bbox_head.loss_cls, model.bbox_head.loss_bbox,
            model.bbox_head.loss_iou, model.bbox_head.loss_heading)] == [2, 5, 2, 4]  # fmt: skip


@pytest.mark.parametrize('counts', [(3, 2), (0, 2), (0, 0)])
@pytest.mark.parametrize('points', [True, False])
def test_losses_reach_every_parameter(points: bool, counts: tuple[int, int]) -> None:
    model = _model(points)
    for parameter in model.parameters():  # zero-initialised layers would hide what lies before them
        nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else None
    losses = model(_clouds(300, 200) if points else _maps(), _samples(*counts), mode='loss')
    stages = ('', 'd0.', 'enc_')
    assert losses.keys() == {f'{s}loss_{n}' for s in stages for n in ('cls', 'bbox', 'iou', 'heading')}
    total = sum(losses.values())
    assert bool(total.isfinite())
    total.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert not missing
    without_boxes = [losses[f'{s}loss_{n}'] for s in stages for n in ('bbox', 'iou', 'heading')]
    assert all(bool(loss > 0) == any(counts) for loss in without_boxes)


def test_maps_are_what_the_points_become() -> None:
    model = _model().eval()
    clouds = _clouds(300, 200)
    with torch.no_grad():
        from_points, from_maps = model(clouds), model(list(model.extract_feat(clouds)))
    for a, b in zip(from_points, from_maps, strict=True):
        torch.testing.assert_close(a, b)


def test_samples_of_a_batch_do_not_mix() -> None:
    model = _model().eval()
    clouds = _clouds(300, 150)
    with torch.no_grad():
        both, second = model(clouds), model(clouds[1:])
    for a, b in zip(both, second, strict=True):
        torch.testing.assert_close(a[:, 1:], b, rtol=1e-4, atol=1e-5)


def test_predict_writes_detections() -> None:
    model = _model(test_cfg=dict(max_per_sample=7)).eval()
    samples = _samples(2, 0)
    with torch.no_grad():
        results = model(_clouds(300, 0), samples, mode='predict')
    assert all(result is sample for result, sample in zip(results, samples, strict=True))
    for result in results:
        found = result.pred_instances_3d
        assert found.bboxes_3d.shape == (7, 7)
        assert found.scores_3d.shape == found.labels_3d.shape == (7,)
        assert bool(found.bboxes_3d.isfinite().all())
        assert bool((found.scores_3d[1:] <= found.scores_3d[:-1]).all())
    with torch.no_grad():
        alone = model(_clouds(300, 0), mode='predict')
    torch.testing.assert_close(alone[0].pred_instances_3d.bboxes_3d, results[0].pred_instances_3d.bboxes_3d)


@pytest.mark.parametrize('clouds', [_clouds(0, 0), [c + 1000 for c in _clouds(50, 50)]], ids=['empty', 'far'])
def test_clouds_without_points_in_range(clouds: list[Tensor]) -> None:
    model = _model()
    losses = model(clouds, _samples(1, 2), mode='loss')
    assert all(bool(loss.isfinite()) for loss in losses.values())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    model = _model()
    plain = model(_clouds(300, 200), _samples(3, 2), mode='loss')
    with torch.autocast('cpu', dtype=dtype):
        mixed = model(_clouds(300, 200), _samples(3, 2), mode='loss')
    assert all(loss.dtype == torch.float32 for loss in mixed.values())
    torch.testing.assert_close(sum(mixed.values()), sum(plain.values()), rtol=0.05, atol=0)
    sum(mixed.values()).backward()


def test_train_step() -> None:
    model = _model()
    before = [p.clone() for p in model.parameters()]
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3))
    log = model.train_step(dict(inputs=_clouds(300, 200), data_samples=_samples(3, 2)), wrapper)
    assert log['loss'] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.slow
def test_learns_two_scenes() -> None:
    model = _model()
    clouds, samples = _clouds(400, 400), _samples(2, 1)
    for cloud, sample in zip(clouds, samples, strict=True):  # fill each object with points of its own intensity
        for i, box in enumerate(sample.gt_instances_3d.bboxes_3d):
            cloud[i * 60 : (i + 1) * 60, :3] = box[:3] + (torch.rand(60, 3) - 0.5) * box[3:6]
            cloud[i * 60 : (i + 1) * 60, 3:] = 3.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        sum(model(clouds, samples, mode='loss').values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        results = model.predict(clouds)
    for result, sample in zip(results, samples, strict=True):
        wanted, found = sample.gt_instances_3d, result.pred_instances_3d
        overlap = giou_3d(found.bboxes_3d[: len(wanted), None], wanted.bboxes_3d)
        best = overlap.argmax(dim=0)
        assert bool((overlap.max(dim=0).values > 0.5).all())
        assert found.labels_3d[best].tolist() == wanted.labels_3d.tolist()


def test_errors_name_what_is_wrong() -> None:
    points, maps = _model(), _model(points=False)
    with pytest.raises(TypeError, match='got Tensor'):
        points(torch.zeros(3, 5))
    with pytest.raises(ValueError, match='no backbone'):
        maps(_clouds(10))
    with pytest.raises(ValueError, match=r'\[B, 32, H, W\] with one B'):
        maps([torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 2, 2)])
    with pytest.raises(ValueError, match='with one B'):
        maps([torch.zeros(1, 32, 4, 4), torch.zeros(2, 32, 2, 2)])
    with pytest.raises(ValueError, match='built for 2 levels'):
        maps(_maps()[:1])
    with pytest.raises(ValueError, match='not a mixture'):
        points([*_clouds(10), *_maps()])
    with pytest.raises(ValueError, match='not empty'):
        points([])
    with pytest.raises(ValueError, match='a batch of 2 needs as many data samples, got 1'):
        maps(_maps(), _samples(1), mode='loss')
    with pytest.raises(ValueError, match='got 0'):
        maps(_maps(), mode='loss')
    with pytest.raises(ValueError, match="got 'train'"):
        maps(_maps(), mode='train')
    with pytest.raises(ValueError, match='point_cloud_range of the backbone'):
        _model(bbox_head=dict(embed_dims=WIDTH))
    with pytest.raises(ValueError, match='must be 8'):
        _model(encoder=dict(layer_cfg=LAYER | dict(num_heads=4)))
