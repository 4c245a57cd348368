// Clusters along a space-filling curve on CUDA: checks, memory, the stream, and PyTorch's stable sort between the steps.
// The kernels are in clustering.cu, the schema in ../registration.cpp.  Positions are not read here, which would wait
// for the device: what lies outside of the canvas counts to the nearest cell.

#include "clustering.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>
#include <tuple>

namespace boltz_mm::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What ascending, stable sorting along the last dimension leaves in each place.
Tensor stable_order(const Tensor& keys) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  const Tensor values = torch::stable::detail::to<Tensor>(stack[0]);
  return torch::stable::detail::to<Tensor>(stack[1]);
}

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "boltz_mm could not launch a CUDA kernel: ", error ? error : "");
}

std::tuple<Tensor, Tensor, Tensor> space_filling_order(Tensor pos, int64_t cluster_size, int64_t height, int64_t width,
                                                       int64_t curve_number, bool anchors, bool per_image) {
  STD_TORCH_CHECK(pos.scalar_type() == ScalarType::Float && pos.dim() == 3 && pos.size(2) == 2 && pos.is_cuda(),
                  "pos must be float32 of shape [B, N, 2] on a CUDA device");
  STD_TORCH_CHECK(cluster_size >= 1, "cluster_size must be at least 1, got ", cluster_size);
  STD_TORCH_CHECK(height >= 1 && width >= 1, "canvas must be a (height, width) of at least 1, got (", height, ", ",
                  width, ")");
  STD_TORCH_CHECK(curve_number >= 0 && curve_number <= 2, "curve must be 0, 1 or 2, got ", curve_number);
  const int32_t device = pos.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  pos = torch::stable::contiguous(pos);
  const int64_t batch = pos.size(0), tokens = pos.size(1), clusters = (tokens + cluster_size - 1) / cluster_size;
  Tensor ordered = torch::stable::new_empty(pos, {batch, tokens, 2});
  Tensor means = torch::stable::new_empty(pos, {batch, clusters, 2});
  if (batch * tokens == 0) return {torch::stable::new_empty(pos, {batch, tokens}, ScalarType::Long), ordered, means};

  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const Curve curve = static_cast<Curve>(curve_number);
  const AnchorGrid cells = anchors ? anchor_grid(tokens, cluster_size, height, width, curve) : AnchorGrid{0, 0};
  ClusterProblem problem{};
  problem.batch = batch;
  problem.tokens = tokens;
  problem.cluster_size = cluster_size;
  problem.clusters = clusters;
  problem.per_image = per_image;
  problem.height = height;
  problem.width = width;
  problem.pos = pos.const_data_ptr<float>();
  Tensor order;
  if (cells.rows == 0) {
    problem.grid = curve_grid(curve, height, width);
    Tensor values = torch::stable::new_empty(pos, {batch, tokens}, ScalarType::Long);
    problem.value = values.mutable_data_ptr<int64_t>();
    check_launch(launch_token_values(problem, stream));
    order = stable_order(values);
  } else {
    problem.grid = curve_grid(curve, cells.rows, cells.columns);
    problem.cell_width = static_cast<float>(static_cast<double>(width) / cells.columns);
    problem.cell_height = static_cast<float>(static_cast<double>(height) / cells.rows);
    const int64_t count = cells.rows * cells.columns;
    Tensor values = torch::stable::new_empty(pos, {count}, ScalarType::Long);
    problem.value = values.mutable_data_ptr<int64_t>();
    check_launch(launch_cell_values(problem, stream));
    const Tensor along = stable_order(values);
    const Tensor table = torch::stable::new_empty(pos, {count, static_cast<int64_t>(sizeof(Anchor) / sizeof(float))});
    const Tensor numbers = torch::stable::new_empty(pos, {2, batch, tokens});
    const Tensor largest = torch::stable::new_zeros(pos, {batch}, ScalarType::Int);
    const Tensor keys = torch::stable::new_empty(pos, {batch, tokens});
    problem.along = along.const_data_ptr<int64_t>();
    problem.anchors = static_cast<Anchor*>(table.mutable_data_ptr());
    problem.place = numbers.mutable_data_ptr<float>();
    problem.ratio = problem.place + batch * tokens;
    problem.largest = static_cast<uint32_t*>(largest.mutable_data_ptr());
    problem.key = keys.mutable_data_ptr<float>();
    check_launch(launch_keys(problem, stream));
    order = stable_order(keys);
  }
  order = torch::stable::contiguous(order);
  problem.order = order.const_data_ptr<int64_t>();
  problem.ordered = ordered.mutable_data_ptr<float>();
  problem.means = means.mutable_data_ptr<float>();
  check_launch(launch_means(problem, stream));
  return {order, ordered, means};
}

}  // namespace
}  // namespace boltz_mm::cuda

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CUDA, library) {
  library.impl("space_filling_order", TORCH_BOX(&boltz_mm::cuda::space_filling_order));
}
