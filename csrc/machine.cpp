#include "machine.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "cpu/tile_product.h"

namespace dsconv {

namespace cpu {
extern const bool has_avx512_bf16;
#if DSCONV_X86
const bool has_avx512_bf16 = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16"));
#endif
}  // namespace cpu

Target detected_isa() {
#if DSCONV_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return Target::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Target::avx2;
  if (cpu::amx::is_available()) return Target::amx;
  // Intel's take as long for a pair as for two multiply-adds in float32, or longer.
  return cpu::has_avx512_bf16 && __builtin_cpu_is("amd") ? Target::avx512bf16 : Target::avx512;
#else
  return Target::portable;
#endif
}

const Machine& cpu_machine() {
  static const Machine machine = [] {
    Target target = detected_isa();
    if (const char* wanted = std::getenv("DSCONV_CPU_ISA"); wanted && *wanted) {
      const std::string name = wanted;
      Target limit = Target::portable;
      while (limit != Target::cuda && name != name_of(limit)) limit = static_cast<Target>(static_cast<int>(limit) + 1);
      if (limit == Target::cuda)
        throw std::runtime_error("DSCONV_CPU_ISA: got '" + name +
                                 "', expected amx, avx512bf16, avx512, avx2 or portable");
      target = std::min(target, limit);
    }
    // One core of a server of the 2020s: 32, 16 or 8 fp32 multiply-adds per cycle at 2 GHz, measured bandwidths of L2
    // and L3.
    const double peak = 2 * 2.0 * (target >= Target::avx512 ? 32 : target == Target::avx2 ? 16 : 8);
    return Machine{target, 0, peak, 55, 15, 2 << 20};
  }();
  return machine;
}

}  // namespace dsconv
