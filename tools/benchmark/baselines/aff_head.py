"""The point-cloud Mask2Former as the official code arranges it, on gather-based operators: what ours is timed against.

Follows the work of ``apple/ml-autofocusformer-segmentation`` (``pixel_decoder/msdeformattn_pc.py``,
``transformer_decoder/mask2former_transformer_decoder.py``): interpolation weights of every head and sample are built in
full, values are gathered four tokens a sample, the point convolution evaluates a table of 1023 x 1023 offsets and looks
its nine neighbours up among all tokens, and every prediction searches the neighbours of a level's tokens in the whole
grid once more.  Parameters have the official names.
"""

import math

import torch
from torch import Tensor, nn

from tools.benchmark.baselines.aff import SEGMENTATION_RADIUS, Level, OfficialAFF
from tools.benchmark.baselines.cluster_attention import (
    cluster_wf,
    gather_rows,
    knn,
    offset_table,
    shepard_weights,
    table_rows,
    weighted_gather,
    weighted_point_sampling,
)

POINTS, LEVELS = 4, 3


def sine_embedding(pos: Tensor, width: int) -> Tensor:
    """``[B, N, width]`` of positions ``[B, N, 2]``, scaled by the largest of the batch."""
    scaled = pos / (pos.amax((0, 1)) + 1e-6) * 2 * math.pi
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=pos.device).div(2, rounding_mode='floor') * 2 / half
    angle = scaled.unsqueeze(-1) / 10000**exponent
    return torch.cat([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(2)


def interpolate(feat: Tensor, pos: Tensor, query_pos: Tensor, power: float = 3.0) -> Tensor:
    """``[B, N, C]``: ``feat [B, M, C]`` at other positions, from the four nearest tokens."""
    index, _ = knn(query_pos, pos, 4)
    return weighted_gather(index, shepard_weights(query_pos, gather_rows(pos, index), power), feat)


class DeformableAttention(nn.Module):
    """Deformable attention on the tokens of three levels."""

    def __init__(self, width: int, heads: int, power: float, learnable: bool) -> None:
        super().__init__()
        self.heads = heads
        self.shepard_power = nn.Parameter(torch.tensor([power])) if learnable else power
        self.sampling_offsets = nn.Linear(width, heads * LEVELS * POINTS * 2)
        self.attention_weights = nn.Linear(width, heads * LEVELS * POINTS)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def forward(
        self, query: Tensor, query_pos: Tensor, values: Tensor, levels: list[Tensor], cells: list[Tensor], size: tuple
    ) -> Tensor:
        """``query [B, N, C]``; values of all levels; positions and nearest tokens of each cell by level."""
        batch, n, width = query.shape
        height, columns = size
        depth = width // self.heads
        value = self.value_proj(values).view(batch, -1, self.heads, depth).transpose(1, 2).flatten(0, 1)
        offset = self.sampling_offsets(query).view(batch, n, self.heads, LEVELS, POINTS, 2)
        attn = self.attention_weights(query).view(batch, n, self.heads, -1).softmax(-1)
        attn = attn.view(batch, n, self.heads, LEVELS, POINTS)
        location = query_pos[:, :, None, None, None] + offset
        x, y = location.detach().round().long().unbind(-1)
        cell = y.clamp(0, height - 1) * columns + x.clamp(0, columns - 1)
        indices, weights, start = [], [], 0
        for level, (pos, nearest) in enumerate(zip(levels, cells, strict=True)):
            index = gather_rows(nearest, cell[:, :, :, level].flatten(2))  # [B, N, H * P, 4]
            near = gather_rows(pos, index.flatten(2)).view(batch, n, self.heads, POINTS, 4, 2)
            weights.append(shepard_weights(location[:, :, :, level], near, self.shepard_power))
            indices.append(index.view(batch, n, self.heads, POINTS, 4) + start)
            start += pos.shape[1]

        def by_head(parts: list[Tensor]) -> Tensor:
            """Points outside, levels inside: ``[B * H, N, P * L, 4]``."""
            return torch.stack(parts, 4).permute(0, 2, 1, 3, 4, 5).reshape(batch * self.heads, n, -1, 4)

        attn = attn.permute(0, 2, 1, 4, 3).reshape(batch * self.heads, n, -1)
        out = weighted_point_sampling(by_head(indices), by_head(weights), attn, value)
        return self.output_proj(out.view(batch, self.heads, n, depth).transpose(1, 2).reshape(batch, n, width))


class EncoderLayer(nn.Module):
    """Deformable attention and MLP, each before a norm."""

    def __init__(self, width: int, heads: int, hidden: int, power: float, learnable: bool) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(width, heads, power, learnable)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: list[Tensor], embedding: list[Tensor], levels: list[Tensor], cells: list, size: tuple) -> list:
        """Tokens of every level."""
        values, out = torch.cat(x, 1), []
        for tokens, embedded, pos in zip(x, embedding, levels, strict=True):
            attended = self.self_attn(tokens + embedded, pos, values, levels, cells, size)
            tokens = self.norm1(tokens + attended)
            out.append(self.norm2(tokens + self.linear2(self.linear1(tokens).relu())))
        return out


class PointConv(nn.Module):
    """A convolution over the nine nearest tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer('table', offset_table(SEGMENTATION_RADIUS), persistent=False)
        self.weight_net = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU())
        self.norm = nn.LayerNorm(4 * width)
        self.linear = nn.Linear(4 * width, width)

    def forward(self, feat: Tensor, pos: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``."""
        index, _ = knn(pos, pos, 9)
        rows = table_rows(pos[:, :, None] - gather_rows(pos, index), SEGMENTATION_RADIUS, True)
        weights = self.weight_net(self.table)[rows]
        return self.linear(self.norm(cluster_wf(weights, feat, index).flatten(2)))


class Encoder(nn.Module):
    """Layers under their official names."""

    def __init__(self, layers: int, *args: object) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(LEVELS, args[0]))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(*args) for _ in range(layers))


class OfficialPixelDecoder(nn.Module):
    """Four levels to mask features and three levels of tokens; arguments as in the official code."""

    def __init__(
        self,
        in_channels: list[int],
        conv_dim: int,
        mask_dim: int,
        transformer_nheads: int,
        transformer_dim_feedforward: int,
        transformer_enc_layers: int,
        shepard_power: float,
        shepard_power_learnable: bool,
    ) -> None:
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Linear(width, conv_dim), nn.LayerNorm(conv_dim)) for width in in_channels[:0:-1]
        )
        self.transformer = Encoder(
            transformer_enc_layers, conv_dim, transformer_nheads, transformer_dim_feedforward, shepard_power,
            shepard_power_learnable,
        )  # fmt: skip
        self.adapter_1 = nn.Sequential(nn.Linear(in_channels[0], conv_dim), nn.LayerNorm(conv_dim))
        self.layer_1 = nn.Sequential(PointConv(conv_dim), nn.LayerNorm(conv_dim))
        self.mask_features = nn.Linear(conv_dim, mask_dim)

    def forward(self, points: list[Level], size: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
        """Mask features ``[B, N, C]`` on the finest tokens, and the other levels from the coarsest."""
        width = self.mask_features.in_features
        levels = [level.pos for level in points[:0:-1]]
        x = [project(level.feat) for project, level in zip(self.input_proj, points[:0:-1], strict=True)]
        y, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing='ij')
        canvas = torch.stack([columns, y], -1).view(1, -1, 2).to(levels[0]).expand(len(x[0]), -1, -1)
        cells = [knn(canvas, pos, 4)[0] for pos in levels]
        embedding = [
            sine_embedding(pos, width) + own for pos, own in zip(levels, self.transformer.level_embed, strict=True)
        ]
        for layer in self.transformer.encoder.layers:
            x = layer(x, embedding, levels, cells, size)
        fine = points[0]
        feat = self.adapter_1(fine.feat) + interpolate(x[-1], levels[-1], fine.pos)
        convolution, norm = self.layer_1
        feat = norm(convolution(feat, fine.pos)).relu()
        return self.mask_features(feat), x


class AttentionLayer(nn.Module):
    """Attention before a norm; the attention has the official name."""

    def __init__(self, name: str, width: int, heads: int) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, nn.MultiheadAttention(width, heads, batch_first=True))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, embed: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, Q, C]`` to ``[B, Q, C]``."""
        attended = getattr(self, self.name)(x + embed, key, value, attn_mask=mask)[0]
        return self.norm(x + attended)


class FeedForward(nn.Module):
    """MLP before a norm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, Q, C]`` to ``[B, Q, C]``."""
        return self.norm(x + self.linear2(self.linear1(x).relu()))


class MaskEmbed(nn.Module):
    """Three linear layers."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, out)])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, Q, C]`` to ``[B, Q, M]``."""
        first, second, last = self.layers
        return last(second(first(x).relu()).relu())


class OfficialDecoder(nn.Module):
    """Masked transformer decoder; arguments as in the official code (``dec_layers`` layers)."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        hidden_dim: int,
        num_queries: int,
        nheads: int,
        dim_feedforward: int,
        dec_layers: int,
        mask_dim: int,
    ) -> None:
        super().__init__()
        self.heads = nheads
        self.transformer_cross_attention_layers = nn.ModuleList(
            AttentionLayer('multihead_attn', hidden_dim, nheads) for _ in range(dec_layers)
        )
        self.transformer_self_attention_layers = nn.ModuleList(
            AttentionLayer('self_attn', hidden_dim, nheads) for _ in range(dec_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(FeedForward(hidden_dim, dim_feedforward) for _ in range(dec_layers))
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(LEVELS, hidden_dim)
        self.input_proj = nn.ModuleList(
            nn.Identity() if in_channels == hidden_dim else nn.Linear(in_channels, hidden_dim) for _ in range(LEVELS)
        )
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MaskEmbed(hidden_dim, mask_dim)

    def forward(
        self, x: list[Tensor], levels: list[Tensor], mask_features: Tensor, fine: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Class logits ``[B, Q, K + 1]`` and masks ``[B, Q, h, w]`` of every prediction."""
        batch, width = len(mask_features), self.query_feat.embedding_dim
        sources = [
            project(tokens) + own
            for project, tokens, own in zip(self.input_proj, x, self.level_embed.weight, strict=True)
        ]
        keys = [source + sine_embedding(pos, width) for source, pos in zip(sources, levels, strict=True)]
        embed = self.query_embed.weight.expand(batch, -1, -1)
        query = self.query_feat.weight.expand(batch, -1, -1)
        logits, masks, blocked = self._predict(query, mask_features, fine, levels[0])
        predictions = [(logits, masks)]
        for i, cross in enumerate(self.transformer_cross_attention_layers):
            level = i % LEVELS
            query = cross(query, embed, keys[level], sources[level], blocked)
            query = self.transformer_self_attention_layers[i](query, embed, query + embed, query)
            query = self.transformer_ffn_layers[i](query)
            logits, masks, blocked = self._predict(query, mask_features, fine, levels[(i + 1) % LEVELS])
            predictions.append((logits, masks))
        return predictions

    def _predict(
        self, query: Tensor, mask_features: Tensor, fine: Tensor, pos: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        query = self.decoder_norm(query)
        masks = mask_features @ self.mask_embed(query).transpose(1, 2)  # [B, N, Q]
        blocked = interpolate(masks.detach(), fine, pos).sigmoid().transpose(1, 2) < 0.5
        blocked = blocked & ~blocked.all(-1, keepdim=True)
        height, columns = int(fine[..., 1].max()) + 1, int(fine[..., 0].max()) + 1
        cell = (fine[..., 1] * columns + fine[..., 0]).long()
        image = torch.zeros_like(masks).scatter(1, cell[..., None].expand_as(masks), masks)
        image = image.transpose(1, 2).reshape(len(masks), -1, height, columns)
        return self.class_embed(query), image, blocked.repeat_interleave(self.heads, 0)


class OfficialSegmentor(nn.Module):
    """Backbone, pixel decoder and transformer decoder; arguments of the parts as in the official code."""

    def __init__(self, backbone: dict, pixel_decoder: dict, transformer_decoder: dict, num_classes: int) -> None:
        super().__init__()
        self.backbone = OfficialAFF(**backbone)
        self.sem_seg_head = nn.Module()
        width = {'in_channels': pixel_decoder['conv_dim']}
        self.sem_seg_head.pixel_decoder = OfficialPixelDecoder(list(backbone['embed_dim']), **pixel_decoder)
        self.sem_seg_head.predictor = OfficialDecoder(**{**width, **transformer_decoder}, num_classes=num_classes)

    def forward(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every prediction for normalised images ``[B, 3, H, W]``, the last one last."""
        points, size = self.backbone.points(image)
        mask_features, x = self.sem_seg_head.pixel_decoder(points, size)
        levels = [level.pos for level in points[:0:-1]]
        return self.sem_seg_head.predictor(x, levels, mask_features, points[0].pos)
