"""Make ``boltz_mm::...`` known to mmengine's configs, from a wheel and from an editable install.

mmengine resolves ``_base_ = 'package::file'`` through its own table of packages and looks for the file in the
package's ``.mim`` folder.  A wheel of ours carries that folder; a source checkout must not (mim would find every
config twice), so there the look-up falls back to the ``configs`` folder beside the package.
"""

from pathlib import Path

_PACKAGE = 'boltz_mm'
_CHECKOUT = Path(__file__).resolve().parents[2]


def register_config_scope() -> None:
    """Teach mmengine the scope; does nothing where mmengine is not installed, or when called again."""
    try:
        from mmengine.config import config as config_module
        from mmengine.config import utils as config_utils
    except ImportError:
        return
    config_utils.MODULE2PACKAGE.setdefault(_PACKAGE, _PACKAGE)
