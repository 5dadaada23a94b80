// The window of numbers that a warp carries down a column of patches: biases, or sums of gradients, by displacement.
#pragma once

#include "problem.cuh"

// Biases of Q held patches against the patch at hand. QUERIES: the held ones are queries, else keys.
template <int PW, int Q, bool QUERIES>
struct Biases {
    static constexpr int PH = 8 / PW;
    const float* at;  // of held patch 0 and the next patch of the walk
    int step, pitch;
    float2 of[Q];

    INLINE Biases(const float* table, const TablePart<PW>& part, int held_row, int held_column, int column,
                  const Warp& warp) {
        // In the tile of two patches the held side's token is g, the other's 2t and 2t + 1.
        const int y = warp.g / PW - 2 * warp.t / PW, x = warp.g % PW - 2 * warp.t % PW;
        const int down = held_row * PH + y, across = (held_column - column) * PW + x;
        pitch = part.pitch;
        step = QUERIES ? -PH * pitch : PH * pitch;
        at = table + (QUERIES ? part.center(down) + across : part.center(-down) - across);
#pragma unroll
        for (int m = 1; m < Q; ++m) of[m] = load(at - m * step);
    }
    INLINE float2 load(const float* p) const { return QUERIES ? float2{p[0], p[-1]} : float2{p[0], p[1]}; }
    INLINE void enter() {
        of[0] = load(at);
        at += step;
    }
    INLINE void leave() {
#pragma unroll
        for (int m = Q - 1; m > 0; --m) of[m] = of[m - 1];
    }
};

// Sums of the scores' gradients of Q held query patches, by displacement, added to a warp's own part of the table.
//
// A sum that no held patch will add to any more leaves: its 8 x 8 tile goes through shared memory, where a lane adds up
// what belongs to one cell of the table. Two leave at a time.
template <int PW, int Q>
struct Sums {
    static constexpr int PH = 8 / PW;
    static constexpr int CELLS = (2 * PW - 1) * (2 * PH - 1);  // of a displacement of patches
    float2 of[Q];
    float* cells;    // (rows, pitch)
    float* scratch;  // two tiles
    int pitch, across, row;

    static __host__ __device__ int rows(const Problem& p) { return (p.walked + Q + 1) * PH - 1; }
    static __host__ __device__ int columns(const Problem& p) { return p.columns * PW + PW - 1; }
    static __host__ __device__ int cells_of(const Problem& p) { return rows(p) * columns(p); }

    INLINE Sums(const Problem& p, float* cells_, float* scratch_) : cells(cells_), scratch(scratch_) {
        pitch = columns(p);
#pragma unroll
        for (int m = 0; m < Q; ++m) of[m] = {0.f, 0.f};
    }
    // Begin to walk down a column.
    INLINE void begin(const Problem& p, int column) {
        across = (p.columns - 1 - column) * PW + PW - 1;
        row = (p.walked + Q - 1) * PH + PH - 1;  // of displacement 0 within the patches of held patch Q - 1 and patch 0
    }
    // Of two steps, what left in the first and what left in the second.
    INLINE void put(float2 first, float2 second, const Warp& warp) {
        reinterpret_cast<float2*>(scratch)[warp.g * 4 + warp.t] = first;
        reinterpret_cast<float2*>(scratch)[32 + warp.g * 4 + warp.t] = second;
        sync_warp();
        // Where patches are two high, the two share cells: one after the other.
        constexpr int at_once = PH == 1 ? 2 : 1;
        static_assert(at_once * CELLS <= 32);
        for (int turn = 0; turn < 2; turn += at_once) {
            if (warp.lane < at_once * CELLS) {
                const int which = turn + warp.lane / CELLS, cell = warp.lane % CELLS;
                const int y = cell / (2 * PW - 1) - (PH - 1), x = cell % (2 * PW - 1) - (PW - 1);
                float sum = 0.f;
#pragma unroll
                for (int key = 0; key < 8; ++key) {
                    const int query_y = key / PW + y, query_x = key % PW + x;
                    if (query_y >= 0 && query_y < PH && query_x >= 0 && query_x < PW)
                        sum += scratch[which * 64 + (query_y * PW + query_x) * 8 + key];
                }
                cells[(row - which * PH + y) * pitch + across + x] += sum;
            }
            sync_warp();
        }
        row -= 2 * PH;
    }
    // One step of the walk: what leaves.
    INLINE float2 leave() {
        const float2 last = of[Q - 1];
#pragma unroll
        for (int m = Q - 1; m > 0; --m) of[m] = of[m - 1];
        of[0] = {0.f, 0.f};
        return last;
    }
    // At the end of the column all the others leave.
    INLINE void end(const Warp& warp) {
        for (int pair = 0; pair < Q / 2; ++pair) {
            const float2 first = leave(), second = leave();
            put(first, second, warp);
        }
    }
};
