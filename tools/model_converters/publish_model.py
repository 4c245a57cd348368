"""Make a file to hand out from a training checkpoint.

    python tools/model_converters/publish_model.py work_dirs/boxer/epoch_24.pth boxer_r50

writes boxer_r50-0123abcd.safetensors: weights, class names and little else, named after the beginning of its SHA-256.
"""

import argparse
import sys

from boltz_mm.utils.checkpoint import CheckpointError
from boltz_mm.utils.files import WriteError
from boltz_mm.utils.publish import publish


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='checkpoint to read')
    parser.add_argument('target', nargs='?', help='path to write, without suffix. Default: that of the source')
    parser.add_argument('--with-config', action='store_true', help='keep the text of the config as well')
    parser.add_argument('--half', action='store_true', help='store the weights in 16 bits')
    return parser.parse_args()


def main() -> int:
    """Publish one checkpoint.

    Returns:
        Exit status.
    """
    args = parse_args()
    try:
        written = publish(args.source, args.target, with_config=args.with_config, half=args.half)
    except (CheckpointError, WriteError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f'written to {written}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
