// The operators of boltz_mm: every schema stands here, once.  Kernels are added by ops/cpu (in this library) and by
// ops/cuda (in a second one); shapes, autograd and the PyTorch references stand in boltz_mm/ops/*.py.
//
// Shapes: B batch, S cells of all levels, H heads, D channels of a head, L levels, Q queries, P points.
//   value           [B, S, H, D]           float64, float32, bfloat16 or float16
//   spatial_shapes  [L, 2]                 int64 (height, width), on the device of value
//   boxes           [B, Q, H, L, 4]        (cx, cy, w, h)
//   logits          [B, Q, H, L, P], for instance_attention [B, Q, H, L, 2, 2]
//   points          [P, 2]
//   valid_ratios    [B, L, 2]              (x, y)
//   angles          [B, Q, H, L]           radians
//   locations       [B, Q, H, L, P, 2]     (x, y)
//   weights         [B, Q, H, L, P]
// All but value and the gradients of outputs are in the compute dtype: float64 for a float64 value, float32 otherwise.
// Inputs may have any strides.  Outputs and grad_value have the dtype of value, the other gradients the compute dtype.
// A gradient that was not asked for (value_needed) or does not exist (no angles, no mask output) is a tensor of size 0.
//
// Of points: N queries or tokens, M points, K clusters; coordinates (x, y) are float32.
//   query           [B, N, 2]
//   points          [B, M, 2]
//   index           [B, N, k]              int64 or int32 (long_index)
//   distance        [B, N, k]              float32, of size 0 where it is not needed
//   pos, ordered    [B, N, 2]
//   order           [B, N]                 int64
//   means           [B, K, 2]
// height and width are those of a canvas that the points are spread over, 0 where it is not known.
//
// Cluster attention: N queries, M keys, J clusters of cluster_size keys that a query sees.
//   query           [B, N, H, D]           float64, float32, bfloat16 or float16; key, value [B, M, H, D] of its dtype
//   query_pos       [B or 1, N, 2]         (x, y), key_pos [B or 1, M, 2]
//   nearest         [B or 1, N, J]         int32 or int64 cluster ids; without it each query sees all keys
//   bias_weight     [H, 5], bias [H], blank_key and blank_value [H, D]
//   normalizer      [B, N, H, 2]           the largest logit, and the sum of exp(logit - largest)
//   order           [B or 1, N * J]        int64, the places in nearest sorted by what stands there: for CUDA alone
// Compute dtypes, strides and gradients that do not exist as above, with query in the place of value.
//
// Neighbours of N rows in a table of M rows of C channels, for each head; in compute dtypes alone.
//   rows            [B, H, N, C]           table [B, H, M, C]
//   weights         [B, H, N, K]
//   index           [B, N, K]              int32 or int64 rows of the table

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(boltz_mm, library) {
  library.def(
      "deform_attention(Tensor value, Tensor spatial_shapes, Tensor locations, Tensor weights) -> Tensor");
  library.def(
      "deform_attention_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor locations, "
      "Tensor weights, bool value_needed) -> (Tensor grad_value, Tensor grad_locations, Tensor grad_weights)");
  library.def(
      "box_attention(Tensor value, Tensor spatial_shapes, Tensor boxes, Tensor logits, Tensor points, "
      "Tensor? valid_ratios, Tensor? angles) -> Tensor");
  library.def(
      "box_attention_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor boxes, Tensor logits, "
      "Tensor points, Tensor? valid_ratios, Tensor? angles, bool value_needed) -> "
      "(Tensor grad_value, Tensor grad_boxes, Tensor grad_logits, Tensor grad_angles)");
  library.def(
      "instance_attention(Tensor value, Tensor spatial_shapes, Tensor boxes, Tensor logits, Tensor points, "
      "Tensor? valid_ratios, bool mask_output) -> (Tensor output, Tensor mask_output)");
  library.def(
      "instance_attention_backward(Tensor grad_output, Tensor? grad_mask_output, Tensor value, "
      "Tensor spatial_shapes, Tensor boxes, Tensor logits, Tensor points, Tensor? valid_ratios, bool value_needed) -> "
      "(Tensor grad_value, Tensor grad_boxes, Tensor grad_logits)");
  library.def(
      "knn_points(Tensor query, Tensor points, int k, SymInt height, SymInt width, bool long_index, "
      "bool distance_needed) -> (Tensor index, Tensor distance)");
  library.def(
      "space_filling_order(Tensor pos, SymInt cluster_size, SymInt height, SymInt width, int curve, bool anchors, "
      "bool per_image) -> (Tensor order, Tensor ordered, Tensor means)");

  // AutoFocusFormer: B images, N points, M rows of feat, K (or J clusters of) neighbours, I inner channels, C channels.
  //   feat [B, M, C] any dtype;  weights [B, N, K, I], importance [B, M], weight [I, 5], bias and norms [I], positions
  //   [B or 1, N or M, 2] in the compute dtype;  index [B or 1, N, K], nearest [B or 1, N, J] int32 or int64
  //   outputs [B, N, I, C];  grad_parameters [I, 8] = weight, bias, norm_weight, norm_bias;  order
  //   [B or 1, N * K or J] int64, the places in index or nearest sorted by what stands there: for CUDA alone
  library.def("cluster_wf(Tensor weights, Tensor feat, Tensor index) -> Tensor");
  library.def(
      "cluster_wf_backward(Tensor grad_output, Tensor weights, Tensor feat, Tensor index, Tensor? order) -> "
      "(Tensor grad_weights, Tensor grad_feat)");
  library.def(
      "point_merge(Tensor feat, Tensor query_pos, Tensor key_pos, Tensor nearest, SymInt cluster_size, "
      "Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps, Tensor? importance, int sign, "
      "float? max_offset) -> Tensor");
  library.def(
      "point_merge_backward(Tensor grad_output, Tensor feat, Tensor query_pos, Tensor key_pos, Tensor nearest, "
      "SymInt cluster_size, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps, "
      "Tensor? importance, int sign, float? max_offset, Tensor? order) -> "
      "(Tensor grad_feat, Tensor grad_parameters, Tensor grad_importance)");

  // Sampling between points: S tokens of all levels, N queries, K neighbours, a canvas of height x width cells.
  //   positions [B, S, 2], tables [B, L, height * width, K] int64 or int32, query_pos [B, N, 2] (or a batch of 1 each),
  //   offsets [B, N, H, L, P, 2], logits [B, N, H, L, P], power [1], index [B, N, K]
  library.def(
      "point_deform_attention(Tensor value, Tensor positions, SymInt[] level_sizes, Tensor tables, SymInt height, "
      "SymInt width, Tensor query_pos, Tensor offsets, Tensor logits, Tensor power) -> Tensor");
  library.def(
      "point_deform_attention_backward(Tensor grad_output, Tensor value, Tensor positions, SymInt[] level_sizes, "
      "Tensor tables, SymInt height, SymInt width, Tensor query_pos, Tensor offsets, Tensor logits, Tensor power, "
      "bool value_needed, bool power_needed) -> "
      "(Tensor grad_value, Tensor grad_offsets, Tensor grad_logits, Tensor grad_power)");
  library.def(
      "inverse_distance_interpolate(Tensor feat, Tensor pos, Tensor query_pos, Tensor index, Tensor power) -> Tensor");
  library.def(
      "inverse_distance_interpolate_backward(Tensor grad_output, Tensor feat, Tensor pos, Tensor query_pos, "
      "Tensor index, Tensor power, bool feat_needed, bool power_needed) -> (Tensor grad_feat, Tensor grad_power)");

  library.def(
      "cluster_attention(Tensor query, Tensor key, Tensor value, Tensor query_pos, Tensor key_pos, Tensor? nearest, "
      "SymInt cluster_size, Tensor? bias_weight, Tensor? bias, Tensor? blank_key, Tensor? blank_value, float scale, "
      "float max_offset) -> (Tensor output, Tensor normalizer)");
  library.def(
      "cluster_attention_backward(Tensor grad_output, Tensor normalizer, Tensor query, Tensor key, Tensor value, "
      "Tensor query_pos, Tensor key_pos, Tensor? nearest, SymInt cluster_size, Tensor? bias_weight, Tensor? bias, "
      "Tensor? blank_key, Tensor? blank_value, float scale, float max_offset, Tensor? order=None) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias_weight, Tensor grad_bias, "
      "Tensor grad_blank_key, Tensor grad_blank_value)");
  library.def("neighbor_products(Tensor rows, Tensor table, Tensor index) -> Tensor");
  library.def("neighbor_sums(Tensor weights, Tensor table, Tensor index) -> Tensor");
  library.def("neighbor_spread(Tensor weights, Tensor rows, Tensor index, SymInt length) -> Tensor");
}
