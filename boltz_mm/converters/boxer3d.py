"""Official BoxeR-3D weights to ours and back.

Containers are those of BoxeR-2D (:mod:`boltz_mm.converters.boxer`).  Tensors are never changed, only renamed: pillar
layers, encoder and decoder keep their names below another prefix.  Numbers that a file holds (classes, widths, depths)
are read from it by :func:`infer_boxer3d_config`; nothing in a file tells the range of the points, the size of the
pillars, strides or the number of queries.
"""

import re
from collections.abc import Iterable, Mapping

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

# Official prefix and ours; {0} and {1} stand for numbers.
_PREFIXES = (
    ('backbone.reader.', 'backbone.reader.'),
    ('backbone.neck.ds_layers.{0}.{1}.0.', 'backbone.stages.{0}.{1}.conv.'),
    ('backbone.neck.ds_layers.{0}.{1}.1.', 'backbone.stages.{0}.{1}.bn.'),
    ('input_proj.{0}.0.', 'neck.convs.{0}.conv.'),
    ('input_proj.{0}.1.', 'neck.convs.{0}.gn.'),
    ('transformer.encoder.', 'encoder.'),
    ('transformer.decoder.', 'decoder.'),
    ('enc_detector.class_embed.', 'bbox_head.enc_cls_branch.'),
    ('enc_detector.bbox_embed.', 'bbox_head.enc_reg_branch.'),
    ('detector.class_embed.', 'bbox_head.cls_branch.'),
    ('detector.bbox_embed.', 'bbox_head.reg_branch.'),
)


def convert_boxer3d(container: Mapping, model: nn.Module | None = None) -> tuple[StateDict, ConversionReport]:
    """Convert official weights.

    Args:
        container: What an official file holds: a training container or a bare state dict, with or without the prefix
            ``module.``.
        model: The detector that will get the weights (may lie on the meta device); tells what is missing or has
            another shape.

    Returns:
        The state dict for :class:`boltz_mm.models.detectors.BoxeR3D` and what became of each key.

    Raises:
        ValueError: The container holds no weights of BoxeR-3D.
    """
    official = official_state_dict(container)
    state, report = rename(official, our_key)
    if 'bbox_head.cls_branch.weight' not in state or not any(name.startswith('backbone.reader.') for name in state):
        raise ValueError(f'no weights of a whole BoxeR-3D among {sorted(official)[:5]} ...')
    report.num_classes = len(state['bbox_head.cls_branch.weight'])
    if model is not None:
        compare_with_model(state, model, report)
    return state, report


def export_boxer3d(state: Mapping[str, Tensor]) -> StateDict:
    """Rename our state dict to the official layout (without container and prefix).

    Args:
        state: State dict of :class:`boltz_mm.models.detectors.BoxeR3D`.

    Returns:
        The official state dict.

    Raises:
        ValueError: A key has no official name.
    """
    return rename_back(state, official_key)


def our_key(key: str) -> str | None:
    """Our name of an official key (without ``module.``), or ``None``."""
    return _replace_prefix(key, _PREFIXES)


def official_key(key: str) -> str | None:
    """The official name of one of our keys, or ``None``."""
    return _replace_prefix(key, [(ours, theirs) for theirs, ours in _PREFIXES])


def _replace_prefix(key: str, prefixes: Iterable[tuple[str, str]]) -> str | None:
    for old, new in prefixes:
        pattern = re.escape(old).replace(r'\{0\}', r'(\d+)').replace(r'\{1\}', r'(\d+)')
        match = re.match(pattern, key)
        if match:
            return new.format(*match.groups()) + key[match.end() :]
    return None


def infer_boxer3d_config(state: Mapping[str, Tensor], **backbone: object) -> dict:
    """A config of ``boltz_mm.BoxeR3D`` that fits a converted state dict.

    Args:
        state: Result of :func:`convert_boxer3d`.
        **backbone: What is not in the weights and differs from the published model: ``voxel_size``,
            ``point_cloud_range``, ``max_points``, ``max_voxels``, ``stage_strides`` of ``PillarNet``.

    Returns:
        Config for ``MODELS.build``.

    Raises:
        ValueError: The state dict is not that of a whole model.
    """
    num_classes, width = shape_of(state, 'bbox_head.cls_branch.weight')
    pillar_layers = count_modules(state, 'backbone.reader.pfn_layers.')
    units = [shape_of(state, f'backbone.reader.pfn_layers.{i}.linear.weight')[0] for i in range(pillar_layers)]
    stages = range(count_modules(state, 'backbone.stages.'))
    stage_channels = [shape_of(state, f'backbone.stages.{i}.0.conv.weight')[0] for i in stages]
    levels = count_modules(state, 'neck.convs.')
    layer = {
        'embed_dims': width,
        'num_levels': levels,
        'feedforward_channels': shape_of(state, 'encoder.layers.0.linear1.weight')[0],
    }
    head: dict = {
        'type': 'boltz_mm.BoxeR3DHead',
        'num_classes': num_classes,
        'embed_dims': width,
        'num_anchors': shape_of(state, 'bbox_head.enc_cls_branch.weight')[0],
    }
    if 'point_cloud_range' in backbone:
        head['bbox_coder'] = {'type': 'boltz_mm.Box3dCoder', 'point_cloud_range': backbone['point_cloud_range']}
    return {
        'type': 'boltz_mm.BoxeR3D',
        'backbone': {
            'type': 'boltz_mm.PillarNet',
            'in_channels': shape_of(state, 'backbone.reader.pfn_layers.0.linear.weight')[1] - 5,
            'feat_channels': [2 * n for n in units[:-1]] + units[-1:],
            'stage_layers': [count_modules(state, f'backbone.stages.{i}.') for i in stages],
            'stage_channels': stage_channels,
            'out_indices': list(stages)[-levels:],
            **backbone,
        },
        'neck': {'type': 'boltz_mm.BoxeRNeck', 'in_channels': stage_channels[-levels:], 'out_channels': width},
        'encoder': {'num_layers': count_modules(state, 'encoder.layers.'), 'layer_cfg': layer},
        'decoder': {'num_layers': count_modules(state, 'decoder.layers.'), 'layer_cfg': layer},
        'bbox_head': head,
    }
