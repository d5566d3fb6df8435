// One attention launch as a program, since a sanitizer must own the process:
//   sanitizer_main DTYPE HEADS KV_HEADS HEAD_DIM QUERIES KEYS SPLITS ORDER ASYNC_POLICY
// Every operand is an allocation of its exact size. Prints the sum of the results.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels.h"

extern "C" int he_emulator_configure(int order, uint64_t seed, int async_policy);

namespace {

constexpr int64_t kBlockSize = 16;

// `count` elements of any of the types, each byte pattern a small number.
std::vector<uint8_t> elements(int64_t count, he::DType dtype) {
  const int64_t bytes = dtype == he::DType::kFloat32 ? 4 : 2;
  std::vector<uint8_t> data(count * bytes);
  for (size_t i = 0; i < data.size(); ++i) {
    const bool high = static_cast<int64_t>(i) % bytes == bytes - 1;
    data[i] = high ? 0x3c | (i % 7 == 0) << 7 : 0;
  }
  return data;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 10) return 2;
  const auto number = [&](int i) { return std::atoll(arguments[i]); };
  if (he_emulator_configure(number(8), 0, number(9)) != 0) return 2;
  he::PagedAttention args{};
  args.dtype = static_cast<he::DType>(number(1));
  args.num_heads = number(2), args.num_kv_heads = number(3), args.head_dim = number(4);
  args.tokens = args.max_query_len = number(5);
  args.num_splits = number(7);
  args.sequences = 1, args.block_size = kBlockSize, args.scale = 0.1f;
  const int32_t keys = number(6);
  args.max_blocks = (keys + kBlockSize - 1) / kBlockSize;

  std::vector<int32_t> table(args.max_blocks), bounds = {0, static_cast<int32_t>(args.tokens)};
  for (size_t i = 0; i < table.size(); ++i) table[i] = table.size() - 1 - i;
  const int64_t cached = args.max_blocks * args.num_kv_heads * kBlockSize * args.head_dim;
  const int64_t packed = args.tokens * args.num_heads * args.head_dim;
  const std::vector<uint8_t> q = elements(packed, args.dtype), k = elements(cached, args.dtype),
                             v = elements(cached, args.dtype);
  std::vector<uint8_t> out(q.size());
  args.q = q.data(), args.k_cache = k.data(), args.v_cache = v.data(), args.out = out.data();
  args.block_tables = table.data(), args.cu_seqlens = bounds.data(), args.seq_lens = &keys;
  std::vector<float> workspace(he::cuda::paged_attention_workspace(args));
  args.workspace = workspace.data();
  he::cuda::paged_attention(args, nullptr);

  int64_t sum = 0;
  for (uint8_t byte : out) sum += byte;
  std::printf("%lld\n", static_cast<long long>(sum));
  return 0;
}
