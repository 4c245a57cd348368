// Cluster attention on CUDA: checks, memory and the stream.  The kernels are in cluster_attention.cu, the schemas in
// ../registration.cpp.
//
// Cluster ids are on the device and are not looked at here, which would wait for it: one that is out of range counts as
// nothing.  Backward needs their order by cluster.

#include "cluster_attention.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <deque>
#include <optional>
#include <tuple>
#include <vector>

namespace boltz_mm::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

ValueType type_of_query(const Tensor& query) {
  switch (query.scalar_type()) {
    case ScalarType::Double:
      return ValueType::float64;
    case ScalarType::Float:
      return ValueType::float32;
    case ScalarType::BFloat16:
      return ValueType::bfloat16;
    case ScalarType::Half:
      return ValueType::float16;
    default:
      STD_TORCH_CHECK(false, "query must be float64, float32, bfloat16 or float16");
      return ValueType::float32;
  }
}

int32_t device_of_query(const Tensor& query) {
  STD_TORCH_CHECK(query.is_cuda() && query.dim() == 4, "query must have shape [B, N, H, D] and be on a CUDA device");
  return query.get_device_index();
}

struct Arguments {
  const Tensor &query, &key, &value, &query_pos, &key_pos;
  const OptionalTensor& nearest;
  int64_t cluster_size;
  const OptionalTensor &bias_weight, &bias, &blank_key, &blank_value;
  double scale, max_offset;
};

// A call: the description for the kernels, and the tensors that it points into.
class ClusterCall {
 public:
  ClusterProblem problem{};

  explicit ClusterCall(const Arguments& arguments)
      : type_(type_of_query(arguments.query)),
        compute_(type_ == ValueType::float64 ? ScalarType::Double : ScalarType::Float),
        device_(device_of_query(arguments.query)),
        guard_(device_),
        arguments_(arguments),
        query_(arguments.query) {
    STD_TORCH_CHECK(arguments.key.dim() == 4, "key must have shape [B, M, H, D]");
    problem.batch = query_.size(0);
    problem.queries = query_.size(1);
    problem.heads = query_.size(2);
    problem.depth = query_.size(3);
    problem.keys = arguments.key.size(1);
    problem.scale = arguments.scale;
    problem.max_offset = arguments.max_offset;
    problem.query = rows("query", query_, problem.queries);
    problem.key = rows("key", arguments.key, problem.keys);
    problem.value = rows("value", arguments.value, problem.keys);
    find_lists(arguments.nearest, arguments.cluster_size);
    problem.query_pos = positions("query_pos", arguments.query_pos, problem.queries, problem.query_pos_batch_stride);
    problem.key_pos = positions("key_pos", arguments.key_pos, problem.keys, problem.key_pos_batch_stride);
    const int64_t heads = problem.heads, depth = problem.depth;
    problem.bias_weight = parameter("bias_weight", arguments.bias_weight, {heads, kClusterFeatures});
    problem.bias = parameter("bias", arguments.bias, {heads});
    problem.blank_key = parameter("blank_key", arguments.blank_key, {heads, depth});
    problem.blank_value = parameter("blank_value", arguments.blank_value, {heads, depth});
    STD_TORCH_CHECK(arguments.blank_key.has_value() == arguments.blank_value.has_value(),
                    "blank_key and blank_value must be given together");
  }

  Tensor of_query_type(const Sizes& sizes) const { return torch::stable::new_empty(query_, sizes); }
  Tensor of_compute_type(const Sizes& sizes) const { return torch::stable::new_empty(query_, sizes, compute_); }

  std::tuple<Tensor, Tensor> forward() {
    Tensor output = of_query_type({problem.batch, problem.queries, problem.heads * problem.depth});
    Tensor normalizer = of_compute_type({problem.batch, problem.queries, problem.heads, 2});
    problem.output = output.mutable_data_ptr();
    problem.normalizer = normalizer.mutable_data_ptr();
    check(launch_cluster_attention(problem, type_, stream()));
    return {output, normalizer};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output,
                                                                              const Tensor& normalizer,
                                                                              const OptionalTensor& order) {
    const int64_t batch = problem.batch, queries = problem.queries, heads = problem.heads, depth = problem.depth;
    STD_TORCH_CHECK(grad_output.scalar_type() == query_.scalar_type(), "grad_output must have the dtype of query");
    problem.grad_output = {keep("grad_output", grad_output, {batch, queries, heads * depth}),
                           queries * heads * depth, heads * depth, depth};
    STD_TORCH_CHECK(normalizer.scalar_type() == compute_, "normalizer must have the compute dtype");
    kept_.push_back(torch::stable::contiguous(normalizer));
    check_sizes("normalizer", kept_.back(), {batch, queries, heads, 2});
    problem.normalizer = kept_.back().mutable_data_ptr();
    if (!problem.sees_all) {
      STD_TORCH_CHECK(order.has_value() && order->scalar_type() == ScalarType::Long,
                      "the backward pass on CUDA needs the order of the clusters, int64");
      problem.order = static_cast<const Index*>(keep("order", *order, {lists_batch_, queries * problem.lists}));
    }
    const Tensor starts = torch::stable::new_empty(query_, {lists_batch_, problem.clusters + 1}, ScalarType::Long);
    problem.starts = static_cast<Index*>(starts.mutable_data_ptr());
    const Tensor means = of_compute_type({batch, queries, heads});
    problem.means = means.mutable_data_ptr();
    problem.parts = batch * ((queries + kClusterQueries - 1) / kClusterQueries);
    problem.sections = (problem.parts + kClusterSection - 1) / kClusterSection;
    const int64_t numbers = kClusterBiases + 2 * depth;
    const Tensor partial = of_compute_type({heads, problem.parts, numbers});
    problem.partial_sums = partial.mutable_data_ptr();
    const Tensor sections = torch::stable::new_empty(query_, {heads, problem.sections, numbers}, ScalarType::Double);
    problem.section_sums = static_cast<double*>(sections.mutable_data_ptr());
    Tensor grad_query = of_query_type({batch, queries, heads, depth});
    Tensor grad_key = of_query_type({batch, problem.keys, heads, depth});
    Tensor grad_value = of_query_type({batch, problem.keys, heads, depth});
    problem.grad_query = grad_query.mutable_data_ptr();
    problem.grad_key = grad_key.mutable_data_ptr();
    problem.grad_value = grad_value.mutable_data_ptr();
    Tensor grad_bias_weight = gradient(arguments_.bias_weight, {heads, kClusterFeatures}, problem.grad_bias_weight);
    Tensor grad_bias = gradient(arguments_.bias, {heads}, problem.grad_bias);
    Tensor grad_blank_key = gradient(arguments_.blank_key, {heads, depth}, problem.grad_blank_key);
    Tensor grad_blank_value = gradient(arguments_.blank_value, {heads, depth}, problem.grad_blank_value);
    check(launch_cluster_attention_backward(problem, type_, stream()));
    return {grad_query, grad_key, grad_value, grad_bias_weight, grad_bias, grad_blank_key, grad_blank_value};
  }

 private:
  ValueType type_;
  ScalarType compute_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  const Arguments arguments_;  // references, so that a call lives no longer than what it was given
  const Tensor& query_;
  std::deque<Tensor> kept_;
  int64_t lists_batch_ = 1;

  static void check_sizes(const char* name, const Tensor& tensor, const Sizes& sizes) {
    STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(),
                    " dimensions, it has ", tensor.dim());
    for (size_t i = 0; i < sizes.size(); ++i) {
      STD_TORCH_CHECK(tensor.size(i) == sizes[i], name, " has size ", tensor.size(i), " in dimension ", i,
                      ", expected ", sizes[i]);
    }
  }

  void check_device(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, name,
                    " must be on the device of query, cuda:", device_);
  }

  const void* keep(const char* name, const Tensor& tensor, const Sizes& sizes) {
    check_sizes(name, tensor, sizes);
    check_device(name, tensor);
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr();
  }

  const void* parameter(const char* name, const OptionalTensor& tensor, const Sizes& sizes) {
    if (!tensor.has_value()) return nullptr;
    STD_TORCH_CHECK(tensor->scalar_type() == compute_, name,
                    " must have the compute dtype: float64 for a float64 query, otherwise float32");
    return keep(name, *tensor, sizes);
  }

  Tensor gradient(const OptionalTensor& parameter, const Sizes& sizes, void*& data) const {
    Tensor result = of_compute_type(parameter.has_value() ? sizes : Sizes{0});
    data = parameter.has_value() ? result.mutable_data_ptr() : nullptr;
    return result;
  }

  ClusterRows rows(const char* name, const Tensor& tensor, int64_t count) {
    check_sizes(name, tensor, {problem.batch, count, problem.heads, problem.depth});
    STD_TORCH_CHECK(tensor.scalar_type() == query_.scalar_type(), name, " must have the dtype of query");
    check_device(name, tensor);
    const bool in_place = tensor.size(3) <= 1 || tensor.stride(3) == 1;
    kept_.push_back(in_place ? tensor : torch::stable::contiguous(tensor));
    const Tensor& kept = kept_.back();
    const auto stride = [&](int dimension) { return kept.size(dimension) > 1 ? kept.stride(dimension) : 0; };
    return {kept.const_data_ptr(), stride(0), stride(1), stride(2)};
  }

  const void* positions(const char* name, const Tensor& tensor, int64_t count, Index& batch_stride) {
    STD_TORCH_CHECK(tensor.dim() == 3 && (tensor.size(0) == 1 || tensor.size(0) == problem.batch), name,
                    " must have shape [B, N, 2] with B = 1 or ", problem.batch);
    batch_stride = tensor.size(0) == 1 ? 0 : count * 2;
    return parameter(name, tensor, {tensor.size(0), count, 2});
  }

  void find_lists(const OptionalTensor& nearest, int64_t cluster_size) {
    STD_TORCH_CHECK(cluster_size >= 1, "cluster_size must be at least 1, got ", cluster_size);
    problem.sees_all = !nearest.has_value();
    if (problem.sees_all) {
      problem.lists = problem.clusters = problem.keys > 0 ? 1 : 0;
      problem.cluster_size = problem.keys > 0 ? problem.keys : 1;
      return;
    }
    const ScalarType type = nearest->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "nearest must be int32 or int64");
    STD_TORCH_CHECK(nearest->dim() == 3 && (nearest->size(0) == 1 || nearest->size(0) == problem.batch),
                    "nearest must have shape [B, N, J] with B = 1 or ", problem.batch);
    lists_batch_ = nearest->size(0);
    problem.lists = nearest->size(2);
    problem.cluster_size = cluster_size;
    problem.clusters = problem.keys / cluster_size + (problem.keys % cluster_size != 0);
    problem.nearest_is_wide = type == ScalarType::Long;
    problem.nearest_batch_stride = lists_batch_ == 1 ? 0 : problem.queries * problem.lists;
    problem.nearest = keep("nearest", *nearest, {lists_batch_, problem.queries, problem.lists});
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

std::tuple<Tensor, Tensor> cluster_attention(Tensor query, Tensor key, Tensor value, Tensor query_pos, Tensor key_pos,
                                             OptionalTensor nearest, int64_t cluster_size, OptionalTensor bias_weight,
                                             OptionalTensor bias, OptionalTensor blank_key, OptionalTensor blank_value,
                                             double scale, double max_offset) {
  return ClusterCall({query, key, value, query_pos, key_pos, nearest, cluster_size, bias_weight, bias, blank_key,
                      blank_value, scale, max_offset})
      .forward();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cluster_attention_backward(
    Tensor grad_output, Tensor normalizer, Tensor query, Tensor key, Tensor value, Tensor query_pos, Tensor key_pos,
    OptionalTensor nearest, int64_t cluster_size, OptionalTensor bias_weight, OptionalTensor bias,
    OptionalTensor blank_key, OptionalTensor blank_value, double scale, double max_offset, OptionalTensor order) {
  return ClusterCall({query, key, value, query_pos, key_pos, nearest, cluster_size, bias_weight, bias, blank_key,
                      blank_value, scale, max_offset})
      .backward(grad_output, normalizer, order);
}

}  // namespace
}  // namespace boltz_mm::cuda

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CUDA, library) {
  library.impl("cluster_attention", TORCH_BOX(&boltz_mm::cuda::cluster_attention));
  library.impl("cluster_attention_backward", TORCH_BOX(&boltz_mm::cuda::cluster_attention_backward));
}
