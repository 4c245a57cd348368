"""AutoFocusFormer: a hierarchical vision transformer whose tokens leave the grid.

Source: AutoFocusFormer (CVPR 2023) and the official repositories ``apple/ml-autofocusformer`` (``aff_transformer.py``,
classification) and ``apple/ml-autofocusformer-segmentation`` (``backbone/aff.py``).  Parameter names are the official
ones of the backbone.

Deviations from the official code, all without effect where that is valid:

* Any image size and aspect: offsets are used as they are instead of as rows of a table made for one size; what
  depends on the size is kept for each size; small images (global attention in any stage, fewer tokens than are
  reserved, a single token) work; a neighbourhood size is never rounded for good by an earlier image.
* Order of the tokens that survive a stage, and more about the choice: see ``layers/cluster_merging.py``.
* Equal sort keys keep their order (officially unspecified).
* ``per_image=True`` makes an image's result independent of the other images of its batch.

NaN pixels: NaN importance counts as 0, so tokens are still chosen, without an error; all features of that image that a
NaN reaches are NaN, and with the global mean or global attention that is all of them.  Other images of the batch see
nothing of it beyond what any other image would do to them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from boltz_mm.models.layers.cluster_merging import grid_prior
from boltz_mm.models.layers.cluster_stage import Clustered, ClusterStage, PatchEmbed, StageOutput, grid_positions
from boltz_mm.models.layers.size_cache import SizeCache
from boltz_mm.registry import MODELS
from boltz_mm.structures import PointFeature

_MINI = {
    'embed_dims': (32, 128, 256, 384),
    'depths': (2, 2, 6, 2),
    'num_heads': (2, 4, 8, 16),
    'mlp_ratio': 2.0,
    'drop_path_rate': 0.0,
}
_TINY = {
    'embed_dims': (64, 128, 256, 512),
    'depths': (3, 4, 18, 5),
    'num_heads': (2, 4, 8, 16),
    'mlp_ratio': 3.0,
    'drop_path_rate': 0.2,
}
_SMALL = {
    'embed_dims': (96, 192, 384, 768),
    'depths': (3, 4, 18, 2),
    'num_heads': (3, 6, 12, 24),
    'mlp_ratio': 3.0,
    'layer_scale': 1e-5,
    'drop_path_rate': 0.3,
}
_BASE = {
    'embed_dims': (128, 256, 512, 1024),
    'depths': (3, 4, 18, 2),
    'num_heads': (4, 8, 16, 32),
    'mlp_ratio': 3.0,
    'layer_scale': 1e-5,
    'drop_path_rate': 0.2,
}
_DEFAULTS = {
    'mlp_ratio': 2.0,
    'ds_rate': 0.25,
    'layer_scale': 0.0,
    'drop_path_rate': 0.0,
    'cluster_size': 8,
    'nbhd_size': (48, 48, 48, 49),
}
_REQUIRED = ('embed_dims', 'depths', 'num_heads')

ARCHS: dict[str, dict[str, Any]] = {
    'mini': _MINI,
    'mini_1_5th': {**_MINI, 'ds_rate': 0.2},
    'tiny': _TINY,
    'tiny_1_5th': {**_TINY, 'ds_rate': 0.2},
    'small': _SMALL,
    'small_1_5th': {**_SMALL, 'ds_rate': 0.2},
    'base': _BASE,
    'base_384': {**_BASE, 'cluster_size': 24, 'nbhd_size': 144},
}
"""Settings of the published variants (classification)."""

OFFICIAL_MAX_OFFSET = 511
"""Where the official segmentation code clamps offsets, in stride-4 cells."""


class Layout(NamedTuple):
    """What the shapes of weights tell about a variant.

    Attributes:
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        feedforward: Channels inside the MLPs of each stage.
        with_layer_scale: Whether branches have learned factors.
    """

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    feedforward: tuple[int, ...]
    with_layer_scale: bool

    def __str__(self) -> str:
        names = [name for name, arch in ARCHS.items() if _layout_of_arch(arch) == self]
        numbers = ', '.join(f'{key}={list(value)}' for key, value in self._asdict().items() if isinstance(value, tuple))
        scale = 'with' if self.with_layer_scale else 'without'
        return f'{" or ".join(names) or "no published variant"} ({numbers}, {scale} layer scale)'


def _layout_of_arch(arch: Mapping[str, Any]) -> Layout:
    settings = {**_DEFAULTS, **arch}
    return Layout(
        tuple(settings['embed_dims']),
        tuple(settings['depths']),
        tuple(settings['num_heads']),
        tuple(int(width * settings['mlp_ratio']) for width in settings['embed_dims']),
        settings['layer_scale'] > 0,
    )


def layout_of_weights(state: Mapping[str, Tensor], prefix: str = '') -> Layout | None:
    """Tell the variant from a state dict.

    Args:
        state: Name to tensor.
        prefix: What stands before ``layers.0``.

    Returns:
        The layout; ``None`` if the blocks are not all there.
    """
    found: list[tuple[int, int, int, int]] = []
    first = f'{prefix}layers.{{}}.blocks.0.'
    while f'{(block := first.format(len(found)))}norm1.weight' in state:
        stage = block.removesuffix('0.')
        depth = 1
        while f'{stage}{depth}.norm1.weight' in state:
            depth += 1
        others = (f'{block}attn.pos_embed.weight', f'{block}mlp.fc1.weight')
        if not all(name in state for name in others):
            return None
        heads, hidden = (state[name].shape[0] for name in others)
        found.append((state[f'{block}norm1.weight'].shape[0], depth, heads, hidden))
    if not found:
        return None
    embed_dims, depths, num_heads, feedforward = zip(*found, strict=True)
    return Layout(embed_dims, depths, num_heads, feedforward, f'{first.format(0)}gamma1' in state)


@MODELS.register_module()
class AFF(BaseModule):
    """AutoFocusFormer backbone.

    With ``out_type='avg'`` it is the body of a classifier: mmpretrain's ``ImageClassifier`` with ``LinearClsHead`` and
    no neck gives the official model.  With ``out_type='points'`` it gives the tokens of each stage, for heads that work
    on points; the neck :class:`~boltz_mm.models.necks.points_to_grid.PointsToGrid` makes maps of them for all others.

    Args:
        arch: A published variant ('mini', 'mini_1_5th', 'tiny', 'tiny_1_5th', 'small', 'small_1_5th', 'base',
            'base_384'), or a dict with ``embed_dims``, ``depths``, ``num_heads`` (one entry for each stage) and perhaps
            ``mlp_ratio`` and settings that follow here.
        in_channels: Channels of an image.
        out_type: 'points' or 'avg'.
        out_indices: Stages that are given with 'points'.
        ds_rate: Share of the tokens that each stage hands on; ``None``: that of the variant (so for those below).
        cluster_size: Tokens of a cluster.
        nbhd_size: Tokens that a token sees, one number or one for each stage.  The official segmentation models have
            48 (base 144) in all stages, the classifiers 49 in the last.
        alpha: Factor of the importance in the choice of tokens; 8 in the official Cityscapes models.
        reserve: Whether tokens of a coarse grid are kept in any case.
        layer_scale: Start of the learned factors of the branches; 0 for none.
        drop_rate: Dropout of tokens and branches.
        drop_path_rate: Chance of dropping the last block's branches in training; it grows linearly from 0.
        patch_norm: Whether a norm follows the patch embedding.
        pad_to_stride: Whether images are padded to multiples of 4; ``None``: officially, with 'points'.
        max_offset: Offsets between tokens are clamped to this, in stride-4 cells; ``None``: not; 'official': 511 with
            'points', not with 'avg'.
        per_image: Whether an image's clusters are independent of the other images of the batch; officially the sort
            key contains a maximum over the batch.
        with_cp: Recompute blocks in the backward pass: less memory, more time.
        frozen_stages: The patch embedding and this many stages are not trained; 0: the patch embedding; -1: nothing.
        norm_eval: Keep the statistics of the batch norm in training.
        cache_size: Image sizes for which clusters of the full grid are kept.
        init_cfg: Config of the initialisation.  By default linear maps are normal with deviation 0.02, cut at 2, the
            rest as torch makes it (the official classifier).

    Raises:
        ValueError: A setting is unknown, out of range or not given for each stage.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        in_channels: int = 3,
        out_type: str = 'points',
        out_indices: Sequence[int] = (0, 1, 2, 3),
        ds_rate: float | None = None,
        cluster_size: int | None = None,
        nbhd_size: int | Sequence[int] | None = None,
        alpha: float = 4.0,
        reserve: bool = True,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        patch_norm: bool = True,
        pad_to_stride: bool | None = None,
        max_offset: int | str | None = 'official',
        per_image: bool = False,
        with_cp: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        cache_size: int = 16,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if init_cfg is None:
            init_cfg = [
                dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
                dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
            ]
        super().__init__(init_cfg)
        given = dict(
            ds_rate=ds_rate,
            cluster_size=cluster_size,
            nbhd_size=nbhd_size,
            layer_scale=layer_scale,
            drop_path_rate=drop_path_rate,
        )
        settings = _settings(arch, given)
        embed_dims, depths = settings['embed_dims'], settings['depths']
        num_stages = len(embed_dims)
        if out_type not in ('points', 'avg'):
            raise ValueError(f"out_type must be 'points' or 'avg', got {out_type!r}")
        if not out_indices or any(not 0 <= i < num_stages for i in out_indices):
            raise ValueError(f'out_indices must be stages 0 to {num_stages - 1}, got {tuple(out_indices)}')
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f'frozen_stages must be -1 to {num_stages}, got {frozen_stages}')
        if isinstance(max_offset, str):
            if max_offset != 'official':
                raise ValueError(f"max_offset must be a number, None or 'official', got {max_offset!r}")
            max_offset = OFFICIAL_MAX_OFFSET if out_type == 'points' else None
        self.out_type = out_type
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.size_cache = SizeCache(cache_size)

        pad_to_stride = out_type == 'points' if pad_to_stride is None else pad_to_stride
        self.patch_embed = PatchEmbed(in_channels, embed_dims[0], patch_norm, pad_to_stride)
        self.pos_drop = nn.Dropout(drop_rate)
        steps = max(sum(depths) - 1, 1)
        rates = [settings['drop_path_rate'] * i / steps for i in range(sum(depths))]
        self.layers = nn.ModuleList()
        for i in range(num_stages):
            before = sum(depths[:i])
            self.layers.append(
                ClusterStage(
                    embed_dims[i],
                    depths[i],
                    settings['num_heads'][i],
                    cluster_size=settings['cluster_size'],
                    nbhd_size=settings['nbhd_size'][i],
                    mlp_ratio=settings['mlp_ratio'],
                    layer_scale=settings['layer_scale'],
                    drop_rate=drop_rate,
                    drop_path_rates=rates[before : before + depths[i]],
                    out_channels=embed_dims[i + 1] if i + 1 < num_stages else None,
                    ds_rate=settings['ds_rate'],
                    alpha=alpha,
                    reserve=reserve,
                    max_offset=max_offset,
                    per_image=per_image,
                    with_cp=with_cp,
                )
            )
        if out_type == 'avg':
            self.norm = nn.LayerNorm(embed_dims[-1])
        else:
            for i in self.out_indices:
                self.add_module(f'norm{i}', nn.LayerNorm(embed_dims[i]))
        self._freeze()

    def forward_stages(self, image: Tensor) -> tuple[list[StageOutput], tuple[int, int]]:
        """Run all stages; what is between them is kept, for pictures and heads of other kinds.

        Args:
            image: Float tensor ``[B, in_channels, H, W]``, normalised.

        Returns:
            Output of each stage, before the output norms, and rows and columns (h, w) of the stride-4 grid.

        Raises:
            ValueError: The images have no pixels, or the tensor is none of images.
        """
        if image.dim() != 4 or image.numel() == 0:
            raise ValueError(f'expected images [B, C, H, W] with at least one pixel, got a tensor {list(image.shape)}')
        shape = self.patch_embed.grid_shape(image)
        clustered = self._cluster_grid(shape, image.device)
        tokens = self.patch_embed(image, None if clustered.order is None else clustered.order[0])
        first: Clustered | None = clustered.expand(len(image))
        pos, feat = clustered.neighborhood.pos, self.pos_drop(tokens)
        outputs = []
        for i, stage in enumerate(self.layers):
            outputs.append(stage(pos, feat, shape, 2 ** (i + 1), first))
            pos, feat, first = outputs[-1].next_pos, outputs[-1].next_feat, None
        return outputs, shape

    def forward(self, image: Tensor) -> tuple[PointFeature, ...] | tuple[Tensor]:
        """Extract features.

        Args:
            image: Float tensor ``[B, in_channels, H, W]``, normalised.

        Returns:
            With 'points' a :class:`~boltz_mm.structures.PointFeature` for each of ``out_indices``: its tokens in the
            order of the stage's clusters, normalised.  With 'avg' ``([B, C],)``, the mean of the last stage's tokens
            after the norm.

        Raises:
            ValueError: The images have no pixels, or the tensor is none of images.
        """
        stages, shape = self.forward_stages(image)
        if self.out_type == 'avg':
            return (self.norm(stages[-1].feat).mean(dim=1),)
        return tuple(
            PointFeature(getattr(self, f'norm{i}')(stages[i].feat), stages[i].neighborhood.pos, shape)
            for i in self.out_indices
        )

    def _cluster_grid(self, shape: tuple[int, int], device: torch.device) -> Clustered:
        """Clusters of the full grid, batch of 1; once for each size."""
        stage = cast(ClusterStage, self.layers[0])

        def make() -> Clustered:
            clustered = stage.cluster(grid_positions(shape, device), shape)
            return clustered._replace(prior=grid_prior(clustered.neighborhood.pos, 2, shape))

        return self.size_cache.get((shape, stage.cluster_size, stage.nbhd_size), device, make)

    def train(self, mode: bool = True) -> 'AFF':
        """Set the mode; frozen stages stay in evaluation."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        frozen = [] if self.frozen_stages < 0 else [self.patch_embed, *self.layers[: self.frozen_stages]]
        frozen += [getattr(self, f'norm{i}', None) for i in range(self.frozen_stages)]
        for module in frozen:
            if module is not None:
                module.eval()
                module.requires_grad_(False)

    def _load_from_state_dict(self, state_dict: Mapping, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load weights, but never those of another variant: loaders that are not strict would drop most of them.

        Raises:
            ValueError: The weights are those of another variant; names both.
        """
        theirs, ours = layout_of_weights(state_dict, prefix), layout_of_weights(self.state_dict())
        if theirs is not None and theirs != ours:
            raise ValueError(f'the weights are of AFF {theirs}, the model is AFF {ours}')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _settings(arch: str | Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a variant: those given, else those of ``arch``, else the defaults; one for each stage."""
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'arch must be a dict or one of {", ".join(ARCHS)}; got {arch!r}')
        arch = ARCHS[arch]
    unknown = set(arch) - set(_DEFAULTS) - set(_REQUIRED)
    missing = set(_REQUIRED) - set(arch)
    if unknown or missing:
        raise ValueError(f'arch needs {sorted(_REQUIRED)}; missing: {sorted(missing)}, unknown: {sorted(unknown)}')
    settings = {**_DEFAULTS, **arch, **{name: value for name, value in given.items() if value is not None}}
    num_stages = len(settings['embed_dims'])
    if isinstance(settings['nbhd_size'], int):
        settings['nbhd_size'] = (settings['nbhd_size'],) * num_stages
    for name in (*_REQUIRED, 'nbhd_size'):
        if len(settings[name]) != num_stages:
            raise ValueError(f'{name} must have one entry for each of {num_stages} stages, got {settings[name]}')
    return settings
