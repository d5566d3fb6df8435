#include "bindings/binding.h"

namespace he::binding {
namespace {

struct Inputs {
  const Tensor& q;
  const Tensor& k_cache;
  const Tensor& v_cache;
  const Tensor& block_tables;
  const Tensor& seq_lens;
  const OptionalTensor& alibi_slopes;
};

// Checks what decode and prefill have in common and fills it in; `out` is not set.
PagedAttention checked(const Inputs& in, double scale, int64_t window, double softcap) {
  PagedAttention args{};
  args.dtype = float_dtype("q", in.q);
  check_shape("k_cache", in.k_cache, {kAny, kAny, kAny, kAny});
  const int64_t blocks = in.k_cache.size(0), kv_heads = in.k_cache.size(1);
  const int64_t block_size = in.k_cache.size(2), head_dim = in.k_cache.size(3);
  const ScalarType dtype = in.q.scalar_type();
  check_operand("q", in.q, {kAny, kAny, head_dim}, dtype, in.q);
  const int64_t num_heads = in.q.size(1), sequences = in.seq_lens.numel();
  STD_TORCH_CHECK(kv_heads > 0 && num_heads % kv_heads == 0, "q: ", num_heads,
                  " heads are no multiple of ", kv_heads, " kv heads");
  check_operand("k_cache", in.k_cache, {blocks, kv_heads, block_size, head_dim}, dtype, in.q);
  check_operand("v_cache", in.v_cache, {blocks, kv_heads, block_size, head_dim}, dtype, in.q);
  check_operand("seq_lens", in.seq_lens, {sequences}, ScalarType::Int, in.q);
  check_operand("block_tables", in.block_tables, {sequences, kAny}, ScalarType::Int, in.q);
  check_operand("alibi_slopes", in.alibi_slopes, {num_heads}, ScalarType::Float, in.q);
  args.q = in.q.const_data_ptr();
  args.k_cache = in.k_cache.const_data_ptr();
  args.v_cache = in.v_cache.const_data_ptr();
  args.block_tables = data<int32_t>(in.block_tables);
  args.seq_lens = data<int32_t>(in.seq_lens);
  args.alibi_slopes = data_or_null<float>(in.alibi_slopes);
  args.tokens = in.q.size(0);
  args.sequences = sequences;
  args.num_heads = num_heads;
  args.num_kv_heads = kv_heads;
  args.head_dim = head_dim;
  args.block_size = block_size;
  args.max_blocks = in.block_tables.size(1);
  args.max_query_len = 1;
  args.window = window;
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  return args;
}

Tensor launch_attention(const Tensor& q, PagedAttention& args) {
  Tensor out = result_like(q);
  if (out.numel() == 0) return out;
  args.out = out.mutable_data_ptr();
  Launch launch(q);
  Tensor workspace = new_result(q, {HE_DEVICE::paged_attention_workspace(args)}, ScalarType::Float);
  args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  HE_DEVICE::paged_attention(args, launch.stream());
  return out;
}

Tensor decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& block_tables, const Tensor& seq_lens, double scale,
                        const OptionalTensor& alibi_slopes, int64_t window, double softcap,
                        int64_t num_splits) {
  check_shape("q", q, {kAny, kAny, kAny});
  check_shape("seq_lens", seq_lens, {q.size(0)});
  PagedAttention args =
      checked({q, k_cache, v_cache, block_tables, seq_lens, alibi_slopes}, scale, window, softcap);
  args.num_splits = num_splits;
  return launch_attention(q, args);
}

Tensor prefill_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                         const Tensor& block_tables, const Tensor& cu_seqlens,
                         const Tensor& seq_lens, int64_t max_query_len, double scale,
                         const OptionalTensor& alibi_slopes, int64_t window, double softcap) {
  PagedAttention args =
      checked({q, k_cache, v_cache, block_tables, seq_lens, alibi_slopes}, scale, window, softcap);
  check_operand("cu_seqlens", cu_seqlens, {args.sequences + 1}, ScalarType::Int, q);
  args.cu_seqlens = data<int32_t>(cu_seqlens);
  args.max_query_len = max_query_len;
  return launch_attention(q, args);
}

HE_REGISTER(m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("prefill_attention", TORCH_BOX(&prefill_attention));
}

}  // namespace
}  // namespace he::binding
