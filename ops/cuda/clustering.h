// Clusters along a space-filling curve on CUDA: one description of a call, and the functions that launch its steps.
// No torch and no CUDA header is needed here.

#pragma once

#include "../include/curves.h"

#include <cstdint>

namespace boltz_mm::cuda {

// Centres of the cells before and behind an anchor cell, and its own place.
struct Anchor {
  float place, previous_x, previous_y, following_x, following_y;
};

// One call.  Pointers are to contiguous tensors on the device.
struct ClusterProblem {
  int64_t batch, tokens, cluster_size;
  int64_t clusters;       // of an image
  bool per_image;         // the largest ratio is that of an image, not of the batch
  CurveGrid grid;         // the anchor cells, or without anchors the canvas
  int64_t height, width;  // of the canvas
  float cell_width, cell_height;
  const float* pos;       // [B, N, 2]
  int64_t* value;         // of cells, or without anchors of tokens [B, N]: places along the curve
  const int64_t* along;   // the cells in the order of the curve
  Anchor* anchors;        // by cell
  float *place, *ratio;   // [B, N]
  uint32_t* largest;      // [B] zeros: bits of the largest ratio; only the first where the batch has one
  float* key;             // [B, N]
  const int64_t* order;   // [B, N]
  float* ordered;         // [B, N, 2]
  float* means;           // [B, K, 2]
};

// The steps, between which the caller sorts.  Each returns null, or what CUDA says about the launch.  The work is queued
// on the stream (a cudaStream_t) of the current device; nothing is synchronised and no memory is allocated.
const char* launch_cell_values(const ClusterProblem& problem, void* stream);
const char* launch_token_values(const ClusterProblem& problem, void* stream);
const char* launch_keys(const ClusterProblem& problem, void* stream);
const char* launch_means(const ClusterProblem& problem, void* stream);

}  // namespace boltz_mm::cuda
