"""Draw the reference windows and attended boxes of a BoxeR's best queries on an image.

Example:
    python tools/analysis_tools/plot_box_attention.py configs/boxer/boxer_tiny_shapes.py best.pth image.png --out a.png
"""

import argparse
from pathlib import Path

import mmcv
from mmengine.dataset import Compose, pseudo_collate

import boltz_mm  # noqa: F401  before the config is read: its bases may say boltz_mm::
from boltz_mm.utils import launch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='weights of the model')
    parser.add_argument('image', help='image file')
    parser.add_argument('--out', default='box_attention.png', help='picture to write (default: %(default)s)')
    parser.add_argument('--num-queries', type=int, default=3, help='how many of the best queries (default: 3)')
    parser.add_argument('--queries', type=int, nargs='+', help='these queries instead of the best')
    parser.add_argument('--encoder-layer', type=int, default=-1, help='default: the last')
    parser.add_argument('--decoder-layer', type=int, default=-1, help='default: the last')
    parser.add_argument('--dpi', type=int, default=130, help='dots per inch (default: %(default)s)')
    parser.add_argument('--device', help='where the model runs (default: an accelerator if there is one)')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw."""
    from mmdet.utils import get_test_pipeline_cfg

    from boltz_mm.apis import build_model
    from boltz_mm.utils.checkpoint import CheckpointError
    from boltz_mm.visualization.box_attention import best_queries, draw_box_attention, view_attention

    args = parse_args(argv)
    cfg = launch.load_config(args.config, args.cfg_options)
    launch.check_file(args.checkpoint, 'checkpoint')
    launch.check_file(args.image, 'image')
    try:
        model, meta = build_model(cfg, args.checkpoint, args.device)
        pipeline = [step for step in get_test_pipeline_cfg(cfg) if 'LoadAnnotations' not in step['type']]
        data = Compose(pipeline)({'img_path': args.image, 'img_id': 0})
        data = model.data_preprocessor(pseudo_collate([data]), False)
        view = view_attention(model, data['inputs'], data['data_samples'])[0]
        queries = args.queries or best_queries(view, args.num_queries)
        wrong = [query for query in queries if not 0 <= query < len(view.scores)]
        if wrong:
            raise ValueError(f'there is no query {wrong[0]}, the model has {len(view.scores)}')
        figure = draw_box_attention(
            mmcv.imread(args.image, channel_order='rgb'), view, queries,
            encoder_layer=args.encoder_layer, decoder_layer=args.decoder_layer, classes=meta.get('classes'),
        )  # fmt: skip
    except (CheckpointError, TypeError, ValueError) as error:
        launch.stop(str(error))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=args.dpi)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
