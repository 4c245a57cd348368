// The CUDA operators of ops/cuda/grid_attention.cpp as operators of the CPU, with the emulated kernels: what is between
// PyTorch and a launch (checks, memory, gradients in low precision) runs without a device.  Linked with
// cuda_emulator.cpp by test_cuda_operators_emulated.py.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

static AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream no_stream

#include "../../ops/cuda/grid_attention.cpp"
