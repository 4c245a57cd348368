// Deformable, box and instance attention on CUDA: one description of a call, and the functions that launch it.
//
// No torch and no CUDA header is needed here: the kernels (*.cu) are compiled by nvcc alone, the operators
// (grid_attention.cpp) by the C++ compiler alone.

#pragma once

#include <cstdint>

namespace boltz_mm::cuda {

using Index = int64_t;

enum class ValueType : int { float64, float32, bfloat16, float16 };

// Where the sampling points and their weights come from.
enum class Mode : int {
  points,    // given
  box,       // a grid in each box; softmax over all points
  instance,  // a grid in each box; one logit for each quadrant of the grid
};

// One call.  Pointers are to contiguous tensors on the device, except for value, whose channels alone are contiguous.
// "value type" is the dtype of value; all other floating-point tensors are double (float64 values) or float.
struct GridProblem {
  Mode mode;
  Index batch, cells, heads, depth, levels, queries;
  Index points;         // of one level
  Index grid_size;      // instance: points along one side of the grid
  const Index* shapes;  // [L, 2] (height, width)
  const void* value;    // [B, S, H, D]
  Index value_batch_stride, value_cell_stride, value_head_stride;  // in elements
  const void* boxes;             // [B, Q, H, L, 4]
  const void* logits;            // [B, Q, H, L, P] or [B, Q, H, L, 4]
  const void* grid;              // [P, 2]
  const void* ratios;            // [B, L, 2] or null
  const void* angles;            // [B, Q, H, L] or null
  const void* locations;         // [B, Q, H, L, P, 2]
  const void* weights;           // [B, Q, H, L, P]
  void* output;                  // [B, Q, H, D], value type
  void* mask_output;             // [B, Q, P, H, D], value type, or null
  const void* grad_output;       // [B, Q, H, D], value type
  const void* grad_mask_output;  // [B, Q, P, H, D], value type, or null
  void* grad_value;              // [B, S, H, D], double or float, filled with zeros; or null
  void* grad_boxes;
  void* grad_logits;
  void* grad_angles;  // or null
  void* grad_locations;
  void* grad_weights;
};

// Both return null, or what CUDA says about the launch.  The work is queued on the stream (a cudaStream_t) of the
// current device; nothing is synchronised and no memory is allocated.
const char* launch_forward(const GridProblem& problem, ValueType type, void* stream);
const char* launch_backward(const GridProblem& problem, ValueType type, void* stream);

}  // namespace boltz_mm::cuda
