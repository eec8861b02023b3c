// Tensors as the driver hands them to a kernel: exactly sized, between guard bands, NaN wherever nothing was stored.
#pragma once

#include <sys/mman.h>
#include <unistd.h>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "geometry.h"
#include "problem.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define CORE_POISON(begin, bytes) __asan_poison_memory_region(begin, bytes)
#define CORE_UNPOISON(begin, bytes) __asan_unpoison_memory_region(begin, bytes)
#else
#define CORE_POISON(begin, bytes) ((void)(begin), (void)(bytes))
#define CORE_UNPOISON(begin, bytes) ((void)(begin), (void)(bytes))
#endif

namespace dsconv::core_test {

constexpr unsigned char kFresh = 0xff;  // a NaN in every floating dtype

// `bytes` bytes, `offset` bytes behind a cache line. The bands on both sides are poisoned under ASan (whose shadow
// cannot see the last 7 bytes before an odd start) and looked at by intact() otherwise. A buffer that `ends_page` has the
// rest of a cache line behind it and then a page that cannot be read: a vector too much is noticed without ASan, too.
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t offset, bool ends_page = false) : bytes_(bytes), front_(kBand + offset) {
    total_ = static_cast<int64_t>(round_up(front_ + bytes + (ends_page ? 0 : kBand), 64));
    const int64_t page = page_bytes(), pages = round_up(total_, page) + page;
    void* map = mmap(nullptr, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) std::abort();
    map_ = std::unique_ptr<unsigned char, Unmap>(static_cast<unsigned char*>(map), Unmap{pages});
    if (mprotect(map_.get() + pages - page, page, PROT_NONE) != 0) std::abort();
    base_ = map_.get() + pages - page - total_;
    std::memset(base_, kFresh, total_);
    CORE_POISON(base_, front_);
    CORE_POISON(data() + bytes_, total_ - front_ - bytes_ + page);
  }
  ~Buffer() {
    if (map_) CORE_UNPOISON(base_, total_ + page_bytes());
  }
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = delete;

  unsigned char* data() const { return base_ + front_; }
  int64_t bytes() const { return bytes_; }

  bool intact() const {
#if !defined(__SANITIZE_ADDRESS__)
    for (int64_t i = 0; i < front_; ++i) {
      if (base_[i] != kFresh) return false;
    }
    for (int64_t i = front_ + bytes_; i < total_; ++i) {
      if (base_[i] != kFresh) return false;
    }
#endif
    return true;
  }

 private:
  struct Unmap {
    int64_t bytes;
    void operator()(unsigned char* p) const { munmap(p, bytes); }
  };
  static int64_t page_bytes() { return sysconf(_SC_PAGESIZE); }
  static constexpr int64_t kBand = 512;
  std::unique_ptr<unsigned char, Unmap> map_;
  unsigned char* base_;
  int64_t bytes_, front_, total_ = 0;
};

inline double unit_roundoff_twice(DType t) {  // the distance from 1 to the next number
  return t == DType::f64 ? 0x1p-52 : t == DType::f32 ? 0x1p-23 : t == DType::bf16 ? 0x1p-7 : 0x1p-10;
}
inline double smallest(DType t) {  // the spacing of subnormals
  return t == DType::f64 ? 0x1p-1074 : t == DType::f32 ? 0x1p-149 : t == DType::bf16 ? 0x1p-133 : 0x1p-24;
}

#if defined(__aarch64__)
using Half = __fp16;  // what g++ 12 calls it in C++ there
#else
using Half = _Float16;
#endif

inline double load(DType t, const unsigned char* p) {
  auto as = [&]<class T>(T value) {
    std::memcpy(&value, p, sizeof value);
    return value;
  };
  if (t == DType::f64) return as(double{});
  if (t == DType::f32) return as(float{});
  if (t == DType::f16) return as(Half{});
  const uint32_t bits = uint32_t{as(uint16_t{})} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(DType t, unsigned char* p, double x) {
  auto as = [&](auto value) { std::memcpy(p, &value, sizeof value); };
  if (t == DType::f64) return as(x);
  if (t == DType::f32) return as(static_cast<float>(x));
  if (t == DType::f16) return as(static_cast<Half>(x));
  const float value = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t nearest_even = bits + 0x7fff + (bits >> 16 & 1);
  as(static_cast<uint16_t>(std::isnan(value) ? 0x7fc0 : nearest_even >> 16));
}

inline double rounded(DType t, double x) {
  unsigned char bytes[8];
  store(t, bytes, x);
  return load(t, bytes);
}

using Shape = std::array<int64_t, 5>;
using Values = std::vector<double>;  // in [N, C, D, H, W] order

inline int64_t count_of(const Shape& shape) { return shape[0] * shape[1] * shape[2] * shape[3] * shape[4]; }

class Tensor {
 public:
  Tensor(DType dtype, const Shape& shape, const Shape& stride, int64_t offset, bool ends_page)
      : dtype_(dtype), shape_(shape), stride_(stride), buffer_(span() * element_size(dtype), offset, ends_page) {}

  View view() const {
    View view{buffer_.data(), {}};
    for (int i = 0; i < 5; ++i) view.stride[i] = stride_[i];
    return view;
  }
  const Buffer& buffer() const { return buffer_; }
  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }

  // Elements that share memory (stride 0) end up with the value of the last: read them back with values().
  void fill(const Values& values) {
    for_elements([&](int64_t i, int64_t offset) { store(dtype_, at(offset), values[i]); });
  }
  Values values() const {
    Values values(count_of(shape_));
    for_elements([&](int64_t i, int64_t offset) { values[i] = load(dtype_, at(offset)); });
    return values;
  }

  // Are the bands, and the gaps that the strides leave, as they were made?
  bool untouched_outside() const {
    std::vector<bool> inside(buffer_.bytes() / element_size(dtype_));
    for_elements([&](int64_t, int64_t offset) { inside[offset] = true; });
    for (size_t i = 0; i < inside.size(); ++i) {
      if (inside[i]) continue;
      for (int64_t b = 0; b < element_size(dtype_); ++b) {
        if (at(static_cast<int64_t>(i))[b] != kFresh) return false;
      }
    }
    return buffer_.intact();
  }

 private:
  unsigned char* at(int64_t offset) const { return buffer_.data() + offset * element_size(dtype_); }
  int64_t span() const {
    int64_t last = 0;
    for (int i = 0; i < 5; ++i) last += (shape_[i] - 1) * stride_[i];
    return last + 1;
  }
  template <class Body>
  void for_elements(Body body) const {
    int64_t i = 0;
    for (int64_t n = 0; n < shape_[0]; ++n) {
      for (int64_t c = 0; c < shape_[1]; ++c) {
        for (int64_t d = 0; d < shape_[2]; ++d) {
          for (int64_t h = 0; h < shape_[3]; ++h) {
            const int64_t row = n * stride_[0] + c * stride_[1] + d * stride_[2] + h * stride_[3];
            for (int64_t w = 0; w < shape_[4]; ++w) body(i++, row + w * stride_[4]);
          }
        }
      }
    }
  }

  DType dtype_;
  Shape shape_, stride_;
  Buffer buffer_;
};

}  // namespace dsconv::core_test
