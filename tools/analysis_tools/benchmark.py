"""Measure the speed of inference, of the data loader or of the dataset; arguments as in mmdet.

Example:
    python tools/analysis_tools/benchmark.py configs/boxer/boxer_tiny_shapes.py --task inference --max-iter 100
"""

import argparse
import time
from pathlib import Path

from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

import boltz_mm  # noqa: F401  before the config is read: its bases may say boltz_mm::
from boltz_mm.utils import launch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_config_arguments(parser)
    parser.add_argument('--checkpoint', help='weights (inference only; default: the initial ones)')
    parser.add_argument('--task', choices=['inference', 'dataloader', 'dataset'], default='dataloader')
    parser.add_argument('--repeat-num', type=int, default=1, help='measure so many times and average')
    parser.add_argument('--max-iter', type=int, default=2000, help='most images or batches')
    parser.add_argument('--log-interval', type=int, default=50, help='images or batches between two log lines')
    parser.add_argument('--num-warmup', type=int, default=5, help='images or batches that do not count')
    parser.add_argument('--fuse-conv-bn', action='store_true', help='fold batch norms into convolutions first')
    parser.add_argument('--dataset-type', choices=['train', 'val', 'test'], default='test')
    parser.add_argument('--work-dir', help='write the log to this folder too')
    parser.add_argument('--device', help='where the model runs (default: an accelerator if there is one)')
    parser.add_argument('--launcher', choices=['none'], default='none', help='one process is measured')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure."""
    from boltz_mm.apis.benchmark import build_benchmark
    from boltz_mm.utils.checkpoint import CheckpointError

    args = parse_args(argv)
    cfg = launch.load_config(args.config, args.cfg_options)
    if args.checkpoint is not None:
        launch.check_file(args.checkpoint, 'checkpoint')
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    log_file = None
    if args.work_dir is not None:
        Path(args.work_dir).mkdir(parents=True, exist_ok=True)
        log_file = str(Path(args.work_dir) / 'benchmark.log')
    logger = MMLogger.get_instance(f'benchmark-{time.time_ns()}', log_file=log_file, log_level='INFO')
    try:
        benchmark = build_benchmark(
            cfg, args.task, dataset_type=args.dataset_type, checkpoint=args.checkpoint, fuse=args.fuse_conv_bn,
            max_iter=args.max_iter, log_interval=args.log_interval, num_warmup=args.num_warmup, logger=logger,
            device=args.device,
        )  # fmt: skip
    except (CheckpointError, ValueError) as error:
        launch.stop(str(error))
    benchmark.run(args.repeat_num)


if __name__ == '__main__':
    main()
