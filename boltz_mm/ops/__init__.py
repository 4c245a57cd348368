"""Custom operators; needs torch alone.

- :func:`box_attention`, :func:`instance_attention`: a grid in each head's and level's box, sampled and weighted.
- :func:`deform_attention`: the same at given points.
- :func:`point_deform_attention`: deformable attention between points; :func:`inverse_distance_interpolate`,
  :func:`inverse_distance_weights`, :func:`weighted_point_sampling`, :func:`points_to_image`: its parts.
- :func:`knn_points`, :func:`nearest_clusters`, :func:`nearest_other_distance`: exact nearest neighbours in the plane.
- :func:`space_filling_clusters`: clusters of equal size along a curve.
- :func:`cluster_attention`: attention to the members of the nearest clusters; :func:`cluster_qk` and :func:`cluster_av`
  are its two products, for any index.
- :func:`point_merge`: neighbours of points merged with weights that follow from their offset
  (:func:`offset_features`); :func:`cluster_wf`, :func:`weighted_gather`: with given weights.
- :func:`grid_points`, :func:`box_sampling_locations`, :func:`box_attention_weights`,
  :func:`instance_attention_weights`: what the fused kernels never hold, for pictures and tests.
- :func:`available_backends`, :func:`use_backend`: native kernels or the PyTorch reference.
"""

from boltz_mm.ops._backend import available_backends, use_backend
from boltz_mm.ops.box_attention import (
    box_attention,
    box_attention_weights,
    box_sampling_locations,
    grid_points,
    instance_attention,
    instance_attention_weights,
)
from boltz_mm.ops.cluster_attention import cluster_attention, cluster_av, cluster_qk
from boltz_mm.ops.clustering import Clusters, space_filling_clusters
from boltz_mm.ops.deform_attention import deform_attention
from boltz_mm.ops.neighbors import knn_points, nearest_clusters, nearest_other_distance
from boltz_mm.ops.point_deform_attention import point_deform_attention
from boltz_mm.ops.point_interpolate import (
    inverse_distance_interpolate,
    inverse_distance_weights,
    points_to_image,
    weighted_point_sampling,
)
from boltz_mm.ops.point_merge import cluster_wf, offset_features, point_merge, weighted_gather

__all__ = [
    'Clusters',
    'available_backends',
    'box_attention',
    'box_attention_weights',
    'box_sampling_locations',
    'cluster_attention',
    'cluster_av',
    'cluster_qk',
    'cluster_wf',
    'deform_attention',
    'grid_points',
    'instance_attention',
    'instance_attention_weights',
    'inverse_distance_interpolate',
    'inverse_distance_weights',
    'knn_points',
    'nearest_clusters',
    'nearest_other_distance',
    'offset_features',
    'point_deform_attention',
    'point_merge',
    'points_to_image',
    'space_filling_clusters',
    'use_backend',
    'weighted_gather',
    'weighted_point_sampling',
]
