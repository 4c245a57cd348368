"""The embedded dataset "shapes": made by code from a seed, in COCO's layout, for every task of the package.

Pictures of textured backgrounds with shapes that cover each other; see :mod:`boltz_mm.datasets.shapes.writer` for the
files and ``tools/dataset_converters/make_shapes.py`` for the command.
"""

from boltz_mm.datasets.shapes.classes import (
    COLORS,
    PATTERNS,
    STUFF_CLASSES,
    THING_CLASSES,
    instance_metainfo,
    panoptic_metainfo,
    semantic_metainfo,
)
from boltz_mm.datasets.shapes.scene import Instance, Scene, make_classification_scene, make_scene
from boltz_mm.datasets.shapes.spec import VERSION, ShapesSpec
from boltz_mm.datasets.shapes.writer import make_shapes, read_manifest

__all__ = [
    'COLORS', 'PATTERNS', 'STUFF_CLASSES', 'THING_CLASSES', 'VERSION', 'Instance', 'Scene', 'ShapesSpec',
    'instance_metainfo', 'make_classification_scene', 'make_scene', 'make_shapes', 'panoptic_metainfo',
    'read_manifest', 'semantic_metainfo',
]  # fmt: skip
