"""Time the operators against plain PyTorch.

Usage:
    python tools/benchmark/ops.py [--op NAME] [--device cpu|cuda] [--json] [--quick] [--repeats N]

Both sides run in turn in one process, after a warm-up; figures are medians.  The table also says how much of the
machine the operator uses: bytes of its inputs and outputs, each moved once, over the time, as a share of the measured
rate of a copy; and the FLOPs of its formula over the time, as a share of the measured rate of a matrix product.
``--quick`` shrinks the sizes, to see that everything runs; its figures mean nothing.
"""

import argparse
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

from boltz_mm import __version__, ops  # noqa: E402
from tools.benchmark.baselines import cluster_attention as plain_points  # noqa: E402
from tools.benchmark.baselines import grid_attention as plain  # noqa: E402
from tools.benchmark.baselines import point_deform as plain_deform  # noqa: E402
from tools.benchmark.baselines import point_merge as plain_merge  # noqa: E402
from tools.benchmark.point_sets import adaptive, grid  # noqa: E402
from tools.benchmark.timing import Record, compare, extra_bytes, time_once  # noqa: E402

HEADS, DEPTH = 8, 32
IMAGE_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # 800 x 1333 pixels, strides 8 to 64: 22,223 cells
QUICK_LEVELS = ((13, 21), (7, 11), (4, 6), (2, 3))
SIDES, QUICK_SIDES = (56, 128, 256, 512), (24,)  # of the canvas in cells of 4 pixels
MOST_PAIRS_BITS = 26  # of the pairs that a baseline visits


@dataclass
class Case:
    """One operator at one size.

    Attributes:
        op: Operator.
        name: The size.
        ours: Takes the leaves.
        baselines: By name; each takes the leaves.
        leaves: Inputs with gradients.
        differentiable: Whether there are gradients.
        part: The baselines compute one in so many of the queries, and their time is multiplied by it.
    """

    op: str
    name: str
    ours: Callable[..., Any]
    baselines: dict[str, Callable[..., Any]]
    leaves: list[Tensor]
    differentiable: bool = True
    part: int = 1

    def flops(self, backward: bool) -> int:
        """Of the operator's registered formula."""
        with FlopCounterMode(display=False) as counter:
            step(self.ours, self.leaves, backward)()
        return counter.get_total_flops()

    def moved_bytes(self, backward: bool) -> int:
        """Inputs and outputs once; backward reads the inputs again, and the outputs' gradients, and writes as much."""
        with torch.no_grad():
            outputs = as_tuple(self.ours(*self.leaves))
        inputs, results = (sum(t.nbytes for t in tensors) for tensors in (self.leaves, outputs))
        return inputs + results + (2 * inputs + results if backward else 0)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """The outputs of an operator as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def step(function: Callable[..., Any], leaves: list[Tensor], backward: bool) -> Callable[[], object]:
    """One call of the function, with the gradients of all leaves if ``backward``."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(*leaves)

        return forward
    with torch.no_grad():
        cotangents = [torch.ones_like(output) for output in as_tuple(function(*leaves))]

    def forward_and_backward() -> object:
        outputs = as_tuple(function(*leaves))
        return outputs, torch.autograd.grad(outputs, leaves, cotangents)

    return forward_and_backward


def windows(levels: Sequence[tuple[int, int]], device: str) -> Tensor:
    """The encoder's boxes ``[1, S, H, L, 4]``: four cells wide, shifted and scaled as at the start of a training."""
    rows = []
    for height, width in levels:
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing='ij')
        sizes = torch.tensor([4 / width, 4 / height]).expand(height, width, 2)
        rows.append(torch.cat([torch.stack([x / width, y / height], -1), sizes], -1).reshape(-1, 4))
    reference = torch.cat(rows)[None, :, None, None]
    offsets = torch.rand(HEADS, len(levels), 4) / 8
    return (reference + offsets * reference[..., 2:].repeat(1, 1, 1, 1, 2)).contiguous().to(device)


def random_boxes(queries: int, levels: int, device: str) -> Tensor:
    """Centres anywhere, sizes up to 0.3 of the image: ``[1, Q, H, L, 4]``."""
    return torch.cat([torch.rand(1, queries, HEADS, levels, 2), torch.rand(1, queries, HEADS, levels, 2) * 0.3], -1).to(
        device
    )


def values(levels: Sequence[tuple[int, int]], device: str, dtype: torch.dtype) -> Tensor:
    """Random ``[1, S, H, D]``."""
    cells = sum(height * width for height, width in levels)
    return torch.randn(1, cells, HEADS, DEPTH).to(device, dtype)


def box_cases(levels: Sequence[tuple[int, int]], device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Box attention of an encoder layer: every cell is a query."""
    value, shapes = values(levels, device, dtype), torch.tensor(levels, device=device)
    points, queries = ops.grid_points(2, device=device), value.shape[1]
    logits = torch.randn(1, queries, HEADS, len(levels), 4, device=device)
    for name, boxes in (('local', windows(levels, device)), ('random', random_boxes(queries, len(levels), device))):
        yield Case(
            'box_attention',
            f'{queries} q 8x32 2x2 {name}',
            lambda v, b, w: ops.box_attention(v, shapes, b, w, points),
            {'grid_sample per level': lambda v, b, w: plain.box_attention(v, levels, b, w, points)},
            [value, boxes, logits],
        )


def instance_cases(levels: Sequence[tuple[int, int]], device: str, dtype: torch.dtype, queries: int) -> Iterator[Case]:
    """Instance attention of a decoder layer; the boxes of a query are the same for all heads and levels."""
    value, shapes = values(levels, device, dtype), torch.tensor(levels, device=device)
    points = ops.grid_points(14, device=device)
    boxes = random_boxes(queries, len(levels), device)[:, :, :1, :1].expand(-1, -1, HEADS, len(levels), -1).contiguous()
    logits = torch.randn(1, queries, HEADS, len(levels), 2, 2, device=device)
    yield Case(
        'instance_attention',
        f'{queries} q 8x32 14x14',
        lambda v, b, w: ops.instance_attention(v, shapes, b, w, points),
        {'grid_sample per level': lambda v, b, w: plain.instance_attention(v, levels, b, w, points)},
        [value, boxes, logits],
    )


def deform_cases(levels: Sequence[tuple[int, int]], device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Deformable attention of an encoder layer, at the points of local boxes."""
    value, shapes = values(levels, device, dtype), torch.tensor(levels, device=device)
    boxes = windows(levels, device)
    locations = ops.box_sampling_locations(boxes, ops.grid_points(2, device=device))
    weights = torch.randn(locations.shape[:-1], device=device).flatten(3).softmax(-1).view(locations.shape[:-1])
    baselines: dict[str, Callable[..., Any]] = {
        'grid_sample per level': lambda v, *r: plain.deform_attention(v, levels, *r)
    }
    if dtype == torch.float32 and device == 'cpu' and importlib.util.find_spec('mmcv'):
        baselines['mmcv multi_scale_deformable_attn_pytorch'] = lambda v, *r: plain.mmcv_deform_attention(v, levels, *r)
    yield Case(
        'deform_attention',
        f'{value.shape[1]} q 8x32 4 points',
        lambda v, at, w: ops.deform_attention(v, shapes, at, w),
        baselines,
        [value, locations, weights],
    )


def neighbor_cases(sides: Sequence[int], device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The searches of AutoFocusFormer on square canvases, 512 pixels having a side of 128."""
    if dtype != torch.float32:
        return  # positions are float32 whatever the features are
    for side in sides:
        cells, many, few = grid(side, side), adaptive(side, side, 1 / 4), adaptive(side, side, 1 / 16)
        means = ops.space_filling_clusters(cells, 8, (side, side)).means
        for name, query, points, k in (
            ('grid 9', cells, cells, 9),
            ('grid to 1/16 4', cells, few, 4),
            ('grid to means 6', cells, means, 6),
            ('1/4 itself 2', many, many, 2),
        ):
            part = 1 << max(0, (query.shape[1] * points.shape[1]).bit_length() - MOST_PAIRS_BITS)
            which = 'all pairs' if part == 1 else f'all pairs of 1/{part} of the queries, times {part}'
            yield Case(
                'knn_points',
                f'{side}x{side} {name}',
                partial(ops.knn_points, k=k, return_distance=True, canvas=(side, side)),
                {which: lambda q, p, k=k, part=part: plain_points.knn(q[:, ::part], p, k)},
                [query.to(device), points.to(device)],
                differentiable=False,
                part=part,
            )


def cluster_cases(sides: Sequence[int], device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Clusters of 8 tokens on square canvases, 224 pixels having a side of 56."""
    if dtype != torch.float32:
        return
    for side in sides:
        for name, pos in (('grid', grid(side, side)), ('1/4', adaptive(side, side, 1 / 4))):
            yield Case(
                'space_filling_clusters',
                f'{side}x{side} {name}',
                lambda p, side=side: ops.space_filling_clusters(p, 8, (side, side))[:4],
                {'the same in PyTorch': lambda p, side=side: plain_points.space_filling_clusters(p, 8, side, side)[:3]},
                [pos.to(device)],
                differentiable=False,
            )


# Side of the canvas, share of its tokens, heads, channels of a head, clusters seen, and tokens of a cluster: the stages
# of Tiny at 224 pixels (the last sees everything), other head widths, Base at 384 pixels, and 512 and 1024 pixels.
ATTENTIONS = (
    (56, 1, 2, 32, 6, 8), (56, 1 / 4, 4, 32, 6, 8), (56, 1 / 16, 8, 32, 6, 8), (56, 1 / 64, 16, 32, None, 8),
    (56, 1, 2, 24, 6, 8), (56, 1, 2, 16, 6, 8), (96, 1, 4, 32, 6, 24), (128, 1, 2, 32, 6, 8), (256, 1, 2, 32, 6, 8),
)  # fmt: skip


def attention_cases(
    sizes: Sequence[tuple[int, float, int, int, int | None, int]], device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """One cluster attention; keys and values are parts of one tensor, as the model has them."""
    for side, share, heads, depth, seen, size in sizes:
        pos = grid(side, side) if share == 1 else adaptive(side, side, share)
        near = None
        if seen is not None:
            clusters = ops.space_filling_clusters(pos, size, (side, side))
            pos, near = clusters.pos, ops.nearest_clusters(clusters.pos, clusters.means, seen).to(device)
        count = pos.shape[1]
        query, both = torch.randn(1, count, heads, depth), torch.randn(1, count, heads, 2, depth)
        parameters = [torch.randn(heads, last).to(device) for last in (5, depth, depth)]
        places = {'query_pos': pos.to(device), 'key_pos': pos.to(device), 'nearest': near}
        others = places | {'cluster_size': 1 if near is None else size, 'scale': depth**-0.5}

        def attend(
            function: Callable[..., Tensor], q: Tensor, kv: Tensor, *rest: Tensor, others: dict[str, Any] = others
        ) -> Tensor:
            named = dict(zip(('bias_weight', 'blank_key', 'blank_value'), rest, strict=True))
            return function(q, kv[..., 0, :], kv[..., 1, :], **named, **others)

        def reference(*args: Tensor, attend: Callable[..., Tensor] = attend) -> Tensor:
            with ops.use_backend('reference'):
                return attend(ops.cluster_attention, *args)

        yield Case(
            'cluster_attention',
            f'{count} {heads}x{depth} ' + ('all' if near is None else f'{seen}x{size}'),
            partial(attend, ops.cluster_attention),
            {'embedding bags': reference},
            [query.to(device, dtype), both.to(device, dtype), *parameters],
        )


def on_reference(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """An operator on the PyTorch reference."""
    with ops.use_backend('reference'):
        return function(*args)


def point_deform_cases(sides: Sequence[int], device: str, dtype: torch.dtype) -> Iterator[Case]:
    """A layer of AutoFocusFormer's pixel decoder: each token of three levels is a query."""
    for side in sides:
        cells = grid(side, side)
        levels = [adaptive(side, side, 1 / share) for share in (64, 16, 4)]
        # As the backbone leaves them: neighbours in the image stand near each other.
        levels = [ops.space_filling_clusters(level, 8, (side, side)).pos for level in levels]
        sizes, positions = [level.shape[1] for level in levels], torch.cat(levels, 1).to(device)
        tables = torch.stack([ops.knn_points(cells, level, 4) for level in levels], 1).int().to(device)
        prefix = (1, positions.shape[1], HEADS, len(sizes), 4)
        # At the start of a training: point i of a head lies i cells away in the direction of the head.
        angles = torch.arange(HEADS) * (2 * torch.pi / HEADS)
        away = torch.stack([angles.cos(), angles.sin()], -1)[:, None, None] * torch.arange(1, 5)[:, None]
        leaves = [
            torch.randn(1, positions.shape[1], HEADS, DEPTH).to(device, dtype),
            (away + torch.randn(*prefix, 2) / 2).to(device),
            torch.randn(prefix, device=device),
            torch.tensor([3.1], device=device),
        ]
        constants = (positions, sizes, tables, (side, side), positions)

        def arrange(
            function: Callable[..., Tensor], value: Tensor, *rest: Tensor, constants: tuple[Any, ...] = constants
        ) -> Tensor:
            return function(value, *constants, *rest)

        yield Case(
            'point_deform_attention',
            f'{positions.shape[1]} q 8x32 3x4',
            partial(arrange, ops.point_deform_attention),
            {'embedding bags': partial(arrange, partial(on_reference, ops.point_deform_attention))}
            | ({'gathers': partial(arrange, plain_deform.attention)} if side <= SIDES[1] else {}),
            leaves,
        )


def interpolation_cases(sides: Sequence[int], device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Features of a quarter of the cells at all cells, as in the pixel decoder."""
    for side in sides:
        query, pos = grid(side, side), adaptive(side, side, 1 / 4)
        places = pos.to(device), query.to(device), ops.knn_points(query, pos, 4).to(device), 3.0
        yield Case(
            'inverse_distance_interpolate',
            f'{query.shape[1]} of {pos.shape[1]} x256',
            lambda feat, places=places: ops.inverse_distance_interpolate(feat, *places),
            {
                'embedding bags': lambda f, p=places: on_reference(ops.inverse_distance_interpolate, f, *p),
                'gathers': lambda f, p=places: plain_deform.interpolate(f, *p),
            },
            [torch.randn(1, pos.shape[1], HEADS * DEPTH).to(device, dtype)],
        )


def merge_cases(merges: Sequence[int], convolutions: Sequence[int], device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The first merge of AFF-Tiny (a quarter of the tokens, 48 neighbours), and the pixel decoder's 9-point sums."""
    for side, kind in (*((side, 'merge') for side in merges), *((side, 'conv') for side in convolutions)):
        clusters = ops.space_filling_clusters(grid(side, side), 8, (side, side))
        cells, channels = clusters.pos, 64 if kind == 'merge' else 256
        parameters = [torch.randn(4, 5) / 8, torch.randn(4), torch.rand(4) + 0.5, torch.randn(4)]
        if kind == 'merge':
            query = adaptive(side, side, 1 / 4)
            place = dict(nearest=ops.nearest_clusters(query, clusters.means, 6), cluster_size=8)
            parameters.append(torch.rand(1, side * side))
        else:
            query, place = cells, dict(index=ops.knn_points(cells, cells, 9, canvas=(side, side)), sign=-1)
        place |= dict(query_pos=query, key_pos=cells)
        place = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in place.items()}
        neighbours = 48 if kind == 'merge' else 9
        yield Case(
            'point_merge',
            f'{kind} {query.shape[1]}x{neighbours} of {side * side}',
            partial(_merge, place),
            {
                'gathered rows': partial(plain_merge.gathered, **place),
                'embedding_bag': partial(plain_merge.bags, **place),
            },
            [torch.randn(1, side * side, channels).to(device, dtype), *(p.to(device) for p in parameters)],
        )


def _merge(place: dict[str, Any], feat: Tensor, *parameters: Tensor) -> Tensor:
    names = ('weight', 'bias', 'norm_weight', 'norm_bias', 'importance')
    return ops.point_merge(feat, **dict(zip(names, parameters, strict=False)), **place)


OPERATORS: dict[str, Callable[..., Iterator[Case]]] = {
    'box_attention': lambda quick, **kwargs: box_cases(**kwargs),
    'cluster_attention': lambda quick, levels, **kwargs: attention_cases(
        ((16, 1, 2, 8, 3, 8), (16, 1 / 4, 2, 8, None, 8)) if quick else ATTENTIONS, **kwargs
    ),
    'deform_attention': lambda quick, **kwargs: deform_cases(**kwargs),
    'instance_attention': lambda quick, **kwargs: instance_cases(queries=20 if quick else 300, **kwargs),
    'inverse_distance_interpolate': lambda quick, levels, **kwargs: interpolation_cases(
        QUICK_SIDES if quick else (128, 256), **kwargs
    ),
    'knn_points': lambda quick, levels, **kwargs: neighbor_cases(QUICK_SIDES if quick else SIDES, **kwargs),
    'point_deform_attention': lambda quick, levels, **kwargs: point_deform_cases(
        QUICK_SIDES if quick else (128, 256), **kwargs
    ),
    'point_merge': lambda quick, levels, **kwargs: merge_cases(
        *((QUICK_SIDES, QUICK_SIDES) if quick else ((56, 128, 256), (128,))), **kwargs
    ),
    'space_filling_clusters': lambda quick, levels, **kwargs: cluster_cases(QUICK_SIDES if quick else SIDES, **kwargs),
}


def cases(op: str, device: str, quick: bool) -> Iterator[tuple[str, Case]]:
    """All cases of an operator, with the name of the dtype of value."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        levels = QUICK_LEVELS if quick else IMAGE_LEVELS
        for case in OPERATORS[op](quick, levels=levels, device=device, dtype=dtype):
            for leaf in case.leaves:
                leaf.requires_grad_(case.differentiable)
            yield str(dtype).removeprefix('torch.'), case


@dataclass(frozen=True)
class Result:
    """A record, with what the operator moved and computed."""

    record: Record
    moved_bytes: int
    flops: int


def results(op: str, device: str, quick: bool, repeats: int) -> Iterator[Result]:
    """Time all cases of an operator."""
    for dtype, case in cases(op, device, quick):
        for backward in (False, True) if case.differentiable else (False,):
            ours = step(case.ours, case.leaves, backward)
            extra, moved, flops = extra_bytes(ours, device), case.moved_bytes(backward), case.flops(backward)
            direction = 'fwdbwd' if backward else 'fwd'
            for name, function in case.baselines.items():
                ms, baseline_ms = compare(ours, step(function, case.leaves, backward), device, repeats)
                record = Record(op, case.name, device, dtype, direction, ms, name, baseline_ms * case.part, extra)
                yield Result(record, moved, flops)


def machine_rates(device: str, quick: bool) -> tuple[float, float]:
    """Bytes per second of a copy (read and written), FLOPs per second of a float32 matrix product."""
    count, side = (2**20, 256) if quick else (2**26, 2048)
    source, target = torch.zeros(count, device=device), torch.zeros(count, device=device)
    left, right = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    copying = partial(target.copy_, source)
    multiplying = partial(torch.mm, left, right)
    copy_ms, product_ms = (min(time_once(work, device) for _ in range(8)) for work in (copying, multiplying))
    return 2 * source.nbytes / copy_ms * 1e3, 2 * side**3 / product_ms * 1e3


def table_row(result: Result, rates: tuple[float, float]) -> str:
    """One line of the table."""
    record = result.record
    bandwidth, rate = result.moved_bytes / record.ms * 1e3, result.flops / record.ms * 1e3
    return (
        f'{record.name:23}{record.case:27}{record.dtype:9}{record.direction:7}{record.ms:9.2f}{record.baseline_ms:10.2f}'
        f'{record.ratio:7.1f}{record.extra_bytes / 2**20:8.1f}{result.moved_bytes / 2**20:8.1f}'
        f'{bandwidth / rates[0]:8.1%}{rate / rates[1]:8.1%}  {record.baseline}'
    )


def main() -> None:
    """Parse the arguments, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--op', choices=sorted(OPERATORS), help='time one operator only')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--json', action='store_true', help='one JSON object a line')
    parser.add_argument('--quick', action='store_true', help='tiny sizes, to see that everything runs')
    parser.add_argument('--repeats', type=int, help='timed runs of each side (7 on a CPU, 50 on a CUDA device)')
    args = parser.parse_args()
    repeats = args.repeats if args.repeats is not None else 2 if args.quick else 50 if args.device == 'cuda' else 7
    if repeats < 1:
        parser.error(f'--repeats must be at least 1, got {repeats}')
    rates = machine_rates(args.device, args.quick)
    if not args.json:
        where = torch.cuda.get_device_name() if args.device == 'cuda' else platform.machine()
        print(
            f'boltz_mm {__version__}, torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, '
            f'backends {ops.available_backends()}, copy {rates[0] / 1e9:.1f} GB/s, '
            f'matrix product {rates[1] / 1e9:.0f} GFLOP/s\n'
            f'{"op":23}{"case":27}{"dtype":9}{"dir":7}{"ms":>9}{"base ms":>10}{"ratio":>7}{"extra":>8}{"moved":>8}'
            f'{"copy":>8}{"mm":>8}  baseline (extra and moved in MiB)'
        )
    for op in [args.op] if args.op else sorted(OPERATORS):
        for result in results(op, args.device, args.quick, repeats):
            print(result.record.as_json('op') if args.json else table_row(result, rates), flush=True)


if __name__ == '__main__':
    main()
