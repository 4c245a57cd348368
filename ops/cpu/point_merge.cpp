// Weighted sums over the neighbours of points on the CPU: checks, memory, threads and the choice of the instruction set.
// The kernels are in point_merge_kernels.h, the schemas in ../registration.cpp.

#include "point_merge.h"

#include "../include/stable_call.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

namespace boltz_mm {
namespace {

constexpr char kComputeType[] = "the compute dtype: float64 for float64 features, otherwise float32";

const MergeKernels& kernels_of(ValueType type) {
  const int index = static_cast<int>(type);
#ifdef BOLTZ_MM_X86_VARIANTS
  if (instruction_set() == InstructionSet::avx512) return avx512::merge_kernels[index];
  if (instruction_set() == InstructionSet::avx2) return avx2::merge_kernels[index];
#endif
  return baseline::merge_kernels[index];
}

template <typename I>
void check_range(const I* numbers, int64_t count, int64_t limit) {
  I low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = numbers[i] < low ? numbers[i] : low;
    high = numbers[i] > high ? numbers[i] : high;
  }
  STD_TORCH_CHECK(low >= 0 && (high < limit || count == 0), "neighbours must be in 0 ... ", limit - 1, ", got ",
                  low < 0 ? low : high);
}

// The lists of points that name each cluster.
template <typename I>
void invert(const I* nearest, int64_t count, int64_t clusters, int64_t* starts, int64_t* entries) {
  for (int64_t c = 0; c <= clusters; ++c) starts[c] = 0;
  for (int64_t i = 0; i < count; ++i) ++starts[nearest[i] + 1];
  for (int64_t c = 0; c < clusters; ++c) starts[c + 1] += starts[c];
  for (int64_t i = 0; i < count; ++i) entries[starts[nearest[i]]++] = i;
  for (int64_t c = clusters; c > 0; --c) starts[c] = starts[c - 1];
  starts[0] = 0;
}

// A call: the description for the kernels, and the tensors that it points into.
class MergeCall {
 public:
  MergeProblem problem{};

  MergeCall(const Tensor& feat, const Tensor& nearest, int64_t cluster_size, int64_t inner)
      : kernels_(kernels_of(value_type("feat", feat))), compute_(compute_type(feat)) {
    STD_TORCH_CHECK(feat.dim() == 3, "feat must have shape [B, M, C], it has ", feat.dim(), " dimensions");
    STD_TORCH_CHECK(nearest.dim() == 3, "neighbours must have shape [B, N, J], they have ", nearest.dim(),
                    " dimensions");
    STD_TORCH_CHECK(cluster_size > 0, "cluster_size must be positive, got ", cluster_size);
    problem.batch = feat.size(0);
    problem.rows = feat.size(1);
    problem.channels = feat.size(2);
    problem.points = nearest.size(1);
    problem.count = nearest.size(2);
    problem.inner = inner;
    problem.cluster_size = cluster_size;
    problem.clusters = problem.rows / cluster_size + (problem.rows % cluster_size != 0);
    feat_ = &inputs_.rows("feat", feat);
    problem.feat = feat_->const_data_ptr();
    problem.feat_batch_stride = feat_->stride(0);
    problem.feat_row_stride = feat_->stride(1);
    problem.sign = 1;
    problem.max_offset = std::numeric_limits<double>::infinity();
    read_neighbours(nearest);
  }

  const void* input(const char* name, const Tensor& tensor, const Sizes& sizes) {
    return inputs_.data(name, tensor, sizes, compute_, kComputeType);
  }
  const void* input(const char* name, const OptionalTensor& tensor, const Sizes& sizes) {
    return inputs_.data(name, tensor, sizes, compute_, kComputeType);
  }

  // Positions of `rows` points, of all images or of each.
  const void* positions(const char* name, const Tensor& tensor, int64_t rows, int64_t& batch_stride) {
    const int64_t batch = placed_batch(name, tensor);
    batch_stride = batch == 1 ? 0 : 2 * rows;
    return input(name, tensor, {batch, rows, 2});
  }

  Sizes output_sizes() const { return {problem.batch, problem.points, problem.inner, problem.channels}; }
  Tensor like_feat(const Sizes& sizes) const { return torch::stable::new_empty(*feat_, sizes); }
  Tensor of_compute_type(const Sizes& sizes) const { return torch::stable::new_empty(*feat_, sizes, compute_); }

  void upstream(const Tensor& grad_output) {
    problem.grad_output = inputs_.data("grad_output", grad_output, output_sizes(), feat_->scalar_type(),
                                       "the dtype of feat");
  }

  Tensor forward() {
    Tensor output = like_feat(output_sizes());
    problem.output = output.mutable_data_ptr();
    const int64_t blocks = (problem.points + kMergePoints - 1) / kMergePoints;
    run_tasks(*feat_, problem.batch * blocks, 1, kernels_.forward_scratch(problem),
              [&](int64_t begin, int64_t end, void* scratch) { kernels_.forward(problem, begin, end, scratch); });
    return output;
  }

  // Returns the gradient of feat, and of the parameters as [I, kMergeSums] float64.
  std::tuple<Tensor, Tensor> backward() {
    const Tensor lists = inverted_lists();
    Tensor grad_feat = like_feat({problem.batch, problem.rows, problem.channels});
    problem.grad_feat = grad_feat.mutable_data_ptr();
    const int64_t tasks = problem.batch * ((problem.rows + kMergeRows - 1) / kMergeRows);
    const int64_t sums = problem.given ? 0 : problem.inner * kMergeSums;
    const Tensor partial = torch::stable::new_empty(*feat_, {tasks, sums}, ScalarType::Double);
    problem.partial_sums = static_cast<double*>(partial.mutable_data_ptr());
    run_tasks(*feat_, tasks, 1, kernels_.backward_scratch(problem),
              [&](int64_t begin, int64_t end, void* scratch) { kernels_.backward(problem, begin, end, scratch); });
    Tensor total = torch::stable::new_empty(*feat_, {sums}, ScalarType::Double);
    double* to = static_cast<double*>(total.mutable_data_ptr());
    for (int64_t i = 0; i < sums; ++i) to[i] = 0;
    for (int64_t i = 0; i < tasks * sums; ++i) to[i % sums] += problem.partial_sums[i];
    return {grad_feat, total};
  }

 private:
  const MergeKernels& kernels_;
  ScalarType compute_;
  Inputs inputs_;
  const Tensor* feat_;
  int64_t lists_ = 0;

  int64_t placed_batch(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.dim() == 3 && (tensor.size(0) == 1 || tensor.size(0) == problem.batch), name,
                    " must have 3 dimensions, of which the first is 1 or ", problem.batch);
    return tensor.size(0);
  }

  void read_neighbours(const Tensor& nearest) {
    lists_ = placed_batch("neighbours", nearest);
    problem.nearest_is_wide = nearest.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(problem.nearest_is_wide || nearest.scalar_type() == ScalarType::Int,
                    "neighbours must be int32 or int64");
    problem.nearest = inputs_.contiguous("neighbours", nearest).const_data_ptr();
    const int64_t entries = problem.points * problem.count;
    problem.nearest_batch_stride = lists_ == 1 ? 0 : entries;
    if (problem.nearest_is_wide) {
      check_range(static_cast<const int64_t*>(problem.nearest), lists_ * entries, problem.clusters);
    } else {
      check_range(static_cast<const int32_t*>(problem.nearest), lists_ * entries, problem.clusters);
    }
  }

  Tensor inverted_lists() {
    const int64_t entries = problem.points * problem.count, starts = problem.clusters + 1;
    Tensor lists = torch::stable::new_empty(*feat_, {lists_ * (starts + entries)}, ScalarType::Long);
    int64_t* memory = static_cast<int64_t*>(lists.mutable_data_ptr());
    problem.starts = memory;
    problem.entries = memory + lists_ * starts;
    problem.starts_batch_stride = lists_ == 1 ? 0 : starts;
    problem.entries_batch_stride = lists_ == 1 ? 0 : entries;
    run_tasks(*feat_, lists_, 1, 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t b = begin; b < end; ++b) {
        int64_t *to_starts = memory + b * starts, *to_entries = memory + lists_ * starts + b * entries;
        if (problem.nearest_is_wide) {
          const auto* from = static_cast<const int64_t*>(problem.nearest) + b * entries;
          invert(from, entries, problem.clusters, to_starts, to_entries);
        } else {
          const auto* from = static_cast<const int32_t*>(problem.nearest) + b * entries;
          invert(from, entries, problem.clusters, to_starts, to_entries);
        }
      }
    });
    return lists;
  }
};

// ---------------------------------------------------------------------------------------------- weights are given ----

void set_weights(MergeCall& call, const Tensor& weights) {
  MergeProblem& problem = call.problem;
  problem.given = true;
  problem.weights = call.input("weights", weights, {problem.batch, problem.points, problem.count, problem.inner});
}

int64_t inner_of(const Tensor& weights) {
  STD_TORCH_CHECK(weights.dim() == 4, "weights must have shape [B, N, K, I], they have ", weights.dim(), " dimensions");
  return weights.size(3);
}

Tensor cluster_wf(Tensor weights, Tensor feat, Tensor index) {
  MergeCall call(feat, index, 1, inner_of(weights));
  set_weights(call, weights);
  return call.forward();
}

std::tuple<Tensor, Tensor> cluster_wf_backward(Tensor grad_output, Tensor weights, Tensor feat, Tensor index,
                                               OptionalTensor /* order */) {
  MergeCall call(feat, index, 1, inner_of(weights));
  set_weights(call, weights);
  call.upstream(grad_output);
  MergeProblem& problem = call.problem;
  Tensor grad_weights = call.of_compute_type({problem.batch, problem.points, problem.count, problem.inner});
  problem.grad_weights = grad_weights.mutable_data_ptr();
  return {grad_weights, std::get<0>(call.backward())};
}

// ------------------------------------------------------------------------------------ weights follow from offsets ----

struct OffsetWeights {
  const Tensor &query_pos, &key_pos, &weight, &bias, &norm_weight, &norm_bias;
  double eps;
  const OptionalTensor& importance;
  int64_t sign;
  const std::optional<double>& max_offset;
};

int64_t inner_of(const OffsetWeights& from) {
  STD_TORCH_CHECK(from.weight.dim() == 2, "weight must have shape [I, 5], it has ", from.weight.dim(), " dimensions");
  return from.weight.size(0);
}

void set_offset_weights(MergeCall& call, const OffsetWeights& from) {
  MergeProblem& problem = call.problem;
  const int64_t inner = problem.inner;
  problem.query_pos = call.positions("query_pos", from.query_pos, problem.points, problem.query_batch_stride);
  problem.key_pos = call.positions("key_pos", from.key_pos, problem.rows, problem.key_batch_stride);
  problem.weight = call.input("weight", from.weight, {inner, 5});
  problem.bias = call.input("bias", from.bias, {inner});
  problem.norm_weight = call.input("norm_weight", from.norm_weight, {inner});
  problem.norm_bias = call.input("norm_bias", from.norm_bias, {inner});
  problem.importance = call.input("importance", from.importance, {problem.batch, problem.rows});
  problem.eps = from.eps;
  problem.sign = static_cast<double>(from.sign);
  if (from.max_offset.has_value()) problem.max_offset = *from.max_offset;
}

Tensor point_merge(Tensor feat, Tensor query_pos, Tensor key_pos, Tensor nearest, int64_t cluster_size, Tensor weight,
                   Tensor bias, Tensor norm_weight, Tensor norm_bias, double eps, OptionalTensor importance,
                   int64_t sign, std::optional<double> max_offset) {
  const OffsetWeights from{query_pos, key_pos, weight, bias, norm_weight, norm_bias, eps, importance, sign, max_offset};
  MergeCall call(feat, nearest, cluster_size, inner_of(from));
  set_offset_weights(call, from);
  return call.forward();
}

std::tuple<Tensor, Tensor, Tensor> point_merge_backward(Tensor grad_output, Tensor feat, Tensor query_pos,
                                                        Tensor key_pos, Tensor nearest, int64_t cluster_size,
                                                        Tensor weight, Tensor bias, Tensor norm_weight,
                                                        Tensor norm_bias, double eps, OptionalTensor importance,
                                                        int64_t sign, std::optional<double> max_offset,
                                                        OptionalTensor /* order */) {
  const OffsetWeights from{query_pos, key_pos, weight, bias, norm_weight, norm_bias, eps, importance, sign, max_offset};
  MergeCall call(feat, nearest, cluster_size, inner_of(from));
  set_offset_weights(call, from);
  call.upstream(grad_output);
  MergeProblem& problem = call.problem;
  Tensor grad_importance = call.of_compute_type(
      importance.has_value() ? Sizes{problem.batch, problem.rows} : Sizes{0});
  problem.grad_importance = importance.has_value() ? grad_importance.mutable_data_ptr() : nullptr;
  const auto [grad_feat, sums] = call.backward();
  Tensor grad_parameters = call.of_compute_type({problem.inner, kMergeSums});
  const double* total = sums.const_data_ptr<double>();
  for (int64_t i = 0; i < problem.inner * kMergeSums; ++i) {
    if (grad_parameters.scalar_type() == ScalarType::Double) {
      static_cast<double*>(grad_parameters.mutable_data_ptr())[i] = total[i];
    } else {
      static_cast<float*>(grad_parameters.mutable_data_ptr())[i] = static_cast<float>(total[i]);
    }
  }
  return {grad_feat, grad_parameters, grad_importance};
}

}  // namespace
}  // namespace boltz_mm

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CPU, library) {
  library.impl("cluster_wf", TORCH_BOX(&boltz_mm::cluster_wf));
  library.impl("cluster_wf_backward", TORCH_BOX(&boltz_mm::cluster_wf_backward));
  library.impl("point_merge", TORCH_BOX(&boltz_mm::point_merge));
  library.impl("point_merge_backward", TORCH_BOX(&boltz_mm::point_merge_backward));
}
