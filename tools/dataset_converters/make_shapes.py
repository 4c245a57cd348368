"""Make the embedded dataset "shapes" in COCO's layout (see boltz_mm/datasets/shapes/writer.py).

Example:
    python tools/dataset_converters/make_shapes.py --out data/shapes --train 600 --val 200 --size 128 --seed 0
"""

import argparse
import dataclasses
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from typing import NoReturn

from boltz_mm.datasets.shapes import ShapesSpec, make_shapes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; options of the images that are not given stay None."""
    default = ShapesSpec()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='data/shapes', help='folder of the dataset (default: %(default)s)')
    parser.add_argument('--train', type=int, default=600, help='training images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=200, help='validation images (default: %(default)s)')
    parser.add_argument('--test', type=int, default=0, help='test images (default: %(default)s)')
    images = parser.add_argument_group('images', 'defaults of the usual set; --hard has others')
    images.add_argument('--size', type=int, help=f'side in pixels ({default.size})')
    images.add_argument('--seed', type=int, help=f'seed of everything ({default.seed})')
    images.add_argument('--classes', type=int, dest='num_classes', help=f'shape classes ({default.num_classes})')
    images.add_argument('--min-size', type=int, help=f'longer side of the smallest objects ({default.min_size})')
    images.add_argument('--max-size', type=int, help=f'longer side of the largest objects ({default.largest})')
    images.add_argument('--min-objects', type=int, help=f'fewest objects of an image ({default.min_objects})')
    images.add_argument('--max-objects', type=int, help=f'most objects of an image ({default.max_objects})')
    images.add_argument('--min-visible', type=float, help=f'share of an object never covered ({default.min_visible})')
    images.add_argument('--empty', type=float, help=f'share of images without objects ({default.empty})')
    images.add_argument('--hard', action='store_true', help='all classes, 4 pixels up, crowded, low contrast')
    parser.add_argument('--workers', type=int, default=1, help='processes (default: %(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='replace a shapes dataset with other arguments')
    return parser.parse_args(argv)


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)  # clean up as after Ctrl-C
    given = {
        f.name: getattr(args, f.name)
        for f in dataclasses.fields(ShapesSpec)
        if f.name != 'hard' and getattr(args, f.name) is not None
    }
    try:
        spec = ShapesSpec.hard_set(**given) if args.hard else ShapesSpec(**given)
        counts = {'train': args.train, 'val': args.val, 'test': args.test}
        made = make_shapes(args.out, counts, spec, workers=args.workers, overwrite=args.overwrite)
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f'make_shapes: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('make_shapes: interrupted, nothing was written', file=sys.stderr)
        return 130
    print(f'{args.out}: {"made" if made else "already there, nothing to do"}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
