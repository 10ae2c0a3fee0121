// Eight values of a row, which a thread moves by loads and stores of 16 bytes: one in bfloat16, two in fp32.
#pragma once

#include <cuda_bf16.h>

#include <cstring>

namespace fastmask {

__device__ __forceinline__ void unpack(const float4& from, float (&to)[4]) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}
__device__ __forceinline__ float4 packed(const float* from) { return make_float4(from[0], from[1], from[2], from[3]); }

template <typename T>
struct Eight;

template <>
struct Eight<float> {
  float4 low, high;

  // What is used once and should not push other data out of the caches.
  __device__ __forceinline__ static Eight once(const float* from) {
    const float4* four = reinterpret_cast<const float4*>(from);
    return {__ldcs(four), __ldcs(four + 1)};
  }
  // What is read again with the next row. Not by __ldg, which the compiler moves ahead of stores: a row's modulations
  // would then take the registers of the row.
  __device__ __forceinline__ static Eight again(const float* from) {
    const float4* four = reinterpret_cast<const float4*>(from);
    return {four[0], four[1]};
  }
  __device__ __forceinline__ static Eight zeros() { return {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)}; }

  __device__ __forceinline__ float operator[](int j) const {
    const float4& four = j < 4 ? low : high;
    return j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
  }
  __device__ __forceinline__ static void write(float* to, const float (&from)[8]) {
    float4* four = reinterpret_cast<float4*>(to);
    __stcs(four, packed(from));
    __stcs(four + 1, packed(from + 4));
  }
};

template <>
struct Eight<__nv_bfloat16> {
  uint4 pairs;

  __device__ __forceinline__ static Eight once(const __nv_bfloat16* from) {
    return {__ldcs(reinterpret_cast<const uint4*>(from))};
  }
  __device__ __forceinline__ static Eight again(const __nv_bfloat16* from) {
    return {*reinterpret_cast<const uint4*>(from)};
  }
  __device__ __forceinline__ static Eight zeros() { return {make_uint4(0, 0, 0, 0)}; }

  // bfloat16 is the upper half of an fp32 number.
  __device__ __forceinline__ float operator[](int j) const {
    const unsigned pair = j < 2 ? pairs.x : j < 4 ? pairs.y : j < 6 ? pairs.z : pairs.w;
    return __uint_as_float(j % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  }
  __device__ __forceinline__ static void write(__nv_bfloat16* to, const float (&from)[8]) {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(rounded(from[0], from[1]), rounded(from[2], from[3]),
                                                    rounded(from[4], from[5]), rounded(from[6], from[7])));
  }

 private:
  __device__ __forceinline__ static unsigned rounded(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    unsigned bits;
    std::memcpy(&bits, &pair, sizeof(bits));
    return bits;
  }
};

}  // namespace fastmask
