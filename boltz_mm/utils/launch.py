"""What the scripts share: one way to read a config, and one clear sentence for a wrong argument.

The arguments of training and testing are those of mmdet's ``tools/train.py`` and ``tools/test.py``, so that mim,
launchers and people find what they know.  Three deviations: a missing file ends with a sentence, ``--amp`` keeps an
optimizer wrapper that has a mixed-precision form of its own, and inside a source checkout the config is dumped as
``config.py`` (see :func:`name_dumped_config`).
"""

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.hub import get_config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

_CFG_OPTIONS_HELP = (
    'override settings of the config by pairs of key=value; a list is written as key="[a,b]" or key=a,b, nested '
    'lists and tuples as key="[(a,b),(c,d)]", with the quotation marks and without white space'
)


def stop(sentence: str) -> NoReturn:
    """End the script with one sentence on stderr and a non-zero exit code."""
    raise SystemExit(f'error: {sentence}')


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config and ``--cfg-options``, what every script with a config begins with."""
    parser.add_argument('config', help='path of the config, or boltz_mm::NAME')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help=_CFG_OPTIONS_HELP)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what training and testing have in common, with both spellings of the local rank."""
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and metrics')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torch.distributed.launch passes --local-rank since torch 2.0, --local_rank before
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def prepare_process(args: argparse.Namespace) -> None:
    """Put the local rank where mmengine looks for it, unless the launcher has; bound the recompilations of dynamo."""
    # Here and not above: mmdet may import torchvision, which the package has to be able to repair first.
    from mmdet.utils import setup_cache_size_limit_of_dynamo

    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    setup_cache_size_limit_of_dynamo()


def check_file(path: str, what: str) -> None:
    """End with a sentence if a local file is missing; addresses (``scheme://``) are left to the loader."""
    if '://' not in path and not Path(path).is_file():
        stop(f'the {what} {path} does not exist')


def load_config(config: str, cfg_options: dict | None = None) -> Config:
    """Read a config by its path, or by ``package::name``, and apply overrides."""
    if '::' in config:
        cfg = get_config(config)
    else:
        check_file(config, 'config')
        cfg = Config.fromfile(config)
    if cfg_options is not None:
        cfg.merge_from_dict(cfg_options)
    return cfg


def read_config(args: argparse.Namespace) -> Config:
    """Read the config of a script with the overrides of its command line.

    The working directory comes from ``--work-dir``, else from the config, else from the name of the config file.
    """
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('.', 'work_dirs', Path(cfg.filename).stem)
    name_dumped_config(cfg)
    return cfg


def name_dumped_config(cfg: Config) -> None:
    """Let the runner dump the config as ``config.py`` if the working directory lies in a source checkout of ours.

    There mim looks for a config by its base name over the whole checkout, and would find the dumped copy beside the
    original: the second ``mim train boltz_mm NAME.py`` would stop with "multiple config files".
    """
    package = Path(__file__).resolve().parents[1]
    if (package / '.mim').exists() or package.parent not in Path(cfg.work_dir).resolve().parents:
        return
    path = Path(cfg.filename)
    if cfg.get('experiment_name') is None:
        cfg.experiment_name = path.stem  # what the runner would take from the file name
    object.__setattr__(cfg, '_filename', str(path.with_name('config.py')))


def enable_amp(cfg: Config) -> None:
    """Turn the optimizer wrapper of a config into its mixed-precision form, as ``--amp`` asks.

    ``XOptimWrapper`` becomes ``XAmpOptimWrapper``; one that is mixed already stays.
    """
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if not isinstance(kind, str):
        stop(f'--amp works on configs that name the optimizer wrapper by a string, this one has {kind}')
    scope, _, name = kind.rpartition('.')
    if name.endswith('AmpOptimWrapper'):
        mixed = name
    elif name.endswith('OptimWrapper'):
        mixed = f'{name.removesuffix("OptimWrapper")}AmpOptimWrapper'
    else:
        stop(f'--amp has no mixed-precision form of the optimizer wrapper {kind}')
    if get_device() == 'cpu' and (scope, mixed) != ('boltz_mm', 'FiniteAmpOptimWrapper'):
        stop(f"--amp needs an accelerator with {kind}: mmengine's mixed precision does not run on the CPU")
    cfg.optim_wrapper.type = f'{scope}.{mixed}' if scope else mixed
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr(cfg: Config) -> None:
    """Let the learning rate follow the batch size, as ``--auto-scale-lr`` asks."""
    if not {'enable', 'base_batch_size'} <= set(cfg.get('auto_scale_lr') or {}):
        stop('--auto-scale-lr needs auto_scale_lr = dict(enable=..., base_batch_size=...) in the config')
    cfg.auto_scale_lr.enable = True


def set_resume(cfg: Config, resume: str | None) -> None:
    """Resume from the newest checkpoint of the working directory (``'auto'``) or from a file, or not (``None``)."""
    if resume is None:
        return
    cfg.resume = True
    if resume == 'auto':
        cfg.load_from = None
    else:
        check_file(resume, 'checkpoint')
        cfg.load_from = resume


def use_cpu_processes(cfg: Config) -> None:
    """Let the processes of torchrun train on CPUs, where mmengine's own launching takes a GPU for granted."""
    if cfg.get('launcher', 'none') != 'pytorch' or get_device() != 'cpu':
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    wrapper['find_unused_parameters'] = cfg.get('find_unused_parameters', False)
    cfg.setdefault('model_wrapper_cfg', wrapper)


def build_runner(cfg: Config) -> Any:
    """Build the runner that a config asks for."""
    use_cpu_processes(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
