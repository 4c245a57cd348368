"""Points to pillars against the serial rule, pillar features point by point, the canvas, empty clouds."""

import math

import pytest
import torch
from torch import Tensor, nn

from boltz_mm.models.backbones.pillar_net import (
    PillarFeatureNet,
    PillarNet,
    Pillars,
    drop_points_outside,
    group_points_to_pillars,
    pillar_grid_shape,
)
from boltz_mm.registry import MODELS

SIZE = (0.5, 0.25, 8.0)
RANGE = (-2.0, -1.0, -3.0, 2.0, 1.0, 5.0)


def _cloud(count: int, seed: int = 0, channels: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(RANGE[:3]), torch.tensor(RANGE[3:])
    points = torch.rand((count, channels), generator=generator)
    points[:, :3] = low - 0.2 + points[:, :3] * (high - low + 0.4)
    return points


def _tiny(**kwargs: object) -> PillarNet:
    config = dict(
        voxel_size=SIZE,
        point_cloud_range=RANGE,
        max_points=4,
        max_voxels=40,
        feat_channels=(8, 12),
        stage_layers=(1, 2, 1),
        stage_channels=(6, 8, 10),
    )
    return PillarNet(**(config | kwargs))


def _group_serially(points: Tensor, max_points: int, max_voxels: int) -> tuple[list, list]:
    """What the rule says, point by point."""
    low, size, grid = torch.tensor(RANGE[:3]), torch.tensor(SIZE), torch.tensor(pillar_grid_shape(SIZE, RANGE))
    cells, members = [], []
    for point in points:
        cell = torch.floor((point[:3] - low) / size)
        if not bool(((cell >= 0) & (cell < grid)).all()):
            continue
        cell = [int(v) for v in cell.flip(0)]
        if cell not in cells:
            if len(cells) == max_voxels:
                continue
            cells.append(cell)
            members.append([])
        if len(members[cells.index(cell)]) < max_points:
            members[cells.index(cell)].append(point)
    return cells, members


@pytest.mark.parametrize(('max_points', 'max_voxels'), [(4, 1000), (2, 30), (1, 7), (50, 1)])
def test_grouping_is_the_serial_rule(max_points: int, max_voxels: int) -> None:
    points = _cloud(300)
    voxels, coordinates, counts = group_points_to_pillars(points, SIZE, RANGE, max_points, max_voxels)
    cells, members = _group_serially(points, max_points, max_voxels)
    assert coordinates.tolist() == cells
    assert counts.tolist() == [len(m) for m in members]
    assert voxels.shape == (len(cells), max_points, 5)
    for voxel, wanted in zip(voxels, members, strict=True):
        assert torch.equal(voxel[: len(wanted)], torch.stack(wanted))
        assert not voxel[len(wanted) :].any()


def test_points_of_open_pillars_are_kept_after_the_last_pillar_opened() -> None:
    a, b = [-1.9, -0.9, 0.0, 0.0, 0.0], [1.9, 0.9, 0.0, 0.0, 0.0]
    voxels, _, counts = group_points_to_pillars(torch.tensor([a, b, a]), SIZE, RANGE, 5, 1)
    assert counts.tolist() == [2]
    assert torch.equal(voxels[0, :2], torch.tensor([a, a]))


def test_range_is_inclusive_and_grid_is_not() -> None:
    corners = torch.tensor([[*RANGE[:3], 0.0, 0.0], [*RANGE[3:], 0.0, 0.0], [RANGE[3] + 1e-3, 0.0, 0.0, 0.0, 0.0]])
    assert len(drop_points_outside(corners, RANGE)) == 2
    # The upper corner falls into the cell one past the last.
    assert len(group_points_to_pillars(corners, SIZE, RANGE, 5, 5)[0]) == 1
    # A grid of rounded size is larger than the range here: the corner is inside.
    size = (0.3, 0.25, 12.0)
    assert pillar_grid_shape(size, RANGE) == (13, 8, 1)
    high = torch.tensor([[1.5, 0.5, 8.5, 0.0, 0.0]])
    assert len(group_points_to_pillars(high, size, RANGE, 5, 5)[0]) == 1
    assert len(_tiny(voxel_size=size).voxelize([high]).voxels) == 0
    assert len(_tiny(voxel_size=size, filter_range=False).voxelize([high]).voxels) == 1


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('column', [0, 2, 3])
def test_points_that_are_not_finite_are_dropped(bad: float, column: int) -> None:
    points = _cloud(60)
    spoilt = points.repeat_interleave(2, dim=0)
    spoilt[1::2, column] = bad
    wanted, found = _tiny().voxelize([points]), _tiny().voxelize([spoilt])
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_published_grid() -> None:
    net = PillarNet(stage_layers=(1,), stage_channels=(4,), stage_strides=(1,), out_indices=(0,))
    assert net.grid_shape == (469, 469, 1)


def test_max_voxels_of_training_and_test() -> None:
    net = _tiny(max_voxels=(3, 5))
    assert len(net.train().voxelize([_cloud(200)]).voxels) == 3
    assert len(net.eval().voxelize([_cloud(200)]).voxels) == 5


def test_pillar_features_point_by_point() -> None:
    net = PillarFeatureNet(5, (8, 12), SIZE, RANGE, dict(type='BN1d', eps=1e-3)).eval()
    for layer in net.pfn_layers:
        nn.init.uniform_(layer.norm.bias)
        nn.init.uniform_(layer.norm.running_mean)
    voxels, cells, counts = group_points_to_pillars(_cloud(80), SIZE, RANGE, 3, 100)
    pillars = Pillars(voxels, nn.functional.pad(cells, (1, 0)), counts)
    found = net(pillars)
    for voxel, (_, y, x), count, feature in zip(voxels, cells, counts, found, strict=True):
        mean = voxel[:count, :3].mean(0)
        centre = torch.tensor([(x + 0.5) * SIZE[0] + RANGE[0], (y + 0.5) * SIZE[1] + RANGE[1]])
        rows = torch.zeros(3, 10)  # padding stays zero, and takes part below
        for i in range(count):
            rows[i] = torch.cat([voxel[i], voxel[i, :3] - mean, voxel[i, :2] - centre])
        first, second = net.pfn_layers
        hidden = first.norm(first.linear(rows)).relu()
        hidden = torch.cat([hidden, hidden.max(0).values.expand(3, -1)], dim=1)
        wanted = second.norm(second.linear(hidden)).relu().max(0).values
        torch.testing.assert_close(feature, wanted, rtol=1e-4, atol=1e-5)


def test_inference_computes_the_same_from_fewer_rows() -> None:
    net = PillarFeatureNet(5, (8, 8, 12), SIZE, RANGE, dict(type='BN1d', eps=1e-3)).eval()
    for layer in net.pfn_layers:
        nn.init.normal_(layer.norm.bias)  # so that padding rows win some maxima
    voxels, cells, counts = group_points_to_pillars(_cloud(80), SIZE, RANGE, 3, 100)
    assert counts.unique().tolist() == [1, 2, 3]
    pillars = Pillars(voxels, nn.functional.pad(cells, (1, 0)), counts)
    dense = net(pillars)
    with torch.no_grad():
        torch.testing.assert_close(net(pillars), dense)
        assert net(Pillars(voxels[:0], pillars.coordinates[:0], counts[:0])).shape == (0, 12)


def test_scatter() -> None:
    net = _tiny()
    features = torch.arange(6.0).view(3, 2)
    coordinates = torch.tensor([[0, 0, 0, 0], [1, 0, 7, 2], [1, 0, 0, 7]], dtype=torch.int32)
    canvas = net.scatter(features, coordinates, 3)
    assert canvas.shape == (3, 2, 8, 8)
    assert canvas[0, :, 0, 0].tolist() == [0, 1]
    assert canvas[1, :, 7, 2].tolist() == [2, 3]
    assert canvas[1, :, 0, 7].tolist() == [4, 5]
    assert canvas.abs().sum() == features.sum()


@pytest.mark.parametrize('training', [True, False])
def test_clouds_without_points(training: bool) -> None:
    net = _tiny().train(training)
    empty, far = _cloud(0), _cloud(20) + 100
    for clouds in ([empty, empty], [empty, far], [_cloud(50), empty]):
        net.zero_grad()
        outputs = net(clouds)
        assert [tuple(o.shape) for o in outputs] == [(2, 8, 4, 4), (2, 10, 2, 2)]
        assert all(bool(o.isfinite().all()) for o in outputs)
        sum(o.sum() for o in outputs).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_each_cloud_stands_alone() -> None:
    net = _tiny().eval()
    clouds = [_cloud(100, 1), _cloud(70, 2)]
    together = net(clouds)
    for i, cloud in enumerate(clouds):
        for batched, single in zip(together, net([cloud]), strict=True):
            torch.testing.assert_close(batched[i : i + 1], single)


def test_sync_batch_norm() -> None:
    net = _tiny(norm_cfg=dict(type='SyncBN', eps=1e-3, momentum=0.01))
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 6
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    plain = _tiny()
    plain.load_state_dict(net.state_dict())
    for a, b in zip(net.eval()([_cloud(50)]), plain.eval()([_cloud(50)]), strict=True):
        torch.testing.assert_close(a, b)


def test_other_numbers_of_channels() -> None:
    net = MODELS.build(dict(type='boltz_mm.PillarNet', in_channels=4, voxel_size=SIZE, point_cloud_range=RANGE,
                            feat_channels=(6,), stage_layers=(1,), stage_channels=(3,), stage_strides=(2,),
                            out_indices=(0,)))  # fmt: skip
    assert net([_cloud(30, channels=4)])[0].shape == (1, 3, 4, 4)


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match='8 x 8 x 2 cells'):
        _tiny(voxel_size=(0.5, 0.25, 4.0))
    with pytest.raises(ValueError, match='one entry per stage, got 2, 3 and 3'):
        _tiny(stage_layers=(1, 1))
    with pytest.raises(ValueError, match='outside 0..2'):
        _tiny(out_indices=(3,))
    with pytest.raises(ValueError, match='must be even, got 7'):
        _tiny(feat_channels=(7, 8))
    with pytest.raises(ValueError, match=r'point cloud 1 must have shape \[N, 5\], got \[10, 4\]'):
        _tiny().voxelize([_cloud(10), _cloud(10, channels=4)])
    with pytest.raises(ValueError, match='at least one point cloud'):
        _tiny().voxelize([])
