// The grid kernels for every processor of the platform.
#include "grid_attention.h"

#define BOLTZ_MM_VECTOR_BYTES 16

namespace boltz_mm::baseline {
#include "grid_attention_kernels.h"
}  // namespace boltz_mm::baseline
