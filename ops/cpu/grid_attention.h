// What the three grid operators have in common on the CPU: one description of a call, and the kernels that run it,
// compiled for several instruction sets (see grid_attention_kernels.h).  No torch header is needed here.

#pragma once

#include <cstdint>

namespace boltz_mm {

enum class ValueType : int { float64, float32, bfloat16, float16 };
constexpr int kValueTypes = 4;

// Where the sampling points and their weights come from.
enum class Mode : int {
  points,    // given
  box,       // a grid in each box; softmax over all points
  instance,  // a grid in each box; one logit for each quadrant of the grid
};

// One call.  Pointers are to contiguous tensors, except for value, whose channels alone are contiguous.  "value type"
// is the dtype of value, all other floating-point tensors are double (float64 values) or float.
struct GridProblem {
  Mode mode;
  bool with_mask;            // the feature map of the grid is computed, or has a gradient
  int64_t batch, heads, depth, levels, queries;
  int64_t points;            // of one level
  int64_t grid_size;         // instance: points along one side of the grid
  const int64_t* shapes;     // [L, 2] (height, width)
  const int64_t* starts;     // [L] first cell of each level
  int64_t cells;             // of all levels
  bool packed;               // copy the head's part of value before it is sampled
  int64_t splits;            // of the queries, in the forward pass
  const void* value;         // [B, S, H, D]
  int64_t value_batch_stride, value_cell_stride, value_head_stride;  // in elements
  const void* boxes;         // [B, Q, H, L, 4]
  const void* logits;        // [B, Q, H, L, P] or [B, Q, H, L, 4]
  const void* grid;          // [P, 2]
  const void* ratios;        // [B, L, 2] or null
  const void* angles;        // [B, Q, H, L] or null
  const void* locations;     // [B, Q, H, L, P, 2]
  const void* weights;       // [B, Q, H, L, P]
  void* output;              // [B, Q, H, D], value type
  void* mask_output;         // [B, Q, P, H, D], value type
  const void* grad_output;   // [B, Q, H, D], value type
  const void* grad_mask_output;  // [B, Q, P, H, D], value type
  void* grad_value;          // [B, S, H, D], value type, or null
  void* grad_boxes;
  void* grad_logits;         // holds the softmax before and the products weight * gradient after the main pass
  void* grad_angles;         // or null
  void* grad_locations;
  void* grad_weights;
  void* level_weights;       // [B, Q, H, L, 4], as grad_logits, for the softmax over levels, with_mask
};

// Each function works on the tasks [begin, end) with scratch memory of its own.
struct GridKernels {
  int64_t (*forward_scratch)(const GridProblem&);  // bytes
  // task: (b, h, split of the queries) where packed, else (b, split)
  void (*forward)(const GridProblem&, int64_t begin, int64_t end, void* scratch);
  int64_t (*backward_scratch)(const GridProblem&);
  void (*softmax)(const GridProblem&, int64_t begin, int64_t end, void* scratch);  // task: (b, q, h)
  void (*backward)(const GridProblem&, int64_t begin, int64_t end, void* scratch);  // task: (b, h, l)
  void (*softmax_backward)(const GridProblem&, int64_t begin, int64_t end, void* scratch);  // task: (b, q, h)
};

namespace baseline {
extern const GridKernels grid_kernels[kValueTypes];
}
#if defined(__x86_64__) && defined(__GNUC__)
#define BOLTZ_MM_X86_VARIANTS 1
namespace avx2 {
extern const GridKernels grid_kernels[kValueTypes];
}
namespace avx512 {
extern const GridKernels grid_kernels[kValueTypes];
}
#endif

}  // namespace boltz_mm
