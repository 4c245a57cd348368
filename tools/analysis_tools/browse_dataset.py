"""Draw images of a dataset with their ground truth; arguments as in mmdet.

Training images are drawn as training sees them, after all transforms, others as they are on disk.

Example:
    python tools/analysis_tools/browse_dataset.py configs/boxer/boxer_tiny_shapes.py --output-dir pictures --not-show
"""

import argparse
import itertools
import time
import warnings
from pathlib import Path

import mmcv
import numpy as np
from mmengine.registry import init_default_scope
from tqdm import tqdm

import boltz_mm  # noqa: F401  before the config is read: its bases may say boltz_mm::
from boltz_mm.registry import DATASETS, VISUALIZERS
from boltz_mm.utils import launch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_config_arguments(parser)
    parser.add_argument('--output-dir', help='write the pictures to this folder')
    parser.add_argument('--not-show', action='store_true', help='open no windows')
    parser.add_argument('--show-interval', type=float, default=2, help='seconds between two windows')
    parser.add_argument(
        '--phase', choices=['train', 'val', 'test'], default='train', help='which dataset (default: train)'
    )
    parser.add_argument('--num-images', type=int, help='stop after so many images')
    return parser.parse_args(argv)


def unused_name(folder: Path, name: str, used: set[str]) -> Path:
    """A file in ``folder`` called ``name``, numbered if the run has written one of that name already."""
    stem, suffix = Path(name).stem, Path(name).suffix or '.png'
    numbered = itertools.chain([f'{stem}{suffix}'], (f'{stem}_{k}{suffix}' for k in itertools.count(1)))
    free = next(candidate for candidate in numbered if candidate not in used)
    used.add(free)
    return folder / free


def main(argv: list[str] | None = None) -> None:
    """Browse."""
    from mmdet.structures import DetDataSample

    from boltz_mm.visualization.panels import drawing_scale, enlarge

    args = parse_args(argv)
    if args.not_show and args.output_dir is None:
        launch.stop('--not-show without --output-dir would do nothing')
    cfg = launch.load_config(args.config, args.cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    dataset = DATASETS.build(cfg[f'{args.phase}_dataloader'].dataset)
    visualizer = VISUALIZERS.build({**cfg.visualizer, 'vis_backends': None, 'name': f'browse-{time.time_ns()}'})
    visualizer.dataset_meta = dataset.metainfo
    if hasattr(visualizer, 'alpha'):
        visualizer.alpha = min(visualizer.alpha, 0.5)  # masks that let the image through
    count = len(dataset) if args.num_images is None else min(args.num_images, len(dataset))
    used: set[str] = set()
    for index in tqdm(range(count), unit='image'):
        item = dataset[index]
        sample = item['data_samples']
        if args.phase == 'train':
            image = np.ascontiguousarray(item['inputs'].permute(1, 2, 0).numpy()[..., ::-1])  # BGR to RGB
        else:  # test pipelines resize the image and leave the ground truth
            image = mmcv.imread(sample.img_path, channel_order='rgb')
        if isinstance(sample, DetDataSample):
            image, sample = enlarge(image, sample, drawing_scale(image))
        name = Path(item['data_samples'].img_path).name
        out_file = None if args.output_dir is None else str(unused_name(Path(args.output_dir), name, used))
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='.*out of bounds')
            visualizer.add_datasample(
                name, image, sample, draw_pred=False, show=not args.not_show, wait_time=args.show_interval,
                out_file=out_file,
            )  # fmt: skip


if __name__ == '__main__':
    main()
