// Threads that take memory, fill it, read it later and give it back, also what another thread has taken. Exits with 1 if a
// byte is not what was written, or a block does not begin where it should; under the sanitizers that tests/test_core.py
// compiles it with, any other mistake ends it.
#include "ops/kept_memory.h"

#include <cstdio>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace {

struct Item {
  unsigned char* data;
  int64_t bytes;
  unsigned char value;

  bool intact() const {
    for (int64_t i = 0; i < bytes; i += 997)
      if (data[i] != value) return false;
    return data[bytes - 1] == value;
  }
};

std::mutex mutex;
std::vector<Item> live;  // of all threads
int wrong = 0;

void use(int seed) {
  std::minstd_rand random(seed);
  for (int i = 0; i < 200; ++i) {
    const int64_t bytes = (64 << 10) + random() % (6 << 20);
    const Item item{static_cast<unsigned char*>(dsconv::take_memory(bytes, &random)), bytes,
                    static_cast<unsigned char>(random())};
    const auto place = [](const void* p) { return reinterpret_cast<uintptr_t>(p) / 64; };
    const bool good =
        item.data && reinterpret_cast<uintptr_t>(item.data) % 64 == 0 && (place(item.data) - place(&random)) % 16 == 5;
    if (good) std::memset(item.data, item.value, bytes);
    Item old{};
    {
      const std::lock_guard lock{mutex};
      wrong += !good;
      if (good) live.push_back(item);
      if (live.size() > 12) {
        std::swap(live[random() % live.size()], live.back());
        old = live.back();
        live.pop_back();
      }
    }
    if (!old.data) continue;
    const bool intact = old.intact();
    dsconv::keep_memory(old.data);
    if (i % 50 == 0) dsconv::empty_cache();
    const std::lock_guard lock{mutex};
    wrong += !intact;
  }
}

}  // namespace

int main() {
  std::vector<std::thread> threads;
  for (int t = 1; t <= 6; ++t) threads.emplace_back(use, t);
  for (std::thread& thread : threads) thread.join();
  for (const Item& item : live) {
    wrong += !item.intact();
    dsconv::keep_memory(item.data);
  }
  dsconv::empty_cache();
  std::printf("wrong: %d\n", wrong);
  return wrong != 0;
}
