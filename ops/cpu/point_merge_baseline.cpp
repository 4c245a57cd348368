// The sums over neighbours for every processor of the platform.
#include "point_merge.h"

#define BOLTZ_MM_VECTOR_BYTES 16

namespace boltz_mm::baseline {
#include "point_merge_kernels.h"
}  // namespace boltz_mm::baseline
