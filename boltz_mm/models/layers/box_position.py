"""Reference windows of tokens and sine embeddings of boxes, as BoxeR uses them.

Paper: "BoxeR: Box-Attention for 2D and 3D Transformers" (CVPR 2022, arXiv 2111.13087), section 3.  Official code:
kienduynguyen/BoxeR, ``e2edet/module/position_encoding.py``, ``e2edet/utils/general.py`` (proposal embedding) and the
window builders of ``e2edet/module/box_transformer.py`` and ``box3d_transformer.py``.

Every token is given a window, a few cells wide, around its cell.  Its position embedding is the sine embedding of that
window's centre plus the one of its size, so one function serves tokens and proposals, and there is no level embedding:
the size part tells the levels apart.

Deviations: none in value at real tokens.  Windows of padded tokens, which the official code leaves at about -5e5 and
nothing reads, are clamped to -1: still outside the image, and finite in half precision.

Held by the golden case ``positional``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boltz_mm.registry import MODELS

SpatialShapes = Sequence[tuple[int, int]]
"""Height and width of each level as Python numbers: reading them costs no synchronisation with the device."""

Shapes = SpatialShapes | Tensor
"""The same, or as an int64 tensor ``[L, 2]``, for code that only hands them on to an operator."""

# Angle of the anchor of each attention head, as (phi + pi) / (2 pi).
_ANCHOR_ANGLES = (0.0, 2 * math.pi / 3, -2 * math.pi / 3, 0.0, 2 * math.pi / 3, -2 * math.pi / 3, 0.0, math.pi)


def sine_embedding(points: Tensor, embed_dims: int, temperature: float = 10000.0) -> Tensor:
    """Sine embedding of 2-vectors: the part of x, then the part of y.

    With ``d = embed_dims / 2`` channels each, channels ``2k`` and ``2k + 1`` of a part are the sine and the cosine of
    ``2 pi v / temperature^(2k / d)``.  (mmdet's ``coordinate_to_encoding`` is this with y first.)

    Args:
        points: ``[..., 2]`` as (x, y), in 0..1.
        embed_dims: Channels ``C`` of the embedding, a multiple of 4.
        temperature: Ratio of the longest to the shortest wave length.

    Returns:
        ``[..., C]`` in the type of ``points``.
    """
    channels = embed_dims // 2
    exponents = torch.arange(0, channels, 2, dtype=points.dtype, device=points.device) / channels
    angles = points.unsqueeze(-1) * (2 * math.pi) / temperature**exponents  # [..., 2, C / 4]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-3)


@MODELS.register_module()
class BoxPositionalEncoding(nn.Module):
    """Embedding of boxes: sine embedding of the centre plus sine embedding of the size.

    Args:
        embed_dims: Channels ``C``, a multiple of 4.
        ref_size: Width and height of a token's window, in cells of its level.
        temperature: See :func:`sine_embedding`.

    Raises:
        ValueError: ``embed_dims`` is not a multiple of 4.

    Examples:
        >>> encoding = BoxPositionalEncoding(embed_dims=16)
        >>> windows = encoding.reference_windows([(8, 11), (4, 6)])
        >>> windows.shape, encoding(windows).shape
        (torch.Size([1, 112, 4]), torch.Size([1, 112, 16]))
    """

    def __init__(self, embed_dims: int = 256, ref_size: float = 4.0, temperature: float = 10000.0) -> None:
        super().__init__()
        if embed_dims % 4:
            raise ValueError(f'embed_dims must be a multiple of 4, got {embed_dims}')
        self.embed_dims = embed_dims
        self.ref_size = ref_size
        self.temperature = temperature

    def reference_windows(
        self, spatial_shapes: SpatialShapes, masks: Sequence[Tensor] | None = None, device: torch.device | None = None
    ) -> Tensor:
        """Windows of all tokens, see :func:`reference_windows`."""
        return reference_windows(spatial_shapes, masks, ref_size=self.ref_size, device=device)

    def forward(self, boxes: Tensor) -> Tensor:
        """Embed boxes.

        Args:
            boxes: ``[..., 4]`` as (cx, cy, w, h) in 0..1: windows of tokens or proposals.

        Returns:
            ``[..., C]`` in the type of ``boxes``.
        """
        centre, size = boxes[..., :2], boxes[..., 2:4]
        return sine_embedding(centre, self.embed_dims, self.temperature) + sine_embedding(
            size, self.embed_dims, self.temperature
        )


def reference_windows(
    spatial_shapes: SpatialShapes,
    masks: Sequence[Tensor] | None = None,
    *,
    ref_size: float = 4.0,
    device: torch.device | None = None,
) -> Tensor:
    """The window of every token, levels one after the other, rows before columns.

    The centre is that of the token's cell and the size ``ref_size`` cells, both as fractions of the unpadded image.

    Args:
        spatial_shapes: Height and width of each level.
        masks: ``[B, h, w]`` bool for each level, True at padding (right and below); ``None`` if nothing is padded.
        ref_size: Width and height of a window in cells.
        device: Where to build the windows if there are no masks.

    Returns:
        ``[B, S, 4]`` float32 (cx, cy, w, h); ``B`` is 1 without masks, which broadcasts over a batch.
    """
    if masks is None:
        masks = [torch.zeros((1, h, w), dtype=torch.bool, device=device) for h, w in spatial_shapes]
    return torch.cat([_level_windows(mask, ref_size) for mask in masks], dim=1)


def _level_windows(mask: Tensor, ref_size: float) -> Tensor:
    valid = ~mask
    centres = []
    for dim in (2, 1):  # x along the width, y along the height
        count = valid.cumsum(dim, dtype=torch.float32)
        centre = (count - 0.5) / (count.narrow(dim, count.shape[dim] - 1, 1) + 1e-6)
        centres.append(centre.clamp(min=-1.0))  # only padded cells lie below 0
    sizes = ref_size / _valid_extent(mask)  # [B, 2]
    sizes = sizes[:, None, None, :].expand(*mask.shape, 2)
    return torch.cat((torch.stack(centres, dim=-1), sizes), dim=-1).flatten(1, 2)  # [B, h * w, 4]


def _valid_extent(mask: Tensor) -> Tensor:
    """Number of valid columns and rows of ``mask`` ``[B, h, w]``: ``[B, 2]`` float32 as (width, height)."""
    return torch.stack(((~mask[:, 0, :]).sum(1), (~mask[:, :, 0]).sum(1)), dim=-1).float()


def shapes_on_device(spatial_shapes: Shapes, device: torch.device) -> Tensor:
    """Level sizes as the int64 tensor ``[L, 2]`` that operators take, without making the host wait for the device.

    Args:
        spatial_shapes: Height and width of each level.
        device: Where the operators run.

    Returns:
        The tensor on ``device``; ``spatial_shapes`` itself if it is one already.
    """
    if isinstance(spatial_shapes, Tensor):
        return spatial_shapes
    shapes = torch.tensor(spatial_shapes, dtype=torch.int64).reshape(-1, 2)
    if device.type == 'cuda':
        return shapes.pin_memory().to(device, non_blocking=True)
    return shapes.to(device)


def valid_ratios(masks: Sequence[Tensor]) -> Tensor:
    """Part of each padded level that holds image.

    Args:
        masks: ``[B, h, w]`` bool for each level, True at padding (right and below).

    Returns:
        ``[B, L, 2]`` float32 as (along the width, along the height), in 0..1.
    """
    extents = []
    for mask in masks:
        height, width = mask.shape[1:]
        columns, rows = _valid_extent(mask).unbind(-1)
        extents.append(torch.stack((columns / width, rows / height), dim=-1))
    return torch.stack(extents, dim=1)


def reference_windows_3d(
    spatial_shapes: SpatialShapes, *, ref_size: float = 4.0, device: torch.device | None = None
) -> Tensor:
    """The rotated windows of every token of a bird's-eye view, one anchor angle for each of 8 heads.

    Args:
        spatial_shapes: Height and width of each level; nothing is padded.
        ref_size: Width and height of a window in cells.
        device: Where to build the windows.

    Returns:
        ``[1, S, 8, 5]`` float32 (cx, cy, w, h, angle code); the code of an angle phi is ``(phi + pi) / (2 pi)``.
    """
    codes = (torch.tensor(_ANCHOR_ANGLES, device=device) + math.pi) / (2 * math.pi)
    levels = []
    for height, width in spatial_shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        cy, cx = torch.meshgrid(y, x, indexing='ij')
        window = (cx, cy, torch.full_like(cx, ref_size / width), torch.full_like(cy, ref_size / height))
        levels.append(torch.stack(window, dim=-1).flatten(0, 1))
    windows = torch.cat(levels)  # [S, 4]
    count, heads = windows.shape[0], len(codes)
    windows = windows[:, None, :].expand(count, heads, 4)
    return torch.cat((windows, codes[None, :, None].expand(count, heads, 1)), dim=-1)[None]
