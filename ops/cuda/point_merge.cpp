// Weighted sums over the neighbours of points on CUDA: checks, memory and the stream.  The kernels are in
// point_merge.cu, the schemas in ../registration.cpp.
//
// Neighbours are on the device and are not looked at here, which would wait for it: one that is out of range counts as
// nothing.  Backward needs their order by cluster, and holds the gradients of all weights [B, N, K, I].

#include "point_merge.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace boltz_mm::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

ValueType type_of_feat(const Tensor& feat) {
  switch (feat.scalar_type()) {
    case ScalarType::Double:
      return ValueType::float64;
    case ScalarType::Float:
      return ValueType::float32;
    case ScalarType::BFloat16:
      return ValueType::bfloat16;
    case ScalarType::Half:
      return ValueType::float16;
    default:
      STD_TORCH_CHECK(false, "feat must be float64, float32, bfloat16 or float16");
      return ValueType::float32;
  }
}

int32_t device_of_feat(const Tensor& feat) {
  STD_TORCH_CHECK(feat.is_cuda() && feat.dim() == 3, "feat must have shape [B, M, C] and be on a CUDA device");
  return feat.get_device_index();
}

// A call: the description for the kernels, and the tensors that it points into.
class MergeCall {
 public:
  MergeProblem problem{};

  MergeCall(const Tensor& feat, const Tensor& nearest, int64_t cluster_size, int64_t inner)
      : type_(type_of_feat(feat)),
        compute_(type_ == ValueType::float64 ? ScalarType::Double : ScalarType::Float),
        device_(device_of_feat(feat)),
        guard_(device_),
        feat_(feat.stride(2) != 1 && feat.size(2) > 1 ? torch::stable::contiguous(feat) : feat) {
    STD_TORCH_CHECK(cluster_size > 0, "cluster_size must be positive, got ", cluster_size);
    problem.batch = feat.size(0);
    problem.rows = feat.size(1);
    problem.channels = feat.size(2);
    problem.inner = inner;
    problem.cluster_size = cluster_size;
    problem.feat = feat_.const_data_ptr();
    problem.feat_batch_stride = problem.batch > 1 ? feat_.stride(0) : 0;
    problem.feat_row_stride = problem.rows > 1 ? feat_.stride(1) : 0;
    problem.sign = 1;
    problem.max_offset = std::numeric_limits<double>::infinity();
    lists_ = placed_batch("neighbours", nearest);
    problem.points = nearest.size(1);
    problem.count = nearest.size(2);
    problem.nearest_is_wide = nearest.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(problem.nearest_is_wide || nearest.scalar_type() == ScalarType::Int,
                    "neighbours must be int32 or int64");
    problem.nearest_batch_stride = lists_ == 1 ? 0 : problem.points * problem.count;
    problem.nearest = keep("neighbours", nearest, {lists_, problem.points, problem.count});
  }

  const void* input(const char* name, const Tensor& tensor, const Sizes& sizes) {
    STD_TORCH_CHECK(tensor.scalar_type() == compute_, name,
                    " must have the compute dtype: float64 for float64 features, otherwise float32");
    return keep(name, tensor, sizes);
  }

  // Positions of `rows` points, of all images or of each.
  const void* positions(const char* name, const Tensor& tensor, int64_t rows, Index& batch_stride) {
    const int64_t batch = placed_batch(name, tensor);
    batch_stride = batch == 1 ? 0 : 2 * rows;
    return input(name, tensor, {batch, rows, 2});
  }

  Sizes output_sizes() const { return {problem.batch, problem.points, problem.inner, problem.channels}; }
  Sizes weight_sizes() const {
    return {problem.batch, problem.points, problem.count * problem.cluster_size, problem.inner};
  }
  Tensor of_compute_type(const Sizes& sizes) const { return torch::stable::new_empty(feat_, sizes, compute_); }

  Tensor forward() {
    Tensor output = torch::stable::new_empty(feat_, output_sizes());
    problem.output = output.mutable_data_ptr();
    if (output.numel() > 0) check(launch_merge(problem, type_, stream()));
    return output;
  }

  // Returns the gradients of feat, of the weights and of the parameters.
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const OptionalTensor& order) {
    STD_TORCH_CHECK(grad_output.scalar_type() == feat_.scalar_type(), "grad_output must have the dtype of feat");
    problem.grad_output = keep("grad_output", grad_output, output_sizes());
    STD_TORCH_CHECK(order.has_value() && order->scalar_type() == ScalarType::Long,
                    "the backward pass on CUDA needs the order of the neighbours, int64");
    problem.order = static_cast<const Index*>(keep("order", *order, {lists_, problem.points * problem.count}));
    Tensor grad_feat = torch::stable::new_empty(feat_, {problem.batch, problem.rows, problem.channels});
    problem.grad_feat = grad_feat.mutable_data_ptr();
    Tensor grad_weights = torch::stable::new_zeros(feat_, weight_sizes(), compute_);
    problem.grad_weights = grad_weights.mutable_data_ptr();
    problem.parts = problem.batch * ((problem.rows + kMergeRows - 1) / kMergeRows);
    const Sizes sums{problem.given ? 0 : problem.parts, problem.inner, kMergeSums};
    const Tensor partial = torch::stable::new_empty(feat_, sums, ScalarType::Double);
    problem.partial_sums = static_cast<double*>(partial.mutable_data_ptr());
    Tensor grad_parameters = of_compute_type({problem.given ? 0 : problem.inner, kMergeSums});
    problem.grad_parameters = grad_parameters.mutable_data_ptr();
    check(launch_merge_backward(problem, type_, stream()));
    return {grad_feat, grad_weights, grad_parameters};
  }

 private:
  ValueType type_;
  ScalarType compute_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor feat_;
  std::vector<Tensor> kept_;
  int64_t lists_;

  int64_t placed_batch(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.dim() == 3 && (tensor.size(0) == 1 || tensor.size(0) == problem.batch), name,
                    " must have 3 dimensions, of which the first is 1 or ", problem.batch);
    return tensor.size(0);
  }

  const void* keep(const char* name, const Tensor& tensor, const Sizes& sizes) {
    STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(),
                    " dimensions, it has ", tensor.dim());
    for (size_t i = 0; i < sizes.size(); ++i) {
      STD_TORCH_CHECK(tensor.size(i) == sizes[i], name, " has size ", tensor.size(i), " in dimension ", i,
                      ", expected ", sizes[i]);
    }
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, name,
                    " must be on the device of feat, cuda:", device_);
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr();
  }

  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

  static void check(const char* error) {
    STD_TORCH_CHECK(error == nullptr, "boltz_mm could not launch a CUDA kernel: ", error ? error : "");
  }
};

MergeCall sum_call(const Tensor& weights, const Tensor& feat, const Tensor& index) {
  STD_TORCH_CHECK(weights.dim() == 4, "weights must have shape [B, N, K, I], they have ", weights.dim(), " dimensions");
  MergeCall call(feat, index, 1, weights.size(3));
  call.problem.given = true;
  call.problem.weights = call.input("weights", weights, call.weight_sizes());
  return call;
}

Tensor cluster_wf(Tensor weights, Tensor feat, Tensor index) { return sum_call(weights, feat, index).forward(); }

std::tuple<Tensor, Tensor> cluster_wf_backward(Tensor grad_output, Tensor weights, Tensor feat, Tensor index,
                                               OptionalTensor order) {
  const auto [grad_feat, grad_weights, none] = sum_call(weights, feat, index).backward(grad_output, order);
  return {grad_weights, grad_feat};
}

MergeCall merge_call(const Tensor& feat, const Tensor& query_pos, const Tensor& key_pos, const Tensor& nearest,
                     int64_t cluster_size, const Tensor& weight, const Tensor& bias, const Tensor& norm_weight,
                     const Tensor& norm_bias, double eps, const OptionalTensor& importance, int64_t sign,
                     const std::optional<double>& max_offset) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have shape [I, 5], it has ", weight.dim(), " dimensions");
  const int64_t inner = weight.size(0);
  MergeCall call(feat, nearest, cluster_size, inner);
  MergeProblem& problem = call.problem;
  problem.query_pos = call.positions("query_pos", query_pos, problem.points, problem.query_batch_stride);
  problem.key_pos = call.positions("key_pos", key_pos, problem.rows, problem.key_batch_stride);
  problem.weight = call.input("weight", weight, {inner, 5});
  problem.bias = call.input("bias", bias, {inner});
  problem.norm_weight = call.input("norm_weight", norm_weight, {inner});
  problem.norm_bias = call.input("norm_bias", norm_bias, {inner});
  if (importance.has_value()) {
    problem.importance = call.input("importance", *importance, {problem.batch, problem.rows});
  }
  problem.eps = eps;
  problem.sign = static_cast<double>(sign);
  if (max_offset.has_value()) problem.max_offset = *max_offset;
  return call;
}

Tensor point_merge(Tensor feat, Tensor query_pos, Tensor key_pos, Tensor nearest, int64_t cluster_size, Tensor weight,
                   Tensor bias, Tensor norm_weight, Tensor norm_bias, double eps, OptionalTensor importance,
                   int64_t sign, std::optional<double> max_offset) {
  return merge_call(feat, query_pos, key_pos, nearest, cluster_size, weight, bias, norm_weight, norm_bias, eps,
                    importance, sign, max_offset)
      .forward();
}

std::tuple<Tensor, Tensor, Tensor> point_merge_backward(
    Tensor grad_output, Tensor feat, Tensor query_pos, Tensor key_pos, Tensor nearest, int64_t cluster_size,
    Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, double eps, OptionalTensor importance,
    int64_t sign, std::optional<double> max_offset, OptionalTensor order) {
  MergeCall call = merge_call(feat, query_pos, key_pos, nearest, cluster_size, weight, bias, norm_weight, norm_bias,
                              eps, importance, sign, max_offset);
  Tensor grad_importance = call.of_compute_type(
      importance.has_value() ? Sizes{call.problem.batch, call.problem.rows} : Sizes{0});
  if (importance.has_value()) call.problem.grad_importance = grad_importance.mutable_data_ptr();
  const auto [grad_feat, grad_weights, grad_parameters] = call.backward(grad_output, order);
  return {grad_feat, grad_parameters, grad_importance};
}

}  // namespace
}  // namespace boltz_mm::cuda

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CUDA, library) {
  library.impl("cluster_wf", TORCH_BOX(&boltz_mm::cuda::cluster_wf));
  library.impl("cluster_wf_backward", TORCH_BOX(&boltz_mm::cuda::cluster_wf_backward));
  library.impl("point_merge", TORCH_BOX(&boltz_mm::cuda::point_merge));
  library.impl("point_merge_backward", TORCH_BOX(&boltz_mm::cuda::point_merge_backward));
}
