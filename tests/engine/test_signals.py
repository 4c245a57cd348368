"""SIGTERM saves and ends; Ctrl-C leaves the last checkpoint whole; neither leaves workers behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from boltz_mm.utils.restricted_loading import read_mmengine_checkpoint
from tests.engine.toy import difference, run

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tests.engine.toy import run

@HOOKS.register_module()
class Slow(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        open(sys.argv[1] + '/progress', 'w').write(str(runner.iter + 1))
        time.sleep(0.2)

hooks = [dict(type='boltz_mm.RNGStateHook'), dict(type='boltz_mm.SaveOnSignalHook'), dict(type='Slow')]
run(sys.argv[1], total=50, workers=2, custom_hooks=hooks, accumulate=int(sys.argv[2]))
"""

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs signals of POSIX')


def _start(work_dir, accumulate=1):
    work_dir.mkdir()
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    command = [sys.executable, '-c', SCRIPT, str(work_dir), str(accumulate)]
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return process


def _wait_for(process, work_dir, iteration):
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        progress = work_dir / 'progress'
        if progress.is_file() and progress.read_text().isdigit() and int(progress.read_text()) >= iteration:
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f'did not reach iteration {iteration}: {process.communicate()[0]}')


def _children(pid):
    found = []
    for entry in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = entry.read_text().rsplit(')', 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.parent.name))
    return found


def _gone(pids):
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        if not [pid for pid in pids if Path(f'/proc/{pid}').exists()]:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize('accumulate', [1, 2])
def test_sigterm_saves_and_resume_goes_on_exactly(tmp_path, accumulate):
    process = _start(tmp_path / 'run', accumulate)
    _wait_for(process, tmp_path / 'run', 5)
    workers = _children(process.pid)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert len(workers) >= 2 and _gone(workers)
    path = tmp_path / 'run' / 'interrupted.pth'
    assert (tmp_path / 'run' / 'last_checkpoint').read_text() == str(path)
    stopped = read_mmengine_checkpoint(path)['meta']['iter']
    assert stopped % accumulate == 0
    total = stopped // 4 + 2
    # Another program, other workers, the same weights as in one go.
    kwargs = dict(total=total, accumulate=accumulate, custom_hooks=[dict(type='boltz_mm.RNGStateHook')])
    resumed = run(tmp_path / 'run', resume=True, **kwargs)
    straight = run(tmp_path / 'straight', workers=2, **kwargs)
    assert resumed.iter == straight.iter == 4 * total
    assert difference(straight, resumed) == 0.0
    assert not path.exists()


@pytest.mark.slow
def test_ctrl_c_leaves_the_last_checkpoint_and_no_workers(tmp_path):
    process = _start(tmp_path / 'run')
    _wait_for(process, tmp_path / 'run', 6)
    workers = _children(process.pid)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode not in (0, None) and 'KeyboardInterrupt' in output
    assert len(workers) >= 2 and _gone(workers)
    last = Path((tmp_path / 'run' / 'last_checkpoint').read_text())
    assert read_mmengine_checkpoint(last)['meta']['epoch'] >= 1
    assert not list((tmp_path / 'run').glob('.*boltz-tmp'))
