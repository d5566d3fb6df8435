#include "bindings/binding.h"

namespace he::binding {
namespace {

int64_t last_dim(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected at least one dimension, got a scalar");
  return x.size(x.dim() - 1);
}

// Rows of `x`, after checking what the norms have in common.
int64_t checked_rows(const Tensor& x, const Tensor* residual, const Tensor& weight) {
  const int64_t dim = last_dim(x);
  check_contiguous("x", x);
  check_operand("weight", weight, {dim}, x.scalar_type(), x);
  if (residual != nullptr) {
    STD_TORCH_CHECK(residual->numel() == x.numel() && last_dim(*residual) == dim,
                    "residual: expected ", join(x.sizes().data(), x.dim()), ", got ",
                    join(residual->sizes().data(), residual->dim()));
    check_dtype("residual", *residual, x.scalar_type());
    check_contiguous("residual", *residual);
    check_same_device("residual", *residual, x);
  }
  return dim == 0 ? 0 : x.numel() / dim;
}

Tensor run_rms_norm(const Tensor& x, Tensor* residual, const Tensor& weight, double eps,
                    double weight_offset) {
  const DType dtype = float_dtype("x", x);
  const int64_t rows = checked_rows(x, residual, weight);
  Tensor out = result_like(x);
  if (rows == 0) return out;
  Launch launch(x);
  HE_DEVICE::rms_norm(out.mutable_data_ptr(), x.const_data_ptr(),
                      residual ? residual->mutable_data_ptr() : nullptr, weight.const_data_ptr(),
                      rows, last_dim(x), static_cast<float>(eps), static_cast<float>(weight_offset),
                      dtype, launch.stream());
  return out;
}

Tensor run_layer_norm(const Tensor& x, Tensor* residual, const Tensor& weight,
                      const OptionalTensor& bias, double eps) {
  const DType dtype = float_dtype("x", x);
  const int64_t rows = checked_rows(x, residual, weight);
  check_operand("bias", bias, {last_dim(x)}, x.scalar_type(), x);
  Tensor out = result_like(x);
  if (rows == 0) return out;
  Launch launch(x);
  HE_DEVICE::layer_norm(out.mutable_data_ptr(), x.const_data_ptr(),
                        residual ? residual->mutable_data_ptr() : nullptr, weight.const_data_ptr(),
                        data_or_null(bias), rows, last_dim(x), static_cast<float>(eps), dtype,
                        launch.stream());
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset) {
  return run_rms_norm(x, nullptr, weight, eps, weight_offset);
}

Tensor add_rms_norm(const Tensor& x, Tensor residual, const Tensor& weight, double eps,
                    double weight_offset) {
  return run_rms_norm(x, &residual, weight, eps, weight_offset);
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps) {
  return run_layer_norm(x, nullptr, weight, bias, eps);
}

Tensor add_layer_norm(const Tensor& x, Tensor residual, const Tensor& weight,
                      const OptionalTensor& bias, double eps) {
  return run_layer_norm(x, &residual, weight, bias, eps);
}

HE_REGISTER(m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
}

}  // namespace
}  // namespace he::binding
