// What the forward and backward kernels share: number types, vectors of channels, cells of a sample, softmax.
//
// Everything is written against a Team (see DeviceTeam in grid_kernel.h): the threads of one row, with
//   rank, lane, slice            which thread this is; rank = slice * lanes + lane
//   size, lanes, slices          how many there are, powers of two
//   sync_group()                 wait for the threads of the slice
//   ballot(bool)                 bit i: what lane i of the slice says
//   group_xor(number, offset)    the number of the lane at distance offset in the slice
//   warp_xor(number, offset)     the same among the threads of the team that are in one warp
//   sync_team()                  wait for the team
// so that the tests run the same code on a CPU.

#pragma once

#include "grid_attention.h"
#include "grid_plan.h"

#include <cmath>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define BOLTZ_MM_DEVICE __device__ __forceinline__
#define BOLTZ_MM_UNROLL _Pragma("unroll")
#define BOLTZ_MM_UNROLL_TWICE _Pragma("unroll 2")
#else
#define BOLTZ_MM_DEVICE inline
#define BOLTZ_MM_UNROLL
#define BOLTZ_MM_UNROLL_TWICE
#endif

namespace boltz_mm::cuda {

// --------------------------------------------------------------------------------------------------- numbers ----

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

BOLTZ_MM_DEVICE double number(double x) { return x; }
BOLTZ_MM_DEVICE float number(float x) { return x; }

BOLTZ_MM_DEVICE float number(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

BOLTZ_MM_DEVICE float number(Float16 x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  _Float16 half;
  memcpy(&half, &x.bits, sizeof(half));
  return half;
#endif
}

BOLTZ_MM_DEVICE void round_to(double x, double& result) { result = x; }
BOLTZ_MM_DEVICE void round_to(float x, float& result) { result = x; }

BOLTZ_MM_DEVICE void round_to(float x, BFloat16& result) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  // To the nearest, ties to even; a NaN keeps being one.
  result.bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

BOLTZ_MM_DEVICE void round_to(float x, Float16& result) {
#ifdef __CUDACC__
  result.bits = __half_as_ushort(__float2half_rn(x));
#else
  const _Float16 half = static_cast<_Float16>(x);
  memcpy(&result.bits, &half, sizeof(half));
#endif
}

BOLTZ_MM_DEVICE float exponential(float x) { return expf(x); }
BOLTZ_MM_DEVICE double exponential(double x) { return exp(x); }
BOLTZ_MM_DEVICE float round_down(float x) { return floorf(x); }
BOLTZ_MM_DEVICE double round_down(double x) { return floor(x); }

// Sine and cosine of an angle: reduced to one turn in two steps, so that the general reduction of sinf, which needs
// local memory and many registers, is not part of a kernel.  As exact as sinf up to thousands of turns.
BOLTZ_MM_DEVICE void sine_and_cosine(float angle, float& sine, float& cosine) {
  const float turns = rintf(angle * 0.15915494f);
  const float rest = fmaf(turns, 1.7484556e-7f, fmaf(turns, -6.2831855f, angle));
#ifdef __CUDACC__
  sincospif(rest * 0.31830987f, &sine, &cosine);
#else
  sine = sinf(rest);
  cosine = cosf(rest);
#endif
}

BOLTZ_MM_DEVICE void sine_and_cosine(double angle, double& sine, double& cosine) {
  const double turns = rint(angle * 0.15915494309189535);
  const double rest = fma(turns, -2.4492935982947064e-16, fma(turns, -6.283185307179586, angle));
#ifdef __CUDACC__
  sincospi(rest * 0.3183098861837907, &sine, &cosine);
#else
  sine = sin(rest);
  cosine = cos(rest);
#endif
}

// -------------------------------------------------------------------------------------------------- channels ----

template <int V, typename T>
struct alignas(V * sizeof(T)) Pack {
  T items[V];
};

// V channels of memory that nobody writes during the kernel.
template <int V, typename T, typename C>
BOLTZ_MM_DEVICE void load(const T* from, C (&to)[V]) {
  Pack<V, T> pack;
#ifdef __CUDACC__
  if constexpr (sizeof(pack) == 16) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
    memcpy(&pack, &raw, sizeof(raw));
  } else if constexpr (sizeof(pack) == 2) {
    const unsigned short raw = __ldg(reinterpret_cast<const unsigned short*>(from));
    memcpy(&pack, &raw, sizeof(raw));
  } else {
    static_assert(V == 1);
    pack.items[0] = __ldg(from);
  }
#else
  memcpy(&pack, from, sizeof(pack));
#endif
  BOLTZ_MM_UNROLL
  for (int i = 0; i < V; ++i) to[i] = number(pack.items[i]);
}

template <int V, typename T, typename C>
BOLTZ_MM_DEVICE void store(const C (&from)[V], T* to) {
  Pack<V, T> pack;
  BOLTZ_MM_UNROLL
  for (int i = 0; i < V; ++i) round_to(from[i], pack.items[i]);
#ifdef __CUDACC__
  *reinterpret_cast<Pack<V, T>*>(to) = pack;
#else
  memcpy(to, &pack, sizeof(pack));
#endif
}

// ------------------------------------------------------------------------------------------------------ rows ----

struct Row {
  Index batch, query, head;
  Index index;  // of [B, Q, H]
};

// Division of numbers that are not negative: 64 bits are slow and seldom needed.
BOLTZ_MM_DEVICE Index quotient(Index number, Index divisor) {
  if (((number | divisor) >> 32) == 0) return static_cast<uint32_t>(number) / static_cast<uint32_t>(divisor);
  return number / divisor;
}

// The row of a team; its query may be past the last one.
BOLTZ_MM_DEVICE Row locate_row(const GridProblem& problem, int rows, Index block, int team) {
  const Index tiles = quotient(problem.queries + rows - 1, rows);
  const Index tile = quotient(block, problem.heads);
  Row row;
  row.head = block - tile * problem.heads;
  row.batch = quotient(tile, tiles);
  row.query = (tile - row.batch * tiles) * rows + team;
  row.index = (row.batch * problem.queries + row.query) * problem.heads + row.head;
  return row;
}

template <typename T>
BOLTZ_MM_DEVICE const T* values_of(const GridProblem& problem, const Row& row) {
  return static_cast<const T*>(problem.value) + row.batch * problem.value_batch_stride +
         row.head * problem.value_head_stride;
}

// A row of mask_output or its gradient for point 0; points follow each other at a distance of H * D.
BOLTZ_MM_DEVICE Index mask_offset(const GridProblem& problem, const Row& row) {
  const Index pixels = (row.batch * problem.queries + row.query) * problem.points;
  return (pixels * problem.heads + row.head) * problem.depth;
}

// ---------------------------------------------------------------------------------------------------- levels ----

struct Level {
  Index index = 0;
  Index start = 0;  // first cell
  int height = 0, width = 0;
};

// Walks over the levels.  The host cannot look at the shapes without waiting for the device, so they are held against
// the number of cells here: a level that does not fit, and all after it, are taken to be empty.
class Levels {
 public:
  Level level;

  BOLTZ_MM_DEVICE Levels(const GridProblem& problem) : shapes_(problem.shapes), cells_(problem.cells) {
    if (problem.levels > 0) read();
  }

  BOLTZ_MM_DEVICE void seek(Index index) {
    if (index < level.index) {
      level = Level();
      read();
    }
    while (level.index < index) {
      level.start += static_cast<Index>(level.height) * level.width;
      ++level.index;
      read();
    }
  }

 private:
  const Index* shapes_;
  Index cells_;

  BOLTZ_MM_DEVICE void read() {
    const Index height = shapes_[2 * level.index], width = shapes_[2 * level.index + 1];
    const bool sensible = height >= 0 && width >= 0 && height <= 0x7fffffff && width <= 0x7fffffff;
    const bool fits = sensible && height * width <= cells_ - level.start;
    if (!fits) level.start = cells_;
    level.height = fits ? static_cast<int>(height) : 0;
    level.width = fits ? static_cast<int>(width) : 0;
  }
};

// --------------------------------------------------------------------------------------------------- samples ----

// One axis of a sample: the first of its two cells (or its neighbour inside), and their coefficients, 0 outside.
template <typename C>
struct Axis {
  int index;
  bool has_first, has_second;
  C first, second;

  BOLTZ_MM_DEVICE bool has_both() const { return has_first && has_second; }
};

// For a position in (-1, size).
template <typename C>
BOLTZ_MM_DEVICE Axis<C> along_axis(C position, int size) {
  const C floor = round_down(position), fraction = position - floor;
  const int cell = static_cast<int>(floor);
  Axis<C> axis;
  axis.has_first = cell >= 0 && cell < size;
  axis.has_second = cell + 1 < size;
  axis.index = cell < 0 ? 0 : cell < size ? cell : size - 1;
  axis.first = axis.has_first ? 1 - fraction : C(0);
  axis.second = axis.has_second ? fraction : C(0);
  return axis;
}

template <typename C>
struct Position {
  C x, y;  // in cells, the centre of cell i at i
};

// A point contributes only if this holds; written so that it does not for NaN.
template <typename C>
BOLTZ_MM_DEVICE bool is_inside(const Position<C>& at, const Level& level) {
  const C width = static_cast<C>(level.width), height = static_cast<C>(level.height);
  return level.width > 0 && level.height > 0 && -1 < at.x && width > at.x && -1 < at.y && height > at.y;
}

// Where the four corners of a sample are: cell, and the distances to the next column and row (0 at a border).
struct Corners {
  uint32_t cell;
  uint32_t steps;  // the number of cells to the next row, and in the highest bit whether there is a next column

  BOLTZ_MM_DEVICE Index right() const { return steps >> 31; }
  BOLTZ_MM_DEVICE Index down() const { return steps & 0x7fffffffu; }
};

template <typename C>
BOLTZ_MM_DEVICE Corners find_corners(const Level& level, const Axis<C>& x, const Axis<C>& y) {
  Corners corners;
  corners.cell = static_cast<uint32_t>(level.start + static_cast<Index>(y.index) * level.width + x.index);
  corners.steps = (y.has_both() ? static_cast<uint32_t>(level.width) : 0u) | (x.has_both() ? 0x80000000u : 0u);
  return corners;
}

// A box on a level, and where its grid points are.
template <typename C>
struct Frame {
  C x, y, width, height;  // sizes below 0 are 0, NaN stays
  C cosine, sine;
  C scale_x, scale_y;  // cells of the level in the part that the image covers

  BOLTZ_MM_DEVICE Position<C> place(C grid_x, C grid_y) const {
    const C along = grid_x * width, across = grid_y * height;
    return {(x + along * cosine - across * sine) * scale_x - C(0.5),
            (y + along * sine + across * cosine) * scale_y - C(0.5)};
  }
};

template <typename C>
BOLTZ_MM_DEVICE Frame<C> read_frame(const GridProblem& problem, const Row& row, const Level& level) {
  const Index index = row.index * problem.levels + level.index;
  const C* box = static_cast<const C*>(problem.boxes) + index * 4;
  Frame<C> frame;
  frame.x = box[0];
  frame.y = box[1];
  frame.width = box[2] < 0 ? C(0) : box[2];
  frame.height = box[3] < 0 ? C(0) : box[3];
  frame.cosine = 1;
  frame.sine = 0;
  if (problem.angles) {
    sine_and_cosine(static_cast<const C*>(problem.angles)[index], frame.sine, frame.cosine);
  }
  frame.scale_x = static_cast<C>(level.width);
  frame.scale_y = static_cast<C>(level.height);
  if (problem.ratios) {
    const C* ratio = static_cast<const C*>(problem.ratios) + (row.batch * problem.levels + level.index) * 2;
    frame.scale_x *= ratio[0];
    frame.scale_y *= ratio[1];
  }
  return frame;
}

template <typename C>
BOLTZ_MM_DEVICE Position<C> place_on_grid(const GridProblem& problem, const Frame<C>& frame, Index point) {
  const C* grid = static_cast<const C*>(problem.grid) + 2 * point;
  return frame.place(grid[0], grid[1]);
}

template <typename C>
BOLTZ_MM_DEVICE Position<C> given_place(const GridProblem& problem, const Row& row, const Level& level, Index point) {
  const Index index = (row.index * problem.levels + level.index) * problem.points + point;
  const C* location = static_cast<const C*>(problem.locations) + index * 2;
  return {location[0] * static_cast<C>(level.width) - C(0.5), location[1] * static_cast<C>(level.height) - C(0.5)};
}

// --------------------------------------------------------------------------------------- sums over a team ----

template <typename Team, typename C>
BOLTZ_MM_DEVICE C sum_over_lanes(Team& team, C x) {
  for (int offset = 1; offset < team.lanes; offset *= 2) x += team.group_xor(x, offset);
  return x;
}

// Combines numbers of the threads whose rank differs in bits from `first` on: all for 1, the slices for `lanes`.
// Always in the same order.  `scratch` has one place for each thread of the team.
template <typename Team, typename C, typename Combine>
BOLTZ_MM_DEVICE C combine(Team& team, C x, int first, C* scratch, Combine two) {
  for (int offset = first; offset < team.size && offset < kWarp; offset *= 2) x = two(x, team.warp_xor(x, offset));
  if (team.size <= kWarp) return x;
  scratch[team.rank] = x;
  team.sync_team();
  x = scratch[team.rank % kWarp];
  for (int other = team.rank % kWarp + kWarp; other < team.size; other += kWarp) x = two(x, scratch[other]);
  team.sync_team();
  return x;
}

struct Add {
  template <typename C>
  BOLTZ_MM_DEVICE C operator()(C a, C b) const {
    return a + b;
  }
};

struct Larger {
  template <typename C>
  BOLTZ_MM_DEVICE C operator()(C a, C b) const {
    return b > a ? b : a;
  }
};

template <typename Team, typename C>
BOLTZ_MM_DEVICE C sum_over_team(Team& team, C x, C* scratch) {
  return combine(team, x, 1, scratch, Add());
}

template <typename Team, typename C>
BOLTZ_MM_DEVICE C sum_over_slices(Team& team, C x, C* scratch) {
  return combine(team, x, team.lanes, scratch, Add());
}

// --------------------------------------------------------------------------------------------------- softmax ----

template <typename C>
struct Softmax {
  C top = -static_cast<C>(INFINITY), sum = 0;

  BOLTZ_MM_DEVICE C weight(C logit) const { return exponential(logit - top) / sum; }
};

// Over the numbers 0, step, 2 * step, ... below count.
template <typename Team, typename C>
BOLTZ_MM_DEVICE Softmax<C> softmax_of(Team& team, const C* logits, Index count, int step, C* scratch) {
  Softmax<C> softmax;
  for (Index i = static_cast<Index>(team.rank) * step; i < count; i += static_cast<Index>(team.size) * step) {
    softmax.top = Larger()(softmax.top, logits[i]);
  }
  softmax.top = combine(team, softmax.top, 1, scratch, Larger());
  for (Index i = static_cast<Index>(team.rank) * step; i < count; i += static_cast<Index>(team.size) * step) {
    softmax.sum += exponential(logits[i] - softmax.top);
  }
  softmax.sum = sum_over_team(team, softmax.sum, scratch);
  return softmax;
}

// Quadrant of the grid, row-major, in which a point lies.
BOLTZ_MM_DEVICE int quadrant_of(const GridProblem& problem, Index point) {
  const Index half = problem.grid_size / 2, row = quotient(point, problem.grid_size);
  return (row >= half ? 2 : 0) + (point - row * problem.grid_size >= half ? 1 : 0);
}

template <typename C>
BOLTZ_MM_DEVICE C points_in_quadrant(const GridProblem& problem) {
  return static_cast<C>(problem.points / 4);
}

// Element of a small array that stays in registers.
template <typename X>
BOLTZ_MM_DEVICE X pick(const X (&items)[4], int index) {
  const X low = index == 0 ? items[0] : items[1], high = index == 2 ? items[2] : items[3];
  return index < 2 ? low : high;
}

}  // namespace boltz_mm::cuda
