"""Saving leaves a whole checkpoint or the old one; reading refuses what does not fit."""

import errno
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.runner.checkpoint import load_checkpoint

from boltz_mm.engine.atomic_backend import AtomicLocalBackend
from boltz_mm.utils.checkpoint import CheckpointError, read_checkpoint
from boltz_mm.utils.files import WriteError
from tests.engine.toy import DroppingNet, config, run


def _names(folder):
    return sorted(entry.name for entry in Path(folder).iterdir() if entry.is_file() and not entry.name.endswith('.py'))


def _hooks(**kwargs):
    return dict(checkpoint=dict(type='boltz_mm.AtomicCheckpointHook', interval=1, **kwargs))


def _failing_write(monkeypatch, after, error):
    """The write of `epoch_<after>.pth` stops in the middle with `error`."""
    real = os.fsync
    seen = []

    def fsync(descriptor):
        path = os.readlink(f'/proc/self/fd/{descriptor}')
        if f'epoch_{after}.pth' in path:
            seen.append(path)
            raise error
        return real(descriptor)

    monkeypatch.setattr('os.fsync', fsync)
    return seen


@pytest.mark.parametrize(
    ('error', 'raised'), [(OSError(errno.ENOSPC, 'No space left on device'), WriteError), (KeyboardInterrupt(), None)]
)
def test_failure_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch, error, raised):
    seen = _failing_write(monkeypatch, 2, error)
    with pytest.raises(raised or KeyboardInterrupt) as caught:
        run(tmp_path, total=3, default_hooks=_hooks(max_keep_ckpts=1))
    if raised:
        assert re.search(
            r'epoch_2\.pth: No space left on device; the previous file, if any, is intact', str(caught.value)
        )
    monkeypatch.undo()
    assert seen and _names(tmp_path) == ['epoch_1.pth', 'last_checkpoint']
    assert find_latest_checkpoint(str(tmp_path)) == str(tmp_path / 'epoch_1.pth')
    resumed = run(tmp_path, total=3, resume=True, default_hooks=_hooks(max_keep_ckpts=1))
    assert resumed.epoch == 3 and _names(tmp_path) == ['epoch_3.pth', 'last_checkpoint']


def test_refused_by_the_system(tmp_path):
    """A write that the kernel itself cuts short: the process may not make files larger than 64 KiB."""
    resource = pytest.importorskip('resource')
    run(tmp_path, total=1)
    before = (tmp_path / 'epoch_1.pth').read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(WriteError, match=r'epoch_1\.pth: File too large'):
            AtomicLocalBackend().put(bytes(1 << 20), tmp_path / 'epoch_1.pth')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / 'epoch_1.pth').read_bytes() == before and not list(tmp_path.glob('.*'))


def test_keeps_the_newest_and_the_best(tmp_path):
    run(tmp_path, total=5, default_hooks=_hooks(max_keep_ckpts=2, save_best='score', rule='greater'))
    assert _names(tmp_path) == ['best_score_epoch_5.pth', 'epoch_4.pth', 'epoch_5.pth', 'last_checkpoint']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_5.pth')
    kept = read_checkpoint(tmp_path / 'epoch_5.pth', ('mmengine.logging.history_buffer.HistoryBuffer',))
    assert kept['message_hub']['runtime_info']['keep_ckpt_ids'] == [4, 5]


def test_old_best_goes_after_the_new_one_is_there(tmp_path, monkeypatch):
    seen = _failing_write(monkeypatch, 2, OSError(errno.EDQUOT, 'Disk quota exceeded'))
    hooks = dict(checkpoint=dict(type='boltz_mm.AtomicCheckpointHook', interval=3, save_best='score', rule='greater'))
    with pytest.raises(WriteError, match='best_score_epoch_2.pth: Disk quota exceeded'):
        run(tmp_path, total=3, default_hooks=hooks)
    assert 'best_score_epoch_2.pth' in seen[0] and _names(tmp_path) == ['best_score_epoch_1.pth']


def test_stale_temporaries_are_cleared(tmp_path):
    (tmp_path / '.epoch_1.pth.0a1b2c3d.boltz-tmp').write_bytes(b'half')
    run(tmp_path, total=1)
    assert not list(tmp_path.glob('.*'))


def test_published_file_is_named_after_its_hash(tmp_path):
    import hashlib

    run(tmp_path, total=1, default_hooks=_hooks(published_keys=['meta', 'state_dict']))
    (published,) = tmp_path.glob('epoch_1-*.pth')
    assert hashlib.sha256(published.read_bytes()).hexdigest().startswith(published.stem.split('-')[1])
    assert set(read_checkpoint(published)) == {'meta', 'state_dict'}


def _break(path, how):
    if how == 'missing':
        path.unlink()
    elif how == 'empty':
        path.write_bytes(b'')
    elif how == 'truncated':
        os.truncate(path, path.stat().st_size // 2)
    elif how == 'weights only':
        torch.save({'state_dict': DroppingNet().state_dict()}, path)
    elif how == 'other model':
        content = torch.load(path, weights_only=False)
        content['state_dict'] = torch.nn.Linear(2, 2).state_dict()
        torch.save(content, path)


@pytest.mark.parametrize(
    ('how', 'words'),
    [
        ('missing', 'there is no such file'),
        ('empty', 'the file is empty'),
        ('truncated', 'truncated or damaged'),
        ('weights only', 'holds weights only, nothing to resume'),
        ('other model', 'another architecture'),
    ],
)
def test_resume_of_a_bad_file(tmp_path, how, words):
    run(tmp_path, total=1)
    _break(tmp_path / 'epoch_1.pth', how)
    with pytest.raises(CheckpointError, match=rf'epoch_1\.pth: .*(?s:.)*{words}'):
        run(tmp_path, total=2, resume=True)


def test_pointer_to_nothing(tmp_path):
    (tmp_path / 'last_checkpoint').write_text('')
    with pytest.raises(CheckpointError, match='no checkpoint file was named'):
        run(tmp_path, total=1, resume=True)


def _test(work_dir, checkpoint, **model):
    """What tools/test.py does with a config and a checkpoint."""
    cfg = config(work_dir)
    cfg.model.update(model)
    cfg.load_from = str(checkpoint)
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, dict()
    cfg.experiment_name += str(checkpoint)
    return Runner.from_cfg(cfg).test()


class _Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


def test_hostile_checkpoint_in_test_train_and_pretrained(tmp_path):
    marker, path = tmp_path / 'executed', tmp_path / 'hostile.pth'
    torch.save({'state_dict': DroppingNet().state_dict(), 'x': _Hostile(marker)}, path)
    with pytest.raises(CheckpointError, match=r"hostile\.pth: names 'posix\.system'"):
        _test(tmp_path / 'a', path)
    with pytest.raises(CheckpointError, match='posix'):
        run(tmp_path / 'b', resume=str(path))
    with pytest.raises(CheckpointError, match='posix'):
        load_checkpoint(DroppingNet(), str(path))
    with pytest.raises(CheckpointError, match='posix'):
        cfg = config(tmp_path / 'c', total=1)
        cfg.model.init_cfg = dict(type='Pretrained', checkpoint=str(path))
        model = DroppingNet()
        model.init_cfg = cfg.model.init_cfg
        model.init_weights()
    assert not marker.exists()
    # The file is live: this is what it does to the reader that trusts it.
    pickle.loads(pickle.dumps(_Hostile(marker)))
    assert marker.exists()


INFERENCER = """
import sys
import boltz_mm
from mmdet.apis import DetInferencer
DetInferencer(model=sys.argv[1], weights=sys.argv[2], device='cpu')
"""


@pytest.mark.slow
def test_hostile_checkpoint_in_the_inferencer_of_mmdet(tmp_path):
    """It reads the checkpoint before it builds the model: the config has to have switched the reader by then."""
    marker, path = tmp_path / 'executed', tmp_path / 'hostile.pth'
    torch.save({'state_dict': {}, 'x': _Hostile(marker)}, path)
    root = Path(__file__).parents[2]
    command = [sys.executable, '-c', INFERENCER, root / 'configs' / 'boxer' / 'boxer_tiny_shapes.py', path]
    environment = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS='1')
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode != 0 and 'CheckpointError: ' in done.stderr and 'posix.system' in done.stderr
    assert not marker.exists()


def test_code_in_the_config_of_a_checkpoint_is_not_run(tmp_path):
    """mmengine runs meta['config'] as Python when it resumes."""
    run(tmp_path, total=1)
    content = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    content['meta']['config'] = f'import pathlib\npathlib.Path({str(tmp_path / "executed")!r}).touch()\n'
    torch.save(content, tmp_path / 'epoch_1.pth')
    assert run(tmp_path, total=2, resume=True).epoch == 2
    assert not (tmp_path / 'executed').exists()


def test_other_addresses_are_refused():
    for address in ('s3://bucket/a.pth', 'pavi://a', 'petrel://a', 'http://localhost/a.pth', 'torchvision://nothing'):
        with pytest.raises(CheckpointError):
            load_checkpoint(DroppingNet(), address)


def test_testing_needs_every_weight(tmp_path):
    torch.save({'state_dict': DroppingNet(classes=3).state_dict()}, tmp_path / 'three.pth')
    with pytest.raises(CheckpointError, match=r'three\.pth: does not fit DroppingNet, cannot test with it') as caught:
        _test(tmp_path / 'a', tmp_path / 'three.pth')
    assert 'K = 3 classes, the model has K = 1: set num_classes=3' in str(caught.value)
    assert 'score' in _test(tmp_path / 'b', tmp_path / 'three.pth', classes=3)


def test_fine_tuning_takes_what_fits(tmp_path):
    source = DroppingNet(classes=3)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'three.pth')
    torch.save({'state_dict': torch.nn.Linear(2, 2).state_dict()}, tmp_path / 'other.pth')
    cfg = config(tmp_path / 'a', total=1)
    cfg.load_from = str(tmp_path / 'three.pth')
    cfg.optim_wrapper.optimizer.lr = 0.0
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert torch.equal(runner.model.first.weight, source.first.weight)
    cfg = config(tmp_path / 'b', total=1)
    cfg.load_from = str(tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r'other\.pth: does not fit'):
        Runner.from_cfg(cfg).train()
