// What CPU operators do with the tensors of a call, on LibTorch's stable ABI: dtypes, shapes, contiguous copies that
// live as long as the call, scratch memory and threads.

#pragma once

#include "value_type.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

namespace boltz_mm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline ValueType value_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return ValueType::float64;
    case ScalarType::Float:
      return ValueType::float32;
    case ScalarType::BFloat16:
      return ValueType::bfloat16;
    case ScalarType::Half:
      return ValueType::float16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
      return ValueType::float32;
  }
}

// float64 for float64 tensors, otherwise float32.
inline ScalarType compute_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_sizes(const char* name, const Tensor& tensor, const Sizes& sizes) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(),
                  " dimensions, it has ", tensor.dim());
  for (size_t i = 0; i < sizes.size(); ++i) {
    STD_TORCH_CHECK(tensor.size(i) == sizes[i], name, " has size ", tensor.size(i), " in dimension ", i, ", expected ",
                    sizes[i]);
  }
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType type, const char* meaning) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must have ", meaning);
}

inline void check_cpu(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
}

// Tensors that a call reads, kept until it ends.
class Inputs {
 public:
  // Any strides but for the last dimension, which is contiguous in what is returned.
  const Tensor& rows(const char* name, const Tensor& tensor) {
    check_cpu(name, tensor);
    const int64_t last = tensor.dim() - 1;
    const bool in_place = tensor.size(last) <= 1 || tensor.stride(last) == 1;
    kept_.push_back(in_place ? tensor : torch::stable::contiguous(tensor));
    return kept_.back();
  }

  const Tensor& contiguous(const char* name, const Tensor& tensor) {
    check_cpu(name, tensor);
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back();
  }

  // Data of a contiguous tensor with these sizes and dtype; null where there is no tensor.
  const void* data(const char* name, const Tensor& tensor, const Sizes& sizes, ScalarType type, const char* meaning) {
    check_sizes(name, tensor, sizes);
    check_type(name, tensor, type, meaning);
    return contiguous(name, tensor).const_data_ptr();
  }

  const void* data(const char* name, const OptionalTensor& tensor, const Sizes& sizes, ScalarType type,
                   const char* meaning) {
    return tensor.has_value() ? data(name, *tensor, sizes, type, meaning) : nullptr;
  }

 private:
  std::deque<Tensor> kept_;
};

// Memory of PyTorch, so that it counts as such, aligned to cache lines; as long as the object lives.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t bytes)
      : tensor_(torch::stable::new_empty(like, {bytes + 64}, ScalarType::Byte)),
        data_(static_cast<char*>(tensor_.mutable_data_ptr())) {
    data_ += (64 - reinterpret_cast<uintptr_t>(data_) % 64) % 64;
  }

  char* data() const { return data_; }

 private:
  Tensor tensor_;
  char* data_;
};

// Run tasks 0 .. tasks - 1, `at_once` at a time, as run(begin, end, scratch of the worker).  Which thread takes which
// does not matter where no two tasks share an output.
template <typename Run>
void run_tasks(const Tensor& like, int64_t tasks, int64_t at_once, int64_t scratch_bytes, const Run& run) {
  if (tasks <= 0) return;
  const int64_t takes = (tasks + at_once - 1) / at_once;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min(threads, takes);
  const int64_t stride = (scratch_bytes + 127) / 64 * 64;
  // Before the threads start, because an exception must not leave a thread.
  const Scratch scratch(like, workers * stride);
  if (workers == 1) return run(int64_t{0}, tasks, scratch.data());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t first = next.fetch_add(at_once); first < tasks; first = next.fetch_add(at_once)) {
        run(first, std::min(first + at_once, tasks), scratch.data() + worker * stride);
      }
    }
  });
}

}  // namespace boltz_mm
