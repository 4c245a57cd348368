"""Count the operations of a model, our operators included; arguments as in mmdet.

``Flops`` are multiply-adds, as in mmdet's tool and in papers.

Example:
    python tools/analysis_tools/get_flops.py configs/boxer/boxer_r50_8xb2-3x_coco.py --shape 800 1280
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.analysis.print_helper import _format_size
from mmengine.config import Config
from mmengine.runner import Runner
from tqdm import tqdm

import boltz_mm  # noqa: F401  before the config is read: its bases may say boltz_mm::
from boltz_mm.utils import launch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_config_arguments(parser)
    parser.add_argument('--num-images', type=int, default=100, help='average over so many images of the val set')
    parser.add_argument(
        '--shape', type=int, nargs='+', metavar=('HEIGHT', 'WIDTH'),
        help='count for one image of this size instead; needs no dataset',
    )  # fmt: skip
    parser.add_argument(
        '--mode', choices=['predict', 'tensor'], default='predict',
        help='predict: what inference computes; tensor: raw outputs of all queries, as mmdet counts',
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.shape is not None and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(f'--shape takes one or two positive numbers, got {args.shape}')
    return args


def batches(cfg: Config, args: argparse.Namespace) -> Iterator[dict]:
    """The inputs to count for, before the data preprocessor."""
    from mmdet.structures import DetDataSample

    if args.shape is not None:
        height, width = args.shape if len(args.shape) == 2 else args.shape * 2
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        sample = DetDataSample(
            metainfo=dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0), img_id=0)
        )
        yield {'inputs': [image], 'data_samples': [sample]}
        return
    cfg.val_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    loader = Runner.build_dataloader(cfg.val_dataloader)
    count = min(args.num_images, len(loader))
    for _, batch in zip(tqdm(range(count), unit='image'), loader, strict=False):
        yield batch


def main(argv: list[str] | None = None) -> None:
    """Count and print."""
    from boltz_mm.apis import build_model
    from boltz_mm.utils.complexity import count_complexity

    args = parse_args(argv)
    cfg = launch.load_config(args.config, args.cfg_options)
    model, _ = build_model(cfg)
    counts, sizes = [], []
    for batch in batches(cfg, args):
        data = model.data_preprocessor(batch, False)
        sizes.append(tuple(data['inputs'].shape[-2:]))

        def forward(data: dict = data) -> None:
            model(data['inputs'], data['data_samples'], mode=args.mode)

        counts.append(count_complexity(model, forward))
    if not counts:
        launch.stop('there is no image to count for')
    line = '=' * 30
    several = '' if len(set(sizes)) == 1 else f' to {max(sizes)} (mean of {len(sizes)} images)'
    print(line)
    print(f'Compute type: {"random image" if args.shape else "dataloader: load a picture from the dataset"}')
    print(f'Input shape: {min(sizes)}{several}')
    print(f'Flops: {_format_size(int(np.mean([c.macs for c in counts])))} (multiply-adds, mode {args.mode})')
    print(f'Params: {_format_size(counts[0].params)}')
    print(line)
    names = sorted({name for c in counts for name in c.by_operator})
    means = {name: np.mean([c.by_operator.get(name, 0) for c in counts]) / 2 for name in names}
    for name in sorted(means, key=lambda n: -means[n]):
        print(f'{name:45s} {_format_size(int(means[name]))}')


if __name__ == '__main__':
    main()
