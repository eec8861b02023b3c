// Runs every CPU row of the kernel table on seeded problems and compares it with the reference rows. No torch: the
// compiled core alone, so sanitizers and emulators can look at it.
//
//   driver [--count N] [--seed N] [--pass PASS] [--target TARGET] [--row NAME] [--plant BUG]
//   driver --row NAME --problem "LINE"      one problem again, as a failure printed it

#include <unistd.h>
#include <csignal>
#include <cstdio>

#include "machine.h"
#include "oracle.h"
#include "plants.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#define CORE_SANITIZED 1
#else
#define CORE_SANITIZED 0
#endif

namespace dsconv::core_test {
namespace {

struct Options {
  int64_t count = 20, seed = 1;
  std::string row, target, pass, problem;
  Plant plant = Plant::none;
};

struct Tally {
  int64_t ran = 0, shared = 0, chosen = 0, refused = 0;
  std::map<std::string, int64_t> reasons;
  bool failed = false;
};

char running[4096];  // the line of the launch in progress, for whoever ends this process in it

void remember(const Row& row, const Spec& spec) {
  std::snprintf(running, sizeof running, "FAILED %s: died; rerun with --row %s --problem \"%s\"\n", row.name, row.name,
                line_of(spec).c_str());
}
void report_death() {
  if (write(STDOUT_FILENO, running, std::strlen(running)) < 0) _exit(3);
}
void die(int number) {
  report_death();
  std::signal(number, SIG_DFL);
  std::raise(number);
}
void watch_for_death() {
#if CORE_SANITIZED
  __sanitizer_set_death_callback(report_death);
  std::signal(SIGABRT, die);  // UBSan keeps a callback of its own; with abort_on_error=1 it comes here
#else
  for (int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGABRT}) std::signal(number, die);
#endif
}

// A problem with its inputs; what several rows need of it is made once.
class Case {
 public:
  explicit Case(const Spec& spec) : spec_(spec), inputs_(tensors_of(spec, false)), outputs_(tensors_of(spec, true)) {}

  const Spec& spec() const { return spec_; }
  const Tensors& inputs() const { return inputs_; }

  // Calls use(problem) for the views of these inputs and of `outputs`.
  template <class Use>
  auto with(const Spec& spec, const Tensors& outputs, const Row* row, Use use) {
    return with_problem(spec, views_of(inputs_, outputs), row && spec.packed ? packed_for(*row) : Packed{}, use);
  }
  const char* refusal(const Row& row) {
    return with(spec_, outputs_, &row,
                [&]<class Problem>(const Problem& problem) { return kernel_of<Problem>(row).can_run(problem); });
  }
  const Results& expected() {
    if (!expected_) expected_ = expect(spec_, fill());
    return *expected_;
  }
  // The rows that dispatch takes on this processor.
  std::vector<const Row*> chosen() {
    return with(spec_, outputs_, nullptr, [&](const auto& problem) { return choose_rows(problem); });
  }
  bool inputs_unchanged() const {
    for (const auto& [role, tensor] : inputs_) {
      const Buffer& buffer = tensor.buffer();
      if (std::memcmp(buffer.data(), before_.at(role).data(), buffer.bytes()) != 0 || !buffer.intact()) return false;
    }
    for (const auto& [part, buffer] : packed_) {
      if (!buffer.intact()) return false;
    }
    return true;
  }

 private:
  template <class Problem>
  std::vector<const Row*> choose_rows(const Problem& problem) const {
    return {choose(spec_.pass, problem, cpu_machine(), {})};
  }
  std::vector<const Row*> choose_rows(const SeparableProblem& problem) const {
    const SeparableChoice choice = choose_separable(problem, Fuse::automatic, cpu_machine(), {});
    if (choice.fused) return {choice.fused};
    return {choice.depthwise, choice.pointwise};
  }

  // The numbers that memory holds: rounded to the dtype, and shared where a stride is 0.
  const Numbers& fill() {
    if (!numbers_.empty()) return numbers_;
    for (auto& [role, tensor] : inputs_) {
      tensor.fill(draw_values(spec_, role, tensor.shape()));
      numbers_[role] = tensor.values();
      before_[role].assign(tensor.buffer().data(), tensor.buffer().data() + tensor.buffer().bytes());
    }
    return numbers_;
  }
  // As the operators do it: both parts packed without a word about strides, dilations or the multiplier.
  Packed packed_for(const Row& row) {
    Spec weights = spec_;
    weights.channels = spec_.map_channels();
    weights.multiplier = 1;
    for (int dim = 0; dim < 3; ++dim) weights.stride[dim] = weights.dilation[dim] = 1;
    fill();
    const Views views = views_of(inputs_, {});
    Packed packed;
    if (spec_.depthwise()) packed.depthwise = packed_part(row.target, depthwise_problem(weights, views, {}));
    if (spec_.pointwise()) packed.pointwise = packed_part(row.target, pointwise_problem(weights, views, {}));
    return packed;
  }
  template <class Problem>
  const void* packed_part(Target target, const Problem& problem) {
    constexpr bool kDepthwise = std::is_same_v<Problem, DepthwiseProblem>;
    const Packer<Problem>& packer = packer_of(problem, target);
    const auto bytes = static_cast<int64_t>(packer.bytes(problem));
    if (bytes == 0) return nullptr;
    auto [found, fresh] = packed_.try_emplace({target, kDepthwise}, bytes, 0);
    if (fresh) packer.pack(problem, found->second.data());
    return found->second.data();
  }

  Spec spec_;
  Tensors inputs_, outputs_;  // the outputs are for the questions that launch nothing
  Numbers numbers_;
  std::map<Role, std::vector<unsigned char>> before_;
  std::optional<Results> expected_;
  std::map<std::pair<Target, bool>, Buffer> packed_;  // by target, depthwise or pointwise
};

// One launch into fresh outputs and a fresh workspace; "" or what it touched that was not its own.
std::string launch(const Row& row, Case& subject, const Runtime& runtime, Plant plant, Tensors& outputs) {
  const Spec& spec = subject.spec();
  const Spec solved = misread(spec, plant);
  auto bytes_of = [&]<class Problem>(const Problem& problem) {
    return kernel_of<Problem>(row).workspace_bytes(problem, runtime.threads);
  };
  const auto bytes = static_cast<int64_t>(subject.with(solved, outputs, &row, bytes_of));
  const Buffer workspace(bytes, spec.offset * 8 % 64);
  subject.with(solved, outputs, &row, [&]<class Problem>(const Problem& problem) {
    kernel_of<Problem>(row).launch(problem, runtime, workspace.data());
  });
  misbehave(plant, runtime, subject.inputs(), outputs, workspace);
  if (!workspace.intact()) return "wrote outside its workspace of " + std::to_string(bytes) + " bytes";
  for (const auto& [role, tensor] : outputs) {
    if (!tensor.untouched_outside()) return std::string("wrote outside ") + kRoleNames[role];
  }
  return subject.inputs_unchanged() ? "" : "changed an input";
}

// "" or what is wrong with the row's results.
std::string check(const Row& row, Case& subject, Plant plant) {
  remember(row, subject.spec());
  const Results& expected = subject.expected();
  std::optional<Tensors> first;
  for (const Schedule& schedule : kSchedules) {
    Tensors outputs = tensors_of(subject.spec(), true);
    if (std::string wrong = launch(row, subject, schedule.runtime, plant, outputs); !wrong.empty())
      return wrong + " (" + schedule.name + ")";
    for (const auto& [role, tensor] : outputs) {
      const Buffer& bits = tensor.buffer();
      if (first) {
        if (std::memcmp(bits.data(), first->at(role).buffer().data(), bits.bytes()) != 0)
          return std::string(kRoleNames[role]) + " has other bits with " + schedule.name;
      } else if (std::string wrong = difference(subject.spec(), role, tensor.values(), expected.at(role));
                 !wrong.empty()) {
        return wrong;
      }
    }
    if (!first) first.emplace(std::move(outputs));
  }
  return "";
}

class Driver {
 public:
  explicit Driver(Options options) : options_(std::move(options)) {}

  int run() {
    std::printf("processor: %s\n", name_of(detected_isa()));
    std::fflush(stdout);
    if (!options_.problem.empty()) {
      visit(parse(options_.problem));
    } else {
      for (Pass pass : kPasses) run_pass(pass);
    }
    return report() ? 0 : 1;
  }

 private:
  bool selected(const Row& row) const {
    return (options_.row.empty() || options_.row == row.name) &&
           (options_.target.empty() || options_.target == name_of(row.target)) &&
           (options_.pass.empty() || options_.pass == name_of(row.pass));
  }
  bool available(const Row& row) const { return row.target <= detected_isa(); }
  bool wants(const Row& row, Pass pass) {
    const Tally& tally = tallies_[row.name];
    return row.pass == pass && selected(row) && available(row) && !tally.failed && tally.ran < options_.count;
  }
  bool any_wanted(Pass pass) {
    for (const Row& row : kernel_table()) {
      if (wants(row, pass)) return true;
    }
    return false;
  }

  // Draws problems until every row has run enough of them; a row that refuses most gets more to choose from.
  void run_pass(Pass pass) {
    for (int64_t index = 0; index < 40 * options_.count && any_wanted(pass); ++index)
      visit(generate(pass, options_.seed, index));
  }

  void visit(const Spec& spec) {
    Case subject(spec);
    check_choice(subject);
    for (const Row& row : kernel_table()) {
      if (!wants(row, spec.pass)) continue;
      Tally& tally = tallies_[row.name];
      if (const char* reason = subject.refusal(row)) {
        ++tally.refused;
        ++tally.reasons[reason];
        continue;
      }
      largest_parallel_count = 0;
      if (const std::string wrong = check(row, subject, options_.plant); !wrong.empty()) fail(row, spec, wrong);
      ++tally.ran;
      tally.shared += largest_parallel_count > 1;
    }
  }

  void fail(const Row& row, const Spec& spec, const std::string& wrong) {
    tallies_[row.name].failed = true;
    std::printf("FAILED %s: %s; rerun with --row %s --problem \"%s\"\n", row.name, wrong.c_str(), row.name,
                line_of(spec).c_str());
    std::fflush(stdout);
  }

  // Left alone, dispatch must find a row for every problem, and one that this processor can run.
  void check_choice(Case& subject) {
    for (const Row* row : subject.chosen()) {
      if (row && available(*row)) {
        ++tallies_[row->name].chosen;
        continue;
      }
      dispatch_failed_ = true;
      std::printf("FAILED choose: %s for \"%s\"\n", row ? row->name : "no row", line_of(subject.spec()).c_str());
    }
  }

  bool report() {
    bool good = !dispatch_failed_;
    int64_t listed = 0;
    for (const Row& row : kernel_table()) {
      if (!selected(row)) continue;
      ++listed;
      const Tally& tally = tallies_[row.name];
      if (!available(row)) {
        std::printf("%-34s skipped: this processor has no %s\n", row.name, name_of(row.target));
        continue;
      }
      const bool idle = tally.ran == 0 && options_.problem.empty();
      // A kernel that keeps millions of multiply-adds to one thread would leave its slots untested.
      const bool alone = tally.shared == 0 && tally.ran >= 50;
      good &= !tally.failed && !idle && !alone;
      std::printf("%-34s %s: %lld run, %lld of them in several slots, %lld refused, chosen %lld times\n", row.name,
                  tally.failed ? "FAILED"
                  : idle       ? "FAILED (never ran)"
                  : alone      ? "FAILED (never in slots)"
                               : "ok",
                  static_cast<long long>(tally.ran), static_cast<long long>(tally.shared),
                  static_cast<long long>(tally.refused), static_cast<long long>(tally.chosen));
      for (const auto& [reason, count] : tally.reasons)
        std::printf("    refused %lld: %s\n", static_cast<long long>(count), reason.c_str());
    }
    if (listed == 0) std::printf("FAILED: no row is called that\n");
    return good && listed > 0;
  }

  Options options_;
  std::map<std::string, Tally> tallies_;
  bool dispatch_failed_ = false;
};

Options parse_options(int count, char** words) {
  Options options;
  for (int i = 1; i < count; i += 2) {
    const std::string name = words[i];
    if (i + 1 == count) throw std::invalid_argument(name + " without a value");
    const std::string value = words[i + 1];
    if (name == "--count") {
      options.count = std::stoll(value);
    } else if (name == "--seed") {
      options.seed = std::stoll(value);
    } else if (name == "--plant") {
      read_name(value, kPlants, options.plant);
    } else if (name == "--row") {
      options.row = value;
    } else if (name == "--target") {
      options.target = value;
    } else if (name == "--pass") {
      options.pass = value;
    } else if (name == "--problem") {
      options.problem = value;
    } else {
      throw std::invalid_argument("no such option: " + name);
    }
  }
  return options;
}

}  // namespace
}  // namespace dsconv::core_test

int main(int count, char** words) {
  using namespace dsconv::core_test;
  watch_for_death();
  try {
    return Driver(parse_options(count, words)).run();
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 2;
  }
}
