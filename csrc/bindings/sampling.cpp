#include <tuple>

#include "bindings/binding.h"

namespace he::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor> sample(const Tensor& logits, const Tensor& temperature,
                                          const Tensor& top_k, const Tensor& top_p,
                                          const Tensor& min_p, const Tensor& seeds,
                                          const Tensor& positions,
                                          const OptionalTensor& repetition_penalty,
                                          const OptionalTensor& seen) {
  const DType dtype = float_dtype("logits", logits);
  check_operand("logits", logits, {kAny, kAny}, logits.scalar_type(), logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_operand("temperature", temperature, {rows}, ScalarType::Float, logits);
  check_operand("top_k", top_k, {rows}, ScalarType::Long, logits);
  check_operand("top_p", top_p, {rows}, ScalarType::Float, logits);
  check_operand("min_p", min_p, {rows}, ScalarType::Float, logits);
  check_operand("seeds", seeds, {rows}, ScalarType::Long, logits);
  check_operand("positions", positions, {rows}, ScalarType::Long, logits);
  check_operand("repetition_penalty", repetition_penalty, {rows}, ScalarType::Float, logits);
  check_operand("seen", seen, {rows, vocab}, ScalarType::Byte, logits);
  STD_TORCH_CHECK(!repetition_penalty || seen, "seen: needed with repetition_penalty, got None");
  Tensor tokens = new_result(logits, {rows}, ScalarType::Long);
  Tensor logprobs = new_result(logits, {rows}, ScalarType::Float);
  Tensor truncated = new_result(logits, {rows}, ScalarType::Float);
  if (rows == 0) return {tokens, logprobs, truncated};
  STD_TORCH_CHECK(vocab > 0, "logits: expected at least one token, got [", rows, ", 0]");
  Sample args{};
  args.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  args.logprobs = static_cast<float*>(logprobs.mutable_data_ptr());
  args.truncated_logprobs = static_cast<float*>(truncated.mutable_data_ptr());
  args.logits = logits.const_data_ptr();
  args.temperature = data<float>(temperature);
  args.top_k = data<int64_t>(top_k);
  args.top_p = data<float>(top_p);
  args.min_p = data<float>(min_p);
  args.seeds = data<int64_t>(seeds);
  args.positions = data<int64_t>(positions);
  args.repetition_penalty = data_or_null<float>(repetition_penalty);
  args.seen = data_or_null<uint8_t>(seen);
  args.rows = rows;
  args.vocab = vocab;
  args.dtype = dtype;
  Launch launch(logits);
  HE_DEVICE::sample(args, launch.stream());
  return {tokens, logprobs, truncated};
}

HE_REGISTER(m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace
}  // namespace he::binding
