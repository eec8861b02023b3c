// Rows of planes between global and shared memory, in the order of memory: neighbouring lanes move neighbouring vectors,
// whatever the width of the map. What is contiguous is one long run.
#pragma once

#include "cuda/copy_async.cuh"
#include "cuda/launch.cuh"
#include "cuda/storage.cuh"
#include "geometry.h"

namespace dsconv::cuda {

// Visits the units of planes x rows x length in the order of memory, the block's threads side by side: no division but
// for the first.
template <class Visit>
__device__ inline void for_stream(int planes, int rows, int length, Visit visit) {
  const int step = blockDim.x, size = rows * length;
  const int step_plane = step / size, step_row = step % size / length, step_column = step % length;
  int plane = threadIdx.x / size, row = threadIdx.x % size / length, column = threadIdx.x % length;
  while (plane < planes) {
    visit(plane, row, column);
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
  }
}

// How planes of rows x width values lie in global memory and in shared memory (pitches in floats).
struct Planes {
  int64_t plane;
  int row;
  int plane_pitch, row_pitch;
  bool rows_are_one, planes_are_one;  // contiguous in both
  bool in_quads;                      // 4 values at once: all runs start equally far behind a vector's place
};

// Rows of a map of `size`, whole and packed, or cut: then each starts as far behind a vector's place as in memory.
// plane_pitch may grow before settle().
inline Planes planes_of(const View& view, const int64_t (&size)[3], int rows, int width, bool whole_rows) {
  Planes q{};
  q.plane = view.stride[1];
  q.row = static_cast<int>(size[1] > 1 ? view.stride[3] : size[2]);
  q.row_pitch = whole_rows ? width : static_cast<int>(round_up(width, 4));
  q.plane_pitch = rows * q.row_pitch;
  q.rows_are_one = rows == 1 || (whole_rows && q.row == width);
  return q;
}
// `whole`: the box holds all rows and columns of the map.
inline void settle(Planes& q, bool whole) {
  q.planes_are_one = whole && q.rows_are_one && q.plane == q.plane_pitch;
  q.in_quads = (q.rows_are_one || (q.row % 4 == 0 && q.row_pitch % 4 == 0)) &&
               (q.planes_are_one || (q.plane % 4 == 0 && q.plane_pitch % 4 == 0));
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
  if (width <= 0 || rows <= 0) return behind;
  int pitch = q.row_pitch;
  if (q.rows_are_one) {
    width *= rows;
    rows = 1;
    pitch = q.plane_pitch;
  }
  if (q.planes_are_one) {
    width *= planes;
    planes = 1;
  }
  // In the order of shared memory, what lies between its runs included: neighbouring lanes are in different banks.
  const int end = behind + width, length = planes * rows > 1 && pitch > end ? pitch : end;
  for_stream(planes, rows, (length + unit - 1) / unit, [&](int plane, int row, int index) {
    const int column = unit * index - behind;
    const int64_t global = first + plane * q.plane + row * q.row + column;
    const int at = plane * q.plane_pitch + row * q.row_pitch + behind + column;
    if (q.in_quads && column >= 0 && column + 4 <= width) return quad(global, at);
#pragma unroll 1
    for (int i = column < 0 ? -column : 0; i < unit && column + i < width; ++i) single(global + i, at + i);
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
