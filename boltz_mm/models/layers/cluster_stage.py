"""One stage of AutoFocusFormer: clusters, blocks, importance scores, adaptive downsampling; and the patch embedding.

Source: AutoFocusFormer (CVPR 2023) and the official files ``aff_transformer.py`` and ``backbone/aff.py``
(``BasicLayer``, ``PatchEmbed``).  Parameter names are the official ones.

Deviations from the official code:

* The neighbourhood size of a stage stays what it was set to; officially the first image that is clustered rounds it
  to whole clusters for all later ones.
* Stages whose attention is global can downsample.
* Importance is computed in float32 at least, under autocast too: it decides which tokens stay.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boltz_mm import ops
from boltz_mm.models.layers.cluster_attention import ClusterBlock, Neighborhood
from boltz_mm.models.layers.cluster_merging import ClusterMerging
from boltz_mm.utils.dtypes import at_least_float32


class Clustered(NamedTuple):
    """Order and neighbourhood of a set of tokens.

    Attributes:
        order: Int64 tensor ``[B, N]``: token i of the new order is token ``order[i]`` of the old; ``None``: unchanged.
        neighborhood: Positions in the new order, and what each token sees.
        prior: ``[B, N]``, see :func:`~boltz_mm.models.layers.cluster_merging.grid_prior`, where it is known already.
    """

    order: Tensor | None
    neighborhood: Neighborhood
    prior: Tensor | None = None

    def expand(self, batch: int) -> 'Clustered':
        """The same for each of ``batch`` images, from a batch of 1; no memory is taken."""
        order, prior = (None if x is None else x.expand(batch, -1) for x in (self.order, self.prior))
        return Clustered(order, self.neighborhood.expand(batch), prior)


class StageOutput(NamedTuple):
    """What a stage gives.

    Attributes:
        feat: Float tensor ``[B, N, C]``, tokens of the stage in clustered order.
        neighborhood: Their positions and clusters.
        importance: ``[B, N]`` in [0, 1], or ``None`` without downsampling.
        kept: Int64 tensor ``[B, N']``, indices of the tokens that go on, or ``None``.
        next_feat: Float tensor ``[B, N', C']``, merged tokens; ``feat`` without downsampling.
        next_pos: Float32 tensor ``[B, N', 2]``, their positions; those of ``feat`` without downsampling.
    """

    feat: Tensor
    neighborhood: Neighborhood
    importance: Tensor | None
    kept: Tensor | None
    next_feat: Tensor
    next_pos: Tensor


class ClusterStage(BaseModule):
    """Blocks on clustered tokens, then adaptive downsampling.

    Attention is global where ``nbhd_size`` reaches the number of tokens; the tokens then keep their order.

    Args:
        embed_dims: Channels C of a token.
        depth: Number of blocks.
        num_heads: Heads of the attention.
        cluster_size: Tokens of a cluster.
        nbhd_size: Tokens that a token sees, rounded to whole clusters (halves to even).
        mlp_ratio: Channels inside an MLP as a multiple of C.
        layer_scale: Start of the learned factors of the branches; 0 for none.
        drop_rate: Dropout of the branches.
        drop_path_rates: Chance of dropping a branch, for each block.
        out_channels: Channels of the merged tokens; ``None``: the stage does not downsample.
        ds_rate: Share of the tokens that is kept.
        alpha: Factor of the importance in the selection.
        reserve: Whether tokens of a coarse grid are kept in any case.
        max_offset: See :class:`~boltz_mm.models.layers.cluster_attention.ClusterAttention`.
        per_image: Whether an image's clusters are independent of the other images of the batch; officially the sort
            key contains a maximum over the batch.
        with_cp: Recompute the blocks in the backward pass instead of keeping their activations.
        init_cfg: Config of the initialisation.

    Raises:
        ValueError: ``nbhd_size`` rounds to no cluster.
    """

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        num_heads: int,
        cluster_size: int = 8,
        nbhd_size: int = 48,
        mlp_ratio: float = 2.0,
        layer_scale: float = 0.0,
        drop_rate: float = 0.0,
        drop_path_rates: list[float] | None = None,
        out_channels: int | None = None,
        ds_rate: float = 0.25,
        alpha: float = 4.0,
        reserve: bool = True,
        max_offset: int | None = None,
        per_image: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if cluster_size < 1 or round(nbhd_size / cluster_size) < 1:
            raise ValueError(f'nbhd_size {nbhd_size} is less than one cluster of cluster_size {cluster_size}')
        self.cluster_size = cluster_size
        self.nbhd_size = nbhd_size
        self.per_image = per_image
        self.with_cp = with_cp
        rates = [0.0] * depth if drop_path_rates is None else drop_path_rates
        self.blocks = nn.ModuleList(
            ClusterBlock(embed_dims, num_heads, mlp_ratio, layer_scale, drop_rate, rate, max_offset) for rate in rates
        )
        self.downsample: ClusterMerging | None = None
        self.prob_net: nn.Linear | None = None
        if out_channels is not None:
            self.downsample = ClusterMerging(embed_dims, out_channels, ds_rate, alpha, reserve, max_offset)
            self.prob_net = nn.Linear(embed_dims, 1)

    def cluster(self, pos: Tensor, shape: tuple[int, int]) -> Clustered:
        """Order tokens by cluster and find the clusters that each sees; without gradient.

        Args:
            pos: Float32 tensor ``[B, N, 2]`` in stride-4 cells.
            shape: Rows and columns of the stride-4 grid.

        Returns:
            The new order and neighbourhood.
        """
        num_tokens = pos.shape[1]
        if self.nbhd_size >= num_tokens:
            return Clustered(None, Neighborhood(pos))
        num_clusters = -(-num_tokens // self.cluster_size)
        num_nearest = min(round(self.nbhd_size / self.cluster_size), num_clusters)
        if self.cluster_size == 1:
            return Clustered(None, Neighborhood(pos, ops.nearest_clusters(pos, pos, num_nearest, canvas=shape), 1))
        clusters = ops.space_filling_clusters(pos, self.cluster_size, shape, per_image=self.per_image)
        nearest = ops.nearest_clusters(clusters.pos, clusters.means, num_nearest, canvas=shape)
        return Clustered(clusters.order, Neighborhood(clusters.pos, nearest, self.cluster_size))

    def importance(self, feat: Tensor) -> Tensor:
        """Importance of each token.

        Args:
            feat: Float tensor ``[B, N, C]``.

        Returns:
            ``[B, N]`` in [0, 1], float32 at least.

        Raises:
            ValueError: The stage does not downsample.
        """
        if self.prob_net is None:
            raise ValueError('a stage without downsampling has no importance scores')
        with torch.autocast(feat.device.type, enabled=False):
            weight, bias = at_least_float32(self.prob_net.weight), at_least_float32(self.prob_net.bias)
            return F.linear(at_least_float32(feat), weight, bias).squeeze(-1).sigmoid()

    def forward(
        self, pos: Tensor, feat: Tensor, shape: tuple[int, int], stride: int, clustered: Clustered | None = None
    ) -> StageOutput:
        """Run the stage.

        Args:
            pos: Float32 tensor ``[B, N, 2]`` in stride-4 cells.
            feat: Float tensor ``[B, N, C]``.
            shape: Rows and columns of the stride-4 grid.
            stride: 2, 4, 8, 16 for the first to the fourth stage.
            clustered: What :meth:`cluster` gives, where it is known already; ``pos`` is then unused and ``feat`` in its
                order.

        Returns:
            Tokens of the stage, and those that go on.
        """
        if clustered is None:
            clustered = self.cluster(pos, shape)
            if clustered.order is not None:
                feat = feat.gather(1, clustered.order.unsqueeze(-1).expand_as(feat))
        neighborhood = clustered.neighborhood
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
                feat = checkpoint(block, feat, neighborhood, use_reentrant=False)
            else:
                feat = block(feat, neighborhood)
        if self.downsample is None:
            return StageOutput(feat, neighborhood, None, None, feat, neighborhood.pos)
        importance = self.importance(feat)
        kept = self.downsample.select(neighborhood.pos, importance, shape, stride, clustered.prior)
        next_pos, next_feat = self.downsample(feat, neighborhood, kept, importance)
        return StageOutput(feat, neighborhood, importance, kept, next_feat, next_pos)


class PatchEmbed(BaseModule):
    """Two convolutions of stride 2: images to tokens of the stride-4 grid.

    Args:
        in_channels: Channels of an image.
        embed_dims: Channels C of a token.
        patch_norm: Whether a layer norm follows.
        pad_to_stride: Whether images are padded with zeros, right and at the bottom, to multiples of 4 (officially in
            segmentation, not in classification); the number of tokens is the same.
        init_cfg: Config of the initialisation.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dims: int = 64,
        patch_norm: bool = True,
        pad_to_stride: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.pad_to_stride = pad_to_stride
        self.proj1 = nn.Conv2d(in_channels, embed_dims // 2, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(embed_dims // 2)
        self.act = nn.GELU()
        self.proj2 = nn.Conv2d(embed_dims // 2, embed_dims, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(embed_dims) if patch_norm else nn.Identity()

    @staticmethod
    def grid_shape(image: Tensor) -> tuple[int, int]:
        """Rows and columns of the stride-4 grid of images ``[B, C, H, W]``: H/4 and W/4, rounded up."""
        return -(-image.shape[-2] // 4), -(-image.shape[-1] // 4)

    def forward(self, image: Tensor, order: Tensor | None = None) -> Tensor:
        """Embed images.

        Args:
            image: Float tensor ``[B, in_channels, H, W]``.
            order: Int64 tensor ``[h * w]``, the cells in the order of the result; ``None``: row by row.

        Returns:
            Tokens ``[B, h * w, C]``.
        """
        if self.pad_to_stride:
            height, width = image.shape[-2:]
            if height % 4 or width % 4:
                image = F.pad(image, (0, -width % 4, 0, -height % 4))
        tokens = self.proj2(self.act(self.bn(self.proj1(image)))).flatten(2).transpose(1, 2)
        # Reordered before the norm, which then is the pass that makes the tokens contiguous.
        return self.norm(tokens if order is None else tokens.index_select(1, order))


def grid_positions(shape: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Positions of all cells of a grid, row by row.

    Args:
        shape: Rows and columns.
        device: Where the result lies.

    Returns:
        Float32 tensor ``[1, h * w, 2]``, (x, y).
    """
    y, x = torch.meshgrid(*(torch.arange(size, device=device, dtype=torch.float32) for size in shape), indexing='ij')
    return torch.stack((x, y), dim=-1).view(1, -1, 2)
