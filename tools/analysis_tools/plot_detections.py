"""Draw a sheet of images of the test set: ground truth on the left, detections on the right.

Example:
    python tools/analysis_tools/plot_detections.py configs/boxer/boxer_tiny_shapes.py best.pth --out detections.png
"""

import argparse

import mmcv
import torch
from mmengine.dataset import pseudo_collate
from tqdm import tqdm

import boltz_mm  # noqa: F401  before the config is read: its bases may say boltz_mm::
from boltz_mm.utils import launch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='weights of the model')
    parser.add_argument('--out', default='detections.png', help='picture to write (default: %(default)s)')
    parser.add_argument('--num-images', type=int, default=12, help='how many images (default: %(default)s)')
    parser.add_argument('--start', type=int, default=0, help='first image (default: %(default)s)')
    parser.add_argument('--columns', type=int, default=2, help='pairs in a row (default: %(default)s)')
    parser.add_argument('--score-thr', type=float, default=0.3, help='least score (default: %(default)s)')
    parser.add_argument('--device', help='where the model runs (default: an accelerator if there is one)')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw."""
    from boltz_mm.apis import build_model
    from boltz_mm.registry import DATASETS
    from boltz_mm.utils.checkpoint import CheckpointError
    from boltz_mm.visualization.panels import draw_panel, make_sheet, make_visualizer

    args = parse_args(argv)
    cfg = launch.load_config(args.config, args.cfg_options)
    launch.check_file(args.checkpoint, 'checkpoint')
    try:
        model, meta = build_model(cfg, args.checkpoint, args.device)
    except CheckpointError as error:
        launch.stop(str(error))
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    visualizer = make_visualizer({**meta, **dataset.metainfo})
    chosen = range(args.start, min(args.start + args.num_images, len(dataset)))
    if not chosen:
        launch.stop(f'there is no image {args.start}: the test set has {len(dataset)}')
    pictures = []
    for index in tqdm(chosen, unit='image'):
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([dataset[index]]))[0]
        image = mmcv.imread(sample.img_path, channel_order='rgb')
        pictures.append(draw_panel(visualizer, image, sample.cpu(), score_thr=args.score_thr))
    mmcv.imwrite(make_sheet(pictures, args.columns)[..., ::-1], args.out)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
