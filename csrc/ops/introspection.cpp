#include "ops/introspection.h"

#include <atomic>
#include <mutex>

#include "machine.h"
#include "ops/common.h"

#ifndef DSCONV_VERSION
#define DSCONV_VERSION "unknown"
#endif
#ifndef DSCONV_CUDA_ARCHS
#define DSCONV_CUDA_ARCHS ""
#endif

namespace dsconv {
namespace {

std::string quote(const std::string& s) {
  std::string q = "\"";
  for (char c : s) q += c == '"' || c == '\\' ? std::string{'\\', c} : std::string{c};
  return q + "\"";
}

// "a;b" -> ["a", "b"]
std::string quote_list(const std::string& s, char separator) {
  std::string out = "[";
  for (size_t begin = 0; begin < s.size();) {
    const size_t end = std::min(s.find(separator, begin), s.size());
    if (end > begin) out += (out.size() > 1 ? ", " : "") + quote(s.substr(begin, end - begin));
    begin = end + 1;
  }
  return out + "]";
}

std::mutex g_mutex;  // guards the two below; readers of the choices hold a copy
std::vector<std::string> g_records;
Preferred g_preferred;
std::atomic<bool> g_recording{false};
std::atomic<bool> g_has_preferred{false};

std::string sizes(const int64_t (&size)[3]) {
  return std::to_string(size[0]) + "x" + std::to_string(size[1]) + "x" + std::to_string(size[2]);
}

}  // namespace

const Preferred& preferred_rows() {
  static const Preferred none;
  if (!g_has_preferred.load(std::memory_order_acquire)) return none;
  thread_local Preferred copy;
  const std::lock_guard<std::mutex> lock(g_mutex);
  return copy = g_preferred;
}

void set_choices(const std::string& rows) {
  Preferred wanted;
  for (size_t begin = 0; begin < rows.size();) {
    const size_t end = std::min(rows.find(',', begin), rows.size());
    const std::string name = rows.substr(begin, end - begin);
    bool known = false;
    for (const Row& row : kernel_table()) known |= name == row.name;
    DSCONV_CHECK(known, "rows", "'" + name + "'", "names of dsconv::kernels");
    wanted.push_back(name);
    begin = end + 1;
  }
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_preferred = wanted;
  g_has_preferred.store(!wanted.empty(), std::memory_order_release);
}

bool recording() { return g_recording.load(std::memory_order_relaxed); }

void explain_begin() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_records.clear();
  g_recording = true;
}

std::string explain_end() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_recording = false;
  std::string json = "[";
  for (const std::string& entry : g_records) json += (json.size() > 1 ? ", " : "") + entry;
  return json + "]";
}

void record(const char* op, Pass pass, const std::string& problem, const std::string& chosen,
            const std::vector<Candidate>& candidates) {
  std::string json = "{\"op\": " + quote(op) + ", \"pass\": " + quote(name_of(pass)) +
                     ", \"problem\": " + quote(problem) + ", \"chosen\": " + (chosen.empty() ? "null" : quote(chosen)) +
                     ", \"candidates\": [";
  for (size_t i = 0; i < candidates.size(); ++i) {
    const Candidate& c = candidates[i];
    json += (i ? ", " : "") + ("{\"name\": " + quote(c.name)) +
            ", \"estimate_us\": " + (c.reason ? "null" : std::to_string(c.estimate_us)) +
            ", \"reason\": " + (c.reason ? quote(c.reason) : "null") + "}";
  }
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_records.push_back(json + "]}");
}

std::string describe(const DepthwiseProblem& p) {
  const Window& w = p.window;
  return "n" + std::to_string(p.batch) + " c" + std::to_string(p.channels) + " m" + std::to_string(p.multiplier) +
         " in" + sizes(w.in) + " out" + sizes(w.out) + " k" + sizes(w.taps) + " s" + sizes(w.stride) + " d" +
         sizes(w.dilation) + " " + name_of(p.dtype);
}
std::string describe(const PointwiseProblem& p) {
  return "n" + std::to_string(p.batch) + " c" + std::to_string(p.in_channels) + " o" + std::to_string(p.out_channels) +
         " " + sizes(p.size) + " " + name_of(p.dtype);
}
std::string describe(const SeparableProblem& p) {
  return describe(p.depthwise) + (p.pointwise.allow_tf32 ? " or tf32" : "") + " o" +
         std::to_string(p.pointwise.out_channels);
}

std::string kernels() {
  std::string json = "[";
  for (const Row& row : kernel_table()) {
    json += (json.size() > 1 ? ", " : "") + ("{\"name\": " + quote(row.name)) +
            ", \"pass\": " + quote(name_of(row.pass)) + ", \"target\": " + quote(name_of(row.target)) +
            ", \"efficiency\": " + std::to_string(row.efficiency) + "}";
  }
  return json + "]";
}

std::string build_info() {
  std::string compiled = "portable";
#if DSCONV_X86
  compiled += ";avx2;avx512";
#endif
  const unsigned long long target = TORCH_TARGET_VERSION;
  return "{\"version\": " + quote(DSCONV_VERSION) +
         ", \"torch_target\": " + quote(std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff)) +
         ", \"cpu_isa_compiled\": " + quote_list(compiled, ';') +
         ", \"cpu_isa_found\": " + quote(name_of(detected_isa())) +
         ", \"cpu_isa_used\": " + quote(name_of(cpu_machine().target)) +
         ", \"cuda_compiled\": " + (DSCONV_CUDA ? "true" : "false") +
         ", \"cuda_archs\": " + quote_list(DSCONV_CUDA_ARCHS, ';') + ", \"compiler\": " + quote(__VERSION__) + "}";
}

}  // namespace dsconv
