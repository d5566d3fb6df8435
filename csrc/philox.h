// Philox4x32-10 (Salmon et al., SC 2011): the same counter-based uniforms on every device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(HE_CUDA_EMULATOR)
#define HE_HOST_DEVICE __host__ __device__
#else
#define HE_HOST_DEVICE
#endif

namespace he {

// A uniform in [0, 1) with 53 random bits, for key = seed and counter = position.
HE_HOST_DEVICE inline double philox_uniform(int64_t seed, int64_t position) {
  uint32_t counter[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0,
                         0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0], b = uint64_t{0xCD9E8D57u} * counter[2];
    const uint32_t next0 = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0];
    const uint32_t next2 = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1];
    counter[0] = next0;
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = next2;
    counter[3] = static_cast<uint32_t>(a);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return ((counter[0] >> 5) * 67108864.0 + (counter[1] >> 6)) * (1.0 / 9007199254740992.0);
}

}  // namespace he
