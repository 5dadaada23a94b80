// Forward: a warp holds Q patches of queries and walks over all keys of its window.
//
// A row's largest score is at most the scale (cosines are at most 1) plus the table's largest number. Where all scores
// lie so near to it that exp2 can express them, it is subtracted, and no maximum is looked for. Else the largest score
// so far is subtracted, and moved only by one that exceeds it more than 2^8 times.
#pragma once

#include "walk.cuh"

constexpr float EXPRESSIBLE = 115.f;  // 2^-115 is a normal number, with some room for sums
constexpr float EXCESS = 8.f;
constexpr float LOWEST = -1e4f;

template <int PW, int Q>
struct ForwardMemory : Memory {
    int keys, values, queries, regions, table, scratch;
    __host__ __device__ ForwardMemory(const Problem& p) {
        const int chunk = p.chunk * 8 * ROW_BYTES;
        keys = take(2 * chunk);
        values = take(2 * chunk);
        queries = take(p.warps * Q * 8 * ROW_BYTES);
        regions = take(p.chunk * 8 * 4);
        table = take(TablePart<PW>(p, 0, true).cells() * 4);
        scratch = take(2 * MAX_WARPS * 4);
    }
};

// What a warp has of its rows: Q of a lane, row m of patch m.
template <int MT>
struct Softmax {
    static constexpr int Q = 2 * MT;
    float start[Q] = {}, total[Q] = {}, out[MT][4][4] = {};  // start: minus what is subtracted, divided by the scale
    float scale;

    // Scores of two key patches of 16 rows, less what is subtracted from them, to 16 x 16 weights.
    template <class T, bool MOVES>
    INLINE void weigh(uint32_t (&weights)[4], float (&s)[2][4], int m, bool first) {
        if (MOVES) {
            const float upper = fmaxf(fmaxf(s[0][0], s[0][1]), fmaxf(s[1][0], s[1][1]));
            const float lower = fmaxf(fmaxf(s[0][2], s[0][3]), fmaxf(s[1][2], s[1][3]));
            if (any_lane(first || fmaxf(upper, lower) > EXCESS)) {
                move(s, 0, m, upper, first);
                move(s, 1, m, lower, first);
            }
        }
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            float p[4];
            for (int e = 0; e < 4; ++e) p[e] = exp2_of(s[u][e]);
            total[2 * m] += p[0] + p[1];
            total[2 * m + 1] += p[2] + p[3];
            weights[2 * u] = T::pack(p[0], p[1]);
            weights[2 * u + 1] = T::pack(p[2], p[3]);
        }
    }

    INLINE void move(float (&s)[2][4], int half, int m, float above, bool first) {
        above = fmaxf(above, from_lane_xor(above, 1));
        above = fmaxf(above, from_lane_xor(above, 2));
        const float now = -start[2 * m + half] * scale;
        const float by = fmaxf(first ? above : fmaxf(above, 0.f), LOWEST - now), shrink = first ? 0.f : exp2_of(-by);
        start[2 * m + half] = -(now + by) / scale;
        total[2 * m + half] *= shrink;
        for (int j = 0; j < 4; ++j)
            for (int e = 2 * half; e < 2 * half + 2; ++e) out[m][j][e] *= shrink;
        for (int u = 0; u < 2; ++u)
            for (int e = 2 * half; e < 2 * half + 2; ++e) s[u][e] -= by;
    }
};

template <class T, int PW, int MT, bool MASKED>
KERNEL(MAX_WARPS * 32)
forward_kernel(const Problem p) {
    constexpr int Q = 2 * MT;
    SHARED_MEMORY(shared);
    const ForwardMemory<PW, Q> memory(p);
    const Warp warp;
    const Tile<Q> tile(p, warp);
    const int n = blockIdx.x, head = blockIdx.y, slots = p.columns * p.rows * 8, width = p.heads * HEAD;
    const int* tokens = p.tokens + (size_t)(n % p.windows) * slots;
    const int* regions = p.regions + (size_t)(n % p.windows) * slots;
    const uint16_t* qkv =
        static_cast<const uint16_t*>(p.qkv) + (size_t)(n / p.windows) * p.size * 3 * width + head * HEAD;
    float* table = reinterpret_cast<float*>(shared + memory.table);
    int* key_regions = reinterpret_cast<int*>(shared + memory.regions);
    unsigned char* mine = shared + memory.queries + warp.index * Q * 8 * ROW_BYTES;
    const int chunk_slots = p.chunk * 8, chunk_bytes = chunk_slots * ROW_BYTES;

    const auto begin_chunk = [&](const Chunk& chunk) {
        const int at = chunk.parity * chunk_bytes;
        const int* theirs = tokens + chunk.slot;
        begin_rows(shared + memory.keys + at, qkv + width, theirs, chunk_slots, 3 * width, threadIdx.x, blockDim.x);
        begin_rows(shared + memory.values + at, qkv + 2 * width, theirs, chunk_slots, 3 * width, threadIdx.x,
                   blockDim.x);
    };
    if (tile.there) begin_rows(mine, qkv, tokens + tile.slot, Q * 8, 3 * width, warp.lane, 32);
    begin_chunk(Chunk(p, 0));

    const TablePart<PW> part(p, blockIdx.z * p.warps / p.columns * Q, true);
    const float2 bounds = load_table(table, part, p, head, reinterpret_cast<float*>(shared + memory.scratch));
    Softmax<MT> softmax;
    softmax.scale = scale_of(p, head);
    const bool moves = T::small_exponent || 2.f * softmax.scale + bounds.x - bounds.y > EXPRESSIBLE;
    const float bound = moves ? 0.f : 1.01f * softmax.scale + bounds.x;  // rounded rows may be longer than 1
    for (int i = threadIdx.x; i < part.cells(); i += blockDim.x) table[i] -= bound;
    uint32_t queries[MT][2][4];
    int query_region[Q] = {};
    if (MASKED && tile.there)
        for (int m = 0; m < Q; ++m) query_region[m] = regions[tile.slot + m * 8 + warp.g];

    for (int index = 0; index < Chunk::count(p); ++index) {
        const Chunk chunk(p, index);
        unsigned char* keys = shared + memory.keys + chunk.parity * chunk_bytes;
        unsigned char* values = shared + memory.values + chunk.parity * chunk_bytes;
        wait_for_copies();
        sync_block();  // all is there, and the other column is no longer read
        if (index + 1 < Chunk::count(p)) begin_chunk(Chunk(p, index + 1));
        normalise<T>(keys, chunk_slots, nullptr, threadIdx.x, blockDim.x);
        if (MASKED)
            for (int i = threadIdx.x; i < chunk_slots; i += blockDim.x) key_regions[i] = regions[chunk.slot + i];
        if (index == 0 && tile.there) {
            normalise<T>(mine, Q * 8, nullptr, warp.lane, 32);
            sync_warp();
            for (int m = 0; m < MT; ++m) load_left(queries[m], mine, m * 16, warp);
        }
        sync_block();
        if (!tile.there) continue;

        const auto walk = [&](auto constant) {
            constexpr bool MOVES = decltype(constant)::value;
            Biases<PW, Q, true> biases(table, part, tile.row, tile.column, chunk, warp);
#pragma unroll 2
            for (int row = 0; row < p.chunk; row += 2) {
                float s[MT][2][4];
#pragma unroll
                for (int u = 0; u < 2; ++u) {
                    uint32_t key[4];
                    load_right(key, keys, (row + u) * 8, warp);
                    biases.enter();
                    int2 region;
                    if (MASKED) region = *reinterpret_cast<const int2*>(key_regions + (row + u) * 8 + 2 * warp.t);
#pragma unroll
                    for (int m = 0; m < MT; ++m) {
                        const float upper = MOVES ? softmax.start[2 * m] : 0.f,
                                    lower = MOVES ? softmax.start[2 * m + 1] : 0.f;
                        float c[4] = {upper, upper, lower, lower};
                        multiply<T>(c, queries[m][0], key[0], key[1], c);
                        multiply<T>(c, queries[m][1], key[2], key[3], c);
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const float2 bias = biases.of[2 * m + half];
                            float* const to = s[m][u] + 2 * half;
                            to[0] = fmaf(c[2 * half], softmax.scale, bias.x);
                            to[1] = fmaf(c[2 * half + 1], softmax.scale, bias.y);
                            if (MASKED) {
                                to[0] += mask_of(p, query_region[2 * m + half], region.x);
                                to[1] += mask_of(p, query_region[2 * m + half], region.y);
                            }
                        }
                    }
                    biases.leave();
                }
                uint32_t low[4], high[4];
                load_rows_right(low, high, values, row * 8, warp);
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    uint32_t weights[4];
                    softmax.template weigh<T, MOVES>(weights, s[m], m, index == 0 && row == 0);
                    add_product<T>(softmax.out[m], weights, low, high);
                }
            }
        };
        if (moves)
            walk(Constant<true>());
        else if (!T::small_exponent)
            walk(Constant<false>());
    }
    if (!tile.there) return;
    float inverse[Q];
    for (int m = 0; m < Q; ++m) {
        const float total = sum_of_quad(softmax.total[m]);
        inverse[m] = 1.f / total;
        const int place = place_of<PW>(p, tile.column, tile.row + m, warp.g);
        if (warp.t == 0 && place >= 0)
            p.lse[((size_t)n * p.heads + head) * p.window_rows * p.window_columns + place] =
                log2_of(total) + bound - softmax.start[m] * softmax.scale;
    }
    for (int m = 0; m < MT; ++m) put_rows<T>(mine, m * 16, softmax.out[m], inverse[2 * m], inverse[2 * m + 1], warp);
    sync_warp();
    uint16_t* out = static_cast<uint16_t*>(p.out) + (size_t)(n / p.windows) * p.size * width + head * HEAD;
    store_rows(out, mine, tokens + tile.slot, Q * 8, width, warp);
}
