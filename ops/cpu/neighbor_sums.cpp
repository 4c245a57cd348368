// Products with the rows that an index names, and weighted sums of them, on the CPU: checks, memory and threads.  The
// kernels are in neighbor_sums_kernels.h, the schemas in ../registration.cpp.

#include "cluster_attention.h"

#include "../include/stable_call.h"

#include <torch/csrc/stable/library.h>

namespace boltz_mm {
namespace {

constexpr int64_t kRowsOfTask = 16;

const NeighborKernels& kernels_of(const Tensor& tensor) {
  const NeighborKernels* chosen = baseline::neighbor_kernels;
#ifdef BOLTZ_MM_X86_VARIANTS
  if (instruction_set() == InstructionSet::avx2) chosen = avx2::neighbor_kernels;
  if (instruction_set() == InstructionSet::avx512) chosen = avx512::neighbor_kernels;
#endif
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, "rows must be float64 or float32");
  return chosen[type == ScalarType::Double ? 0 : 1];
}

class NeighborCall {
 public:
  NeighborProblem problem{};

  // `like` is [B, H, N, anything].
  NeighborCall(const Tensor& like, const Tensor& index, int64_t length, int64_t depth)
      : like_(like), kernels_(kernels_of(like)) {
    STD_TORCH_CHECK(like.dim() == 4 && index.dim() == 3, "rows must have four dimensions, index three");
    const ScalarType type = index.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "index must be int32 or int64");
    problem.batch = like.size(0);
    problem.heads = like.size(1);
    problem.queries = like.size(2);
    problem.count = index.size(2);
    problem.length = length;
    problem.depth = depth;
    problem.wide_index = type == ScalarType::Long;
    problem.index = inputs_.data("index", index, {problem.batch, problem.queries, problem.count}, type, "its dtype");
  }

  Rows rows(const char* name, const Tensor& tensor, int64_t count) {
    check_sizes(name, tensor, {problem.batch, problem.heads, count, problem.depth});
    check_type(name, tensor, like_.scalar_type(), "the dtype of the other inputs");
    const Tensor& kept = inputs_.rows(name, tensor);
    return {kept.const_data_ptr(), kept.stride(0), kept.stride(2), kept.stride(1)};
  }

  Rows whole_vectors(const Rows& from, int64_t count) {
    const int64_t depth = kernels_.padded_depth(problem.depth), heads = problem.heads;
    if (depth == problem.depth) return from;
    memory_.emplace_back(like_, problem.batch * count * heads * depth * like_.element_size());
    void* to = memory_.back().data();
    run_tasks(like_, problem.batch * count, 256, 0, [&](int64_t begin, int64_t end, void*) {
      kernels_.copy_rows(problem, from, count, to, begin, end);
    });
    return {to, count * heads * depth, depth, count * depth};
  }

  const void* weights(const Tensor& tensor) {
    const Sizes sizes{problem.batch, problem.heads, problem.queries, problem.count};
    return inputs_.data("weights", tensor, sizes, like_.scalar_type(), "the dtype of the other inputs");
  }

  Tensor output(int64_t rows, int64_t channels) {
    Tensor result = torch::stable::new_empty(like_, Sizes{problem.batch, problem.heads, rows, channels});
    problem.output = result.mutable_data_ptr();
    return result;
  }

  void for_rows(bool (*run)(const NeighborProblem&, int64_t, int64_t, void*)) const {
    std::atomic<bool> good{true};
    run_tasks(like_, problem.batch * problem.queries, kRowsOfTask, kernels_.scratch(problem),
              [&](int64_t begin, int64_t end, void* scratch) {
                if (good && !run(problem, begin, end, scratch)) good = false;
              });
    check_index(good);
  }

  void spread() {
    memory_.emplace_back(like_, problem.queries * problem.count * kernels_.entry_bytes);
    problem.entries = memory_.back().data();
    memory_.emplace_back(like_, (problem.length + 1) * 8);
    problem.starts = reinterpret_cast<int64_t*>(memory_.back().data());
    for (int64_t image = 0; image < problem.batch; ++image) {
      check_index(kernels_.invert(problem, image));
      run_tasks(like_, problem.length, kRowsOfTask, kernels_.scratch(problem),
                [&](int64_t begin, int64_t end, void* scratch) {
                  kernels_.spread(problem, image, begin, end, scratch);
                });
    }
  }

  const NeighborKernels& kernels() const { return kernels_; }

 private:
  const Tensor& like_;
  const NeighborKernels& kernels_;
  Inputs inputs_;
  std::deque<Scratch> memory_;

  void check_index(bool good) const {
    STD_TORCH_CHECK(good, "index is out of range: the table has ", problem.length, " rows");
  }
};

Tensor neighbor_products(Tensor rows, Tensor table, Tensor index) {
  STD_TORCH_CHECK(rows.dim() == 4 && table.dim() == 4, "rows and table must have four dimensions");
  NeighborCall call(rows, index, table.size(2), rows.size(3));
  NeighborProblem& problem = call.problem;
  problem.rows = call.rows("rows", rows, problem.queries);
  problem.table = call.rows("table", table, problem.length);
  Tensor output = call.output(problem.queries, problem.count);
  call.for_rows(call.kernels().products);
  return output;
}

Tensor neighbor_sums(Tensor weights, Tensor table, Tensor index) {
  STD_TORCH_CHECK(weights.dim() == 4 && table.dim() == 4, "weights and table must have four dimensions");
  NeighborCall call(weights, index, table.size(2), table.size(3));
  NeighborProblem& problem = call.problem;
  problem.weights = call.weights(weights);
  problem.table = call.whole_vectors(call.rows("table", table, problem.length), problem.length);
  Tensor output = call.output(problem.queries, problem.depth);
  call.for_rows(call.kernels().sums);
  return output;
}

Tensor neighbor_spread(Tensor weights, Tensor rows, Tensor index, int64_t length) {
  STD_TORCH_CHECK(rows.dim() == 4 && length >= 0, "rows must have four dimensions, and length not be negative");
  NeighborCall call(rows, index, length, rows.size(3));
  NeighborProblem& problem = call.problem;
  problem.weights = call.weights(weights);
  problem.rows = call.whole_vectors(call.rows("rows", rows, problem.queries), problem.queries);
  Tensor output = call.output(length, problem.depth);
  call.spread();
  return output;
}

}  // namespace
}  // namespace boltz_mm

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CPU, library) {
  library.impl("neighbor_products", TORCH_BOX(&boltz_mm::neighbor_products));
  library.impl("neighbor_sums", TORCH_BOX(&boltz_mm::neighbor_sums));
  library.impl("neighbor_spread", TORCH_BOX(&boltz_mm::neighbor_spread));
}
