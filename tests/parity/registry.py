"""The table from a case's kind to the function that runs our code on it.

Each module of ``tests/parity/handlers`` adds rows with :func:`handler`.  A handler builds our part with the case's
kwargs, loads the official weights through ``boltz_mm.converters``, runs it, and returns our value for every name in
``case.names_to_hold()`` (names that the case does not check are ignored).
"""

import importlib
import pkgutil
from collections.abc import Callable

from tests.parity import handlers
from tests.parity.case import Case, Produced

Handler = Callable[[Case], Produced]
_HANDLERS: dict[tuple[str, str], Handler] = {}


def handler(system: str, *kinds: str) -> Callable[[Handler], Handler]:
    """Register a function for the given kinds of a system's cases."""

    def add(function: Handler) -> Handler:
        for kind in kinds:
            if (system, kind) in _HANDLERS:
                raise ValueError(f'two handlers for {system}/{kind}')
            _HANDLERS[system, kind] = function
        return function

    return add


def find_handler(case: Case) -> Handler:
    """The handler of a case.

    Raises:
        KeyError: Nothing of ours is mapped to this kind.
    """
    for module in pkgutil.iter_modules(handlers.__path__):
        importlib.import_module(f'{handlers.__name__}.{module.name}')
    try:
        return _HANDLERS[case.system, case.kind]
    except KeyError:
        raise KeyError(f'no handler for kind {case.kind!r} of system {case.system!r}') from None
