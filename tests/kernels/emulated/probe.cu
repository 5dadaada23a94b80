// Small kernels for the tests of the emulation itself: its products and loads, and what it must find.
#include <device.cuh>

struct Given {
    const uint32_t* a;     // (32, 4) fragments
    const uint32_t* b;     // (32, 2)
    const uint16_t* rows;  // (32, 8)
    float* out;            // (32, 4)
    uint32_t* tiles;       // (32, 4)
    int what;
};

template <class T>
KERNEL(32)
product_kernel(const Given p) {
    const int lane = threadIdx.x;
    uint32_t a[4];
    float c[4] = {0.f, 0.f, 0.f, 0.f};
    for (int i = 0; i < 4; ++i) a[i] = p.a[lane * 4 + i];
    multiply<T>(c, a, p.b[lane * 2], p.b[lane * 2 + 1], c);
    for (int i = 0; i < 4; ++i) p.out[lane * 4 + i] = c[i];
}

KERNEL(32) tiles_kernel(const Given p) {
    SHARED_MEMORY(shared);
    const int lane = threadIdx.x;
    copy16(shared + lane * 16, p.rows + lane * 8, true);
    wait_for_copies();
    sync_block();
    uint32_t tiles[4];
    if (p.what) {
        load_tiles_transposed(tiles, shared + lane * 16);
    } else {
        load_tiles(tiles, shared + lane * 16);
    }
    for (int i = 0; i < 4; ++i) p.tiles[lane * 4 + i] = tiles[i];
}

// Each of them is wrong in its way.
KERNEL(64) wrong_kernel(const Given p) {
    SHARED_MEMORY(shared);
    float* numbers = reinterpret_cast<float*>(shared);
    const int i = threadIdx.x;
    if (p.what == 0) {  // reads what another thread may not have written yet
        numbers[i] = 1.f;
        p.out[i] = numbers[63 - i];
    } else if (p.what == 1) {  // does not wait for its copy
        copy16(shared + i * 16, p.rows + i % 32 * 8, true);
        p.out[i] = numbers[i * 4];
    } else if (p.what == 2) {  // half of a warp waits
        if (i < 48) sync_warp();
    } else if (p.what == 3) {  // some wait for the block, some for the warp
        if (i < 16)
            sync_block();
        else
            sync_warp();
    } else if (p.what == 4) {  // writes beyond its memory
        if (i == 0) numbers[1024 / 4 + 3] = 1.f;
    } else if (p.what == 5) {  // a tile's row that lies nowhere
        uint32_t tiles[4];
        load_tiles(tiles, shared + 1024);
    }
}

extern "C" int product(const Given* p, int half) {
    return half ? launch(product_kernel<Float16>, dim3(1), 32, 0, nullptr, *p)
                : launch(product_kernel<BFloat16>, dim3(1), 32, 0, nullptr, *p);
}
extern "C" int tiles(const Given* p) { return launch(tiles_kernel, dim3(1), 32, 512, nullptr, *p); }
extern "C" int wrong(const Given* p) { return launch(wrong_kernel, dim3(1), 64, 1024, nullptr, *p); }
extern "C" const char* text() { return error_text(1); }
