#include "dispatch.cuh"
#include "forward.cuh"

struct Forward {
    template <class T, int PW, int MT, bool MASKED>
    static int run(const Problem& p) {
        const ForwardMemory<PW, 2 * MT> memory(p);
        const dim3 grid(p.count, p.heads, p.groups);
        return launch(forward_kernel<T, PW, MT, MASKED>, grid, p.warps * 32, memory.used, p.stream, p);
    }
};

// 0, or the number of a CUDA error (see window_attention_error), or UNKNOWN.
extern "C" int window_attention_forward(const Problem* p, int half, int patch, int tall, int masked) {
    return dispatch<Forward>(*p, half, patch, tall, masked);
}

extern "C" const char* window_attention_error(int error) {
    return error == UNKNOWN ? "no kernel for this layout" : error_text(error);
}
