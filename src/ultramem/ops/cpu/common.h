// What all kernels share: vectors as wide as the target's registers, loads that widen to fp32, row prefetch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
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
#if defined(__AVX512F__)
  // GCC 12 makes two conversions of eight numbers and their concatenation out of one of sixteen.
  return (Floats)((Words)_mm512_cvtepu16_epi32((__m256i)load_bits<Halves>(from)) << 16);
#else
  return (Floats)(__builtin_convertvector(load_bits<Halves>(from), Words) << 16);
#endif
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

// Ask for a row to be brought to the second cache: the first has too few slots for outstanding lines, and stalls. One
// request per pair of lines is enough, the hardware fetches the other. A wrong address is ignored.
inline void prefetch(const void* from, int64_t num_bytes) {
  constexpr int64_t kLinePairBytes = 128;
  const char* line = static_cast<const char*>(from);
  for (int64_t offset = 0; offset < num_bytes; offset += kLinePairBytes) __builtin_prefetch(line + offset, 0, 2);
}

// Call `body(lower, upper)` over parts of `num_tokens`, in parallel where the work pays for waking the threads.
template <class Body>
inline void for_tokens(int64_t num_tokens, int64_t elements_per_token, const Body& body) {
  constexpr int64_t kElementsPerTask = 16384;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_token));
  at::parallel_for(0, num_tokens, grain, body);
}

// Call `body` with a pointer of the type of the table's elements.
template <class Body>
inline void with_float_type(const at::Tensor& table, const Body& body) {
  if (table.scalar_type() == at::kFloat)
    body(static_cast<const float*>(table.const_data_ptr()));
  else
    body(static_cast<const at::BFloat16*>(table.const_data_ptr()));
}

}  // namespace ultramem
