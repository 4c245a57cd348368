"""The mim commands, ``boltz_mm::`` configs and removal, from an installed wheel and from an editable install."""

import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

from tests.packaging.environments import Environment, copy_checkout, run

pytestmark = pytest.mark.slow

TINY = 'boxer_tiny_shapes.py'
QUICK = (
    '--cfg-options', 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=2',
    'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False', 'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False', 'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False', 'default_hooks.checkpoint.interval=1',
)  # fmt: skip


@pytest.fixture(scope='module', params=['wheel', 'editable'])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp(request.param) / 'an environment'
    built = request.getfixturevalue('wheel')  # an editable install has to work beside what a build leaves
    if request.param == 'wheel':
        return Environment(folder, built)
    return Environment(folder, '--editable', request.getfixturevalue('checkout'))


@pytest.fixture(scope='module')
def workplace(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user works: with a dataset made by ``mim run``.  An editable install is used from its checkout."""
    folder = tmp_path_factory.mktemp('workplace')
    if 'boltz_mm' not in [path.name for path in environment.site.iterdir()]:
        folder = Path(run(environment.python, '-c', 'import boltz_mm; print(boltz_mm.__file__)', cwd=folder).stdout)
        folder = folder.parents[1]
    sizes = ('--train', 8, '--val', 4, '--size', 64, '--seed', 0)
    environment.mim('run', 'boltz_mm', 'make_shapes', '--out', 'data/shapes', *sizes, cwd=folder)
    return folder


@pytest.fixture(scope='module')
def trained(environment: Environment, workplace: Path) -> Path:
    output = environment.mim('train', 'boltz_mm', TINY, *QUICK, cwd=workplace)
    assert 'Training finished successfully' in output
    assert 'bbox_mAP' in output and 'segm_mAP' in output
    work_dir = workplace / 'work_dirs' / 'boxer_tiny_shapes'
    assert (work_dir / 'epoch_1.pth').exists()
    return work_dir


def test_the_installed_package_is_the_one_used(environment: Environment, workplace: Path) -> None:
    code = 'import boltz_mm, boltz_mm.ops as ops; print(boltz_mm.__file__, ops.available_backends())'
    output = run(environment.python, '-c', code, cwd=workplace).stdout
    assert output.startswith((str(environment.site), str(workplace)))
    assert 'native' in output


def test_search(environment: Environment, workplace: Path) -> None:
    output = environment.mim('search', 'boltz_mm', '--valid-config', cwd=workplace)
    assert 'boxer_tiny_shapes' in output and 'boxer_r50_8xb2-3x_coco' in output
    environment.mim('search', 'boltz_mm', '--model', 'BoxeR', '--json', 'found.json', cwd=workplace)
    found = json.loads((workplace / 'found.json').read_text())
    assert found['config']['boxer_r50_8xb2-3x_coco'] == 'configs/boxer/boxer_r50_8xb2-3x_coco.py'


def test_train_then_test_then_again_by_name(environment: Environment, workplace: Path, trained: Path) -> None:
    checkpoint = trained / 'epoch_1.pth'
    words = ('--checkpoint', checkpoint, '--out', 'x.pkl', *QUICK)
    output = environment.mim('test', 'boltz_mm', TINY, *words, cwd=workplace)
    assert 'Testing finished successfully' in output and 'bbox_mAP' in output
    assert (workplace / 'x.pkl').stat().st_size > 0
    # The first training dumped its config: mim must still find one file of this name.
    again = ('--resume', *QUICK, 'train_cfg.max_epochs=2')
    assert 'resumed epoch: 1' in environment.mim('train', 'boltz_mm', TINY, *again, cwd=workplace)


def test_run(environment: Environment, workplace: Path) -> None:
    output = environment.mim('run', 'boltz_mm', 'print_config', 'boltz_mm::boxer/boxer_tiny_shapes.py', cwd=workplace)
    assert "type='boltz_mm.BoxeR'" in output


def test_download(environment: Environment, workplace: Path, tmp_path: Path) -> None:
    words = ('--config', 'boxer_tiny_shapes', '--dest', tmp_path)
    environment.mim('download', 'boltz_mm', *words, cwd=workplace)
    assert (tmp_path / 'tiny.pth').read_bytes() == b'some weights'
    assert 'BoxeR' in (tmp_path / TINY).read_text()


def test_download_without_weights_is_refused(environment: Environment, workplace: Path, tmp_path: Path) -> None:
    words = ('--config', 'boxer_r50_8xb2-3x_coco', '--dest', tmp_path)
    environment.mim('download', 'boltz_mm', *words, cwd=workplace, ok=False)
    assert not list(tmp_path.iterdir())


def test_a_users_config_inherits_ours(environment: Environment, workplace: Path, tmp_path: Path) -> None:
    config = tmp_path / 'mine.py'
    config.write_text("_base_ = 'boltz_mm::boxer/boxer_tiny_shapes.py'\nmodel = dict(num_queries=7)\n")
    output = environment.mim('run', 'boltz_mm', 'print_config', config, cwd=tmp_path)
    assert 'num_queries=7' in output and 'boltz_mm.BoxeR' in output


def test_hub(environment: Environment, tmp_path: Path) -> None:
    code = (
        'import boltz_mm; from mmengine.hub import get_config; '
        "print(get_config('boltz_mm::boxer/boxer_tiny_shapes.py', pretrained=True).model_path)"
    )
    assert re.search(r'http://127.0.0.1:\d+/tiny.pth', run(environment.python, '-c', code, cwd=tmp_path).stdout)


def test_a_config_of_another_scope_names_our_model(environment: Environment, tmp_path: Path) -> None:
    """mmdet's scope and builder, with nothing of ours but the import and the prefix."""
    code = """
import boltz_mm
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmdet.registry import MODELS
init_default_scope('mmdet')
cfg = get_config('boltz_mm::boxer/boxer_tiny_shapes.py')
print(type(MODELS.build(cfg.model)).__module__)
"""
    assert 'boltz_mm.models' in run(environment.python, '-c', code, cwd=tmp_path).stdout


def test_mim_folder_of_the_wheel(wheel: Path) -> None:
    """Both copies are complete, and carry nothing that was left lying in the checkout."""
    names = zipfile.ZipFile(wheel).namelist()
    version = re.match(r'boltz_mm-([^-]+)-cp310-abi3-', wheel.name).group(1)
    for prefix in ('boltz_mm/.mim/', f'boltz_mm-{version}.dist-info/.mim/'):
        for name in ('model-index.yml', 'dataset-index.yml', 'tools/train.py', f'configs/boxer/{TINY}'):
            assert prefix + name in names
    assert not [name for name in names if '__pycache__' in name or name.startswith('tests/')]
    assert not [name for name in names if name.endswith('entry_points.txt')]  # a script would break mim


def test_source_distribution_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    code = 'import setuptools.build_meta as backend, sys; backend.build_sdist(sys.argv[1])'
    run(sys.executable, '-c', code, tmp_path / 'sdist', cwd=checkout)
    (archive,) = (tmp_path / 'sdist').glob('boltz_mm-*.tar.gz')
    pip = (sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation')
    run(*pip, '--wheel-dir', tmp_path / 'dist', archive, cwd=tmp_path)
    (rebuilt,) = (tmp_path / 'dist').glob('*.whl')
    assert sorted(zipfile.ZipFile(rebuilt).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
    assert not list(checkout.glob('*.egg-info'))  # python -m mim would take it for the installed package


def test_removal_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / 'env', wheel)
    run(environment.python, '-c', 'import boltz_mm.utils.collect_env', cwd=tmp_path)
    environment.hide_stack()
    environment.pip('uninstall', '--yes', 'boltz_mm')
    assert not list(environment.site.glob('boltz_mm*'))


def test_no_compiler_installs_the_reference(tmp_path: Path) -> None:
    source = copy_checkout(tmp_path / 'source')
    empty = tmp_path / 'empty'
    empty.mkdir()
    pip = (sys.executable, '-m', 'pip', 'wheel', '-v', '--no-deps', '--no-build-isolation')
    hidden = dict(PATH=str(empty), CC='/nowhere/cc', CXX='/nowhere/c++', CUDA_HOME='')
    output = run(*pip, '--wheel-dir', tmp_path / 'dist', source, cwd=tmp_path, **hidden).stdout
    assert output.count('WARNING: boltz_mm._C could not be built') == 1
    (wheel,) = (tmp_path / 'dist').glob('*.whl')
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith('.so')]
    environment = Environment(tmp_path / 'env', wheel)
    code = 'import boltz_mm.ops as ops; print(ops.available_backends())'
    assert "['reference']" in run(environment.python, '-c', code, cwd=tmp_path).stdout


def test_no_torch_is_one_sentence(tmp_path: Path) -> None:
    source = copy_checkout(tmp_path / 'source')
    (tmp_path / 'hidden' / 'torch').mkdir(parents=True)
    (tmp_path / 'hidden' / 'torch' / '__init__.py').write_text("raise ImportError('hidden')")
    pip = (sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation')
    words = (*pip, '--wheel-dir', tmp_path / 'dist', source)
    output = run(*words, cwd=tmp_path, ok=False, PYTHONPATH=str(tmp_path / 'hidden')).stdout
    assert output.count('run `pip install torch setuptools wheel`') == 1
    assert 'Traceback' not in output
