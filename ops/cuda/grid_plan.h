// How a call is spread over threads.
//
// A row is one (batch, query, head).  `lanes` threads share a sample: each takes a vector of channels.  Where there
// are too few rows to fill a device, `slices` groups of lanes share a row: each takes every so-manyth point.  The
// threads of a row are a team: a part of a warp, or a block.  The teams of a block have one head and successive
// queries, whose samples are often neighbours.
//
// Plain C++: the plan depends on the problem alone, not on the device, so that results do not either.

#pragma once

#include "grid_attention.h"

namespace boltz_mm::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;                // in a block, at most
constexpr Index kEnoughThreads = 1 << 18;    // in the grid: more rows are not split into slices
constexpr Index kMostBlocks = 0x7fffffff;    // of a grid; a block takes several tiles where there are more
constexpr Index kPointsOfSlice = 4;          // at least, where a group takes one point at a time

struct Plan {
  int vector;  // channels of a thread at a time: 16 bytes of the value type, or 1
  int lanes, slices;
  int rows;  // of a block
  Index blocks;

  int team() const { return lanes * slices; }
  int threads() const { return team() * rows; }
};

inline int value_bytes(ValueType type) {
  return type == ValueType::float64 ? 8 : type == ValueType::float32 ? 4 : 2;
}

// Whether rows of channels can be read and written 16 bytes at a time.
inline bool in_vectors(const GridProblem& problem, int bytes) {
  const void* const pointers[] = {problem.value,       problem.output,           problem.mask_output,
                                  problem.grad_output, problem.grad_mask_output, problem.grad_value};
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  const Index sizes[] = {problem.depth, problem.value_batch_stride, problem.value_cell_stride,
                         problem.value_head_stride};
  for (const Index size : sizes) bits |= static_cast<uintptr_t>(size) * bytes;
  return bits % 16 == 0;
}

inline int power_of_two_above(Index number, int limit) {
  int power = 1;
  while (power < number && power < limit) power *= 2;
  return power;
}

inline Plan make_plan(const GridProblem& problem, ValueType type, bool backward) {
  const int bytes = value_bytes(type);
  Plan plan;
  plan.vector = in_vectors(problem, bytes) ? 16 / bytes : 1;
  plan.lanes = power_of_two_above((problem.depth + plan.vector - 1) / plan.vector, kWarp);
  // A group takes a tile of points, one for each lane; or, where the levels of a point are its tile, a point.
  const bool point_by_point = problem.mode == Mode::instance && (backward || problem.mask_output);
  const Index tile = point_by_point ? kPointsOfSlice : plan.lanes;
  const Index points = point_by_point || backward ? problem.points : problem.points * problem.levels;
  const Index threads = problem.batch * problem.queries * problem.heads * plan.lanes;
  plan.slices = 1;
  while (threads * plan.slices < kEnoughThreads && 2 * plan.slices * tile <= points && 2 * plan.team() <= kThreads) {
    plan.slices *= 2;
  }
  plan.rows = plan.team() > kWarp ? 1 : power_of_two_above(problem.queries, kThreads / plan.team());
  plan.blocks = problem.batch * ((problem.queries + plan.rows - 1) / plan.rows) * problem.heads;
  return plan;
}

}  // namespace boltz_mm::cuda
