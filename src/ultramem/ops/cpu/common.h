// What all kernels share: vectors as wide as the target's registers, loads that widen to fp32, row prefetch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

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

// The same where memory need not be aligned to whole vectors. They alias nothing but numbers, unlike memcpy, after which
// compilers reload everything from memory.
typedef float LooseFloats __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint16_t LooseHalves __attribute__((vector_size(kLanes * 2), aligned(2)));

inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }

inline Floats load(const at::BFloat16* from) {
  // A bf16 number is the upper half of the fp32 number.
  const Halves halves = *reinterpret_cast<const LooseHalves*>(&from->x);
#if defined(__AVX512F__)
  // GCC 12 makes two conversions of eight numbers and their concatenation out of one of sixteen.
  return (Floats)((Words)_mm512_cvtepu16_epi32((__m256i)halves) << 16);
#else
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
#endif
}

inline float load_one(const float* from) { return *from; }
inline float load_one(const at::BFloat16* from) { return static_cast<float>(*from); }

inline void store(float* to, Floats value) { *reinterpret_cast<LooseFloats*>(to) = value; }

// Store to an aligned address past the caches: a line that is overwritten as a whole is not read before. The thread calls
// `finish_streams` before others may read it.
inline void stream(float* to, Floats value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)value);
#elif defined(__SSE2__)
  _mm_stream_ps(to, (__m128)value);
#else
  store(to, value);
#endif
}

inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline Floats broadcast(float value) { return Floats{} + value; }

// Sum of the lanes, in a fixed order.
inline float sum(Floats value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(value);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return (value[0] + value[2]) + (value[1] + value[3]);
#endif
}

// Ask for a row to be brought to the second cache: the first has too few slots for outstanding lines, and stalls. A
// wrong address is ignored.
inline void prefetch(const void* from, int64_t num_bytes) {
  constexpr int64_t kCacheLineBytes = 64;
  const char* line = static_cast<const char*>(from);
  for (int64_t offset = 0; offset < num_bytes; offset += kCacheLineBytes) __builtin_prefetch(line + offset, 0, 2);
}

// Call `body(lower, upper)` over parts of `num_tokens`, in parallel where the work pays for waking the threads.
template <class Body>
inline void for_tokens(int64_t num_tokens, int64_t elements_per_token, const Body& body) {
  constexpr int64_t kElementsPerTask = 16384;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_token));
  at::parallel_for(0, num_tokens, grain, body);
}

// Call `body` with a rank, as a constant where it is one in use: loops over it unroll.
template <class Body>
inline void with_rank(int64_t rank, const Body& body) {
  switch (rank) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 4: return body(std::integral_constant<int, 4>());
    default: return body(static_cast<int>(rank));
  }
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
