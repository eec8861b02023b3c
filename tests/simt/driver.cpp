// Runs CUDA rows of the kernel table on the CPU, thread by thread. Each line of the standard input is a row and a problem
// as tests/core writes it, and gets one line of answer: ok with what was counted (JSON), refused, or FAILED.
//
//   driver [--gpu N]           the lines of the standard input, launched as on N multiprocessors of an H100
//   driver --record FILE N     the same in one order of threads, and each launch to the file as simt.h says
//   driver --dry               the same lines: the kernel that each would launch; memory is never touched
//   driver --plant BUG         a kernel of plants.cu or matrix_plants.cu, in three orders of threads
//   driver --primitive NAME    a kernel of primitives.cu: words in from the standard input, words out (hexadecimal)
//   driver --choose            the problems of the standard input on every GPU of kGpus: the row chosen, its grid
//   driver --choose-random PASS N SEED

#include <cstdio>
#include <iostream>

#include "core/oracle.h"
#include "cuda/launch.cuh"
#include "simt/plants.h"
#include "simt/primitives.h"
#include "simt/simt.h"
#include "simt/trace.h"

namespace dsconv::cuda {
// Nothing is queued here, so no launch fails.
void check_launch(const char*) {}

template <class Index>
void launch_direct(const DepthwiseProblem&, const Runtime&);
}  // namespace dsconv::cuda

namespace dsconv::simt_test {
namespace {

using namespace core_test;

constexpr simt::Order kOrders[] = {simt::Order::forward, simt::Order::reverse, simt::Order::shuffled};
constexpr const char* kOrderNames[] = {"forward", "reverse", "shuffled"};

// The general row with offsets of 64 bits, whatever the size.
constexpr Kernel<DepthwiseProblem> kDirectWide = {
    [](const DepthwiseProblem&) -> const char* { return nullptr; },
    [](const DepthwiseProblem&, int) -> size_t { return 0; },
    [](const DepthwiseProblem& p, const Runtime& runtime, void*) { cuda::launch_direct<int64_t>(p, runtime); },
};

const Row& row_called(const std::string& name) {
  static const Row wide{Pass::depthwise_fwd, "depthwise_fwd_direct_wide_cuda", Target::cuda, 0, &kDirectWide};
  if (name == wide.name) return wide;
  for (const Row& row : kernel_table()) {
    if (name == row.name && row.target == Target::cuda) return row;
  }
  throw std::invalid_argument("no CUDA row is called " + name);
}

struct Gpu {
  const char* name;
  Machine machine;
};
// From the vendor's data sheets: fp32 multiply-adds (as flops), L2 and memory bandwidth, L2 size, multiprocessors and the
// shared memory of each.
constexpr Gpu kGpus[] = {
    {"T4", {Target::cuda, 75, 8'100, 1'270, 320, 4 << 20, 40, 64 << 10}},
    {"A100", {Target::cuda, 80, 19'500, 5'000, 1'555, 40 << 20, 108, 164 << 10}},
    {"A10", {Target::cuda, 86, 31'200, 1'800, 600, 6 << 20, 72, 100 << 10}},
    {"L4", {Target::cuda, 89, 30'300, 1'500, 300, 48 << 20, 58, 100 << 10}},
    {"H100", {Target::cuda, 90, 66'900, 7'000, 3'350, 50 << 20, 132, 228 << 10}},
    {"B200", {Target::cuda, 100, 75'000, 12'000, 8'000, 126 << 20, 148, 228 << 10}},
    {"RTX 5090", {Target::cuda, 120, 104'800, 6'000, 1'790, 96 << 20, 170, 100 << 10}},
};
Machine machine = kGpus[4].machine;

// Many multiprocessors split small problems; with one they are cut as large ones are on any GPU.
Runtime runtime{machine.multiprocessors, nullptr, nullptr, &machine};

void keep_multiprocessors(int count) {
  for (double* rate : {&machine.peak_gflops, &machine.cache_gbs, &machine.memory_gbs})
    *rate *= double(count) / machine.multiprocessors;
  runtime.threads = machine.multiprocessors = count;
}

class Case {
 public:
  explicit Case(const Spec& spec) : spec_(spec), inputs_(tensors_of(spec, false)) {
    for (auto& [role, tensor] : inputs_) {
      tensor.fill(draw_values(spec, role, tensor.shape()));
      numbers_[role] = tensor.values();
    }
  }
  template <class Use>
  auto with(const Tensors& outputs, Use use) const {
    return with_problem(spec_, views_of(inputs_, outputs), {}, use);
  }
  const char* refusal(const Row& row) const {
    const Tensors outputs = tensors_of(spec_, true);
    return with(outputs, [&]<class Problem>(const Problem& p) { return kernel_of<Problem>(row).can_run(p); });
  }
  // Throws simt::Violation; "" or what was touched that should not be.
  std::string launch(const Row& row, const Tensors& outputs) const {
    const auto bytes = with(outputs, [&]<class Problem>(const Problem& p) {
      return kernel_of<Problem>(row).workspace_bytes(p, runtime.threads);
    });
    const Buffer workspace(static_cast<int64_t>(bytes), 0);
    std::vector<simt::trace::Range> buffers{{workspace.data(), workspace.bytes()}};
    for (const Tensors* tensors : {&inputs_, &outputs}) {
      for (const auto& [role, tensor] : *tensors) buffers.push_back({tensor.buffer().data(), tensor.buffer().bytes()});
    }
    simt::trace::set_buffers(buffers);
    with(outputs,
         [&]<class Problem>(const Problem& p) { kernel_of<Problem>(row).launch(p, runtime, workspace.data()); });
    for (const auto& [role, tensor] : outputs) {
      if (!tensor.untouched_outside()) return std::string("wrote outside ") + kRoleNames[role];
    }
    for (const auto& [role, tensor] : inputs_) {
      if (!same(tensor.values(), numbers_.at(role))) return std::string("changed ") + kRoleNames[role];
    }
    return workspace.intact() ? "" : "wrote outside its workspace";
  }
  Results expected() const { return expect(spec_, numbers_); }

 private:
  static bool same(const Values& a, const Values& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
  }
  Spec spec_;
  Tensors inputs_;
  Numbers numbers_;
};

std::string json_of(const Spec& spec, const simt::trace::Counts& c) {
  const Tensors inputs = tensors_of(spec, false), outputs = tensors_of(spec, true);
  int64_t least = 0, output = 0;
  for (const auto& [role, tensor] : inputs) least += tensor.buffer().bytes();
  for (const auto& [role, tensor] : outputs) output += count_of(tensor.shape()) * element_size(spec.dtype);
  std::ostringstream out;
  const auto field = [&](const char* name, int64_t value) {
    out << (out.tellp() > 0 ? ", " : "{") << '"' << name << "\": " << value;
  };
  field("blocks", simt::largest.blocks);
  field("input_bytes", least);
  field("output_bytes", output);
  field("bytes_read", c.bytes_read);
  field("bytes_written", c.bytes_written);
  field("distinct_bytes_written", c.distinct_bytes_written);
  field("sectors_requested", c.sectors_requested);
  field("sectors_read", c.sectors_read);
  field("sectors_written", c.sectors_written);
  field("wavefronts", c.wavefronts);
  field("fewest_wavefronts", c.fewest_wavefronts);
  field("largest_access", c.largest_access);
  out << '}';
  return out.str();
}

// The row in three orders of threads: the same bits, the right ones, nothing touched that should not be.
std::string check(const Row& row, const Spec& spec, simt::trace::Counts* counts) {
  const Case subject(spec);
  const Results expected = subject.expected();
  std::optional<Tensors> first;
  for (simt::Order order : kOrders) {
    if (simt::record && order != simt::Order::forward) break;
    const std::string in_order = std::string(" (") + kOrderNames[static_cast<int>(order)] + " order)";
    simt::order = order;
    Tensors outputs = tensors_of(spec, true);
    simt::largest = {};
    if (std::string wrong = subject.launch(row, outputs); !wrong.empty()) return wrong + in_order;
    const simt::trace::Report report = simt::trace::take_report();
    if (!report.violations.empty()) return report.violations[0] + in_order;
    if (!first) *counts = report.counts;
    for (const auto& [role, tensor] : outputs) {
      const Buffer& bits = tensor.buffer();
      if (first && std::memcmp(bits.data(), first->at(role).buffer().data(), bits.bytes()) != 0)
        return std::string(kRoleNames[role]) + " depends on the order of threads" + in_order;
      if (std::string wrong = difference(spec, role, tensor.values(), expected.at(role)); !wrong.empty())
        return wrong + in_order;
    }
    if (!first) first.emplace(std::move(outputs));
  }
  return "";
}

bool answer(const std::string& line) {
  const size_t space = line.find(' ');
  const Row& row = row_called(line.substr(0, space));
  const Spec spec = parse(line.substr(space + 1));
  if (const char* reason = Case(spec).refusal(row)) {
    std::printf("refused %s: %s\n", row.name, reason);
    return true;
  }
  simt::trace::Counts counts{};
  std::string wrong;
  try {
    wrong = check(row, spec, &counts);
  } catch (const simt::Violation& violation) {
    wrong = violation.what();
  }
  if (wrong.empty()) {
    std::printf("ok %s %s\n", row.name, json_of(spec, counts).c_str());
  } else {
    std::printf("FAILED %s: %s; %s\n", row.name, wrong.c_str(), line.c_str());
  }
  std::fflush(stdout);
  return wrong.empty();
}

bool run_plant(const std::string& name) {
  const Plant* plant = nullptr;
  int bug = 0;
  for (const Plant* one : {&kStreamPlant, &kMatrixPlant}) {
    const auto found = std::find(one->bugs.begin(), one->bugs.end(), name);
    if (found == one->bugs.end()) continue;
    plant = one;
    bug = static_cast<int>(found - one->bugs.begin());
  }
  if (!plant) throw std::invalid_argument("no planted bug is called " + name);
  bool good = true;
  const auto notice = [&](const std::string& what) {
    std::printf("noticed: %s\n", what.c_str());
    good = false;
  };
  for (simt::Order order : kOrders) {
    simt::order = order;
    std::vector<Buffer> buffers;
    std::vector<void*> pointers;
    std::vector<simt::trace::Range> ranges;
    for (int64_t bytes : plant->bytes) {
      const Buffer& buffer = buffers.emplace_back(bytes, 0);
      pointers.push_back(buffer.data());
      ranges.push_back({buffer.data(), bytes});
    }
    simt::trace::set_buffers(ranges);
    try {
      plant->launch(bug, pointers.data());
    } catch (const simt::Violation& violation) {
      notice(violation.what());
    }
    const simt::trace::Report report = simt::trace::take_report();
    for (const std::string& violation : report.violations) notice(violation);
    if (const int wrong = plant->wrong(pointers.data())) notice(std::to_string(wrong) + " values are wrong");
    const auto& c = report.counts;
    if (order == simt::Order::forward)
      std::printf("sectors %lld for %lld bytes, wavefronts %lld of %lld\n", static_cast<long long>(c.sectors_requested),
                  static_cast<long long>(c.bytes_read + c.bytes_written), static_cast<long long>(c.wavefronts),
                  static_cast<long long>(c.fewest_wavefronts));
  }
  return good;
}

bool run_primitive(const std::string& name) {
  const Primitive* const primitive = find_primitive(name);
  if (!primitive) throw std::invalid_argument("no primitive is called " + name);
  std::vector<uint32_t> words;
  for (uint32_t word; std::cin >> std::hex >> word;) words.push_back(word);
  const Buffer in(words.size() * sizeof words[0], 0), out(primitive->words_out * kLanes * sizeof words[0], 0);
  std::memcpy(in.data(), words.data(), in.bytes());
  simt::trace::set_buffers({{in.data(), in.bytes()}, {out.data(), out.bytes()}});
  const Words parameters{reinterpret_cast<const uint32_t*>(in.data()), reinterpret_cast<uint32_t*>(out.data())};
  cuda::launch(primitive->name, primitive->kernel, 1, kLanes, kSharedWords * sizeof words[0], runtime, parameters);
  const simt::trace::Report report = simt::trace::take_report();
  for (const std::string& violation : report.violations) std::printf("FAILED: %s\n", violation.c_str());
  for (int i = 0; i < primitive->words_out * kLanes; ++i) std::printf("%x ", parameters.out[i]);
  return report.violations.empty();
}

// Sizes up to those of tensors that no test could hold: the launch code sees them, memory is never touched.
Spec random_large(Pass pass, Random& r) {
  Spec s = generate(pass, r.below(1 << 20), r.below(1 << 20));
  static constexpr int64_t kBatches[] = {1, 1, 1, 2, 32, 256, 70'000}, kFactors[] = {1, 1, 2, 4, 8},
                           kSizes[] = {7, 14, 28, 56, 112, 224, 1'000, 5'000};
  s.batch = r.of(kBatches);
  for (int64_t* channels : {&s.channels, &s.filters})
    *channels = *channels && r.one_in(3) ? 8 * r.between(1, 160) : *channels * r.of(kFactors);
  for (int dim = 1; dim < 3; ++dim) {
    if (s.in[dim] == 1 || !r.one_in(2)) continue;
    s.in[dim] = r.of(kSizes);
    s.out[dim] = std::max<int64_t>(
        1, output_size(s.in[dim], s.taps[dim], s.stride[dim], s.dilation[dim], s.pad[dim], s.pad[dim]));
  }
  for (Layout& layout : s.layout) layout = r.one_in(2) ? Layout::contiguous : Layout::channels_last;
  s.layout[kOutput] = s.layout[kX];
  s.tf32 = pass == Pass::separable_fwd && s.dtype == DType::f32 && r.one_in(2);
  return s;
}

Views imagined_views(const Spec& s) {
  alignas(64) static unsigned char memory[64];
  Views views{};
  for (int i = 0; i < kRoles; ++i) {
    const auto role = static_cast<Role>(i);
    const std::optional<Shape> shape = shape_of(s, role);
    if (!shape) continue;
    const Shape stride = strides_of(s.layout[i], *shape, s.wild);
    views[i].data = memory;
    std::copy(stride.begin(), stride.end(), views[i].stride);
  }
  return views;
}

// What runs without a wish: of a separable problem the fused row, or none where two passes are faster.
template <class Problem>
const Row* planned(Pass pass, const Problem& problem, const Machine& gpu) {
  if constexpr (std::is_same_v<Problem, SeparableProblem>) {
    return choose_separable(problem, Fuse::automatic, gpu, {}).fused;
  } else {
    return choose(pass, problem, gpu, {});
  }
}

// A problem has the same row every time, and the row's launch is one that CUDA takes. Depthwise problems have a row on
// every GPU; a separable one without is left to two passes.
template <class Problem>
std::string choose_on(const Gpu& gpu, Pass pass, const Problem& problem, const Row* row) {
  if (!row) return pass == Pass::separable_fwd ? "" : "no row";
  if (row != planned(pass, problem, gpu.machine)) return "another row the second time";
  const auto& kernel = kernel_of<Problem>(*row);
  if (kernel.can_run(problem)) return "an illegal row";
  try {
    kernel.launch(problem, Runtime{gpu.machine.multiprocessors, nullptr, nullptr, &gpu.machine}, nullptr);
  } catch (const simt::Violation& violation) {
    return violation.what();
  }
  return "";
}

bool choose_on_all(const Spec& spec) {
  bool good = true;
  simt::dry = true;
  with_problem(spec, imagined_views(spec), {}, [&](const auto& problem) {
    for (const Gpu& gpu : kGpus) {
      const Row* row = planned(spec.pass, problem, gpu.machine);
      simt::largest = {};
      const std::string wrong = choose_on(gpu, spec.pass, problem, row);
      good &= wrong.empty();
      std::printf("%s;%s;%s;%lld;%s\n", wrong.empty() ? "ok" : ("FAILED " + wrong).c_str(), gpu.name,
                  row ? row->name : "-", static_cast<long long>(simt::largest.blocks), line_of(spec).c_str());
    }
  });
  return good;
}

bool launch_dry(const std::string& line) {
  const size_t space = line.find(' ');
  const Row& row = row_called(line.substr(0, space));
  const Spec spec = parse(line.substr(space + 1));
  simt::dry = true;
  with_problem(spec, imagined_views(spec), {}, [&]<class Problem>(const Problem& problem) {
    kernel_of<Problem>(row).launch(problem, runtime, nullptr);
  });
  std::printf("%s\n", simt::largest.kernel);
  return true;
}

bool choose_randomly(const std::string& name, int64_t count, uint64_t seed) {
  Pass pass{};
  read(name, pass);
  Random random(seed);
  bool good = true;
  while (count-- > 0) good &= choose_on_all(random_large(pass, random));
  return good;
}

}  // namespace
}  // namespace dsconv::simt_test

int main(int count, char** words) {
  using namespace dsconv::simt_test;
  const std::string option = count > 1 ? words[1] : "";
  bool good = true;
  try {
    if (option == "--plant") return run_plant(words[2]) ? 0 : 1;
    if (option == "--primitive") return run_primitive(words[2]) ? 0 : 1;
    if (option == "--choose-random")
      return choose_randomly(words[2], std::stoll(words[3]), std::stoull(words[4])) ? 0 : 1;
    if (option == "--record") simt::record = std::fopen(words[2], "w");
    if (option == "--record" || option == "--gpu") keep_multiprocessors(std::stoi(words[count - 1]));
    for (std::string line; std::getline(std::cin, line);)
      good &= option == "--choose" ? choose_on_all(parse(line)) : option == "--dry" ? launch_dry(line) : answer(line);
    return good ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 2;
  }
}
