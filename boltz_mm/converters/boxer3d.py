"""Official BoxeR-3D checkpoints to the names of ``boltz_mm.BoxeR3D``.

Source of the names: official repository kienduynguyen/BoxeR, ``model/boxer3d.py`` and the modules it builds.  Tensors
are taken as they are; only names change.  The pillar layers, encoder and decoder keep their names below the new prefix.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_RULES = (
    (r'backbone\.reader\.', r'backbone.reader.'),
    (r'backbone\.neck\.ds_layers\.(\d+)\.(\d+)\.0\.', r'backbone.stages.\1.\2.conv.'),
    (r'backbone\.neck\.ds_layers\.(\d+)\.(\d+)\.1\.', r'backbone.stages.\1.\2.bn.'),
    (r'input_proj\.(\d+)\.0\.', r'neck.convs.\1.conv.'),
    (r'input_proj\.(\d+)\.1\.', r'neck.convs.\1.gn.'),
    (r'transformer\.(encoder|decoder)\.', r'\1.'),
    (r'enc_detector\.class_embed\.', r'bbox_head.enc_cls_branch.'),
    (r'enc_detector\.bbox_embed\.', r'bbox_head.enc_reg_branch.'),
    (r'detector\.class_embed\.', r'bbox_head.cls_branch.'),
    (r'detector\.bbox_embed\.', r'bbox_head.reg_branch.'),
)


def rename_boxer3d_key(key: str) -> str | None:
    """Our name of an official parameter or buffer (without ``module.``), or ``None`` if it is not one of BoxeR-3D."""
    for pattern, replacement in _RULES:
        renamed, count = re.subn(rf'^{pattern}', replacement, key)
        if count:
            return renamed
    return None


def convert_boxer3d(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Convert an official checkpoint.

    Args:
        checkpoint: A training container (its weights under ``model``) or a bare state dict; names may carry the prefix
            ``module.`` of several GPUs.

    Returns:
        The state dict of ``boltz_mm.BoxeR3D``, and the official names that have no place in it.
    """
    weights = checkpoint.get('model', checkpoint)
    converted, unexpected = {}, []
    for key, value in weights.items():
        renamed = rename_boxer3d_key(key.removeprefix('module.'))
        if renamed is None:
            unexpected.append(key)
        else:
            converted[renamed] = value
    return converted, unexpected
