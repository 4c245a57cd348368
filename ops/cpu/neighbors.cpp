// Exact nearest neighbours on the CPU: checks, buckets, threads and the choice of the instruction set.  The search is
// in neighbors_kernels.h, the schema in ../registration.cpp.

#include "../include/stable_call.h"
#include "neighbors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

namespace boltz_mm {
namespace {

constexpr int64_t kQueriesAtOnce = 256;
constexpr double kMeanPoints = 0.1;  // of a bucket, for each neighbour that is looked for; at least 1

SearchNeighbors choose_search() {
#ifdef BOLTZ_MM_X86_VARIANTS
  if (instruction_set() == InstructionSet::avx512) return avx512::search_neighbors;
  if (instruction_set() == InstructionSet::avx2) return avx2::search_neighbors;
#endif
  return baseline::search_neighbors;
}

void check_finite(const char* name, const float* numbers, int64_t count) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= std::fabs(numbers[i]) <= FLT_MAX;
  STD_TORCH_CHECK(finite, name, " must be finite");
}

// Square buckets that hold `mean` points on average.
void lay_grid(const float* points, int64_t count, double mean, Buckets& buckets) {
  float low[2] = {FLT_MAX, FLT_MAX}, high[2] = {-FLT_MAX, -FLT_MAX};
  for (int64_t i = 0; i < count; ++i) {
    for (int axis = 0; axis < 2; ++axis) {
      low[axis] = std::min(low[axis], points[2 * i + axis]);
      high[axis] = std::max(high[axis], points[2 * i + axis]);
    }
  }
  const double width = static_cast<double>(high[0]) - low[0], height = static_cast<double>(high[1]) - low[1];
  // Not below a share of the longer side either, so that a line of points does not get more buckets than points.
  const double side = std::max(std::sqrt(width * height * mean / count), std::max(width, height) * mean / count);
  buckets.first_x = low[0];
  buckets.first_y = low[1];
  buckets.per_unit = side > 0 ? 1 / side : 0;
  buckets.columns = static_cast<int32_t>(width * buckets.per_unit) + 1;
  buckets.rows = static_cast<int32_t>(height * buckets.per_unit) + 1;
}

int64_t cells_of(const Buckets& buckets) { return static_cast<int64_t>(buckets.columns) * buckets.rows; }

// Words for the arrays of an image's buckets, and how they are cut out of memory.
int64_t bucket_words(const Buckets& buckets, int64_t count) {
  return cells_of(buckets) + 1 + 3 * (count + kBucketPadding) + count + 2 * (buckets.columns + buckets.rows);
}

void place_arrays(int32_t* memory, int64_t count, Buckets& buckets) {
  const auto take = [&memory](int64_t words) {
    int32_t* taken = memory;
    memory += words;
    return taken;
  };
  const auto take_floats = [&take](int64_t words) { return reinterpret_cast<float*>(take(words)); };
  buckets.x = take_floats(count + kBucketPadding);
  buckets.y = take_floats(count + kBucketPadding);
  buckets.index = take(count + kBucketPadding);
  buckets.starts = take(cells_of(buckets) + 1);
  buckets.largest_x = take_floats(buckets.columns);
  buckets.smallest_x = take_floats(buckets.columns);
  buckets.largest_y = take_floats(buckets.rows);
  buckets.smallest_y = take_floats(buckets.rows);
}

// From the extremes of each line of buckets to those of all before or behind it.
void accumulate(float* largest, float* smallest, int32_t count) {
  for (int32_t i = 1; i < count; ++i) largest[i] = std::max(largest[i], largest[i - 1]);
  for (int32_t i = count - 1; i > 0; --i) smallest[i - 1] = std::min(smallest[i - 1], smallest[i]);
}

// Sort the points of an image into its buckets, those of a bucket by their index.
void fill(const float* points, int64_t count, int32_t* bucket_of, Buckets& buckets) {
  const float infinity = std::numeric_limits<float>::infinity();
  const int64_t cells = cells_of(buckets);
  std::fill_n(buckets.starts, cells + 1, 0);
  std::fill_n(buckets.largest_x, buckets.columns, -infinity);
  std::fill_n(buckets.smallest_x, buckets.columns, infinity);
  std::fill_n(buckets.largest_y, buckets.rows, -infinity);
  std::fill_n(buckets.smallest_y, buckets.rows, infinity);
  for (int64_t i = 0; i < count; ++i) {
    const float x = points[2 * i], y = points[2 * i + 1];
    const int32_t column = buckets.column(x), row = buckets.row(y);
    bucket_of[i] = row * buckets.columns + column;
    ++buckets.starts[bucket_of[i]];
    buckets.largest_x[column] = std::max(buckets.largest_x[column], x);
    buckets.smallest_x[column] = std::min(buckets.smallest_x[column], x);
    buckets.largest_y[row] = std::max(buckets.largest_y[row], y);
    buckets.smallest_y[row] = std::min(buckets.smallest_y[row], y);
  }
  accumulate(buckets.largest_x, buckets.smallest_x, buckets.columns);
  accumulate(buckets.largest_y, buckets.smallest_y, buckets.rows);
  // From counts to ends; filling from the last point on turns ends into starts.
  for (int64_t cell = 1; cell <= cells; ++cell) buckets.starts[cell] += buckets.starts[cell - 1];
  for (int64_t i = count - 1; i >= 0; --i) {
    const int32_t to = --buckets.starts[bucket_of[i]];
    buckets.x[to] = points[2 * i];
    buckets.y[to] = points[2 * i + 1];
    buckets.index[to] = static_cast<int32_t>(i);
  }
  for (int64_t i = count; i < count + kBucketPadding; ++i) buckets.x[i] = buckets.y[i] = 0;
}

// [B, N, 2] float32, contiguous and finite.
Tensor coordinates(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 3 && tensor.size(2) == 2, name,
                  " must be float32 of shape [B, N, 2]");
  check_cpu(name, tensor);
  const Tensor dense = torch::stable::contiguous(tensor);
  check_finite(name, dense.const_data_ptr<float>(), dense.numel());
  return dense;
}

// The size of the canvas is for devices where reading the points would wait: here their bounds are known anyway.
std::tuple<Tensor, Tensor> knn_points(Tensor query, Tensor points, int64_t k, int64_t, int64_t, bool long_index,
                                      bool distance_needed) {
  query = coordinates("query", query);
  points = coordinates("points", points);
  const int64_t batch = query.size(0), queries = query.size(1), count = points.size(1);
  STD_TORCH_CHECK(points.size(0) == batch, "query has a batch of ", batch, ", points of ", points.size(0));
  STD_TORCH_CHECK(k >= 0 && k <= count, "k must be in 0..", count, ", the number of points, got ", k);
  STD_TORCH_CHECK(count < INT32_MAX / 4, "there are too many points: ", count);
  Tensor index = torch::stable::new_empty(query, {batch, queries, k}, long_index ? ScalarType::Long : ScalarType::Int);
  Tensor distance = torch::stable::new_empty(
      query, distance_needed ? std::vector<int64_t>{batch, queries, k} : std::vector<int64_t>{0});
  if (index.numel() == 0) return {index, distance};

  const float* coordinates_of = points.const_data_ptr<float>();
  std::vector<Buckets> buckets(batch);
  std::vector<int64_t> words(batch + 1);
  for (int64_t image = 0; image < batch; ++image) {
    lay_grid(coordinates_of + image * count * 2, count, std::max(1.0, kMeanPoints * k), buckets[image]);
    words[image + 1] = words[image] + bucket_words(buckets[image], count);
  }
  const Scratch memory(query, words[batch] * static_cast<int64_t>(sizeof(int32_t)));
  int32_t* first_word = reinterpret_cast<int32_t*>(memory.data());
  run_tasks(query, batch, 1, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t image = begin; image < end; ++image) {
      place_arrays(first_word + words[image], count, buckets[image]);
      fill(coordinates_of + image * count * 2, count, first_word + words[image + 1] - count, buckets[image]);
    }
  });
  const SearchNeighbors search = choose_search();
  const NeighborSearch problem{buckets.data(), query.const_data_ptr<float>(), queries, k, index.mutable_data_ptr(),
                               long_index, distance_needed ? distance.mutable_data_ptr<float>() : nullptr};
  run_tasks(query, batch * queries, kQueriesAtOnce, k * static_cast<int64_t>(sizeof(uint64_t)),
            [&](int64_t begin, int64_t end, void* best) { search(problem, begin, end, static_cast<uint64_t*>(best)); });
  return {index, distance};
}

}  // namespace
}  // namespace boltz_mm

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CPU, library) { library.impl("knn_points", TORCH_BOX(&boltz_mm::knn_points)); }
