"""Official BoxeR-2D weights to ours and back.

Understood are the training container (``model`` beside optimizer and schedule), ``{'model': ...}``,
``{'state_dict': ...}``, a bare state dict, each with or without the prefix ``module.``, and files of the backbone alone
with torchvision or Detectron2 names.
Tensors are never changed, only renamed; the one thing that official files lack and we have are the counters
``num_batches_tracked`` of frozen norms, added as 0.

Numbers that a file holds (classes, widths, depths) are read from it by :func:`infer_boxer_config`; nothing in a file
tells ``residual_mode``, the number of queries or ``ref_size``.
"""

import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from boltz_mm.converters.common import (
    ConversionReport,
    StateDict,
    compare_with_model,
    count_modules,
    official_state_dict,
    rename,
    rename_back,
    shape_of,
)

# Official prefix -> ours; ``input_proj`` and the backbone have rules of their own.
_PREFIXES = {
    'transformer.encoder.': 'encoder.',
    'transformer.decoder.': 'decoder.',
    'enc_detector.class_embed.': 'bbox_head.enc_cls_branch.',
    'detector.class_embed.': 'bbox_head.cls_branch.',
    'detector.mask_embed.layers.0.0.': 'bbox_head.mask_head.upsample.',
    'detector.mask_embed.layers.1.0.': 'bbox_head.mask_head.conv.',
    'detector.mask_embed.layers.2.': 'bbox_head.mask_head.conv_logits.',
}
# Box MLPs: layer i there is entry 2i here, with activations between.
_MLPS = {
    'enc_detector.bbox_embed.layers.': 'bbox_head.enc_reg_branch.',
    'detector.bbox_embed.layers.': 'bbox_head.reg_branch.',
}
_BACKBONE = re.compile(r'(conv1|bn1|layer[1-4]\.\d+\.(conv[1-3]|bn[1-3]|downsample\.[01]))\.\w+')
_DETECTRON2 = re.compile(r'(?:backbone\.bottom_up\.|bottom_up\.|backbone\.)?((?:stem|res[2-5]\.\d+)\..+)')
_COUNTER = '.num_batches_tracked'


def convert_boxer(container: Mapping, model: nn.Module | None = None) -> tuple[StateDict, ConversionReport]:
    """Convert official weights.

    Args:
        container: What an official file holds, see the module's text.
        model: The detector that will get the weights (may lie on the meta device); tells what is missing or has
            another shape.

    Returns:
        The state dict for :class:`boltz_mm.models.detectors.BoxeR` and what became of each key.

    Raises:
        ValueError: The container holds no weights of BoxeR or of its backbone.
    """
    official = official_state_dict(container)
    state, report = rename(official, partial(our_key, num_projections=_count_projections(official)))
    if not state:
        raise ValueError(f'no weights of BoxeR among {sorted(official)[:5]} ...')
    for name in [n for n in state if n.startswith('backbone.') and n.endswith('.running_var')]:
        counter = name.removesuffix('.running_var') + _COUNTER
        if counter not in state:
            state[counter] = torch.zeros((), dtype=torch.long)
            report.added.append(counter)
    if 'bbox_head.cls_branch.weight' in state:
        report.num_classes = len(state['bbox_head.cls_branch.weight'])
    if model is not None:
        compare_with_model(state, model, report)
    return state, report


def export_boxer(state: Mapping[str, Tensor]) -> StateDict:
    """Rename our state dict to the official layout (without container and prefix).

    Args:
        state: State dict of :class:`boltz_mm.models.detectors.BoxeR`.

    Returns:
        The official state dict; counters of frozen norms, which it lacks, are left out.

    Raises:
        ValueError: A key has no official name.
    """
    num_projections = 1 + max((int(k.split('.')[2]) for k in state if k.startswith('neck.convs.')), default=-1)
    kept = {key: value for key, value in state.items() if not (key.startswith('backbone.') and key.endswith(_COUNTER))}
    return rename_back(kept, partial(official_key, num_projections=num_projections))


def our_key(key: str, num_projections: int) -> str | None:
    """Our name of an official key, or ``None``.

    Args:
        key: Official key, without ``module.``.
        num_projections: Levels that come from the backbone; the others are made by extra convolutions.
    """
    detectron2 = _DETECTRON2.fullmatch(key)
    if detectron2:
        key = _from_detectron2(detectron2[1])
    if _BACKBONE.fullmatch(key.removeprefix('backbone.')):
        return 'backbone.' + key.removeprefix('backbone.')
    match = re.fullmatch(r'input_proj\.(\d+)\.([01])\.(\w+)', key)
    if match:
        level, part = int(match[1]), 'conv' if match[2] == '0' else 'gn'
        if level < num_projections:
            return f'neck.convs.{level}.{part}.{match[3]}'
        return f'neck.extra_convs.{level - num_projections}.{part}.{match[3]}'
    for theirs, ours in _MLPS.items():
        match = re.fullmatch(re.escape(theirs) + r'(\d+)\.(\w+)', key)
        if match:
            return f'{ours}{2 * int(match[1])}.{match[2]}'
    for theirs, ours in _PREFIXES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return None


def official_key(key: str, num_projections: int) -> str | None:
    """The official name of one of our keys, or ``None``; see :func:`our_key`."""
    if key.startswith('backbone.'):
        return key
    match = re.fullmatch(r'neck\.(extra_)?convs\.(\d+)\.(conv|gn)\.(\w+)', key)
    if match:
        level = int(match[2]) + (num_projections if match[1] else 0)
        return f'input_proj.{level}.{"0" if match[3] == "conv" else "1"}.{match[4]}'
    for theirs, ours in _MLPS.items():
        match = re.fullmatch(re.escape(ours) + r'(\d+)\.(\w+)', key)
        if match:
            return f'{theirs}{int(match[1]) // 2}.{match[2]}'
    for theirs, ours in _PREFIXES.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return None


def _from_detectron2(key: str) -> str:
    """``res4.0.conv2.norm.bias`` -> ``layer3.0.bn2.bias`` and the like."""
    key = key.removeprefix('stem.')
    key = re.sub(r'^res([2-5])\.', lambda m: f'layer{int(m[1]) - 1}.', key)
    key = re.sub(r'\bshortcut\.norm\.', 'downsample.1.', key)
    key = re.sub(r'\bshortcut\.', 'downsample.0.', key)
    return re.sub(r'\bconv([1-3])\.norm\.', r'bn\1.', key)


def _count_projections(official: StateDict) -> int:
    """Levels projected by a 1 x 1 convolution."""
    kernels = (value for key, value in official.items() if re.fullmatch(r'input_proj\.\d+\.0\.weight', key))
    return sum(value.shape[-2:] == (1, 1) for value in kernels)


def infer_boxer_config(
    state: Mapping[str, Tensor], residual_mode: str = 'v1', num_queries: int = 300, ref_size: float = 4.0
) -> dict:
    """A config of BoxeR that fits a converted state dict.

    Args:
        state: Result of :func:`convert_boxer`, of a whole model.
        residual_mode: 'v1' or 'v2' (the official ``resmode_v2``); not in the weights.
        num_queries: Tokens that become queries; not in the weights.
        ref_size: Width of a token's window in cells; not in the weights.

    Returns:
        Config for ``MODELS.build``, without data preprocessor.

    Raises:
        ValueError: The state dict is not that of a whole model with a ResNet.
    """
    num_classes, embed_dims = shape_of(state, 'bbox_head.cls_branch.weight')
    in_channels = [
        shape_of(state, f'neck.convs.{i}.conv.weight')[1] for i in range(count_modules(state, 'neck.convs.'))
    ]
    if not in_channels:
        raise ValueError("the state dict is not of a whole BoxeR: 'neck.convs' is missing")
    num_levels = len(in_channels) + count_modules(state, 'neck.extra_convs.')
    with_mask = 'bbox_head.mask_head.conv.weight' in state
    num_heads = shape_of(state, 'encoder.layers.0.self_attn.linear_box_bias')[0] // (4 * num_levels)
    layer = {
        'embed_dims': embed_dims,
        'num_heads': num_heads,
        'num_levels': num_levels,
        'feedforward_channels': shape_of(state, 'encoder.layers.0.linear1.weight')[0],
    }
    depths = {(2, False): 18, (6, False): 34, (6, True): 50, (23, True): 101, (36, True): 152}
    blocks = count_modules(state, 'backbone.layer3.')
    bottleneck = 'backbone.layer3.0.conv3.weight' in state
    if (blocks, bottleneck) not in depths:
        raise ValueError(f'no ResNet of mmdet: layer3 has {blocks} blocks (bottleneck: {bottleneck})')
    return {
        'type': 'boltz_mm.BoxeR',
        'num_queries': num_queries,
        'backbone': {
            'type': 'mmdet.ResNet',
            'depth': depths[blocks, bottleneck],
            'stem_channels': shape_of(state, 'backbone.conv1.weight')[0],
            'base_channels': shape_of(state, 'backbone.layer1.0.conv1.weight')[0],
            'out_indices': tuple(range(4 - len(in_channels), 4)),
            'frozen_stages': -1,
            'norm_cfg': {'type': 'BN', 'requires_grad': False},
            'norm_eval': True,
            'style': 'pytorch',
        },
        'neck': {
            'type': 'boltz_mm.BoxeRNeck',
            'in_channels': in_channels,
            'out_channels': embed_dims,
            'num_outs': num_levels,
        },
        'positional_encoding': {'embed_dims': embed_dims, 'ref_size': ref_size},
        'encoder': {'num_layers': count_modules(state, 'encoder.layers.'), 'layer_cfg': layer},
        'decoder': {
            'num_layers': count_modules(state, 'decoder.layers.'),
            'layer_cfg': {**layer, 'with_mask': with_mask, 'residual_mode': residual_mode},
        },
        'bbox_head': {
            'type': 'boltz_mm.BoxeRHead',
            'num_classes': num_classes,
            'embed_dims': embed_dims,
            'with_mask': with_mask,
        },
    }
