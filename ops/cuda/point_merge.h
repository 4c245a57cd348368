// Weighted sums over the neighbours of points on CUDA: one description of a call, and the functions that launch it.
//
// No torch and no CUDA header is needed here: the kernels (point_merge.cu) are compiled by nvcc alone, the operators
// (point_merge.cpp) by the C++ compiler alone.

#pragma once

#include "grid_attention.h"

namespace boltz_mm::cuda {

// One call.  Pointers are to contiguous tensors on the device, except for feat, whose channels alone are contiguous.
// "value type" is the dtype of feat, all other floating-point tensors are double (float64 features) or float.  A batch
// stride of 0 stands for a tensor that all images share.
struct MergeProblem {
  Index batch, points, rows, channels, inner;
  Index count;         // neighbouring clusters of a point
  Index cluster_size;  // rows of a cluster
  const void* feat;    // [B, M, C]
  Index feat_batch_stride, feat_row_stride;
  const void* nearest;  // [B or 1, N, J] cluster numbers, int64 or int32; what is out of range counts as nothing
  bool nearest_is_wide;
  Index nearest_batch_stride;

  bool given;                                           // the weights are; else they follow from the offset
  const void* weights;                                  // [B, N, K, I]
  const void* query_pos;                                // [B or 1, N, 2]
  const void* key_pos;                                  // [B or 1, M, 2]
  Index query_batch_stride, key_batch_stride;
  const void *weight, *bias, *norm_weight, *norm_bias;  // [I, 5], [I], [I], [I]
  double eps, sign, max_offset;
  const void* importance;                               // [B, M] or null

  void* output;             // [B, N, I, C], value type
  const void* grad_output;  // [B, N, I, C], value type
  const Index* order;       // [B or 1, N * J], the places in nearest sorted by their cluster
  void* grad_feat;          // [B, M, C], value type
  void* grad_weights;       // [B, N, K, I], zeros
  void* grad_importance;    // [B, M] or null
  Index parts;              // images times blocks of rows
  double* partial_sums;     // [parts, I, 8]
  void* grad_parameters;    // [I, 8]: gradients of weight, bias, norm_weight and norm_bias
};

constexpr Index kMergeRows = 32;  // of a partial sum
constexpr Index kMergeSums = 8;   // gradients of the parameters of an inner channel

// Both return null, or what CUDA says about the launch.  The work is queued on the stream (a cudaStream_t) of the
// current device; nothing is synchronised and no memory is allocated.
const char* launch_merge(const MergeProblem& problem, ValueType type, void* stream);
const char* launch_merge_backward(const MergeProblem& problem, ValueType type, void* stream);

}  // namespace boltz_mm::cuda
