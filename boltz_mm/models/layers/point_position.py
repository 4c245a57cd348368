"""Sine embedding of token positions, normalised by the farthest token.

Paper: "AutoFocusFormer: Image Segmentation off the Grid" (CVPR 2023, arXiv 2304.12406).  Official code:
apple/ml-autofocusformer-segmentation, ``transformer_decoder/position_encoding.py`` (``PositionEmbeddingSine``).

Deviations: none by default.  The official normalisation takes the maximum over the whole batch, so an image is embedded
differently in other company; ``per_image=True`` takes it over each image.

Held by the golden case ``sine_embed_n60``.
"""

import math

import torch
from torch import Tensor, nn


class PointSineEncoding(nn.Module):
    """Embedding of points: sines and cosines of x, then of y.

    With ``v' = 2 pi v / (max(v) + 1e-6)`` divided by ``temperature^(2k / num_feats)``, k = 0 .. num_feats / 2 - 1, the
    channels are ``sin x', cos x', sin y', cos y'``, each part over all k.

    Args:
        num_feats: Channels of one axis, even; the embedding has twice as many.
        temperature: Ratio of the longest to the shortest wave length.
        per_image: Take the maximum of each image instead of the batch's (the official one is the batch's).
        normalize: Scale positions to 0..2 pi as above; officially always on.  Otherwise ``v' = v``.

    Raises:
        ValueError: ``num_feats`` is odd or not positive.

    Examples:
        >>> PointSineEncoding(8)(torch.rand(2, 60, 2) * 20).shape
        torch.Size([2, 60, 16])
    """

    def __init__(
        self, num_feats: int, temperature: float = 10000.0, per_image: bool = False, normalize: bool = True
    ) -> None:
        super().__init__()
        if num_feats < 2 or num_feats % 2:
            raise ValueError(f'num_feats must be even and positive, got {num_feats}')
        self.num_feats = num_feats
        self.temperature = temperature
        self.per_image = per_image
        self.normalize = normalize

    def forward(self, pos: Tensor) -> Tensor:
        """Embed the tokens of one level.

        Args:
            pos: Positions (x, y) ``[B, N, 2]``.

        Returns:
            ``[B, N, 2 * num_feats]`` in the type of ``pos``.
        """
        scaled = pos
        if self.normalize:
            # amax, not max: it needs no index and no number leaves the device.
            farthest = pos.amax(dim=1, keepdim=True) if self.per_image else pos.amax(dim=(0, 1), keepdim=True)
            scaled = pos / (farthest + 1e-6) * (2 * math.pi)
        exponents = torch.arange(0, self.num_feats, 2, dtype=pos.dtype, device=pos.device) / self.num_feats
        angles = scaled.unsqueeze(-1) / self.temperature**exponents  # [B, N, 2, num_feats / 2]
        return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f'num_feats={self.num_feats}, temperature={self.temperature}, per_image={self.per_image}'
