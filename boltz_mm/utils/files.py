"""Writing files so that a crash leaves either the old file or the new one, and fetching files over https.

Everything that the package saves goes through :func:`atomic_path`: the bytes are written under a temporary name in
the same folder, flushed to the disk and moved over the old file in one step.
"""

import contextlib
import hashlib
import http.client
import os
import re
import secrets
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY_SUFFIX = '.boltz-tmp'
_CHUNK = 1 << 20
_HASH_IN_NAME = re.compile(r'-([0-9a-f]{6,64})\.[A-Za-z0-9.]+$')


class WriteError(OSError):
    """A file could not be written; what stood there before is untouched."""


class DownloadError(RuntimeError):
    """A file could not be fetched, or is not the file that its name promises."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it over ``path`` when the block ends without an exception.

    On any exception, Ctrl-C included, the temporary file is removed and ``path`` keeps its old content.  A symbolic
    link is followed: its target is replaced, not the link.

    Args:
        path: File to create or replace; missing folders are created.

    Raises:
        WriteError: The operating system refused (disk full, no permission); names the file and the reason.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f'.{target.name}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}'
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Created here, not by the writer, so that the mode follows the umask and no other process can own the name.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, target)
        _flush_folder(target.parent)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            error.errno, f'could not write {path}: {error.strerror or error}; the previous file, if any, is intact'
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | os.PathLike, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path`` in one step; see :func:`atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        file.write(content)


def atomic_write_text(path: str | os.PathLike, content: str, encoding: str = 'utf-8') -> None:
    """Write text to ``path`` in one step; see :func:`atomic_path`."""
    atomic_write_bytes(path, content.encode(encoding))


def remove_stale_temporaries(folder: str | os.PathLike) -> list[Path]:
    """Delete what writers that were killed outright (power cut, ``kill -9``) left in ``folder``.

    Only call it where no other process is writing.

    Returns:
        The deleted files.
    """
    stale = sorted(Path(folder).glob(f'.*{_TEMPORARY_SUFFIX}'))
    for file in stale:
        file.unlink(missing_ok=True)
    return stale


def _flush_to_disk(path: Path) -> None:
    with open(path, 'r+b') as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    # Without this a power cut may forget the rename.  Not every system can open a folder; then there is no more to do.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cache_folder() -> Path:
    """The folder of fetched files: ``${XDG_CACHE_HOME:-~/.cache}/boltz_mm``."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'boltz_mm'


def sha256_of(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(
    url: str,
    folder: str | os.PathLike | None = None,
    *,
    max_bytes: int = 8 << 30,
    timeout: float = 30.0,
) -> Path:
    """Fetch a file once and keep it.

    Where the name ends like ``name-0676ba61.pth`` the hexadecimal part must be the beginning of the file's SHA-256,
    both for a fresh file and for one found in the cache.

    Args:
        url: Address; https only, redirects included.
        folder: Where to keep it. Default: ``checkpoints`` in :func:`cache_folder`.
        max_bytes: Refuse anything larger.
        timeout: Seconds without an answer after which to give up.

    Returns:
        Path of the local copy.

    Raises:
        DownloadError: Not https, too large, unreachable, cut short, or the hash differs.
    """
    parts, shown = urllib.parse.urlsplit(url), _shown(url)
    if parts.scheme != 'https':
        raise DownloadError(f'{shown}: only https addresses are fetched')
    name = Path(urllib.parse.unquote(parts.path)).name
    if not re.fullmatch(r'[\w.+-]+', name) or name.startswith('.'):
        raise DownloadError(f'{shown}: the address does not end in a plain file name')
    match = _HASH_IN_NAME.search(name)
    prefix = match.group(1) if match else ''
    home = Path(folder) if folder is not None else cache_folder() / 'checkpoints'
    # Files of one name from different places must not be taken for each other.
    target = home / hashlib.sha256(url.encode()).hexdigest()[:12] / name
    if target.is_file() and sha256_of(target).startswith(prefix):
        return target
    with atomic_path(target) as temporary:
        _fetch(url, temporary, max_bytes, timeout, shown)
        found = sha256_of(temporary)
        if not found.startswith(prefix):
            raise DownloadError(f'{shown}: the SHA-256 begins with {found[: len(prefix)]}, the name says {prefix}')
    return target


def _shown(url: str) -> str:
    """An address as messages name it: without user, password and query."""
    parts = urllib.parse.urlsplit(url)
    return f'{parts.scheme}://{parts.hostname or ""}{parts.path}'


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme != 'https':
            raise DownloadError(f'{_shown(req.full_url)}: redirected to {_shown(newurl)}, which is not https')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, timeout: float):
    return urllib.request.build_opener(_HttpsOnly).open(url, timeout=timeout)


def _fetch(url: str, target: Path, max_bytes: int, timeout: float, shown: str) -> None:
    try:
        with _open(url, timeout) as answer, open(target, 'wb') as file:
            declared = answer.headers.get('Content-Length')
            expected = int(declared) if declared and declared.isdigit() else None
            if expected is not None and expected > max_bytes:
                raise DownloadError(f'{shown}: {expected} bytes, more than the limit of {max_bytes}')
            received = 0
            while chunk := answer.read(_CHUNK):
                received += len(chunk)
                if received > max_bytes:
                    raise DownloadError(f'{shown}: more than the limit of {max_bytes} bytes')
                file.write(chunk)
    except TimeoutError as error:
        raise DownloadError(f'{shown}: no answer within {timeout:g} s') from error
    except urllib.error.URLError as error:
        raise DownloadError(f'{shown}: {error.reason}') from error
    except (ConnectionError, http.client.HTTPException) as error:
        raise DownloadError(f'{shown}: the connection broke: {error}') from error
    if expected is not None and received != expected:
        raise DownloadError(f'{shown}: the connection ended after {received} of {expected} bytes')
