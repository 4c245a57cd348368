"""Draw the tokens that an AutoFocusFormer keeps, their importance and clusters, and its prediction, for an image.

With --annotations the script measures instead whether tokens lie on objects: the share of the tokens surviving stage 2
that lie inside objects, over the share of the area that objects cover, on images covered at most 30 % by objects; IMAGE
is then the folder of the images.

Examples:
    python tools/analysis_tools/plot_tokens.py image.png configs/aff/NAME.py best.pth --out tokens.png
    python tools/analysis_tools/plot_tokens.py data/shapes/val configs/aff/NAME.py best.pth \
        --annotations data/shapes/annotations/instances_val.json
"""

import argparse
from pathlib import Path

import boltz_mm  # noqa: F401  before the config is read: its bases may say boltz_mm::
from boltz_mm.utils import launch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('image', help='image file; with --annotations a folder of images')
    launch.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='weights of the model')
    parser.add_argument('--out', default='tokens.png', help='picture to write (default: %(default)s)')
    parser.add_argument('--annotations', help='COCO annotations: measure, do not draw')
    parser.add_argument('--num-images', type=int, help='most images to measure on (default: all)')
    parser.add_argument('--stage', type=int, default=2, help='measure the tokens that survive this stage (default: 2)')
    parser.add_argument('--most-covered', type=float, default=0.3, help='see above (default: %(default)s)')
    parser.add_argument('--score-thr', type=float, default=0.3, help='least score drawn (default: %(default)s)')
    parser.add_argument('--dpi', type=int, default=130, help='dots per inch (default: %(default)s)')
    parser.add_argument('--device', help='where the model runs (default: an accelerator if there is one)')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw or measure."""
    import mmcv
    import torch

    from boltz_mm.apis import build_model
    from boltz_mm.utils.checkpoint import CheckpointError
    from boltz_mm.visualization import tokens

    args = parse_args(argv)
    cfg = launch.load_config(args.config, args.cfg_options)
    launch.check_file(args.checkpoint, 'checkpoint')
    launch.check_file(args.annotations or args.image, 'annotation file' if args.annotations else 'image')
    try:
        model, meta = build_model(cfg, args.checkpoint, args.device)
        if args.annotations:
            focus = tokens.measure_focus(
                model, cfg, args.annotations, args.image,
                stage=args.stage, most_covered=args.most_covered, num_images=args.num_images,
            )  # fmt: skip
            print(
                f'{focus.images} images covered at most {args.most_covered:.0%} by objects: '
                f'{focus.tokens:.1%} of the tokens surviving stage {args.stage} lie inside objects, which cover '
                f'{focus.area:.1%} of the area: {focus.ratio:.2f} times'
            )
            return
        data, shown = tokens.load_image(model, cfg, args.image)
        view = tokens.view_tokens(model, data['inputs'])[0]
        with torch.no_grad():
            sample = model(data['inputs'], data['data_samples'], mode='predict')[0]
        picture = mmcv.imread(args.image, channel_order='rgb')
        prediction, title = tokens.draw_prediction(sample, picture, meta, args.score_thr)
        figure = tokens.draw_tokens(shown, view, prediction=prediction, title=title)
    except (CheckpointError, TypeError, ValueError) as error:
        launch.stop(str(error))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=args.dpi)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
