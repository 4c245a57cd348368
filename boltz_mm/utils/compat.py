"""Repairs for the libraries around us, each acting only where it is needed.

torchvision: mmpretrain, and through it mmdet and mmseg, import torchvision.  Its wheels are built against the CUDA
torch, so beside a CPU torch the compiled part does not load, and the Python part then dies with ``operator
torchvision::nms does not exist`` while it registers two fake kernels.  Declaring the two schemas is enough to make the
Python part importable; nothing of it that we use needs the compiled operators.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TORCHVISION_SCHEMAS = (
    'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
)
# The first modules that torchvision imports after it has tried to load its compiled part.
_AFTER_EXTENSION = frozenset({'torchvision._autograd_registrations', 'torchvision._meta_registrations'})

_libraries: list[Any] = []  # a torch.library.Library withdraws its schemas when it is collected


def declare_torchvision_schemas() -> bool:
    """Declare the two schemas that torchvision's Python part needs, if its compiled part has not.

    Returns:
        Whether anything was declared.
    """
    import torch

    missing = [
        schema for schema in _TORCHVISION_SCHEMAS if not hasattr(torch.ops.torchvision, schema.partition('(')[0])
    ]
    if missing:
        library = torch.library.Library('torchvision', 'FRAGMENT')
        for schema in missing:
            library.define(schema)
        _libraries.append(library)
    return bool(missing)


class TorchvisionRepair(MetaPathFinder):
    """A finder that finds nothing: it mends torchvision halfway through its import, if that import is about to fail."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find nothing; between two imports of torchvision's own, look whether its compiled part has loaded."""
        if fullname in _AFTER_EXTENSION:
            extension = sys.modules.get('torchvision.extension')
            if extension is not None and not extension._has_ops():
                declare_torchvision_schemas()
        return None


def install_torchvision_repair() -> None:
    """Watch for an import of torchvision.  Costs nothing until then; does nothing when called again."""
    if not any(isinstance(finder, TorchvisionRepair) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionRepair())
