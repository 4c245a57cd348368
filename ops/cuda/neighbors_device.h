// What a thread of each neighbour kernel does.  The threads exchange nothing but the atomic operations of `Atomics`, and
// those of a block in the scan; so the tests run the same code on a CPU, one thread after the other.

#pragma once

#include "neighbors.h"
#include "rounding.h"

namespace boltz_mm::cuda {

// ---------------------------------------------------------------------------------------------------- buckets ----

// Integers in the order of the numbers, all above 0; a NaN is above all numbers or below them.
BOLTZ_MM_ROUNDED uint32_t ordered(float number) {
  const uint32_t bits = bits_of(number);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

BOLTZ_MM_ROUNDED float from_ordered(uint32_t order) { return float_of(order >> 31 ? order & 0x7fffffffu : ~order); }

template <typename Atomics>
BOLTZ_MM_ROUNDED void bound_point(Atomics atomics, const NeighborProblem& problem, int64_t at) {
  const float x = problem.position[2 * at], y = problem.position[2 * at + 1];
  uint32_t* bounds = problem.bounds + at / problem.points * 4;
  const uint32_t orders[] = {ordered(-x), ordered(-y), ordered(x), ordered(y)};
  for (int i = 0; i < 4; ++i) {
    if (bounds[i] < orders[i]) atomics.max(bounds + i, orders[i]);  // reading first spares most of the atomics
  }
}

BOLTZ_MM_ROUNDED void lay_grid(const NeighborProblem& problem, int64_t image) {
  const uint32_t* bounds = problem.bounds + image * 4;
  const bool known = problem.height > 0;
  const double first_x = known ? 0 : -static_cast<double>(from_ordered(bounds[0]));
  const double first_y = known ? 0 : -static_cast<double>(from_ordered(bounds[1]));
  const double last_x = known ? static_cast<double>(problem.width - 1) : from_ordered(bounds[2]);
  const double last_y = known ? static_cast<double>(problem.height - 1) : from_ordered(bounds[3]);
  const double width = last_x - first_x, height = last_y - first_y;
  BucketGrid grid{0, 0, 0, 0, 1, 1};
  if (width + height < 1e300) {  // else a point is not finite, and one bucket holds all
    const double share = problem.mean / problem.points, longer = width > height ? width : height;
    const double square = sqrt(width * height * share), side = square > longer * share ? square : longer * share;
    grid.first_x = first_x;
    grid.first_y = first_y;
    if (side > 0) {
      grid.per_unit = 1 / side;
      grid.columns = static_cast<int32_t>(width * grid.per_unit) + 1;
      grid.rows = static_cast<int32_t>(height * grid.per_unit) + 1;
    }
    const double reach_x = fabs(first_x) > fabs(last_x) ? fabs(first_x) : fabs(last_x);
    const double reach_y = fabs(first_y) > fabs(last_y) ? fabs(first_y) : fabs(last_y);
    grid.slack = (reach_x + reach_y) * 1e-14;
  }
  problem.grids[image] = grid;
}

BOLTZ_MM_ROUNDED int32_t clamped(double place, int32_t count) {
  return place >= count - 1 ? count - 1 : place > 0 ? static_cast<int32_t>(place) : 0;
}

BOLTZ_MM_ROUNDED int32_t column_of(const BucketGrid& grid, float x) {
  return clamped((x - grid.first_x) * grid.per_unit, grid.columns);
}

BOLTZ_MM_ROUNDED int32_t row_of(const BucketGrid& grid, float y) {
  return clamped((y - grid.first_y) * grid.per_unit, grid.rows);
}

template <typename Atomics>
BOLTZ_MM_ROUNDED void count_point(Atomics atomics, const NeighborProblem& problem, int64_t at) {
  const int64_t image = at / problem.points;
  const BucketGrid grid = problem.grids[image];
  const int32_t row = row_of(grid, problem.position[2 * at + 1]);
  problem.bucket[at] = row * grid.columns + column_of(grid, problem.position[2 * at]);
  atomics.add(problem.starts + image * (problem.most_buckets + 1) + problem.bucket[at], 1);
}

// From counts to the end of each bucket, by the threads of a block: each sums up a run of buckets, the sums are added
// up in the block (between two calls of these functions all threads wait for each other), and each goes over its run
// again.
struct BucketScan {
  int32_t* starts;
  int64_t first, end;

  BOLTZ_MM_ROUNDED BucketScan(const NeighborProblem& problem, int64_t image, int rank, int threads)
      : starts(problem.starts + image * (problem.most_buckets + 1)) {
    const int64_t buckets = static_cast<int64_t>(problem.grids[image].columns) * problem.grids[image].rows + 1;
    const int64_t run = (buckets + threads - 1) / threads;
    first = rank * run < buckets ? rank * run : buckets;
    end = first + run < buckets ? first + run : buckets;
  }

  BOLTZ_MM_ROUNDED int32_t sum() const {
    int32_t sum = 0;
    for (int64_t i = first; i < end; ++i) sum += starts[i];
    return sum;
  }

  // `before`: the sum of all runs before this one.
  BOLTZ_MM_ROUNDED void write(int32_t before) const {
    for (int64_t i = first; i < end; ++i) starts[i] = before += starts[i];
  }
};

// Filling turns the end of each bucket into its start.
template <typename Atomics>
BOLTZ_MM_ROUNDED void fill_point(Atomics atomics, const NeighborProblem& problem, int64_t at) {
  const int64_t image = at / problem.points;
  int32_t* end = problem.starts + image * (problem.most_buckets + 1) + problem.bucket[at];
  const int64_t to = image * problem.points + atomics.add(end, -1) - 1;
  problem.x[to] = problem.position[2 * at];
  problem.y[to] = problem.position[2 * at + 1];
  problem.source[to] = static_cast<int32_t>(at - image * problem.points);
}

// ----------------------------------------------------------------------------------------------------- search ----

// A key holds the bits of a distance, which ascend with it, and below them the index, which breaks ties.  A distance
// that is not a number counts as infinite.
BOLTZ_MM_ROUNDED uint64_t key_of(float squared, int32_t index) {
  const float distance = squared >= 0 ? root(squared) : INFINITY;
  return static_cast<uint64_t>(bits_of(distance)) << 32 | static_cast<uint32_t>(index);
}

// The k smallest keys, ascending.
template <int K>
struct KeysInRegisters {
  uint64_t keys[K];

  BOLTZ_MM_ROUNDED explicit KeysInRegisters(const NeighborProblem&, int64_t) {
    for (int i = 0; i < K; ++i) keys[i] = ~uint64_t{0};
  }
  BOLTZ_MM_ROUNDED int64_t count() const { return K; }
  BOLTZ_MM_ROUNDED uint64_t last() const { return keys[K - 1]; }
  BOLTZ_MM_ROUNDED uint64_t operator[](int64_t at) const { return keys[at]; }
  BOLTZ_MM_ROUNDED void insert(uint64_t key) {
    BOLTZ_MM_UNROLLED
    for (int i = K - 1; i > 0; --i) keys[i] = key < keys[i - 1] ? keys[i - 1] : key < keys[i] ? key : keys[i];
    keys[0] = key < keys[0] ? key : keys[0];
  }
};

struct KeysInMemory {
  uint64_t* keys;
  int64_t k;

  BOLTZ_MM_ROUNDED KeysInMemory(const NeighborProblem& problem, int64_t query)
      : keys(problem.keys + query * problem.k), k(problem.k) {
    for (int64_t i = 0; i < k; ++i) keys[i] = ~uint64_t{0};
  }
  BOLTZ_MM_ROUNDED int64_t count() const { return k; }
  BOLTZ_MM_ROUNDED uint64_t last() const { return keys[k - 1]; }
  BOLTZ_MM_ROUNDED uint64_t operator[](int64_t at) const { return keys[at]; }
  BOLTZ_MM_ROUNDED void insert(uint64_t key) {
    int64_t at = k - 1;
    for (; at > 0 && keys[at - 1] > key; --at) keys[at] = keys[at - 1];
    keys[at] = key;
  }
};

template <typename Keys>
class Search {
 public:
  BOLTZ_MM_ROUNDED Search(const NeighborProblem& problem, int64_t query)
      : grid_(problem.grids[query / problem.queries]), keys_(problem, query) {
    const int64_t image = query / problem.queries;
    starts_ = problem.starts + image * (problem.most_buckets + 1);
    xs_ = problem.x + image * problem.points;
    ys_ = problem.y + image * problem.points;
    sources_ = problem.source + image * problem.points;
    x_ = problem.query[2 * query];
    y_ = problem.query[2 * query + 1];
  }

  BOLTZ_MM_ROUNDED void run() {
    // A block of 3 x 3 buckets, and then the nearest side of it, as long as something there can be as near.
    const int32_t column = column_of(grid_, x_), row = row_of(grid_, y_);
    int32_t left = column > 0 ? column - 1 : 0, right = column + 1 < grid_.columns ? column + 1 : column;
    int32_t top = row > 0 ? row - 1 : 0, bottom = row + 1 < grid_.rows ? row + 1 : row;
    for (int i = 0; i < 3; ++i) {  // its own row first: then fewer points of the others are near
      const int32_t at = i == 0 ? row : i == 1 ? row - 1 : row + 1;
      if (at >= top && at <= bottom) see(at, left, right);
    }
    const double side = grid_.per_unit > 0 ? 1 / grid_.per_unit : 0, slack = grid_.slack + (fabs(x_) + fabs(y_)) * 1e-14;
    for (;;) {
      const bool more_left = left > 0, more_right = right + 1 < grid_.columns;
      const bool more_above = top > 0, more_below = bottom + 1 < grid_.rows;
      const double to_left = more_left ? x_ - (grid_.first_x + left * side) : INFINITY;
      const double to_right = more_right ? grid_.first_x + (right + 1) * side - x_ : INFINITY;
      const double to_top = more_above ? y_ - (grid_.first_y + top * side) : INFINITY;
      const double to_bottom = more_below ? grid_.first_y + (bottom + 1) * side - y_ : INFINITY;
      const double across = to_left < to_right ? to_left : to_right, along = to_top < to_bottom ? to_top : to_bottom;
      const double nearest = across < along ? across : along, least = nearest - slack;
      // Less than the square that the roundings of float32 can make of a distance not below `least`.
      if (least > 0 && least * least * (1 - 0x1p-20) - 1e-43 > limit_) return;
      if (more_left && !(nearest < to_left)) {
        --left;
        for (int32_t at = top; at <= bottom; ++at) see(at, left, left);
      } else if (more_right && !(nearest < to_right)) {
        ++right;
        for (int32_t at = top; at <= bottom; ++at) see(at, right, right);
      } else if (more_above && !(nearest < to_top)) {
        see(--top, left, right);
      } else if (more_below) {
        see(++bottom, left, right);
      } else {
        return;
      }
    }
  }

  BOLTZ_MM_ROUNDED const Keys& keys() const { return keys_; }

 private:
  const BucketGrid grid_;
  Keys keys_;
  const int32_t *starts_, *sources_;
  const float *xs_, *ys_;
  float x_, y_, limit_ = INFINITY;  // no point of a larger squared distance can be among the k nearest

  // Look at the points of some buckets of a row, which lie side by side.
  BOLTZ_MM_ROUNDED void see(int32_t row, int32_t left, int32_t right) {
    const int32_t* starts = starts_ + static_cast<int64_t>(row) * grid_.columns;
    const int32_t end = starts[right + 1];
    for (int32_t at = starts[left]; at < end; ++at) {
      const float squared = squared_length(subtract(x_, xs_[at]), subtract(y_, ys_[at]));
      if (squared > limit_) continue;
      const uint64_t key = key_of(squared, sources_[at]);
      if (key >= keys_.last()) continue;
      keys_.insert(key);
      if (keys_.last() == ~uint64_t{0}) continue;
      // A root that is rounded to the k-th distance belongs to a square below this: the relative error of a root and
      // of a square is at most 2^-24.
      const float farthest = float_of(static_cast<uint32_t>(keys_.last() >> 32));
      limit_ = multiply(multiply(farthest, farthest), 1.0f + 0x1p-21f);
    }
  }
};

template <typename Keys>
BOLTZ_MM_ROUNDED void search_query(const NeighborProblem& problem, int64_t query) {
  Search<Keys> search(problem, query);
  search.run();
  const Keys& keys = search.keys();
  BOLTZ_MM_UNROLLED
  for (int64_t i = 0; i < keys.count(); ++i) {
    const int64_t to = query * problem.k + i;
    const uint32_t index = static_cast<uint32_t>(keys[i]);
    if (problem.long_index) {
      static_cast<int64_t*>(problem.index)[to] = index;
    } else {
      static_cast<int32_t*>(problem.index)[to] = static_cast<int32_t>(index);
    }
    if (problem.distance) problem.distance[to] = float_of(static_cast<uint32_t>(keys[i] >> 32));
  }
}

// Calls `run` with the kind of memory for the keys.
template <typename Run>
auto choose_keys(int64_t k, const Run& run) {
  switch (k) {
    case 1: return run(static_cast<KeysInRegisters<1>*>(nullptr));
    case 2: return run(static_cast<KeysInRegisters<2>*>(nullptr));
    case 3: return run(static_cast<KeysInRegisters<3>*>(nullptr));
    case 4: return run(static_cast<KeysInRegisters<4>*>(nullptr));
    case 5: return run(static_cast<KeysInRegisters<5>*>(nullptr));
    case 6: return run(static_cast<KeysInRegisters<6>*>(nullptr));
    case 7: return run(static_cast<KeysInRegisters<7>*>(nullptr));
    case 8: return run(static_cast<KeysInRegisters<8>*>(nullptr));
    case kMostInRegisters: return run(static_cast<KeysInRegisters<kMostInRegisters>*>(nullptr));
    default: return run(static_cast<KeysInMemory*>(nullptr));
  }
}

}  // namespace boltz_mm::cuda
