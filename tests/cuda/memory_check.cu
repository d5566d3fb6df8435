// Launches the kernels of the smaller op families on each of their paths, see memory_check.h. Other
// tests compare the results.
#include "memory_check.h"

namespace he::cuda {
namespace {

void norms(DType dtype, bool quick) {
  const Sizes all_dims{1, 7, 63, 257, 512, 520, 4096, 16384, 20001};
  for (int64_t dim : quick ? Sizes{63, 520} : all_dims) {
    Buffers b;
    const int64_t rows = 3, count = rows * dim, shift = dim == 520;
    const auto row = [&] { return b.numbers(dtype, dim, shift); };
    const auto all = [&] { return b.numbers(dtype, count, shift); };
    rms_norm(all(), all(), nullptr, row(), rows, dim, 1e-6f, 1.f, dtype, nullptr);
    layer_norm(all(), all(), all(), row(), row(), rows, dim, 1e-6f, dtype, nullptr);
    finish();
  }
}

void activations(DType dtype, bool) {
  for (int64_t dim : {1, 7, 63, 257, 512, 4104}) {
    for (auto kind :
         {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu}) {
      Buffers b;
      const int64_t rows = 3, count = rows * dim, shift = dim == 512;
      const auto all = [&] { return b.numbers(dtype, count, shift); };
      activation_and_mul(all(), b.numbers(dtype, 2 * count, shift), rows, dim, kind, dtype,
                         nullptr);
      bias_activation(all(), all(), b.numbers(dtype, dim, shift), rows, dim, kind, dtype, nullptr);
      bias_activation(all(), all(), nullptr, rows, dim, kind, dtype, nullptr);
      finish();
    }
  }
}

void ropes(DType dtype, bool) {
  struct Heads {
    int64_t heads, kv_heads, head_dim, rotary, shift;
  };
  for (const Heads& h :
       {Heads{4, 2, 64, 64, 0}, Heads{4, 1, 64, 20, 0}, Heads{3, 3, 7, 6, 0},
        Heads{40, 8, 128, 128, 0}, Heads{2, 1, 80, 32, 1}, Heads{1, 1, 576, 0, 0}}) {
    for (bool interleaved : {false, true}) {
      Buffers b;
      constexpr int64_t kTokens = 3, kBlocks = 2, kBlockSize = 5, kPositions = 9;
      const int64_t width = (h.heads + 2 * h.kv_heads) * h.head_dim;
      const int64_t cache = kBlocks * h.kv_heads * kBlockSize * h.head_dim;
      const auto numbers = [&](int64_t count) { return b.numbers(dtype, count, h.shift); };
      RopeAndStoreKv a{};
      a.q = numbers(kTokens * h.heads * h.head_dim);
      a.k_cache = numbers(cache);
      a.v_cache = numbers(cache);
      a.qkv = numbers(kTokens * width);
      a.bias = numbers(width);
      a.q_norm = numbers(h.head_dim);
      a.k_norm = numbers(h.head_dim);
      const void* table = b.numbers(DType::kFloat32, kPositions * h.rotary + 1);
      a.cos_sin = h.rotary ? static_cast<const float*>(table) : nullptr;
      a.positions = b.of(std::vector<int64_t>{0, kPositions - 1, 4});
      a.slot_mapping = b.of(std::vector<int64_t>{kBlocks * kBlockSize - 1, -1, 0});
      a.tokens = kTokens;
      a.num_heads = h.heads;
      a.num_kv_heads = h.kv_heads;
      a.head_dim = h.head_dim;
      a.block_size = kBlockSize;
      a.rotary_dim = h.rotary;
      a.norm_eps = 1e-6f;
      a.interleaved = interleaved;
      a.dtype = dtype;
      rope_and_store_kv(a, nullptr);
      finish();
    }
  }
}

void samples(DType dtype, bool quick) {
  for (int64_t vocab : quick ? Sizes{257} : Sizes{1, 7, 257, 1024, 33001}) {
    for (bool penalised : {false, true}) {
      Buffers b;
      Sample a{};
      a.rows = 5;  // all tokens, greedy, top-k, top-p, everything
      a.vocab = vocab;
      a.dtype = dtype;
      a.logits = b.numbers(dtype, a.rows * vocab, vocab == 1024);
      a.tokens = b.of(std::vector<int64_t>(a.rows));
      a.logprobs = b.of(std::vector<float>(a.rows));
      a.truncated_logprobs = b.of(std::vector<float>(a.rows));
      a.temperature = b.of(std::vector<float>{1.f, 0.f, 1.f, 2.f, 0.7f});
      a.top_k = b.of(std::vector<int64_t>{0, 0, 5, 0, 40});
      a.top_p = b.of(std::vector<float>{1.f, 1.f, 1.f, 0.5f, 0.8f});
      a.min_p = b.of(std::vector<float>{0.f, 0.f, 0.f, 0.f, 0.02f});
      a.seeds = b.of(std::vector<int64_t>{1, 2, 3, 4, 5});
      a.positions = b.of(std::vector<int64_t>{0, 1, 2, 3, int64_t{1} << 40});
      if (penalised) {
        a.repetition_penalty = b.of(std::vector<float>(a.rows, 1.5f));
        a.seen = b.of(std::vector<uint8_t>(a.rows * vocab, 1));
      }
      sample(a, nullptr);
      finish();
    }
  }
}

void gathers(DType dtype, bool) {
  constexpr int64_t kRows = 19, kColumns = 72, kRank = 3;
  for (int64_t world : {1, 3, 11}) {
    for (DType to : {DType::kFloat32, DType::kFloat16}) {
      Buffers b;
      const int64_t partition = ceil_div(kRows * kColumns, world);
      UnpackEntry whole{b.numbers(to, kRows * kColumns),
                        nullptr,
                        nullptr,
                        0,
                        partition,
                        kRows,
                        kColumns,
                        0,
                        kRows,
                        0,
                        kColumns,
                        0,
                        0.f,
                        to,
                        dtype};
      UnpackEntry slice = whole, merged = whole;
      slice.column_begin = 5;
      slice.column_end = 70;
      slice.destination = b.numbers(to, kRows * 65);
      merged.destination = b.numbers(to, kRows * kColumns);
      merged.lora_a = b.numbers(dtype, kRank * kColumns);
      merged.lora_b = b.numbers(dtype, kRows * kRank);
      merged.lora_rank = kRank;
      const std::vector<UnpackEntry> plain{whole, slice}, all{merged, slice, whole};
      for (const auto& entries : {plain, all}) {
        gather_unpack({b.numbers(dtype, world * partition), entries.data(),
                       static_cast<int64_t>(entries.size()), partition, dtype},
                      nullptr);
        finish();
      }
    }
  }
}

void advantages(DType, bool) {
  for (int64_t length : {1, 31, 100}) {
    Buffers b;
    constexpr int64_t kRows = 9;
    const int64_t count = kRows * length;
    const auto floats = [&] { return static_cast<float*>(b.numbers(DType::kFloat32, count)); };
    const uint8_t* mask = b.of(std::vector<uint8_t>(count, 1));
    gae({floats(), floats(), floats(), floats(), mask, kRows, length, 0.9, 0.9}, nullptr);
    double* moments = b.of(std::vector<double>(3));
    const float* x = floats();
    masked_moments(moments, x, mask, count, nullptr);
    masked_whiten(floats(), x, mask, moments, count, true, 1e-8, nullptr);
    finish();
  }
}

}  // namespace
}  // namespace he::cuda

int main(int count, char** arguments) {
  using namespace he::cuda;
  return check_memory(count, arguments,
                      {{"norm", norms},
                       {"activation", activations},
                       {"rope", ropes},
                       {"sampling", samples},
                       {"gather", gathers},
                       {"advantage", advantages}});
}
