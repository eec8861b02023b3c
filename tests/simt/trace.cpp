#include "simt/trace.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "simt/simt.h"

extern "C" char __executable_start, end;  // of the program's code and static data

namespace simt::trace {
namespace {

constexpr int kGranule = 2, kSector = 32, kWarp = 32, kBanks = 32, kWord = 4;

struct Stamp {
  int64_t block = -1, epoch = -1, warp_epoch = -1;
  int thread = -1;
  bool atomic = false;
};
struct Cell {
  Stamp write, read, other_read;  // the last ones; of reads, those of two different threads
};

// A request is what the lanes of a warp do with one instruction at a time: each lane's n-th execution of it since they
// last waited for each other.
struct Event {
  uintptr_t instruction;
  int64_t meeting, execution;
  uintptr_t at;
  int bytes;
  bool shared, write;
  int lane;
};

struct Tracer {
  std::vector<Range> buffers;
  std::vector<std::vector<Cell>> cells;  // of the buffers, then of shared memory
  std::vector<std::vector<bool>> written;
  Range shared{}, stacks{};
  const char* kernel = "";
  const unsigned char* caller_stack = nullptr;
  bool running = false;
  int thread = -1;
  int64_t epoch = 0;
  std::array<int64_t, 32> warp_epoch{};
  std::vector<std::unordered_map<uintptr_t, int64_t>> executions;  // per thread, since it last met others
  std::vector<int64_t> meetings;                                   // per thread
  std::vector<std::vector<Event>> events;                          // per warp
  std::set<std::string> kinds;
  Report report{};
};
Tracer& tracer() {
  static Tracer one;
  return one;
}

bool holds(const Range& range, const unsigned char* p, int bytes) {
  return p >= range.begin && p + bytes <= range.begin + range.bytes;
}

void violate(const std::string& kind, const std::string& what) {
  Tracer& t = tracer();
  if (t.kinds.insert(kind).second)
    t.report.violations.push_back(std::string(t.kernel) + ", block " + std::to_string(blockIdx.x) + ", thread " +
                                  std::to_string(t.thread) + ": " + kind + what);
}

// Could the earlier access and this one happen at the same time?
bool unordered(const Stamp& earlier, const Stamp& now) {
  if (earlier.thread < 0) return false;
  if (earlier.block != now.block) return true;
  if (earlier.thread == now.thread || earlier.epoch != now.epoch) return false;
  const bool same_warp = earlier.thread / kWarp == now.thread / kWarp;
  return !same_warp || earlier.warp_epoch == now.warp_epoch;
}

void check_race(Cell& cell, const Stamp& now, Kind kind, const char* where) {
  const auto race = [&](const Stamp& earlier, const char* what) {
    if (unordered(earlier, now) && !(earlier.atomic && now.atomic))
      violate(std::string("race in ") + where, std::string(": ") + what + " by thread " +
                                                   std::to_string(earlier.thread) + " of block " +
                                                   std::to_string(earlier.block));
  };
  race(cell.write, kind == Kind::read ? "reads what is written" : "writes what is written");
  if (kind == Kind::read) {
    if (cell.read.thread != now.thread || cell.read.block != now.block) cell.other_read = cell.read;
    cell.read = now;
    return;
  }
  race(cell.read, "writes what is read");
  race(cell.other_read, "writes what is read");
  cell.write = now;
}

// The bytes of each sector (of 32) or bank word that the lanes of one request touch, once each.
template <class Visit>
void for_units(const Event* begin, const Event* end, int unit, Visit visit) {
  std::set<uintptr_t> units;
  for (const Event* e = begin; e != end; ++e) {
    for (uintptr_t u = e->at / unit; u <= (e->at + e->bytes - 1) / unit; ++u) units.insert(u);
  }
  for (uintptr_t u : units) visit(u);
}

// Lanes whose words go to the banks together: all with 4 bytes each, half a warp with 8, a quarter with 16.
void count_wavefronts(const Event* begin, const Event* end, Counts& counts) {
  const int lanes = kWarp / std::max(1, begin->bytes / kWord);
  for (const Event* first = begin; first != end;) {
    const Event* last = first;
    while (last != end && last->lane / lanes == first->lane / lanes) ++last;
    std::array<int, kBanks> words{};
    int distinct = 0;
    for_units(first, last, kWord, [&](uintptr_t word) {
      ++words[word % kBanks];
      ++distinct;
    });
    counts.wavefronts += *std::max_element(words.begin(), words.end());
    counts.fewest_wavefronts += (distinct + kBanks - 1) / kBanks;
    first = last;
  }
}

void count_requests(std::vector<Event>& events, Counts& counts) {
  std::sort(events.begin(), events.end(), [](const Event& a, const Event& b) {
    return std::tie(a.instruction, a.meeting, a.execution, a.lane) <
           std::tie(b.instruction, b.meeting, b.execution, b.lane);
  });
  for (size_t first = 0; first < events.size();) {
    size_t last = first;
    while (last < events.size() && events[last].instruction == events[first].instruction &&
           events[last].meeting == events[first].meeting && events[last].execution == events[first].execution)
      ++last;
    const Event *begin = events.data() + first, *end = events.data() + last;
    if (begin->shared) {
      count_wavefronts(begin, end, counts);
    } else {
      for_units(begin, end, kSector, [&](uintptr_t) { ++counts.sectors_requested; });
    }
    first = last;
  }
}

}  // namespace

void set_buffers(std::vector<Range> buffers) {
  Tracer& t = tracer();
  t.buffers = std::move(buffers);
  t.written.clear();
  for (const Range& buffer : t.buffers) t.written.emplace_back(buffer.bytes);
}

const std::vector<Range>& buffers() { return tracer().buffers; }

Report take_report() {
  Tracer& t = tracer();
  for (auto& bytes : t.written) {
    t.report.counts.distinct_bytes_written += std::count(bytes.begin(), bytes.end(), true);
    bytes.assign(bytes.size(), false);
  }
  t.kinds.clear();
  return std::exchange(t.report, {});
}

void begin(const char* kernel, const unsigned char* shared, int64_t shared_bytes, const unsigned char* stacks,
           size_t stack_bytes) {
  Tracer& t = tracer();
  t.kernel = kernel;
  t.shared = {shared, shared_bytes};
  t.stacks = {stacks, static_cast<int64_t>(stack_bytes)};
  t.cells.clear();
  for (const Range& buffer : t.buffers) t.cells.emplace_back(buffer.bytes / kGranule + 1);
  t.cells.emplace_back(shared_bytes / kGranule + 1);
  t.caller_stack = static_cast<const unsigned char*>(__builtin_frame_address(0));
}

void end() {}

void begin_block(int threads) {
  Tracer& t = tracer();
  t.executions.assign(threads, {});
  t.meetings.assign(threads, 0);
  t.events.assign((threads + kWarp - 1) / kWarp, {});
  std::fill(t.cells.back().begin(), t.cells.back().end(), Cell{});
  ++t.epoch;
}

void end_block() {
  Tracer& t = tracer();
  std::set<uintptr_t> read, written;
  for (auto& events : t.events) {
    count_requests(events, t.report.counts);
    for (const Event& e : events) {
      if (!e.shared) for_units(&e, &e + 1, kSector, [&](uintptr_t s) { (e.write ? written : read).insert(s); });
    }
  }
  t.report.counts.sectors_read += static_cast<int64_t>(read.size());
  t.report.counts.sectors_written += static_cast<int64_t>(written.size());
}

void enter_thread(int index) {
  tracer().thread = index;
  tracer().running = true;
}
void leave_thread() { tracer().running = false; }

namespace {
void meet(size_t index) {
  ++tracer().meetings[index];
  tracer().executions[index].clear();
}
}  // namespace

void block_synchronised() {
  ++tracer().epoch;
  for (size_t i = 0; i < tracer().meetings.size(); ++i) meet(i);
}
void warp_synchronised(int warp, unsigned mask) {
  ++tracer().warp_epoch[warp];
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) meet(warp * kWarp + i);
  }
}

namespace {

const unsigned char* plain(const volatile void* at) {
  return const_cast<const unsigned char*>(static_cast<const volatile unsigned char*>(at));
}

// The buffer that holds all of the access, else their number.
size_t buffer_of(const unsigned char* p, int bytes) {
  Tracer& t = tracer();
  size_t buffer = 0;
  while (buffer < t.buffers.size() && !holds(t.buffers[buffer], p, bytes)) ++buffer;
  return buffer;
}

}  // namespace

bool check(const volatile void* at, int bytes, Kind kind) {
  Tracer& t = tracer();
  if (!t.running) return false;
  const unsigned char* const p = plain(at);
  const bool is_stack = holds(t.stacks, p, bytes) || (p >= t.caller_stack && p < t.caller_stack + (1 << 20));
  const bool is_static =
      p >= reinterpret_cast<unsigned char*>(&__executable_start) && p < reinterpret_cast<unsigned char*>(&::end);
  if (is_stack || is_static) return false;
  const bool shared = holds(t.shared, p, bytes);
  const size_t buffer = shared ? 0 : buffer_of(p, bytes);
  if (!shared && buffer == t.buffers.size()) {
    violate(kind == Kind::read ? "reads outside" : "writes outside", " every buffer");
    return false;
  }
  if (std::has_single_bit(static_cast<unsigned>(bytes)) && reinterpret_cast<uintptr_t>(p) % bytes != 0)
    violate("misaligned access", " of " + std::to_string(bytes));
  const unsigned char* const base = shared ? t.shared.begin : t.buffers[buffer].begin;
  std::vector<Cell>& cells = shared ? t.cells.back() : t.cells[buffer];
  const Stamp now{static_cast<int64_t>(blockIdx.x), t.epoch, t.warp_epoch[t.thread / kWarp], t.thread,
                  kind == Kind::atomic};
  for (int i = 0; i < bytes; i += kGranule)
    check_race(cells[(p + i - base) / kGranule], now, kind, shared ? "shared memory" : "global memory");
  return true;
}

void access(const volatile void* at, int bytes, Kind kind, const void* instruction) {
  Tracer& t = tracer();
  if (!t.running) return;
  const bool write = kind == Kind::write;
  const uintptr_t what = 2 * reinterpret_cast<uintptr_t>(instruction) + write;  // a copy does both
  const int64_t execution = t.executions[t.thread][what]++;
  if (bytes == 0 || !check(at, bytes, kind)) return;
  const unsigned char* const p = plain(at);
  const bool shared = holds(t.shared, p, bytes);
  Counts& counts = t.report.counts;
  if (!shared) {
    (write ? counts.bytes_written : counts.bytes_read) += bytes;
    counts.largest_access = std::max<int64_t>(counts.largest_access, bytes);
    const size_t buffer = buffer_of(p, bytes);
    for (int i = 0; write && i < bytes; ++i) t.written[buffer][p + i - t.buffers[buffer].begin] = true;
  }
  t.events[t.thread / kWarp].push_back(
      {what, t.meetings[t.thread], execution, reinterpret_cast<uintptr_t>(p), bytes, shared, write, t.thread % kWarp});
}

}  // namespace simt::trace

using simt::trace::Kind;

#define SIMT_ACCESS(bytes)                                                           \
  extern "C" void __tsan_read##bytes(void* p) {                                      \
    simt::trace::access(p, bytes, Kind::read, __builtin_return_address(0));          \
  }                                                                                  \
  extern "C" void __tsan_write##bytes(void* p) {                                     \
    simt::trace::access(p, bytes, Kind::write, __builtin_return_address(0));         \
  }                                                                                  \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { __tsan_read##bytes(p); }   \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { __tsan_write##bytes(p); } \
  extern "C" void __tsan_volatile_read##bytes(void* p) { __tsan_read##bytes(p); }    \
  extern "C" void __tsan_volatile_write##bytes(void* p) { __tsan_write##bytes(p); }
#if SIMT_TRACED
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) {
  simt::trace::access(p, static_cast<int>(bytes), Kind::read, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  simt::trace::access(p, static_cast<int>(bytes), Kind::write, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
#endif
