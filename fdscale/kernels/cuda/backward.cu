#include "backward_kv.cuh"
#include "backward_q.cuh"
#include "dispatch.cuh"

struct Backward {
    template <class T, int PW, int MT, bool MASKED>
    static int run(const Problem& p) {
        constexpr int Q = 2 * MT;
        const BackwardQMemory<PW, Q> q(p);
        const dim3 shares(p.shares, p.heads, p.groups);
        if (int error = launch(backward_q_kernel<T, PW, MT, MASKED>, shares, p.warps * 32, q.used, p.stream, p))
            return error;
        const BackwardKVMemory<PW, Q> kv(p);
        const dim3 windows(p.count, p.heads, p.groups);
        if (int error = launch(backward_kv_kernel<T, PW, MT, MASKED>, windows, p.warps * 32, kv.used, p.stream, p))
            return error;
        const int numbers = (2 * p.window_rows - 1) * (2 * p.window_columns - 1) + 1;
        return launch(add_parts_kernel<PW, Q>, dim3((numbers + 255) / 256, p.heads, 1), 256, 0, p.stream, p);
    }
};

extern "C" int window_attention_backward(const Problem* p, int half, int patch, int tall, int masked) {
    return dispatch<Backward>(*p, half, patch, tall, masked);
}
