// The window of numbers that a warp carries down a column of patches: biases, or sums of gradients, by displacement.
#pragma once

#include "problem.cuh"

template <bool VALUE>
struct Constant {
    static constexpr bool value = VALUE;
};

// Four numbers to begin a product with. From memory, equal ones too, since copies would be made again for each product.
template <class Pair>
INLINE void load_pairs(float (&to)[4], const Pair* first, const Pair* second) {
    const float2 one = load_anew(first), other = load_anew(second);
    to[0] = one.x, to[1] = one.y, to[2] = other.x, to[3] = other.y;
}

// Biases of Q held patches against the patch at hand. QUERIES: the held ones are queries, else keys.
template <int PW, int Q, bool QUERIES>
struct Biases {
    static constexpr int PH = 8 / PW;
    const float* at;  // of held patch 0 and the next patch of the walk
    int step, pitch;
    float2 of[Q];

    INLINE Biases(const float* table, const TablePart<PW>& part, int held_row, int held_column, const Chunk& chunk,
                  const Warp& warp) {
        // In the tile of two patches the held side's token is g, the other's 2t and 2t + 1.
        const int y = warp.g / PW - 2 * warp.t / PW, x = warp.g % PW - 2 * warp.t % PW;
        const int down = (held_row - chunk.row) * PH + y, across = (held_column - chunk.column) * PW + x;
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
// what belongs to one cell of the table. The tile lies there among zeros, so that the lane reads 8 numbers, whether or
// not so many pairs of tokens are so far apart. Two leave at a time.
template <int PW, int Q>
struct Sums {
    static constexpr int PH = 8 / PW;
    static constexpr int CELLS = (2 * PW - 1) * (2 * PH - 1);  // of a displacement of patches
    static constexpr int LINE = 3 * PW - 2;                    // query tokens beside each other, zeros included
    static constexpr int STRIDE = 10;                          // of a query token: 8 keys, and other banks for the next
    static constexpr int TILE = (3 * PH - 2) * LINE * STRIDE;
    float2 of[Q];
    float* cells;  // (rows, pitch)
    float* tiles;  // two
    int pitch, across, row;

    static __host__ __device__ int rows(const Problem& p) { return (p.walked + Q + 1) * PH - 1; }
    static __host__ __device__ int columns(const Problem& p) { return p.columns * PW + PW - 1; }
    static __host__ __device__ int cells_of(const Problem& p) { return rows(p) * columns(p); }

    // Cells and tiles are zeros.
    INLINE Sums(const Problem& p, float* cells_, float* tiles_) : cells(cells_), tiles(tiles_) {
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
        const int line = (warp.g / PW + PH - 1) * LINE + warp.g % PW + PW - 1;
        float2* at = reinterpret_cast<float2*>(tiles + line * STRIDE + 2 * warp.t);
        at[0] = first;
        at[TILE / 2] = second;
        sync_warp();
        // Where patches are two high, the two share cells: one after the other.
        constexpr int at_once = PH == 1 ? 2 : 1;
        static_assert(at_once * CELLS <= 32);
#pragma unroll
        for (int turn = 0; turn < 2; turn += at_once) {
            if (warp.lane < at_once * CELLS) {
                const int which = turn + warp.lane / CELLS, cell = warp.lane % CELLS;
                const int y = cell / (2 * PW - 1), x = cell % (2 * PW - 1);  // displacement + PH - 1, + PW - 1
                const float* from = tiles + which * TILE + (y * LINE + x) * STRIDE;
                float sum = 0.f;
#pragma unroll
                for (int key = 0; key < 8; ++key) sum += from[(key / PW * LINE + key % PW) * STRIDE + key];
                cells[(row - which * PH + y - (PH - 1)) * pitch + across + x - (PW - 1)] += sum;
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
