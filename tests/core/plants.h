// Planted bugs: with --plant NAME every kernel commits one, and the driver must notice. tests/test_core.py runs them all.
#pragma once

#include <chrono>
#include <climits>

#include "bind.h"
#include "schedules.h"

namespace dsconv::core_test {

enum class Plant : uint8_t {
  none,
  write_behind,      // one element behind the output
  write_before,      // one element before it
  write_input,       // the input is scratch
  workspace_behind,  // one byte behind the workspace
  read_behind,       // a vector behind the input
  skip_channel,      // the last channel stays as it was
  drop_product,      // one product less in every sum
  half_sums,         // results as if sums were kept in bfloat16
  count_threads,     // bits that depend on the number of threads
  order_of_slots,    // bits that depend on the slot that comes first
  race,              // slots share a variable: TSan's business
  overflow,          // of a signed number: UBSan's business
  wide_instruction   // one of AVX-512, wherever this runs: an emulator's business
};
constexpr const char* kPlants[] = {
    "none",           "write_behind", "write_before", "write_input",     "workspace_behind",
    "read_behind",    "skip_channel", "drop_product", "half_sums",       "count_threads",
    "order_of_slots", "race",         "overflow",     "wide_instruction"};

// The smaller problem that a kernel with a mistake in its loops would solve.
inline Spec misread(Spec s, Plant plant) {
  int64_t* size = nullptr;
  if (plant == Plant::skip_channel) size = s.pointwise() ? &s.filters : &s.channels;
  if (plant == Plant::drop_product) {
    const bool wgrad = s.pass == Pass::depthwise_wgrad || s.pass == Pass::pointwise_wgrad;
    if (s.pass == Pass::mask) s.activation = {};  // no sums: the derivative is forgotten instead
    size = wgrad ? &s.out[2] : s.pass == Pass::pointwise_fwd ? &s.channels : &s.taps[2];
    s.packed = 0;
  }
  if (size && *size > 1) --*size;
  return s;
}

inline unsigned char* first_byte(const Tensors& tensors) { return tensors.begin()->second.buffer().data(); }

inline void touch_memory(Plant plant, const Tensors& inputs, const Tensors& outputs, const Buffer& workspace) {
  const Tensor &in = inputs.begin()->second, &out = outputs.begin()->second;
  const int64_t size = element_size(out.dtype());
  if (plant == Plant::write_behind) std::memset(out.buffer().data() + out.buffer().bytes(), 0, size);
  if (plant == Plant::write_before) std::memset(out.buffer().data() - size, 0, size);
  if (plant == Plant::write_input) first_byte(inputs)[0] ^= 1;
  if (plant == Plant::workspace_behind) workspace.data()[workspace.bytes()] = 0;
  if (plant == Plant::read_behind) {
    volatile unsigned char sink = in.buffer().data()[in.buffer().bytes() + 63];
    (void)sink;
  }
}

inline void depend_on_threads(Plant plant, const Runtime& runtime, const Tensors& outputs) {
  static int64_t first, shared;
  if (plant == Plant::count_threads && runtime.threads > 1) first_byte(outputs)[0] ^= 1;
  if (plant == Plant::order_of_slots) {
    first = -1;
    auto note = [](void*, int64_t slot) {
      if (first < 0) first = slot;
    };
    if (runtime.parallel == in_reverse) runtime.parallel(2, note, nullptr);
    if (first == 1) first_byte(outputs)[0] ^= 1;
  }
  auto count = [](void*, int64_t) {
    ++shared;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // leaves the other threads their slots
  };
  if (plant == Plant::race) runtime.parallel(16, count, nullptr);
}

inline void lose_precision(Tensors& outputs) {
  for (auto& [role, tensor] : outputs) {
    Values values = tensor.values();
    for (double& value : values) value = rounded(DType::bf16, value);
    tensor.fill(values);
  }
}

// What a buggy kernel does besides its work.
inline void misbehave(Plant plant, const Runtime& runtime, const Tensors& inputs, Tensors& outputs,
                      const Buffer& workspace) {
  if (plant == Plant::none) return;
  touch_memory(plant, inputs, outputs, workspace);
  depend_on_threads(plant, runtime, outputs);
  if (plant == Plant::half_sums) lose_precision(outputs);
  volatile int largest = INT_MAX;
  if (plant == Plant::overflow) largest = largest + 1;
#if DSCONV_X86
  if (plant == Plant::wide_instruction) asm volatile("vpxord %%zmm0, %%zmm0, %%zmm0" ::: "xmm0");
#else
  if (plant == Plant::wide_instruction) __builtin_trap();
#endif
}

}  // namespace dsconv::core_test
