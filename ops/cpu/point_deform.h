// Sampling between points on the CPU: one description of a call, and the kernels that run it, compiled for several
// instruction sets (see point_deform_kernels.h).  No torch header is needed here.

#pragma once

#include "../include/instruction_set.h"
#include "../include/value_type.h"

#include <cstdint>

namespace boltz_mm {

// One call.  A sample lies at the place of its query, plus its offset; its neighbours are those of the cell that it is
// in, or without a canvas those of its query.  Pointers are to contiguous tensors, except for value, whose channels
// alone are contiguous.  "value type" is the dtype of value, all other floating-point tensors are double (float64
// values) or float.  A tensor with a batch stride of 0 is the same for all images.
struct PointProblem {
  int64_t batch, queries, heads, levels, points, neighbours;
  int64_t depth;             // channels of a head; the last head has those that are left
  int64_t channels;          // of all heads
  int64_t tokens;            // of all levels
  const int64_t* starts;     // [L + 1] first token of each level
  int64_t height, width;     // of the canvas, 0 without one
  bool wide;                 // the tables are int64, not int32
  const void* tables;        // [B, L, height * width, K] tokens of the level, or [B, N, K]
  int64_t table_batch_stride;
  const void* value;         // [B, S, H, D]
  int64_t value_batch_stride, value_token_stride, value_head_stride;  // in elements
  const void* positions;     // [B, S, 2]
  int64_t position_batch_stride;
  const void* query_pos;     // [B, N, 2]
  int64_t query_batch_stride;
  const void* offsets;       // [B, N, H, L, P, 2] or null
  const void* logits;        // [B, N, H, L, P] or null: all weights are 1
  double power;
  bool packed;               // copy the head's part of value before it is sampled
  int64_t splits;            // of the queries, in the forward pass
  void* output;              // [B, N, channels], value type
  const void* grad_output;   // [B, N, channels], value type
  void* grad_value;          // [B, S, channels], value type, or null
  void* grad_offsets;        // [B, N, H, L, P, 2] or null
  void* grad_logits;         // or null; holds the softmax before, weight * gradient after the main pass
  double* grad_power;        // [B * H * L] parts, or null
};

// Each function works on the tasks [begin, end) with scratch memory of its own.
struct PointKernels {
  int64_t (*forward_scratch)(const PointProblem&);  // bytes
  void (*forward)(const PointProblem&, int64_t begin, int64_t end, void* scratch);  // task: (b, h, split)
  int64_t (*backward_scratch)(const PointProblem&);
  void (*softmax)(const PointProblem&, int64_t begin, int64_t end, void* scratch);  // task: (b, n, h)
  void (*backward)(const PointProblem&, int64_t begin, int64_t end, void* scratch);  // task: (b, h, l)
  void (*softmax_backward)(const PointProblem&, int64_t begin, int64_t end, void* scratch);  // task: (b, n, h)
};

namespace baseline {
extern const PointKernels point_kernels[kValueTypes];
}
#ifdef BOLTZ_MM_X86_VARIANTS
namespace avx2 {
extern const PointKernels point_kernels[kValueTypes];
}
namespace avx512 {
extern const PointKernels point_kernels[kValueTypes];
}
#endif

}  // namespace boltz_mm
