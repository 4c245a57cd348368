// The kernels of cluster attention for every processor of the platform.
#include "cluster_attention.h"

#define BOLTZ_MM_VECTOR_BYTES 16

namespace boltz_mm::baseline {
#include "cluster_attention_kernels.h"
}  // namespace boltz_mm::baseline
