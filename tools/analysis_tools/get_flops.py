"""Count the operations of a model, our operators included; arguments as in mmdet.

``Flops`` are multiply-adds, as in mmdet's tool and in papers.  For a classifier with AutoFocusFormer the figure by the
rule of its authors is printed as well, which leaves the operators out and counts tables that this code does not have.

Examples:
    python tools/analysis_tools/get_flops.py configs/boxer/boxer_r50_8xb2-3x_coco.py --shape 800 1280
    python tools/analysis_tools/get_flops.py configs/aff/aff-tiny_16xb256-300e_in1k.py --shape 224
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.analysis.print_helper import _format_size
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn
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
    if args.shape is not None:
        height, width = args.shape if len(args.shape) == 2 else args.shape * 2
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        size = (height, width)
        sample = sample_class(cfg.get('default_scope'))(
            metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0), img_id=0)
        )
        yield {'inputs': [image], 'data_samples': [sample]}
        return
    cfg.val_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    loader = Runner.build_dataloader(cfg.val_dataloader)
    count = min(args.num_images, len(loader))
    for _, batch in zip(tqdm(range(count), unit='image'), loader, strict=False):
        yield batch


def sample_class(scope: str | None) -> type[BaseDataElement]:
    """What the models of a library take as data samples."""
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        return DataSample
    if scope == 'mmseg':
        from mmseg.structures import SegDataSample

        return SegDataSample
    from mmdet.structures import DetDataSample

    return DetDataSample


def published_macs(model: nn.Module, size: tuple[int, int]) -> int | None:
    """The count of a classifier with AutoFocusFormer by the rule of its authors; None for any other model or shape."""
    from boltz_mm.models.backbones.aff import AFF
    from boltz_mm.utils.complexity import published_aff_macs

    backbone, classifier = getattr(model, 'backbone', None), getattr(getattr(model, 'head', None), 'fc', None)
    if not isinstance(backbone, AFF) or not isinstance(classifier, nn.Linear) or size[0] != size[1]:
        return None
    blocks = [stage.blocks[0] for stage in backbone.layers]
    hidden, width = blocks[0].mlp.fc1.weight.shape
    return published_aff_macs(
        embed_dims=[block.mlp.fc1.in_features for block in blocks],
        depths=[len(stage.blocks) for stage in backbone.layers],
        num_heads=[block.attn.num_heads for block in blocks],
        mlp_ratio=hidden / width,
        ds_rate=backbone.layers[0].downsample.ds_rate,
        img_size=size[0],
        num_classes=classifier.out_features,
    )


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
    published = published_macs(model, sizes[0]) if len(set(sizes)) == 1 else None
    if published is not None:
        print(f'Flops by the rule of the authors (no operators, full tables): {published / 1e9:.4f}G')
    print(f'Params: {_format_size(counts[0].params)} ({counts[0].params})')
    print(line)
    names = sorted({name for c in counts for name in c.by_operator})
    means = {name: np.mean([c.by_operator.get(name, 0) for c in counts]) / 2 for name in names}
    for name in sorted(means, key=lambda n: -means[n]):
        print(f'{name:45s} {_format_size(int(means[name]))}')


if __name__ == '__main__':
    main()
