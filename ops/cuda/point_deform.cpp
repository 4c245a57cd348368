// Attention and interpolation between points on CUDA: checks, memory and the stream.  The kernels are in
// point_deform_device.h, the schemas in ../registration.cpp.  Tables are not read here, which would wait for the device:
// a number that is no token of its level counts as no neighbour.

#include "point_deform.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <deque>
#include <tuple>
#include <vector>

namespace boltz_mm::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using PointSizes = std::vector<int64_t>;

ValueType point_value_type(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Double:
      return ValueType::float64;
    case ScalarType::Float:
      return ValueType::float32;
    case ScalarType::BFloat16:
      return ValueType::bfloat16;
    case ScalarType::Half:
      return ValueType::float16;
    default:
      STD_TORCH_CHECK(false, "value must be float64, float32, bfloat16 or float16");
      return ValueType::float32;
  }
}

int32_t point_device_of(const Tensor& value) {
  STD_TORCH_CHECK(value.is_cuda(), "value must be on a CUDA device");
  return value.get_device_index();
}

class PointCall {
 public:
  PointProblem problem{};

  // value: [B, S, H, D].
  PointCall(const Tensor& value, const PointSizes& level_sizes)
      : type_(point_value_type(value)), compute_(type_ == ValueType::float64 ? ScalarType::Double : ScalarType::Float),
        device_(point_device_of(value)), guard_(device_),
        value_(value.stride(3) != 1 && value.size(3) > 1 ? torch::stable::contiguous(value) : value) {
    problem.batch = value.size(0);
    problem.tokens = value.size(1);
    problem.heads = value.size(2);
    problem.depth = value.size(3);
    problem.value = value_.const_data_ptr();
    problem.value_batch_stride = stride_of_value(0);
    problem.value_token_stride = stride_of_value(1);
    problem.value_head_stride = stride_of_value(2);
    STD_TORCH_CHECK(problem.tokens < INT32_MAX, "there are too many tokens: ", problem.tokens);
    STD_TORCH_CHECK(level_sizes.size() <= kMostPointLevels, "there are at most ", kMostPointLevels,
                    " levels on CUDA, got ", level_sizes.size());
    problem.levels = static_cast<int64_t>(level_sizes.size());
    for (int64_t level = 0; level < problem.levels; ++level) {
      const int64_t size = level_sizes[level];
      STD_TORCH_CHECK(size >= 0 && size <= problem.tokens - problem.starts[level], "level_sizes do not add up to the ",
                      problem.tokens, " tokens of value");
      problem.starts[level + 1] = problem.starts[level] + size;
    }
    STD_TORCH_CHECK(level_sizes.empty() || problem.starts[problem.levels] == problem.tokens,
                    "level_sizes do not add up to the ", problem.tokens, " tokens of value");
  }

  const void* input(const char* name, const Tensor& tensor, int64_t elements) {
    STD_TORCH_CHECK(tensor.scalar_type() == compute_, name,
                    " must have the compute dtype: float64 for a float64 value, otherwise float32");
    return keep(name, tensor, elements);
  }

  // [B, count]; one that was expanded over the images is read once.
  const void* input_of_images(const char* name, const Tensor& tensor, int64_t count, Index& batch_stride) {
    STD_TORCH_CHECK(tensor.dim() > 0 && tensor.size(0) == problem.batch, name, " must have a batch size of ",
                    problem.batch);
    const bool shared = is_shared(tensor);
    batch_stride = shared ? 0 : count;
    return shared ? input(name, first_of(tensor), count) : input(name, tensor, problem.batch * count);
  }

  const void* upstream(const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.scalar_type() == value_.scalar_type(), name, " must have the dtype of value");
    return keep(name, tensor, rows() * problem.depth);
  }

  // [B, L, lines, K] or [B, lines, K].
  void tables(const char* name, const Tensor& tensor, int64_t lines) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long, name,
                    " must be int64 or int32");
    STD_TORCH_CHECK(tensor.dim() >= 2 && tensor.size(0) == problem.batch, name, " must have a batch size of ",
                    problem.batch);
    problem.neighbours = tensor.size(tensor.dim() - 1);
    problem.wide = tensor.scalar_type() == ScalarType::Long;
    const bool shared = is_shared(tensor);
    const int64_t of_image = problem.levels * lines * problem.neighbours;
    problem.table_batch_stride = shared ? 0 : of_image;
    problem.tables = shared ? keep(name, first_of(tensor), of_image) : keep(name, tensor, problem.batch * of_image);
  }

  int64_t rows() const { return problem.batch * problem.queries * problem.heads; }

  Tensor output() {
    Tensor output = torch::stable::new_empty(value_, {problem.batch, problem.queries, problem.heads * problem.depth});
    problem.output = output.mutable_data_ptr();
    return output;
  }

  Tensor gradient(const Tensor& tensor, void*& pointer) const {
    const auto sizes = tensor.sizes();
    Tensor gradient = torch::stable::new_empty(value_, PointSizes(sizes.begin(), sizes.end()), compute_);
    pointer = gradient.mutable_data_ptr();
    return gradient;
  }

  void forward() const { check(launch_point_forward(problem, type_, stream())); }

  // The gradients of value, with these sizes, and of the power.
  std::tuple<Tensor, Tensor> backward(const PointSizes& sizes, bool value_needed, bool power_needed) {
    Tensor sums;
    if (value_needed) {
      sums = torch::stable::new_zeros(value_, sizes, compute_);
      problem.grad_value = sums.mutable_data_ptr();
    }
    const Tensor parts = torch::stable::new_empty(value_, {power_needed ? rows() : 0}, compute_);
    Tensor grad_power = torch::stable::new_empty(value_, {power_needed ? 1 : 0}, compute_);
    problem.power_parts = power_needed ? parts.mutable_data_ptr() : nullptr;
    problem.grad_power = power_needed ? grad_power.mutable_data_ptr() : nullptr;
    check(launch_point_backward(problem, type_, stream()));
    if (!value_needed) return {torch::stable::new_empty(value_, PointSizes{0}), grad_power};
    if (value_.scalar_type() == compute_) return {sums, grad_power};
    Tensor rounded = torch::stable::new_empty(value_, sizes);
    torch::stable::copy_(rounded, sums);
    return {rounded, grad_power};
  }

 private:
  ValueType type_;
  ScalarType compute_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor value_;
  std::deque<Tensor> kept_;

  // 0 where there is nothing to step over, so that it does not stand against reading in vectors.
  Index stride_of_value(int64_t dim) const { return value_.size(dim) > 1 ? value_.stride(dim) : 0; }
  bool is_shared(const Tensor& tensor) const { return problem.batch > 1 && tensor.stride(0) == 0; }
  static Tensor first_of(Tensor tensor) { return torch::stable::narrow(tensor, 0, 0, 1); }

  const void* keep(const char* name, const Tensor& tensor, int64_t elements) {
    STD_TORCH_CHECK(tensor.numel() == elements, name, " must have ", elements, " elements, it has ", tensor.numel());
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, name,
                    " must be on the device of value, cuda:", device_);
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

// Fills the description of an attention call.
void describe_attention(PointCall& call, const Tensor& positions, const Tensor& tables, int64_t height, int64_t width,
                        const Tensor& query_pos, const Tensor& offsets, const Tensor& logits, const Tensor& power) {
  PointProblem& problem = call.problem;
  STD_TORCH_CHECK(offsets.dim() == 6, "offsets must have shape [B, N, H, L, P, 2]");
  STD_TORCH_CHECK(height > 0 && width > 0 && height < INT32_MAX && width < INT32_MAX,
                  "the sides of the canvas must be positive, got ", height, " x ", width);
  problem.queries = offsets.size(1);
  problem.points = offsets.size(4);
  problem.height = height;
  problem.width = width;
  call.tables("tables", tables, height * width);
  problem.positions = call.input_of_images("positions", positions, problem.tokens * 2, problem.position_batch_stride);
  problem.query_pos = call.input_of_images("query_pos", query_pos, problem.queries * 2, problem.query_batch_stride);
  const int64_t samples = call.rows() * problem.levels * problem.points;
  problem.offsets = call.input("offsets", offsets, samples * 2);
  problem.logits = call.input("logits", logits, samples);
  problem.power = call.input("power", power, 1);
}

void check_value(const Tensor& value) {
  STD_TORCH_CHECK(value.dim() == 4, "value must have shape [B, S, H, D], it has ", value.dim(), " dimensions");
}

Tensor point_deform_attention(Tensor value, Tensor positions, PointSizes level_sizes, Tensor tables, int64_t height,
                              int64_t width, Tensor query_pos, Tensor offsets, Tensor logits, Tensor power) {
  check_value(value);
  PointCall call(value, level_sizes);
  describe_attention(call, positions, tables, height, width, query_pos, offsets, logits, power);
  Tensor output = call.output();
  call.forward();
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> point_deform_attention_backward(
    Tensor grad_output, Tensor value, Tensor positions, PointSizes level_sizes, Tensor tables, int64_t height,
    int64_t width, Tensor query_pos, Tensor offsets, Tensor logits, Tensor power, bool value_needed,
    bool power_needed) {
  check_value(value);
  PointCall call(value, level_sizes);
  describe_attention(call, positions, tables, height, width, query_pos, offsets, logits, power);
  PointProblem& problem = call.problem;
  problem.grad_output = call.upstream("grad_output", grad_output);
  Tensor grad_offsets = call.gradient(offsets, problem.grad_offsets);
  Tensor grad_logits = call.gradient(logits, problem.grad_logits);
  const auto [grad_value, grad_power] = call.backward(
      {problem.batch, problem.tokens, problem.heads, problem.depth}, value_needed, power_needed);
  return {grad_value, grad_offsets, grad_logits, grad_power};
}

// An interpolation is attention of one head with one sample for each query, whose neighbours are given.
void describe_interpolation(PointCall& call, const Tensor& pos, const Tensor& query_pos, const Tensor& index,
                            const Tensor& power) {
  PointProblem& problem = call.problem;
  STD_TORCH_CHECK(index.dim() == 3, "index must have shape [B, N, k]");
  problem.queries = index.size(1);
  problem.points = 1;
  call.tables("index", index, problem.queries);
  problem.positions = call.input_of_images("pos", pos, problem.tokens * 2, problem.position_batch_stride);
  problem.query_pos = call.input_of_images("query_pos", query_pos, problem.queries * 2, problem.query_batch_stride);
  problem.power = call.input("power", power, 1);
}

Tensor with_one_head(Tensor feat) {
  STD_TORCH_CHECK(feat.dim() == 3, "feat must have shape [B, M, C], it has ", feat.dim(), " dimensions");
  return torch::stable::unsqueeze(feat, 2);
}

Tensor inverse_distance_interpolate(Tensor feat, Tensor pos, Tensor query_pos, Tensor index, Tensor power) {
  PointCall call(with_one_head(feat), {feat.size(1)});
  describe_interpolation(call, pos, query_pos, index, power);
  Tensor output = call.output();
  call.forward();
  return output;
}

std::tuple<Tensor, Tensor> inverse_distance_interpolate_backward(Tensor grad_output, Tensor feat, Tensor pos,
                                                                 Tensor query_pos, Tensor index, Tensor power,
                                                                 bool feat_needed, bool power_needed) {
  PointCall call(with_one_head(feat), {feat.size(1)});
  describe_interpolation(call, pos, query_pos, index, power);
  call.problem.grad_output = call.upstream("grad_output", grad_output);
  return call.backward({feat.size(0), feat.size(1), feat.size(2)}, feat_needed, power_needed);
}

}  // namespace
}  // namespace boltz_mm::cuda

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CUDA, library) {
  library.impl("point_deform_attention", TORCH_BOX(&boltz_mm::cuda::point_deform_attention));
  library.impl("point_deform_attention_backward", TORCH_BOX(&boltz_mm::cuda::point_deform_attention_backward));
  library.impl("inverse_distance_interpolate", TORCH_BOX(&boltz_mm::cuda::inverse_distance_interpolate));
  library.impl("inverse_distance_interpolate_backward",
               TORCH_BOX(&boltz_mm::cuda::inverse_distance_interpolate_backward));
}
