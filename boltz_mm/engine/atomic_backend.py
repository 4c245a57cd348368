"""mmengine's local file backend with writes that happen in one step or not at all."""

from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from boltz_mm.utils.files import atomic_write_bytes, atomic_write_text

ATOMIC_BACKEND = 'boltz_mm.atomic'


class AtomicLocalBackend(LocalBackend):
    """Local files; an interrupted or failed write leaves the old file and no fragments.

    Use it wherever mmengine takes ``backend_args``: ``dict(backend='boltz_mm.atomic')``.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes; see :func:`boltz_mm.utils.files.atomic_path` for errors."""
        atomic_write_bytes(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text; see :func:`boltz_mm.utils.files.atomic_path` for errors."""
        atomic_write_text(filepath, obj, encoding)


register_backend(ATOMIC_BACKEND, AtomicLocalBackend, force=True)
