"""Make ``boltz_mm::...`` known to mmengine's configs, from a wheel and from an editable install.

mmengine resolves ``_base_ = 'package::file'`` and ``mmengine.hub.get_config('package::file')`` through its own table
of packages and looks for the file in the package's ``.mim`` folder.  A wheel of ours carries that folder; a source
checkout must not (mim would find every config twice), so there the look-ups fall back to the ``configs`` folder and
the ``model-index.yml`` beside the package.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGE = 'boltz_mm'
_PACKAGE_DIR = Path(__file__).resolve().parents[1]
# Modules that copy the look-up functions into their own namespace; hub is heavy and patched only if already there.
_HOLDERS = ('mmengine.config.utils', 'mmengine.config.config', 'mmengine.hub.hub')


def register_config_scope() -> None:
    """Teach mmengine the scope; does nothing where mmengine is not installed, or when called again."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of the libraries below; nobody asked us for them
            from mmengine.config import utils
    except ImportError:
        return
    if _PACKAGE in utils.MODULE2PACKAGE:
        return
    utils.MODULE2PACKAGE[_PACKAGE] = _PACKAGE
    _replace(utils, '_get_external_cfg_base_path', _base_path)
    _replace(utils, '_get_cfg_metainfo', _metainfo)


def _is_checkout(package_path: str) -> bool:
    """Whether ``package_path`` is this package, standing in a source tree instead of an installed wheel."""
    return Path(package_path).resolve() == _PACKAGE_DIR and not (_PACKAGE_DIR / '.mim').exists()


def _replace(utils: Any, name: str, fallback: Callable[[Path, str], Any]) -> None:
    """Wrap mmengine's look-up ``name``, in every module that holds it, to use ``fallback`` in a checkout."""
    original = getattr(utils, name)

    @functools.wraps(original)
    def wrapper(package_path: str, cfg_path: str) -> Any:
        if _is_checkout(package_path):
            return fallback(_PACKAGE_DIR.parent, cfg_path)
        return original(package_path, cfg_path)

    for holder in map(sys.modules.get, _HOLDERS):
        if getattr(holder, name, None) is original:
            setattr(holder, name, wrapper)


def _base_path(checkout: Path, cfg_path: str) -> str:
    path = checkout / 'configs' / cfg_path
    if not path.is_file():
        raise FileNotFoundError(f"there is no config '{_PACKAGE}::{cfg_path}': {path} does not exist")
    return str(path)


def _metainfo(checkout: Path, cfg_path: str) -> dict:
    """The metafile entry of a config, its ``Config`` as an absolute path (which os.path.join leaves as it is).

    Raises:
        ValueError: If no metafile names the config; mmengine then looks for the plain file.
    """
    from mmengine.fileio import load

    for metafile in load(str(checkout / 'model-index.yml'))['Import']:
        for model in load(str(checkout / metafile)).get('Models') or []:
            if model.get('Config') == f'configs/{cfg_path}':
                return {**model, 'Config': str(checkout / model['Config'])}
    raise ValueError(f"no metafile has an entry for '{_PACKAGE}::{cfg_path}'")
