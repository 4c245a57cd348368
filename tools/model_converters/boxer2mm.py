"""Convert an official BoxeR checkpoint (2D or 3D) to ours, or ours to the official layout.

    python tools/model_converters/boxer2mm.py boxer2d_final.pth boxer.safetensors
    python tools/model_converters/boxer2mm.py --reverse boxer.safetensors boxer2d_final.pth

What the file holds (classes, widths, masks) is read from it and checked against a model of that shape; every key that
does not fit is printed, and then nothing is written unless --force is given.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

import torch

from boltz_mm.converters.boxer import convert_boxer, export_boxer, infer_boxer_config
from boltz_mm.converters.boxer3d import convert_boxer3d, export_boxer3d, infer_boxer3d_config
from boltz_mm.converters.common import official_state_dict
from boltz_mm.datasets.coco_category_id import CocoCategoryIdDataset
from boltz_mm.registry import MODELS
from boltz_mm.utils.checkpoint import CheckpointError, atomic_save, read_checkpoint, save_safetensors, state_dict_of
from boltz_mm.utils.files import WriteError


class Converter(NamedTuple):
    """The functions of one kind of model: file to ours, ours to file, config that fits our weights."""

    convert: Callable
    export: Callable
    infer_config: Callable


BOXER = Converter(convert_boxer, export_boxer, infer_boxer_config)
BOXER3D = Converter(convert_boxer3d, export_boxer3d, infer_boxer3d_config)


def converter_for(state: Mapping[str, torch.Tensor]) -> Converter:
    """Tell 2D from 3D: only BoxeR-3D reads pillars; the name is the same in both layouts."""
    return BOXER3D if any('backbone.reader.' in key for key in state) else BOXER


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='checkpoint to read (.ckpt, .pth, .safetensors, or an https address)')
    parser.add_argument(
        'target', nargs='?', help='file to write: safetensors, unless it ends in .pth, .pt or .ckpt (torch.save). '
        'Default: the name of the source with .safetensors, in the current folder'
    )  # fmt: skip
    parser.add_argument('--reverse', action='store_true', help='from our layout to the official one')
    parser.add_argument('--force', action='store_true', help='write although keys do not fit')
    return parser.parse_args()


def convert(source: str) -> tuple[dict[str, torch.Tensor], dict, bool]:
    """Read and convert an official file, and print what became of its keys.

    Returns:
        The state dict, what is known about it, and whether everything found its place.
    """
    container = read_checkpoint(source)
    converter = converter_for(official_state_dict(container))
    state, report = converter.convert(container)
    if report.num_classes is not None:
        with torch.device('meta'):
            model = MODELS.build(converter.infer_config(state))
        state, report = converter.convert(container, model)
    print(report)
    meta: dict = {'converted_from': 'kienduynguyen/BoxeR', 'num_classes': report.num_classes}
    if report.num_classes == len(CocoCategoryIdDataset.METAINFO['classes']):
        meta['dataset_meta'] = CocoCategoryIdDataset.METAINFO
    return state, meta, report.complete


def run(args: argparse.Namespace) -> int:
    """Convert one file.

    Returns:
        Exit status: 0 if everything found its place, otherwise 1.
    """
    target = args.target or f'{PurePosixPath(args.source).stem}.safetensors'
    if args.reverse:
        ours = state_dict_of(read_checkpoint(args.source), args.source)
        state, complete = converter_for(ours).export(ours), True
        meta: dict = {}
        print(f'{len(state)} tensors renamed')
    else:
        state, meta, complete = convert(args.source)
    if not (complete or args.force):
        print(f'not every key fits: {target} was not written (--force writes it)', file=sys.stderr)
        return 1
    if target.endswith(('.pth', '.pt', '.ckpt')):
        atomic_save(state if args.reverse else {'meta': meta, 'state_dict': state}, target)
    else:
        save_safetensors(state, target, meta)
    print(f'written to {target}')
    return 0 if complete else 1


def main() -> int:
    """Read the command line and convert; returns the exit status."""
    args = parse_args()
    try:
        return run(args)
    except CheckpointError as error:  # names the file
        print(error, file=sys.stderr)
    except WriteError as error:
        print(error.strerror, file=sys.stderr)
    except ValueError as error:
        print(f'{args.source}: {error}', file=sys.stderr)
    return 1


if __name__ == '__main__':
    sys.exit(main())
