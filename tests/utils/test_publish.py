"""A published file holds weights and plain facts, and is named after its content."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from boltz_mm.utils.checkpoint import read_checkpoint
from boltz_mm.utils.files import sha256_of
from boltz_mm.utils.publish import publish

TOOL = Path(__file__).parents[2] / 'tools' / 'model_converters' / 'publish_model.py'


@pytest.fixture
def trained(tmp_path):
    meta = dict(epoch=3, cfg='x = 1', seed=4, time='now', dataset_meta=dict(classes=('a', 'b'), palette=[(1, 2, 3)]))
    meta['dataset_meta']['sizes'] = np.arange(3)
    state = {'w': torch.randn(4, 3), 'steps': torch.tensor(3)}
    content = dict(state_dict=state, meta=meta, optimizer=dict(state={}), rng_state=dict(ranks=[]), message_hub={})
    torch.save(content, tmp_path / 'epoch_3.pth')
    return tmp_path / 'epoch_3.pth', state


def test_weights_and_facts(trained):
    path, state = trained
    written = publish(path)
    assert written.parent == path.parent and written.name == f'epoch_3-{sha256_of(written)[:8]}.safetensors'
    read = read_checkpoint(written)
    assert all(torch.equal(read['state_dict'][key], value) for key, value in state.items())
    facts = dict(classes=['a', 'b'], palette=[[1, 2, 3]], sizes=[0, 1, 2])
    assert read['meta'] == dict(epoch=3, dataset_meta=facts)
    assert publish(path) == written, 'equal content gives an equal file'
    assert sorted(entry.name for entry in path.parent.iterdir()) == sorted([path.name, written.name])
    assert read_checkpoint(publish(written))['meta'] == read['meta']


def test_options(trained, tmp_path):
    path, state = trained
    written = publish(path, tmp_path / 'new' / 'model.v1', with_config=True, half=True)
    assert written.name.startswith('model.v1-')
    read = read_checkpoint(written)
    assert read['meta']['cfg'] == 'x = 1' and read['state_dict']['w'].dtype == torch.float16
    assert read['state_dict']['steps'].dtype == torch.int64


@pytest.mark.slow
def test_tool(trained, tmp_path):
    path, _ = trained
    done = subprocess.run([sys.executable, TOOL, path, tmp_path / 'out'], capture_output=True, text=True)
    assert done.returncode == 0 and 'out-' in done.stdout, done.stderr
    path.write_bytes(b'')
    done = subprocess.run([sys.executable, TOOL, path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'epoch_3.pth: the file is empty' in done.stderr
