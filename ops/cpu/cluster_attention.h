// Cluster attention on the CPU: the description of a call, and the kernels that run it, compiled for several
// instruction sets (see cluster_attention_kernels.h).  No torch header is needed here.

#pragma once

#include "../include/instruction_set.h"
#include "../include/value_type.h"

#include <cstdint>

namespace boltz_mm {

// [B, rows, H, D] with contiguous channels; strides in elements, the batch stride 0 where all images share the rows.
struct Rows {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};

// One call.  "Compute type" is double for float64, otherwise float; the rest is of the value type.  Pointers without
// strides are to contiguous tensors.
struct ClusterProblem {
  int64_t batch, queries, keys, heads, depth;
  int64_t cluster_size, clusters;
  int64_t lists;  // clusters that a query sees
  double scale, max_offset;
  Rows query, key, value;  // value type
  const void* nearest;     // [B, N, J] int32 or int64; null where each query sees the one cluster of all keys
  bool wide_nearest;
  int64_t nearest_batch_stride;
  const void* query_pos;  // [B or 1, N, 2], compute type
  const void* key_pos;    // [B or 1, M, 2], compute type
  int64_t query_pos_batch_stride, key_pos_batch_stride;
  const void* bias_weight;  // [H, 5] compute type, or null
  const void* bias;         // [H] compute type, or null
  const void* blank_key;    // [H, D] compute type, or null
  const void* blank_value;  // [H, D] compute type, or null
  void* output;             // [B, N, H, D]
  void* normalizer;         // [B, N, H, 2] compute type: the largest logit, and the sum of exp(logit - largest)

  // Made by `prepare`, in memory of the sizes that `plan` gives.
  void* key_panels;    // [B, clusters, H, panels, D, width], compute type; null where the width is 1
  void* value_panels;  // likewise, backward alone
  void* key_x;         // [B or 1, clusters, slots], compute type
  void* key_y;
  // Rows of whole vectors in the compute type: the tensors themselves, or copies.
  Rows key_rows, value_rows, query_rows, grad_rows;

  // Backward.
  Rows grad_output;  // value type
  void* grad_query;  // [B, N, H, D]
  void* grad_key;    // [B, M, H, D]
  void* grad_value;  // [B, M, H, D]
  void* key_sums;    // [B, M, H, padded D] compute type, where the queries of an image are taken in several chunks
  void* value_sums;
  void* partial;  // [blocks, H, partial_size] compute type
  void* weights;  // of the queries of a chunk: [queries, H, 2, padded slots] compute type, probabilities and gradients
  void* entries;  // of the chunk: Entry [queries, J]
  int64_t* starts;  // of the chunk: [images, clusters + 1]
};

// Sizes that depend on the instruction set.
struct ClusterPlan {
  int64_t width;         // of a panel
  int64_t slots;         // of a cluster, padded to panels
  int64_t row_slots;     // of a query, padded to vectors
  int64_t padded_depth;  // in whole vectors
  int64_t scratch;       // bytes of a worker
  int64_t partial_size;  // for each block and head: 5 for bias_weight, bias, blank_key, blank_value
  int64_t entry_bytes;
  bool rows_in_place[4];  // key, value, query, grad_output
};

constexpr int64_t kQueryBlock = 16;  // queries of a task; fixed, so that sums over blocks are the same on any machine

// Queries of an image that one step of backward takes.
struct QueryChunk {
  int64_t first_block, last_block;  // blocks of kQueryBlock queries, of all images
};

struct ClusterKernels {
  ClusterPlan (*plan)(const ClusterProblem&, bool backward);
  // tasks: (image, cluster)
  void (*prepare)(const ClusterProblem&, int64_t begin, int64_t end);
  // Copy [begin, end) of the (image, row) of a tensor to rows of whole vectors, [B, H, rows, padded D].
  void (*copy_rows)(const ClusterProblem&, const Rows& from, int64_t rows, void* to, int64_t begin, int64_t end);
  // tasks: blocks of queries; false where a cluster id is out of range
  bool (*forward)(const ClusterProblem&, int64_t begin, int64_t end, void* scratch);
  bool (*backward_queries)(const ClusterProblem&, const QueryChunk&, int64_t begin, int64_t end, void* scratch);
  // tasks: images of the chunk
  void (*invert)(const ClusterProblem&, const QueryChunk&, int64_t begin, int64_t end);
  // tasks: (image of the chunk, group of keys)
  int64_t (*key_groups)(const ClusterProblem&);
  void (*backward_keys)(const ClusterProblem&, const QueryChunk&, int64_t begin, int64_t end, void* scratch);
};

// Products with the rows that an index names, and weighted sums of them; for each compute type.
struct NeighborProblem {
  int64_t batch, heads, queries, length, count, depth;
  const void* index;  // [B, N, K]
  bool wide_index;
  Rows rows, table;     // [B, N or M, H, C]; of whole vectors where they are added up
  const void* weights;  // [B, H, N, K]
  void* output;
  void* entries;  // of one image: Entry [N, K]
  int64_t* starts;  // of one image: [M + 1]
};

struct NeighborKernels {
  int64_t (*padded_depth)(int64_t depth);
  int64_t (*scratch)(const NeighborProblem&);  // bytes of a worker
  int64_t entry_bytes;
  void (*copy_rows)(const NeighborProblem&, const Rows& from, int64_t rows, void* to, int64_t begin, int64_t end);
  // tasks: (image, row); false where the index is out of range
  bool (*products)(const NeighborProblem&, int64_t begin, int64_t end, void* scratch);
  bool (*sums)(const NeighborProblem&, int64_t begin, int64_t end, void* scratch);
  bool (*invert)(const NeighborProblem&, int64_t image);
  // tasks: rows of the table
  void (*spread)(const NeighborProblem&, int64_t image, int64_t begin, int64_t end, void* scratch);
};

namespace baseline {
extern const ClusterKernels cluster_kernels[kValueTypes];
extern const NeighborKernels neighbor_kernels[2];  // float64, float32
}
#ifdef BOLTZ_MM_X86_VARIANTS
namespace avx2 {
extern const ClusterKernels cluster_kernels[kValueTypes];
extern const NeighborKernels neighbor_kernels[2];
}
namespace avx512 {
extern const ClusterKernels cluster_kernels[kValueTypes];
extern const NeighborKernels neighbor_kernels[2];
}
#endif

}  // namespace boltz_mm
