// The kernels of primitives.cu, each of which runs one primitive in one warp: words in, words out.
#pragma once

#include <cstdint>
#include <string_view>

namespace dsconv::simt_test {

constexpr int kLanes = 32, kSharedWords = 512;
constexpr int kCopied = 12;  // words of a thread in `copies`; 9 are copied

struct Words {
  const uint32_t* in;
  uint32_t* out;
};

struct Primitive {
  const char* name;
  void (*kernel)(Words);
  int words_out;  // of each lane
};
const Primitive* find_primitive(std::string_view name);  // null if there is none

}  // namespace dsconv::simt_test
