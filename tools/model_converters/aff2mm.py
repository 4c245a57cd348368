"""Convert an official AutoFocusFormer checkpoint (classifier or segmentor) to ours, or ours to the official layout.

    python tools/model_converters/aff2mm.py aff_tiny.pth aff-tiny.safetensors
    python tools/model_converters/aff2mm.py --backbone aff_tiny.pth aff-tiny_backbone.safetensors
    python tools/model_converters/aff2mm.py --framework mmseg ade20k_tiny.pth point-mask2former_aff-tiny.safetensors
    python tools/model_converters/aff2mm.py --reverse aff-tiny.safetensors aff_tiny.pth

What the file holds (variant, classes) is read from it and checked against a model of that shape; every key that does
not fit is printed, and then nothing is written unless --force is given.  With --arch the file has to hold that
variant.
"""

import argparse
import sys
from pathlib import PurePosixPath

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as MMENGINE_MODELS

import boltz_mm.models  # noqa: F401  registers
from boltz_mm.converters.aff import (
    convert_aff,
    export_aff,
    infer_aff_arch,
    infer_aff_classifier_config,
    infer_aff_segmentor_config,
)
from boltz_mm.converters.common import ConversionReport, StateDict
from boltz_mm.models.backbones.aff import AFF, ARCHS, layout_of_weights
from boltz_mm.utils.checkpoint import CheckpointError, atomic_save, read_checkpoint, save_safetensors, state_dict_of
from boltz_mm.utils.files import WriteError

HEADS = {'mmdet': 'panoptic_head', 'mmseg': 'decode_head'}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='checkpoint to read (.pth, .pkl, .safetensors, or an https address)')
    parser.add_argument(
        'target', nargs='?', help='file to write: safetensors, unless it ends in .pth, .pt or .ckpt (torch.save). '
        'Default: the name of the source with .safetensors, in the current folder'
    )  # fmt: skip
    parser.add_argument('--ema', action='store_true', help='take the averaged weights of a training checkpoint')
    parser.add_argument('--backbone', action='store_true', help='the backbone alone, to start a detector from')
    parser.add_argument('--framework', choices=list(HEADS), default='mmdet', help='whose segmentor gets the weights')
    parser.add_argument('--arch', choices=list(ARCHS), help='variant that the file has to hold')
    parser.add_argument('--reverse', action='store_true', help='from our layout to the official one')
    parser.add_argument('--force', action='store_true', help='write although keys do not fit')
    return parser.parse_args()


def model_config(state: StateDict, args: argparse.Namespace) -> ConfigDict:
    """A model that fits the weights, to find what is missing."""
    if args.backbone:
        return ConfigDict(type='boltz_mm.AFF', arch=infer_aff_arch(state))
    if any(key.startswith(f'{HEADS[args.framework]}.') for key in state):
        return infer_aff_segmentor_config(state, HEADS[args.framework])
    return ConfigDict(infer_aff_classifier_config(state))


def build_on_meta(config: ConfigDict, state: StateDict) -> torch.nn.Module:
    """Build without memory; a backbone becomes the part of that name, without output norms that the file lacks."""
    with torch.device('meta'):
        model = MMENGINE_MODELS.build(config)
        if not isinstance(model, AFF):
            return model
        for i in model.out_indices:
            if f'backbone.norm{i}.weight' not in state:
                delattr(model, f'norm{i}')
        return torch.nn.ModuleDict({'backbone': model})


def check_arch(state: StateDict, arch: str) -> None:
    """Raise a ValueError, which names both, if the weights are those of another variant."""
    with torch.device('meta'):
        wanted = layout_of_weights(AFF(arch).state_dict())
    found = layout_of_weights(state, 'backbone.')
    if found != wanted:
        raise ValueError(f'the weights are of AFF {found}, not of {arch}: AFF {wanted}')


def convert(args: argparse.Namespace) -> tuple[StateDict, dict, ConversionReport]:
    """Read and convert an official file, and print what became of its keys.

    Returns:
        The state dict, what is known about it, and the report.
    """
    container = read_checkpoint(args.source)
    options = {'ema': args.ema, 'backbone_only': args.backbone, 'head': HEADS[args.framework]}
    state, _ = convert_aff(container, **options)
    variant = layout_of_weights(state, 'backbone.')
    if args.arch:
        check_arch(state, args.arch)
    state, report = convert_aff(container, build_on_meta(model_config(state, args), state), **options)
    print(f'AFF {variant}\n{report}')
    return state, {'converted_from': 'apple/ml-autofocusformer', 'num_classes': report.num_classes}, report


def run(args: argparse.Namespace) -> int:
    """Convert one file.

    Returns:
        Exit status: 0 if everything found its place, otherwise 1.
    """
    target = args.target or f'{PurePosixPath(args.source).stem}.safetensors'
    meta: dict = {}
    complete = True
    if args.reverse:
        state = export_aff(state_dict_of(read_checkpoint(args.source), args.source))
        print(f'{len(state)} tensors renamed')
    else:
        state, meta, report = convert(args)
        complete = report.complete
    if not (complete or args.force):
        print(f'not every key fits: {target} was not written (--force writes it)', file=sys.stderr)
        return 1
    if target.endswith(('.pth', '.pt', '.ckpt')):
        atomic_save({'model': state} if args.reverse else {'meta': meta, 'state_dict': state}, target)
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
