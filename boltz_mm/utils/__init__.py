"""What stands on its own: safe checkpoint reading, atomic files, launching, repairs of the libraries around us.

Nothing here imports another part of the package, but for two modules whose purpose it is to look at all of it, by name
and when called: ``register`` and ``collect_env``.
"""

from boltz_mm.utils.register import register_all_modules

__all__ = ['register_all_modules']
