"""boltz_mm: published detectors and segmentors of small things as an OpenMMLab plugin.

Importing the package is cheap and silent: it only tells mmengine, where mmengine is installed, that configs may say
``_base_ = 'boltz_mm::...'``, and watches for an import of torchvision that needs a repair.  Models, datasets and hooks
are imported by the registries of :mod:`boltz_mm.registry` on first use; :mod:`boltz_mm.ops` needs torch alone.
"""

from boltz_mm.utils.compat import install_torchvision_repair
from boltz_mm.utils.config_scope import register_config_scope
from boltz_mm.version import __version__

install_torchvision_repair()
register_config_scope()

__all__ = ['__version__']
