"""AutoFocusFormer's sums over neighbours with given weights, and the five numbers of an offset."""

import torch
from torch import Tensor

from boltz_mm.ops import cluster_wf, offset_features, weighted_gather
from tests.parity.case import Case, Produced
from tests.parity.registry import handler


def _sum_over_neighbours(case: Case, output: Tensor) -> Produced:
    inputs = case.inputs
    weights, feat = inputs['weights'], inputs['feat']
    grads = torch.autograd.grad((output * inputs['cotangent_out']).sum(), [weights, feat])
    return {'out.out': output, 'grad.weights': grads[0], 'grad.feat': grads[1]}


@handler('aff', 'op_clustenwf')
def op_clustenwf(case: Case) -> Produced:
    inputs = case.inputs
    output = cluster_wf(inputs['weights'].requires_grad_(), inputs['feat'].requires_grad_(), inputs['nbhd_idx'])
    return _sum_over_neighbours(case, output)


@handler('aff', 'op_weighted_gather')
def op_weighted_gather(case: Case) -> Produced:
    inputs = case.inputs
    output = weighted_gather(inputs['nbhd_idx'], inputs['weights'].requires_grad_(), inputs['feat'].requires_grad_())
    return _sum_over_neighbours(case, output)


def _rows_of_table(rows: Tensor, reach: int) -> Tensor:
    """Rows of the official table of all offsets up to ``reach`` in each direction, dy major."""
    width = 2 * reach + 1
    return offset_features(torch.stack([rows % width - reach, rows // width - reach], -1))


@handler('aff', 'pe_lookup')
def pe_lookup(case: Case) -> Produced:
    reach = case.kwargs['img_size'] // 4 - 1
    return {'out.pre_table': _rows_of_table(torch.arange((2 * reach + 1) ** 2), reach)}


@handler('aff', 'pe_lookup_seg')
def pe_lookup_seg(case: Case) -> Produced:
    return {'out.values': _rows_of_table(case.inputs['row'], case.kwargs['rel_pos_width'])}
