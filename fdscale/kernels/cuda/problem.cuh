// What all kernels of window attention share: the call, the order of tokens, and loads and stores of rows.
//
// Tokens of a window are taken in patches of 8, PW wide and 8 / PW high; a window is `columns` x `rows` patches, and a
// token's slot is (patch column, patch row, token of the patch) in that order, so that a column of patches is
// contiguous. Slots without a token (the window is not whole patches, or the map not whole windows) have token and
// region -1.
//
// Why patches: the bias of an 8 x 8 tile of scores depends only on the displacement of its two patches. A warp holds Q
// patches that lie below one another and walks down a column of the other side: each step moves the displacements by
// one, so one load of two numbers serves the new displacement, and the others move on from register to register; the
// table's gradient is added up in registers that move in the same way.
//
// Letters: h heads of 32 channels, N tokens of a window, n windows of all images. Scores are in units of log 2.
#pragma once

#include <device.cuh>

constexpr int HEAD = 32;       // channels of a head
constexpr int ROW_BYTES = 64;  // of a token, in shared memory
constexpr int MAX_WARPS = 8;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LARGEST_SCALE = 4.605170185988092f;  // ln 100, arXiv 2111.09883 section 3.2
constexpr float SMALLEST_SCALE = 1e-6f;              // changes no weight in float32

struct Problem {                      // as `Problem` of compiled.py
    const void* qkv;                  // (B, size, 3 h 32)
    const float* table;               // (h, 2 Wh - 1, 2 Ww - 1)
    const float* logit_scale;         // (h,)
    const int* tokens;                // (windows, columns * rows * 8)
    const int* regions;               // the same
    void* out;                        // (B, size, h 32)
    float* lse;                       // (n, h, N), in units of log 2
    const void* grad;                 // as out
    float* delta;                     // (n, h, N), row sums of grad * out
    void* d_qkv;                      // as qkv
    float* table_parts;               // (shares, h, groups, table rows of a block, table columns)
    float* scale_parts;               // (shares, h, groups)
    float* d_table;                   // as table
    float* d_scale;                   // as logit_scale
    float masked;                     // added between regions
    int size, heads, windows, count;  // tokens of a map; windows of an image, and of all
    int window_rows, window_columns, columns, rows, walked;  // walked: patch rows with tokens, in whole chunks
    int chunk;  // patch rows of a column that are in shared memory at a time, even
    int warps, groups,
        shares;      // of a block; blocks of all tiles of a window; and of all windows, in the backward for q
    int block_rows;  // patch rows that the tiles of a block span, at most
    void* stream;
};

// Shared memory of a block, taken piece by piece.
struct Memory {
    int used = 0;
    __host__ __device__ int take(int bytes) {
        const int at = used;
        used += (bytes + 15) / 16 * 16;
        return at;
    }
};

struct Warp {
    int lane, index, g, t;
    INLINE Warp() : lane(threadIdx.x & 31), index(threadIdx.x >> 5), g((threadIdx.x & 31) >> 2), t(threadIdx.x & 3) {}
};

// Over the four lanes of equal g, which share rows.
INLINE float sum_of_quad(float x) {
    x += from_lane_xor(x, 1);
    return x + from_lane_xor(x, 2);
}

// Where chunk `chunk` (16 bytes of 4) of a row lies: swizzled, so that 8 rows of one chunk lie in different banks.
INLINE unsigned char* chunk_at(unsigned char* rows, int row, int chunk) {
    return rows + row * ROW_BYTES + ((chunk ^ ((row >> 1) & 3)) << 4);
}

// Begin to copy rows of `from` (of a map with `stride` elements to a token) by threads first, first + threads, ...
INLINE void begin_rows(unsigned char* to, const void* from, const int* tokens, int count, int stride, int first,
                       int threads) {
    for (int i = first; i < count * 4; i += threads) {
        const int row = i >> 2, chunk = i & 3, token = tokens[row];
        const uint16_t* source =
            static_cast<const uint16_t*>(from) + (token < 0 ? 0 : (size_t)token * stride) + chunk * 8;
        copy16(chunk_at(to, row, chunk), source, token >= 0);
    }
}

// Rows to length 1, rounded; inverse: 1 / max(length, 1e-12) of each, if wanted. Threads as in begin_rows, whole warps.
template <class T>
INLINE void normalise(unsigned char* rows, int count, float* inverse, int first, int threads) {
    for (int i = first; i < count * 4; i += threads) {
        uint32_t* words = reinterpret_cast<uint32_t*>(chunk_at(rows, i >> 2, i & 3));
        float2 x[4];
        float sum = 0.f;
        for (int k = 0; k < 4; ++k) {
            x[k] = T::unpack(words[k]);
            sum += x[k].x * x[k].x + x[k].y * x[k].y;
        }
        sum = sum_of_quad(sum);
        const float factor = 1.f / fmaxf(sqrtf(sum), 1e-12f);
        for (int k = 0; k < 4; ++k) words[k] = T::pack(x[k].x * factor, x[k].y * factor);
        if (inverse != nullptr && (i & 3) == 0) inverse[i >> 2] = factor;
    }
}

// Below, `first` is a multiple of 8, so that chunks of rows from there on lie as those of rows from 0 on.

// 16 rows from `first` on, as the left side of a product: two fragments of 16 channels.
INLINE void load_left(uint32_t (&fragments)[2][4], unsigned char* rows, int first, const Warp& warp) {
    rows += first * ROW_BYTES;
    load_tiles(fragments[0], chunk_at(rows, warp.lane & 15, warp.lane >> 4));
    load_tiles(fragments[1], chunk_at(rows, warp.lane & 15, 2 + (warp.lane >> 4)));
}

// 8 rows as columns of the right side: words 0, 1 are channels 0..15, words 2, 3 are 16..31.
INLINE void load_right(uint32_t (&words)[4], unsigned char* rows, int first, const Warp& warp) {
    load_tiles(words, chunk_at(rows + first * ROW_BYTES, warp.lane & 7, warp.lane >> 3));
}

// d += a x, where x are 16 rows, transposed as load_rows_right does: 32 channels in four fragments.
template <class T>
INLINE void add_product(float (&d)[4][4], const uint32_t (&a)[4], const uint32_t (&low)[4], const uint32_t (&high)[4]) {
    multiply<T>(d[0], a, low[0], low[1], d[0]);
    multiply<T>(d[1], a, low[2], low[3], d[1]);
    multiply<T>(d[2], a, high[0], high[1], d[2]);
    multiply<T>(d[3], a, high[2], high[3], d[3]);
}

// 16 rows as rows of the right side: words 0, 1 of `low` are columns 0..7, and so on.
INLINE void load_rows_right(uint32_t (&low)[4], uint32_t (&high)[4], unsigned char* rows, int first, const Warp& warp) {
    rows += first * ROW_BYTES;
    load_tiles_transposed(low, chunk_at(rows, warp.lane & 15, warp.lane >> 4));
    load_tiles_transposed(high, chunk_at(rows, warp.lane & 15, 2 + (warp.lane >> 4)));
}

// Fragments of 16 rows, times a factor for row g and one for row g + 8, to rows in shared memory.
template <class T>
INLINE void put_rows(unsigned char* rows, int first, const float (&x)[4][4], float upper, float lower,
                     const Warp& warp) {
    for (int j = 0; j < 4; ++j) {
        uint32_t* at = reinterpret_cast<uint32_t*>(chunk_at(rows, first + warp.g, j));
        at[warp.t] = T::pack(x[j][0] * upper, x[j][1] * upper);
        at = reinterpret_cast<uint32_t*>(chunk_at(rows, first + warp.g + 8, j));
        at[warp.t] = T::pack(x[j][2] * lower, x[j][3] * lower);
    }
}

// Rows of shared memory to the map, by the lanes of one warp.
INLINE void store_rows(void* to, unsigned char* rows, const int* tokens, int count, int stride, const Warp& warp) {
    for (int i = warp.lane; i < count * 4; i += 32) {
        const int row = i >> 2, chunk = i & 3, token = tokens[row];
        if (token < 0) continue;
        uint16_t* at = static_cast<uint16_t*>(to) + (size_t)token * stride + chunk * 8;
        *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(chunk_at(rows, row, chunk));
    }
}

// The piece of a column that a block walks over at a time.
struct Chunk {
    int column, row, slot, parity;  // row: its first patch row
    INLINE Chunk(const Problem& p, int index) {
        const int parts = p.walked / p.chunk;
        column = index / parts;
        row = index % parts * p.chunk;
        slot = (column * p.rows + row) * 8;
        parity = index & 1;
    }
    static INLINE int count(const Problem& p) { return p.columns * (p.walked / p.chunk); }
};

// A warp's tile: Q patches below one another from (column, row) on.
template <int Q>
struct Tile {
    int column, row, slot;
    bool there;
    INLINE Tile(const Problem& p, const Warp& warp) {
        const int index = blockIdx.z * p.warps + warp.index;
        column = index % p.columns;
        row = index / p.columns * Q;
        there = row < p.rows;
        slot = (column * p.rows + row) * 8;
    }
};

// The part of the table that a block reads, and its place in shared memory.
//
// The displacements (query - key) between the patches that its warps hold, queries or keys, and all others, with a
// column for each displacement along x.
template <int PW>
struct TablePart {
    static constexpr int PH = 8 / PW;
    int first, rows, pitch;  // first: displacement along y of row 0
    __host__ __device__ TablePart(const Problem& p, int first_row, bool queries) {
        first = queries ? (first_row - p.walked) * PH + 1 : -(first_row + p.block_rows) * PH + 1;
        rows = (p.block_rows + p.walked) * PH - 1;
        pitch = 2 * p.columns * PW - 1;
    }
    __host__ __device__ int cells() const { return rows * pitch; }
    INLINE int center(int displacement) const { return (displacement - first) * pitch + pitch / 2; }
};

// Load a part of the table, times log2(e), zeros outside of it; what its largest and smallest number are.
template <int PW>
INLINE float2 load_table(float* to, const TablePart<PW>& part, const Problem& p, int head, float* scratch) {
    const int across = 2 * p.window_columns - 1;
    const float* table = p.table + (size_t)head * (2 * p.window_rows - 1) * across;
    float most = -INFINITY, least = INFINITY;
    for (int i = threadIdx.x; i < part.cells(); i += blockDim.x) {
        const int y = part.first + i / part.pitch + p.window_rows - 1;
        const int x = i % part.pitch - part.pitch / 2 + p.window_columns - 1;
        float value = 0.f;
        if (y >= 0 && y < 2 * p.window_rows - 1 && x >= 0 && x < across) {
            value = table[y * across + x] * LOG2E;
            most = fmaxf(most, value);
            least = fminf(least, value);
        }
        to[i] = value;
    }
    for (int mask = 1; mask < 32; mask *= 2) {
        most = fmaxf(most, from_lane_xor(most, mask));
        least = fminf(least, from_lane_xor(least, mask));
    }
    if ((threadIdx.x & 31) == 0) {
        scratch[threadIdx.x >> 5] = most;
        scratch[MAX_WARPS + (threadIdx.x >> 5)] = least;
    }
    sync_block();
    for (int warp = 0; warp < p.warps; ++warp) {
        most = fmaxf(most, scratch[warp]);
        least = fminf(least, scratch[MAX_WARPS + warp]);
    }
    return {most, least};
}

// The place in the window of the slot `i` after the beginning of patch row `row` of a column, or -1.
template <int PW>
INLINE int place_of(const Problem& p, int column, int row, int i) {
    const int token = i & 7, y = (row + (i >> 3)) * (8 / PW) + token / PW, x = column * PW + token % PW;
    return y < p.window_rows && x < p.window_columns ? y * p.window_columns + x : -1;
}

// The factor of cosines, in units of log 2. Not zero, since other numbers are divided by it.
INLINE float scale_of(const Problem& p, int head) {
    return fmaxf(exp2_of(fminf(p.logit_scale[head], LARGEST_SCALE) * LOG2E), SMALLEST_SCALE) * LOG2E;
}

// What the mask adds to a score. Keys without a token have no weight.
INLINE float mask_of(const Problem& p, int query_region, int key_region) {
    return key_region < 0 ? -INFINITY : query_region == key_region ? 0.f : p.masked;
}
