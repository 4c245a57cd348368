"""Plots curves of training logs and tells the time of an iteration; arguments as in mmdet.

Example:
    python tools/analysis_tools/analyze_logs.py plot_curve work_dirs/NAME --keys loss bbox_mAP_50 --out curves.png
    python tools/analysis_tools/analyze_logs.py cal_train_time work_dirs/NAME/TIMESTAMP/vis_data/scalars.json
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from boltz_mm.visualization.logs import TrainingLog, loss_keys, metric_keys, plot_curves, read_log


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest='task', required=True)
    plot = tasks.add_parser('plot_curve', help='draw losses, metrics or any other logged number')
    time = tasks.add_parser('cal_train_time', help='average time per training iteration')
    for task in (plot, time):
        task.add_argument('json_logs', nargs='+', help='scalars.json files, or working folders (their latest log)')
    plot.add_argument('--keys', nargs='+', help='what to plot (default: losses and AP of the first log)')
    plot.add_argument('--start-epoch', type=int, default=1, help='first epoch to plot')
    plot.add_argument('--eval-interval', type=int, help='not needed, accepted as in mmdet')
    plot.add_argument('--title', help='title of the figure')
    plot.add_argument('--legend', nargs='+', help='name of each curve')
    plot.add_argument('--backend', help='matplotlib backend of the window')
    plot.add_argument('--style', default='default', help='matplotlib style')
    plot.add_argument('--out', help='write the picture to this file instead of showing it')
    time.add_argument('--include-outliers', action='store_true', help='include the first line of every epoch')
    return parser.parse_args(argv)


def cal_train_time(logs: list[TrainingLog], args: argparse.Namespace) -> None:
    """Print slowest, fastest and average time of an iteration."""
    for log in logs:
        times = log.epoch_times(args.include_outliers)
        seconds = np.array(list(times.values()))
        slowest, fastest = max(times, key=times.__getitem__), min(times, key=times.__getitem__)
        print(f'-----Analyze train time of {log.name}-----')
        print(f'slowest epoch {slowest}, average time is {times[slowest]:.4f} s/iter')
        print(f'fastest epoch {fastest}, average time is {times[fastest]:.4f} s/iter')
        print(f'time std over epochs is {seconds.std():.4f}')
        print(f'average iter time: {seconds.mean():.4f} s/iter\n')


def plot_curve(logs: list[TrainingLog], args: argparse.Namespace) -> None:
    """Draw the curves into a file or a window."""
    import matplotlib.pyplot as plt

    keys = args.keys or [*loss_keys(logs[0]), *metric_keys(logs[0])]
    if args.backend is not None:
        plt.switch_backend(args.backend)
    options = {'legend': args.legend, 'title': args.title, 'start_epoch': args.start_epoch}
    with plt.style.context(args.style):
        if args.out is None:
            plot_curves(logs, keys, figure=plt.figure(layout='constrained'), **options)
            plt.show()
        else:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            plot_curves(logs, keys, **options).savefig(args.out, dpi=130)
            print(f'save curve to: {args.out}')


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parse_args(argv)
    try:
        logs = [read_log(path) for path in args.json_logs]
        {'plot_curve': plot_curve, 'cal_train_time': cal_train_time}[args.task](logs, args)
    except (KeyError, ValueError, OSError) as error:
        print(f'analyze_logs: {error.args[0] if isinstance(error, KeyError) else error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
