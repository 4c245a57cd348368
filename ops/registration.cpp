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
}
