"""Clustering and nearest neighbours of AutoFocusFormer."""

from boltz_mm.ops import knn_points, space_filling_clusters
from boltz_mm.ops.clustering import space_filling_keys
from tests.parity.case import Case, Produced
from tests.parity.registry import handler


@handler('aff', 'clustering')
def clustering(case: Case) -> Produced:
    kwargs, pos = case.kwargs, case.inputs['pos']
    canvas, size = (kwargs['h'], kwargs['w']), kwargs['m']
    along = {'curve': kwargs.get('sf_type') or 'scan', 'anchors': kwargs.get('use_anchor', True)}
    clusters = space_filling_clusters(pos, size, canvas, reorder=not kwargs.get('no_reorder', False), **along)
    produced = {
        'out.pos': clusters.pos,
        'out.pos_ranking': clusters.order[..., None],
        'out.cluster_mean_pos': clusters.means,
        'out.member_idx': clusters.index,
        'out.sort_key': space_filling_keys(pos, size, canvas, **along),
    }
    return produced if clusters.mask is None else produced | {'out.cluster_mask': clusters.mask}


@handler('aff', 'knn')
def knn(case: Case) -> Produced:
    index, distance = knn_points(case.inputs['query'], case.inputs['database'], case.kwargs['k'], return_distance=True)
    return {'out.idx': index, 'out.dist': distance}
