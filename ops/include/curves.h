// Space-filling curves over the cells of a canvas, for the CPU and for CUDA: see boltz_mm/ops/clustering.py, whose
// functions give the same numbers.

#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define BOLTZ_MM_HOST_DEVICE __host__ __device__
#else
#define BOLTZ_MM_HOST_DEVICE
#endif

namespace boltz_mm {

enum class Curve : int { scan, peano, hilbert };

// A curve over height x width cells, with what is the same for all of them.
struct CurveGrid {
  Curve curve;
  int64_t height, width;
  int levels;     // of blocks within blocks
  bool one_column;  // Hilbert: the first level has one column, and the official index of its cells
};

// Rows and columns of anchor cells; 0 rows where the tokens themselves are to be sorted along the curve.
struct AnchorGrid {
  int64_t rows, columns;
};

inline AnchorGrid anchor_grid(int64_t tokens, int64_t cluster_size, int64_t height, int64_t width, Curve curve) {
  if (tokens == 0) return {0, 0};
  // As Python computes it: nearbyint rounds halves to even.
  const double clusters = static_cast<double>((tokens + cluster_size - 1) / cluster_size);
  const double side = std::sqrt(static_cast<double>(height * width) / clusters);
  double rows = std::nearbyint(height / side), columns = std::nearbyint(width / side);
  if (rows < 1) return {0, 0};
  if (curve != Curve::scan) {
    const double base = curve == Curve::peano ? 3 : 2;
    rows = std::fmax(base, std::pow(base, std::nearbyint(std::log(rows) / std::log(base))));
    const double first = static_cast<double>(width) / static_cast<double>(height) * base;
    columns = std::nearbyint(std::nearbyint(first) * (rows / base));
  }
  if (rows * columns < 3) return {0, 0};
  return {static_cast<int64_t>(rows), static_cast<int64_t>(columns)};
}

inline CurveGrid curve_grid(Curve curve, int64_t height, int64_t width) {
  CurveGrid grid{curve, height, width, 1, false};
  if (curve == Curve::scan) return grid;
  const double base = curve == Curve::peano ? 3 : 2;
  if (height > 1) grid.levels = static_cast<int>(std::ceil(std::log(static_cast<double>(height)) / std::log(base)));
  const double half = height / 2.0;
  grid.one_column = std::nearbyint(2.0 / height * width) <= 1 && std::floor((width - 1) / half) < 1;
  return grid;
}

// Place of a cell along the curve.
BOLTZ_MM_HOST_DEVICE inline int64_t curve_value(const CurveGrid& grid, int64_t column, int64_t row) {
  if (grid.curve == Curve::scan) return row * grid.width + (row % 2 == 0 ? column : grid.width - 1 - column);
  const int base = grid.curve == Curve::peano ? 3 : 2;
  // Orders by row and column; orders and turns by state and cell.
  const int peano[3][3] = {{2, 3, 8}, {1, 4, 7}, {0, 5, 6}};
  const int hilbert[4][4] = {{0, 3, 1, 2}, {2, 3, 1, 0}, {2, 1, 3, 0}, {0, 1, 3, 2}};
  const int turns[3][4] = {{-1, 1, 0, 0}, {0, -1, 0, 1}, {1, 0, -1, 0}};
  float x = static_cast<float>(column), y = static_cast<float>(row);
  double exact_size = static_cast<double>(grid.height);
  int64_t value = 0;
  int state = 0;
  bool flip_x = false, flip_y = false;
  for (int level = 0; level < grid.levels; ++level) {
    exact_size = exact_size / base;
    const float size = static_cast<float>(exact_size);
    const float right_of = floorf(x / size), below = floorf(y / size);
    // A cell at a border may be an error of rounding away from it: it belongs to what lies behind.
    x = fmaxf(x - right_of * size, 0);
    y = fmaxf(y - below * size, 0);
    const int64_t across = static_cast<int64_t>(right_of);
    int down = static_cast<int>(below);
    down = down < base ? down : base - 1;
    value = level == 0 ? base * base * (across / base) : value * base * base;
    if (grid.curve == Curve::hilbert) {
      const int right = static_cast<int>(level == 0 ? across % 2 : across < 2 ? across : 1);
      const int cell = right + 2 * down;
      value += hilbert[(state % 4 + 4) % 4][level == 0 && grid.one_column ? right + down : cell];
      state += turns[(state % 3 + 3) % 3][cell];
      continue;
    }
    const bool upside_down = level == 0 ? across / 3 % 2 == 1 : flip_y;
    const bool turned = level == 0 ? across % 2 == 1 : across == 1;
    int right = static_cast<int>(level == 0 ? across % 3 : across < 3 ? across : 2);
    if (level > 0 && flip_x) right = 2 - right;
    value += peano[upside_down ? 2 - down : down][right];
    flip_x ^= down == 1;
    flip_y ^= turned;
  }
  return value;
}

}  // namespace boltz_mm
