#include "cuda/fused_rows.cuh"

#include <algorithm>

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
Map map_of(const View& v, int64_t batch, int64_t channels, const int64_t (&size)[3]) {
  const auto stride = [&](int i, int64_t length) { return length == 1 ? 0 : v.stride[i]; };
  return {v.data, stride(0, batch), narrow(stride(1, channels)), narrow(stride(3, size[1])),
          narrow(stride(4, size[2]))};
}

// Whether neighbouring channels, or columns, can be moved 16 bytes at a time.
bool wide(const View& v, DType dtype, int64_t batch, int64_t channels, const int64_t (&size)[3], bool columns_inner) {
  return v.stride[columns_inner ? 4 : 1] == 1 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0 &&
         aligned(v.stride[0], batch, dtype) && aligned(v.stride[3], size[1], dtype) &&
         (columns_inner ? aligned(v.stride[1], channels, dtype) : aligned(v.stride[4], size[2], dtype));
}

// The input of a tile of `rows` x `columns` outputs.
void set_box(FusedParameters& q, const Window& w, int64_t rows, int64_t columns) {
  q.box_rows = narrow(input_extent(rows, w.taps[1], w.stride[1], w.dilation[1]));
  q.box_columns = narrow(input_extent(columns, w.taps[2], w.stride[2], w.dilation[2]));
  q.box_pitch = narrow(round_up(q.box_columns, 2));
  q.row_split = w.stride[1] == 2 ? 2 : 1;
  q.rows_of_phase = (q.box_rows + 1) / 2;
}

// Everything but how the problem is cut.
FusedParameters parameters_of(const SeparableProblem& p, bool pixels_inner) {
  const DepthwiseProblem& d = p.depthwise;
  const PointwiseProblem& pw = p.pointwise;
  const Window& w = d.window;
  FusedParameters q{};
  q.x = map_of(d.x, d.batch, d.channels, w.in);
  q.y = map_of(pw.y, d.batch, pw.out_channels, w.out);
  if (pw.residual.data) q.residual = map_of(pw.residual, d.batch, pw.out_channels, w.out);
  q.wide_input = d.multiplier == 1 && wide(d.x, d.dtype, d.batch, d.channels, w.in, false);
  const auto whole = [&](const View& v) {
    return !v.data || (wide(v, d.dtype, d.batch, pw.out_channels, w.out, pixels_inner) &&
                       (pixels_inner ? w.out[2] : pw.out_channels) * element_size(d.dtype) % 16 == 0);
  };
  q.wide_outputs = whole(pw.y) && whole(pw.residual);
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
  q.mid = d.activation;
  q.activation = pw.activation;
  return q;
}

// Of a tile.
int64_t pixels_of(const FusedParameters& q) { return int64_t{1} << (q.tile_shift + q.height_shift); }
int64_t threads_of(int64_t pixels) { return 2 * pixels; }

// The bytes of shared memory behind the depthwise values: see FusedBlock.
int64_t staged_bytes(const FusedParameters& q, int64_t outputs, int64_t stages) {
  const int64_t box = int64_t{q.box_rows} * q.box_pitch * kRowBytes, warps = threads_of(pixels_of(q)) / kWarp;
  const int64_t taps = 2 * (int64_t{q.rows.taps} * q.columns.taps + 1) * kTapPitch * int64_t{sizeof(float)};
  const int64_t sums = warps * kSumRows * kSumPitch * int64_t{sizeof(float)};
  return stages * outputs * kRowBytes + max64(stages * box + taps, sums);
}

// One dimension of a map cut into tiles: the positions of the input that these read, and the outputs that are computed,
// `unit` of which are left out together where the map has none.
struct Cut {
  int64_t tiles, positions, outputs;
};
Cut cut(const Window& w, int dim, int64_t outputs, int64_t box, int64_t unit) {
  const int64_t tiles = ceil_div(w.out[dim], outputs);
  const int64_t behind = (tiles - 1) * outputs * w.stride[dim] - w.pad[dim] + box - w.in[dim];
  const int64_t outside = min64(w.pad[dim], box) + min64(max64(behind, 0), box);
  return {tiles, max64(tiles * box - outside, 1), round_up(w.out[dim], unit)};
}

// Of the tiles whose boxes fit into `room`, the one with the least to read and to compute; false if none does. Where
// columns lie side by side they come in sectors of 32 bytes, and a row of outputs fills one.
bool choose_tile(FusedPlan& plan, const SeparableProblem& p, int pixels_shift, int64_t pixels_of_warp, int64_t outputs,
                 bool pixels_inner, int64_t room) {
  const Window& w = p.depthwise.window;
  const int64_t size = element_size(p.depthwise.dtype);
  double least = HUGE_VAL;
  FusedPlan best = plan;
  FusedParameters& q = plan.parameters;
  for (int shift = pixels_inner && size == 2 ? 4 : 3; shift <= pixels_shift; ++shift) {
    q.tile_shift = shift;
    q.height_shift = pixels_shift - shift;
    const int64_t columns = int64_t{1} << q.tile_shift, rows = int64_t{1} << q.height_shift;
    set_box(q, w, rows, columns);
    if (staged_bytes(q, outputs, 2) > room) continue;
    const int64_t columns_of_warp = min64(columns, pixels_of_warp);
    const Cut down = cut(w, 1, rows, q.box_rows, pixels_of_warp / columns_of_warp);
    Cut across = cut(w, 2, columns, q.box_columns, columns_of_warp);
    int64_t box_columns = q.box_columns;
    if (pixels_inner) {
      box_columns = round_up(q.box_columns * size + 16, 32) / size;
      across.positions = across.tiles * box_columns;
    }
    q.row_tiles = narrow(down.tiles);
    q.column_tiles = narrow(across.tiles);
    plan.map = {double(down.positions) * double(across.positions), double(down.outputs) * double(across.outputs)};
    plan.tile = {double(min64(q.box_rows, down.positions)) * double(min64(box_columns, across.positions)),
                 double(min64(rows, down.outputs)) * double(min64(columns, across.outputs))};
    const double work = plan.map.positions + 2 * plan.map.pixels;
    if (work >= least) continue;
    least = work;
    best = plan;
  }
  plan = best;
  return least < HUGE_VAL;
}

// What a multiprocessor keeps for itself of the shared memory of each block.
int64_t reserved_bytes(const Machine& machine) { return machine.sm >= 80 ? 1 << 10 : 0; }

// In units of one multiply-add: a tap with its loads, and what is done once for a depthwise value.
constexpr double kTapCost = 2, kValueCost = 6;
// A step's barrier and the latencies that nothing hides, of which a block has some at its beginning and its end. Copies
// have twice the time to arrive where three stages are under way.
constexpr double kStepNs = 100, kStepsAround = 4;
// Of plans about as fast that with the largest tiles is taken: it reads the least.
constexpr double kWorthwhile = 0.97;

// Times of the busiest multiprocessor, of which `beside` blocks run at once.
void estimate(FusedPlan& plan, const SeparableProblem& p, int64_t outputs, const Machine& machine, int64_t beside) {
  const FusedParameters& q = plan.parameters;
  const double rate = machine.peak_gflops / 2 / machine.multiprocessors;  // multiply-adds of a nanosecond
  const int64_t size = element_size(p.depthwise.dtype);
  const int64_t of_one = ceil_div(plan.blocks, machine.multiprocessors);
  const double maps = double(of_one) / (double(q.row_tiles) * q.column_tiles);
  const auto of_blocks = [&](double tile, double map) { return std::max(tile, maps * map); };
  const double values = of_blocks(plan.tile.pixels, plan.map.pixels) * q.channels;
  const double depthwise = values * (kTapCost * double(product(p.depthwise.window.taps)) + kValueCost) / rate;
  const double products = values * double(outputs) * q.tiles / (rate * product_rate(p.pointwise, machine));
  const double rows_read =
      of_blocks(plan.tile.positions, plan.map.positions) + double(of_one) * double(outputs) * q.tiles;
  const double read = rows_read * q.channels * double(size) / (machine.cache_gbs / machine.multiprocessors);
  // Tensor cores work beside the others.
  const bool tensor = product_rate(p.pointwise, machine) > 1;
  const double busy = std::max(tensor ? std::max(depthwise, products) : depthwise + products, read);
  const double steps = kStepsAround + double(ceil_div(q.channels, kRowBytes / size)) * q.tiles;
  plan.busy_us = 1e-3 * busy;
  plan.latency_us = 1e-3 * double(ceil_div(of_one, beside)) * steps * kStepNs / (q.stages - 1);
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

FusedPlan plan_fused(const SeparableProblem& p, int64_t outputs, int64_t resident_threads, bool pixels_inner,
                     Dataflow dataflow, const Machine& machine) {
  FusedPlan best{};
  best.busy_us = HUGE_VAL;
  FusedPlan plan{};
  FusedParameters& q = plan.parameters;
  q = parameters_of(p, pixels_inner);
  const bool resident = dataflow == Dataflow::resident;
  q.resident = resident ? -1 : 1;
  const int64_t output_tiles = ceil_div(p.pointwise.out_channels, outputs);
  const int64_t chunks = ceil_div(p.pointwise.in_channels, kRowBytes / element_size(p.depthwise.dtype));
  if (resident && output_tiles < 2) return best;

  // Of large tiles come the fewest reads, of small ones the most blocks and the smallest boxes. A warp has 32 pixels, or
  // half as many as outputs.
  const int64_t least_pixels = pixels_inner ? outputs / 2 : 32;
  for (int pixels_shift = kMostPixelsShift; 1 << pixels_shift >= least_pixels; --pixels_shift) {
    const int64_t reserved = reserved_bytes(machine), room = machine.shared_bytes - reserved;
    const int64_t map = (resident ? chunks : 2) * (kRowBytes << pixels_shift);
    if (!choose_tile(plan, p, pixels_shift, least_pixels, outputs, pixels_inner, room - map)) continue;
    plan.threads = narrow(threads_of(pixels_of(q)));
    // Blocks that a multiprocessor runs at once.
    const auto beside = [&](int64_t stages) {
      const int64_t bytes = map + staged_bytes(q, outputs, stages) + reserved;
      const int64_t fit = min64(resident_threads / plan.threads, machine.shared_bytes / bytes);
      return min64(fit, ceil_div(plan.blocks, machine.multiprocessors));
    };
    // The fewer tiles of outputs a block has, the more blocks there are, and the more often depthwise values are made.
    for (int64_t splits = resident ? 1 : output_tiles; splits <= output_tiles; splits *= 2) {
      q.tiles = narrow(ceil_div(output_tiles, splits));
      q.splits = narrow(ceil_div(output_tiles, q.tiles));
      if (resident && q.tiles < 2) break;
      plan.blocks = p.depthwise.batch * q.row_tiles * q.column_tiles * q.splits;
      if (plan.blocks > kLargestGrid) break;
      q.stages = machine.sm >= 80 && beside(3) == beside(2) ? 3 : 2;
      plan.shared_bytes = map + staged_bytes(q, outputs, q.stages);
      estimate(plan, p, outputs, machine, beside(q.stages));
      if (plan.us() < kWorthwhile * best.us()) best = plan;
    }
  }
  return best;
}

double fused_memory_us(const SeparableProblem& p, const Machine& machine) {
  const DepthwiseProblem& d = p.depthwise;
  const PointwiseProblem& w = p.pointwise;
  const double values = double(numel(d.batch, d.channels, d.window.in)) +
                        double(numel(d.batch, w.out_channels, w.size)) * (w.residual.data ? 2 : 1) +
                        double(w.in_channels) * double(w.out_channels);
  const double bytes = values * double(element_size(d.dtype));
  return 1e-3 * bytes / (bytes > double(machine.cache_bytes) ? machine.memory_gbs : machine.cache_gbs);
}

}  // namespace dsconv::cuda
