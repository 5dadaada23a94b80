// Backward for k and v: a warp holds Q patches of keys and walks over all queries of its window. Scores are transposed:
// a row of a tile is a key, a column a query.
#pragma once

#include "backward_q.cuh"

template <int PW, int Q>
struct BackwardKVMemory : Memory {
    int queries, grads, keys, values, regions, inverse, start, delta, table, scratch;
    __host__ __device__ BackwardKVMemory(const Problem& p) {
        const int chunk = p.chunk * 8, tile = Q * 8;
        queries = take(2 * chunk * ROW_BYTES);
        grads = take(2 * chunk * ROW_BYTES);
        keys = take(p.warps * tile * ROW_BYTES);
        values = take(p.warps * tile * ROW_BYTES);
        regions = take(chunk * 4);
        inverse = take(p.warps * tile * 4);
        start = take(chunk * 4);
        delta = take(chunk * 4);
        table = take(TablePart<PW>(p, 0, false).cells() * 4);
        scratch = take(2 * MAX_WARPS * 4);
    }
};

template <class T, int PW, int MT, bool MASKED>
KERNEL(MAX_WARPS * 32)
backward_kv_kernel(const Problem p) {
    constexpr int Q = 2 * MT;
    SHARED_MEMORY(shared);
    const BackwardKVMemory<PW, Q> memory(p);
    const Warp warp;
    const Tile<Q> tile(p, warp);
    const int n = blockIdx.x, head = blockIdx.y, slots = p.columns * p.rows * 8, width = p.heads * HEAD;
    const int chunk_slots = p.chunk * 8, chunk_bytes = chunk_slots * ROW_BYTES, mine = warp.index * Q * 8;
    const int* tokens = p.tokens + (size_t)(n % p.windows) * slots;
    const int* regions = p.regions + (size_t)(n % p.windows) * slots;
    const size_t base = (size_t)(n / p.windows) * p.size;
    const size_t row_base = ((size_t)n * p.heads + head) * p.window_rows * p.window_columns;
    const uint16_t* qkv = static_cast<const uint16_t*>(p.qkv) + base * 3 * width + head * HEAD;
    const uint16_t* grad = static_cast<const uint16_t*>(p.grad) + base * width + head * HEAD;
    float* table = reinterpret_cast<float*>(shared + memory.table);
    int* query_regions = reinterpret_cast<int*>(shared + memory.regions);
    float* start = reinterpret_cast<float*>(shared + memory.start);
    float* delta = reinterpret_cast<float*>(shared + memory.delta);
    unsigned char* own_keys = shared + memory.keys + mine * ROW_BYTES;
    unsigned char* own_values = shared + memory.values + mine * ROW_BYTES;
    float* own_inverse = reinterpret_cast<float*>(shared + memory.inverse) + mine;

    const auto begin_chunk = [&](const Chunk& chunk) {
        const int at = chunk.parity * chunk_bytes;
        const int* theirs = tokens + chunk.slot;
        begin_rows(shared + memory.queries + at, qkv, theirs, chunk_slots, 3 * width, threadIdx.x, blockDim.x);
        begin_rows(shared + memory.grads + at, grad, theirs, chunk_slots, width, threadIdx.x, blockDim.x);
    };
    if (tile.there) {
        begin_rows(own_keys, qkv + width, tokens + tile.slot, Q * 8, 3 * width, warp.lane, 32);
        begin_rows(own_values, qkv + 2 * width, tokens + tile.slot, Q * 8, 3 * width, warp.lane, 32);
    }
    begin_chunk(Chunk(p, 0));
    const TablePart<PW> part(p, blockIdx.z * p.warps / p.columns * Q, false);
    load_table(table, part, p, head, reinterpret_cast<float*>(shared + memory.scratch));
    const float scale = scale_of(p, head), natural = scale / LOG2E;

    uint32_t keys[MT][2][4], values[MT][2][4];
    float d_key[MT][4][4], d_value[MT][4][4];
    int key_region[Q] = {};
    for (int m = 0; m < MT; ++m)
        for (int j = 0; j < 4; ++j)
            for (int e = 0; e < 4; ++e) d_key[m][j][e] = d_value[m][j][e] = 0.f;
    if (MASKED && tile.there)
        for (int m = 0; m < Q; ++m) key_region[m] = regions[tile.slot + m * 8 + warp.g];

    for (int index = 0; index < Chunk::count(p); ++index) {
        const Chunk chunk(p, index);
        unsigned char* queries = shared + memory.queries + chunk.parity * chunk_bytes;
        unsigned char* grads = shared + memory.grads + chunk.parity * chunk_bytes;
        wait_for_copies();
        sync_block();
        if (index + 1 < Chunk::count(p)) begin_chunk(Chunk(p, index + 1));
        normalise<T>(queries, chunk_slots, nullptr, threadIdx.x, blockDim.x);
        for (int i = threadIdx.x; i < chunk_slots; i += blockDim.x) {
            const int slot = chunk.slot + i, place = place_of<PW>(p, chunk.column, chunk.row, i);
            const bool there = !MASKED || tokens[slot] >= 0;  // queries without a token have no weights
            start[i] = there ? -p.lse[row_base + place] / scale : -INFINITY;
            delta[i] = there ? -p.delta[row_base + place] : 0.f;
            if (MASKED) query_regions[i] = regions[slot];
        }
        if (index == 0 && tile.there) {
            normalise<T>(own_keys, Q * 8, own_inverse, warp.lane, 32);
            sync_warp();
            for (int m = 0; m < MT; ++m) {
                load_left(keys[m], own_keys, m * 16, warp);
                load_left(values[m], own_values, m * 16, warp);
            }
        }
        sync_block();
        if (!tile.there) continue;

        Biases<PW, Q, false> biases(table, part, tile.row, tile.column, chunk, warp);
#pragma unroll 1
        for (int row = 0; row < p.chunk; row += 2) {
            uint32_t weights[MT][4], by_score[MT][4];
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int at = (row + u) * 8 + 2 * warp.t;
                uint32_t query[4], gradient[4];
                load_right(query, queries, (row + u) * 8, warp);
                load_right(gradient, grads, (row + u) * 8, warp);
                biases.enter();
                float from[4], less[4];
                load_pairs(from, start + at, start + at);
                load_pairs(less, delta + at, delta + at);
                int2 region;
                if (MASKED) region = *reinterpret_cast<const int2*>(query_regions + at);
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    float c[4], d[4];
                    multiply<T>(c, keys[m][0], query[0], query[1], from);
                    multiply<T>(d, values[m][0], gradient[0], gradient[1], less);
                    multiply<T>(c, keys[m][1], query[2], query[3], c);
                    multiply<T>(d, values[m][1], gradient[2], gradient[3], d);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float2 bias = biases.of[2 * m + half];
                        float s0 = fmaf(c[2 * half], scale, bias.x), s1 = fmaf(c[2 * half + 1], scale, bias.y);
                        if (MASKED) {
                            s0 += mask_of(p, region.x, key_region[2 * m + half]);
                            s1 += mask_of(p, region.y, key_region[2 * m + half]);
                        }
                        const float p0 = exp2_of(s0), p1 = exp2_of(s1);
                        weights[m][2 * u + half] = T::pack(p0, p1);
                        by_score[m][2 * u + half] = T::pack(p0 * d[2 * half], p1 * d[2 * half + 1]);
                    }
                }
                biases.leave();
            }
            uint32_t low[4], high[4];
            load_rows_right(low, high, grads, row * 8, warp);
#pragma unroll
            for (int m = 0; m < MT; ++m) add_product<T>(d_value[m], weights[m], low, high);
            load_rows_right(low, high, queries, row * 8, warp);
#pragma unroll
            for (int m = 0; m < MT; ++m) add_product<T>(d_key[m], by_score[m], low, high);
        }
    }
    if (!tile.there) return;
    for (int m = 0; m < MT; ++m) {
        const float inverse[2] = {own_inverse[m * 16 + warp.g], own_inverse[m * 16 + 8 + warp.g]};
        float along[2];
        project<T>(d_key[m], keys[m], natural, inverse, along);
        put_rows<T>(own_keys, m * 16, d_key[m], 1.f, 1.f, warp);
        put_rows<T>(own_values, m * 16, d_value[m], 1.f, 1.f, warp);
    }
    sync_warp();
    uint16_t* d_qkv = static_cast<uint16_t*>(p.d_qkv) + base * 3 * width + head * HEAD;
    store_rows(d_qkv + width, own_keys, tokens + tile.slot, Q * 8, 3 * width, warp);
    store_rows(d_qkv + 2 * width, own_values, tokens + tile.slot, Q * 8, 3 * width, warp);
}
