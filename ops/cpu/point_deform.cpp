// Attention and interpolation between points on the CPU: checks, memory, threads and the choice of the instruction set.
// The kernels are in point_deform_kernels.h, the schemas in ../registration.cpp.

#include "point_deform.h"

#include "../include/stable_call.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace boltz_mm {
namespace {

constexpr int64_t kReadsToPack = 2;        // samples for each token
constexpr int64_t kLargestSide = 1 << 22;  // of a canvas: its cells are exact in float32
constexpr int64_t kQueriesOfTask = 256;    // of an interpolation
constexpr int64_t kChannelsOfTask = 32;    // of the backward pass of an interpolation

constexpr char kComputeType[] = "the compute dtype: float64 for a float64 value, otherwise float32";

const PointKernels& kernels_of(ValueType type) {
  const int index = static_cast<int>(type);
#ifdef BOLTZ_MM_X86_VARIANTS
  if (instruction_set() == InstructionSet::avx512) return avx512::point_kernels[index];
  if (instruction_set() == InstructionSet::avx2) return avx2::point_kernels[index];
#endif
  return baseline::point_kernels[index];
}

template <typename I>
std::tuple<int64_t, int64_t> range_of(const I* numbers, int64_t count) {
  I low = numbers[0], high = numbers[0];
  for (int64_t i = 1; i < count; ++i) {
    low = std::min(low, numbers[i]);
    high = std::max(high, numbers[i]);
  }
  return {low, high};
}

// A call: the description for the kernels, and the tensors that it points into.
class Call {
 public:
  PointProblem problem{};

  // value: [B, S, ...] with contiguous channels in the last dimension.
  explicit Call(const Tensor& value)
      : kernels_(kernels_of(value_type("value", value))), compute_(compute_type(value)),
        value_(inputs_.rows("value", value)) {
    problem.batch = value_.size(0);
    problem.tokens = value_.size(1);
    problem.value = value_.const_data_ptr();
    problem.value_batch_stride = value_.stride(0);
    problem.value_token_stride = value_.stride(1);
    problem.value_head_stride = value_.stride(2);
    STD_TORCH_CHECK(problem.tokens < INT32_MAX, "there are too many tokens: ", problem.tokens);
  }

  // A contiguous tensor of the compute dtype with the expected number of elements.
  const void* input(const char* name, const Tensor& tensor, int64_t elements) {
    check_type(name, tensor, compute_, kComputeType);
    return keep(name, tensor, elements);
  }

  // The same for [B, count]; one that was expanded over the images is read once.
  const void* input_of_images(const char* name, const Tensor& tensor, int64_t count, int64_t& batch_stride) {
    STD_TORCH_CHECK(tensor.dim() > 0 && tensor.size(0) == problem.batch, name, " must have a batch size of ",
                    problem.batch);
    const bool shared = is_shared(tensor);
    batch_stride = shared ? 0 : count;
    return shared ? input(name, torch::stable::narrow(const_cast<Tensor&>(tensor), 0, 0, 1), count)
                  : input(name, tensor, problem.batch * count);
  }

  // A contiguous tensor of the dtype of value with the expected number of elements.
  const void* upstream(const char* name, const Tensor& tensor, int64_t elements) {
    check_type(name, tensor, value_.scalar_type(), "the dtype of value");
    return keep(name, tensor, elements);
  }

  void levels(const std::vector<int64_t>& sizes) {
    starts_.assign(1, 0);
    for (const int64_t size : sizes) {
      STD_TORCH_CHECK(size >= 0 && size <= problem.tokens - starts_.back(), "level_sizes do not add up to the ",
                      problem.tokens, " tokens of value");
      starts_.push_back(starts_.back() + size);
    }
    STD_TORCH_CHECK(sizes.empty() || starts_.back() == problem.tokens, "level_sizes add up to ", starts_.back(),
                    ", but value has ", problem.tokens, " tokens");
    problem.starts = starts_.data();
    problem.levels = static_cast<int64_t>(sizes.size());
  }

  // Tables [B, L, rows, K], or [B, rows, K] for a single level, all of whose entries are tokens of their level.
  void tables(const char* name, const Tensor& tensor, int64_t rows) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long, name,
                    " must be int64 or int32");
    STD_TORCH_CHECK(tensor.dim() >= 2 && tensor.size(0) == problem.batch, name, " must have a batch size of ",
                    problem.batch);
    const bool shared = is_shared(tensor);
    const int64_t images = shared ? 1 : problem.batch;
    problem.neighbours = tensor.size(tensor.dim() - 1);
    problem.wide = tensor.scalar_type() == ScalarType::Long;
    const int64_t of_level = rows * problem.neighbours;
    problem.table_batch_stride = shared ? 0 : problem.levels * of_level;
    problem.tables = keep(name, shared ? torch::stable::narrow(const_cast<Tensor&>(tensor), 0, 0, 1) : tensor,
                          images * problem.levels * of_level);
    if (of_level == 0) return;
    for (int64_t i = 0; i < images * problem.levels; ++i) {
      const int64_t level = i % problem.levels, size = starts_[level + 1] - starts_[level];
      const auto [low, high] = problem.wide ? range_of(static_cast<const int64_t*>(problem.tables) + i * of_level, of_level)
                                            : range_of(static_cast<const int32_t*>(problem.tables) + i * of_level, of_level);
      STD_TORCH_CHECK(low >= 0 && high < size, name, " must hold tokens of their level: level ", level, " has ", size,
                      " tokens, its table ", low, "..", high);
    }
  }

  void power(const Tensor& power) {
    const void* number = input("power", power, 1);
    problem.power = compute_ == ScalarType::Double ? *static_cast<const double*>(number)
                                                   : *static_cast<const float*>(number);
  }

  Tensor like_value(std::vector<int64_t> sizes) const { return torch::stable::new_empty(value_, sizes); }
  Tensor of_compute_dtype(std::vector<int64_t> sizes) const {
    return torch::stable::new_empty(value_, sizes, compute_);
  }
  Tensor like(const Tensor& tensor) const {
    const auto sizes = tensor.sizes();
    return of_compute_dtype(std::vector<int64_t>(sizes.begin(), sizes.end()));
  }

  int64_t rows() const { return problem.batch * problem.queries * problem.heads; }
  bool worth_packing() const {
    return problem.queries * problem.levels * problem.points >= kReadsToPack * problem.tokens;
  }

  void forward(int64_t splits) {
    problem.splits = splits;
    in_threads(problem.batch * problem.heads * splits, 1, kernels_.forward_scratch(problem), kernels_.forward);
  }

  void backward() {
    const int64_t count = problem.levels * problem.points, row_scratch = (count + 32) * 8;
    const bool has_softmax = problem.logits && count > 0;
    if (has_softmax) in_threads(rows(), 1024, row_scratch, kernels_.softmax);
    in_threads(problem.batch * problem.heads * problem.levels, 1, kernels_.backward_scratch(problem),
               kernels_.backward);
    if (has_softmax) in_threads(rows(), 1024, row_scratch, kernels_.softmax_backward);
  }

  // The tasks' parts of the gradient of the power, added up in their order.
  double* power_parts() {
    parts_.assign(problem.batch * problem.heads * problem.levels, 0.0);
    return parts_.data();
  }

  Tensor sum_of_power_parts() const {
    Tensor sum = of_compute_dtype({1});
    double total = 0;
    for (const double part : parts_) total += part;
    if (compute_ == ScalarType::Double) {
      *static_cast<double*>(sum.mutable_data_ptr()) = total;
    } else {
      *static_cast<float*>(sum.mutable_data_ptr()) = static_cast<float>(total);
    }
    return sum;
  }

 private:
  Inputs inputs_;
  const PointKernels& kernels_;
  ScalarType compute_;
  const Tensor& value_;
  std::vector<int64_t> starts_;
  std::vector<double> parts_;

  // Whether the images have the same numbers in memory.
  bool is_shared(const Tensor& tensor) const { return problem.batch > 1 && tensor.stride(0) == 0; }

  const void* keep(const char* name, const Tensor& tensor, int64_t elements) {
    STD_TORCH_CHECK(tensor.numel() == elements, name, " must have ", elements, " elements, it has ", tensor.numel());
    return inputs_.contiguous(name, tensor).const_data_ptr();
  }

  void in_threads(int64_t tasks, int64_t at_once, int64_t scratch_bytes,
                  void (*run)(const PointProblem&, int64_t, int64_t, void*)) const {
    run_tasks(value_, tasks, at_once, scratch_bytes,
              [&](int64_t begin, int64_t end, void* scratch) { run(problem, begin, end, scratch); });
  }
};

// ---------------------------------------------------------------------------------------------------- attention ----

Call attention_call(const Tensor& value, const Tensor& positions, const std::vector<int64_t>& level_sizes,
                    const Tensor& tables, int64_t height, int64_t width, const Tensor& query_pos,
                    const Tensor& offsets, const Tensor& logits, const Tensor& power) {
  STD_TORCH_CHECK(value.dim() == 4, "value must have shape [B, S, H, D], it has ", value.dim(), " dimensions");
  STD_TORCH_CHECK(offsets.dim() == 6, "offsets must have shape [B, N, H, L, P, 2]");
  STD_TORCH_CHECK(height > 0 && width > 0 && height < kLargestSide && width < kLargestSide,
                  "the sides of the canvas must be in 1..", kLargestSide - 1, ", got ", height, " x ", width);
  Call call(value);
  PointProblem& problem = call.problem;
  problem.heads = value.size(2);
  problem.depth = value.size(3);
  problem.channels = problem.heads * problem.depth;
  problem.queries = offsets.size(1);
  problem.points = offsets.size(4);
  problem.height = height;
  problem.width = width;
  call.levels(level_sizes);
  const int64_t expected[] = {problem.batch, problem.queries, problem.heads, problem.levels};
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(offsets.size(i) == expected[i], "offsets must have shape [B, N, H, L, P, 2]: size ", i, " is ",
                    offsets.size(i), ", expected ", expected[i]);
  }
  call.tables("tables", tables, height * width);
  problem.positions =
      call.input_of_images("positions", positions, problem.tokens * 2, problem.position_batch_stride);
  problem.query_pos = call.input_of_images("query_pos", query_pos, problem.queries * 2, problem.query_batch_stride);
  const int64_t samples = call.rows() * problem.levels * problem.points;
  problem.offsets = call.input("offsets", offsets, samples * 2);
  problem.logits = call.input("logits", logits, samples);
  call.power(power);
  return call;
}

Tensor point_deform_attention(Tensor value, Tensor positions, std::vector<int64_t> level_sizes, Tensor tables,
                              int64_t height, int64_t width, Tensor query_pos, Tensor offsets, Tensor logits,
                              Tensor power) {
  Call call =
      attention_call(value, positions, level_sizes, tables, height, width, query_pos, offsets, logits, power);
  PointProblem& problem = call.problem;
  Tensor output = call.like_value({problem.batch, problem.queries, problem.channels});
  problem.output = output.mutable_data_ptr();
  // With many more threads than heads each would copy for itself; then they share what is there.
  const int64_t threads = torch::stable::get_num_threads(), maps = std::max<int64_t>(1, problem.batch * problem.heads);
  problem.packed = call.worth_packing() && threads <= 2 * maps;
  const int64_t splits = (threads + maps - 1) / maps;
  call.forward(std::max<int64_t>(1, problem.packed ? splits : std::min(4 * splits, problem.queries)));
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> point_deform_attention_backward(
    Tensor grad_output, Tensor value, Tensor positions, std::vector<int64_t> level_sizes, Tensor tables,
    int64_t height, int64_t width, Tensor query_pos, Tensor offsets, Tensor logits, Tensor power, bool value_needed,
    bool power_needed) {
  Call call =
      attention_call(value, positions, level_sizes, tables, height, width, query_pos, offsets, logits, power);
  PointProblem& problem = call.problem;
  problem.grad_output = call.upstream("grad_output", grad_output, problem.batch * problem.queries * problem.channels);
  Tensor grad_value = call.like_value(
      value_needed ? std::vector<int64_t>{problem.batch, problem.tokens, problem.heads, problem.depth}
                   : std::vector<int64_t>{0});
  Tensor grad_offsets = call.like(offsets), grad_logits = call.like(logits);
  problem.grad_value = value_needed ? grad_value.mutable_data_ptr() : nullptr;
  problem.grad_offsets = grad_offsets.mutable_data_ptr();
  problem.grad_logits = grad_logits.mutable_data_ptr();
  problem.grad_power = power_needed ? call.power_parts() : nullptr;
  problem.packed = call.worth_packing();
  call.backward();
  Tensor grad_power = power_needed ? call.sum_of_power_parts() : call.of_compute_dtype({0});
  return {grad_value, grad_offsets, grad_logits, grad_power};
}

// ------------------------------------------------------------------------------------------------ interpolation ----

Call interpolation_call(const Tensor& feat, const Tensor& pos, const Tensor& query_pos, const Tensor& index,
                        const Tensor& power) {
  STD_TORCH_CHECK(feat.dim() == 3, "feat must have shape [B, M, C], it has ", feat.dim(), " dimensions");
  STD_TORCH_CHECK(index.dim() == 3, "index must have shape [B, N, k]");
  Call call(feat);
  PointProblem& problem = call.problem;
  problem.heads = 1;
  problem.depth = problem.channels = feat.size(2);
  problem.queries = index.size(1);
  problem.points = 1;
  call.levels({problem.tokens});
  call.tables("index", index, problem.queries);
  problem.positions = call.input_of_images("pos", pos, problem.tokens * 2, problem.position_batch_stride);
  problem.query_pos = call.input_of_images("query_pos", query_pos, problem.queries * 2, problem.query_batch_stride);
  call.power(power);
  return call;
}

Tensor inverse_distance_interpolate(Tensor feat, Tensor pos, Tensor query_pos, Tensor index, Tensor power) {
  Call call = interpolation_call(feat, pos, query_pos, index, power);
  PointProblem& problem = call.problem;
  Tensor output = call.like_value({problem.batch, problem.queries, problem.channels});
  problem.output = output.mutable_data_ptr();
  call.forward((problem.queries + kQueriesOfTask - 1) / kQueriesOfTask);
  return output;
}

std::tuple<Tensor, Tensor> inverse_distance_interpolate_backward(Tensor grad_output, Tensor feat, Tensor pos,
                                                                 Tensor query_pos, Tensor index, Tensor power,
                                                                 bool feat_needed, bool power_needed) {
  Call call = interpolation_call(feat, pos, query_pos, index, power);
  PointProblem& problem = call.problem;
  problem.grad_output = call.upstream("grad_output", grad_output, problem.batch * problem.queries * problem.channels);
  Tensor grad_feat =
      call.like_value(feat_needed ? std::vector<int64_t>{problem.batch, problem.tokens, problem.channels}
                                  : std::vector<int64_t>{0});
  // Some channels at a time: each task has a part of the gradient for itself.
  problem.depth = std::min(problem.channels, kChannelsOfTask);
  problem.value_head_stride = problem.depth;
  problem.heads = problem.channels == 0 ? 0 : (problem.channels + problem.depth - 1) / problem.depth;
  problem.grad_value = feat_needed ? grad_feat.mutable_data_ptr() : nullptr;
  problem.grad_power = power_needed ? call.power_parts() : nullptr;
  if (feat_needed || power_needed) call.backward();
  Tensor grad_power = power_needed ? call.sum_of_power_parts() : call.of_compute_dtype({0});
  return {grad_feat, grad_power};
}

}  // namespace
}  // namespace boltz_mm

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CPU, library) {
  library.impl("point_deform_attention", TORCH_BOX(&boltz_mm::point_deform_attention));
  library.impl("point_deform_attention_backward", TORCH_BOX(&boltz_mm::point_deform_attention_backward));
  library.impl("inverse_distance_interpolate", TORCH_BOX(&boltz_mm::inverse_distance_interpolate));
  library.impl("inverse_distance_interpolate_backward", TORCH_BOX(&boltz_mm::inverse_distance_interpolate_backward));
}
