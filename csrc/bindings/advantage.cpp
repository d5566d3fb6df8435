#include <tuple>

#include "bindings/binding.h"

namespace he::binding {
namespace {

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask,
                               double gamma, double lam) {
  check_operand("rewards", rewards, {kAny, kAny}, ScalarType::Float, rewards);
  const int64_t rows = rewards.size(0), length = rewards.size(1);
  check_operand("values", values, {rows, length}, ScalarType::Float, rewards);
  check_operand("mask", mask, {rows, length}, ScalarType::Bool, rewards);
  Tensor advantages = result_like(rewards);
  Tensor returns = result_like(rewards);
  if (rewards.numel() == 0) return {advantages, returns};
  Gae args{};
  args.advantages = static_cast<float*>(advantages.mutable_data_ptr());
  args.returns = static_cast<float*>(returns.mutable_data_ptr());
  args.rewards = data<float>(rewards);
  args.values = data<float>(values);
  args.mask = data<uint8_t>(mask);
  args.rows = rows;
  args.length = length;
  args.gamma = gamma;
  args.lam = lam;
  Launch launch(rewards);
  HE_DEVICE::gae(args, launch.stream());
  return {advantages, returns};
}

void check_masked(const Tensor& x, const Tensor& mask) {
  check_dtype("x", x, ScalarType::Float);
  check_contiguous("x", x);
  check_dtype("mask", mask, ScalarType::Bool);
  check_contiguous("mask", mask);
  check_same_device("mask", mask, x);
  STD_TORCH_CHECK(join(mask.sizes().data(), mask.dim()) == join(x.sizes().data(), x.dim()),
                  "mask: expected ", join(x.sizes().data(), x.dim()), ", got ",
                  join(mask.sizes().data(), mask.dim()));
}

Tensor masked_moments(const Tensor& x, const Tensor& mask) {
  check_masked(x, mask);
  Tensor moments = new_result(x, {3}, ScalarType::Double);
  Launch launch(x);
  HE_DEVICE::masked_moments(static_cast<double*>(moments.mutable_data_ptr()), data<float>(x),
                            data<uint8_t>(mask), x.numel(), launch.stream());
  return moments;
}

Tensor masked_whiten(const Tensor& x, const Tensor& mask, const OptionalTensor& moments,
                     bool shift_mean, double eps) {
  check_masked(x, mask);
  check_operand("moments", moments, {3}, ScalarType::Double, x);
  const Tensor known = moments ? *moments : masked_moments(x, mask);
  Tensor out = result_like(x);
  if (x.numel() == 0) return out;
  Launch launch(x);
  HE_DEVICE::masked_whiten(static_cast<float*>(out.mutable_data_ptr()), data<float>(x),
                           data<uint8_t>(mask), data<double>(known), x.numel(), shift_mean, eps,
                           launch.stream());
  return out;
}

HE_REGISTER(m) {
  m.impl("gae", TORCH_BOX(&gae));
  m.impl("masked_moments", TORCH_BOX(&masked_moments));
  m.impl("masked_whiten", TORCH_BOX(&masked_whiten));
}

}  // namespace
}  // namespace he::binding
