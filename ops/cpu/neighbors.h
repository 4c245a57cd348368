// Exact nearest neighbours on the CPU: the points of an image in buckets, and the search, compiled for several
// instruction sets (see neighbors_kernels.h).  No torch header is needed here.

#pragma once

#include "../include/instruction_set.h"

#include <cstdint>

namespace boltz_mm {

constexpr int64_t kBucketPadding = 16;  // floats behind the points, which a vector may read

// Points of one image, sorted by square buckets of a grid, row by row.  The outermost buckets also hold what lies
// outside of the grid.
struct Buckets {
  double first_x, first_y, per_unit;  // column = (x - first_x) * per_unit, row alike
  int32_t columns, rows;
  int32_t* starts;    // [rows * columns + 1] first point of each bucket
  float *x, *y;       // [M + padding]
  int32_t* index;     // [M + padding] of a point in the input
  // Coordinates of the points nearest to what lies beyond: at c, the largest x of columns <= c, the smallest x of
  // columns >= c, and alike for rows.  They bound the distance of points not looked at, roundings included.
  float *largest_x, *smallest_x;  // [columns]
  float *largest_y, *smallest_y;  // [rows]

  static int32_t clamped(double place, int32_t count) {
    return place >= count - 1 ? count - 1 : place > 0 ? static_cast<int32_t>(place) : 0;
  }
  int32_t column(float at) const { return clamped((at - first_x) * per_unit, columns); }
  int32_t row(float at) const { return clamped((at - first_y) * per_unit, rows); }
};

struct NeighborSearch {
  const Buckets* buckets;  // [B]
  const float* query;      // [B, N, 2]
  int64_t queries, k;
  void* index;             // [B, N, k] int64 or int32
  bool long_index;
  float* distance;         // [B, N, k] or null
};

// Finds the neighbours of the queries [begin, end) of all images; best has room for k keys.
using SearchNeighbors = void (*)(const NeighborSearch&, int64_t begin, int64_t end, uint64_t* best);

namespace baseline {
extern const SearchNeighbors search_neighbors;
}
#ifdef BOLTZ_MM_X86_VARIANTS
namespace avx2 {
extern const SearchNeighbors search_neighbors;
}
namespace avx512 {
extern const SearchNeighbors search_neighbors;
}
#endif

}  // namespace boltz_mm
