"""Determinism, and all or nothing whatever happens while writing."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from boltz_mm.datasets.shapes import ShapesSpec, make_shapes, read_manifest, writer

SMALL = ShapesSpec(size=48)
# Changes only together with boltz_mm.datasets.shapes.VERSION.
FROZEN = {
    'usual': {
        'train': '2b54355061c9044bfa9a1aedbf0ac8980b2668afd1d0b24eb1623ebec7ab192a',
        'val': '07fa86fbd033c38d589017831c2097b9ab7a1934033a78d0f13e02bbd29e94d1',
    },
    'hard': {
        'train': '089ebf400d13b5094b451c752da0200e07e0b8e1af57696287689287f4722715',
        'val': '40d3931209f1d23ad41b42a6663964e4078bb35d603a746827f8c78eb43ece51',
    },
}


def _make(root: Path, counts: dict[str, int], spec: ShapesSpec = SMALL, **kwargs) -> bool:
    return make_shapes(root, counts, spec, progress=False, **kwargs)


def _bytes(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob('*') if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_content_is_frozen(tmp_path: Path) -> None:
    _make(tmp_path / 'usual', {'train': 6, 'val': 3}, ShapesSpec(seed=7))
    _make(tmp_path / 'hard', {'train': 6, 'val': 3}, ShapesSpec.hard_set(seed=7))
    assert {name: read_manifest(tmp_path / name)['sha256'] for name in FROZEN} == FROZEN


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    _make(tmp_path / 'one', {'train': 20, 'val': 5})
    _make(tmp_path / 'three', {'val': 5, 'train': 20}, workers=3)
    assert _bytes(tmp_path / 'one') == _bytes(tmp_path / 'three')


def test_a_small_set_is_the_beginning_of_a_large_one(tmp_path: Path) -> None:
    _make(tmp_path / 'small', {'train': 4})
    _make(tmp_path / 'large', {'train': 9, 'test': 2})
    small, large = _bytes(tmp_path / 'small'), _bytes(tmp_path / 'large')
    images = [name for name in small if name.endswith('.png')]
    assert len(images) == 4 * 4
    assert all(small[name] == large[name] for name in images)


def test_second_run_does_nothing(tmp_path: Path) -> None:
    assert _make(tmp_path / 'set', {'train': 2})
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    assert not _make(tmp_path / 'set', {'train': 2, 'val': 0})
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before


def test_other_arguments_are_refused_unless_told(tmp_path: Path) -> None:
    root = tmp_path / 'set'
    _make(root, {'train': 2})
    before = _bytes(root)
    with pytest.raises(FileExistsError, match='seed: 0 there, 5 wanted'):
        _make(root, {'train': 2}, ShapesSpec(size=48, seed=5))
    assert _bytes(root) == before
    assert _make(root, {'train': 3}, overwrite=True)
    assert len(list((root / 'train').iterdir())) == 3
    assert os.listdir(tmp_path) == ['set']


def test_incomplete_set_is_told(tmp_path: Path) -> None:
    root = tmp_path / 'set'
    _make(root, {'train': 2})
    next((root / 'semantic/train').iterdir()).unlink()
    with pytest.raises(FileExistsError, match='semantic/train has 1 of 2'):
        _make(root, {'train': 2})
    assert _make(root, {'train': 2}, overwrite=True)


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('content', ['notes.txt', 'shapes.json'])
def test_foreign_folder_is_left_alone(tmp_path: Path, overwrite: bool, content: str) -> None:
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set' / content).write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match='not a shapes dataset'):
        _make(tmp_path / 'set', {'train': 1}, overwrite=overwrite)
    assert (tmp_path / 'set' / content).read_text() == '{"mine": 1}'
    assert os.listdir(tmp_path) == ['set']


def test_foreign_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / 'set').write_text('mine')
    with pytest.raises(FileExistsError, match='not a shapes dataset'):
        _make(tmp_path / 'set', {'train': 1}, overwrite=True)


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / 'a b').mkdir()
    assert _make(tmp_path / 'a b', {'train': 1})


def test_link_to_another_place_is_followed(tmp_path: Path) -> None:
    (tmp_path / 'far').mkdir()
    (tmp_path / 'near').symlink_to(tmp_path / 'far')
    assert _make(tmp_path / 'near', {'train': 1})
    assert (tmp_path / 'near').is_symlink()
    assert (tmp_path / 'far/shapes.json').is_file()
    assert not _make(tmp_path / 'near', {'train': 1})


@pytest.mark.parametrize('keep', [False, True])
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    root = tmp_path / 'deep' / 'set'
    if keep:
        _make(root, {'train': 1})
    before = _bytes(tmp_path)
    written = []

    def write(path: Path, data: bytes) -> None:
        if len(written) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)

    monkeypatch.setattr(Path, 'write_bytes', write)
    with pytest.raises(OSError, match='the disk is full, nothing was written') as error:
        _make(root, {'train': 5}, overwrite=keep)
    assert error.value.errno == errno.ENOSPC
    assert _bytes(tmp_path) == before
    assert not list(root.parent.glob('.*'))


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_interruption_leaves_nothing(tmp_path: Path, workers: int, name: str) -> None:
    out = tmp_path / 'set'
    script = Path(__file__).parents[3] / 'tools/dataset_converters/make_shapes.py'
    command = [sys.executable, str(script), '--out', str(out), '--train', '100000', '--workers', str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob('.set.partial-*/train/*.png')):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, 'nothing was written in a minute'
            time.sleep(0.1)
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert 'interrupted, nothing was written' in errors
    assert 'Traceback' not in errors
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    finished = subprocess.Popen([sys.executable, '-c', ''])
    finished.wait()
    host = writer.socket.gethostname()
    stale = tmp_path / f'.set.partial-{host}-{finished.pid}'
    alive = tmp_path / f'.set.partial-{host}-{os.getppid()}'
    elsewhere = tmp_path / f'.set.partial-{host}x-1'
    for folder in (stale, alive, elsewhere):
        (folder / 'train').mkdir(parents=True)
    _make(tmp_path / 'set', {'train': 1})
    assert not stale.exists()
    assert alive.exists()
    assert elsewhere.exists()


def test_two_runs_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / 'set'
    real = writer._take_place

    def faster_other(*args) -> None:
        monkeypatch.setattr(writer, '_take_place', real)
        other = tmp_path / 'other'
        _make(other, {'train': 1})
        other.rename(root)
        real(*args)

    monkeypatch.setattr(writer, '_take_place', faster_other)
    assert _make(root, {'train': 1})
    assert os.listdir(tmp_path) == ['set']


@pytest.mark.parametrize(
    ('counts', 'kwargs', 'named'),
    [
        ({'training': 3}, {}, 'training'),
        ({'train': -1}, {}, '-1'),
        ({'train': 0}, {}, '0'),
        ({}, {}, '{}'),
        ({'train': 1}, {'workers': 0}, '0'),
    ],
)
def test_wrong_counts_are_named(tmp_path: Path, counts: dict, kwargs: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _make(tmp_path / 'set', counts, **kwargs)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tools.dataset_converters.make_shapes import main

    handler = signal.getsignal(signal.SIGTERM)
    try:
        arguments = ['--out', str(tmp_path / 'set'), '--train', '3', '--val', '2', '--size', '64', '--hard']
        assert main([*arguments, '--classes', '4']) == 0
        assert 'made' in capsys.readouterr().out
        held = json.loads((tmp_path / 'set/shapes.json').read_text())['arguments']
        assert (held['num_classes'], held['min_size'], held['hard'], held['size']) == (4, 4, True, 64)
        assert main([*arguments, '--classes', '4']) == 0
        assert 'already there' in capsys.readouterr().out
        assert main(arguments) == 1
        assert 'num_classes: 4 there, 10 wanted' in capsys.readouterr().err
        assert main(['--out', str(tmp_path / 'b'), '--classes', '99']) == 1
        assert '99' in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, handler)
