"""CLUSTEN's products with the neighbours' keys, and weighted sums of their values."""

from collections.abc import Callable

import torch
from torch import Tensor

from boltz_mm.ops import cluster_av, cluster_qk
from tests.parity.case import Case, Produced
from tests.parity.registry import handler


@handler('aff', 'op_clustenqk')
def op_clustenqk(case: Case) -> Produced:
    return _run(case, cluster_qk, ('query', 'key'))


@handler('aff', 'op_clustenav')
def op_clustenav(case: Case) -> Produced:
    return _run(case, cluster_av, ('attn', 'value'))


def _run(case: Case, operator: Callable[..., Tensor], names: tuple[str, str]) -> Produced:
    leaves = [case.inputs[name].requires_grad_() for name in names]
    output = operator(*leaves, case.inputs['nbhd_idx'])
    grads = torch.autograd.grad((output * case.inputs['cotangent_out']).sum(), leaves)
    return {'out.out': output} | {f'grad.{name}': grad for name, grad in zip(names, grads, strict=True)}
