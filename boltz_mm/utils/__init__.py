"""Small helpers that import nothing else of the package: checkpoints, files, version shims."""

from boltz_mm.utils.register import register_all_modules

__all__ = ['register_all_modules']
