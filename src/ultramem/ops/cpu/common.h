// What all kernels share: vectors as wide as the target's registers, loads that widen to fp32, checks, row prefetch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <optional>

namespace ultramem {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2 and NEON
#endif

// The compiler's own vectors: arithmetic on them is one instruction each, on any target.
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

template <class T, class P>
inline T load_bits(const P* from) {
  T bits;
  std::memcpy(&bits, from, sizeof(T));  // rows need not be aligned
  return bits;
}

inline Floats load(const float* from) { return load_bits<Floats>(from); }

inline Floats load(const at::BFloat16* from) {
  // A bf16 number is the upper half of the fp32 number.
  const Words words = __builtin_convertvector(load_bits<Halves>(from), Words) << 16;
  Floats floats;
  std::memcpy(&floats, &words, sizeof floats);
  return floats;
}

inline float load_one(const float* from) { return *from; }
inline float load_one(const at::BFloat16* from) { return static_cast<float>(*from); }

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline Floats broadcast(float value) { return Floats{} + value; }

// Sum of the lanes, in a fixed order.
inline float sum(Floats value) {
  float lanes[kLanes];
  std::memcpy(lanes, &value, sizeof lanes);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

constexpr int64_t kCacheLineBytes = 64;

// Ask for a whole row; the address may lie anywhere, a wrong one is ignored.
inline void prefetch(const void* from, int64_t num_bytes) {
  const char* line = static_cast<const char*>(from);
  for (int64_t offset = 0; offset < num_bytes; offset += kCacheLineBytes) __builtin_prefetch(line + offset, 0, 3);
  __builtin_prefetch(line + num_bytes - 1, 0, 3);  // the last line of a row that starts inside one
}

}  // namespace ultramem
