"""Atomic writing, and fetching that trusts nobody."""

import hashlib
import http.client
import io
import os
import stat
import threading
import urllib.error
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from boltz_mm.utils import files
from boltz_mm.utils.checkpoint import CheckpointError, read_checkpoint


def test_replaces_in_one_step(tmp_path):
    target = tmp_path / 'deep' / 'a.txt'
    files.atomic_write_text(target, 'one')
    with files.atomic_path(target) as temporary:
        temporary.write_text('two')
        assert target.read_text() == 'one' and temporary.parent == target.parent
    assert target.read_text() == 'two' and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, SystemExit])
def test_any_exception_keeps_the_old_file(tmp_path, error):
    files.atomic_write_text(tmp_path / 'a', 'old')
    with pytest.raises(error), files.atomic_path(tmp_path / 'a') as temporary:
        temporary.write_text('half')
        raise error
    assert (tmp_path / 'a').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.atomic_write_bytes(tmp_path / 'a', b'x')
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / 'a').stat().st_mode) == 0o640


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(files.WriteError, match='could not write'):
        files.atomic_write_bytes(tmp_path / 'file' / 'a', b'x')


class _Answer(io.BytesIO):
    def __init__(self, content, length=None):
        super().__init__(content)
        self.headers = {'Content-Length': str(len(content) if length is None else length)}


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Addresses and what they answer; the cache is in the temporary folder."""
    answers = {}

    def open_(url, timeout):
        answer = answers[url]
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else _Answer(answer)

    monkeypatch.setattr(files, '_open', open_)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return answers


def _weights():
    buffer = io.BytesIO()
    torch.save({'state_dict': {'w': torch.ones(3)}}, buffer)
    return buffer.getvalue()


def test_fetches_once_and_checks_the_hash(served, tmp_path):
    content = _weights()
    url = f'https://example.org/a/model-{hashlib.sha256(content).hexdigest()[:8]}.pth'
    served[url] = content
    assert read_checkpoint(url)['state_dict']['w'].sum() == 3
    path = files.download(url)
    assert path.is_relative_to(tmp_path / 'cache' / 'boltz_mm') and path.read_bytes() == content
    served[url] = RuntimeError('asked twice')
    assert files.download(url) == path
    path.write_bytes(b'rotten')  # a damaged copy is fetched anew
    served[url] = content
    assert files.download(url).read_bytes() == content


def test_wrong_hash_leaves_nothing(served, tmp_path):
    served['https://example.org/model-01234567.pth'] = b'other'
    with pytest.raises(CheckpointError, match='model-01234567.pth: the SHA-256 begins with .*the name says 01234567'):
        read_checkpoint('https://example.org/model-01234567.pth')
    assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]


def test_same_name_from_two_places(served):
    served['https://one.org/m.pth'], served['https://two.org/m.pth'] = b'1', b'2'
    assert files.download('https://one.org/m.pth').read_bytes() == b'1'
    assert files.download('https://two.org/m.pth').read_bytes() == b'2'


@pytest.mark.parametrize(
    ('url', 'words'),
    [
        ('http://example.org/a.pth', 'only https'),
        ('ftp://example.org/a.pth', 'only https'),
        ('https://example.org/', 'plain file name'),
        ('https://example.org/a/..%2f..%2fetc%2fpasswd;', 'plain file name'),
        ('https://example.org/.hidden', 'plain file name'),
    ],
)
def test_refused_addresses(url, words):
    with pytest.raises(files.DownloadError, match=words):
        files.download(url)


@pytest.mark.parametrize(
    ('answer', 'words'),
    [
        (lambda: _Answer(b'x' * 100, length=50), 'ended after 100 of 50|connection'),
        (lambda: _Answer(b'x' * 50, length=100), 'ended after 50 of 100'),
        (lambda: _Answer(b'x' * 2000), '2000 bytes, more than the limit of 1000'),
        (lambda: _Answer(b'x' * 2000, length=10), 'more than the limit of 1000'),
        (TimeoutError(), 'no answer'),
        (urllib.error.URLError('name not known'), 'name not known'),
        (ConnectionResetError('reset'), 'reset'),
        (http.client.IncompleteRead(b'x', 3), 'connection broke'),
    ],
)
def test_bad_answers(served, tmp_path, answer, words):
    url = 'https://user:secret@example.org/a.bin?token=secret'
    served[url] = answer
    with pytest.raises(files.DownloadError, match=words) as caught:
        files.download(url, max_bytes=1000)
    assert 'secret' not in str(caught.value) and 'https://example.org/a.bin' in str(caught.value)
    assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]


def test_redirect_away_from_https_is_not_followed():
    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header('Location', 'http://127.0.0.1:1/secret')
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(('127.0.0.1', 0), Redirect)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(files.DownloadError, match='not https'):
            files._open(f'http://127.0.0.1:{server.server_port}/a', 5)
    finally:
        server.shutdown()
        server.server_close()
