#include <vector>

#include "bindings/binding.h"

namespace he::binding {
namespace {

constexpr int64_t kMaxSkinnyRows = 16;

// Rows of `x`, after checking the operands of a linear layer.
int64_t checked_rows(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const int64_t rank = x.dim();
  STD_TORCH_CHECK(rank >= 1, "x: expected at least one dimension, got a scalar");
  float_dtype("x", x);
  check_contiguous("x", x);
  const int64_t in_dim = x.size(rank - 1);
  check_operand("weight", weight, {kAny, in_dim}, x.scalar_type(), x);
  check_operand("bias", bias, {weight.size(0)}, x.scalar_type(), x);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < rank; ++i) rows *= x.size(i);
  return rows;
}

Tensor skinny_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const int64_t rows = checked_rows(x, weight, bias);
  STD_TORCH_CHECK(rows <= kMaxSkinnyRows, "x: expected at most ", kMaxSkinnyRows, " rows, got ",
                  rows);
  Tensor out = result_with_last(x, weight.size(0));
  if (out.numel() == 0) return out;
  Launch launch(x);
  HE_DEVICE::skinny_linear(out.mutable_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                           data_or_null(bias), rows, weight.size(0), weight.size(1),
                           float_dtype("x", x), launch.stream());
  return out;
}

std::vector<LoraAdapter> checked_adapters(const Tensor& x, const Tensor& weight,
                                          const std::vector<Tensor>& lora_a,
                                          const std::vector<Tensor>& lora_b,
                                          const std::vector<double>& scales) {
  const int64_t count = lora_a.size();
  STD_TORCH_CHECK(static_cast<int64_t>(lora_b.size()) == count, "lora_b: expected ", count,
                  " tensors, as many as lora_a, got ", lora_b.size());
  STD_TORCH_CHECK(static_cast<int64_t>(scales.size()) == count, "scales: expected ", count,
                  " values, as many as lora_a, got ", scales.size());
  STD_TORCH_CHECK(count <= kMaxLoraAdapters, "lora_a: expected at most ", kMaxLoraAdapters,
                  " adapters, got ", count);
  std::vector<LoraAdapter> adapters;
  for (int64_t i = 0; i < count; ++i) {
    check_operand("lora_a", lora_a[i], {kAny, weight.size(1)}, x.scalar_type(), x);
    const int64_t rank = lora_a[i].size(0);
    check_operand("lora_b", lora_b[i], {weight.size(0), rank}, x.scalar_type(), x);
    adapters.push_back({lora_a[i].const_data_ptr(), lora_b[i].const_data_ptr(), rank,
                        static_cast<float>(scales[i])});
  }
  return adapters;
}

Tensor fused_lora(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                  std::vector<double> scales, const OptionalTensor& adapter_index) {
  const int64_t rows = checked_rows(x, weight, bias);
  const std::vector<LoraAdapter> adapters = checked_adapters(x, weight, lora_a, lora_b, scales);
  check_operand("adapter_index", adapter_index, {rows}, ScalarType::Int, x);
  Tensor out = result_with_last(x, weight.size(0));
  if (out.numel() == 0) return out;
  FusedLora args{};
  args.out = out.mutable_data_ptr();
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.bias = data_or_null(bias);
  args.adapters = adapters.data();
  args.adapter_index = data_or_null<int32_t>(adapter_index);
  args.rows = rows;
  args.out_dim = weight.size(0);
  args.in_dim = weight.size(1);
  args.num_adapters = adapters.size();
  args.dtype = float_dtype("x", x);
  Launch launch(x);
  HE_DEVICE::fused_lora(args, launch.stream());
  return out;
}

HE_REGISTER(m) {
  m.impl("skinny_linear", TORCH_BOX(&skinny_linear));
  m.impl("fused_lora", TORCH_BOX(&fused_lora));
}

}  // namespace
}  // namespace he::binding
