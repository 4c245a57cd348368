// Exact nearest neighbours on CUDA: one description of a call, and the function that launches it.  No torch and no CUDA
// header is needed here.

#pragma once

#include <cstdint>

namespace boltz_mm::cuda {

constexpr int kMostInRegisters = 9;  // neighbours; more are kept in memory

// Square buckets over the points of an image, numbered row by row.  The outermost ones also hold what lies outside.
struct BucketGrid {
  double first_x, first_y, per_unit;  // column = (x - first_x) * per_unit, row alike
  double slack;                       // more than the rounding errors of a border of buckets
  int32_t columns, rows;
};

// One call.  Pointers are to contiguous tensors on the device.
struct NeighborProblem {
  int64_t batch, queries, points, k;
  int64_t height, width;  // of the canvas, 0 where it is not known
  double mean;            // points of a bucket on average
  int64_t most_buckets;   // of an image
  const float* query;     // [B, N, 2]
  const float* position;  // [B, M, 2]
  void* index;            // [B, N, k] int64 or int32
  bool long_index;
  float* distance;        // [B, N, k] or null
  // Memory to work in.
  uint32_t* bounds;       // [B, 4] zeros: largest of -x, -y, x, y, as integers of the same order
  BucketGrid* grids;      // [B]
  int32_t* starts;        // [B, most_buckets + 1] zeros
  int32_t* bucket;        // [B, M]
  float *x, *y;           // [B, M] by buckets
  int32_t* source;        // [B, M] by buckets, the place in the input
  uint64_t* keys;         // [B, N, k] where k is more than registers hold, or null
};

// Returns null, or what CUDA says about the launch.  The work is queued on the stream (a cudaStream_t) of the current
// device; nothing is synchronised and no memory is allocated.
const char* launch_neighbors(const NeighborProblem& problem, void* stream);

}  // namespace boltz_mm::cuda
