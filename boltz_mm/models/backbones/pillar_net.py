"""Point-pillar network of BoxeR-3D: point clouds to multi-scale bird's-eye-view maps.

Source: BoxeR (CVPR 2022, section 3.4) and the official files ``utils/det3d/general.py`` (points to pillars),
``module/point_pillar.py`` (pillar features, scatter) and ``module/backbone3d.py`` (convolution stages).

Deviations from the official code:

* Pillars are formed with sorts and index operations on whatever device the points are on, in place of a serial loop;
  the result is the same, element for element.
* In inference the padding rows of a pillar, which are all alike, are computed once.
* Points with a NaN or an infinite value in any channel are dropped (officially they end in an arbitrary pillar).
* Clouds without a point inside the range are allowed: their bird's-eye view is zero.
* Normalisation is plain batch norm by default; ``norm_cfg=dict(type='SyncBN', ...)`` gives the published one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from boltz_mm.registry import MODELS


class Pillars(NamedTuple):
    """Points grouped by pillar, in order of the first point that fell into each.

    Attributes:
        voxels: Float tensor ``[N, P, D]``; rows past the number of points of a pillar are zero.
        coordinates: Int32 tensor ``[N, 4]``, (cloud of the batch, z, y, x) cell of each pillar.
        num_points: Int32 tensor ``[N]``, points kept in each pillar, 1 to P.
    """

    voxels: Tensor
    coordinates: Tensor
    num_points: Tensor


def pillar_grid_shape(voxel_size: Sequence[float], point_cloud_range: Sequence[float]) -> tuple[int, int, int]:
    """Number of cells along x, y and z: the extent over the cell size, rounded (469 for 150 m and 0.32 m)."""
    low, high = point_cloud_range[:3], point_cloud_range[3:]
    nx, ny, nz = (round((b - a) / size) for a, b, size in zip(low, high, voxel_size, strict=True))
    return nx, ny, nz


def drop_points_outside(points: Tensor, point_cloud_range: Sequence[float]) -> Tensor:
    """Keep the points whose x, y, z lie in the range, both bounds included.

    Args:
        points: Float tensor ``[N, D]``, D >= 3, metres.
        point_cloud_range: (x, y, z) minimum, then maximum, metres.

    Returns:
        Float tensor ``[M, D]`` in the same order; NaN coordinates are never inside.
    """
    low = points.new_tensor(point_cloud_range[:3])
    high = points.new_tensor(point_cloud_range[3:])
    return points[((points[:, :3] >= low) & (points[:, :3] <= high)).all(dim=1)]


def group_points_to_pillars(
    points: Tensor,
    voxel_size: Sequence[float],
    point_cloud_range: Sequence[float],
    max_points: int,
    max_voxels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Group the points of one cloud by cell.

    Same result as going through the points in order: a point outside the grid is dropped, a point in a new cell opens
    a pillar unless ``max_voxels`` are open, and a point is added to its pillar unless that holds ``max_points``.  (Once
    all pillars are open, later points still fill the open ones.)

    Args:
        points: Float tensor ``[N, D]``; the first three channels are x, y, z in metres.
        voxel_size: Cell size along x, y, z in metres.
        point_cloud_range: (x, y, z) minimum, then maximum, metres.  The grid may end a fraction of a cell beyond the
            maximum, and points there are kept; see :func:`drop_points_outside`.
        max_points: Points kept in a pillar.
        max_voxels: Pillars kept.

    Returns:
        Voxels ``[M, max_points, D]``, cells ``[M, 3]`` int32 as (z, y, x) and number of points ``[M]`` int32.
    """
    grid = torch.tensor(pillar_grid_shape(voxel_size, point_cloud_range), device=points.device)
    cells = torch.floor((points[:, :3] - points.new_tensor(point_cloud_range[:3])) / points.new_tensor(voxel_size))
    # Compared as floats: a far or NaN coordinate has no defined integer.
    kept = ((cells >= 0) & (cells < grid)).all(dim=1) & points.isfinite().all(dim=1)
    points, cells = points[kept], cells[kept].long()
    flat = (cells[:, 2] * grid[1] + cells[:, 1]) * grid[0] + cells[:, 0]

    _, pillar, counts = torch.unique(flat, return_inverse=True, return_counts=True)
    by_pillar = torch.argsort(pillar, stable=True)
    starts = counts.cumsum(0) - counts
    row = torch.empty_like(pillar)
    row[by_pillar] = torch.arange(len(points), device=points.device) - starts[pillar[by_pillar]]
    first_point = by_pillar[starts]
    opened = torch.argsort(first_point)
    rank = torch.empty_like(opened)
    rank[opened] = torch.arange(len(opened), device=points.device)
    pillar = rank[pillar]

    opened = opened[:max_voxels]
    voxels = points.new_zeros((len(opened), max_points, points.shape[1]))
    kept = (pillar < max_voxels) & (row < max_points)
    voxels[pillar[kept], row[kept]] = points[kept]
    coordinates = cells[first_point[opened]].flip(1).int()
    return voxels, coordinates, counts[opened].clamp(max=max_points).int()


class PillarFeatureLayer(BaseModule):
    """Linear, batch norm, ReLU and the maximum over the points of a pillar.

    Padding rows take part in the norm's statistics and in the maximum, as in the official code: the trained weights
    depend on it.

    Args:
        in_channels: Channels of a point.
        out_channels: Channels given; a layer that is not the last gives half of them per point, the other half is the
            maximum, repeated.
        norm_cfg: Config of the norm over points.
        last: Give the maximum alone.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_cfg: dict, last: bool) -> None:
        super().__init__()
        if not last and out_channels % 2:
            raise ValueError(f'the channels of an inner pillar layer must be even, got {out_channels}')
        self.last = last
        units = out_channels if last else out_channels // 2
        self.linear = nn.Linear(in_channels, units, bias=False)
        self.norm = build_norm_layer(norm_cfg, units)[1]

    def forward(self, points: Tensor) -> Tensor:
        """Encode points.

        Args:
            points: Float tensor ``[N, P, in_channels]``.

        Returns:
            Float tensor ``[N, out_channels]`` for the last layer, otherwise ``[N, P, out_channels]``.
        """
        x = self._encode(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        # amax would spread a gradient over ties; max gives it to one row, like the official code.
        largest = x.max(dim=1).values
        if self.last:
            return largest
        return torch.cat([x, largest.unsqueeze(1).expand_as(x)], dim=-1)

    def forward_rows(self, rows: Tensor, pillar: Tensor, num_pillars: int) -> Tensor:
        """Encode points of which not every pillar has the same number.

        Args:
            rows: Float tensor ``[R, in_channels]``.
            pillar: Int64 tensor ``[R]``, the pillar of each row.
            num_pillars: Number of pillars, N.

        Returns:
            Float tensor ``[N, out_channels]`` for the last layer, otherwise ``[R, out_channels]``.
        """
        x = self._encode(rows)
        # From zeros: nothing after a ReLU is less.
        largest = x.new_zeros((num_pillars, x.shape[1])).scatter_reduce(0, pillar[:, None].expand_as(x), x, 'amax')
        return largest if self.last else torch.cat([x, largest[pillar]], dim=-1)

    def _encode(self, rows: Tensor) -> Tensor:
        return F.relu(self._normalise(self.linear(rows)))

    def _normalise(self, x: Tensor) -> Tensor:
        if len(x) or isinstance(self.norm, nn.SyncBatchNorm):
            return self.norm(x)
        # Batch norm refuses statistics of nothing; a zero-sized sum keeps every parameter in the graph.
        return x * self.norm.weight + self.norm.bias


class PillarFeatureNet(BaseModule):
    """Features of pillars from their points.

    A point's features are its own channels, its offset to the mean of the pillar's points (x, y, z) and its offset to
    the pillar's centre (x, y).

    Args:
        in_channels: Channels of a point.
        feat_channels: Channels of the layers.
        voxel_size: Cell size along x, y, z in metres.
        point_cloud_range: (x, y, z) minimum, then maximum, metres.
        norm_cfg: Config of the norms.
    """

    def __init__(
        self,
        in_channels: int,
        feat_channels: Sequence[int],
        voxel_size: Sequence[float],
        point_cloud_range: Sequence[float],
        norm_cfg: dict,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.voxel_size = tuple(voxel_size)
        self.first_centre = tuple(s / 2 + low for s, low in zip(voxel_size[:2], point_cloud_range[:2], strict=True))
        channels = [in_channels + 5, *feat_channels]
        last = len(feat_channels) - 1
        self.pfn_layers = nn.ModuleList(
            PillarFeatureLayer(channels[i], channels[i + 1], norm_cfg, last=i == last) for i in range(last + 1)
        )

    def forward(self, pillars: Pillars) -> Tensor:
        """Encode pillars.

        Args:
            pillars: Grouped points, ``[N, P, in_channels]``.

        Returns:
            Float tensor ``[N, feat_channels[-1]]``.
        """
        points = pillars.voxels
        count = pillars.num_points.to(points.dtype).view(-1, 1, 1)
        xyz = points[..., :3]
        from_mean = xyz - xyz.sum(dim=1, keepdim=True) / count
        centre = pillars.coordinates[:, [3, 2]].to(points.dtype) * points.new_tensor(self.voxel_size[:2])
        centre = centre + points.new_tensor(self.first_centre)
        from_centre = points[..., :2] - centre.unsqueeze(1)
        filled = torch.arange(points.shape[1], device=points.device) < pillars.num_points.unsqueeze(1)
        features = torch.cat([points, from_mean, from_centre], dim=-1) * filled.unsqueeze(-1)
        if self.training or torch.is_grad_enabled():
            for layer in self.pfn_layers:
                features = layer(features)
            return features
        # Padding rows of a pillar are all alike and most rows are padding: one of them is enough for the maximum.
        kept = filled | (torch.arange(points.shape[1], device=points.device) == pillars.num_points.unsqueeze(1))
        pillar = kept.nonzero()[:, 0]
        features = features[kept]
        for layer in self.pfn_layers:
            features = layer.forward_rows(features, pillar, len(points))  # type: ignore[operator]
        return features


@MODELS.register_module()
class PillarNet(BaseModule):
    """Point clouds to bird's-eye-view maps: pillars, pillar features, canvas, convolution stages.

    The defaults are those of the published Waymo model.

    Args:
        in_channels: Channels of a point: x, y, z, tanh(intensity), elongation.
        voxel_size: Cell size along x, y, z in metres; one cell must span the range along z.
        point_cloud_range: (x, y, z) minimum, then maximum, metres.
        max_points: Points kept in a pillar.
        max_voxels: Pillars kept of a cloud, in training and at test time; one number serves both.
        filter_range: Drop points outside ``point_cloud_range`` (bounds included) before grouping.  The published
            pipeline does so; without it the grid alone decides, which may be larger than the range.
        feat_channels: Channels of the pillar feature layers.
        stage_layers: Convolutions of each stage.
        stage_channels: Channels of each stage.
        stage_strides: Stride of the first convolution of each stage.
        out_indices: Stages whose outputs are given.
        norm_cfg: Config of all norms; ``type='SyncBN'`` for synchronised statistics.
        init_cfg: Config of the initialisation.

    Raises:
        ValueError: The grid has more than one cell along z, or the stage settings differ in length.
    """

    def __init__(
        self,
        in_channels: int = 5,
        voxel_size: Sequence[float] = (0.32, 0.32, 12.0),
        point_cloud_range: Sequence[float] = (-75.0, -75.0, -3.0, 75.0, 75.0, 5.0),
        max_points: int = 20,
        max_voxels: int | Sequence[int] = (32000, 60000),
        filter_range: bool = True,
        feat_channels: Sequence[int] = (64, 128),
        stage_layers: Sequence[int] = (2, 4, 2),
        stage_channels: Sequence[int] = (256, 512, 1024),
        stage_strides: Sequence[int] = (1, 2, 2),
        out_indices: Sequence[int] = (1, 2),
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        norm_cfg = dict(type='BN', eps=1e-3, momentum=0.01) if norm_cfg is None else dict(norm_cfg)
        nx, ny, nz = pillar_grid_shape(voxel_size, point_cloud_range)
        if nz != 1 or min(nx, ny) < 1:
            raise ValueError(
                f'voxel_size {tuple(voxel_size)} over point_cloud_range {tuple(point_cloud_range)} gives a grid of '
                f'{nx} x {ny} x {nz} cells; pillars need exactly one along z and at least one along x and y'
            )
        if not len(stage_layers) == len(stage_channels) == len(stage_strides):
            raise ValueError(
                'stage_layers, stage_channels and stage_strides must have one entry per stage, got '
                f'{len(stage_layers)}, {len(stage_channels)} and {len(stage_strides)}'
            )
        if any(not 0 <= i < len(stage_layers) for i in out_indices):
            raise ValueError(f'out_indices {tuple(out_indices)} names stages outside 0..{len(stage_layers) - 1}')
        self.in_channels = in_channels
        self.voxel_size = tuple(voxel_size)
        self.point_cloud_range = tuple(point_cloud_range)
        self.grid_shape = (nx, ny, nz)
        self.max_points = max_points
        self.max_voxels = (max_voxels, max_voxels) if isinstance(max_voxels, int) else tuple(max_voxels)
        self.filter_range = filter_range
        self.out_indices = tuple(out_indices)
        # mmcv's 'BN' is the two-dimensional one; points come as rows.
        point_norm_cfg = {**norm_cfg, 'type': 'BN1d'} if norm_cfg['type'] in ('BN', 'BN2d') else norm_cfg
        self.reader = PillarFeatureNet(in_channels, feat_channels, voxel_size, point_cloud_range, point_norm_cfg)
        self.stages = nn.ModuleList()
        channels = feat_channels[-1]
        for layers, out_channels, stride in zip(stage_layers, stage_channels, stage_strides, strict=True):
            stage = []
            for i in range(layers):
                stage.append(
                    ConvModule(
                        channels, out_channels, 3, stride=stride if i == 0 else 1, padding=1, bias=False,
                        norm_cfg=norm_cfg,
                    )
                )  # fmt: skip
                channels = out_channels
            self.stages.append(nn.Sequential(*stage))

    def voxelize(self, points: Sequence[Tensor]) -> Pillars:
        """Group the points of a batch of clouds.

        Args:
            points: One float tensor ``[N_i, in_channels]`` for each cloud.  Empty clouds are fine; points with a value
                that is not finite are dropped.

        Returns:
            The pillars of all clouds, in order of the clouds.

        Raises:
            ValueError: The batch is empty or a cloud has another shape.
        """
        if not points:
            raise ValueError('a batch needs at least one point cloud, got none')
        grouped = []
        for i, cloud in enumerate(points):
            if cloud.dim() != 2 or cloud.shape[1] != self.in_channels:
                raise ValueError(f'point cloud {i} must have shape [N, {self.in_channels}], got {list(cloud.shape)}')
            if self.filter_range:
                cloud = drop_points_outside(cloud, self.point_cloud_range)
            voxels, cells, counts = group_points_to_pillars(
                cloud,
                self.voxel_size,
                self.point_cloud_range,
                self.max_points,
                self.max_voxels[0 if self.training else 1],
            )
            grouped.append((voxels, F.pad(cells, (1, 0), value=i), counts))
        voxels, coordinates, counts = (torch.cat(parts) for parts in zip(*grouped, strict=True))
        return Pillars(voxels, coordinates, counts)

    def scatter(self, features: Tensor, coordinates: Tensor, batch_size: int) -> Tensor:
        """Lay pillar features on the canvas.

        Args:
            features: Float tensor ``[N, C]``.
            coordinates: Int tensor ``[N, 4]``, (cloud, z, y, x).
            batch_size: Number of clouds.

        Returns:
            Float tensor ``[batch_size, C, ny, nx]``, zero where there is no pillar.
        """
        nx, ny, _ = self.grid_shape
        cloud, _, y, x = coordinates.long().unbind(1)
        canvas = features.new_zeros((batch_size * ny * nx, features.shape[1]))
        canvas = canvas.index_copy(0, (cloud * ny + y) * nx + x, features)
        return canvas.view(batch_size, ny, nx, -1).permute(0, 3, 1, 2)

    def forward(self, points: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Bird's-eye-view maps of a batch of clouds.

        Args:
            points: One float tensor ``[N_i, in_channels]`` for each cloud; see :meth:`voxelize`.

        Returns:
            One float tensor ``[B, stage_channels[i], H_i, W_i]`` for each of ``out_indices``.
        """
        pillars = self.voxelize(points)
        return self.forward_canvas(self.scatter(self.reader(pillars), pillars.coordinates, len(points)))

    def forward_canvas(self, canvas: Tensor) -> tuple[Tensor, ...]:
        """Run the convolution stages on a canvas ``[B, feat_channels[-1], ny, nx]``; returns as :meth:`forward`."""
        x, outputs = canvas, []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outputs.append(x)
        return tuple(outputs)
