// Which of the variants of a CPU kernel runs: the largest instruction set that the processor has.

#pragma once

#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define BOLTZ_MM_X86_VARIANTS 1
#endif

namespace boltz_mm {

enum class InstructionSet : int { baseline, avx2, avx512 };

inline InstructionSet find_instruction_set() {
#ifdef BOLTZ_MM_X86_VARIANTS
  // For tests and comparisons: keep to a smaller instruction set.
  const char* asked = std::getenv("BOLTZ_MM_CPU_CAPABILITY");
  const std::string limit = asked ? asked : "avx512";
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && limit == "avx512") return InstructionSet::avx512;
  if (has_avx2 && limit != "baseline") return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

inline InstructionSet instruction_set() {
  static const InstructionSet found = find_instruction_set();
  return found;
}

}  // namespace boltz_mm
