// From numbers to the kernels that exist: float16 or bfloat16; patches of 8 x 1 or 4 x 2; 4 or 6 of them to a warp.
#pragma once

#include "problem.cuh"

constexpr int UNKNOWN = -1;

template <class Call, class T, int PW, int MT>
int dispatch_mask(const Problem& p, int masked) {
    return masked ? Call::template run<T, PW, MT, true>(p) : Call::template run<T, PW, MT, false>(p);
}

template <class Call, class T>
int dispatch_layout(const Problem& p, int patch, int tall, int masked) {
    if (patch == 8 && tall == 2) return dispatch_mask<Call, T, 8, 2>(p, masked);
    if (patch == 4 && tall == 2) return dispatch_mask<Call, T, 4, 2>(p, masked);
    if (patch == 4 && tall == 3 && !masked) return Call::template run<T, 4, 3, false>(p);
    return UNKNOWN;
}

template <class Call>
int dispatch(const Problem& p, int half, int patch, int tall, int masked) {
    return half ? dispatch_layout<Call, Float16>(p, patch, tall, masked)
                : dispatch_layout<Call, BFloat16>(p, patch, tall, masked);
}
