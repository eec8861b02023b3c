#include "ops/common.h"

#include "machine.h"
#include "ops/kept_memory.h"
#if DSCONV_CUDA
#include "cuda/device.h"
#endif

namespace dsconv {

using torch::headeronly::ScalarType;

DType dtype_of(const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      DSCONV_CHECK(false, argument, "dtype " + std::to_string(static_cast<int>(t.scalar_type())),
                   "float64, float32, bfloat16 or float16");
  }
}

View view_of(const Tensor& t) {
  View view{t.data_ptr(), {}};
  const auto strides = t.strides();
  const int64_t rank = t.dim();
  for (int64_t i = 0; i < rank && i < 2; ++i) view.stride[i] = strides[i];
  for (int64_t i = 2; i < rank; ++i) view.stride[5 - rank + i] = strides[i];
  return view;
}

View view_of(const OptionalTensor& t) { return t ? view_of(*t) : View{}; }

static std::string list(const int64_t* values, int64_t count) {
  std::string s = "[";
  for (int64_t i = 0; i < count; ++i)
    s += (i ? ", " : "") + (values[i] < 0 ? std::string("*") : std::to_string(values[i]));
  return s + "]";
}

void check_like(const char* argument, const Tensor& t, const Tensor& x, const IntList& sizes) {
  const auto got = t.sizes();
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] < 0 || sizes[i] == got[i];
  DSCONV_CHECK(same, argument, "shape " + list(got.data(), t.dim()), "shape " + list(sizes.data(), sizes.size()));
  DSCONV_CHECK(t.scalar_type() == x.scalar_type(), argument, name_of(dtype_of(argument, t)), name_of(dtype_of("x", x)),
               ", the dtype of x");
  DSCONV_CHECK(t.device() == x.device(), argument, "another device", "the device of x");
}

void check_like(const char* argument, const OptionalTensor& t, const Tensor& x, const IntList& sizes) {
  if (t) check_like(argument, *t, x, sizes);
}

static Tensor empty_strided(const Tensor& like, int32_t dtype, int64_t rank, const int64_t* size, const int64_t* stride,
                            const void* source) {
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  if (like.is_cpu()) {
    int64_t count = 1;  // these tensors have no gaps
    for (int64_t i = 0; i < rank; ++i) count *= size[i];
    if (void* data = take_memory(count * aoti_torch_dtype_element_size(dtype), source)) {
      const auto keep = [](void* data, void*) { keep_memory(data); };
      STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(data, rank, size, stride, 0, dtype, device_type, device_index,
                                                    &handle, aoti_torch_layout_strided(), nullptr, 0, keep, nullptr));
      return Tensor(handle);
    }
  }
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, size, stride, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor empty_output(const Tensor& x, int64_t channels, const int64_t* spatial, const Tensor* source) {
  const int64_t rank = x.dim();
  const bool channels_last = x.size(1) > 1 && x.stride(1) == 1;
  int64_t size[5], stride[5], step = channels_last ? channels : 1;
  size[0] = x.size(0);
  size[1] = channels;
  for (int64_t i = rank - 1; i >= 2; --i) {
    size[i] = spatial[i - 2];
    stride[i] = step;
    step *= max64(size[i], 1);
  }
  stride[1] = channels_last ? 1 : step;
  stride[0] = channels_last ? step : step * max64(channels, 1);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty_strided(x, dtype, rank, size, stride, (source ? *source : x).data_ptr());
}

Tensor empty_bytes(const Tensor& x, int64_t bytes) {
  const int64_t stride = 1;
  return empty_strided(x, aoti_torch_dtype_uint8(), 1, &bytes, &stride, x.data_ptr());
}

const Machine& machine_of(const Tensor& x) {
  if (x.is_cpu()) return cpu_machine();
#if DSCONV_CUDA
  return cuda::machine(x.get_device_index());
#else
  DSCONV_CHECK(false, "x", "a tensor that is not on the CPU", "a CPU tensor: this library was built without CUDA");
#endif
}

static void parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) body(context, begin);
  });
}

constexpr size_t kSmallWorkspace = 16 << 10;

template <class Problem>
void launch(const Row& row, const Problem& problem, const Tensor& x) {
  const Kernel<Problem>& kernel = kernel_of<Problem>(row);
  Runtime runtime{1, parallel, nullptr};
#if DSCONV_CUDA
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (row.target == Target::cuda) {
    guard.emplace(x.get_device_index());
    runtime.machine = &machine_of(x);
    runtime.threads = runtime.machine->multiprocessors;
    runtime.stream = torch::stable::accelerator::getCurrentStream(x.get_device_index()).nativeHandle();
  }
#endif
  if (row.target != Target::cuda) runtime.threads = static_cast<int>(torch::stable::get_num_threads());
  const size_t bytes = kernel.workspace_bytes(problem, runtime.threads);
  alignas(64) char small[kSmallWorkspace];  // spares a small layer an allocation
  std::optional<Tensor> large;
  if (bytes > sizeof small || (bytes > 0 && row.target == Target::cuda)) large = empty_bytes(x, bytes);
  kernel.launch(problem, runtime, large ? large->data_ptr() : small);
}

template void launch(const Row&, const DepthwiseProblem&, const Tensor&);
template void launch(const Row&, const PointwiseProblem&, const Tensor&);
template void launch(const Row&, const SeparableProblem&, const Tensor&);

template <class Problem>
static void choose_and_launch(const char* op, Pass pass, const Problem& problem, const Tensor& x) {
  const Row* row;
  if (recording()) {
    std::vector<Candidate> candidates;
    row = choose(pass, problem, machine_of(x), preferred_rows(), &candidates);
    record(op, pass, describe(problem), row ? row->name : "", candidates);
  } else {
    row = choose(pass, problem, machine_of(x), preferred_rows());
  }
  STD_TORCH_CHECK(row, "dsconv::", op, ": no kernel of this library runs ", name_of(pass),
                  " here: ", describe(problem));
  launch(*row, problem, x);
}

void run(const char* op, Pass pass, const DepthwiseProblem& problem, const Tensor& x) {
  choose_and_launch(op, pass, problem, x);
}
void run(const char* op, Pass pass, const PointwiseProblem& problem, const Tensor& x) {
  choose_and_launch(op, pass, problem, x);
}

}  // namespace dsconv
