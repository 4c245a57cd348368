// Attention and interpolation between points on CUDA: one description of a call, and the functions that launch it.
// No torch and no CUDA header is needed here; see grid_attention.h.

#pragma once

#include "grid_attention.h"

namespace boltz_mm::cuda {

constexpr int kMostPointLevels = 32;

// One call.  A sample lies at the place of its query, plus its offset; its neighbours are those of the cell that it is
// in, or without a canvas those of its query.  Pointers are to contiguous tensors on the device, except for value, whose
// channels alone are contiguous.  "value type" is the dtype of value, all other floating-point tensors are double
// (float64 values) or float.  A tensor with a batch stride of 0 is the same for all images.
struct PointProblem {
  Index batch, queries, heads, depth, levels, points, neighbours;
  Index tokens;                          // of all levels
  Index starts[kMostPointLevels + 1];    // [L + 1] first token of each level
  Index height, width;                   // of the canvas, 0 without one
  bool wide;                             // the tables are int64, not int32
  const void* tables;                    // [B, L, height * width, K] tokens of the level, or [B, N, K]
  Index table_batch_stride;
  const void* value;                     // [B, S, H, D]
  Index value_batch_stride, value_token_stride, value_head_stride;  // in elements
  const void* positions;                 // [B, S, 2]
  Index position_batch_stride;
  const void* query_pos;                 // [B, N, 2]
  Index query_batch_stride;
  const void* offsets;                   // [B, N, H, L, P, 2] or null
  const void* logits;                    // [B, N, H, L, P] or null: all weights are 1
  const void* power;                     // [1]
  void* output;                          // [B, N, H, D], value type
  const void* grad_output;               // [B, N, H, D], value type
  void* grad_value;                      // [B, S, H, D], double or float, filled with zeros; or null
  void* grad_offsets;                    // or null
  void* grad_logits;                     // or null
  void* power_parts;                     // [B, N, H] or null
  void* grad_power;                      // [1] or null
};

// Each returns null, or what CUDA says about the launch.  The work is queued on the stream (a cudaStream_t) of the
// current device; nothing is synchronised and no memory is allocated.
const char* launch_point_forward(const PointProblem& problem, ValueType type, void* stream);
const char* launch_point_backward(const PointProblem& problem, ValueType type, void* stream);

}  // namespace boltz_mm::cuda
