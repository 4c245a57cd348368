// Exact nearest neighbours on CUDA: checks, memory and the stream.  The kernels are in neighbors.cu, the schema in
// ../registration.cpp.  Coordinates are not read here, which would wait for the device: one that is not finite counts
// as infinitely far from everything.

#include "neighbors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace boltz_mm::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kMeanPoints = 0.1;  // of a bucket, for each neighbour that is looked for; at least 1
constexpr int64_t kMost = int64_t{1} << 37;  // threads of a launch

std::tuple<Tensor, Tensor> knn_points(Tensor query, Tensor points, int64_t k, int64_t height, int64_t width,
                                      bool long_index, bool distance_needed) {
  for (const Tensor& tensor : {query, points}) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 3 && tensor.size(2) == 2,
                    "query and points must be float32 of shape [B, N, 2]");
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == query.get_device_index(),
                    "query and points must be on one CUDA device");
  }
  const int32_t device = query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  query = torch::stable::contiguous(query);
  points = torch::stable::contiguous(points);
  NeighborProblem problem{};
  problem.batch = query.size(0);
  problem.queries = query.size(1);
  problem.points = points.size(1);
  problem.k = k;
  const int64_t batch = problem.batch, count = problem.points;
  STD_TORCH_CHECK(points.size(0) == batch, "query has a batch of ", batch, ", points of ", points.size(0));
  STD_TORCH_CHECK(k >= 0 && k <= count, "k must be in 0..", count, ", the number of points, got ", k);
  STD_TORCH_CHECK(count < INT32_MAX / 4 && batch * count < kMost && batch * problem.queries < kMost,
                  "there are too many points or queries: ", count, " and ", problem.queries, " in ", batch, " images");
  Tensor index =
      torch::stable::new_empty(query, {batch, problem.queries, k}, long_index ? ScalarType::Long : ScalarType::Int);
  Tensor distance = torch::stable::new_empty(
      query, distance_needed ? std::vector<int64_t>{batch, problem.queries, k} : std::vector<int64_t>{0});
  if (index.numel() == 0) return {index, distance};

  problem.height = height;
  problem.width = width;
  problem.mean = std::max(1.0, kMeanPoints * k);
  // Of a side that is at least the share of the longer side and of the root of the area: see lay_grid.
  problem.most_buckets = static_cast<int64_t>(3 * count / problem.mean) + 4;
  const int64_t grid_words = (sizeof(BucketGrid) + 3) / 4;
  const Tensor zeros = torch::stable::new_zeros(query, {batch * (problem.most_buckets + 1 + 4)}, ScalarType::Int);
  const Tensor grids = torch::stable::new_empty(query, {batch * grid_words}, ScalarType::Int);
  const Tensor words = torch::stable::new_empty(query, {4 * batch * count}, ScalarType::Int);
  const Tensor keys =
      torch::stable::new_empty(query, {k > kMostInRegisters ? index.numel() : int64_t{0}}, ScalarType::Long);
  int32_t* memory = static_cast<int32_t*>(words.mutable_data_ptr());
  problem.query = query.const_data_ptr<float>();
  problem.position = points.const_data_ptr<float>();
  problem.index = index.mutable_data_ptr();
  problem.long_index = long_index;
  problem.distance = distance_needed ? distance.mutable_data_ptr<float>() : nullptr;
  problem.starts = static_cast<int32_t*>(zeros.mutable_data_ptr());
  problem.bounds = reinterpret_cast<uint32_t*>(problem.starts + batch * (problem.most_buckets + 1));
  problem.grids = static_cast<BucketGrid*>(grids.mutable_data_ptr());
  problem.bucket = memory;
  problem.source = memory + batch * count;
  problem.x = reinterpret_cast<float*>(memory + 2 * batch * count);
  problem.y = reinterpret_cast<float*>(memory + 3 * batch * count);
  problem.keys = static_cast<uint64_t*>(keys.mutable_data_ptr());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = launch_neighbors(problem, stream);
  STD_TORCH_CHECK(error == nullptr, "boltz_mm could not launch a CUDA kernel: ", error ? error : "");
  return {index, distance};
}

}  // namespace
}  // namespace boltz_mm::cuda

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CUDA, library) {
  library.impl("knn_points", TORCH_BOX(&boltz_mm::cuda::knn_points));
}
