"""Official AutoFocusFormer weights to ours and back.

Understood are the classification container (``model``, ``model_ema`` beside optimizer and schedule), the detectron2
container of the segmentors (``model``), ``{'state_dict': ...}`` and bare state dicts, each with or without the prefix
``module.``.  Tensors are never changed, only renamed.

Numbers that a file holds (widths, depths, heads, classes) are read from it by :func:`infer_aff_arch`; nothing in a file
tells the cluster size, the share of tokens kept, or the factor of the importance.
"""

import re
from collections.abc import Mapping
from typing import Any

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

_STAGE = r'layers\.\d+\.(blocks\.\d+|downsample|prob_net)\..+'
_BACKBONE = re.compile(rf'patch_embed\.(proj1|bn|proj2|norm)\.\w+|{_STAGE}|norm[0-9]*\.(weight|bias)')
_HEAD = {'head.weight': 'head.fc.weight', 'head.bias': 'head.fc.bias'}
_LAYER_SCALE = 1e-5  # start value in all published configs that have factors


def convert_aff(
    container: Mapping, model: nn.Module | None = None, *, ema: bool = False, backbone_only: bool = False
) -> tuple[StateDict, ConversionReport]:
    """Convert official weights.

    Args:
        container: What an official file holds, see the module's text.
        model: The model that will get the weights (may lie on the meta device); tells what is missing or has another
            shape.
        ema: Take the averaged weights, ``model_ema``.
        backbone_only: Of a classifier, leave out the output norm and the classifier: what a detector or segmentor
            starts from.  Its own output norms keep their initialisation, as officially.

    Returns:
        The state dict for mmpretrain's ``ImageClassifier`` with ``LinearClsHead`` (or for a detector's backbone), and
        what became of each key.

    Raises:
        ValueError: The container holds no weights of AutoFocusFormer, or none that are averaged.
    """
    if ema:
        if 'model_ema' not in container:
            raise ValueError(f"the file has no averaged weights 'model_ema'; it has {sorted(map(str, container))[:8]}")
        container = {'model': container['model_ema']}
    official = official_state_dict(container)
    state, report = rename(official, our_classifier_key)
    if not any('layers.' in name for name in state):
        raise ValueError(f'no weights of AutoFocusFormer among {sorted(official)[:5]} ...')
    if 'head.fc.weight' in state:
        report.num_classes = len(state['head.fc.weight'])
    if backbone_only:
        report.dropped = [key for key in report.renamed if key.startswith(('norm.', 'head.'))]
        for key in report.dropped:
            del state[report.renamed.pop(key)]
    if model is not None:
        compare_with_model(state, model, report)
    return state, report


def our_classifier_key(key: str) -> str | None:
    """Our name of a key of an official classifier, or ``None``."""
    if _BACKBONE.fullmatch(key):
        return f'backbone.{key}'
    return _HEAD.get(key)


def official_classifier_key(key: str) -> str | None:
    """The official name of a key of our classifier, or ``None``; see :func:`our_classifier_key`."""
    plain = key.removeprefix('backbone.')
    if key != plain and _BACKBONE.fullmatch(plain):
        return plain
    return {ours: theirs for theirs, ours in _HEAD.items()}.get(key)


def export_aff(state: Mapping[str, Tensor]) -> StateDict:
    """Rename our state dict of a classifier to the official layout (without container).

    Args:
        state: State dict of ``ImageClassifier`` with :class:`boltz_mm.models.backbones.aff.AFF`.

    Returns:
        The official state dict.

    Raises:
        ValueError: A key has no official name.
    """
    return rename_back(state, official_classifier_key)


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
        Config for ``MODELS.build``, without data preprocessor.

    Raises:
        ValueError: The state dict is not that of a whole classifier.
    """
    num_classes, in_channels = shape_of(state, 'head.fc.weight')
    return {
        'type': 'mmpretrain.ImageClassifier',
        'backbone': {'type': 'boltz_mm.AFF', 'arch': infer_aff_arch(state), 'out_type': 'avg', **backbone},
        'head': {'type': 'mmpretrain.LinearClsHead', 'num_classes': num_classes, 'in_channels': in_channels},
    }
