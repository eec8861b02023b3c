// geometry.h and choose.h for Python, so that tests choose for machines they do not have. Knows no torch and no CUDA:
// the rows of kernel_table() for CUDA get an implementation that can run everything and is never launched.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <optional>

#include "choose.cpp"  // which declares the kernels of every row
#include "machine.h"

namespace dsconv {
namespace {

template <class>
struct NeverLaunched;
template <class Problem>
struct NeverLaunched<const Kernel<Problem>> {
  static constexpr Kernel<Problem> kernel{[](const Problem&) -> const char* { return nullptr; },
                                          [](const Problem&, int) -> size_t { return 0; },
                                          [](const Problem&, const Runtime&, void*) {}};
};

}  // namespace

#define DSCONV_STUB_portable(implementation)
#define DSCONV_STUB_avx2(implementation)
#define DSCONV_STUB_avx512(implementation)
#define DSCONV_STUB_avx512bf16(implementation)
#define DSCONV_STUB_amx(implementation)
#define DSCONV_STUB_cuda(implementation) \
  decltype(implementation) implementation = NeverLaunched<decltype(implementation)>::kernel;
#define DSCONV_KERNEL(pass, name, target, efficiency, implementation) DSCONV_STUB_##target(implementation)
#include "kernels.inc"
#undef DSCONV_KERNEL

namespace {

namespace py = pybind11;
using Sizes = std::array<int64_t, 3>;

// A dense tensor; its memory is never touched.
View dense(int64_t channels, const int64_t (&size)[3], bool channels_last) {
  static double memory[8];
  View view{memory, {}};
  int64_t step = channels_last ? channels : 1;
  for (int i = 2; i >= 0; --i) {
    view.stride[2 + i] = step;
    step *= size[i];
  }
  view.stride[1] = channels_last ? 1 : step;
  view.stride[0] = channels_last ? step : step * channels;
  return view;
}

template <class Enum>
Enum named(const std::string& name, Enum last) {
  for (int i = 0; i <= static_cast<int>(last); ++i) {
    if (name == name_of(static_cast<Enum>(i))) return static_cast<Enum>(i);
  }
  throw py::value_error(name);
}

// A separable problem, whose two halves are the problems of the other passes.
SeparableProblem problem_of(const std::string& dtype, int64_t batch, int64_t channels, int64_t multiplier,
                            int64_t out_channels, Sizes in, Sizes taps, Sizes stride, Sizes dilation, Sizes pad,
                            bool channels_last) {
  SeparableProblem p{};
  DepthwiseProblem& d = p.depthwise;
  PointwiseProblem& w = p.pointwise;
  d.dtype = w.dtype = named(dtype, DType::f16);
  d.batch = w.batch = batch;
  d.channels = channels;
  d.multiplier = multiplier;
  w.in_channels = channels * multiplier;
  w.out_channels = out_channels;
  for (int i = 0; i < 3; ++i) {
    d.window.in[i] = in[i];
    d.window.taps[i] = taps[i];
    d.window.stride[i] = stride[i];
    d.window.dilation[i] = dilation[i];
    d.window.pad[i] = pad[i];
    d.window.out[i] = w.size[i] = output_size(in[i], taps[i], stride[i], dilation[i], pad[i], pad[i]);
  }
  const int64_t one[3] = {1, 1, 1};
  d.x = d.grad_x = dense(channels, d.window.in, channels_last);
  d.weight = d.grad_weight = dense(1, d.window.taps, false);
  d.y = d.grad = d.saved = w.a = dense(w.in_channels, w.size, channels_last);
  w.weight = w.grad_weight = dense(w.in_channels, one, false);
  w.y = w.grad = dense(out_channels, w.size, channels_last);
  return p;
}

// This machine with another target, so that every field has a sensible value.
Machine machine_of(const std::string& target, int sm, double peak_gflops, double cache_gbs, double memory_gbs,
                   int64_t cache_bytes) {
  Machine machine = cpu_machine();
  machine.target = named(target, Target::cuda);
  machine.sm = sm;
  machine.peak_gflops = peak_gflops;
  machine.cache_gbs = cache_gbs;
  machine.memory_gbs = memory_gbs;
  machine.cache_bytes = cache_bytes;
  return machine;
}

std::optional<std::string> name_of_row(const Row* row) {
  return row ? std::optional<std::string>(row->name) : std::nullopt;
}

using Choice = std::pair<std::optional<std::string>, std::vector<Candidate>>;

Choice choose_row(const std::string& pass_name, const SeparableProblem& p, const Machine& machine,
                  const Preferred& preferred) {
  const Pass pass = named(pass_name, Pass::separable_fwd);
  std::vector<Candidate> candidates;
  const Row* row = nullptr;
  if (pass == Pass::separable_fwd) {
    row = choose(pass, p, machine, preferred, &candidates);
  } else if (pass == Pass::pointwise_fwd || pass == Pass::pointwise_wgrad) {
    row = choose(pass, p.pointwise, machine, preferred, &candidates);
  } else {
    row = choose(pass, p.depthwise, machine, preferred, &candidates);
  }
  return {name_of_row(row), candidates};
}

}  // namespace
}  // namespace dsconv

PYBIND11_MODULE(choose_module, m) {
  namespace py = pybind11;
  using namespace dsconv;
  py::class_<SeparableProblem>(m, "Problem").def(py::init(&problem_of));
  py::class_<Machine>(m, "Machine").def(py::init(&machine_of));
  py::class_<Candidate>(m, "Candidate")
      .def_readonly("name", &Candidate::name)
      .def_readonly("estimate_us", &Candidate::estimate_us)
      .def_readonly("reason", &Candidate::reason);
  m.def("rows", [] {
    std::vector<std::array<std::string, 3>> rows;
    for (const Row& row : kernel_table()) rows.push_back({row.name, name_of(row.pass), name_of(row.target)});
    return rows;
  });
  m.def("detected_isa", [] { return name_of(detected_isa()); });
  m.def("choose", &choose_row);
  m.def("choose_separable", [](const SeparableProblem& p, const std::string& fuse, const Machine& machine) {
    const std::map<std::string, Fuse> wishes{
        {"auto", Fuse::automatic}, {"always", Fuse::always}, {"never", Fuse::never}};
    std::vector<Candidate> candidates;
    const SeparableChoice c = choose_separable(p, wishes.at(fuse), machine, {}, &candidates);
    return py::make_tuple(name_of_row(c.fused), name_of_row(c.depthwise), name_of_row(c.pointwise), candidates);
  });
  m.def("output_size", &output_size);
  m.def("input_extent", &input_extent);
  m.def("floor_div", &floor_div);
  m.def("ceil_div", &ceil_div);
  m.def("fits_int32", [](bool present, std::array<int64_t, 5> stride, int64_t batch, int64_t channels, Sizes sizes) {
    View view{present ? &view : nullptr, {}};
    std::copy(stride.begin(), stride.end(), view.stride);
    const int64_t size[3] = {sizes[0], sizes[1], sizes[2]};
    return fits_int32(view, batch, channels, size);
  });
}
