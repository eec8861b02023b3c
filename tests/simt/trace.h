// What the threads of a launch did to memory, access by access: races, accesses outside, sectors and wavefronts.
//
// The traced build compiles kernels with -fsanitize=thread and links the functions of trace.cpp instead of the
// sanitizer's: every load and store of a kernel comes here. In other builds nothing does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt::trace {

enum class Kind : uint8_t { read, write, atomic };

struct Range {
  const unsigned char* begin;
  int64_t bytes;
};

// Of global memory: what was asked for, and the 32-byte sectors that moved, per request of a warp and per block. Of
// shared memory: the cycles its banks were busy, and the fewest that could do. Atomics are not counted.
struct Counts {
  int64_t bytes_read, bytes_written;      // asked for, all threads together
  int64_t sectors_requested;              // per request: what the L1 moves
  int64_t sectors_read, sectors_written;  // each once per block: what L2 moves
  int64_t distinct_bytes_written;         // each once per launch
  int64_t wavefronts, fewest_wavefronts;
  int64_t largest_access;  // bytes of one thread at once, global memory
};

struct Report {
  std::vector<std::string> violations;  // the first of each kind
  Counts counts;
};

// The memory the next launch may touch.
void set_buffers(std::vector<Range> buffers);
const std::vector<Range>& buffers();
// What happened since the last call.
Report take_report();

// For simt.cpp.
void begin(const char* kernel, const unsigned char* shared, int64_t shared_bytes, const unsigned char* stacks,
           size_t stack_bytes);
void end();
void begin_block(int threads);
void end_block();
void enter_thread(int index);
void leave_thread();
void block_synchronised();
void warp_synchronised(int warp, unsigned mask);
// An access of the running thread: checked, and counted with what the other lanes of its warp do in this instruction.
// Without bytes it only keeps in step with theirs.
void access(const volatile void* at, int bytes, Kind kind, const void* instruction);
// Checked alone. False when it is none to count: of a stack or static data, or outside.
bool check(const volatile void* at, int bytes, Kind kind);

}  // namespace simt::trace
