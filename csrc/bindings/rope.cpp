#include "bindings/binding.h"

namespace he::binding {
namespace {

void check_rope(const Tensor& qkv, const OptionalTensor& bias, const OptionalTensor& q_norm,
                const OptionalTensor& k_norm, const OptionalTensor& cos_sin,
                const Tensor& positions, const Tensor& k_cache, const Tensor& v_cache,
                const Tensor& slot_mapping, int64_t num_heads) {
  check_shape("k_cache", k_cache, {kAny, kAny, kAny, kAny});
  const int64_t kv_heads = k_cache.size(1), head_dim = k_cache.size(3);
  const int64_t width = (num_heads + 2 * kv_heads) * head_dim;
  const ScalarType dtype = qkv.scalar_type();
  check_operand("qkv", qkv, {kAny, width}, dtype, qkv);
  const int64_t tokens = qkv.size(0);
  check_operand("bias", bias, {width}, dtype, qkv);
  check_operand("q_norm", q_norm, {head_dim}, dtype, qkv);
  check_operand("k_norm", k_norm, {head_dim}, dtype, qkv);
  check_operand("cos_sin", cos_sin, {kAny, kAny}, ScalarType::Float, qkv);
  if (cos_sin) {
    const int64_t rotary = cos_sin->size(1);
    STD_TORCH_CHECK(rotary <= head_dim && rotary % 2 == 0,
                    "cos_sin: expected an even width of at most head_dim=", head_dim, ", got ",
                    rotary);
  }
  check_operand("positions", positions, {tokens}, ScalarType::Long, qkv);
  check_operand("k_cache", k_cache, {kAny, kAny, kAny, kAny}, dtype, qkv);
  check_operand("v_cache", v_cache, {k_cache.size(0), kv_heads, k_cache.size(2), head_dim}, dtype,
                qkv);
  check_operand("slot_mapping", slot_mapping, {tokens}, ScalarType::Long, qkv);
}

Tensor rope_and_store_kv(const Tensor& qkv, const OptionalTensor& bias,
                         const OptionalTensor& q_norm, const OptionalTensor& k_norm,
                         const OptionalTensor& cos_sin, const Tensor& positions, Tensor k_cache,
                         Tensor v_cache, const Tensor& slot_mapping, int64_t num_heads,
                         bool interleaved, double norm_eps, double norm_weight_offset) {
  check_rope(qkv, bias, q_norm, k_norm, cos_sin, positions, k_cache, v_cache, slot_mapping,
             num_heads);
  const int64_t tokens = qkv.size(0), head_dim = k_cache.size(3);
  Tensor q = new_result(qkv, {tokens, num_heads, head_dim}, qkv.scalar_type());
  if (tokens == 0) return q;
  RopeAndStoreKv args{};
  args.q = q.mutable_data_ptr();
  args.k_cache = k_cache.mutable_data_ptr();
  args.v_cache = v_cache.mutable_data_ptr();
  args.qkv = qkv.const_data_ptr();
  args.bias = data_or_null(bias);
  args.q_norm = data_or_null(q_norm);
  args.k_norm = data_or_null(k_norm);
  args.cos_sin = data_or_null<float>(cos_sin);
  args.positions = data<int64_t>(positions);
  args.slot_mapping = data<int64_t>(slot_mapping);
  args.tokens = tokens;
  args.num_heads = num_heads;
  args.num_kv_heads = k_cache.size(1);
  args.head_dim = head_dim;
  args.block_size = k_cache.size(2);
  args.rotary_dim = cos_sin ? cos_sin->size(1) : 0;
  args.norm_eps = static_cast<float>(norm_eps);
  args.norm_weight_offset = static_cast<float>(norm_weight_offset);
  args.interleaved = interleaved;
  args.dtype = float_dtype("qkv", qkv);
  Launch launch(qkv);
  HE_DEVICE::rope_and_store_kv(args, launch.stream());
  return q;
}

HE_REGISTER(m) { m.impl("rope_and_store_kv", TORCH_BOX(&rope_and_store_kv)); }

}  // namespace
}  // namespace he::binding
