// Deformable, box and instance attention on CUDA: checks, memory and the stream.  The kernels are in grid_*.cu, the
// schemas in ../registration.cpp.
//
// The level sizes are on the device and are not read here, which would wait for it; the kernels take a level that does
// not fit into value, and all after it, to be empty.  The gradient of value is added up atomically, in float32 for
// 16-bit values: its last digits may differ from run to run.

#include "grid_attention.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <tuple>
#include <vector>

namespace boltz_mm::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

constexpr Index kMostCells = 0xffffffff;

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

int32_t device_of(const Tensor& value) {
  STD_TORCH_CHECK(value.is_cuda(), "value must be on a CUDA device");
  return value.get_device_index();
}

// A call: the description for the kernels, and the tensors that it points into.
class Call {
 public:
  GridProblem problem{};

  Call(Mode mode, const Tensor& value, const Tensor& spatial_shapes, const Tensor& placed)
      : type_(value_type(value)),
        compute_(type_ == ValueType::float64 ? ScalarType::Double : ScalarType::Float),
        device_(device_of(value)),
        guard_(device_),
        value_(value.dim() == 4 && value.stride(3) != 1 && value.size(3) > 1 ? torch::stable::contiguous(value)
                                                                            : value) {
    STD_TORCH_CHECK(value.dim() == 4, "value must have shape [B, S, H, D], it has ", value.dim(), " dimensions");
    STD_TORCH_CHECK(value.size(1) <= kMostCells, "value has too many cells: ", value.size(1));
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
    problem.shapes = static_cast<const Index*>(keep("spatial_shapes", spatial_shapes, problem.levels * 2));
    problem.value = value_.const_data_ptr();
    problem.value_batch_stride = stride_of_value(0);
    problem.value_cell_stride = stride_of_value(1);
    problem.value_head_stride = stride_of_value(2);
  }

  // A contiguous tensor of the compute dtype with the expected number of elements.
  const void* input(const char* name, const Tensor& tensor, int64_t elements) {
    STD_TORCH_CHECK(tensor.scalar_type() == compute_, name, " must have the compute dtype: float64 for a float64 value, ",
                    "otherwise float32");
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

  // Number of (b, q, h, l), and of (b, q, h).
  int64_t boxes() const { return rows() * problem.levels; }
  int64_t rows() const { return problem.batch * problem.queries * problem.heads; }

  Tensor like_value(const Sizes& sizes) const { return torch::stable::new_empty(value_, sizes); }

  Tensor output() {
    Tensor output = like_value({problem.batch, problem.queries, problem.heads * problem.depth});
    problem.output = output.mutable_data_ptr();
    return output;
  }

  // Memory for the gradient of an input, of size 0 for one that is not there.
  Tensor gradient(const Tensor& tensor, void*& pointer) const {
    const auto sizes = tensor.sizes();
    Tensor gradient = torch::stable::new_empty(value_, Sizes(sizes.begin(), sizes.end()), compute_);
    pointer = gradient.mutable_data_ptr();
    return gradient;
  }

  Tensor gradient(const OptionalTensor& tensor, void*& pointer) const {
    return tensor.has_value() ? gradient(*tensor, pointer) : torch::stable::new_empty(value_, Sizes{0}, compute_);
  }

  void forward() const { check(launch_forward(problem, type_, stream())); }

  // Returns the gradient of value.
  Tensor backward(bool value_needed) {
    Tensor sums;
    const Sizes sizes{problem.batch, problem.cells, problem.heads, problem.depth};
    if (value_needed) {
      sums = torch::stable::new_zeros(value_, sizes, compute_);
      problem.grad_value = sums.mutable_data_ptr();
    }
    check(launch_backward(problem, type_, stream()));
    if (!value_needed) return like_value({0});
    if (value_.scalar_type() == compute_) return sums;
    Tensor rounded = like_value(sizes);
    torch::stable::copy_(rounded, sums);
    return rounded;
  }

 private:
  ValueType type_;
  ScalarType compute_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor value_;
  std::vector<Tensor> kept_;

  // 0 where there is nothing to step over, so that it does not stand against reading in vectors.
  Index stride_of_value(int64_t dim) const { return value_.size(dim) > 1 ? value_.stride(dim) : 0; }

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
  Tensor output = call.output();
  call.forward();
  return output;
}

std::tuple<Tensor, Tensor, Tensor> deform_attention_backward(
    Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor locations, Tensor weights, bool value_needed) {
  Call call = deform_call(value, spatial_shapes, locations, weights);
  GridProblem& problem = call.problem;
  problem.grad_output = call.upstream("grad_output", grad_output, call.rows() * problem.depth);
  Tensor grad_locations = call.gradient(locations, problem.grad_locations);
  Tensor grad_weights = call.gradient(weights, problem.grad_weights);
  return {call.backward(value_needed), grad_locations, grad_weights};
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
  Tensor output = call.output();
  call.forward();
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> box_attention_backward(
    Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor boxes, Tensor logits, Tensor points,
    OptionalTensor valid_ratios, OptionalTensor angles, bool value_needed) {
  Call call = box_call(Mode::box, value, spatial_shapes, boxes, logits, points, valid_ratios, angles);
  GridProblem& problem = call.problem;
  problem.grad_output = call.upstream("grad_output", grad_output, call.rows() * problem.depth);
  Tensor grad_boxes = call.gradient(boxes, problem.grad_boxes);
  Tensor grad_logits = call.gradient(logits, problem.grad_logits);
  Tensor grad_angles = call.gradient(angles, problem.grad_angles);
  return {call.backward(value_needed), grad_boxes, grad_logits, grad_angles};
}

std::tuple<Tensor, Tensor> instance_attention(Tensor value, Tensor spatial_shapes, Tensor boxes, Tensor logits,
                                              Tensor points, OptionalTensor valid_ratios, bool mask_output) {
  Call call = box_call(Mode::instance, value, spatial_shapes, boxes, logits, points, valid_ratios, std::nullopt);
  GridProblem& problem = call.problem;
  Tensor output = call.output();
  Tensor masks = call.like_value(mask_output ? Sizes{problem.batch, problem.queries, problem.grid_size,
                                                     problem.grid_size, problem.heads * problem.depth}
                                             : Sizes{0});
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
  if (grad_mask_output.has_value()) {
    problem.grad_mask_output = call.upstream("grad_mask_output", *grad_mask_output, elements * problem.points);
  }
  Tensor grad_boxes = call.gradient(boxes, problem.grad_boxes);
  Tensor grad_logits = call.gradient(logits, problem.grad_logits);
  return {call.backward(value_needed), grad_boxes, grad_logits};
}

}  // namespace
}  // namespace boltz_mm::cuda

STABLE_TORCH_LIBRARY_IMPL(boltz_mm, CUDA, library) {
  library.impl("deform_attention", TORCH_BOX(&boltz_mm::cuda::deform_attention));
  library.impl("deform_attention_backward", TORCH_BOX(&boltz_mm::cuda::deform_attention_backward));
  library.impl("box_attention", TORCH_BOX(&boltz_mm::cuda::box_attention));
  library.impl("box_attention_backward", TORCH_BOX(&boltz_mm::cuda::box_attention_backward));
  library.impl("instance_attention", TORCH_BOX(&boltz_mm::cuda::instance_attention));
  library.impl("instance_attention_backward", TORCH_BOX(&boltz_mm::cuda::instance_attention_backward));
}
