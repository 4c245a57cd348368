// Cluster attention on the CPU: checks, memory, threads and the choice of the instruction set.  The kernels are in
// cluster_attention_kernels.h, the schemas in ../registration.cpp.

#include "cluster_attention.h"

#include "../include/stable_call.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

namespace boltz_mm {
namespace {

constexpr int64_t kChunkBytes = 8 << 20;  // of probabilities that backward holds at a time
constexpr const char* kOfQuery = "the dtype of query";
constexpr const char* kCompute = "the compute dtype: float64 for a float64 query, otherwise float32";

const ClusterKernels& kernels_of(ValueType type) {
  const ClusterKernels* chosen = baseline::cluster_kernels;
#ifdef BOLTZ_MM_X86_VARIANTS
  if (instruction_set() == InstructionSet::avx2) chosen = avx2::cluster_kernels;
  if (instruction_set() == InstructionSet::avx512) chosen = avx512::cluster_kernels;
#endif
  return chosen[static_cast<int>(type)];
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
      : query_(arguments.query), kernels_(kernels_of(value_type("query", arguments.query))),
        compute_(compute_type(arguments.query)) {
    STD_TORCH_CHECK(query_.dim() == 4, "query must have shape [B, N, H, D], it has ", query_.dim(), " dimensions");
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
    problem.bias_weight = inputs_.data("bias_weight", arguments.bias_weight, {heads, 5}, compute_, kCompute);
    problem.bias = inputs_.data("bias", arguments.bias, {heads}, compute_, kCompute);
    problem.blank_key = inputs_.data("blank_key", arguments.blank_key, {heads, depth}, compute_, kCompute);
    problem.blank_value = inputs_.data("blank_value", arguments.blank_value, {heads, depth}, compute_, kCompute);
    STD_TORCH_CHECK(arguments.blank_key.has_value() == arguments.blank_value.has_value(),
                    "blank_key and blank_value must be given together");
  }

  int64_t blocks() const { return problem.batch * ((problem.queries + kQueryBlock - 1) / kQueryBlock); }

  Tensor of_query_type(const Sizes& sizes) const { return torch::stable::new_empty(query_, sizes); }
  Tensor of_compute_type(const Sizes& sizes) const { return torch::stable::new_empty(query_, sizes, compute_); }

  void forward() {
    prepare(false);
    std::atomic<bool> good{true};
    run_tasks(query_, blocks(), 1, plan_.scratch, [&](int64_t begin, int64_t end, void* scratch) {
      if (good && !kernels_.forward(problem, begin, end, scratch)) good = false;
    });
    check_ids(good);
  }

  // Sums over blocks of the gradients of bias_weight, bias, blank_key and blank_value are left in `partial`.
  void backward(const Tensor& grad_output) {
    check_sizes("grad_output", grad_output, {problem.batch, problem.queries, problem.heads * problem.depth});
    check_type("grad_output", grad_output, query_.scalar_type(), kOfQuery);
    const Tensor& grad = inputs_.rows("grad_output", grad_output);
    problem.grad_output = {grad.const_data_ptr(), grad.stride(0), grad.stride(1), problem.depth};
    prepare(true);
    const int64_t images_blocks = (problem.queries + kQueryBlock - 1) / kQueryBlock, total = blocks();
    const int64_t row_bytes = problem.heads * 2 * plan_.row_slots * element_bytes();
    const int64_t block_bytes = kQueryBlock * (row_bytes + problem.lists * plan_.entry_bytes);
    const int64_t chunk = std::min(total, std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, block_bytes)));
    // A chunk that begins inside of an image may end inside of one more.
    const int64_t spanned = (chunk + images_blocks - 1) / std::max<int64_t>(1, images_blocks) + 1;
    const int64_t images = std::min(problem.batch, spanned);
    problem.weights = take(chunk * kQueryBlock * row_bytes);
    problem.entries = take(chunk * kQueryBlock * problem.lists * plan_.entry_bytes);
    problem.starts = static_cast<int64_t*>(take(images * (problem.clusters + 1) * 8));
    partial_ = of_compute_type({total, problem.heads, plan_.partial_size});
    problem.partial = partial_.mutable_data_ptr();
    const bool whole_images = chunk == total;
    if (!whole_images) {
      const int64_t sums = problem.batch * problem.keys * problem.heads * plan_.padded_depth * element_bytes();
      problem.key_sums = take(sums);
      problem.value_sums = take(sums);
    }
    for (int64_t first = 0; first < total; first += chunk) {
      const QueryChunk part{first, std::min(first + chunk, total)};
      std::atomic<bool> good{true};
      run_tasks(query_, part.last_block - first, 1, plan_.scratch, [&](int64_t begin, int64_t end, void* scratch) {
        if (good && !kernels_.backward_queries(problem, part, first + begin, first + end, scratch)) good = false;
      });
      check_ids(good);
      const int64_t in_chunk = (part.last_block - 1) / images_blocks - first / images_blocks + 1;
      run_tasks(query_, in_chunk, 1, 0, [&](int64_t begin, int64_t end, void*) {
        kernels_.invert(problem, part, begin, end);
      });
      const int64_t groups = problem.clusters ? kernels_.key_groups(problem) : 0;
      const int64_t at_once = in_chunk * groups < 256 ? 1 : 8;
      run_tasks(query_, in_chunk * groups, at_once, plan_.scratch, [&](int64_t begin, int64_t end, void* scratch) {
        kernels_.backward_keys(problem, part, begin, end, scratch);
      });
    }
  }

  // The sum over blocks of `count` numbers for each head that begin at `first`.
  Tensor sum_blocks(bool wanted, const Sizes& sizes, int64_t first, int64_t count) const {
    Tensor result = of_compute_type(wanted ? sizes : Sizes{0});
    if (!wanted) return result;
    if (compute_ == ScalarType::Double) {
      sum_blocks_of<double>(result, first, count);
    } else {
      sum_blocks_of<float>(result, first, count);
    }
    return result;
  }

  const ClusterPlan& plan() const { return plan_; }

 private:
  const Tensor& query_;
  const ClusterKernels& kernels_;
  ScalarType compute_;
  Inputs inputs_;
  ClusterPlan plan_{};
  std::deque<Scratch> memory_;
  Tensor partial_;

  int64_t element_bytes() const { return compute_ == ScalarType::Double ? 8 : 4; }

  Rows rows(const char* name, const Tensor& tensor, int64_t count) {
    check_sizes(name, tensor, {problem.batch, count, problem.heads, problem.depth});
    check_type(name, tensor, query_.scalar_type(), kOfQuery);
    const Tensor& kept = inputs_.rows(name, tensor);
    return {kept.const_data_ptr(), kept.stride(0), kept.stride(1), kept.stride(2)};
  }

  const void* positions(const char* name, const Tensor& tensor, int64_t count, int64_t& batch_stride) {
    STD_TORCH_CHECK(tensor.dim() == 3 && (tensor.size(0) == 1 || tensor.size(0) == problem.batch), name,
                    " must have shape [B, N, 2] with B = 1 or ", problem.batch);
    batch_stride = tensor.size(0) == 1 ? 0 : count * 2;
    return inputs_.data(name, tensor, {tensor.size(0), count, 2}, compute_, kCompute);
  }

  void find_lists(const OptionalTensor& nearest, int64_t cluster_size) {
    STD_TORCH_CHECK(cluster_size >= 1, "cluster_size must be at least 1, got ", cluster_size);
    if (!nearest.has_value()) {
      problem.lists = problem.clusters = problem.keys > 0 ? 1 : 0;
      problem.cluster_size = std::max<int64_t>(1, problem.keys);
      return;
    }
    const ScalarType type = nearest->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "nearest must be int32 or int64");
    STD_TORCH_CHECK(nearest->dim() == 3 && (nearest->size(0) == 1 || nearest->size(0) == problem.batch),
                    "nearest must have shape [B, N, J] with B = 1 or ", problem.batch);
    problem.lists = nearest->size(2);
    problem.cluster_size = cluster_size;
    problem.clusters = problem.keys / cluster_size + (problem.keys % cluster_size != 0);
    problem.wide_nearest = type == ScalarType::Long;
    problem.nearest_batch_stride = nearest->size(0) == 1 ? 0 : problem.queries * problem.lists;
    problem.nearest =
        inputs_.data("nearest", *nearest, {nearest->size(0), problem.queries, problem.lists}, type, "its dtype");
  }

  void check_ids(bool good) const {
    STD_TORCH_CHECK(good, "nearest is out of range: there are ", problem.clusters, " clusters of ",
                    problem.cluster_size, " in ", problem.keys, " keys");
  }

  void* take(int64_t bytes) { return memory_.emplace_back(query_, bytes).data(); }

  Rows whole_vectors(const Rows& from, int64_t rows, bool in_place) {
    if (in_place) return from;
    const int64_t depth = plan_.padded_depth, heads = problem.heads;
    void* to = take(problem.batch * rows * heads * depth * element_bytes());
    run_tasks(query_, problem.batch * rows, 256, 0, [&](int64_t begin, int64_t end, void*) {
      kernels_.copy_rows(problem, from, rows, to, begin, end);
    });
    return {to, rows * heads * depth, depth, rows * depth};
  }

  void prepare(bool backward) {
    plan_ = kernels_.plan(problem, backward);
    const int64_t tasks = problem.batch * problem.clusters, bytes = element_bytes();
    const bool in_panels = plan_.width > 1;
    if (in_panels) {
      const int64_t panels = tasks * problem.heads * problem.depth * plan_.slots * bytes;
      problem.key_panels = take(panels);
      if (backward) problem.value_panels = take(panels);
    }
    if (problem.bias_weight) {
      problem.key_x = take(tasks * plan_.slots * bytes);
      problem.key_y = take(tasks * plan_.slots * bytes);
    }
    problem.value_rows = whole_vectors(problem.value, problem.keys, plan_.rows_in_place[1]);
    if (backward || !in_panels) {
      problem.key_rows = whole_vectors(problem.key, problem.keys, plan_.rows_in_place[0]);
    }
    if (backward) {
      problem.query_rows = whole_vectors(problem.query, problem.queries, plan_.rows_in_place[2]);
      problem.grad_rows = whole_vectors(problem.grad_output, problem.queries, plan_.rows_in_place[3]);
    }
    run_tasks(query_, tasks, std::max<int64_t>(1, 512 / problem.cluster_size), 0,
              [&](int64_t begin, int64_t end, void*) { kernels_.prepare(problem, begin, end); });
  }

  template <typename C>
  void sum_blocks_of(Tensor& result, int64_t first, int64_t count) const {
    C* to = static_cast<C*>(result.mutable_data_ptr());
    const C* from = static_cast<const C*>(partial_.const_data_ptr()) + first;
    std::vector<double> sums(problem.heads * count, 0.0);
    for (int64_t block = 0; block < blocks(); ++block) {
      for (int64_t h = 0; h < problem.heads; ++h) {
        const C* row = from + (block * problem.heads + h) * plan_.partial_size;
        for (int64_t i = 0; i < count; ++i) sums[h * count + i] += row[i];
      }
    }
    for (size_t i = 0; i < sums.size(); ++i) to[i] = static_cast<C>(sums[i]);
  }
};

std::tuple<Tensor, Tensor> cluster_attention(Tensor query, Tensor key, Tensor value, Tensor query_pos, Tensor key_pos,
                                             OptionalTensor nearest, int64_t cluster_size, OptionalTensor bias_weight,
                                             OptionalTensor bias, OptionalTensor blank_key, OptionalTensor blank_value,
                                             double scale, double max_offset) {
  ClusterCall call({query, key, value, query_pos, key_pos, nearest, cluster_size, bias_weight, bias, blank_key,
                    blank_value, scale, max_offset});
  ClusterProblem& problem = call.problem;
  Tensor output = call.of_query_type({problem.batch, problem.queries, problem.heads * problem.depth});
  Tensor normalizer = call.of_compute_type({problem.batch, problem.queries, problem.heads, 2});
  problem.output = output.mutable_data_ptr();
  problem.normalizer = normalizer.mutable_data_ptr();
  call.forward();
  return {output, normalizer};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cluster_attention_backward(
    Tensor grad_output, Tensor normalizer, Tensor query, Tensor key, Tensor value, Tensor query_pos, Tensor key_pos,
    OptionalTensor nearest, int64_t cluster_size, OptionalTensor bias_weight, OptionalTensor bias,
    OptionalTensor blank_key, OptionalTensor blank_value, double scale, double max_offset, OptionalTensor) {
  ClusterCall call({query, key, value, query_pos, key_pos, nearest, cluster_size, bias_weight, bias, blank_key,
                    blank_value, scale, max_offset});
  ClusterProblem& problem = call.problem;
  const int64_t heads = problem.heads, depth = problem.depth;
  check_sizes("normalizer", normalizer, {problem.batch, problem.queries, heads, 2});
  const Tensor kept = torch::stable::contiguous(normalizer);
  problem.normalizer = kept.mutable_data_ptr();
  Tensor grad_query = call.of_query_type({problem.batch, problem.queries, heads, depth});
  Tensor grad_key = call.of_query_type({problem.batch, problem.keys, heads, depth});
  Tensor grad_value = call.of_query_type({problem.batch, problem.keys, heads, depth});
  problem.grad_query = grad_query.mutable_data_ptr();
  problem.grad_key = grad_key.mutable_data_ptr();
  problem.grad_value = grad_value.mutable_data_ptr();
  if (call.blocks() == 0) {
    torch::stable::zero_(grad_key);
    torch::stable::zero_(grad_value);
  }
  call.backward(grad_output);
  const int64_t padded = call.plan().padded_depth;
  return {grad_query,
          grad_key,
          grad_value,
          call.sum_blocks(bias_weight.has_value(), {heads, 5}, 0, 5),
          call.sum_blocks(bias.has_value(), {heads}, 5, 1),
          call.sum_blocks(blank_key.has_value(), {heads, depth}, 6, depth),
          call.sum_blocks(blank_value.has_value(), {heads, depth}, 6 + padded, depth)};
}

}  // namespace
}  // namespace boltz_mm

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CPU, library) {
  library.impl("cluster_attention", TORCH_BOX(&boltz_mm::cluster_attention));
  library.impl("cluster_attention_backward", TORCH_BOX(&boltz_mm::cluster_attention_backward));
}
