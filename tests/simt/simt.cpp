#include "simt/simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "simt/trace.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SIMT_POISON(begin, bytes) __asan_poison_memory_region(begin, bytes)
#define SIMT_UNPOISON(begin, bytes) __asan_unpoison_memory_region(begin, bytes)
#else
#define SIMT_POISON(begin, bytes) ((void)(begin), (void)(bytes))
#define SIMT_UNPOISON(begin, bytes) ((void)(begin), (void)(bytes))
#endif

// Saves the callee-saved registers on the stack of the fibre that leaves and takes them from that of the one that comes.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

extern "C" char __executable_start;

namespace simt {

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
Order order = Order::forward;
bool dry = false;
Extent largest{};
std::FILE* record = nullptr;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kMaxThreads = 1024, kBand = 256;
constexpr int64_t kMaxSharedBytes = 227 << 10, kSharedTotal = kMaxSharedBytes + 2 * kBand;  // of any GPU

enum class State : uint8_t { runnable, at_barrier, in_exchange, done };

struct Copy {
  unsigned char* to;
  const void* from;
  int size, bytes;          // the rest of the size becomes 0
  int64_t group;            // of its thread
  const void* instruction;  // that asked for it
};

struct Fibre {
  void* stack_pointer;
  State state;
  std::source_location site;
  unsigned mask;  // of the exchange
  bool orders_memory;
  unsigned char value[Lanes::kBytes];
  std::vector<Copy> copies;
  int64_t groups;  // committed
};

struct Machine {
  unsigned char *stacks, *shared;
  std::vector<Fibre> fibres{kMaxThreads};
  Lanes exchanged[kMaxThreads / 32];
  void* scheduler;
  int current, threads;
  int64_t shared_bytes;
  const std::function<void()>* thread;
  std::string failure;

  Machine() {
    const size_t bytes = kStackBytes * kMaxThreads;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks = static_cast<unsigned char*>(memory);
    shared = static_cast<unsigned char*>(std::aligned_alloc(128, kSharedTotal));
  }
};
Machine& machine() {
  static Machine one;
  return one;
}

std::string place(const std::source_location& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

void leave(State state) {
  Machine& m = machine();
  m.fibres[m.current].state = state;
  simt_switch(&m.fibres[m.current].stack_pointer, m.scheduler);
}

void main_of_fibre() {
  Machine& m = machine();
  (*m.thread)();
  if (!m.fibres[m.current].copies.empty()) fail("ended with copies that it never waited for");
  leave(State::done);
  std::abort();
}

void enter(int index) {
  Machine& m = machine();
  m.current = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  trace::enter_thread(index);
  simt_switch(&m.scheduler, m.fibres[index].stack_pointer);
  trace::leave_thread();
}

void make_fibre(int index) {
  Machine& m = machine();
  unsigned char* const top = m.stacks + kStackBytes * (index + 1);
  SIMT_UNPOISON(top - kStackBytes, kStackBytes);
  auto* frame = reinterpret_cast<uint64_t*>(top) - 8;  // six registers, the entry, and the alignment of a call
  std::fill(frame, frame + 8, 0);
  frame[6] = reinterpret_cast<uint64_t>(&main_of_fibre);
  Fibre& fibre = m.fibres[index];
  fibre.stack_pointer = frame;
  fibre.state = State::runnable;
  fibre.copies.clear();
  fibre.groups = 0;
}

bool same_place(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column();
}

// Lets the exchange of a warp happen when every lane of its mask has come; false when nothing could.
bool release_warp(int warp) {
  Machine& m = machine();
  const int first = warp * 32, count = std::min(32, m.threads - first);
  for (int i = 0; i < count; ++i) {
    const Fibre& one = m.fibres[first + i];
    if (one.state != State::in_exchange) continue;
    bool complete = true;
    for (int j = 0; j < 32; ++j) {
      if (!(one.mask >> j & 1)) continue;
      complete = complete && j < count && m.fibres[first + j].state == State::in_exchange &&
                 m.fibres[first + j].mask == one.mask && same_place(m.fibres[first + j].site, one.site);
    }
    if (!complete || !(one.mask >> i & 1)) continue;
    const unsigned mask = one.mask;
    for (int j = 0; j < count; ++j) {
      if (!(mask >> j & 1)) continue;
      m.exchanged[warp].bring(j, m.fibres[first + j].value);
      m.fibres[first + j].state = State::runnable;
    }
    if (one.orders_memory) trace::warp_synchronised(warp, mask);
    return true;
  }
  return false;
}

std::string describe(int index) {
  const Fibre& fibre = machine().fibres[index];
  const std::string who = "thread " + std::to_string(index);
  if (fibre.state == State::done) return who + " has ended";
  return who + (fibre.state == State::at_barrier ? " waits at the barrier of " : " waits in the exchange of ") +
         place(fibre.site);
}

// All threads wait or have ended: opens the barrier, or says why nothing goes on.
void release_block() {
  Machine& m = machine();
  const auto waits_like = [&](int a, int b) {
    const Fibre &one = m.fibres[a], &other = m.fibres[b];
    return one.state == other.state && same_place(one.site, other.site);
  };
  int waiting = 0, other = 0;
  while (m.fibres[waiting].state == State::done) ++waiting;
  while (other < m.threads && waits_like(waiting, other)) ++other;
  if (other < m.threads || m.fibres[waiting].state != State::at_barrier) {
    m.failure = "divergent barrier: " + describe(waiting) + ", " + describe(std::min(other, m.threads - 1));
    return;
  }
  for (int i = 0; i < m.threads; ++i) m.fibres[i].state = State::runnable;
  trace::block_synchronised();
}

template <class Index>
void arrange(std::vector<Index>& sequence, std::mt19937& random) {
  if (order == Order::reverse) std::reverse(sequence.begin(), sequence.end());
  if (order == Order::shuffled) std::shuffle(sequence.begin(), sequence.end(), random);
}

void run_block(std::mt19937& random) {
  Machine& m = machine();
  for (int i = 0; i < m.threads; ++i) make_fibre(i);
  std::vector<int> sequence(m.threads);
  while (m.failure.empty()) {
    sequence.clear();
    for (int i = 0; i < m.threads; ++i) {
      if (m.fibres[i].state == State::runnable) sequence.push_back(i);
    }
    arrange(sequence, random);
    for (int i : sequence) enter(i);
    bool goes_on = false;
    for (int warp = 0; warp * 32 < m.threads; ++warp) {
      while (release_warp(warp)) goes_on = true;
    }
    if (goes_on) continue;
    if (std::all_of(m.fibres.begin(), m.fibres.begin() + m.threads,
                    [](const Fibre& f) { return f.state == State::done; }))
      return;
    release_block();
  }
}

void record_bytes(const void* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) std::fprintf(record, "%02x", static_cast<const unsigned char*>(begin)[i]);
  std::fputc('\n', record);
}

void record_buffers(const char* when) {
  for (const trace::Range& buffer : trace::buffers()) {
    std::fprintf(record, "%s %zu ", when, reinterpret_cast<size_t>(buffer.begin));
    record_bytes(buffer.begin, buffer.bytes);
  }
}

// The function as its distance from the start of the program, as nm prints it.
void record_launch(const Kernel& kernel, const Grid& grid) {
  std::fprintf(record, "launch %td %lld %d %lld ", static_cast<const char*>(kernel.function) - &__executable_start,
               static_cast<long long>(grid.blocks), grid.threads, static_cast<long long>(grid.shared_bytes));
  record_bytes(kernel.parameters, static_cast<int64_t>(kernel.parameter_bytes));
}

}  // namespace

void run(const Kernel& kernel, const Grid& grid, const std::function<void()>& thread) {
  Machine& m = machine();
  if (grid.blocks < 1 || grid.blocks > INT32_MAX || grid.threads < 1 || grid.threads > kMaxThreads ||
      grid.shared_bytes < 0 || grid.shared_bytes > kMaxSharedBytes)
    throw Violation(std::string(kernel.name) + ": a launch of " + std::to_string(grid.blocks) + " blocks, " +
                    std::to_string(grid.threads) + " threads, " + std::to_string(grid.shared_bytes) +
                    " bytes of shared memory");
  largest.blocks = std::max(largest.blocks, grid.blocks);
  largest.shared_bytes = std::max(largest.shared_bytes, grid.shared_bytes);
  largest.kernel = kernel.name;
  if (dry) return;
  m.threads = grid.threads;
  m.shared_bytes = grid.shared_bytes;
  m.thread = &thread;
  m.failure.clear();
  gridDim = {static_cast<unsigned>(grid.blocks), 1, 1};
  blockDim = {static_cast<unsigned>(grid.threads), 1, 1};
  SIMT_UNPOISON(m.shared, kSharedTotal);
  SIMT_POISON(m.shared, kBand);
  SIMT_POISON(m.shared + kBand + grid.shared_bytes, kSharedTotal - kBand - grid.shared_bytes);
  if (record) {
    record_launch(kernel, grid);
    record_buffers("before");
  }
  trace::begin(kernel.name, m.shared + kBand, grid.shared_bytes, m.stacks, kStackBytes * kMaxThreads);
  std::mt19937 random(1);
  std::vector<int64_t> blocks(grid.blocks);
  for (int64_t i = 0; i < grid.blocks; ++i) blocks[i] = i;
  arrange(blocks, random);
  for (int64_t block : blocks) {
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    std::memset(m.shared + kBand, 0xff, grid.shared_bytes);  // NaN
    trace::begin_block(grid.threads);
    run_block(random);
    trace::end_block();
    if (!m.failure.empty()) break;
  }
  trace::end();
  if (record) record_buffers("after");
  if (!m.failure.empty())
    throw Violation(std::string(kernel.name) + ", block " + std::to_string(blockIdx.x) + ": " + m.failure);
}

void* shared_memory() { return machine().shared + kBand; }
bool in_shared_memory(const void* at, int bytes) {
  const auto* const begin = static_cast<const unsigned char*>(shared_memory());
  const auto* const p = static_cast<const unsigned char*>(at);
  return p >= begin && p + bytes <= begin + machine().shared_bytes;
}
int lane() { return machine().current % 32; }

void fail(const std::string& what) {
  Machine& m = machine();
  if (m.failure.empty()) m.failure = "thread " + std::to_string(m.current) + " " + what;
}

void block_barrier(const std::source_location& site) {
  machine().fibres[machine().current].site = site;
  leave(State::at_barrier);
}

namespace {

void meet_warp(unsigned mask, bool orders_memory, const std::source_location& site) {
  Fibre& self = machine().fibres[machine().current];
  self.site = site;
  self.mask = mask;
  self.orders_memory = orders_memory;
  leave(State::in_exchange);
}

}  // namespace

void warp_barrier(unsigned mask, const std::source_location& site) { meet_warp(mask, true, site); }

const Lanes& warp_exchange(unsigned mask, const void* value, size_t bytes, const std::source_location& site) {
  Machine& m = machine();
  std::memcpy(m.fibres[m.current].value, value, bytes);
  meet_warp(mask, false, site);
  return m.exchanged[m.current / 32];
}

void copy_async(void* shared, const void* global, int size, int bytes) {
  Fibre& self = machine().fibres[machine().current];
  const auto misaligned = [size](const void* p) { return reinterpret_cast<uintptr_t>(p) % size != 0; };
  if (bytes < 0 || bytes > size)
    return fail("copies " + std::to_string(bytes) + " of " + std::to_string(size) + " bytes");
  if (misaligned(shared) || misaligned(global)) return fail("copies " + std::to_string(size) + " misaligned bytes");
  if (!in_shared_memory(shared, size)) return fail("copies to outside shared memory");
  const void* const instruction = __builtin_return_address(0);
  trace::access(global, bytes, trace::Kind::read, instruction);
  trace::check(shared, size, trace::Kind::write);  // it may arrive from now on
  std::memset(shared, 0xff, size);                 // NaN
  self.copies.push_back({static_cast<unsigned char*>(shared), global, size, bytes, self.groups, instruction});
}

void commit_copies() { ++machine().fibres[machine().current].groups; }

void wait_for_copies_but(int pending) {
  Fibre& self = machine().fibres[machine().current];
  const auto arrives = [&](const Copy& copy) { return copy.group < self.groups - pending; };
  for (const Copy& copy : self.copies) {
    if (!arrives(copy)) continue;
    trace::access(copy.to, copy.size, trace::Kind::write, copy.instruction);
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, copy.size - copy.bytes);
  }
  std::erase_if(self.copies, arrives);
}

void note_atomic(const void* at, int bytes) { trace::check(at, bytes, trace::Kind::atomic); }

}  // namespace simt
