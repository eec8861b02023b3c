// Ways to run a kernel's slots. Every one must give the same bits.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "problem.h"

namespace dsconv::core_test {

inline int64_t largest_parallel_count = 0;  // of the launches so far, written by the launching thread alone

using Body = void (*)(void* context, int64_t index);

inline void in_reverse(int64_t count, Body body, void* context) {
  largest_parallel_count = std::max(largest_parallel_count, count);
  for (int64_t i = count - 1; i >= 0; --i) body(context, i);
}

template <int threads>
void on_threads(int64_t count, Body body, void* context) {
  largest_parallel_count = std::max(largest_parallel_count, count);
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

struct Schedule {
  const char* name;
  Runtime runtime;
};
constexpr Schedule kSchedules[] = {{"1 thread", {1, on_threads<1>, nullptr}},
                                   {"2 threads", {2, on_threads<2>, nullptr}},
                                   {"4 threads", {4, on_threads<4>, nullptr}},
                                   {"4 slots in reverse order", {4, in_reverse, nullptr}}};

}  // namespace dsconv::core_test
