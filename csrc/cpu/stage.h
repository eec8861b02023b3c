// Staging: a box of a strided tensor, one block of channels wide, becomes a dense tile [d][h][w][block] of the compute
// type with zeros where the box leaves the tensor. Every layout, dtype and padding ends here; the arithmetic behind it
// sees one format.
#pragma once

#include "activation_rows.h"

namespace dsconv::cpu::DSCONV_ISA {

// Which channels the lanes of a block hold: lane l is channel offset[l] / stride of the tensor; lanes beyond `count`
// are zero.
template <class T>
struct LaneMap {
  int count;
  bool dense;  // offset[l] == l: the lanes are neighbours in memory
  int64_t offset[kBlock<T>];
};

// Lane l holds channel (first + l) * step / divide.
template <class T>
DSCONV_INLINE LaneMap<T> map_lanes(int64_t first, int64_t channels, int64_t step, int64_t divide, int64_t plus,
                                   int64_t stride) {
  LaneMap<T> map;
  map.count = static_cast<int>(min64(kBlock<T>, channels - first));
  for (int l = 0; l < map.count; ++l) map.offset[l] = ((first + l) * step / divide + plus) * stride;
  map.dense = stride == 1 && step == 1 && divide == 1;
  return map;
}

struct Box {
  int64_t origin[3];
  int64_t extent[3];
};

// One row of positions: tile[w][block] = src[w * stride + lane offsets].
template <class S, class T = Compute<S>>
static void stage_row(T* tile, const S* src, const LaneMap<T>& lanes, int64_t count, int64_t stride) {
  constexpr int kB = kBlock<T>;
  if (lanes.dense) {
    src += lanes.offset[0];
    if (lanes.count == kB) {
      for (int64_t w = 0; w < count; ++w) widen_row<S>(tile + w * kB, src + w * stride, kB);
      return;
    }
    for (int64_t w = 0; w < count; ++w) {
      int l = 0;
      for (; l < lanes.count; ++l) tile[w * kB + l] = widen(src[w * stride + l]);
      for (; l < kB; ++l) tile[w * kB + l] = T(0);
    }
    return;
  }
  for (int l = 0; l < lanes.count; ++l) {
    const S* lane = src + lanes.offset[l];
    for (int64_t w = 0; w < count; ++w) tile[w * kB + l] = widen(lane[w * stride]);
  }
  for (int l = lanes.count; l < kB; ++l) {
    for (int64_t w = 0; w < count; ++w) tile[w * kB + l] = T(0);
  }
}

// `src` points at the image; `stride` are the tensor's spatial strides and `size` its spatial sizes.
template <class S, class T = Compute<S>>
static void stage_box(T* tile, const S* src, const LaneMap<T>& lanes, const Box& box, const int64_t* size,
                      const int64_t* stride) {
  constexpr int kB = kBlock<T>;
  const int64_t width = box.extent[2];
  const int64_t left = min64(width, max64(0, -box.origin[2])),
                right = min64(width, max64(left, size[2] - box.origin[2]));
  for (int64_t z = 0; z < box.extent[0]; ++z) {
    for (int64_t y = 0; y < box.extent[1]; ++y, tile += width * kB) {
      const int64_t d = box.origin[0] + z, h = box.origin[1] + y;
      const bool inside = d >= 0 && d < size[0] && h >= 0 && h < size[1];
      const int64_t begin = inside ? left : width, end = inside ? right : width;
      memset(tile, 0, begin * kB * sizeof(T));
      if (end > begin) {
        const S* row = src + d * stride[0] + h * stride[1] + (box.origin[2] + begin) * stride[2];
        stage_row<S>(tile + begin * kB, row, lanes, end - begin, stride[2]);
      }
      memset(tile + end * kB, 0, (width - end) * kB * sizeof(T));
    }
  }
}

// The reverse of stage_row: dst[w * stride + lane offsets] = tile[w][block].
template <class S, class T = Compute<S>>
static void unstage_row(S* dst, const T* tile, const LaneMap<T>& lanes, int64_t count, int64_t stride) {
  constexpr int kB = kBlock<T>;
  if (lanes.dense) {
    dst += lanes.offset[0];
    if (lanes.count == kB) {
      for (int64_t w = 0; w < count; ++w) narrow_row<S>(dst + w * stride, tile + w * kB, kB);
      return;
    }
    for (int64_t w = 0; w < count; ++w) narrow_row<S>(dst + w * stride, tile + w * kB, lanes.count);
    return;
  }
  for (int l = 0; l < lanes.count; ++l) {
    S* lane = dst + lanes.offset[l];
    for (int64_t w = 0; w < count; ++w) narrow(tile[w * kB + l], lane + w * stride);
  }
}

// The reverse of stage_box for a box that lies inside the tensor.
template <class S, class T = Compute<S>>
static void unstage_box(S* dst, const T* tile, const LaneMap<T>& lanes, const Box& box, const int64_t* stride) {
  for (int64_t z = 0; z < box.extent[0]; ++z) {
    for (int64_t y = 0; y < box.extent[1]; ++y, tile += box.extent[2] * kBlock<T>) {
      S* row = dst + (box.origin[0] + z) * stride[0] + (box.origin[1] + y) * stride[1] + box.origin[2] * stride[2];
      unstage_row<S>(row, tile, lanes, box.extent[2], stride[2]);
    }
  }
}

// Rounds values to the storage type and back: what memory would have done to them.
template <class S, class T = Compute<S>>
DSCONV_INLINE void round_row(T* values, int64_t count) {
  if constexpr (sizeof(S) == sizeof(T)) return;
  for (int64_t i = 0; i < count; ++i) {
    S s;
    narrow(values[i], &s);
    values[i] = widen(s);
  }
}

// A map of output channels over a box: lane l holds channel (first + l) * step + plus.
template <class S, class T = Compute<S>>
static void stage_outputs(T* tile, const DepthwiseProblem& p, const View& view, int64_t image, int64_t first,
                          int64_t step, int64_t plus, const Box& box) {
  const int64_t channels = step == 1 ? p.channels * p.multiplier : p.channels;
  const LaneMap<T> lanes = map_lanes<T>(first, channels, step, 1, plus, view.stride[1]);
  stage_box<S>(tile, static_cast<const S*>(view.data) + image * view.stride[0], lanes, box, p.window.out,
               view.stride + 2);
}

}  // namespace dsconv::cpu::DSCONV_ISA
