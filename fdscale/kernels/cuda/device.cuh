// What the kernels use of a GPU, under names of their own: matrix products of a warp, copies into shared memory,
// exchange between lanes. tests/kernels/emulated/device.cuh has the same names for a CPU.
//
// Lanes of a warp are numbered 4 g + t, g < 8, t < 4. A fragment of a 16 x 8 result holds, in every lane, columns 2t
// and 2t + 1 of row g (elements 0, 1) and of row g + 8 (2, 3).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define INLINE __device__ __forceinline__
#define KERNEL(threads) __global__ void __launch_bounds__(threads)
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

struct BFloat16 {  // two to a register, the first in the lower half
    static constexpr bool small_exponent = false;
    static INLINE uint32_t pack(float first, float second) {
        __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
        return *reinterpret_cast<uint32_t*>(&both);
    }
    static INLINE float2 unpack(uint32_t both) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&both)); }
};

struct Float16 {
    static constexpr bool small_exponent = true;
    static INLINE uint32_t pack(float first, float second) {
        __half2 both = __floats2half2_rn(first, second);
        return *reinterpret_cast<uint32_t*>(&both);
    }
    static INLINE float2 unpack(uint32_t both) { return __half22float2(*reinterpret_cast<__half2*>(&both)); }
};

INLINE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// d = a b + c: a 16 x 16, b 16 x 8, c and d 16 x 8 in float32. a: (row g, columns 2t..), (g + 8, 2t..), (g, 2t + 8..),
// (g + 8, 2t + 8..); b: rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g.
template <class T>
INLINE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]);

template <>
INLINE void multiply<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

template <>
INLINE void multiply<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Four 8 x 8 tiles of 16-bit numbers from shared memory: lane l gives the address of row l % 8 of tile l / 8, of 16
// bytes, and gets columns 2t, 2t + 1 of row g of each; transposed: rows 2t, 2t + 1 of column g.
INLINE void load_tiles(uint32_t (&tiles)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(shared_address(row))
                 : "memory");
}

INLINE void load_tiles_transposed(uint32_t (&tiles)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Begin to copy 16 bytes into shared memory, or zeros.
INLINE void copy16(void* shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(there ? 16 : 0)
                 : "memory");
}

// Wait for all copies that this thread has begun.
INLINE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two numbers of shared memory, loaded even if they are at hand.
INLINE float2 load_anew(const void* from) {
    float2 x;
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x.x), "=f"(x.y)
                 : "r"(shared_address(from))
                 : "memory");
    return x;
}

INLINE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
INLINE float log2_of(float x) { return __log2f(x); }
INLINE float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
INLINE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
INLINE void sync_warp() { __syncwarp(); }
INLINE void sync_block() { __syncthreads(); }

// Launch; 0 or the error's number. A block may have as much shared memory as the device allows.
template <class Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes, void* stream,
           const Arguments& arguments) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
    return cudaGetLastError();
}

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
