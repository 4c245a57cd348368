"""Train a model from its config: ``mim train boltz_mm CONFIG`` or ``python tools/train.py CONFIG``."""

import argparse

import boltz_mm  # noqa: F401  before the config is read: its bases may say boltz_mm::
from boltz_mm.utils import launch


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    # The word "gpus" with two dashes must not occur in this help: mim would add an argument of that name.
    parser = argparse.ArgumentParser(description='Train a model')
    launch.add_config_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint; without a value, from the newest one in the working directory',
    )
    launch.add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Train."""
    args = parse_args()
    launch.prepare_process(args)
    cfg = launch.read_config(args)
    if args.amp:
        launch.enable_amp(cfg)
    if args.auto_scale_lr:
        launch.enable_auto_scale_lr(cfg)
    launch.set_resume(cfg, args.resume)
    runner = launch.build_runner(cfg)
    try:
        runner.train()
    except KeyboardInterrupt:
        raise SystemExit(f'stopped; --resume goes on from the newest checkpoint in {cfg.work_dir}') from None


if __name__ == '__main__':
    main()
