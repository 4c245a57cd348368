"""A server with weights, a scratch copy of the checkout whose metafile names them, and its wheel."""

import functools
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.packaging.environments import copy_checkout, run


@pytest.fixture(scope='session')
def weights_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web server on this machine with one file, ``tiny.pth``."""
    folder = tmp_path_factory.mktemp('server')
    (folder / 'tiny.pth').write_bytes(b'some weights')
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.fixture(scope='session')
def checkout(tmp_path_factory: pytest.TempPathFactory, weights_server: str) -> Path:
    """A scratch copy, in a path with a blank and a letter beyond ASCII, whose tiny config has weights on the server."""
    copy = copy_checkout(tmp_path_factory.mktemp('scratch') / 'a path é' / 'boltz')
    metafile = copy / 'configs' / 'boxer' / 'metafile.yml'
    entry = 'Config: configs/boxer/boxer_tiny_shapes.py\n'
    text = metafile.read_text()
    assert entry in text
    metafile.write_text(text.replace(entry, f'{entry}    Weights: {weights_server}/tiny.pth\n'))
    return copy


@pytest.fixture(scope='session')
def wheel(checkout: Path) -> Path:
    """The wheel of the scratch copy, built as ``make wheel`` builds it."""
    pip = (sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation')
    run(*pip, '--wheel-dir', checkout / 'dist', checkout, cwd=checkout)
    (built,) = (checkout / 'dist').glob('*.whl')
    return built
