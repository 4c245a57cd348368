"""Time whole models against the official way of running them.

Usage:
    python tools/benchmark/models.py [--model NAME ...] [--device cpu|cuda] [--json] [--quick] [--repeats N]

Weights are random: the work does not depend on them.  Both sides run in turn in one process, after a warm-up; figures
are medians.  The side called ours uses the operators as installed; a baseline says in its name on which backend its
operators run.  ``--quick`` shrinks models and images, to see that everything runs; its figures mean nothing.
"""

import argparse
import contextlib
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

with contextlib.redirect_stdout(sys.stderr):  # what the libraries print when they are imported is no result
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope
    from mmengine.structures import InstanceData

    from boltz_mm import __version__, ops
    from boltz_mm.registry import MODELS
    from boltz_mm.utils.register import register_all_modules
    from tools.benchmark import aff_models
    from tools.benchmark.baselines.boxer import OfficialBoxeR
    from tools.benchmark.timing import CLOCK, Record, compare, extra_bytes, report

    register_all_modules(init_default_scope=False)


def build(config: str, **changes: object) -> nn.Module:
    """A model with random weights from a config of this repository, in evaluation mode."""
    cfg = Config.fromfile(CHECKOUT / 'configs' / config)
    cfg.merge_from_dict({'model.backbone.init_cfg': None, **changes})
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    MMLogger.get_current_instance().setLevel('WARNING')  # how each weight was initialised is no result either
    model.init_weights()
    return model.eval()


def samples(batch: int, size: tuple[int, int], objects: int, num_classes: int) -> list[DetDataSample]:
    """Unpadded images of one size with rectangular objects at random places."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(batch):
        corner = torch.rand(objects, 2, generator=generator) * torch.tensor([width, height]) * 0.7
        boxes = torch.cat([corner, corner + 16 + torch.rand(objects, 2, generator=generator) * 0.25 * min(size)], 1)
        masks = torch.zeros(objects, height, width, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        labels = torch.randint(num_classes, (objects,), generator=generator)
        sample = DetDataSample(
            metainfo=dict(img_shape=size, batch_input_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)),
            gt_instances=InstanceData(bboxes=boxes, labels=labels, masks=masks),
        )
        results.append(sample)
    return results


def on_device(batch: list[DetDataSample], device: str) -> list[DetDataSample]:
    """Move ground truth and meta information."""
    return [sample.to(device) for sample in batch]


def boxer_r50_mask(device: str, quick: bool, repeats: int) -> Iterator[Record]:
    """BoxeR-2D R50 with masks: inference on one image of 640 x 896, and a training step."""
    size = (64, 96) if quick else (640, 896)
    changes = {'model.num_queries': 20, 'model.backbone.depth': 18, 'model.backbone.base_channels': 8} if quick else {}
    if quick:
        changes |= {'model.neck.in_channels': [16, 32, 64], 'model.backbone.stem_channels': 8}
    model = build('boxer/boxer_r50_mask_8xb2-3x_coco.py', **changes).to(device)
    batch = on_device(samples(1, size, 7, 80), device)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).to(device)

    def ours() -> list:
        with torch.no_grad():
            return model.predict(image, batch)

    for mode in ('evaluation', 'inference'):
        official = OfficialBoxeR(model, mode)
        for name in ops.available_backends():

            def baseline(official: OfficialBoxeR = official, name: str = name) -> list:
                with ops.use_backend(name):
                    return official.predict(image, batch)

            ms, baseline_ms = compare(ours, baseline, device, repeats)
            yield Record(
                'boxer_r50_mask',
                f'1x{size[0]}x{size[1]}',
                device,
                'float32',
                'predict',
                ms,
                f'official {mode} work, {name} operators',
                baseline_ms,
                extra_bytes(ours, device),
            )

    model.train()
    yield from _training_step('boxer_r50_mask', model, image, batch, repeats)


def _training_step(
    name: str, model: nn.Module, image: Tensor, batch: list[DetDataSample], repeats: int
) -> Iterator[Record]:
    """Forward and backward of the loss: our operators as installed against the reference backend."""
    device = image.device.type

    def step() -> None:
        model.zero_grad(set_to_none=True)
        losses = model.loss(image, batch)
        sum(value for key, value in losses.items() if 'loss' in key).backward()

    def baseline() -> None:
        with ops.use_backend('reference'):
            step()

    ms, baseline_ms = compare(step, baseline, device, repeats)
    case = 'x'.join(str(n) for n in (len(image), *image.shape[-2:]))
    yield Record(
        name, case, device, 'float32', 'fwdbwd', ms, 'same step, reference operators', baseline_ms,
        extra_bytes(step, device),
    )  # fmt: skip


MODELS_TO_TIME: dict[str, Callable[[str, bool, int], Iterator[Record]]] = {
    'boxer_r50_mask': boxer_r50_mask,
    **aff_models.models(),
}


def main() -> None:
    """Time what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', choices=sorted(MODELS_TO_TIME), nargs='+', help='time these models only')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--json', action='store_true', help='one JSON object a line')
    parser.add_argument('--quick', action='store_true', help='tiny sizes, to see that everything runs')
    parser.add_argument('--repeats', type=int, default=7, help='timed runs of each side')
    parser.add_argument(
        '--processor-time', action='store_true',
        help='processor time of one thread instead of the wall clock, for a machine that others use too',
    )  # fmt: skip
    args = parser.parse_args()
    if args.processor_time:
        torch.set_num_threads(1)
        CLOCK.use_processor()
    if args.repeats < 1:
        parser.error(f'--repeats must be at least 1, got {args.repeats}')
    title = (
        f'boltz_mm {__version__}, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads'
        f'{", processor time" if args.processor_time else ""}'
    )
    names = args.model or sorted(MODELS_TO_TIME)
    records = (record for name in names for record in MODELS_TO_TIME[name](args.device, args.quick, args.repeats))
    report(records, as_json=args.json, title=title, subject='model')


if __name__ == '__main__':
    main()
