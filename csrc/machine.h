// The processor this process runs on, as choose.h wants it.
#pragma once

#include "choose.h"

namespace dsconv {

// The best instruction set the processor and the system allow.
Target detected_isa();

// detected_isa(), lowered to DSCONV_CPU_ISA (amx | avx512bf16 | avx512 | avx2 | portable) where that is set; throws
// std::runtime_error for another value.
const Machine& cpu_machine();

}  // namespace dsconv
