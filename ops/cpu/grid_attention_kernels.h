// The kernels of deformable, box and instance attention on the CPU, forward and backward.  This file is included by
// one source for each instruction set, inside of a namespace of its own; see grid_attention_avx2.cpp.
//
// Both directions work on blocks of points: coordinates, cells and coefficients are found in vectors over the points,
// samples are taken in vectors over the channels.  Nothing that the formula repeats is stored: a block holds a few
// hundred points at a time.
//
// Backward has one task for each (batch, head, level).  A task owns that part of the gradient of value and adds to it
// in a scratch map, in the order of the queries: no atomics, and the same result for every number of threads.  The
// softmax over levels is applied before and undone after the tasks, in passes over the logits alone.

namespace {

#include "vectors.h"
#include "rows.h"

constexpr Index kForwardPoints = 128;  // in a block, where a row has fewer
constexpr Index kBackwardPoints = 32;
constexpr Index kPrefetchedPoints = 256;  // more would push each other out of the cache

// A sample inside of its level: its four corners and their coefficients (0 for a corner outside of the level, whose
// address is then that of a neighbour inside).
template <typename C>
struct Sample {
  Index cell;   // corner (y0, x0)
  Index right;  // distance in cells to the next column, 0 at the border
  Index down;   // distance in cells to the next row, 0 at the border
  Index point;  // index in the block
  C x[2], y[2];  // coefficients of the columns and rows
  C weight;
};

template <typename C>
struct Block {
  using Int = typename IntegerOf<C>::type;
  // Positions in cells, centre of cell i at i; and the sizes of the points' levels.
  C *x, *y, *weight, *width, *height;
  // Found by find_cells.
  Int *column, *row, *flags;
  C *x0, *x1, *y0, *y1;
  Sample<C>* samples;

  void carve(Carver& carver, Index count) {
    const Index size = padded<C>(count);
    C** const numbers[] = {&x, &y, &weight, &width, &height, &x0, &x1, &y0, &y1};
    for (C** array : numbers) *array = carver.take<C>(size);
    Int** const integers[] = {&column, &row, &flags};
    for (Int** array : integers) *array = carver.take<Int>(size);
    samples = carver.take<Sample<C>>(count);
  }
};

// Which of a point's columns and rows lie inside of the level; a point outside has none of them used.
constexpr int kInside = 1, kColumn0 = 2, kColumn1 = 4, kRow0 = 8, kRow1 = 16;

template <typename C>
struct Axis {
  Vector<C, kLanes<C>> first, second;  // coefficients
  Vector<typename IntegerOf<C>::type, kLanes<C>> index, has_first, has_second;
};

// Cell and coefficients along one axis, for a position in (-1, size).
template <typename C>
inline Axis<C> along_axis(Vector<C, kLanes<C>> position, Vector<C, kLanes<C>> size) {
  using V = Vector<C, kLanes<C>>;
  using I = Vector<typename IntegerOf<C>::type, kLanes<C>>;
  I index = __builtin_convertvector(position, I);
  index += __builtin_convertvector(index, V) > position;  // truncation to floor: a true comparison is -1
  const V fraction = position - __builtin_convertvector(index, V);
  const I has_first = index >= 0;
  const I has_second = __builtin_convertvector(index, V) < size - 1;
  Axis<C> axis;
  axis.first = has_first ? 1 - fraction : V{};
  axis.second = has_second ? fraction : V{};
  axis.index = has_first ? index : I{};
  axis.has_first = has_first;
  axis.has_second = has_second;
  return axis;
}

template <typename C>
void find_cells(const Block<C>& block, Index count) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  using I = Vector<typename IntegerOf<C>::type, N>;
  for (Index i = count; i < padded<C>(count); ++i) block.x[i] = block.y[i] = -2;  // outside
  for (Index i = 0; i < count; i += N) {
    const V width = load<N>(block.width + i), height = load<N>(block.height + i);
    V x = load<N>(block.x + i), y = load<N>(block.y + i);
    // Written so that NaN is outside.  A level without cells has size -1.
    const I inside = (x > -1) & (x < width) & (y > -1) & (y < height);
    x = inside ? x : V{};
    y = inside ? y : V{};
    const Axis<C> along_x = along_axis<C>(x, width), along_y = along_axis<C>(y, height);
    store<N>(block.x0 + i, along_x.first);
    store<N>(block.x1 + i, along_x.second);
    store<N>(block.y0 + i, along_y.first);
    store<N>(block.y1 + i, along_y.second);
    store<N>(block.column + i, along_x.index);
    store<N>(block.row + i, along_y.index);
    const I columns = (along_x.has_first & kColumn0) | (along_x.has_second & kColumn1);
    const I rows = (along_y.has_first & kRow0) | (along_y.has_second & kRow1);
    store<N>(block.flags + i, I((inside & kInside) | columns | rows));
  }
}

template <typename C>
inline Index add_sample(const Block<C>& block, Index point, Index first_cell, Index width, Index count) {
  Sample<C>& sample = block.samples[count];
  const auto flags = block.flags[point];
  sample.cell = first_cell + block.row[point] * width + block.column[point];
  sample.right = (flags & (kColumn0 | kColumn1)) == (kColumn0 | kColumn1);
  sample.down = (flags & (kRow0 | kRow1)) == (kRow0 | kRow1) ? width : 0;
  sample.point = point;
  sample.x[0] = block.x0[point];
  sample.x[1] = block.x1[point];
  sample.y[0] = block.y0[point];
  sample.y[1] = block.y1[point];
  sample.weight = block.weight[point];
  return count + (flags & kInside);
}

inline void prefetch_row(const void* row, Index bytes) {
  __builtin_prefetch(row);
  if (bytes > 64) __builtin_prefetch(static_cast<const char*>(row) + 64);
}

template <typename T, typename C>
inline void prefetch_corners(const T* values, const Sample<C>& sample, Index stride, Index depth) {
  const Index bytes = depth * sizeof(T);
  const T* corner = values + sample.cell * stride;
  prefetch_row(corner, bytes);
  prefetch_row(corner + sample.right * stride, bytes);
  prefetch_row(corner + sample.down * stride, bytes);
  prefetch_row(corner + (sample.right + sample.down) * stride, bytes);
}

// Positions of the points of the levels [first, last) for one (b, q, h).
template <typename C>
void place_points(const GridProblem& problem, Index b, Index row, Index first, Index last, C* x, C* y) {
  const Index points = problem.points;
  for (Index level = first; level < last; ++level, x += points, y += points) {
    const C width = problem.shapes[2 * level + 1], height = problem.shapes[2 * level];
    if (problem.mode == Mode::points) {
      const C* at = static_cast<const C*>(problem.locations) + (row * problem.levels + level) * points * 2;
      for (Index p = 0; p < points; ++p) {
        x[p] = at[2 * p] * width - C(0.5);
        y[p] = at[2 * p + 1] * height - C(0.5);
      }
      continue;
    }
    const C* box = static_cast<const C*>(problem.boxes) + (row * problem.levels + level) * 4;
    const C* ratio = static_cast<const C*>(problem.ratios) + (b * problem.levels + level) * 2;
    const C ratio_x = problem.ratios ? ratio[0] : C(1), ratio_y = problem.ratios ? ratio[1] : C(1);
    const C* grid = static_cast<const C*>(problem.grid);
    const C box_width = box[2] < 0 ? C(0) : box[2], box_height = box[3] < 0 ? C(0) : box[3];  // NaN stays
    if (problem.angles) {
      const C angle = static_cast<const C*>(problem.angles)[row * problem.levels + level];
      const C cosine = __builtin_cos(angle), sine = __builtin_sin(angle);
      for (Index p = 0; p < points; ++p) {
        const C along = grid[2 * p] * box_width, across = grid[2 * p + 1] * box_height;
        x[p] = (box[0] + along * cosine - across * sine) * ratio_x * width - C(0.5);
        y[p] = (box[1] + along * sine + across * cosine) * ratio_y * height - C(0.5);
      }
    } else {
      for (Index p = 0; p < points; ++p) {
        x[p] = (box[0] + grid[2 * p] * box_width) * ratio_x * width - C(0.5);
        y[p] = (box[1] + grid[2 * p + 1] * box_height) * ratio_y * height - C(0.5);
      }
    }
  }
}

// The sizes of the levels [first, last), for each of their points.
template <typename C>
void fill_sizes(const GridProblem& problem, Index first, Index last, C* width, C* height) {
  for (Index level = first; level < last; ++level) {
    const bool empty = problem.shapes[2 * level] * problem.shapes[2 * level + 1] == 0;
    for (Index p = 0; p < problem.points; ++p) {
      *width++ = empty ? C(-1) : C(problem.shapes[2 * level + 1]);
      *height++ = empty ? C(-1) : C(problem.shapes[2 * level]);
    }
  }
}

// Softmax over the levels, separately for each quadrant; logits and weights are [L, 4].
template <typename C>
void softmax_levels(const C* logits, Index levels, C* weights) {
  using V = Vector<C, 4>;
  if (levels == 0) return;
  V top = load<4>(logits);
  for (Index level = 1; level < levels; ++level) {
    const V v = load<4>(logits + 4 * level);
    top = v > top ? v : top;
  }
  V sum = {};
  for (Index level = 0; level < levels; ++level) {
    const V e = exp_negative<4>(V(load<4>(logits + 4 * level) - top));
    store<4>(weights + 4 * level, e);
    sum += e;
  }
  for (Index level = 0; level < levels; ++level) store<4>(weights + 4 * level, V(load<4>(weights + 4 * level) / sum));
}

inline Index logits_per_level(const GridProblem& problem) {
  return problem.mode == Mode::instance ? 4 : problem.points;
}

// Quadrant of the grid, row-major, in which a point lies.
inline Index quadrant(const GridProblem& problem, Index point) {
  const Index half = problem.grid_size / 2;
  return (point / problem.grid_size >= half ? 2 : 0) + (point % problem.grid_size >= half ? 1 : 0);
}

template <typename C>
inline C points_in_quadrant(const GridProblem& problem) {
  const Index half = problem.grid_size / 2;
  return static_cast<C>(half * half);
}

// Weights of all points of one (b, q, h); row is room for a softmax.
template <typename C>
void fill_weights(const GridProblem& problem, Index index, const Index* quadrants, C* row, C* weight) {
  const Index count = problem.levels * problem.points;
  if (problem.mode == Mode::points) {
    const C* given = static_cast<const C*>(problem.weights) + index * count;
    for (Index i = 0; i < count; ++i) weight[i] = given[i];
    return;
  }
  const Index logits = problem.levels * logits_per_level(problem);
  softmax_row(static_cast<const C*>(problem.logits) + index * logits, logits, row);
  if (problem.mode == Mode::box) {
    for (Index i = 0; i < count; ++i) weight[i] = row[i];
    return;
  }
  const C share = points_in_quadrant<C>(problem);
  for (Index level = 0; level < problem.levels; ++level) {
    for (Index p = 0; p < problem.points; ++p) *weight++ = row[4 * level + quadrants[p]] / share;
  }
}

// ------------------------------------------------------------------------------------------------------ forward ----

template <int N, typename T, typename C>
inline __attribute__((always_inline)) Vector<C, N> interpolate(
    const T* values, Index stride, const C (&coefficients)[4], const Sample<C>& sample, Index channel) {
  const T* corner = values + sample.cell * stride + channel;
  const T* below = corner + sample.down * stride;
  const Index right = sample.right * stride;
  return coefficients[0] * load<N>(corner) + coefficients[1] * load<N>(corner + right) +
         coefficients[2] * load<N>(below) + coefficients[3] * load<N>(below + right);
}

template <typename C>
inline __attribute__((always_inline)) void corner_coefficients(const Sample<C>& sample, C scale, C (&c)[4]) {
  const C y0 = scale * sample.y[0], y1 = scale * sample.y[1];
  c[0] = y0 * sample.x[0];
  c[1] = y0 * sample.x[1];
  c[2] = y1 * sample.x[0];
  c[3] = y1 * sample.x[1];
}

// Weighted sum of the samples of one (b, q, h).
template <typename T, typename C>
struct Attend {
  const T* values;
  Index stride;
  const Sample<C>*begin, *end;
  T* output;

  template <int VECTORS, int N>
  inline __attribute__((always_inline)) void run(Index channel) const {
    Vector<C, N> sums[VECTORS] = {};
    for (const Sample<C>* sample = begin; sample != end; ++sample) {
      C c[4];
      corner_coefficients(*sample, sample->weight, c);
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i) {
        sums[i] += interpolate<N>(values, stride, c, *sample, channel + i * N);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) store<N>(output + channel + i * N, sums[i]);
  }
};

// The same with the feature map of the grid: the samples of a point, one of each level, are summed with the weights
// of the levels too.
template <typename T, typename C>
struct AttendWithMask {
  const T* values;
  Index stride;
  const Sample<C>* samples;
  const Index* first_sample;  // [P + 1]
  const C* level_weights;     // [L, P]
  Index points, mask_stride;
  T *output, *mask_output;

  template <int VECTORS, int N>
  inline __attribute__((always_inline)) void run(Index channel) const {
    Vector<C, N> sums[VECTORS] = {};
    for (Index p = 0; p < points; ++p) {
      Vector<C, N> mask[VECTORS] = {};
      for (const Sample<C>* sample = samples + first_sample[p]; sample != samples + first_sample[p + 1]; ++sample) {
        C c[4];
        corner_coefficients(*sample, C(1), c);
        const C level_weight = level_weights[sample->point];
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) {
          const Vector<C, N> s = interpolate<N>(values, stride, c, *sample, channel + i * N);
          sums[i] += sample->weight * s;
          mask[i] += level_weight * s;
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i) store<N>(mask_output + p * mask_stride + channel + i * N, mask[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) store<N>(output + channel + i * N, sums[i]);
  }
};

// Copy one head of the cells [first, first + count) of an image to contiguous rows.  Samples then hit a map that is
// small enough for the second-level cache and the address translation, and not one row in every H * D elements.
template <typename T>
void pack_values(const GridProblem& problem, Index b, Index h, Index first, Index count, T* packed) {
  const T* from = static_cast<const T*>(problem.value) + b * problem.value_batch_stride +
                  h * problem.value_head_stride + first * problem.value_cell_stride;
  const Index bytes = problem.depth * sizeof(T);
  for (Index cell = 0; cell < count; ++cell) {
    __builtin_memcpy(packed + cell * problem.depth, from + cell * problem.value_cell_stride, bytes);
  }
}

// Rows (b, q, h) that are worked on together: row r is first + r * step.
template <typename T>
struct Rows {
  Index batch, first, step, count;
  const T* values;     // of the first row's head
  Index stride;        // between cells
  Index head_stride;   // between the heads of consecutive rows, 0 where all have the same head
  Index first_head, heads;

  const T* values_of(Index r) const { return values + (first_head + r) % heads * head_stride; }
};

template <typename T, typename C>
struct ForwardScratch {
  Block<C> block;
  Index rows;  // in a block
  C *softmax, *quadrant_weights, *level_weights;
  T* packed;
  Index *row_begin, *quadrants;

  ForwardScratch(const GridProblem& problem, void* memory, Index& used) {
    const Index count = problem.levels * problem.points;
    const Index fitting = kForwardPoints / (count ? count : 1);
    rows = problem.with_mask || fitting < 1 ? 1 : fitting;
    Carver carver{static_cast<char*>(memory)};
    block.carve(carver, rows * count);
    const Index logits = problem.levels * (problem.points > 4 ? problem.points : 4);
    softmax = carver.take<C>(padded<C>(logits) + kLanes<C>);
    quadrant_weights = carver.take<C>(4 * problem.levels);
    level_weights = carver.take<C>(count);
    packed = carver.take<T>(problem.packed ? problem.cells * problem.depth : 0);
    row_begin = carver.take<Index>((rows > problem.points ? rows : problem.points) + 1);
    quadrants = carver.take<Index>(problem.points);
    used = carver.used;
  }
};

template <typename T, typename C>
Index forward_scratch(const GridProblem& problem) {
  Index used;
  ForwardScratch<T, C>(problem, nullptr, used);
  return used;
}

// One row with the feature map of the grid; the levels of a point are sampled side by side.
template <typename T, typename C>
void forward_with_mask(const GridProblem& problem, const ForwardScratch<T, C>& scratch, const Rows<T>& rows) {
  const Index points = problem.points, heads = problem.heads, depth = problem.depth, row = rows.first;
  Index samples = 0;
  for (Index p = 0; p < points; ++p) {
    scratch.row_begin[p] = samples;
    for (Index level = 0; level < problem.levels; ++level) {
      const Index width = problem.shapes[2 * level + 1];
      samples = add_sample(scratch.block, level * points + p, problem.starts[level], width, samples);
    }
  }
  scratch.row_begin[points] = samples;
  const C* logits = static_cast<const C*>(problem.logits) + row * problem.levels * 4;
  softmax_levels(logits, problem.levels, scratch.quadrant_weights);
  for (Index level = 0, i = 0; level < problem.levels; ++level) {
    for (Index p = 0; p < points; ++p, ++i) {
      scratch.level_weights[i] = scratch.quadrant_weights[level * 4 + scratch.quadrants[p]];
    }
  }
  T* output = static_cast<T*>(problem.output) + row * depth;
  T* mask_output = static_cast<T*>(problem.mask_output) + (row / heads * points * heads + row % heads) * depth;
  const AttendWithMask<T, C> attend{rows.values_of(0), rows.stride, scratch.block.samples, scratch.row_begin,
                                    scratch.level_weights, points, heads * depth, output, mask_output};
  for_channels<kVectors, kLanes<C>>(attend, 0, depth);
}

template <typename T, typename C>
void forward_block(const GridProblem& problem, const ForwardScratch<T, C>& scratch, const Rows<T>& rows) {
  const Block<C>& block = scratch.block;
  const Index depth = problem.depth, points = problem.points;
  const Index count = problem.levels * points;
  for (Index r = 0; r < rows.count; ++r) {
    const Index row = rows.first + r * rows.step, point = r * count;
    place_points<C>(problem, rows.batch, row, 0, problem.levels, block.x + point, block.y + point);
    fill_weights<C>(problem, row, scratch.quadrants, scratch.softmax, block.weight + point);
  }
  find_cells(block, rows.count * count);
  if (problem.with_mask) {
    forward_with_mask<T, C>(problem, scratch, rows);
    return;
  }
  const bool prefetch = rows.count * count <= kPrefetchedPoints;
  Index samples = 0;
  for (Index r = 0; r < rows.count; ++r) {
    scratch.row_begin[r] = samples;
    const T* values = rows.values_of(r);
    for (Index level = 0, point = r * count; level < problem.levels; ++level) {
      const Index start = problem.starts[level], width = problem.shapes[2 * level + 1];
      for (Index p = 0; p < points; ++p, ++point) {
        const Index before = samples;
        samples = add_sample(block, point, start, width, samples);
        if (prefetch) prefetch_corners(values, block.samples[before], rows.stride, depth);
      }
    }
  }
  scratch.row_begin[rows.count] = samples;
  for (Index r = 0; r < rows.count; ++r) {
    T* output = static_cast<T*>(problem.output) + (rows.first + r * rows.step) * depth;
    const Attend<T, C> attend{rows.values_of(r), rows.stride, block.samples + scratch.row_begin[r],
                              block.samples + scratch.row_begin[r + 1], output};
    for_channels<kVectors, kLanes<C>>(attend, 0, depth);
  }
}

// All rows of a task, as many at a time as a block holds.
template <typename T, typename C>
void forward_rows(const GridProblem& problem, const ForwardScratch<T, C>& scratch, Rows<T> rows) {
  const Index all = rows.count, first = rows.first, first_head = rows.first_head;
  for (Index done = 0; done < all; done += scratch.rows) {
    rows.count = all - done < scratch.rows ? all - done : scratch.rows;
    rows.first = first + done * rows.step;
    rows.first_head = first_head + done;
    forward_block<T, C>(problem, scratch, rows);
  }
}

template <typename T, typename C>
void forward(const GridProblem& problem, int64_t begin, int64_t end, void* memory) {
  Index used;
  const ForwardScratch<T, C> scratch(problem, memory, used);
  const Index count = problem.levels * problem.points, heads = problem.heads, queries = problem.queries;
  for (Index r = 0; r < scratch.rows; ++r) {
    fill_sizes(problem, 0, problem.levels, scratch.block.width + r * count, scratch.block.height + r * count);
  }
  if (problem.mode == Mode::instance) {
    for (Index p = 0; p < problem.points; ++p) scratch.quadrants[p] = quadrant(problem, p);
  }
  for (Index task = begin; task < end; ++task) {
    if (problem.packed) {
      const Index split = task % problem.splits, bh = task / problem.splits;
      const Index b = bh / heads, h = bh % heads;
      const Index first = queries * split / problem.splits, last = queries * (split + 1) / problem.splits;
      pack_values(problem, b, h, 0, problem.cells, scratch.packed);
      forward_rows<T, C>(problem, scratch, Rows<T>{b, (b * queries + first) * heads + h, heads, last - first,
                                                   scratch.packed, problem.depth, 0, 0, heads});
    } else {
      const Index b = task / problem.splits, split = task % problem.splits;
      const Index first = queries * split / problem.splits, last = queries * (split + 1) / problem.splits;
      const T* values = static_cast<const T*>(problem.value) + b * problem.value_batch_stride;
      forward_rows<T, C>(problem, scratch, Rows<T>{b, (b * queries + first) * heads, 1, (last - first) * heads, values,
                                                   problem.value_cell_stride, problem.value_head_stride, 0, heads});
    }
  }
}

// ----------------------------------------------------------------------------------------------------- backward ----

// What the backward pass of a sample needs beside its corners.
template <typename T, typename C>
struct Upstream {
  const T* values;  // of the level and head
  Index stride;
  C* map;           // gradient of the level and head, [cells, D]
  Index depth;
};

// Sums over the channels of gradient * corner, for the four corners.
template <typename C>
struct CornerDots {
  C output[4], mask[4];
};

// Channels from `channel` on: dot products with the corners of value, and the corners of the gradient of value.
template <int N, bool MASK, bool SCATTER, typename T, typename C>
inline __attribute__((always_inline)) void backward_channels(
    const Upstream<T, C>& up, const Sample<C>& sample, const C* grad, const C* grad_mask, C level_weight, Index channel,
    CornerDots<C>& dots) {
  using V = Vector<C, N>;
  const T* corners[4];
  C* maps[4];
  const Index offsets[4] = {0, sample.right, sample.down, sample.right + sample.down};
  for (int i = 0; i < 4; ++i) {
    corners[i] = up.values + (sample.cell + offsets[i]) * up.stride;
    maps[i] = SCATTER ? up.map + (sample.cell + offsets[i]) * up.depth : nullptr;
  }
  C c[4];
  corner_coefficients(sample, MASK ? C(1) : sample.weight, c);
  V sums[4] = {}, mask_sums[4] = {};
  for (; channel + N <= up.depth; channel += N) {
    const V g = load<N>(grad + channel);
    const V gm = MASK ? load<N>(grad_mask + channel) : V{};
    const V both = MASK ? V(sample.weight * g + level_weight * gm) : g;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V v = load<N>(corners[i] + channel);
      sums[i] += g * v;
      if constexpr (MASK) mask_sums[i] += gm * v;
      // One corner after the other: at a border two of them are the same cell.
      if constexpr (SCATTER) store<N>(maps[i] + channel, V(load<N>(maps[i] + channel) + c[i] * both));
    }
  }
  for (int i = 0; i < 4; ++i) {
    dots.output[i] += sum_lanes<N, C>(sums[i]);
    if constexpr (MASK) dots.mask[i] += sum_lanes<N, C>(mask_sums[i]);
  }
  if constexpr (N > 1) {
    if (channel < up.depth) {
      backward_channels<N / 2, MASK, SCATTER>(up, sample, grad, grad_mask, level_weight, channel, dots);
    }
  }
}

template <typename T, typename C>
struct BackwardScratch {
  Block<C> block;
  Index rows;  // queries in a block
  T* packed;
  C *map, *grads, *mask_grads, *grad_x, *grad_y, *grad_weight, *grad_level_weight, *level_weight, *softmax;
  Index* quadrants;

  BackwardScratch(const GridProblem& problem, void* memory, Index& used) {
    const Index fitting = kBackwardPoints / (problem.points ? problem.points : 1);
    rows = fitting < 1 ? 1 : fitting;
    const Index count = rows * problem.points;
    Index most_cells = 0;
    for (Index level = 0; level < problem.levels; ++level) {
      const Index cells = problem.shapes[2 * level] * problem.shapes[2 * level + 1];
      most_cells = cells > most_cells ? cells : most_cells;
    }
    Carver carver{static_cast<char*>(memory)};
    block.carve(carver, count);
    map = carver.take<C>(problem.grad_value ? most_cells * problem.depth : 0);
    packed = carver.take<T>(problem.packed ? most_cells * problem.depth : 0);
    grads = carver.take<C>(rows * problem.depth);
    mask_grads = carver.take<C>(problem.with_mask ? count * problem.depth : 0);
    C** const arrays[] = {&grad_x, &grad_y, &grad_weight, &grad_level_weight, &level_weight};
    for (C** array : arrays) *array = carver.take<C>(count);
    const Index logits = problem.levels * logits_per_level(problem);
    softmax = carver.take<C>(2 * (padded<C>(logits) + kLanes<C>));
    quadrants = carver.take<Index>(problem.points);
    used = carver.used;
  }
};

template <typename T, typename C>
Index backward_scratch(const GridProblem& problem) {
  Index used;
  BackwardScratch<T, C>(problem, nullptr, used);
  return used;
}

// Gradients of one box (and angle) from those of its points.
template <typename C>
void reduce_box(const GridProblem& problem, const Block<C>& block, const C* grad_x, const C* grad_y, Index first,
                Index b, Index index, Index level) {
  const C* box = static_cast<const C*>(problem.boxes) + index * 4;
  const C* grid = static_cast<const C*>(problem.grid);
  C scale_x = problem.shapes[2 * level + 1], scale_y = problem.shapes[2 * level];
  if (problem.ratios) {
    const C* ratio = static_cast<const C*>(problem.ratios) + (b * problem.levels + level) * 2;
    scale_x *= ratio[0];
    scale_y *= ratio[1];
  }
  C cosine = 1, sine = 0;
  if (problem.angles) {
    const C angle = static_cast<const C*>(problem.angles)[index];
    cosine = __builtin_cos(angle);
    sine = __builtin_sin(angle);
  }
  const C width = box[2] > 0 ? box[2] : C(0), height = box[3] > 0 ? box[3] : C(0);
  C sum[5] = {};
  for (Index p = 0; p < problem.points; ++p) {
    if (!(block.flags[first + p] & kInside)) continue;
    const C x = grad_x[first + p] * scale_x, y = grad_y[first + p] * scale_y;
    const C along = x * cosine + y * sine, across = y * cosine - x * sine;
    sum[0] += x;
    sum[1] += y;
    sum[2] += along * grid[2 * p];
    sum[3] += across * grid[2 * p + 1];
    sum[4] += across * grid[2 * p] * width - along * grid[2 * p + 1] * height;
  }
  C* grad = static_cast<C*>(problem.grad_boxes) + index * 4;
  grad[0] = sum[0];
  grad[1] = sum[1];
  grad[2] = box[2] > 0 ? sum[2] : C(0);
  grad[3] = box[3] > 0 ? sum[3] : C(0);
  if (problem.grad_angles) static_cast<C*>(problem.grad_angles)[index] = sum[4];
}

// Weights of the points of one (b, q, h) in one level, from what softmax left in the gradients of the logits.
template <typename T, typename C>
void fill_level_weights(const GridProblem& problem, const BackwardScratch<T, C>& scratch, Index index, Index first) {
  const Index points = problem.points;
  C* weight = scratch.block.weight + first;
  if (problem.mode == Mode::instance) {
    const C* spatial = static_cast<const C*>(problem.grad_logits) + index * 4;
    const C* level = static_cast<const C*>(problem.level_weights) + index * 4;
    const C share = points_in_quadrant<C>(problem);
    for (Index p = 0; p < points; ++p) {
      weight[p] = spatial[scratch.quadrants[p]] / share;
      if (problem.with_mask) scratch.level_weight[first + p] = level[scratch.quadrants[p]];
    }
    return;
  }
  const void* source = problem.mode == Mode::points ? problem.weights : problem.grad_logits;
  const C* given = static_cast<const C*>(source) + index * points;
  for (Index p = 0; p < points; ++p) weight[p] = given[p];
}

// Hand the gradients of a query's points on to what the points came from.
template <typename T, typename C>
void reduce_points(const GridProblem& problem, const BackwardScratch<T, C>& scratch, Index first, Index b, Index index,
                   Index level) {
  const Index points = problem.points;
  const C *grad_x = scratch.grad_x, *grad_y = scratch.grad_y, *grad_weight = scratch.grad_weight;
  if (problem.mode == Mode::points) {
    C* locations = static_cast<C*>(problem.grad_locations) + index * points * 2;
    C* weights = static_cast<C*>(problem.grad_weights) + index * points;
    const C width = problem.shapes[2 * level + 1], height = problem.shapes[2 * level];
    for (Index p = 0; p < points; ++p) {
      locations[2 * p] = grad_x[first + p] * width;
      locations[2 * p + 1] = grad_y[first + p] * height;
      weights[p] = grad_weight[first + p];
    }
    return;
  }
  reduce_box(problem, scratch.block, grad_x, grad_y, first, b, index, level);
  if (problem.mode == Mode::box) {
    C* product = static_cast<C*>(problem.grad_logits) + index * points;
    for (Index p = 0; p < points; ++p) product[p] *= grad_weight[first + p];
    return;
  }
  C sums[4] = {}, level_sums[4] = {};
  for (Index p = 0; p < points; ++p) {
    sums[scratch.quadrants[p]] += grad_weight[first + p];
    if (problem.with_mask) level_sums[scratch.quadrants[p]] += scratch.grad_level_weight[first + p];
  }
  C* product = static_cast<C*>(problem.grad_logits) + index * 4;
  C* level_product = static_cast<C*>(problem.level_weights) + index * 4;
  for (Index i = 0; i < 4; ++i) {
    product[i] *= sums[i] / points_in_quadrant<C>(problem);
    if (problem.with_mask) level_product[i] *= level_sums[i];
  }
}

template <bool MASK, bool SCATTER, typename T, typename C>
void backward_samples(const GridProblem& problem, const BackwardScratch<T, C>& scratch, const Upstream<T, C>& up,
                      Index samples) {
  for (const Sample<C>* sample = scratch.block.samples; sample != scratch.block.samples + samples; ++sample) {
    const Index point = sample->point;
    const C level_weight = MASK ? scratch.level_weight[point] : C(0);
    const C* grad = scratch.grads + point / problem.points * up.depth;
    CornerDots<C> dots = {};
    backward_channels<kLanes<C>, MASK, SCATTER>(
        up, *sample, grad, MASK ? scratch.mask_grads + point * up.depth : nullptr, level_weight, 0, dots);
    C c[4], weighted[4];
    corner_coefficients(*sample, C(1), c);
    C grad_weight = 0, grad_level_weight = 0;
    for (int i = 0; i < 4; ++i) {
      grad_weight += c[i] * dots.output[i];
      grad_level_weight += c[i] * dots.mask[i];
      weighted[i] = sample->weight * dots.output[i] + level_weight * dots.mask[i];
    }
    // A corner outside of the level counts as 0 in the differences.
    const auto flags = scratch.block.flags[point];
    for (int i = 0; i < 4; ++i) {
      const int needed = (i % 2 ? kColumn1 : kColumn0) | (i / 2 ? kRow1 : kRow0);
      weighted[i] = (flags & needed) == needed ? weighted[i] : C(0);
    }
    scratch.grad_x[point] = sample->y[0] * (weighted[1] - weighted[0]) + sample->y[1] * (weighted[3] - weighted[2]);
    scratch.grad_y[point] = sample->x[0] * (weighted[2] - weighted[0]) + sample->x[1] * (weighted[3] - weighted[1]);
    scratch.grad_weight[point] = grad_weight;
    if (MASK) scratch.grad_level_weight[point] = grad_level_weight;
  }
}

template <typename T, typename C>
void backward_block(const GridProblem& problem, const BackwardScratch<T, C>& scratch, const Upstream<T, C>& up, Index b,
                    Index h, Index level, Index query, Index rows) {
  const Block<C>& block = scratch.block;
  const Index points = problem.points, heads = problem.heads, depth = problem.depth;
  const auto row_of = [&](Index r) { return (b * problem.queries + query + r) * heads + h; };
  for (Index r = 0; r < rows; ++r) {
    const Index row = row_of(r), first = r * points;
    place_points<C>(problem, b, row, level, level + 1, block.x + first, block.y + first);
    fill_level_weights(problem, scratch, row * problem.levels + level, first);
    convert_row<kLanes<C>>(static_cast<const T*>(problem.grad_output) + row * depth, depth, scratch.grads + r * depth);
    if (problem.with_mask) {
      const T* from = static_cast<const T*>(problem.grad_mask_output) + (row / heads * points * heads + h) * depth;
      for (Index p = 0; p < points; ++p) {
        convert_row<kLanes<C>>(from + p * heads * depth, depth, scratch.mask_grads + (first + p) * depth);
      }
    }
  }
  const Index count = rows * points;
  find_cells(block, count);
  const Index width = problem.shapes[2 * level + 1];
  const bool prefetch = count <= kPrefetchedPoints;
  Index samples = 0;
  for (Index point = 0; point < count; ++point) {
    const Index before = samples;
    samples = add_sample(block, point, 0, width, samples);
    scratch.grad_x[point] = scratch.grad_y[point] = scratch.grad_weight[point] = scratch.grad_level_weight[point] = 0;
    if (prefetch) {
      prefetch_corners(up.values, block.samples[before], up.stride, depth);
      if (problem.grad_value) prefetch_corners<C>(up.map, block.samples[before], depth, depth);
    }
  }
  if (problem.with_mask) {
    problem.grad_value ? backward_samples<true, true>(problem, scratch, up, samples)
                       : backward_samples<true, false>(problem, scratch, up, samples);
  } else {
    problem.grad_value ? backward_samples<false, true>(problem, scratch, up, samples)
                       : backward_samples<false, false>(problem, scratch, up, samples);
  }
  for (Index r = 0; r < rows; ++r) {
    reduce_points(problem, scratch, r * points, b, row_of(r) * problem.levels + level, level);
  }
}

template <typename T, typename C>
void backward(const GridProblem& problem, int64_t begin, int64_t end, void* memory) {
  Index used;
  const BackwardScratch<T, C> scratch(problem, memory, used);
  const Index depth = problem.depth, heads = problem.heads;
  if (problem.mode == Mode::instance) {
    for (Index p = 0; p < problem.points; ++p) scratch.quadrants[p] = quadrant(problem, p);
  }
  for (Index task = begin; task < end; ++task) {
    const Index level = task % problem.levels, h = task / problem.levels % heads, b = task / problem.levels / heads;
    const Index start = problem.starts[level];
    const Index cells = problem.shapes[2 * level] * problem.shapes[2 * level + 1];
    for (Index r = 0; r < scratch.rows; ++r) {
      fill_sizes(problem, level, level + 1, scratch.block.width + r * problem.points,
                 scratch.block.height + r * problem.points);
    }
    if (problem.grad_value) __builtin_memset(scratch.map, 0, cells * depth * sizeof(C));
    const T* values = static_cast<const T*>(problem.value) + b * problem.value_batch_stride +
                      start * problem.value_cell_stride + h * problem.value_head_stride;
    if (problem.packed) pack_values(problem, b, h, start, cells, scratch.packed);
    const Upstream<T, C> up{problem.packed ? scratch.packed : values,
                            problem.packed ? depth : problem.value_cell_stride, scratch.map, depth};
    for (Index query = 0; query < problem.queries; query += scratch.rows) {
      const Index left = problem.queries - query;
      backward_block<T, C>(problem, scratch, up, b, h, level, query, left < scratch.rows ? left : scratch.rows);
    }
    if (!problem.grad_value) continue;
    T* grad_value = static_cast<T*>(problem.grad_value) + ((b * problem.cells + start) * heads + h) * depth;
    for (Index cell = 0; cell < cells; ++cell) {
      convert_row<kLanes<C>>(scratch.map + cell * depth, depth, grad_value + cell * heads * depth);
    }
  }
}

template <typename C>
void softmax(const GridProblem& problem, int64_t begin, int64_t end, void* memory) {
  Index used;
  const BackwardScratch<C, C> scratch(problem, memory, used);
  const Index count = problem.levels * logits_per_level(problem);
  for (Index row = begin; row < end; ++row) {
    const C* logits = static_cast<const C*>(problem.logits) + row * count;
    C* weights = static_cast<C*>(problem.grad_logits) + row * count;
    softmax_row(logits, count, scratch.softmax);
    for (Index i = 0; i < count; ++i) weights[i] = scratch.softmax[i];
    if (problem.with_mask) {
      softmax_levels(logits, problem.levels, static_cast<C*>(problem.level_weights) + row * count);
    }
  }
}

// gradient of logit i = product_i - weight_i * sum over j of product_j, with product = weight * gradient of weight.
template <typename C>
void softmax_backward(const GridProblem& problem, int64_t begin, int64_t end, void* memory) {
  Index used;
  const BackwardScratch<C, C> scratch(problem, memory, used);
  const Index count = problem.levels * logits_per_level(problem);
  C* level_weights = scratch.softmax + padded<C>(count) + kLanes<C>;
  for (Index row = begin; row < end; ++row) {
    const C* logits = static_cast<const C*>(problem.logits) + row * count;
    C* grad = static_cast<C*>(problem.grad_logits) + row * count;
    softmax_row(logits, count, scratch.softmax);
    C sum = 0;
    for (Index i = 0; i < count; ++i) sum += grad[i];
    for (Index i = 0; i < count; ++i) grad[i] -= scratch.softmax[i] * sum;
    if (!problem.with_mask) continue;
    const C* products = static_cast<const C*>(problem.level_weights) + row * count;
    softmax_levels(logits, problem.levels, level_weights);
    C sums[4] = {};
    for (Index i = 0; i < count; ++i) sums[i % 4] += products[i];
    for (Index i = 0; i < count; ++i) grad[i] += products[i] - level_weights[i] * sums[i % 4];
  }
}

template <typename T, typename C>
constexpr GridKernels make_kernels() {
  return {forward_scratch<T, C>, forward<T, C>,  backward_scratch<T, C>,
          softmax<C>,            backward<T, C>, softmax_backward<C>};
}

}  // namespace

const GridKernels grid_kernels[kValueTypes] = {
    make_kernels<double, double>(),
    make_kernels<float, float>(),
    make_kernels<BFloat16, float>(),
    make_kernels<Float16, float>(),
};
