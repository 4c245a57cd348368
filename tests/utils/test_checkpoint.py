"""The restricted reader: what it reads, and that hostile or broken files are refused without running anything."""

import argparse
import collections
import errno
import io
import json
import os
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from boltz_mm.utils import files
from boltz_mm.utils.checkpoint import (
    CheckpointError,
    atomic_save,
    compare_state,
    load_state_dict_strict,
    read_checkpoint,
    save_safetensors,
    state_dict_of,
)


class _Call:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def _marker(tmp_path):
    return tmp_path / 'executed'


def _touch(path):
    return f'import pathlib; pathlib.Path({str(path)!r}).touch()'


def _zip_with_pickle(path, payload: bytes):
    """A file of torch.save whose pickle has been replaced."""
    buffer = io.BytesIO()
    torch.save({'a': torch.zeros(2)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            content = payload if entry.filename.endswith('/data.pkl') else source.read(entry)
            target.writestr(entry.filename, content)
    return path


@pytest.mark.parametrize('legacy', [False, True])
def test_reads_tensors_containers_and_numpy(tmp_path, legacy):
    shared = torch.arange(6.0)
    content = {
        'state_dict': collections.OrderedDict(a=shared[:3], b=shared[3:], half=torch.ones(2, dtype=torch.bfloat16)),
        'meta': {
            'epoch': 3,
            'scalar': np.float64(2.5),
            'integer': np.int64(7),
            'array': np.arange(6, dtype=np.int32).reshape(2, 3),
            'fortran': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            'flags': np.array([True, False]),
            'names': np.array(['ab', 'c']),
            'objects': np.array([1, 'x', None], dtype=object),
            'empty': np.zeros((0, 4), dtype=np.float32),
            'nested': [(np.float32(1.5), {'k': np.zeros(2)})],
            'classes': ('cat', 'dog'),
            'counter': collections.Counter([1, 1, 2]),
        },
    }
    torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=not legacy)
    read = read_checkpoint(tmp_path / 'a.pth', copy=True)
    assert torch.equal(read['state_dict']['a'], shared[:3]) and torch.equal(read['state_dict']['b'], shared[3:])
    assert read['state_dict']['half'].dtype == torch.bfloat16
    for key, value in content['meta'].items():
        if isinstance(value, np.ndarray):
            assert read['meta'][key].dtype == value.dtype and read['meta'][key].shape == value.shape
            assert (read['meta'][key] == value).all(), key
    assert read['meta']['scalar'] == 2.5 and read['meta']['integer'] == 7
    assert read['meta']['nested'][0][0] == 1.5 and (read['meta']['nested'][0][1]['k'] == 0).all()
    assert read['meta']['classes'] == ('cat', 'dog') and read['meta']['counter'][1] == 2


def test_copied_tensors_keep_sharing_and_outlive_the_file(tmp_path):
    base = torch.arange(4.0)
    torch.save({'a': base, 'b': base[1:], 'p': nn.Parameter(torch.ones(2))}, tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth', copy=True)
    with open(tmp_path / 'a.pth', 'r+b') as file:
        file.truncate(0)
    read['a'][1] = 9
    assert read['b'][0] == 9 and isinstance(read['p'], nn.Parameter)


def _hostile(name, marker):
    getattr_chain = _Call(getattr, _Call(__import__, 'os'), 'system')
    return {
        'os.system': _Call(os.system, f'touch {marker}'),
        'eval': _Call(eval, f'exec({_touch(marker)!r})'),
        'exec': _Call(exec, _touch(marker)),
        'getattr': getattr_chain,
        'nested': [{'deep': (1, _Call(os.system, f'touch {marker}'))}],
        'torch_load': _Call(torch.load, 'x'),
        'hub': _Call(torch.hub.load_state_dict_from_url, 'https://x/x'),
    }[name]


@pytest.mark.parametrize('name', ['os.system', 'eval', 'exec', 'getattr', 'nested', 'torch_load', 'hub'])
@pytest.mark.parametrize('legacy', [False, True])
def test_hostile_pickle_runs_nothing(tmp_path, name, legacy):
    path = tmp_path / 'hostile.pth'
    torch.save(
        {'state_dict': {'w': torch.ones(1)}, 'x': _hostile(name, _marker(tmp_path))},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(CheckpointError, match='hostile.pth') as caught:
        read_checkpoint(path, ('mmengine.logging.history_buffer.HistoryBuffer',))
    assert not _marker(tmp_path).exists()
    assert 'add_safe_globals' not in str(caught.value) and '\n' not in str(caught.value)


def test_hostile_file_does_run_when_read_in_full(tmp_path):
    # The proof that the files above are live: the unrestricted reader runs them.
    torch.save({'x': _hostile('exec', _marker(tmp_path))}, tmp_path / 'hostile.pth')
    torch.load(tmp_path / 'hostile.pth', weights_only=False)
    assert _marker(tmp_path).exists()


def test_getattr_is_allowed_on_recorded_classes_only(tmp_path):
    payload = b'\x80\x02cbuiltins\ngetattr\ncollections\nOrderedDict\nX\x08\x00\x00\x00__init__\x86R.'
    path = _zip_with_pickle(tmp_path / 'a.pth', payload)
    with pytest.raises(CheckpointError, match='a.pth'):
        read_checkpoint(path, ('mmengine.logging.history_buffer.HistoryBuffer',))


@pytest.mark.parametrize('name', ['os.system', 'builtins.eval', 'subprocess.Popen', 'plain'])
def test_dangerous_names_cannot_be_allowed(tmp_path, name):
    torch.save({'a': torch.ones(1)}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='cannot be allowed'):
        read_checkpoint(tmp_path / 'a.pth', (name,))


def test_allowed_class_comes_out_inert(tmp_path):
    torch.save({'args': argparse.Namespace(lr=1e-4, size=(3, 4)), 'model': {'w': torch.ones(1)}}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r"a\.pth: names 'argparse\.Namespace'"):
        read_checkpoint(tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth', ('argparse.Namespace',))
    assert not isinstance(read['args'], argparse.Namespace)
    assert read['args'].state == {'lr': 1e-4, 'size': (3, 4)} and read['args'].source == 'argparse.Namespace'
    read = read_checkpoint(tmp_path / 'a.pth', ('argparse.Namespace',), convert=lambda record: record.state)
    assert read['args']['lr'] == 1e-4


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'', 'empty'),
        (b'\x80\x02', 'truncated|damaged'),
        (b'<!DOCTYPE html><html></html>', 'web page'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'Git LFS'),
        (b'PK\x03\x04 nothing more', 'truncated or damaged'),
        (random.Random(0).randbytes(64).replace(b'{', b'x').replace(b'\x80', b'x'), 'not a checkpoint'),
        (struct.pack('<Q', 1 << 30) + b'{}', 'header of 1073741824 bytes'),
        (struct.pack('<Q', 2) + b'{', 'header'),
        (struct.pack('<Q', 8) + b'{"a": 1}', 'damaged'),
        (pickle.dumps({'a': 1}, protocol=2), 'damaged|truncated'),
    ],
)
def test_broken_files(tmp_path, content, words):
    (tmp_path / 'broken.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=rf'broken\.pth.*({words})'):
        read_checkpoint(tmp_path / 'broken.pth')


@pytest.mark.parametrize('keep', [0.2, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, keep):
    torch.save({'w': torch.randn(1000)}, tmp_path / 'cut.pth')
    os.truncate(tmp_path / 'cut.pth', int((tmp_path / 'cut.pth').stat().st_size * keep))
    with pytest.raises(CheckpointError, match=r'cut\.pth'):
        read_checkpoint(tmp_path / 'cut.pth')


def test_missing_folder_and_other_types(tmp_path):
    with pytest.raises(CheckpointError, match='no such file'):
        read_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(CheckpointError, match='not a file'):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match='no checkpoint file was named'):
        read_checkpoint('')
    torch.save([torch.ones(1)], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='holds a list'):
        read_checkpoint(tmp_path / 'list.pth')


def test_symlink_is_followed(tmp_path):
    torch.save({'w': torch.ones(3)}, tmp_path / 'real.pth')
    (tmp_path / 'link.pth').symlink_to(tmp_path / 'real.pth')
    assert read_checkpoint(tmp_path / 'link.pth')['w'].sum() == 3
    atomic_save({'w': torch.zeros(3)}, tmp_path / 'link.pth')
    assert (tmp_path / 'link.pth').is_symlink() and read_checkpoint(tmp_path / 'real.pth')['w'].sum() == 0


def test_zip_bomb(tmp_path):
    with zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', b'\0' * 50_000_000)
    with pytest.raises(CheckpointError, match='compressed'):
        read_checkpoint(tmp_path / 'bomb.pth')


def test_zip_declaring_more_than_the_file(tmp_path):
    torch.save({'w': torch.zeros(64)}, tmp_path / 'a.pth')
    data = bytearray((tmp_path / 'a.pth').read_bytes())
    name = data.rindex(b'/data/0') - len('archive/data/0') + len('/data/0')
    header = data.rindex(b'PK\x01\x02', 0, name)
    data[header + 20 : header + 28] = struct.pack('<II', 1 << 30, 1 << 30)
    (tmp_path / 'a.pth').write_bytes(data)
    with pytest.raises(CheckpointError, match=r'a\.pth: (declares \d+ bytes|is truncated or damaged)'):
        read_checkpoint(tmp_path / 'a.pth')


def test_storage_larger_than_its_record(tmp_path):
    """A pickle that claims more elements than its record has must not hand out memory beyond the file."""
    torch.save({'w': torch.zeros(4)}, tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith('/data.pkl'))
        payload = archive.read(name)
    assert payload.count(b'K\x04') >= 2  # number of elements, and the shape
    huge = payload.replace(b'K\x04', b'J' + struct.pack('<i', 100_000_000))
    path = _zip_with_pickle(tmp_path / 'b.pth', huge)
    with pytest.raises(CheckpointError, match=r'b\.pth'):
        read_checkpoint(path)


def test_expanded_view_larger_than_the_file(tmp_path):
    torch.save({'w': torch.zeros(1).expand(1 << 20, 1 << 12)}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='larger than the file'):
        read_checkpoint(tmp_path / 'a.pth')
    torch.save({'w': torch.zeros(1).expand(4, 5)}, tmp_path / 'b.pth')
    assert read_checkpoint(tmp_path / 'b.pth')['w'].shape == (4, 5)


def test_safetensors_round_trip(tmp_path):
    tied = torch.randn(3, 4)
    state = {'a': tied, 'b': tied, 'view': tied[1:], 't': torch.randn(4, 3).t(), 'i': torch.arange(3)}
    save_safetensors(state, tmp_path / 'a.safetensors', {'epoch': 3, 'classes': ['x']})
    read = read_checkpoint(tmp_path / 'a.safetensors')
    assert read['meta'] == {'epoch': 3, 'classes': ['x']}
    assert all(torch.equal(read['state_dict'][key], value) for key, value in state.items())
    with pytest.raises(TypeError, match='epoch'):
        save_safetensors({'epoch': 3}, tmp_path / 'b.safetensors')
    assert state_dict_of(read).keys() == state.keys()


def test_state_dict_of(tmp_path):
    weights = {'w': torch.ones(1)}
    for content in (weights, {'model': weights, 'epoch': 1}, {'state_dict': weights}):
        assert state_dict_of(content) == weights
    with pytest.raises(CheckpointError, match=r'f\.pth: no weights found \(keys: epoch\)'):
        state_dict_of({'epoch': 1}, 'f.pth')


class _Detector(nn.Module):
    def __init__(self, classes=80, width=8, layers=2):
        super().__init__()
        self.backbone = nn.Linear(3, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.class_embed = nn.Linear(width, classes)


def test_strict_load_and_likely_causes():
    model = _Detector()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def refused(state, words):
        with pytest.raises(CheckpointError, match=r'file\.pth: the weights do not fit _Detector') as caught:
            load_state_dict_strict(model, state, 'file.pth')
        assert words in str(caught.value), str(caught.value)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())

    refused(_Detector(classes=91).state_dict(), 'K = 91 classes, the model has K = 80')
    refused(nn.Sequential(nn.Linear(2, 2)).state_dict(), 'another architecture')
    refused({f'module.{key}': value for key, value in before.items()}, "prefix 'module.'")
    refused(_Detector(layers=1).state_dict(), 'missing (2): layers.1.weight, layers.1.bias')
    refused(_Detector(layers=3).state_dict(), 'unexpected (2): layers.2.weight')
    refused(_Detector(width=6).state_dict(), 'other shape')
    other = _Detector()
    load_state_dict_strict(model, other.state_dict(), 'file.pth')
    assert not compare_state(model, other.state_dict())
    assert torch.equal(model.backbone.weight, other.backbone.weight)


def test_disk_full_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    atomic_save({'w': torch.ones(3)}, path)

    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            raise OSError(errno.ENOSPC, 'No space left on device')

    real = open

    def fake(file, mode='r', *args, **kwargs):
        return Full() if 'w' in mode and str(file).endswith('.boltz-tmp') else real(file, mode, *args, **kwargs)

    monkeypatch.setattr('builtins.open', fake)
    with pytest.raises(files.WriteError, match=r'a\.pth: No space left on device'):
        atomic_save({'w': torch.zeros(100_000)}, path)
    with pytest.raises(files.WriteError, match='No space left'):
        save_safetensors({'w': torch.zeros(10)}, path)
    monkeypatch.undo()
    assert read_checkpoint(path)['w'].sum() == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ['a.pth']


def test_meta_is_plain_json(tmp_path):
    save_safetensors({'w': torch.ones(1)}, tmp_path / 'a.safetensors', {'a': 1})
    length = struct.unpack('<Q', (tmp_path / 'a.safetensors').read_bytes()[:8])[0]
    header = json.loads((tmp_path / 'a.safetensors').read_bytes()[8 : 8 + length])
    assert json.loads(header['__metadata__']['meta']) == {'a': 1}
