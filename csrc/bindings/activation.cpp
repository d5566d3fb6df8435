#include "bindings/binding.h"

namespace he::binding {
namespace {

Tensor activation_and_mul(const Tensor& x, Activation activation) {
  const int64_t rank = x.dim();
  STD_TORCH_CHECK(rank >= 1 && x.size(rank - 1) % 2 == 0,
                  "x: expected an even last dimension (gate and up), got ",
                  join(x.sizes().data(), rank));
  check_contiguous("x", x);
  const DType dtype = float_dtype("x", x);
  const int64_t dim = x.size(rank - 1) / 2;
  Tensor out = result_with_last(x, dim);
  if (out.numel() == 0) return out;
  Launch launch(x);
  HE_DEVICE::activation_and_mul(out.mutable_data_ptr(), x.const_data_ptr(), out.numel() / dim, dim,
                                activation, dtype, launch.stream());
  return out;
}

Tensor bias_activation(const Tensor& x, const OptionalTensor& bias, Activation activation) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected at least one dimension, got a scalar");
  check_contiguous("x", x);
  const int64_t dim = x.size(x.dim() - 1);
  check_operand("bias", bias, {dim}, x.scalar_type(), x);
  const DType dtype = float_dtype("x", x);
  Tensor out = result_like(x);
  if (out.numel() == 0) return out;
  Launch launch(x);
  HE_DEVICE::bias_activation(out.mutable_data_ptr(), x.const_data_ptr(), data_or_null(bias),
                             out.numel() / dim, dim, activation, dtype, launch.stream());
  return out;
}

Activation gelu_kind(bool tanh) { return tanh ? Activation::kGeluTanh : Activation::kGelu; }

Tensor silu_and_mul(const Tensor& x) { return activation_and_mul(x, Activation::kSilu); }

Tensor gelu_and_mul(const Tensor& x, bool tanh) { return activation_and_mul(x, gelu_kind(tanh)); }

Tensor bias_gelu(const Tensor& x, const OptionalTensor& bias, bool tanh) {
  return bias_activation(x, bias, gelu_kind(tanh));
}

Tensor relu(const Tensor& x) { return bias_activation(x, std::nullopt, Activation::kRelu); }

HE_REGISTER(m) {
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul));
  m.impl("gelu_and_mul", TORCH_BOX(&gelu_and_mul));
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  m.impl("relu", TORCH_BOX(&relu));
}

}  // namespace
}  // namespace he::binding
