"""AutoFocusFormer as the official code arranges it, on the gather-based operators of its tests.

What ours is timed against.  Follows the work of ``apple/ml-autofocusformer`` (``models/aff_transformer.py``,
``models/point_utils.py``) and of the backbone in ``apple/ml-autofocusformer-segmentation``: neighbours as int64 index
tensors, one evaluation of the full table of relative positions in every block (111 x 111 offsets at 224 pixels, always
1023 x 1023 in the segmentation code), gathered keys and values.  The classifier keeps the clusters of the first stage,
the segmentation backbone in training only, as there; everything else is computed again for every image.  Parameters
have the official names, so a checkpoint in the official layout fits.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.benchmark.baselines.cluster_attention import (
    Clusters,
    cluster_av,
    cluster_qk,
    cluster_wf,
    gather_rows,
    knn,
    offset_table,
    space_filling_clusters,
    table_rows,
)

SEGMENTATION_RADIUS = 511


class Level(NamedTuple):
    """Tokens of a stage before it reduces them: features ``[B, N, C]``, positions ``[B, N, 2]``."""

    feat: Tensor
    pos: Tensor


class Neighbourhood(NamedTuple):
    """Whom each token sees.

    Attributes:
        members: ``[B, N, m]`` int64; ``None`` if every token sees all.
        rows: ``[B, N, m]`` int64 rows of the table of offsets.
        mask: ``[B, N, m]`` int64, 0 for padded slots; ``None`` if there are none.
    """

    members: Tensor | None
    rows: Tensor
    mask: Tensor | None

    def at(self, tokens: Tensor) -> 'Neighbourhood':
        """Of some tokens ``[B, N']``."""
        members, mask = (None if part is None else pick(part, tokens) for part in (self.members, self.mask))
        return Neighbourhood(members, pick(self.rows, tokens), mask)


def pick(values: Tensor, tokens: Tensor) -> Tensor:
    """Rows ``[B, N', C]`` of ``values [B, N, C]``."""
    return values.gather(1, tokens[..., None].expand(-1, -1, values.shape[-1]))


class PatchEmbed(nn.Module):
    """Two strided convolutions."""

    def __init__(self, width: int, norm: bool = True) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(3, width // 2, 3, 2, 1)
        self.bn = nn.BatchNorm2d(width // 2)
        self.proj2 = nn.Conv2d(width // 2, width, 3, 2, 1)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, image: Tensor) -> tuple[Tensor, int, int]:
        """Tokens ``[B, h * w, C]``, h and w."""
        grid = self.proj2(F.gelu(self.bn(self.proj1(image))))
        return self.norm(grid.flatten(2).transpose(1, 2)), grid.shape[2], grid.shape[3]


class ClusterAttention(nn.Module):
    """Attention to gathered neighbours and a blank token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.pos_embed = nn.Linear(5, heads)
        self.blank_k = nn.Parameter(torch.randn(width))
        self.blank_v = nn.Parameter(torch.randn(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, near: Neighbourhood, table: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``."""
        batch, n, width = x.shape
        depth = width // self.heads
        query = (self.q(x) * depth**-0.5).view(batch, n, self.heads, depth).transpose(1, 2)
        key, value = self.kv(x).view(batch, n, self.heads, 2, depth).permute(3, 0, 2, 1, 4)
        attn = query @ key.transpose(-1, -2) if near.members is None else cluster_qk(query, key, near.members)
        attn = attn + self.pos_embed(table)[near.rows].permute(0, 3, 1, 2)
        if near.mask is not None:
            attn = attn + (1 - near.mask).unsqueeze(1) * -100.0
        blank = (query * self.blank_k.view(self.heads, 1, depth)).sum(-1, keepdim=True)
        attn = torch.cat([attn, blank], -1).softmax(-1)
        attn, blank = attn[..., :-1], attn[..., -1:]
        out = attn @ value if near.members is None else cluster_av(attn, value, near.members)
        out = out + blank * self.blank_v.view(self.heads, 1, depth)
        return self.proj(out.transpose(1, 2).reshape(batch, n, width))


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each after a norm, each dropped for a whole sample at times."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width)
        self.attn = ClusterAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        scaled = layer_scale > 0
        self.gamma1 = nn.Parameter(torch.full((width,), layer_scale)) if scaled else None
        self.gamma2 = nn.Parameter(torch.full((width,), layer_scale)) if scaled else None

    def forward(self, x: Tensor, near: Neighbourhood, table: Tensor, draws: Iterator[Tensor] | None) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``."""
        attended = self.attn(self.norm1(x), near, table)
        x = x + self._drop(attended if self.gamma1 is None else self.gamma1 * attended, draws)
        hidden = self.mlp(self.norm2(x))
        return x + self._drop(hidden if self.gamma2 is None else self.gamma2 * hidden, draws)

    def _drop(self, x: Tensor, draws: Iterator[Tensor] | None) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        draw = next(draws) if draws is not None else torch.full((len(x),), keep, device=x.device).bernoulli()
        return x * (draw.view(-1, 1, 1) / keep)


class ClusterMerging(nn.Module):
    """Choose tokens by importance and merge the neighbourhood of each."""

    def __init__(self, width: int, next_width: int, alpha: float, ds_rate: float, reserve: bool) -> None:
        super().__init__()
        self.alpha, self.ds_rate, self.reserve = alpha, ds_rate, reserve
        self.weight_net = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU())
        self.norm = nn.LayerNorm(4 * width)
        self.linear = nn.Linear(4 * width, next_width)

    def forward(
        self, feat: Tensor, pos: Tensor, prob: Tensor, near: Neighbourhood, table: Tensor, stride: int, reserved: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, N', C']`` and positions; ``prob [B, N, 1]``."""
        chosen = self._choose(pos, prob.squeeze(-1).detach(), stride, reserved)
        pos = pick(pos, chosen)
        index, rows, mask = near.at(chosen)
        if index is None:
            raise ValueError('the official code cannot reduce tokens that all see each other')
        weights = self.weight_net(table)[rows] * gather_rows(prob, index)
        if mask is not None:
            weights = weights * mask.unsqueeze(-1)
        merged = cluster_wf(weights, feat, index).flatten(2)
        return self.linear(self.norm(merged)), pos

    @torch.no_grad()
    def _choose(self, pos: Tensor, prob: Tensor, stride: int, reserved: int) -> Tensor:
        keep = int(pos.shape[1] * self.ds_rate)
        if stride == 2:
            on_grid = (pos % 2 == 0).all(-1)
        else:
            apart = knn(pos, pos, 2)[1][..., 1]
            step = 2 ** (apart.log2().ceil() + 1)
            on_grid = (pos % step.unsqueeze(-1) == 0).all(-1)
        score = on_grid.to(prob.dtype) + self.alpha * prob
        if not self.reserve:
            return score.topk(keep, dim=1).indices
        must = (pos % (2 * stride) == 0).all(-1)
        free = (score - 100 * must).topk(keep - reserved, dim=1).indices
        return torch.cat([free, must.nonzero()[:, 1].view(len(pos), reserved)], 1)


class BasicLayer(nn.Module):
    """A stage: neighbourhoods, blocks, reduction."""

    def __init__(
        self,
        width: int,
        next_width: int | None,
        depth: int,
        heads: int,
        mlp_ratio: float,
        cluster_size: int,
        nbhd_size: int,
        layer_scale: float,
        drop_path: Sequence[float],
        alpha: float,
        ds_rate: float,
        reserve_on: bool,
        keep_clusters: str,
    ) -> None:
        super().__init__()
        self.cluster_size, self.nbhd_size = cluster_size, nbhd_size
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale, drop_path[i]) for i in range(depth))
        self.downsample = None
        if next_width is not None:
            self.downsample = ClusterMerging(width, next_width, alpha, ds_rate, reserve_on)
            self.prob_net = nn.Linear(width, 1)
        self.keep_clusters = keep_clusters
        self._kept: Clusters | None = None

    def forward(
        self,
        feat: Tensor,
        pos: Tensor,
        size: tuple[int, int],
        stride: int,
        table: Tensor,
        radius: int,
        clamp: bool,
        draws: Iterator[Tensor] | None,
    ) -> tuple[Level, Tensor, Tensor]:
        """The stage's tokens in the order of their clusters, and those of the next stage."""
        near, feat, pos = self._arrange(feat, pos, size, radius, clamp)
        for block in self.blocks:
            feat = block(feat, near, table, draws)
        before = Level(feat, pos)
        if self.downsample is not None:
            prob = self.prob_net(feat).sigmoid()
            reserved = math.ceil(size[0] / (2 * stride)) * math.ceil(size[1] / (2 * stride))
            feat, pos = self.downsample(feat, pos, prob, near, table, stride, reserved)
        return before, feat, pos

    def _arrange(
        self, feat: Tensor, pos: Tensor, size: tuple[int, int], radius: int, clamp: bool
    ) -> tuple[Neighbourhood, Tensor, Tensor]:
        batch, n, _ = feat.shape
        if self.nbhd_size >= n:
            offset = pos[:, None] - pos[:, :, None]
            return Neighbourhood(None, table_rows(offset, radius, clamp), None), feat, pos
        keep = self.keep_clusters == 'always' or (self.keep_clusters == 'training' and self.training)
        clusters = self._kept if keep else None
        if clusters is None:
            clusters = space_filling_clusters(pos, self.cluster_size, *size)
        if keep:
            self._kept = clusters
        order, means, members, mask = clusters
        pos = pick(pos, order)
        feat = pick(feat, order)
        count = means.shape[1]
        nearest = knn(pos, means, min(round(self.nbhd_size / self.cluster_size), count))[0]
        index = gather_rows(members, nearest).flatten(2)
        mask = None if mask is None else gather_rows(mask, nearest).flatten(2)
        offset = gather_rows(pos, index) - pos[:, :, None]
        return Neighbourhood(index, table_rows(offset, radius, clamp), mask), feat, pos


class OfficialAFF(nn.Module):
    """Classifier (``num_classes``) or segmentation backbone (``num_classes=None``).

    Args:
        embed_dim: Width of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratio: Hidden over outer width.
        cluster_size: Tokens in a cluster.
        nbhd_size: Neighbours in each stage.
        alpha: Weight of importance against the grid.
        ds_rate: Share of tokens kept.
        layer_scale: Initial scale of the branches; 0 for none.
        drop_path_rate: Largest rate.
        reserve_on: Whether tokens of the coarser grid always stay.
        patch_norm: Whether a norm follows the convolutions.
        img_size: Largest size that the classifier's table covers.
        num_classes: Classes.
    """

    def __init__(
        self,
        embed_dim: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float,
        cluster_size: int,
        nbhd_size: Sequence[int],
        alpha: float,
        ds_rate: float,
        layer_scale: float = 0.0,
        drop_path_rate: float = 0.0,
        reserve_on: bool = True,
        patch_norm: bool = True,
        img_size: int = 224,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.classify = num_classes is not None
        self.radius = img_size // 4 - 1 if self.classify else SEGMENTATION_RADIUS
        self.register_buffer('table', offset_table(self.radius), persistent=False)
        self.patch_embed = PatchEmbed(embed_dim[0], patch_norm)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        widths = [*embed_dim, None]
        self.layers = nn.ModuleList(
            BasicLayer(
                embed_dim[i], widths[i + 1], depths[i], num_heads[i], mlp_ratio, cluster_size, nbhd_size[i],
                layer_scale, [next(rates) for _ in range(depths[i])], alpha, ds_rate, reserve_on,
                '' if i else 'always' if self.classify else 'training',
            )
            for i in range(4)
        )  # fmt: skip
        if num_classes is not None:
            self.norm = nn.LayerNorm(embed_dim[-1])
            self.head = nn.Linear(embed_dim[-1], num_classes)
        else:
            for i, width in enumerate(embed_dim):
                setattr(self, f'norm{i}', nn.LayerNorm(width))

    def stages(self, image: Tensor, draws: Iterator[Tensor] | None = None) -> tuple[list[Level], tuple[int, int]]:
        """Tokens of every stage before its reduction, and the size of the canvas."""
        if not self.classify:
            image = F.pad(image, (0, -image.shape[3] % 4))
            image = F.pad(image, (0, 0, 0, -image.shape[2] % 4))
        feat, height, width = self.patch_embed(image)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
        pos = torch.stack([x, y], -1).view(1, -1, 2).to(feat).expand(len(feat), -1, -1)
        levels = []
        for i, layer in enumerate(self.layers):
            level, feat, pos = layer(
                feat, pos, (height, width), 2 ** (i + 1), self.table, self.radius, not self.classify, draws
            )
            levels.append(level)
        return levels, (height, width)

    def forward(self, image: Tensor, draws: Iterator[Tensor] | None = None) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, 3, H, W]``."""
        levels, _ = self.stages(image, draws)
        return self.head(self.norm(levels[-1].feat).mean(1))

    def points(self, image: Tensor, draws: Iterator[Tensor] | None = None) -> tuple[list[Level], tuple[int, int]]:
        """Normalised tokens of the four levels, and the size of the canvas."""
        levels, size = self.stages(image, draws)
        return [Level(getattr(self, f'norm{i}')(level.feat), level.pos) for i, level in enumerate(levels)], size
