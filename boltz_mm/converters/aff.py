"""Official AutoFocusFormer weights to ours and back.

Understood are the classification container (``model``, ``model_ema`` beside optimizer and schedule), the detectron2
container of the segmentors (``model``), ``{'state_dict': ...}`` and bare state dicts, each with or without the prefix
``module.``.  Tensors are never changed, only renamed.

Numbers that a file holds (widths, depths, heads, classes) are read from it by :func:`infer_aff_arch`; nothing in a file
tells the cluster size, the share of tokens kept, or the factor of the importance.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from mmengine.config import ConfigDict
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

HEADS = ('panoptic_head', 'decode_head')
"""Where a segmentor of mmdet (``Mask2Former``) and one of mmseg (``EncoderDecoder``) keep the head."""

_STAGE = r'layers\.\d+\.(blocks\.\d+|downsample|prob_net)\..+'
_BACKBONE = re.compile(rf'patch_embed\.(proj1|bn|proj2|norm)\.\w+|{_STAGE}|norm[0-9]*\.(weight|bias)')
_CLASSIFIER = {'head.weight': 'head.fc.weight', 'head.bias': 'head.fc.bias'}
_SEGMENTOR = 'sem_seg_head.'
_HEAD = re.compile(r'(pixel_decoder|predictor)\..+')
_CLASS_WEIGHTS = 'criterion.empty_weight'  # 1 for each class and the weight of "no object"; ours is in the config
_NO_OBJECT_WEIGHT = 0.1
_LAYER_SCALE = 1e-5  # start value in all published configs that have factors


def convert_aff(
    container: Mapping,
    model: nn.Module | None = None,
    *,
    ema: bool = False,
    backbone_only: bool = False,
    head: str = 'panoptic_head',
) -> tuple[StateDict, ConversionReport]:
    """Convert official weights of a classifier or of a segmentor.

    Args:
        container: What an official file holds, see the module's text.
        model: The model that will get the weights (may lie on the meta device); tells what is missing or has another
            shape.
        ema: Take the averaged weights, ``model_ema``.
        backbone_only: Leave out the head, and the output norm of a classifier: what a detector or segmentor starts
            from.  Its own output norms keep their initialisation, as officially.
        head: Of a segmentor, where the model keeps its head: 'panoptic_head' in mmdet, 'decode_head' in mmseg.

    Returns:
        The state dict for mmpretrain's ``ImageClassifier`` with ``LinearClsHead``, or for a segmentor with
        ``PointMask2FormerHead`` (mmdet) or ``PointMask2FormerSegHead`` (mmseg), and what became of each key.

    Raises:
        ValueError: The container holds no weights of AutoFocusFormer, or none that are averaged.
    """
    if head not in HEADS:
        raise ValueError(f'head must be one of {", ".join(HEADS)}; got {head!r}')
    official = _weights_of(container, ema)
    class_weights = official.pop(_CLASS_WEIGHTS, None)
    segmentor = any(key.startswith(('backbone.', _SEGMENTOR)) for key in official)
    state, report = rename(official, partial(our_segmentor_key, head=head) if segmentor else our_classifier_key)
    if not any('layers.' in name for name in state):
        raise ValueError(f'no weights of AutoFocusFormer among {sorted(official)[:5]} ...')
    if class_weights is not None:
        report.dropped.append(_CLASS_WEIGHTS)
    if 'head.fc.weight' in state:
        report.num_classes = len(state['head.fc.weight'])
    elif f'{head}.predictor.class_embed.weight' in state:
        report.num_classes = len(state[f'{head}.predictor.class_embed.weight']) - 1
    if backbone_only:
        _drop_all_but_backbone(state, report)
    if model is not None:
        compare_with_model(state, model, report)
    return state, report


def _weights_of(container: Mapping, ema: bool) -> StateDict:
    if not ema:
        return official_state_dict(container)
    if 'model_ema' not in container:
        raise ValueError(f"the file has no averaged weights 'model_ema'; it has {sorted(map(str, container))[:8]}")
    return official_state_dict({'model': container['model_ema']})


def _drop_all_but_backbone(state: StateDict, report: ConversionReport) -> None:
    for key, name in list(report.renamed.items()):
        if not name.startswith('backbone.') or name.startswith('backbone.norm.'):
            report.dropped.append(key)
            del state[report.renamed.pop(key)]


def our_classifier_key(key: str) -> str | None:
    """Our name of a key of an official classifier, or ``None``."""
    if _BACKBONE.fullmatch(key):
        return f'backbone.{key}'
    return _CLASSIFIER.get(key)


def our_segmentor_key(key: str, head: str = 'panoptic_head') -> str | None:
    """Our name of a key of an official segmentor, or ``None``; for ``head`` see :func:`convert_aff`."""
    if key.startswith('backbone.'):
        return key if _BACKBONE.fullmatch(key.removeprefix('backbone.')) else None
    part = key.removeprefix(_SEGMENTOR)
    if part == key or not _HEAD.fullmatch(part):
        return None
    # Very old files call the learned query features so.
    return f'{head}.{part.replace("predictor.static_query.", "predictor.query_feat.")}'


def official_key(key: str) -> str | None:
    """The official name of a key of our classifier or segmentor, or ``None``."""
    root, _, part = key.partition('.')
    if root in HEADS and _HEAD.fullmatch(part):
        return _SEGMENTOR + part
    if root == 'backbone' and _BACKBONE.fullmatch(part):
        return part
    return {ours: theirs for theirs, ours in _CLASSIFIER.items()}.get(key)


def export_aff(state: Mapping[str, Tensor]) -> StateDict:
    """Rename our state dict to the official layout (without container).

    Args:
        state: State dict of a classifier or segmentor with :class:`boltz_mm.models.backbones.aff.AFF`.

    Returns:
        The official state dict.  That of a segmentor has the weights of the classes in the loss, as officially: 1, and
        0.1 for "no object".

    Raises:
        ValueError: A key has no official name.
    """
    head = next((root for root in HEADS if f'{root}.predictor.class_embed.weight' in state), None)
    official = rename_back(state, official_key)
    if head is None:
        return official
    official = {key if key.startswith(_SEGMENTOR) else f'backbone.{key}': value for key, value in official.items()}
    rows = state[f'{head}.predictor.class_embed.weight']
    official[_CLASS_WEIGHTS] = rows.new_tensor([1.0] * (len(rows) - 1) + [_NO_OBJECT_WEIGHT])
    return official


def infer_aff_arch(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The ``arch`` of :class:`boltz_mm.models.backbones.aff.AFF` that fits a converted state dict.

    Args:
        state: Result of :func:`convert_aff`.

    Returns:
        Widths, depths, heads, MLP ratio, layer scale.

    Raises:
        ValueError: The backbone is not complete.
    """
    stages = [f'backbone.layers.{i}.blocks.' for i in range(count_modules(state, 'backbone.layers.'))]
    embed_dims = [shape_of(state, f'{stage}0.norm1.weight')[0] for stage in stages]
    if not embed_dims:
        raise ValueError("the state dict holds no backbone: 'backbone.layers' is missing")
    return {
        'embed_dims': embed_dims,
        'depths': [count_modules(state, stage) for stage in stages],
        'num_heads': [shape_of(state, f'{stage}0.attn.pos_embed.weight')[0] for stage in stages],
        'mlp_ratio': shape_of(state, f'{stages[0]}0.mlp.fc1.weight')[0] / embed_dims[0],
        'layer_scale': _LAYER_SCALE if f'{stages[0]}0.gamma1' in state else 0.0,
    }


def infer_aff_classifier_config(state: Mapping[str, Tensor], **backbone: Any) -> dict:
    """A config of the classifier that fits a converted state dict.

    Args:
        state: Result of :func:`convert_aff`, of a whole classifier.
        **backbone: Further settings of :class:`boltz_mm.models.backbones.aff.AFF`, those that weights do not tell.

    Returns:
        Config for ``MODELS.build``, without means and deviations of images.

    Raises:
        ValueError: The state dict is not that of a whole classifier.
    """
    num_classes, in_channels = shape_of(state, 'head.fc.weight')
    return {
        'type': 'mmpretrain.ImageClassifier',
        'backbone': {'type': 'boltz_mm.AFF', 'arch': infer_aff_arch(state), 'out_type': 'avg', **backbone},
        'head': {
            'type': 'mmpretrain.LinearClsHead',
            'num_classes': num_classes,
            'in_channels': in_channels,
            'loss': {'type': 'mmpretrain.CrossEntropyLoss'},
        },
        # Named with its scope: the classifier would look for its own default in the scope of the moment.
        'data_preprocessor': {'type': 'mmpretrain.ClsDataPreprocessor'},
    }


def infer_aff_segmentor_config(
    state: Mapping[str, Tensor], head: str = 'panoptic_head', power: float = 3.0, **backbone: Any
) -> ConfigDict:
    """A config of the segmentor that fits a converted state dict.

    Args:
        state: Result of :func:`convert_aff`, of a whole segmentor.
        head: 'panoptic_head' for a detector of mmdet (all classes are things then: weights do not tell), or
            'decode_head' for mmseg's ``EncoderDecoder``.
        power: Exponent of the interpolation where it is not learned (2 in the official COCO models).
        **backbone: Further settings of :class:`boltz_mm.models.backbones.aff.AFF`, those that weights do not tell.

    Returns:
        Config for ``MODELS.build``, without means and deviations of images.

    Raises:
        ValueError: The state dict is not that of a whole segmentor.
    """
    arch = infer_aff_arch(state)
    pixel, predictor = f'{head}.pixel_decoder.', f'{head}.predictor.'
    encoder = f'{pixel}transformer.encoder.layers.'
    num_classes = shape_of(state, f'{predictor}class_embed.weight')[0] - 1
    out_channels, feat_channels = shape_of(state, f'{pixel}mask_features.weight')
    num_levels = len(arch['embed_dims']) - 1
    num_queries, embed_dims = shape_of(state, f'{predictor}query_feat.weight')
    # 4 points for each head and level, and as many heads in both decoders, as in all official models.
    num_heads = shape_of(state, f'{encoder}0.self_attn.attention_weights.weight')[0] // (4 * num_levels)
    config: dict[str, Any] = {
        'in_channels': arch['embed_dims'],
        'feat_channels': feat_channels,
        'out_channels': out_channels,
        'num_queries': num_queries,
        'pixel_decoder': {
            'num_heads': num_heads,
            'num_layers': count_modules(state, encoder),
            'feedforward_channels': shape_of(state, f'{encoder}0.linear1.weight')[0],
            'power': power,
            'learnable_power': f'{encoder}0.self_attn.shepard_power' in state,
        },
        'transformer_decoder': {
            'embed_dims': embed_dims,
            'num_heads': num_heads,
            'num_layers': count_modules(state, f'{predictor}transformer_ffn_layers.'),
            'feedforward_channels': shape_of(state, f'{predictor}transformer_ffn_layers.0.linear1.weight')[0],
            'enforce_input_project': f'{predictor}input_proj.0.weight' in state,
        },
    }
    body = {'type': 'boltz_mm.AFF', 'arch': arch, 'out_type': 'points', **backbone}
    if head == 'decode_head':
        config = {'type': 'boltz_mm.PointMask2FormerSegHead', 'num_classes': num_classes, **config}
        return ConfigDict(type='mmseg.EncoderDecoder', backbone=body, decode_head=config)
    classes = {'num_things_classes': num_classes, 'num_stuff_classes': 0}
    return ConfigDict(
        type='boltz_mm.PointMask2Former',
        backbone=body,
        panoptic_head={'type': 'boltz_mm.PointMask2FormerHead', **classes, **config},
        panoptic_fusion_head={'type': 'boltz_mm.PointMaskFusionHead', **classes},
    )
