// Backward for q, the table and the scale: a warp holds Q patches of queries in every window of its share in turn,
// walks over all keys, and adds up the table's gradient over these windows in a part of its own.
//
// `delta`, the row sums of grad * out, comes from the rounded result first. Then the gradients of a row's scores do not
// sum up to zero: what is missing in delta, for the scale's gradient and for the kernel that follows.
#pragma once

#include "walk.cuh"

template <int PW, int Q>
struct BackwardQMemory : Memory {
    int keys, values, queries, grads, regions, inverse, delta, start, less, table, cells, tiles, scratch;
    __host__ __device__ BackwardQMemory(const Problem& p) {
        const int chunk = p.chunk * 8 * ROW_BYTES, tile = Q * 8;
        keys = take(2 * chunk);
        values = take(2 * chunk);
        queries = take(p.warps * tile * ROW_BYTES);
        grads = take(p.warps * tile * ROW_BYTES);
        regions = take(p.chunk * 8 * 4);
        inverse = take(p.warps * tile * 4);
        delta = take(p.warps * tile * 4);
        start = take(p.warps * tile * 8);
        less = take(p.warps * tile * 8);
        table = take(TablePart<PW>(p, 0, true).cells() * 4);
        cells = take(p.warps * Sums<PW, Q>::cells_of(p) * 4);
        tiles = take(p.warps * 2 * Sums<PW, Q>::TILE * 4);
        scratch = take(2 * MAX_WARPS * 4);
    }
};

// Row sums of grad * out of rows in shared memory, by the lanes of one warp.
template <class T>
INLINE void begin_delta(float* delta, unsigned char* grads, const void* out, const int* tokens, int count, int stride,
                        const Warp& warp) {
    for (int i = warp.lane; i < count * 4; i += 32) {
        const int row = i >> 2, chunk = i & 3, token = tokens[row];
        float sum = 0.f;
        if (token >= 0) {
            const uint16_t* at = static_cast<const uint16_t*>(out) + (size_t)token * stride + chunk * 8;
            const uint4 theirs = *reinterpret_cast<const uint4*>(at);
            const uint32_t words[4] = {theirs.x, theirs.y, theirs.z, theirs.w};
            const uint32_t* ours = reinterpret_cast<const uint32_t*>(chunk_at(grads, row, chunk));
            for (int k = 0; k < 4; ++k) {
                const float2 a = T::unpack(ours[k]), b = T::unpack(words[k]);
                sum += a.x * b.x + a.y * b.y;
            }
        }
        sum = sum_of_quad(sum);
        if (chunk == 0) delta[row] = sum;
    }
}

// grad of rows for that of their unit rows, `factor` times; x: the unit rows. How much of it lay along each row: along.
template <class T>
INLINE void project(float (&grad)[4][4], const uint32_t (&x)[2][4], float factor, const float (&inverse)[2],
                    float (&along)[2]) {
    for (int half = 0; half < 2; ++half) {
        float sum = 0.f;
        for (int j = 0; j < 4; ++j) {
            const float2 unit = T::unpack(x[j / 2][j % 2 * 2 + half]);
            sum += unit.x * grad[j][2 * half] + unit.y * grad[j][2 * half + 1];
        }
        sum = sum_of_quad(sum);
        along[half] = sum * factor;
        if (inverse[half] >= 1e12f) sum = 0.f;  // such rows were divided by 1e-12, a constant
        for (int j = 0; j < 4; ++j) {
            const float2 unit = T::unpack(x[j / 2][j % 2 * 2 + half]);
            grad[j][2 * half] = (grad[j][2 * half] - unit.x * sum) * (factor * inverse[half]);
            grad[j][2 * half + 1] = (grad[j][2 * half + 1] - unit.y * sum) * (factor * inverse[half]);
        }
    }
}

// The sums of a block's warps, in their order, to its parts of the table's and the scale's gradient.
template <int PW, int Q>
INLINE void write_sums(const Problem& p, const TablePart<PW>& part, const float* all_cells, float by_scale,
                       float* scratch, const Warp& warp) {
    constexpr int PH = 8 / PW;
    for (int mask = 1; mask < 32; mask *= 2) by_scale += from_lane_xor(by_scale, mask);
    if (warp.lane == 0) scratch[warp.index] = by_scale;
    sync_block();
    const size_t block = ((size_t)blockIdx.x * p.heads + blockIdx.y) * p.groups + blockIdx.z;
    const int rows = Sums<PW, Q>::rows(p), columns = Sums<PW, Q>::columns(p);
    for (int i = threadIdx.x; i < part.cells(); i += blockDim.x) {
        float sum = 0.f;
        for (int w = 0; w < p.warps; ++w) {
            const int index = blockIdx.z * p.warps + w, column = index % p.columns, row = index / p.columns * Q;
            const int y = part.first + i / part.pitch - ((row - p.walked) * PH - (PH - 1));
            const int x = i % part.pitch - part.pitch / 2 - ((column - p.columns + 1) * PW - (PW - 1));
            if (y >= 0 && y < rows && x >= 0 && x < columns) sum += all_cells[w * rows * columns + y * columns + x];
        }
        p.table_parts[block * part.cells() + i] = sum;
    }
    if (threadIdx.x == 0) {
        float sum = 0.f;
        for (int w = 0; w < p.warps; ++w) sum += scratch[w];
        p.scale_parts[block] = sum;
    }
}

template <class T, int PW, int MT, bool MASKED>
KERNEL(MAX_WARPS * 32)
backward_q_kernel(const Problem p) {
    constexpr int Q = 2 * MT;
    SHARED_MEMORY(shared);
    const BackwardQMemory<PW, Q> memory(p);
    const Warp warp;
    const Tile<Q> tile(p, warp);
    const int head = blockIdx.y, slots = p.columns * p.rows * 8, width = p.heads * HEAD;
    const int chunk_slots = p.chunk * 8, chunk_bytes = chunk_slots * ROW_BYTES, mine = warp.index * Q * 8;
    float* table = reinterpret_cast<float*>(shared + memory.table);
    int* key_regions = reinterpret_cast<int*>(shared + memory.regions);
    unsigned char* own_queries = shared + memory.queries + mine * ROW_BYTES;
    unsigned char* own_grads = shared + memory.grads + mine * ROW_BYTES;
    float* own_inverse = reinterpret_cast<float*>(shared + memory.inverse) + mine;
    float* own_delta = reinterpret_cast<float*>(shared + memory.delta) + mine;
    float2* own_start = reinterpret_cast<float2*>(shared + memory.start) + mine;
    float2* own_less = reinterpret_cast<float2*>(shared + memory.less) + mine;
    float* all_cells = reinterpret_cast<float*>(shared + memory.cells);
    float* scratch = reinterpret_cast<float*>(shared + memory.scratch);

    const TablePart<PW> part(p, blockIdx.z * p.warps / p.columns * Q, true);
    load_table(table, part, p, head, scratch);
    float* all_tiles = reinterpret_cast<float*>(shared + memory.tiles);
    for (int i = threadIdx.x; i < p.warps * Sums<PW, Q>::cells_of(p); i += blockDim.x) all_cells[i] = 0.f;
    for (int i = threadIdx.x; i < p.warps * 2 * Sums<PW, Q>::TILE; i += blockDim.x) all_tiles[i] = 0.f;
    Sums<PW, Q> sums(p, all_cells + warp.index * Sums<PW, Q>::cells_of(p),
                     all_tiles + warp.index * 2 * Sums<PW, Q>::TILE);
    const float scale = scale_of(p, head), natural = scale / LOG2E;
    const uint32_t ones = T::pack(1.f, 1.f);
    float by_scale = 0.f;

    const int share = (p.count + p.shares - 1) / p.shares, end = min(p.count, ((int)blockIdx.x + 1) * share);
    for (int n = blockIdx.x * share; n < end; ++n) {
        const int* tokens = p.tokens + (size_t)(n % p.windows) * slots;
        const int* regions = p.regions + (size_t)(n % p.windows) * slots;
        const size_t base = (size_t)(n / p.windows) * p.size,
                     row_base = ((size_t)n * p.heads + head) * p.window_rows * p.window_columns;
        const uint16_t* qkv = static_cast<const uint16_t*>(p.qkv) + base * 3 * width + head * HEAD;
        const auto begin_chunk = [&](const Chunk& chunk) {
            const int at = chunk.parity * chunk_bytes;
            const int* theirs = tokens + chunk.slot;
            begin_rows(shared + memory.keys + at, qkv + width, theirs, chunk_slots, 3 * width, threadIdx.x, blockDim.x);
            begin_rows(shared + memory.values + at, qkv + 2 * width, theirs, chunk_slots, 3 * width, threadIdx.x,
                       blockDim.x);
        };
        sync_block();  // the window before is no longer read
        if (tile.there) {
            const uint16_t* grad = static_cast<const uint16_t*>(p.grad) + base * width + head * HEAD;
            begin_rows(own_queries, qkv, tokens + tile.slot, Q * 8, 3 * width, warp.lane, 32);
            begin_rows(own_grads, grad, tokens + tile.slot, Q * 8, width, warp.lane, 32);
        }
        begin_chunk(Chunk(p, 0));

        uint32_t queries[MT][2][4], grads[MT][2][4];
        float d_query[MT][4][4];
        float missing[MT][4] = {},
              average[Q] = {};  // of a row: the sum of its scores' gradients, of weight times cosine
        int query_region[Q] = {};
        for (int m = 0; m < MT; ++m)
            for (int j = 0; j < 4; ++j)
                for (int e = 0; e < 4; ++e) d_query[m][j][e] = 0.f;

        for (int index = 0; index < Chunk::count(p); ++index) {
            const Chunk chunk(p, index);
            unsigned char* keys = shared + memory.keys + chunk.parity * chunk_bytes;
            unsigned char* values = shared + memory.values + chunk.parity * chunk_bytes;
            wait_for_copies();
            sync_block();
            if (index + 1 < Chunk::count(p)) begin_chunk(Chunk(p, index + 1));
            normalise<T>(keys, chunk_slots, nullptr, threadIdx.x, blockDim.x);
            if (MASKED)
                for (int i = threadIdx.x; i < chunk_slots; i += blockDim.x) key_regions[i] = regions[chunk.slot + i];
            if (index == 0 && tile.there) {
                const uint16_t* out = static_cast<const uint16_t*>(p.out) + base * width + head * HEAD;
                normalise<T>(own_queries, Q * 8, own_inverse, warp.lane, 32);
                begin_delta<T>(own_delta, own_grads, out, tokens + tile.slot, Q * 8, width, warp);
                sync_warp();
                for (int m = 0; m < MT; ++m) {
                    load_left(queries[m], own_queries, m * 16, warp);
                    load_left(grads[m], own_grads, m * 16, warp);
                }
                for (int m = 0; m < Q; ++m) {
                    const int row = m * 8 + warp.g, place = place_of<PW>(p, tile.column, tile.row, row);
                    if (MASKED) query_region[m] = regions[tile.slot + row];
                    // Queries without a token have no weights.
                    const float from = tokens[tile.slot + row] < 0 ? -INFINITY : -p.lse[row_base + place] / scale;
                    if (warp.t == 0) {
                        own_start[row] = {from, from};
                        own_less[row] = {-own_delta[row], -own_delta[row]};
                    }
                }
            }
            sync_block();
            if (!tile.there) continue;

            Biases<PW, Q, true> biases(table, part, tile.row, tile.column, chunk, warp);
            if (chunk.row == 0) sums.begin(p, chunk.column);
#pragma unroll 1
            for (int row = 0; row < p.chunk; row += 2) {
                uint32_t by_score[MT][4];
                float2 left[2];
#pragma unroll
                for (int u = 0; u < 2; ++u) {
                    uint32_t key[4], value[4];
                    load_right(key, keys, (row + u) * 8, warp);
                    load_right(value, values, (row + u) * 8, warp);
                    biases.enter();
                    int2 region;
                    if (MASKED) region = *reinterpret_cast<const int2*>(key_regions + (row + u) * 8 + 2 * warp.t);
#pragma unroll
                    for (int m = 0; m < MT; ++m) {
                        float c[4], d[4], from[4], less[4];
                        load_pairs(from, own_start + m * 16 + warp.g, own_start + m * 16 + 8 + warp.g);
                        load_pairs(less, own_less + m * 16 + warp.g, own_less + m * 16 + 8 + warp.g);
                        multiply<T>(c, queries[m][0], key[0], key[1], from);
                        multiply<T>(d, grads[m][0], value[0], value[1], less);
                        multiply<T>(c, queries[m][1], key[2], key[3], c);
                        multiply<T>(d, grads[m][1], value[2], value[3], d);
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const float2 bias = biases.of[2 * m + half];
                            float s0 = fmaf(c[2 * half], scale, bias.x), s1 = fmaf(c[2 * half + 1], scale, bias.y);
                            if (MASKED) {
                                s0 += mask_of(p, query_region[2 * m + half], region.x);
                                s1 += mask_of(p, query_region[2 * m + half], region.y);
                            }
                            const float p0 = exp2_of(s0), p1 = exp2_of(s1);
                            const float ds0 = p0 * d[2 * half], ds1 = p1 * d[2 * half + 1];
                            average[2 * m + half] =
                                fmaf(p0, c[2 * half], fmaf(p1, c[2 * half + 1], average[2 * m + half]));
                            sums.of[2 * m + half].x += ds0;
                            sums.of[2 * m + half].y += ds1;
                            by_score[m][2 * u + half] = T::pack(ds0, ds1);
                        }
                    }
                    biases.leave();
                    left[u] = sums.leave();
                }
                uint32_t low[4], high[4];
                load_rows_right(low, high, keys, row * 8, warp);
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    add_product<T>(d_query[m], by_score[m], low, high);
                    multiply<T>(missing[m], by_score[m], ones, ones, missing[m]);  // rounded as in d_query
                }
                sums.put(left[0], left[1], warp);
            }
            if (chunk.row + p.chunk == p.walked) sums.end(warp);
        }
        if (!tile.there) continue;
        for (int m = 0; m < MT; ++m) {
            const float inverse[2] = {own_inverse[m * 16 + warp.g], own_inverse[m * 16 + 8 + warp.g]};
            float along[2];
            project<T>(d_query[m], queries[m], natural, inverse, along);
            for (int half = 0; half < 2; ++half) {
                const int row = m * 16 + half * 8 + warp.g;
                const int place = place_of<PW>(p, tile.column, tile.row, row);
                const float less = missing[m][2 * half];
                const float cosine = sum_of_quad(average[2 * m + half]) - own_start[row].x;
                if (warp.t != 0 || tokens[tile.slot + row] < 0) continue;
                p.delta[row_base + place] = own_delta[row] + less;
                by_scale += along[half] - natural * less * cosine;
            }
            put_rows<T>(own_queries, m * 16, d_query[m], 1.f, 1.f, warp);
        }
        sync_warp();
        uint16_t* d_q = static_cast<uint16_t*>(p.d_qkv) + base * 3 * width + head * HEAD;
        store_rows(d_q, own_queries, tokens + tile.slot, Q * 8, 3 * width, warp);
    }
    write_sums<PW, Q>(p, part, all_cells, by_scale, scratch, warp);
}

// The parts of all blocks, in their order. A thread for each number of a head's table, and one for its scale.
template <int PW, int Q>
KERNEL(256)
add_parts_kernel(const Problem p) {
    const int across = 2 * p.window_columns - 1, area = (2 * p.window_rows - 1) * across, head = blockIdx.y;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i > area) return;
    float sum = 0.f;
    for (int share = 0; share < p.shares; ++share)
        for (int group = 0; group < p.groups; ++group) {
            const size_t block = ((size_t)share * p.heads + head) * p.groups + group;
            if (i == area) {
                sum += p.scale_parts[block];
                continue;
            }
            const TablePart<PW> part(p, group * p.warps / p.columns * Q, true);
            const int y = i / across - (p.window_rows - 1) - part.first;
            const int x = i % across - (p.window_columns - 1) + part.pitch / 2;
            if (y >= 0 && y < part.rows) sum += p.table_parts[block * part.cells() + y * part.pitch + x];
        }
    if (i < area)
        p.d_table[(size_t)head * area + i] = sum;
    else
        p.d_scale[head] = p.logit_scale[head] < LARGEST_SCALE ? sum : 0.f;
}
