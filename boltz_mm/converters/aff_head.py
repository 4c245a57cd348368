"""Official weights of AutoFocusFormer segmentors to ours and back.

Parameters of the two decoders keep their official names below the head; the backbone's are converted by
:mod:`boltz_mm.converters.aff`.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from boltz_mm.converters.aff import official_classifier_key, our_classifier_key
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

_OFFICIAL_HEAD = 'sem_seg_head.'
_PARTS = re.compile(r'(pixel_decoder|predictor)\..+')
# Weights of the class loss; ours stand in the config.
_BUFFERS = {'criterion.empty_weight'}
HEADS = ('panoptic_head', 'decode_head')
"""Where mmdet's detectors and mmseg's segmentors keep the head."""


def our_segmentor_key(key: str, head: str = 'panoptic_head') -> str | None:
    """Our name of a key of an official segmentor, or ``None``.

    Args:
        key: Official key.  ``static_query`` of early files is ``query_feat`` today.
        head: Name of our head within the model.
    """
    if key.startswith('backbone.'):
        return our_classifier_key(key.removeprefix('backbone.'))
    part = key.removeprefix(_OFFICIAL_HEAD)
    if part == key or not _PARTS.fullmatch(part):
        return None
    return f'{head}.{part.replace("predictor.static_query.", "predictor.query_feat.")}'


def official_segmentor_key(key: str) -> str | None:
    """The official name of a key of our segmentor, or ``None``; see :func:`our_segmentor_key`."""
    if key.startswith('backbone.'):
        plain = official_classifier_key(key)
        return None if plain is None else f'backbone.{plain}'
    head, _, part = key.partition('.')
    return f'{_OFFICIAL_HEAD}{part}' if head in HEADS and _PARTS.fullmatch(part) else None


def convert_aff_segmentor(
    container: Mapping, model: nn.Module | None = None, *, head: str = 'panoptic_head'
) -> tuple[StateDict, ConversionReport]:
    """Convert the official weights of a whole segmentor.

    Args:
        container: What an official file holds: ``{'model': ...}``, ``{'state_dict': ...}`` or a bare state dict.
        model: The model that will get the weights; tells what is missing or has another shape.
        head: 'panoptic_head' for mmdet's detectors, 'decode_head' for mmseg's segmentors.

    Returns:
        The state dict, and what became of each key.

    Raises:
        ValueError: ``head`` is another one, or the container holds no segmentor.
    """
    if head not in HEADS:
        raise ValueError(f'head must be one of {HEADS}, got {head!r}')
    official = official_state_dict(container)
    dropped = sorted(_BUFFERS & set(official))
    official = {key: value for key, value in official.items() if key not in _BUFFERS}
    state, report = rename(official, lambda key: our_segmentor_key(key, head))
    report.dropped = dropped
    if not any(name.startswith(f'{head}.') for name in state):
        raise ValueError(f'no weights of an AutoFocusFormer segmentor among {sorted(official)[:5]} ...')
    if f'{head}.predictor.class_embed.weight' in state:
        report.num_classes = len(state[f'{head}.predictor.class_embed.weight']) - 1
    if model is not None:
        compare_with_model(state, model, report)
    return state, report


def export_aff_segmentor(state: Mapping[str, Tensor]) -> StateDict:
    """Rename our state dict of a segmentor to the official layout (without container and loss weights).

    Args:
        state: State dict of a model with ``PointMask2FormerHead`` or ``PointMask2FormerSegHead``.

    Returns:
        The official state dict.

    Raises:
        ValueError: A key has no official name.
    """
    return rename_back(state, official_segmentor_key)


def infer_aff_head_config(state: Mapping[str, Tensor], head: str = 'panoptic_head') -> dict[str, Any]:
    """Settings of our head that fit a converted state dict.

    Weights do not tell the heads of the transformer decoder (officially those of the pixel decoder), nor a power of
    the interpolation that is not learned.

    Args:
        state: Result of :func:`convert_aff_segmentor`.
        head: Name of our head within the model.

    Returns:
        Settings of ``PointMask2FormerHead`` but for the split of its classes; ``num_classes`` is their number.

    Raises:
        ValueError: The head is not complete.
    """
    decoder, predictor = f'{head}.pixel_decoder.', f'{head}.predictor.'
    levels = count_modules(state, f'{decoder}input_proj.')
    encoder = f'{decoder}transformer.encoder.layers.'
    feat_channels = shape_of(state, f'{decoder}adapter_1.0.weight')[0]
    # 4 points per head and level, as in all official models.
    num_heads = shape_of(state, f'{encoder}0.self_attn.attention_weights.weight')[0] // (levels * 4)
    coarser = [shape_of(state, f'{decoder}input_proj.{i}.0.weight')[1] for i in reversed(range(levels))]
    return {
        'in_channels': [shape_of(state, f'{decoder}adapter_1.0.weight')[1], *coarser],
        'feat_channels': feat_channels,
        'out_channels': shape_of(state, f'{decoder}mask_features.weight')[0],
        'num_classes': shape_of(state, f'{predictor}class_embed.weight')[0] - 1,
        'num_queries': shape_of(state, f'{predictor}query_feat.weight')[0],
        'pixel_decoder': {
            'num_heads': num_heads,
            'num_layers': count_modules(state, encoder),
            'feedforward_channels': shape_of(state, f'{encoder}0.linear1.weight')[0],
            'learnable_power': f'{encoder}0.self_attn.shepard_power' in state,
        },
        'transformer_decoder': {
            'embed_dims': shape_of(state, f'{predictor}query_feat.weight')[1],
            'num_heads': num_heads,
            'num_layers': count_modules(state, f'{predictor}transformer_ffn_layers.'),
            'feedforward_channels': shape_of(state, f'{predictor}transformer_ffn_layers.0.linear1.weight')[0],
        },
    }
