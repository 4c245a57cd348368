"""Attention of tokens to the members of their nearest clusters, and the transformer block around it.

Source: AutoFocusFormer (CVPR 2023, section 3.3) and the official file ``aff_transformer.py`` (``ClusterAttention``,
``ClusterTransformerBlock``).  Parameter names and layouts are the official ones: rows of ``kv`` are head 0 key, head 0
value, head 1 key, ...

Deviations from the official code:

* One operator does queries times keys, position bias, mask, blank token, softmax and values; neighbours are given as
  clusters, and the bias comes from the true offsets, where officially a table of all offsets of one image size is
  evaluated and looked up.  Results are the same wherever that table is valid.
* There is no dropout of attention weights (rate 0 in all published configs).
"""

from typing import NamedTuple

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from boltz_mm import ops
from boltz_mm.models.layers.drop_path import DropPath


class Neighborhood(NamedTuple):
    """Which tokens each token sees.

    Attributes:
        pos: Float32 tensor ``[B, N, 2]``, (x, y) of the tokens in stride-4 cells.
        nearest: Int32 or int64 tensor ``[B, N, J]``, the clusters each token sees; cluster c holds the tokens
            c * cluster_size and following, the last one may have fewer.  ``None``: every token sees all N.
        cluster_size: Tokens of a cluster.
    """

    pos: Tensor
    nearest: Tensor | None = None
    cluster_size: int = 1

    def expand(self, batch: int) -> 'Neighborhood':
        """The same for each of ``batch`` images, from a batch of 1; no memory is taken."""
        nearest = None if self.nearest is None else self.nearest.expand(batch, -1, -1)
        return Neighborhood(self.pos.expand(batch, -1, -1), nearest, self.cluster_size)


class ClusterAttention(BaseModule):
    """Multi-head attention to the members of the nearest clusters, with a blank token.

    Logit of token i for neighbour j: ``q_i . k_j / sqrt(D) + bias(pos_j - pos_i)``, the bias being a linear map of the
    five features (dx, dy, d, dy/d, dx/d) of the offset in stride-4 cells.  Slots of the padded last cluster get -100.
    The blank token has a learned key and value for each head and no bias, and is always seen.

    Args:
        embed_dims: Channels C of a token.
        num_heads: Heads H; D = C / H.
        max_offset: Offsets are clamped to this in x and in y (511 in the official segmentation code); ``None``: not.
        drop_rate: Dropout of the output.
        init_cfg: Config of the initialisation.

    Raises:
        ValueError: ``embed_dims`` is no multiple of ``num_heads``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        max_offset: int | None = None,
        drop_rate: float = 0.0,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if embed_dims % num_heads:
            raise ValueError(f'embed_dims {embed_dims} is not a multiple of num_heads {num_heads}')
        self.num_heads = num_heads
        self.max_offset = max_offset
        self.scale = (embed_dims // num_heads) ** -0.5
        self.blank_k = nn.Parameter(torch.randn(embed_dims))
        self.blank_v = nn.Parameter(torch.randn(embed_dims))
        self.q = nn.Linear(embed_dims, embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.pos_embed = nn.Linear(5, num_heads)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, neighborhood: Neighborhood) -> Tensor:
        """Attend.

        Args:
            x: Float tensor ``[B, N, C]``.
            neighborhood: Where the tokens lie and what they see.

        Returns:
            Float tensor ``[B, N, C]``.
        """
        pos, nearest, cluster_size = neighborhood
        heads = (self.num_heads, -1)
        query = self.q(x).unflatten(-1, heads)
        key, value = self.kv(x).unflatten(-1, (self.num_heads, 2, -1)).unbind(-2)
        out = ops.cluster_attention(
            query,
            key,
            value,
            query_pos=pos,
            key_pos=pos,
            nearest=nearest,
            cluster_size=cluster_size,
            bias_weight=self.pos_embed.weight,
            bias=self.pos_embed.bias,
            blank_key=self.blank_k.view(heads),
            blank_value=self.blank_v.view(heads),
            scale=self.scale,
            max_offset=self.max_offset,
        )
        return self.proj_drop(self.proj(out))


class Mlp(BaseModule):
    """Linear, GELU (with erf), linear; ``[..., C]`` to ``[..., C]``.

    mmcv's FFN adds the input and names its layers otherwise.

    Args:
        embed_dims: Channels C.
        feedforward_channels: Channels between.
        drop_rate: Dropout after both linear maps.
        init_cfg: Config of the initialisation.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        drop_rate: float = 0.0,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.fc1 = nn.Linear(embed_dims, feedforward_channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(feedforward_channels, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token alone."""
        hidden = self.fc1(x)
        # In place where nobody needs the input again: the largest tensor of a block then exists once.
        hidden = self.act(hidden) if torch.is_grad_enabled() else torch.ops.aten.gelu_(hidden)
        return self.drop(self.fc2(self.drop(hidden)))


class ClusterBlock(BaseModule):
    """Pre-norm transformer block: cluster attention, then an MLP.

    Args:
        embed_dims: Channels C of a token.
        num_heads: Heads of the attention.
        mlp_ratio: Channels inside the MLP as a multiple of C.
        layer_scale: Start of the learned factors of both branches; 0 for none.
        drop_rate: Dropout of both branches.
        drop_path_rate: Chance of dropping a sample's branch in training.
        max_offset: See :class:`ClusterAttention`.
        init_cfg: Config of the initialisation.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_ratio: float = 2.0,
        layer_scale: float = 0.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        max_offset: int | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.with_layer_scale = layer_scale > 0
        if self.with_layer_scale:
            self.gamma1 = nn.Parameter(torch.full((embed_dims,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((embed_dims,), layer_scale))
        self.norm1 = nn.LayerNorm(embed_dims)
        self.attn = ClusterAttention(embed_dims, num_heads, max_offset, drop_rate)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.mlp = Mlp(embed_dims, int(embed_dims * mlp_ratio), drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, neighborhood: Neighborhood) -> Tensor:
        """Transform tokens.

        Args:
            x: Float tensor ``[B, N, C]``.
            neighborhood: Where the tokens lie and what they see.

        Returns:
            Float tensor ``[B, N, C]``.
        """
        x = self._add(x, self.attn(self.norm1(x), neighborhood), 'gamma1')
        return self._add(x, self.mlp(self.norm2(x)), 'gamma2')

    def _add(self, x: Tensor, branch: Tensor, factor: str) -> Tensor:
        if not self.with_layer_scale:
            return x + self.drop_path(branch)
        if self.training and self.drop_path.drop_prob:
            return x + self.drop_path(branch * getattr(self, factor))
        return torch.addcmul(x, branch, getattr(self, factor))
