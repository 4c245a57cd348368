// Deformable, box and instance attention on the CPU: checks, memory, threads and the choice of the instruction set.
// The kernels are in grid_attention_kernels.h, the schemas in ../registration.cpp.

#include "grid_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace boltz_mm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kQueryBlock = 32;  // queries of a forward task
constexpr int64_t kReadsToPack = 2;  // samples for each cell of value
constexpr int64_t kScratchPerValue = 2;  // scratch memory of all threads, in times of a float64 value
constexpr int64_t kSmallScratch = 64 << 20;  // bytes that are taken whatever the size of value

const GridKernels* choose_kernels() {
#ifdef BOLTZ_MM_X86_VARIANTS
  // For tests and comparisons: keep to a smaller instruction set.
  const char* asked = std::getenv("BOLTZ_MM_CPU_CAPABILITY");
  const std::string limit = asked ? asked : "avx512";
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && limit == "avx512") return avx512::grid_kernels;
  if (has_avx2 && limit != "baseline") return avx2::grid_kernels;
#endif
  return baseline::grid_kernels;
}

const GridKernels& kernels_of(ValueType type) {
  static const GridKernels* chosen = choose_kernels();
  return chosen[static_cast<int>(type)];
}

ValueType value_type(const Tensor& value) {
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

// A call: the description for the kernels, and the tensors that it points into.
class Call {
 public:
  GridProblem problem{};

  Call(Mode mode, const Tensor& value, const Tensor& spatial_shapes, const Tensor& placed)
      : kernels_(kernels_of(value_type(value))),
        compute_(value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        value_(value.dim() == 4 && value.stride(3) != 1 && value.size(3) > 1 ? torch::stable::contiguous(value)
                                                                            : value) {
    STD_TORCH_CHECK(value.dim() == 4, "value must have shape [B, S, H, D], it has ", value.dim(), " dimensions");
    STD_TORCH_CHECK(
        spatial_shapes.scalar_type() == ScalarType::Long && spatial_shapes.dim() == 2 && spatial_shapes.size(1) == 2,
        "spatial_shapes must be int64 of shape [L, 2]");
    STD_TORCH_CHECK(placed.dim() >= 5, "boxes or locations must have shape [B, Q, H, L, ...]");
    problem.mode = mode;
    problem.batch = value.size(0);
    problem.cells = value.size(1);
    problem.heads = value.size(2);
    problem.depth = value.size(3);
    problem.queries = placed.size(1);
    problem.levels = spatial_shapes.size(0);
    const int64_t prefix[] = {problem.batch, problem.queries, problem.heads, problem.levels};
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(placed.size(i) == prefix[i], "boxes or locations must have shape [B, Q, H, L, ...]: size ", i,
                      " is ", placed.size(i), ", expected ", prefix[i]);
    }
    problem.value = value_.const_data_ptr();
    problem.value_batch_stride = value_.stride(0);
    problem.value_cell_stride = value_.stride(1);
    problem.value_head_stride = value_.stride(2);
    read_levels(spatial_shapes);
  }

  // A contiguous tensor of the compute dtype with the expected number of elements.
  const void* input(const char* name, const Tensor& tensor, int64_t elements) {
    STD_TORCH_CHECK(tensor.scalar_type() == compute_, name,
                    " must have the compute dtype: float64 for a float64 value, otherwise float32");
    return keep(name, tensor, elements);
  }

  const void* input(const char* name, const OptionalTensor& tensor, int64_t elements) {
    return tensor.has_value() ? input(name, *tensor, elements) : nullptr;
  }

  // A contiguous tensor of the dtype of value with the expected number of elements.
  const void* upstream(const char* name, const Tensor& tensor, int64_t elements) {
    STD_TORCH_CHECK(tensor.scalar_type() == value_.scalar_type(), name, " must have the dtype of value");
    return keep(name, tensor, elements);
  }

  Tensor like_value(std::vector<int64_t> sizes) const { return torch::stable::new_empty(value_, sizes); }
  Tensor of_compute_dtype(std::vector<int64_t> sizes) const {
    return torch::stable::new_empty(value_, sizes, compute_);
  }
  Tensor like(const Tensor& tensor) const {
    const auto sizes = tensor.sizes();
    return of_compute_dtype(std::vector<int64_t>(sizes.begin(), sizes.end()));
  }

  // Number of (b, q, h, l).
  int64_t boxes() const { return rows() * problem.levels; }
  int64_t rows() const { return problem.batch * problem.queries * problem.heads; }

  void forward() {
    const int64_t threads = torch::stable::get_num_threads(), maps = problem.batch * problem.heads;
    // With many more threads than heads each would copy for itself; then they share what is there.
    problem.packed = worth_packing() && threads <= 2 * maps;
    problem.splits = problem.packed ? (threads + maps - 1) / maps : (problem.queries + kQueryBlock - 1) / kQueryBlock;
    in_threads((problem.packed ? maps : problem.batch) * problem.splits, 1, kernels_.forward_scratch(problem),
               kernels_.forward, problem);
  }

  void backward() {
    problem.packed = worth_packing();
    const int64_t scratch = kernels_.backward_scratch(problem);
    // The softmax passes need a small part of the scratch memory: without the map of a level.
    GridProblem rows_only = problem;
    rows_only.grad_value = nullptr;
    rows_only.packed = false;
    const int64_t row_scratch = kernels_.backward_scratch(rows_only);
    const bool has_softmax = problem.mode != Mode::points && problem.levels * problem.points > 0;
    if (has_softmax) in_threads(rows(), 1024, row_scratch, kernels_.softmax, rows_only);
    in_threads(problem.batch * problem.heads * problem.levels, 1, scratch, kernels_.backward, problem);
    if (has_softmax) in_threads(rows(), 1024, row_scratch, kernels_.softmax_backward, rows_only);
  }

 private:
  const GridKernels& kernels_;
  ScalarType compute_;
  Tensor value_;
  std::vector<Tensor> kept_;
  std::vector<int64_t> shapes_, starts_;

  // A head's part of value is copied where each cell is read several times.
  bool worth_packing() const {
    return problem.queries * problem.levels * problem.points >= kReadsToPack * problem.cells;
  }

  void read_levels(const Tensor& spatial_shapes) {
    const Tensor contiguous = torch::stable::contiguous(spatial_shapes);
    const int64_t* sizes = contiguous.const_data_ptr<int64_t>();
    int64_t total = 0;
    for (int64_t level = 0; level < problem.levels; ++level) {
      const int64_t height = sizes[2 * level], width = sizes[2 * level + 1];
      STD_TORCH_CHECK(height >= 0 && width >= 0 && height < INT32_MAX && width < INT32_MAX,
                      "spatial_shapes are out of range: level ", level, " is ", height, " x ", width);
      // Divided, because the product may overflow.
      STD_TORCH_CHECK(height == 0 || width <= (problem.cells - total) / height,
                      "spatial_shapes have more cells than value, which has ", problem.cells);
      shapes_.push_back(height);
      shapes_.push_back(width);
      starts_.push_back(total);
      total += height * width;
    }
    STD_TORCH_CHECK(total == problem.cells, "spatial_shapes have ", total, " cells, but value has ", problem.cells);
    problem.shapes = shapes_.data();
    problem.starts = starts_.data();
  }

  const void* keep(const char* name, const Tensor& tensor, int64_t elements) {
    STD_TORCH_CHECK(tensor.numel() == elements, name, " must have ", elements, " elements, it has ", tensor.numel());
    STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU as value is");
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr();
  }

  // Run all tasks, `at_once` at a time.  Which thread takes which does not matter: no two tasks share an output.
  void in_threads(int64_t tasks, int64_t at_once, int64_t scratch_bytes,
                  void (*run)(const GridProblem&, int64_t, int64_t, void*), const GridProblem& description) const {
    if (tasks == 0) return;
    const int64_t takes = (tasks + at_once - 1) / at_once;
    const int64_t threads = torch::stable::get_num_threads();
    // On a machine of many cores the scratch memory of all stays below a few times that of value.
    const int64_t value_bytes = problem.batch * problem.cells * problem.heads * problem.depth * 8;
    const int64_t fitting = 1 + (kScratchPerValue * value_bytes + kSmallScratch) / (scratch_bytes + 1);
    const int64_t workers = std::min({threads, takes, fitting});
    // A tensor, so that it counts as memory of PyTorch; taken before the threads start, because an exception must not
    // leave a thread.
    const int64_t stride = (scratch_bytes + 127) / 64 * 64;
    const Tensor scratch = torch::stable::new_empty(value_, {workers * stride + 64}, ScalarType::Byte);
    char* memory = static_cast<char*>(scratch.mutable_data_ptr());
    char* aligned = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t first = next.fetch_add(at_once); first < tasks; first = next.fetch_add(at_once)) {
          run(description, first, first + at_once < tasks ? first + at_once : tasks, aligned + worker * stride);
        }
      }
    });
  }
};

std::vector<int64_t> output_sizes(const GridProblem& problem) {
  return {problem.batch, problem.queries, problem.heads * problem.depth};
}

// --------------------------------------------------------------------------------------------------- deformable ----

Call deform_call(const Tensor& value, const Tensor& spatial_shapes, const Tensor& locations, const Tensor& weights) {
  Call call(Mode::points, value, spatial_shapes, locations);
  STD_TORCH_CHECK(locations.dim() == 6, "locations must have shape [B, Q, H, L, P, 2]");
  call.problem.points = locations.size(4);
  const int64_t points = call.boxes() * call.problem.points;
  call.problem.locations = call.input("locations", locations, points * 2);
  call.problem.weights = call.input("weights", weights, points);
  return call;
}

Tensor deform_attention(Tensor value, Tensor spatial_shapes, Tensor locations, Tensor weights) {
  Call call = deform_call(value, spatial_shapes, locations, weights);
  Tensor output = call.like_value(output_sizes(call.problem));
  call.problem.output = output.mutable_data_ptr();
  call.forward();
  return output;
}

std::tuple<Tensor, Tensor, Tensor> deform_attention_backward(
    Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor locations, Tensor weights, bool value_needed) {
  Call call = deform_call(value, spatial_shapes, locations, weights);
  GridProblem& problem = call.problem;
  problem.grad_output = call.upstream("grad_output", grad_output, call.rows() * problem.depth);
  Tensor grad_value = call.like_value(
      value_needed ? std::vector<int64_t>{problem.batch, problem.cells, problem.heads, problem.depth}
                   : std::vector<int64_t>{0});
  Tensor grad_locations = call.like(locations), grad_weights = call.like(weights);
  problem.grad_value = value_needed ? grad_value.mutable_data_ptr() : nullptr;
  problem.grad_locations = grad_locations.mutable_data_ptr();
  problem.grad_weights = grad_weights.mutable_data_ptr();
  call.backward();
  return {grad_value, grad_locations, grad_weights};
}

// ---------------------------------------------------------------------------------------------- box and instance ----

Call box_call(Mode mode, const Tensor& value, const Tensor& spatial_shapes, const Tensor& boxes, const Tensor& logits,
              const Tensor& points, const OptionalTensor& valid_ratios, const OptionalTensor& angles) {
  Call call(mode, value, spatial_shapes, boxes);
  GridProblem& problem = call.problem;
  STD_TORCH_CHECK(points.dim() == 2 && points.size(1) == 2, "points must have shape [P, 2]");
  problem.points = points.size(0);
  if (mode == Mode::instance) {
    while (problem.grid_size * problem.grid_size < problem.points) ++problem.grid_size;
    STD_TORCH_CHECK(problem.grid_size > 0 && problem.grid_size % 2 == 0 &&
                        problem.grid_size * problem.grid_size == problem.points,
                    "instance attention needs an m x m grid with m even, got ", problem.points, " points");
  }
  problem.boxes = call.input("boxes", boxes, call.boxes() * 4);
  problem.logits = call.input("logits", logits, call.boxes() * (mode == Mode::instance ? 4 : problem.points));
  problem.grid = call.input("points", points, problem.points * 2);
  problem.ratios = call.input("valid_ratios", valid_ratios, problem.batch * problem.levels * 2);
  problem.angles = call.input("angles", angles, call.boxes());
  return call;
}

Tensor box_attention(Tensor value, Tensor spatial_shapes, Tensor boxes, Tensor logits, Tensor points,
                     OptionalTensor valid_ratios, OptionalTensor angles) {
  Call call = box_call(Mode::box, value, spatial_shapes, boxes, logits, points, valid_ratios, angles);
  Tensor output = call.like_value(output_sizes(call.problem));
  call.problem.output = output.mutable_data_ptr();
  call.forward();
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> box_attention_backward(
    Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor boxes, Tensor logits, Tensor points,
    OptionalTensor valid_ratios, OptionalTensor angles, bool value_needed) {
  Call call = box_call(Mode::box, value, spatial_shapes, boxes, logits, points, valid_ratios, angles);
  GridProblem& problem = call.problem;
  problem.grad_output = call.upstream("grad_output", grad_output, call.rows() * problem.depth);
  Tensor grad_value = call.like_value(
      value_needed ? std::vector<int64_t>{problem.batch, problem.cells, problem.heads, problem.depth}
                   : std::vector<int64_t>{0});
  Tensor grad_boxes = call.like(boxes), grad_logits = call.like(logits);
  Tensor grad_angles = angles.has_value() ? call.like(*angles) : call.of_compute_dtype({0});
  problem.grad_value = value_needed ? grad_value.mutable_data_ptr() : nullptr;
  problem.grad_boxes = grad_boxes.mutable_data_ptr();
  problem.grad_logits = grad_logits.mutable_data_ptr();
  problem.grad_angles = angles.has_value() ? grad_angles.mutable_data_ptr() : nullptr;
  call.backward();
  return {grad_value, grad_boxes, grad_logits, grad_angles};
}

std::tuple<Tensor, Tensor> instance_attention(Tensor value, Tensor spatial_shapes, Tensor boxes, Tensor logits,
                                              Tensor points, OptionalTensor valid_ratios, bool mask_output) {
  Call call = box_call(Mode::instance, value, spatial_shapes, boxes, logits, points, valid_ratios, std::nullopt);
  GridProblem& problem = call.problem;
  const int64_t size = problem.grid_size, channels = problem.heads * problem.depth;
  Tensor output = call.like_value(output_sizes(problem));
  Tensor masks = call.like_value(
      mask_output ? std::vector<int64_t>{problem.batch, problem.queries, size, size, channels}
                  : std::vector<int64_t>{0});
  problem.with_mask = mask_output;
  problem.output = output.mutable_data_ptr();
  problem.mask_output = mask_output ? masks.mutable_data_ptr() : nullptr;
  call.forward();
  return {output, masks};
}

std::tuple<Tensor, Tensor, Tensor> instance_attention_backward(
    Tensor grad_output, OptionalTensor grad_mask_output, Tensor value, Tensor spatial_shapes, Tensor boxes,
    Tensor logits, Tensor points, OptionalTensor valid_ratios, bool value_needed) {
  Call call = box_call(Mode::instance, value, spatial_shapes, boxes, logits, points, valid_ratios, std::nullopt);
  GridProblem& problem = call.problem;
  const int64_t elements = call.rows() * problem.depth;
  problem.grad_output = call.upstream("grad_output", grad_output, elements);
  Tensor level_weights;
  problem.with_mask = grad_mask_output.has_value();
  if (problem.with_mask) {
    problem.grad_mask_output = call.upstream("grad_mask_output", *grad_mask_output, elements * problem.points);
    level_weights = call.like(logits);
    problem.level_weights = level_weights.mutable_data_ptr();
  }
  Tensor grad_value = call.like_value(
      value_needed ? std::vector<int64_t>{problem.batch, problem.cells, problem.heads, problem.depth}
                   : std::vector<int64_t>{0});
  Tensor grad_boxes = call.like(boxes), grad_logits = call.like(logits);
  problem.grad_value = value_needed ? grad_value.mutable_data_ptr() : nullptr;
  problem.grad_boxes = grad_boxes.mutable_data_ptr();
  problem.grad_logits = grad_logits.mutable_data_ptr();
  call.backward();
  return {grad_value, grad_boxes, grad_logits};
}

}  // namespace
}  // namespace boltz_mm

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CPU, library) {
  library.impl("deform_attention", TORCH_BOX(&boltz_mm::deform_attention));
  library.impl("deform_attention_backward", TORCH_BOX(&boltz_mm::deform_attention_backward));
  library.impl("box_attention", TORCH_BOX(&boltz_mm::box_attention));
  library.impl("box_attention_backward", TORCH_BOX(&boltz_mm::box_attention_backward));
  library.impl("instance_attention", TORCH_BOX(&boltz_mm::instance_attention));
  library.impl("instance_attention_backward", TORCH_BOX(&boltz_mm::instance_attention_backward));
}
