"""Print a config with everything it inherits: ``mim run boltz_mm print_config CONFIG``."""

import argparse
from pathlib import Path

import boltz_mm  # noqa: F401  before the config is read: its bases may say boltz_mm::
from boltz_mm.utils import launch


def main() -> None:
    """Read, override, print, and save if asked."""
    parser = argparse.ArgumentParser(description='Print the whole config')
    launch.add_config_arguments(parser)
    parser.add_argument('--save-path', help='also write it to this .py, .json or .yml file')
    args = parser.parse_args()
    cfg = launch.load_config(args.config, args.cfg_options)
    print(f'Config:\n{cfg.pretty_text}')
    if args.save_path is not None:
        path = Path(args.save_path)
        if path.suffix not in ('.py', '.json', '.yml'):
            launch.stop(f'--save-path must end with .py, .json or .yml, got {path}')
        path.parent.mkdir(parents=True, exist_ok=True)
        cfg.dump(str(path))
        print(f'saved to {path}')


if __name__ == '__main__':
    main()
