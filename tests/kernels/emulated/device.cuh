// The names of fdscale/kernels/cuda/device.cuh on a CPU, so that the kernels' own source runs without a GPU.
//
// Threads of a block are contexts that take turns in an order drawn at random, and give up their turn only where a
// GPU's threads wait for each other. Meant to find what a wrong kernel does: shared memory begins as NaN, a copy
// arrives as late as it may (and what it will overwrite is NaN from its beginning on), what lies around shared memory
// is checked, and a warp or block of which not all threads arrive at the same place is an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define INLINE inline
#define KERNEL(threads) void
#define SHARED_MEMORY(name) unsigned char* name = emulator::shared
#define __host__
#define __device__
#define threadIdx (emulator::now->thread)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
using std::max;
using std::min;

namespace emulator {

constexpr int STACK = 128 << 10, GUARD = 4096;
enum Place { NOWHERE, BLOCK, WARP, MULTIPLY_BF16, MULTIPLY_FP16, TILES, TILES_TRANSPOSED, EXCHANGE, VOTE };

struct Copy {
    void* to;
    const void* from;
    bool there;
};
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    dim3 thread;
    bool done = false;
    std::vector<Copy> copies;
};
struct Meeting {  // of a warp or a block
    Place place = NOWHERE;
    std::vector<Fiber*> waiting;
    void* arguments[32];
};

inline Fiber* now;
inline dim3 block_index, block_size;
inline unsigned char* shared;
inline int shared_bytes;
inline ucontext_t scheduler;
inline std::vector<Fiber*> runnable;
inline std::vector<Meeting> warps;
inline Meeting block;
inline std::string trouble;
inline std::mt19937 draw;
inline void (*entry)();

inline void stop_turn() { swapcontext(&now->context, &scheduler); }

[[noreturn]] inline void fail(const std::string& what) {
    if (trouble.empty())
        trouble = what + " (thread " + std::to_string(now->thread.x) + " of block " + std::to_string(block_index.x) +
                  ", " + std::to_string(block_index.y) + ", " + std::to_string(block_index.z) + ")";
    for (;;) stop_turn();
}

// Wait until `expected` threads have come to a place; the last does the work.
template <class Work>
void meet(Meeting& meeting, Place place, size_t expected, void* argument, Work work) {
    if (meeting.waiting.empty()) meeting.place = place;
    if (meeting.place != place) fail("threads wait for each other at different places");
    if (expected == 32) meeting.arguments[now->thread.x % 32] = argument;
    meeting.waiting.push_back(now);
    if (meeting.waiting.size() < expected) {
        stop_turn();
        return;
    }
    work(meeting.arguments);
    for (Fiber* fiber : meeting.waiting)
        if (fiber != now) runnable.push_back(fiber);
    meeting.waiting.clear();
}

template <class Work>
void meet_warp(Place place, void* argument, Work work) {
    meet(warps[now->thread.x / 32], place, 32, argument, work);
}

inline void run_thread() {
    entry();
    now->done = true;
    for (;;) stop_turn();
}

inline void run_block(int threads) {
    std::vector<Fiber> fibers(threads);
    warps.assign((threads + 31) / 32, Meeting());
    block = Meeting();
    runnable.clear();
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.thread = dim3(i, 0, 0);
        fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_thread, 0);
        runnable.push_back(&fiber);
    }
    int done = 0;
    while (!runnable.empty() && trouble.empty()) {
        std::swap(runnable[draw() % runnable.size()], runnable.back());
        now = runnable.back();
        runnable.pop_back();
        swapcontext(&scheduler, &now->context);
        done += now->done;
    }
    if (done < threads && trouble.empty()) trouble = "some threads wait for others that have ended";
}

}  // namespace emulator

template <class Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, int bytes, void*, const Arguments& arguments) {
    using namespace emulator;
    static void (*function)(Arguments);
    static const Arguments* given;
    function = kernel;
    given = &arguments;
    entry = [] { function(*given); };
    trouble.clear();
    block_size = dim3(threads);
    if (threads % 32 || bytes > 163 << 10) trouble = "more shared memory than an A100 has, or part of a warp";
    std::vector<unsigned char> memory(bytes + 2 * GUARD + 128);
    unsigned char* start = memory.data() + GUARD;
    start += -reinterpret_cast<uintptr_t>(start) & 127;
    shared_bytes = bytes;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x && trouble.empty(); ++x) {
                block_index = dim3(x, y, z);
                shared = start;
                std::fill(memory.begin(), memory.end(), 0xff);
                run_block(threads);
                for (int i = 0; i < GUARD; ++i)
                    if (start[bytes + i] != 0xff || start[-i - 1] != 0xff) trouble = "written beside shared memory";
            }
    return trouble.empty() ? 0 : 1;
}

inline const char* error_text(int) { return emulator::trouble.c_str(); }

// The order of turns of what is launched from now on.
extern "C" __attribute__((weak)) void emulator_seed(int seed) { emulator::draw.seed(seed); }

inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

struct BFloat16 {
    static constexpr bool small_exponent = false;
    static uint32_t round(float x) {
        const uint32_t bits = as_bits(x);
        return std::isnan(x) ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }
    static float wide(uint32_t bits) { return as_float(bits << 16); }
    static uint32_t pack(float first, float second) { return round(first) | round(second) << 16; }
    static float2 unpack(uint32_t both) { return {wide(both & 0xffff), wide(both >> 16)}; }
};

struct Float16 {
    static constexpr bool small_exponent = true;
    static uint32_t round(float x) {
        const _Float16 narrow = x;
        uint16_t bits;
        memcpy(&bits, &narrow, 2);
        return bits;
    }
    static float wide(uint32_t bits) {
        _Float16 x;
        const uint16_t half = bits;
        memcpy(&x, &half, 2);
        return x;
    }
    static uint32_t pack(float first, float second) { return round(first) | round(second) << 16; }
    static float2 unpack(uint32_t both) { return {wide(both & 0xffff), wide(both >> 16)}; }
};

// Layouts: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    struct Lane {
        float* d;
        const uint32_t* a;
        uint32_t b[2];
        const float* c;
    } mine{d, a, {b0, b1}, c};
    const auto place = T::small_exponent ? emulator::MULTIPLY_FP16 : emulator::MULTIPLY_BF16;
    emulator::meet_warp(place, &mine, [](void** lanes) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const Lane& it = *static_cast<Lane*>(lanes[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i) {
                const float2 x = T::unpack(it.a[i]);
                left[g + i % 2 * 8][2 * t + i / 2 * 8] = x.x;
                left[g + i % 2 * 8][2 * t + 1 + i / 2 * 8] = x.y;
            }
            for (int i = 0; i < 2; ++i) {
                const float2 x = T::unpack(it.b[i]);
                right[2 * t + 8 * i][g] = x.x;
                right[2 * t + 1 + 8 * i][g] = x.y;
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            const Lane& it = *static_cast<Lane*>(lanes[lane]);
            float sums[4];
            for (int e = 0; e < 4; ++e) {
                const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
                sums[e] = it.c[e];
                for (int k = 0; k < 16; ++k) sums[e] += left[row][k] * right[k][column];
            }
            memcpy(it.d, sums, sizeof sums);
        }
    });
}

template <bool TRANSPOSED>
void load_tiles_as(uint32_t (&tiles)[4], const void* row) {
    struct Lane {
        uint32_t* tiles;
        const unsigned char* row;
    } mine{tiles, static_cast<const unsigned char*>(row)};
    if (mine.row < emulator::shared || mine.row + 16 > emulator::shared + emulator::shared_bytes ||
        (mine.row - emulator::shared) % 16)
        emulator::fail("a tile's row is not in shared memory, or not at 16 bytes");
    emulator::meet_warp(TRANSPOSED ? emulator::TILES_TRANSPOSED : emulator::TILES, &mine, [](void** lanes) {
        for (int tile = 0; tile < 4; ++tile) {
            uint16_t x[8][8];
            for (int i = 0; i < 8; ++i) memcpy(x[i], static_cast<Lane*>(lanes[tile * 8 + i])->row, 16);
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4, t = lane % 4;
                const uint32_t first = TRANSPOSED ? x[2 * t][g] : x[g][2 * t];
                const uint32_t second = TRANSPOSED ? x[2 * t + 1][g] : x[g][2 * t + 1];
                static_cast<Lane*>(lanes[lane])->tiles[tile] = first | second << 16;
            }
        }
    });
}
inline void load_tiles(uint32_t (&tiles)[4], const void* row) { load_tiles_as<false>(tiles, row); }
inline void load_tiles_transposed(uint32_t (&tiles)[4], const void* row) { load_tiles_as<true>(tiles, row); }

inline void copy16(void* to, const void* from, bool there) {
    unsigned char* at = static_cast<unsigned char*>(to);
    if (at < emulator::shared || at + 16 > emulator::shared + emulator::shared_bytes || (at - emulator::shared) % 16)
        emulator::fail("a copy goes beside shared memory, or not to 16 bytes");
    if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("a copy does not come from 16 bytes");
    memset(to, 0xff, 16);
    emulator::now->copies.push_back({to, from, there});
}

inline void wait_for_copies() {
    for (const auto& copy : emulator::now->copies) copy.there ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
    emulator::now->copies.clear();
}

inline float2 load_anew(const void* from) { return *static_cast<const float2*>(from); }

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? 0.f : x; }
inline float exp2_of(float x) { return flushed(std::exp2(flushed(x))); }
inline float log2_of(float x) { return std::log2(x); }

inline float from_lane_xor(float x, int mask) {
    struct Lane {
        float x;
        int mask;
    } mine{x, mask};
    emulator::meet_warp(emulator::EXCHANGE, &mine, [](void** lanes) {
        float all[32];
        for (int i = 0; i < 32; ++i) all[i] = static_cast<Lane*>(lanes[i ^ static_cast<Lane*>(lanes[i])->mask])->x;
        for (int i = 0; i < 32; ++i) static_cast<Lane*>(lanes[i])->x = all[i];
    });
    return mine.x;
}

inline bool any_lane(bool x) {
    emulator::meet_warp(emulator::VOTE, &x, [](void** lanes) {
        bool any = false;
        for (int i = 0; i < 32; ++i) any |= *static_cast<bool*>(lanes[i]);
        for (int i = 0; i < 32; ++i) *static_cast<bool*>(lanes[i]) = any;
    });
    return x;
}

inline void sync_warp() {
    emulator::meet_warp(emulator::WARP, nullptr, [](void**) {});
}
inline void sync_block() {
    emulator::meet(emulator::block, emulator::BLOCK, emulator::block_size.x, nullptr, [](void**) {});
}
