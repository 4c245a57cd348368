"""Inputs of cluster attention for tests, and the formula with gathers as an independent reference."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from boltz_mm.ops import cluster_attention

LEAVES = ('query', 'key', 'value', 'bias_weight', 'bias', 'blank_key', 'blank_value')
# What differs from the defaults of `make_case`; every row is another way through the kernels.
CASES: dict[str, dict[str, Any]] = {
    'partial': {},  # the last cluster is padded
    'whole': {'keys': 24, 'cluster_size': 4},
    'single': {'cluster_size': 1, 'lists': 5},
    'wide': {'cluster_size': 24, 'keys': 101, 'depth': 24, 'lists': 2, 'scale': 0.7},
    'odd': {'cluster_size': 3, 'depth': 17, 'heads': 3, 'lists': 7},
    'one_cluster': {'cluster_size': 9, 'keys': 7, 'lists': 1},
    'global': {'lists': None, 'keys': 21},
    'plain': {'bias': False, 'blank': False},
    'bounded': {'max_offset': 2, 'shared': True},
    'more_queries': {'queries': 90, 'batch': 3, 'keys': 17, 'lists': 2, 'depth': 32},
}


@dataclass
class ClusterCase:
    """Leaves by name, and the arguments that have no gradient."""

    leaves: dict[str, Tensor]
    others: dict[str, Any] = field(default_factory=dict)

    def output(self) -> Tensor:
        """The output, attached to the leaves."""
        return cluster_attention(**self.leaves, **self.others)

    def run(self, **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and the gradients of a fixed random projection of it."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.leaves.items()}
        output = ClusterCase(leaves, {**self.others, **changes}).output()
        return output, self.gradients(output, leaves)

    def expected(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of the formula with gathers, computed in ``dtype`` throughout."""
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves.items()}
        output = gathered(leaves, {k: v.to(dtype) if k.endswith('pos') else v for k, v in self.others.items()})
        return output, self.gradients(output, leaves)

    def gradients(self, output: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of a projection whose numbers the dtype of the case can hold."""
        generator = torch.Generator().manual_seed(3)
        cotangent = torch.randn(output.shape, generator=generator).to(self.leaves['query'].dtype).to(output)
        grads = torch.autograd.grad(output, list(leaves.values()), cotangent)
        return dict(zip(leaves, grads, strict=True))


def make_case(
    name: str = 'partial', dtype: torch.dtype = torch.float64, *, seed: int = 0, **changes: Any
) -> ClusterCase:
    """Random inputs of a row of ``CASES``; keys and values are parts of one tensor, as a linear layer gives them."""
    sizes = {
        'batch': 2, 'queries': 11, 'keys': 29, 'heads': 2, 'depth': 16, 'lists': 3, 'cluster_size': 8, 'scale': 1.0,
        'max_offset': None, 'bias': True, 'blank': True, 'shared': False,
    } | CASES[name] | changes  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    batch, queries, keys, heads, depth = (sizes[k] for k in ('batch', 'queries', 'keys', 'heads', 'depth'))
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    both = normal(batch, keys, heads, 2, depth)
    leaves = {'query': normal(batch, queries, heads, depth), 'key': both[..., 0, :], 'value': both[..., 1, :]}
    if sizes['bias']:
        leaves |= {'bias_weight': (normal(heads, 5) / 4).to(compute), 'bias': normal(heads).to(compute)}
    if sizes['blank']:
        leaves |= {name: normal(heads, depth).to(compute) for name in ('blank_key', 'blank_value')}
    size, images = sizes['cluster_size'], 1 if sizes['shared'] else batch
    nearest = None
    if sizes['lists'] is not None:
        nearest = integers(max(1, -(-keys // size)), images, queries, sizes['lists']).int()
    others = {
        'query_pos': integers(9, images, queries, 2).to(compute),
        'key_pos': integers(9, images, keys, 2).to(compute),
        'nearest': nearest,
        'cluster_size': size if nearest is not None else 1,
        'scale': sizes['scale'],
        'max_offset': sizes['max_offset'],
    }
    return ClusterCase(leaves, others)


def gathered(leaves: dict[str, Tensor], others: dict[str, Any]) -> Tensor:
    """The formula with gathered keys and values, one operation after the other."""
    query, key, value = (leaves[name] for name in ('query', 'key', 'value'))
    batch, queries, heads, _ = query.shape
    keys, size, nearest = key.shape[1], others['cluster_size'], others['nearest']
    if nearest is None:
        index = torch.arange(keys).expand(batch, queries, keys)
    else:
        index = (nearest.long()[..., None] * size + torch.arange(size)).flatten(2).expand(batch, -1, -1)
    padded = index >= keys
    index = torch.where(padded, 0, index)
    image = torch.arange(batch)[:, None, None]
    logits = torch.einsum('bnhd,bnkhd->bhnk', query, key[image, index]) * others['scale']
    offset = others['key_pos'].expand(batch, -1, -1)[image, index] - others['query_pos'][:, :, None]
    if others['max_offset'] is not None:
        offset = offset.clamp(-others['max_offset'], others['max_offset'])
    if 'bias_weight' in leaves:
        x, y = offset.unbind(-1)
        d = (x * x + y * y).sqrt()
        features = torch.stack([x, y, d, (y / d).nan_to_num(), (x / d).nan_to_num()], -1)
        logits = logits + torch.einsum('bnkf,hf->bhnk', features, leaves['bias_weight'])
        logits = logits + leaves['bias'][:, None, None]
    logits = logits - 100 * padded[:, None]
    if 'blank_key' in leaves:
        blank = torch.einsum('bnhd,hd->bhn', query, leaves['blank_key']) * others['scale']
        logits = torch.cat([logits, blank[..., None]], -1)
    weights = logits.softmax(-1)
    output = torch.einsum('bhnk,bnkhd->bnhd', weights[..., : index.shape[2]], value[image, index])
    if 'blank_value' in leaves:
        output = output + weights[..., -1].transpose(1, 2)[..., None] * leaves['blank_value']
    return output.flatten(2)
