#include "cuda/fused_rows.cuh"

namespace dsconv::cuda {
namespace {

int narrow(int64_t n) { return static_cast<int>(n); }

// Steps of pointers and positions stay below 2^30, those of tiles that stick out of the map included.
bool fits(const SeparableProblem& p) {
  const Window& w = p.depthwise.window;
  constexpr int64_t kLimit = int64_t{1} << 30, kLargestTile = 256;
  for (int dim : {1, 2}) {
    const int64_t reach = (w.out[dim] + kLargestTile) * w.stride[dim] + w.taps[dim] * w.dilation[dim] + w.pad[dim];
    if (reach >= kLimit || w.in[dim] >= kLimit) return false;
  }
  const int64_t outputs = p.pointwise.out_channels;
  return p.depthwise.batch < kLimit && p.pointwise.in_channels < kLimit && outputs < kLimit &&
         fits_int32(p.depthwise.x, 1, p.depthwise.channels, w.in) && fits_int32(p.pointwise.y, 1, outputs, w.out) &&
         fits_int32(p.pointwise.residual, 1, outputs, w.out);
}

bool aligned(int64_t stride, int64_t size, DType dtype) { return size == 1 || stride * element_size(dtype) % 16 == 0; }

// Strides of dimensions of one element mean nothing.
Map map_of(const View& v, DType dtype, int64_t batch, int64_t channels, const int64_t (&size)[3], bool pixels_inner) {
  const auto stride = [&](int i, int64_t length) { return length == 1 ? 0 : v.stride[i]; };
  Map m{v.data, stride(0, batch), narrow(stride(1, channels)), narrow(stride(3, size[1])), narrow(stride(4, size[2])),
        false};
  const bool others = aligned(m.image, batch, dtype) && aligned(m.row, size[1], dtype) &&
                      aligned(pixels_inner ? m.channel : m.column, pixels_inner ? channels : size[2], dtype);
  m.wide = (pixels_inner ? m.column : m.channel) == 1 && others && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
  return m;
}

// The input of a tile of `rows` x `columns` outputs.
void set_box(FusedParameters& q, const Window& w, int64_t rows, int64_t columns) {
  q.box_rows = narrow(input_extent(rows, w.taps[1], w.stride[1], w.dilation[1]));
  q.box_columns = narrow(input_extent(columns, w.taps[2], w.stride[2], w.dilation[2]));
  q.box_pitch = narrow(round_up(q.box_columns, 2));
  q.row_split = w.stride[1] == 2 ? 2 : 1;
  q.rows_of_phase = (q.box_rows + 1) / 2;
}

}  // namespace

const char* why_not_fused(const SeparableProblem& p, int taps, int stride, bool pixels_inner) {
  const Window& w = p.depthwise.window;
  if (p.depthwise.dtype == DType::f64) return "float64 has no fused kernel";
  if (w.in[0] != 1 || w.out[0] != 1 || w.taps[0] != 1) return "three spatial dimensions";
  if (taps != 0 && w.taps[2] != taps) return "another number of taps along a row";
  const int64_t down = w.out[1] == 1 ? stride : w.stride[1];  // a single row has no stride
  if (stride != 0 && (w.stride[2] != stride || down != stride)) return "another stride";
  if (taps != 0 && w.taps[2] > 1 && w.dilation[2] > 1) return "dilated along a row";
  const View& weight = p.depthwise.weight;
  if (w.taps[1] > 1 && w.taps[2] > 1 && weight.stride[3] != w.taps[2] * weight.stride[4])
    return "the taps of a filter are not evenly spaced";
  const auto last = [](const View& v, int64_t channels) { return channels == 1 || v.stride[1] == 1; };
  if (!pixels_inner && !(last(p.depthwise.x, p.depthwise.channels) && last(p.pointwise.y, p.pointwise.out_channels)))
    return "not channels_last";
  return fits(p) ? nullptr : "offsets within an image, or columns, beyond 2^30";
}

FusedPlan plan_fused(const SeparableProblem& p, const FusedShape& shape, bool pixels_inner, int multiprocessors) {
  const DepthwiseProblem& d = p.depthwise;
  const PointwiseProblem& pw = p.pointwise;
  const Window& w = d.window;
  FusedPlan plan{};
  FusedParameters& q = plan.parameters;
  q.x = map_of(d.x, d.dtype, d.batch, d.channels, w.in, false);
  q.x.wide &= d.multiplier == 1;
  q.y = map_of(pw.y, d.dtype, d.batch, pw.out_channels, w.out, pixels_inner);
  if (pw.residual.data) q.residual = map_of(pw.residual, d.dtype, d.batch, pw.out_channels, w.out, pixels_inner);
  q.depthwise_weight = d.weight.data;
  q.depthwise_bias = d.bias.data;
  q.weight = pw.weight.data;
  q.bias = pw.bias.data;
  q.depthwise_channel = d.weight.stride[0];
  q.depthwise_tap = tap_stride(d);
  q.depthwise_bias_channel = d.bias.stride[0];
  q.weight_output = pw.weight.stride[0];
  q.weight_channel = pw.weight.stride[1];
  q.bias_output = pw.bias.stride[0];
  q.wide_weight = q.weight_channel == 1 && aligned(q.weight_output, pw.out_channels, d.dtype) &&
                  reinterpret_cast<uintptr_t>(q.weight) % 16 == 0;
  q.rows = axis_of(w, 1, 1);
  q.columns = axis_of(w, 2, 1);
  q.row_stride = narrow(w.stride[1]);
  q.column_stride = narrow(w.stride[2]);
  q.channels = narrow(pw.in_channels);
  q.multiplier = narrow(d.multiplier);
  q.outputs = narrow(pw.out_channels);
  q.splits = narrow(ceil_div(pw.out_channels, shape.outputs));
  q.mid = d.activation;
  q.activation = pw.activation;

  // Of the tiles whose box fits, the one with the least to read and to compute. Where columns lie side by side they come
  // in sectors of 32 bytes, and a row of outputs fills one.
  const int64_t taps = (product(w.taps) + 1) * kTapPitch * int64_t{sizeof(float)}, size = element_size(d.dtype);
  const auto bytes = [&] { return shape.operand_bytes + q.box_rows * int64_t{q.box_pitch} * kRowBytes + taps; };
  const auto columns_read = [&] {
    return pixels_inner ? round_up(q.box_columns * size + 16, 32) / size : int64_t{q.box_columns};
  };
  const int narrowest = pixels_inner && size == 2 ? 4 : 3;
  int64_t least = INT64_MAX;
  FusedParameters best = q;
  for (int shift = narrowest; 1 << shift <= shape.pixels; ++shift) {
    const int64_t columns = 1 << shift, rows = shape.pixels >> shift;
    set_box(q, w, rows, columns);
    q.tile_shift = shift;
    q.row_tiles = narrow(ceil_div(w.out[1], rows));
    q.column_tiles = narrow(ceil_div(w.out[2], columns));
    const int64_t work = int64_t{q.row_tiles} * q.column_tiles * (q.box_rows * columns_read() + 2 * shape.pixels);
    const bool wanted = bytes() <= kFusedBytes && work < least;
    if (shift > narrowest && !wanted) continue;
    if (wanted) least = work;
    best = q;
  }
  q = best;
  const int64_t box = bytes() - shape.operand_bytes - taps;
  q.stages = bytes() + box <= kFusedBytes ? 2 : 1;
  plan.shared_bytes = max64(bytes() + (q.stages - 1) * box, shape.sum_bytes);
  plan.blocks = d.batch * q.row_tiles * q.column_tiles * q.splits;
  // Half types take tensor cores, which multiply about 16 times as fast; a tap costs more than its multiply-add.
  const double tap_cost = 2.5, product_cost = d.dtype == DType::f32 ? 1 : 1.0 / 16;
  const double block = q.channels * double(shape.pixels) * (tap_cost * product(w.taps) + product_cost * shape.outputs);
  plan.cost = ceil_div(plan.blocks, multiprocessors) * block;
  return plan;
}

}  // namespace dsconv::cuda
