// Memory for tensors on a CPU, but the smallest, kept for the next ones.
//
// C libraries map the memory of a large tensor when it is made and unmap it when it is freed. Each page of a new mapping is
// a fault and is cleared, and all that takes longer than most depthwise convolutions. Here a freed block waits for another
// tensor of about its size, and is unmapped when none has come for long, or when much more waits than was in use at one
// time. It consists of huge pages as far as it fills them, which the system may take back when they have waited for a while
// (MADV_FREE). To say so for each freed tensor would cost more than many layers: every core that runs the process is
// interrupted.
//
// Loads wait for stores whose addresses have the same lower 12 bits, and C libraries begin large tensors at the same place
// of a page: where columns are a power of two apart, each load of an input would wait for an output stored shortly before.
#pragma once

#include <cstdint>

namespace dsconv {

// At least `bytes` of uninitialised memory, aligned to a cache line, at another place of its page than `source`, from which
// what is stored there will be computed. Null where nothing is kept: for small tensors, on other systems than Linux, with
// DSCONV_CPU_CACHE=0, and if the system has no memory left. Any thread may call this.
void* take_memory(int64_t bytes, const void* source);

// Gives back what take_memory returned.
void keep_memory(void* data);

// Unmaps what waits.
void empty_cache();

}  // namespace dsconv
