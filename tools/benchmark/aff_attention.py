"""One cluster attention in every form, forward and backward: which PyTorch form is the best to compare with.

The numbers of tokens and heads are those of the stages of Tiny at 224 and 512 pixels; every side gets its indices ready
made, as the blocks of a stage share them.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from boltz_mm import ops
from tools.benchmark.baselines import cluster_attention as gather
from tools.benchmark.baselines.bag_attention import BagAttention
from tools.benchmark.timing import Record, Work, extra_bytes, medians

DEPTH, CLUSTER, SEEN = 32, 8, 6


def matrix_products(query: Tensor, key: Tensor, value: Tensor, index: Tensor, bias: Tensor) -> Tensor:
    """Gathered rows as in the official tests, but multiplied as matrices."""
    logits = (gather._gather_heads(key, index) @ query.unsqueeze(-1)).squeeze(-1) + bias
    return (logits.softmax(-1).unsqueeze(3) @ gather._gather_heads(value, index)).squeeze(3)


def elementwise(query: Tensor, key: Tensor, value: Tensor, index: Tensor, bias: Tensor) -> Tensor:
    """The form of the official tests."""
    return gather.cluster_av((gather.cluster_qk(query, key, index) + bias).softmax(-1), value, index)


def torch_bags(query: Tensor, key: Tensor, value: Tensor, index: Tensor, bias: Tensor) -> Tensor:
    """Values by an embedding bag with the backward that PyTorch has for it; keys gathered."""
    batch, heads, keys, depth = value.shape
    logits = (gather._gather_heads(key, index) @ query.unsqueeze(-1)).squeeze(-1) + bias
    weights = logits.softmax(-1)
    first = torch.arange(batch * heads).view(batch, heads, 1, 1) * keys
    flat = (index.unsqueeze(1) + first).flatten(0, 2)
    out = F.embedding_bag(flat, value.flatten(0, 2), mode='sum', per_sample_weights=weights.flatten(0, 2))
    return out.view(batch, heads, -1, depth)


def forms(device: str, quick: bool, repeats: int) -> Iterator[Record]:
    """Lines of our operator against each form, the sides in turn."""
    stages = ((64, 2),) if quick else ((196, 8), (784, 4), (3136, 2), (16384, 2))
    for tokens, heads in stages:
        generator = torch.Generator().manual_seed(0)
        side = int(tokens**0.5)
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing='ij')
        pos = torch.stack([x, y], -1).view(1, -1, 2).float()
        clusters = ops.space_filling_clusters(pos, CLUSTER, (side, side))
        pos = clusters.pos
        nearest = ops.nearest_clusters(pos, clusters.means, SEEN, canvas=(side, side))
        index = (nearest.long()[..., None] * CLUSTER + torch.arange(CLUSTER)).flatten(2).clamp(max=tokens - 1)
        leaves = [torch.randn(1, tokens, heads, DEPTH, generator=generator) for _ in range(3)]
        leaves += [torch.randn(heads, count, generator=generator) for count in (5, DEPTH, DEPTH)]
        leaves += [torch.randn(heads, generator=generator)]
        moved = [pos, nearest, index, *leaves]
        pos, nearest, index, *leaves = (tensor.to(device) for tensor in moved)
        radius = side - 1
        table = gather.offset_table(radius, pos.device)
        rows = gather.table_rows(gather.gather_rows(pos, index) - pos[:, :, None], radius, False)

        def gathered(
            form: Callable[..., Tensor], rows: Tensor = rows, table: Tensor = table, index: Tensor = index
        ) -> Callable[..., Tensor]:
            def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, _: Tensor, __: Tensor, b: Tensor):
                bias = F.linear(table, weight, b)[rows].permute(0, 3, 1, 2)
                heads_first = (part.transpose(1, 2).contiguous() for part in (query, key, value))
                return form(*heads_first, index, bias)

            return attend

        def operator(function: Callable[..., Tensor], pos: Tensor = pos, nearest: Tensor = nearest):
            def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bk: Tensor, bv: Tensor, b: Tensor):
                return function(
                    query, key, value, query_pos=pos, key_pos=pos, nearest=nearest, cluster_size=CLUSTER,
                    bias_weight=weight, bias=b, blank_key=bk, blank_value=bv,
                )  # fmt: skip

            return attend

        sides = {
            'ours': operator(ops.cluster_attention),
            'gather, elementwise products (official tests)': gathered(elementwise),
            'gather, matrix products': gathered(matrix_products),
            "gather for keys, PyTorch's embedding bag for values": gathered(torch_bags),
            'embedding bags, inverted index in backward': operator(BagAttention()),
        }
        for direction in ('fwd', 'fwdbwd'):
            works = {name: _work(function, leaves, direction) for name, function in sides.items()}
            times = dict(zip(works, medians(list(works.values()), device, repeats), strict=True))
            ours, *others = times
            memory = {name: extra_bytes(work, device) for name, work in works.items()}
            for name in others:
                yield Record(
                    'aff_attention', f'n={tokens} {heads}x{DEPTH}', device, 'float32', direction, times[ours], name,
                    times[name], memory[ours], baseline_extra_bytes=memory[name],
                )  # fmt: skip


def _work(function: Callable[..., Tensor], leaves: list[Tensor], direction: str) -> Work:
    if direction == 'fwd':

        def forward() -> object:
            with torch.no_grad():
                return function(*leaves)

        return forward
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]

    def both() -> object:
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return both
