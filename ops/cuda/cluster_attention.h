// Cluster attention on CUDA: one description of a call, and the functions that launch it.
//
// No torch and no CUDA header is needed here: the kernels (cluster_attention.cu) are compiled by nvcc alone, the
// operators (cluster_attention.cpp) by the C++ compiler alone.

#pragma once

#include "grid_attention.h"

namespace boltz_mm::cuda {

// [B, rows, H, D] with contiguous channels; strides in elements, 0 for dimensions of size 1.
struct ClusterRows {
  const void* data;
  Index batch_stride, row_stride, head_stride;
};

// One call.  "Compute type" is double for float64, otherwise float; the rest is of the value type.  Pointers without
// strides are to contiguous tensors.  A batch stride of 0 stands for a tensor that all images share.
struct ClusterProblem {
  Index batch, queries, keys, heads, depth;
  Index lists;  // clusters that a query sees
  Index cluster_size, clusters;
  double scale, max_offset;
  ClusterRows query, key, value;  // value type
  bool sees_all;        // each query sees the one cluster of all keys, and there is no nearest
  const void* nearest;  // [B or 1, N, J] cluster ids, int64 or int32; what is out of range counts as nothing
  bool nearest_is_wide;
  Index nearest_batch_stride;
  const void* query_pos;  // [B or 1, N, 2], compute type
  const void* key_pos;    // [B or 1, M, 2], compute type
  Index query_pos_batch_stride, key_pos_batch_stride;
  const void* bias_weight;  // [H, 5] compute type, or null
  const void* bias;         // [H] compute type, or null
  const void* blank_key;    // [H, D] compute type, or null
  const void* blank_value;  // [H, D] compute type, or null
  void* output;             // [B, N, H, D]
  void* normalizer;         // [B, N, H, 2] compute type: the largest logit, and the sum of exp(logit - largest)

  // Backward.
  ClusterRows grad_output;  // value type
  const Index* order;       // [B or 1, N * J], the places in nearest sorted by their cluster
  Index* starts;            // [B or 1, clusters + 1], where each cluster begins in order
  void* means;              // [B, N, H] compute type: products of the gradient with the value rows, by probability
  void* grad_query;         // [B, N, H, D]
  void* grad_key;           // [B, M, H, D]
  void* grad_value;         // [B, M, H, D]
  Index parts;              // blocks of queries of all images
  void* partial_sums;       // [H, parts, 6 + 2 D] compute type: gradients of the parameters
  Index sections;           // blocks of parts
  double* section_sums;     // [H, sections, 6 + 2 D]
  void* grad_bias_weight;   // [H, 5] compute type, or null
  void* grad_bias;          // [H] compute type, or null
  void* grad_blank_key;     // [H, D] compute type, or null
  void* grad_blank_value;   // [H, D] compute type, or null
};

constexpr Index kClusterQueries = 8;     // of a part
constexpr Index kClusterSection = 128;   // parts of a section
constexpr Index kClusterFeatures = 5;    // of an offset
constexpr Index kClusterBiases = kClusterFeatures + 1;

// Both return null, or what CUDA says about the launch.  The work is queued on the stream (a cudaStream_t) of the
// current device; nothing is synchronised and no memory is allocated.
const char* launch_cluster_attention(const ClusterProblem& problem, ValueType type, void* stream);
const char* launch_cluster_attention_backward(const ClusterProblem& problem, ValueType type, void* stream);

}  // namespace boltz_mm::cuda
