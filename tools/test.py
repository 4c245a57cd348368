"""Evaluate a checkpoint: ``mim test boltz_mm CONFIG --checkpoint FILE`` or ``python tools/test.py CONFIG FILE``."""

import argparse
import warnings
from copy import deepcopy

from mmengine.config import Config, ConfigDict

import boltz_mm  # noqa: F401  before the config is read: its bases may say boltz_mm::
from boltz_mm.utils import launch


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Test (and evaluate) a model')
    launch.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='path or address of the checkpoint')
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to a pickle file')
    parser.add_argument('--show', action='store_true', help='show the predictions in windows')
    parser.add_argument('--show-dir', help='write pictures of the predictions to WORK_DIR/TIMESTAMP/SHOW_DIR')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds between two windows of --show')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    launch.add_run_arguments(parser)
    return parser.parse_args()


def enable_tta(cfg: Config) -> None:
    """Wrap the model and the test pipeline for test-time augmentation; a plain flip where the config has no other."""
    if 'tta_model' not in cfg:
        warnings.warn('the config has no tta_model: merging flipped images by NMS at IoU 0.5', stacklevel=2)
        cfg.tta_model = dict(
            type='mmdet.DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        )
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    if 'tta_pipeline' not in cfg:
        warnings.warn('the config has no tta_pipeline: testing each image as it is and flipped', stacklevel=2)
        pack = deepcopy(dataset.pipeline[-1])
        pack['meta_keys'] = (
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction',
        )  # fmt: skip
        flips = [dict(type='mmdet.RandomFlip', prob=1.0), dict(type='mmdet.RandomFlip', prob=0.0)]
        cfg.tta_pipeline = [
            *deepcopy(dataset.pipeline[:-1]), dict(type='TestTimeAug', transforms=[flips, [pack]])
        ]  # fmt: skip
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def main() -> None:
    """Test."""
    args = parse_args()
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        launch.stop(f'--out must name a .pkl or .pickle file, got {args.out}')
    launch.prepare_process(args)
    cfg = launch.read_config(args)
    launch.check_file(args.checkpoint, 'checkpoint')
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        from mmdet.engine.hooks.utils import trigger_visualization_hook

        cfg = trigger_visualization_hook(cfg, args)
    if args.tta:
        enable_tta(cfg)
    runner = launch.build_runner(cfg)
    if args.out is not None:
        from mmdet.evaluation import DumpDetResults

        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()


if __name__ == '__main__':
    main()
