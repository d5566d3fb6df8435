// What every binding shares: argument checks that name the argument with expected and found values,
// dtypes, streams, and the registration macro. Only files in this folder know what a Tensor is.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

// One source, three libraries: the CPU kernels, the CUDA kernels, and the CUDA kernels executed on
// the CPU by the test emulator, which live in a namespace of their own.
#define HE_DEVICE_IS_cpu 1
#define HE_DEVICE_IS_cuda 2
#define HE_CONCAT_(a, b) a##b
#define HE_CONCAT(a, b) HE_CONCAT_(a, b)
#define HE_ON_CUDA (HE_CONCAT(HE_DEVICE_IS_, HE_DEVICE) == 2 && !defined(HE_CUDA_EMULATOR))

#if defined(HE_CUDA_EMULATOR)
#define HE_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(hybrid_engine_emulated, CPU, m)
#elif HE_ON_CUDA
#define HE_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(hybrid_engine, CUDA, m)
#else
#define HE_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(hybrid_engine, CPU, m)
#endif

#if HE_ON_CUDA
// A CPU-only libtorch lacks this symbol; weak, so that the library still loads there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace he::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kAny = -1;

inline std::string join(const int64_t* values, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) {
    text += (i ? ", " : "") + (values[i] == kAny ? std::string("any") : std::to_string(values[i]));
  }
  return text + "]";
}

inline void check_shape(const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> expected) {
  const auto found = tensor.sizes();
  bool same = found.size() == expected.size();
  for (size_t i = 0; same && i < found.size(); ++i) {
    const int64_t wanted = expected.begin()[i];
    same = wanted == kAny || wanted == found[i];
  }
  STD_TORCH_CHECK(same, name, ": expected ", join(expected.begin(), expected.size()), ", got ",
                  join(found.data(), found.size()));
}

// The name that Python has for the dtype.
inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, ": expected ", dtype_name(expected),
                  ", got ", dtype_name(tensor.scalar_type()));
}

inline void check_contiguous(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

// A kernel's dtype tag; any other dtype is an error that names the argument.
inline DType float_dtype(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16, got ",
                      dtype_name(tensor.scalar_type()));
  }
  return DType::kFloat32;
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(tensor.device() == first.device(), name,
                  ": on another device than the first argument");
}

// The usual contract of an operand: shape, dtype and device of the op, contiguous.
inline void check_operand(const char* name, const Tensor& tensor,
                          std::initializer_list<int64_t> shape, ScalarType dtype,
                          const Tensor& first) {
  check_shape(name, tensor, shape);
  check_dtype(name, tensor, dtype);
  check_same_device(name, tensor, first);
  check_contiguous(name, tensor);
}

inline void check_operand(const char* name, const OptionalTensor& tensor,
                          std::initializer_list<int64_t> shape, ScalarType dtype,
                          const Tensor& first) {
  if (tensor) check_operand(name, *tensor, shape, dtype, first);
}

inline int32_t shim_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    default:
      STD_TORCH_CHECK(false, "no op returns ", dtype_name(type));
  }
  return 0;
}

// With HYBRID_ENGINE_CHECK=1 results start as NaN, or the largest integer: what a kernel leaves
// unwritten shows.
inline void poison(Tensor& tensor) {
  static const bool wanted = [] {
    const char* value = std::getenv("HYBRID_ENGINE_CHECK");
    return value != nullptr && std::string(value) == "1";
  }();
  if (!wanted || tensor.numel() == 0) return;
  const bool integral = tensor.scalar_type() == ScalarType::Long;
  torch::stable::fill_(tensor, integral ? 9.2e18 : std::numeric_limits<double>::quiet_NaN());
}

// A new contiguous tensor on the device of `like`. It comes straight from the allocator: the way
// through the dispatcher takes as long as a small kernel.
inline Tensor new_result(const Tensor& like, const int64_t* sizes, size_t rank, ScalarType dtype) {
  constexpr size_t kMostDimensions = 16;
  STD_TORCH_CHECK(rank <= kMostDimensions, "expected at most ", kMostDimensions,
                  " dimensions, got ", rank);
  int64_t strides[kMostDimensions], count = 1;
  for (size_t i = rank; i-- > 0;) {
    strides[i] = count;
    count *= std::max<int64_t>(1, sizes[i]);
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(rank), sizes, strides,
                                                  shim_dtype(dtype), device_type,
                                                  like.get_device_index(), &handle));
  Tensor tensor(handle);
  poison(tensor);
  return tensor;
}

inline Tensor new_result(const Tensor& like, std::initializer_list<int64_t> sizes,
                         ScalarType dtype) {
  return new_result(like, sizes.begin(), sizes.size(), dtype);
}

inline Tensor result_like(const Tensor& like) {
  return new_result(like, like.sizes().data(), like.sizes().size(), like.scalar_type());
}

// The shape of `like` with another last dimension.
inline Tensor result_with_last(const Tensor& like, int64_t last) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = last;
  return new_result(like, sizes.data(), sizes.size(), like.scalar_type());
}

template <typename T = void>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Makes the tensor's device current for the scope and gives its stream.
class Launch {
 public:
#if HE_ON_CUDA
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
#else
  explicit Launch(const Tensor&) {}
#endif
  Stream stream() const { return stream_; }

 private:
#if HE_ON_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_ = nullptr;
};

}  // namespace he::binding
