// Rows of planes between global and shared memory, in the order of memory: neighbouring lanes move neighbouring vectors,
// whatever the width of the map. What is contiguous is one long run.
#pragma once

#include "cuda/copy_async.cuh"
#include "cuda/launch.cuh"
#include "cuda/storage.cuh"
#include "geometry.h"

namespace dsconv::cuda {

// Visits the units of planes x rows x length in the order of memory, the block's threads side by side: no division but
// for the first. The last argument counts a thread's visits up to kFirst, and is a constant of the compiler's.
template <int kFirst = 0, class Visit>
__device__ inline void for_stream(int planes, int rows, int length, Visit visit) {
  const int step = blockDim.x, size = rows * length;
  const int step_plane = step / size, step_row = step % size / length, step_column = step % length;
  int plane = threadIdx.x / size, row = threadIdx.x % size / length, column = threadIdx.x % length;
  const auto advance = [&] {
    column += step_column;
    row += step_row;
    plane += step_plane;
    if (column >= length) {
      column -= length;
      ++row;
    }
    if (row >= rows) {
      row -= rows;
      ++plane;
    }
  };
#pragma unroll
  for (int i = 0; i < kFirst; ++i, advance()) {
    if (plane < planes) visit(plane, row, column, i);
  }
  for (; plane < planes; advance()) visit(plane, row, column, kFirst);
}

// The same for units in a single row.
template <int kFirst = 0, class Visit>
__device__ inline void for_stream(int length, Visit visit) {
  int unit = threadIdx.x;
#pragma unroll
  for (int i = 0; i < kFirst; ++i, unit += blockDim.x) {
    if (unit < length) visit(unit, i);
  }
  for (; unit < length; unit += blockDim.x) visit(unit, kFirst);
}

// A thread's copies of 16 bytes to shared memory. Where copies are not asynchronous, the first kMost stay in registers
// until put(), and the thread does not wait for the data before that.
template <int kMost>
class HeldCopies {
 public:
  static constexpr int kHeld = kAsynchronousCopies ? 0 : kMost;

  __device__ void start() {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) to_[i] = -1;
  }
  // The i-th since start(), a constant: the arrays are registers.
  __device__ void copy(int i, unsigned char* shared, int to, const void* global, int bytes) {
    if (i < kHeld && bytes == 16) {
      data_[i] = __ldg(static_cast<const uint4*>(global));
      to_[i] = to;
    } else {
      copy_async_16(shared + to, global, bytes);
    }
  }
  __device__ void put(unsigned char* shared) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (to_[i] >= 0) *reinterpret_cast<uint4*>(shared + to_[i]) = data_[i];
    }
  }

 private:
  uint4 data_[kHeld > 0 ? kHeld : 1];
  int to_[kHeld > 0 ? kHeld : 1];  // bytes of shared memory, or negative for no copy
};

// How planes of rows x width values lie in global memory and in shared memory (pitches in floats).
struct Planes {
  int64_t plane;
  int row;
  int plane_pitch, row_pitch;
  int run, skew;               // after every run of planes `skew` more floats
  bool with_gaps;              // the stream visits these too: fewer bank conflicts, but cut sectors
  bool rows_are_one;           // contiguous in both
  bool planes_of_run_are_one;  // contiguous in both
  bool in_quads;               // 4 values at once: all runs start equally far behind a vector's place

  DSCONV_HD int at(int plane_index) const { return plane_index * plane_pitch + plane_index / run * skew; }
};

// Rows of a map of `size`, whole and packed, or cut: then each starts as far behind a vector's place as in memory.
inline Planes planes_of(const View& view, const int64_t (&size)[3], int rows, int width, bool whole_rows,
                        bool whole_columns) {
  Planes q{};
  q.plane = view.stride[1];
  q.row = static_cast<int>(size[1] > 1 ? view.stride[3] : size[2]);
  q.row_pitch = whole_rows ? width : static_cast<int>(round_up(width, 4));
  q.plane_pitch = rows * q.row_pitch;
  q.rows_are_one = rows == 1 || (whole_rows && q.row == width);
  q.planes_of_run_are_one = whole_rows && whole_columns && q.rows_are_one && q.plane == q.plane_pitch;
  if (!q.planes_of_run_are_one) q.plane_pitch = static_cast<int>(round_up(q.plane_pitch, 4));
  return q;
}
// Is every group of so many planes as far behind a vector's place as the first?
inline bool can_group(const Planes& q, int planes) {
  return !q.planes_of_run_are_one || planes * q.plane_pitch % 4 == 0;
}
// The floats that are to lie between groups of planes which start an odd multiple of `step` floats apart: a power of two
// from 4 on, or 0 for no matter where.
inline int skew_of(const Planes& q, int group, int step) {
  int skew = 0;
  for (int size = group * q.plane_pitch; step > 0 && ((size + skew) & -(size + skew)) != step;) skew += 4;
  return skew;
}
inline void spread(Planes& q, int planes, int group, int step) {
  q.skew = skew_of(q, group, step);
  q.run = q.skew > 0 ? group : planes;
  q.in_quads = (q.rows_are_one || (q.row % 4 == 0 && q.row_pitch % 4 == 0)) &&
               (q.planes_of_run_are_one || planes == 1 || q.plane % 4 == 0);
}

// The values between the 4-value vector that holds data[first] and data[first].
__device__ inline int behind_vector(const Planes& q, const void* data, int64_t first, DType dtype) {
  const auto address = reinterpret_cast<uintptr_t>(data) / (dtype == DType::f32 ? 4 : 2);
  return q.in_quads ? static_cast<int>((address + first) % 4) : 0;
}

// Visits planes x rows x width values from data[first] on: quad(index, at) for whole vectors of 4 and single(index, at)
// for the rest. `at` is where they lie in shared memory, behind_vector() included, which is returned.
template <class Quad, class Single>
__device__ inline int stream_planes(const Planes& q, const void* data, int64_t first, DType dtype, int planes, int rows,
                                    int width, Quad quad, Single single) {
  const int behind = behind_vector(q, data, first, dtype), unit = q.in_quads ? 4 : 1;
  // Warps start between sectors of 32 bytes.
  const int bytes = dtype == DType::f32 ? 4 : 2;
  const int lead = static_cast<int>((reinterpret_cast<uintptr_t>(data) / bytes + first) % (32 / bytes));
  if (width <= 0 || rows <= 0) return behind;
  int runs = planes, planes_of_run = 1, pitch = q.row_pitch;
  if (q.rows_are_one) {
    width *= rows;
    rows = 1;
    pitch = q.plane_pitch;
  }
  if (q.planes_of_run_are_one) {
    runs = (planes + q.run - 1) / q.run;
    planes_of_run = q.run;
    pitch = q.run * q.plane_pitch + q.skew;
  }
  const int end = lead + width * planes_of_run;
  const int length = q.with_gaps && pitch > end ? pitch : end;
  for_stream(runs, rows, (length + unit - 1) / unit, [&](int run, int row, int index, int) {
    const int plane = run * planes_of_run, column = unit * index - lead;
    const int count = width * (planes - plane < planes_of_run ? planes - plane : planes_of_run);
    const int64_t global = first + plane * q.plane + row * q.row + column;
    const int at = (q.planes_of_run_are_one ? run * pitch : q.at(plane)) + row * q.row_pitch + behind + column;
    if (q.in_quads && column >= 0 && column + 4 <= count) return quad(global, at);
#pragma unroll 1
    for (int i = column < 0 ? -column : 0; i < unit && column + i < count; ++i) single(global + i, at + i);
  });
  return behind;
}

// The part of [begin, begin + size) that exists of [0, limit).
struct Clipped {
  int begin, count;

  __device__ Clipped(int first, int size, int limit) {
    begin = first < 0 ? 0 : first;
    const int end = first + size > limit ? limit : first + size;
    count = end > begin ? end - begin : 0;
  }
};

}  // namespace dsconv::cuda
