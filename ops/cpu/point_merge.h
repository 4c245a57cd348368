// Weighted sums over the neighbours of points on the CPU: one description of a call, and the kernels that run it,
// compiled for several instruction sets (see point_merge_kernels.h).  No torch header is needed here.

#pragma once

#include "../include/instruction_set.h"
#include "../include/value_type.h"

#include <cstdint>

namespace boltz_mm {

// One call.  Pointers are to contiguous tensors, except for feat, whose channels alone are contiguous.  "value type" is
// the dtype of feat, all other floating-point tensors are double (float64 features) or float.  A batch stride of 0
// stands for a tensor that all images share.
struct MergeProblem {
  int64_t batch, points, rows, channels, inner;
  int64_t count;         // neighbouring clusters of a point
  int64_t cluster_size;  // rows of a cluster
  int64_t clusters;
  const void* feat;  // [B, M, C]
  int64_t feat_batch_stride, feat_row_stride;
  const void* nearest;  // [B or 1, N, J] cluster numbers, int64 or int32
  bool nearest_is_wide;
  int64_t nearest_batch_stride;

  bool given;           // the weights are; else they follow from the offset
  const void* weights;  // [B, N, K, I]

  const void* query_pos;  // [B or 1, N, 2]
  const void* key_pos;    // [B or 1, M, 2]
  int64_t query_batch_stride, key_batch_stride;
  const void *weight, *bias, *norm_weight, *norm_bias;  // [I, 5], [I], [I], [I]
  double eps, sign, max_offset;
  const void* importance;  // [B, M] or null

  void* output;             // [B, N, I, C], value type
  const void* grad_output;  // [B, N, I, C], value type

  // Which (point, slot) name each cluster: entries of cluster c from starts[c] to starts[c + 1], as point * J + slot.
  const int64_t* starts;   // [B or 1, clusters + 1]
  const int64_t* entries;  // [B or 1, N * J]
  int64_t starts_batch_stride, entries_batch_stride;
  void* grad_feat;        // [B, M, C], value type
  void* grad_weights;     // [B, N, K, I], where weights are given
  void* grad_importance;  // [B, M] or null
  double* partial_sums;   // [tasks, I, 8]: gradients of weight, bias, norm_weight and norm_bias
};

constexpr int64_t kMergePoints = 32;  // of a forward task
constexpr int64_t kMergeRows = 32;    // of a backward task
constexpr int64_t kMergeSums = 8;     // gradients of the parameters of an inner channel

// Each function works on the tasks [begin, end), with scratch memory of its own.
struct MergeKernels {
  int64_t (*forward_scratch)(const MergeProblem&);  // bytes
  void (*forward)(const MergeProblem&, int64_t begin, int64_t end, void* scratch);  // task: (b, block of points)
  int64_t (*backward_scratch)(const MergeProblem&);
  void (*backward)(const MergeProblem&, int64_t begin, int64_t end, void* scratch);  // task: (b, block of rows)
};

namespace baseline {
extern const MergeKernels merge_kernels[kValueTypes];
}
#ifdef BOLTZ_MM_X86_VARIANTS
namespace avx2 {
extern const MergeKernels merge_kernels[kValueTypes];
}
namespace avx512 {
extern const MergeKernels merge_kernels[kValueTypes];
}
#endif

}  // namespace boltz_mm
