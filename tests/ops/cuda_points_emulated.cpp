// The CUDA operators on points (ops/cuda/neighbors.cpp and clustering.cpp) as operators of the CPU: their kernels run
// thread by thread, so that all but the launch is tried without a device.  Built by test_cuda_points_emulated.py.

#include "../../ops/cuda/clustering_device.h"
#include "../../ops/cuda/neighbors_device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace boltz_mm::cuda {
namespace {

constexpr int kScanThreads = 1024;

struct PlainAtomics {
  void max(uint32_t* at, uint32_t number) const { *at = std::max(*at, number); }
  int32_t add(int32_t* at, int32_t number) const { return std::exchange(*at, *at + number); }
};

template <typename Step>
void each(int64_t count, const Step& step) {
  // From the last one on: the order of threads must not matter.
  for (int64_t at = count - 1; at >= 0; --at) step(at);
}

void scan_buckets(const NeighborProblem& problem, int64_t image) {
  std::vector<int32_t> sums(kScanThreads), before(kScanThreads);
  for (int rank = 0; rank < kScanThreads; ++rank) sums[rank] = BucketScan(problem, image, rank, kScanThreads).sum();
  for (int rank = 1; rank < kScanThreads; ++rank) before[rank] = before[rank - 1] + sums[rank - 1];
  for (int rank = 0; rank < kScanThreads; ++rank) BucketScan(problem, image, rank, kScanThreads).write(before[rank]);
}

}  // namespace

const char* launch_neighbors(const NeighborProblem& problem, void*) {
  const int64_t points = problem.batch * problem.points;
  const PlainAtomics atomics;
  if (problem.height == 0) each(points, [&](int64_t at) { bound_point(atomics, problem, at); });
  each(problem.batch, [&](int64_t image) { lay_grid(problem, image); });
  for (int64_t image = 0; image < problem.batch; ++image) {
    const int64_t buckets = static_cast<int64_t>(problem.grids[image].columns) * problem.grids[image].rows;
    if (buckets > problem.most_buckets) return "there are more buckets than memory for them";
  }
  each(points, [&](int64_t at) { count_point(atomics, problem, at); });
  each(problem.batch, [&](int64_t image) { scan_buckets(problem, image); });
  each(points, [&](int64_t at) { fill_point(atomics, problem, at); });
  choose_keys(problem.k, [&](auto* keys) {
    using Keys = std::remove_pointer_t<decltype(keys)>;
    each(problem.batch * problem.queries, [&](int64_t query) { search_query<Keys>(problem, query); });
  });
  return nullptr;
}

const char* launch_cell_values(const ClusterProblem& problem, void*) {
  each(cells_of(problem), [&](int64_t cell) { value_cell(problem, cell); });
  return nullptr;
}

const char* launch_token_values(const ClusterProblem& problem, void*) {
  each(problem.batch * problem.tokens, [&](int64_t at) { value_token(problem, at); });
  return nullptr;
}

const char* launch_keys(const ClusterProblem& problem, void*) {
  const int64_t tokens = problem.batch * problem.tokens;
  each(cells_of(problem), [&](int64_t place) { lay_anchor(problem, place); });
  each(tokens, [&](int64_t at) { PlainAtomics().max(largest_of(problem, at), compare_token(problem, at)); });
  each(tokens, [&](int64_t at) { combine_token(problem, at); });
  return nullptr;
}

const char* launch_means(const ClusterProblem& problem, void*) {
  each(problem.batch * problem.clusters, [&](int64_t number) { finish_cluster(problem, number); });
  return nullptr;
}

}  // namespace boltz_mm::cuda

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

static AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream no_stream

#include "../../ops/cuda/clustering.cpp"
#include "../../ops/cuda/neighbors.cpp"
