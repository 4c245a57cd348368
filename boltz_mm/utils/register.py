"""Import everything that registers itself; what mmengine.hub and user scripts call before they build a model."""

import datetime
import importlib
import warnings

_SCOPE = 'boltz_mm'
_PACKAGES = (
    'boltz_mm.models',
    'boltz_mm.datasets',
    'boltz_mm.engine',
    'boltz_mm.evaluation',
    'boltz_mm.visualization',
)


def register_all_modules(init_default_scope: bool = True) -> None:
    """Import all registered classes of the package.

    Args:
        init_default_scope: Whether to make ``boltz_mm`` the default scope as well, so that configs need no prefix.
            Another scope that is current is replaced, with a warning.
    """
    from mmengine.registry import DefaultScope

    for package in _PACKAGES:
        importlib.import_module(package)
    if not init_default_scope:
        return
    current = DefaultScope.get_current_instance()
    if current is not None and current.scope_name == _SCOPE:
        return
    if current is not None:
        warnings.warn(
            f"the default scope '{current.scope_name}' is replaced by '{_SCOPE}'; "
            'register_all_modules(init_default_scope=False) leaves it as it is',
            stacklevel=2,
        )
    stamp = datetime.datetime.now().strftime('%Y%m%d%H%M%S%f')
    DefaultScope.get_instance(f'{_SCOPE}-{stamp}', scope_name=_SCOPE)
