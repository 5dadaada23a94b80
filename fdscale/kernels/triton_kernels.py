"""Window attention as Triton kernels: what fused.py launches. Importing this imports triton.

A program reads its queries straight from the map, at the tokens of its window, and walks over the keys of that window;
no scores reach memory. The backward walks three times: over keys for dq, over queries for dk and dv, and over windows
for the table. No sum uses atomic additions, so all results are repeatable to the bit.

The table's gradient: window rows are taken PATCH at a time, and the bias of the scores of two patches depends on their
displacement alone. So a program owns a displacement: it adds up dS of all such pairs in all windows in one tile of
registers, and sums that tile's diagonals once, at the end.

Scores are in units of log 2, for exp2: the table and the scale come multiplied by log2(e).

Letters: as in reference.py; BM queries by BN keys in a tile; DP >= d channels, a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(-1e30)  # -inf that can be subtracted from itself


@triton.jit
def load_rows(base, tokens, channel, stride, D: tl.constexpr):
    """(M, DP) of a map: the rows of these tokens, zeros for token -1 and beyond D channels."""
    real = (tokens[:, None] >= 0) & (channel[None, :] < D)
    return tl.load(base + tokens[:, None].to(tl.int64) * stride + channel[None, :], mask=real, other=0.0)


@triton.jit
def store_rows(base, tokens, channel, stride, values, D: tl.constexpr):
    """The inverse of load_rows."""
    real = (tokens[:, None] >= 0) & (channel[None, :] < D)
    at = base + tokens[:, None].to(tl.int64) * stride + channel[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=real)


@triton.jit
def load_places(TOKENS, CELLS, REGIONS, window, place, valid, N: tl.constexpr, MASKED: tl.constexpr):
    """Of places in a window: token in the map (-1: none), cell in the table, region."""
    token = tl.load(TOKENS + window * N + place, mask=valid, other=-1)
    cell = tl.load(CELLS + place, mask=valid, other=0)
    region = cell
    if MASKED:
        region = tl.load(REGIONS + window * N + place, mask=valid, other=0)
    return token, cell, region


@triton.jit
def inverse_norm(x):
    """1 / max(|row|, 1e-12)."""
    wide = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)


@triton.jit
def unit(x, inverse):
    """Rows of length 1, rounded as x is."""
    return (x.to(tl.float32) * inverse[:, None]).to(x.dtype)


@triton.jit
def project(grad, x, inverse):
    """Gradient of x for that of its unit rows. Rows below 1e-12 were divided by that, a constant."""
    row = x.to(tl.float32) * inverse[:, None]
    along = tl.where(inverse < 1e12, tl.sum(row * grad, 1), 0.0)
    return (grad - row * along[:, None]) * inverse[:, None]


@triton.jit
def product(a, b, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b in float32, a rounded as b is. WIDE: cast then, since the interpreter cannot multiply bfloat16."""
    a = a.to(b.dtype)
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def logits(
    q, k, factor_i, factor_j, TABLE, cell_i, cell_j, region_i, region_j, token_j, masked,
    MASKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BM, BN) in units of log 2, NEVER where there is no key, and their part that grows with the scale.

    q and k come as they are: their products are exact in float32, those of unit rows in 16 bits would not be. factor_i:
    scale / |q|; factor_j: 1 / |k|. TABLE points at displacement 0.
    """
    scaled = product(q, tl.trans(k), WIDE, PRECISION) * factor_i[:, None] * factor_j[None, :]
    s = scaled + tl.load(TABLE + (cell_i[:, None] - cell_j[None, :]))
    if MASKED:
        s += tl.where(region_i[:, None] == region_j[None, :], 0.0, masked)
    return tl.where(token_j[None, :] >= 0, s, NEVER), scaled


@triton.jit
def forward_kernel(
    QKV, TABLE, SCALE, TOKENS, CELLS, REGIONS, OUT, LSE, size, heads, windows, area, masked,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of queries of a window of an image, head)."""
    blocks: tl.constexpr = tl.cdiv(N, BM)
    n, head = tl.program_id(0) // blocks, tl.program_id(1)
    window, image = n % windows, (n // windows).to(tl.int64)
    width = heads * D
    QKV += image * size * 3 * width + head * D
    OUT += image * size * width + head * D
    TABLE += head * area + area // 2
    scale = tl.load(SCALE + head)
    channel = tl.arange(0, DP)
    i = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    token_i, cell_i, region_i = load_places(TOKENS, CELLS, REGIONS, window, i, i < N, N, MASKED)
    q = load_rows(QKV, token_i, channel, 3 * width, D)
    factor_i = scale * inverse_norm(q)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, DP], tl.float32)
    for first in range(0, N, BN):
        j = first + tl.arange(0, BN)
        token_j, cell_j, region_j = load_places(TOKENS, CELLS, REGIONS, window, j, j < N, N, MASKED)
        k = load_rows(QKV + width, token_j, channel, 3 * width, D)
        v = load_rows(QKV + 2 * width, token_j, channel, 3 * width, D)
        s, _ = logits(
            q, k, factor_i, inverse_norm(k), TABLE, cell_i, cell_j, region_i, region_j, token_j, masked,
            MASKED, WIDE, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None] + product(p, v, WIDE, PRECISION)
        top = higher
    store_rows(OUT, token_i, channel, width, out / total[:, None], D)
    tl.store(LSE + (n.to(tl.int64) * heads + head) * N + i, top + tl.log2(total), mask=i < N)


@triton.jit
def backward_q_kernel(
    GRAD, QKV, TABLE, SCALE, TOKENS, CELLS, REGIONS, OUT, LSE, DQKV, DELTA, DSCALE, size, heads, windows, area, masked,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of queries of a window of an image, head): dq, D, and a share of the scale's gradient.

    D comes from the rounded result first. Then dS has row sums that are not zero: what is missing in D, for the kernels
    that follow. In 16 bits, without this, the scale's gradient was no better than the official code's.
    """
    blocks: tl.constexpr = tl.cdiv(N, BM)
    n, head = tl.program_id(0) // blocks, tl.program_id(1)
    window, image = n % windows, (n // windows).to(tl.int64)
    width = heads * D
    QKV += image * size * 3 * width + head * D
    TABLE += head * area + area // 2
    scale = tl.load(SCALE + head)
    channel = tl.arange(0, DP)
    i = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    token_i, cell_i, region_i = load_places(TOKENS, CELLS, REGIONS, window, i, i < N, N, MASKED)
    q = load_rows(QKV, token_i, channel, 3 * width, D)
    inverse = inverse_norm(q)
    grad = load_rows(GRAD + image * size * width + head * D, token_i, channel, width, D)
    out = load_rows(OUT + image * size * width + head * D, token_i, channel, width, D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    row = (n.to(tl.int64) * heads + head) * N + i
    lse = tl.load(LSE + row, mask=i < N, other=0.0)
    dq = tl.zeros([BM, DP], tl.float32)
    missing = tl.zeros([BM], tl.float32)  # row sums of dS,
    by_scale = tl.zeros([BM], tl.float32)  # of dS * (s q^ k^),
    average = tl.zeros([BM], tl.float32)  # and of P * (s q^ k^)
    for first in range(0, N, BN):
        j = first + tl.arange(0, BN)
        token_j, cell_j, region_j = load_places(TOKENS, CELLS, REGIONS, window, j, j < N, N, MASKED)
        k = load_rows(QKV + width, token_j, channel, 3 * width, D)
        v = load_rows(QKV + 2 * width, token_j, channel, 3 * width, D)
        factor_j = inverse_norm(k)
        s, scaled = logits(
            q, k, scale * inverse, factor_j, TABLE, cell_i, cell_j, region_i, region_j, token_j, masked,
            MASKED, WIDE, PRECISION,
        )  # fmt: skip
        p = tl.exp2(s - lse[:, None])
        ds = p * (product(grad, tl.trans(v), WIDE, PRECISION) - delta[:, None])
        dq += product(ds, unit(k, factor_j), WIDE, PRECISION)
        missing += tl.sum(ds, 1)
        by_scale += tl.sum(ds * scaled, 1)
        average += tl.sum(p * scaled, 1)
    tl.store(DELTA + row, delta + missing, mask=i < N)
    dq = project(dq * (scale * LN2), q, inverse)
    store_rows(DQKV + image * size * 3 * width + head * D, token_i, channel, 3 * width, dq, D)
    by_scale = tl.where(token_i >= 0, by_scale - missing * average, 0.0) * LN2
    tl.store(DSCALE + tl.program_id(0) * heads + head, tl.sum(by_scale, 0))


@triton.jit
def backward_kv_kernel(
    GRAD, QKV, TABLE, SCALE, TOKENS, CELLS, REGIONS, LSE, DELTA, DQKV, size, heads, windows, area, masked,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of keys of a window of an image, head): dk and dv."""
    blocks: tl.constexpr = tl.cdiv(N, BN)
    n, head = tl.program_id(0) // blocks, tl.program_id(1)
    window, image = n % windows, (n // windows).to(tl.int64)
    width = heads * D
    QKV += image * size * 3 * width + head * D
    GRAD += image * size * width + head * D
    TABLE += head * area + area // 2
    scale = tl.load(SCALE + head)
    channel = tl.arange(0, DP)
    j = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    token_j, cell_j, region_j = load_places(TOKENS, CELLS, REGIONS, window, j, j < N, N, MASKED)
    k = load_rows(QKV + width, token_j, channel, 3 * width, D)
    v = load_rows(QKV + 2 * width, token_j, channel, 3 * width, D)
    inverse = inverse_norm(k)
    row = (n.to(tl.int64) * heads + head) * N
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    for first in range(0, N, BM):
        i = first + tl.arange(0, BM)
        token_i, cell_i, region_i = load_places(TOKENS, CELLS, REGIONS, window, i, i < N, N, MASKED)
        q = load_rows(QKV, token_i, channel, 3 * width, D)
        grad = load_rows(GRAD, token_i, channel, width, D)
        factor_i = inverse_norm(q)
        lse = tl.load(LSE + row + i, mask=i < N, other=0.0)
        delta = tl.load(DELTA + row + i, mask=i < N, other=0.0)
        s, _ = logits(
            q, k, scale * factor_i, inverse, TABLE, cell_i, cell_j, region_i, region_j, token_j, masked,
            MASKED, WIDE, PRECISION,
        )  # fmt: skip
        p = tl.where(token_i[:, None] >= 0, tl.exp2(s - lse[:, None]), 0.0)
        dv += product(tl.trans(p), grad, WIDE, PRECISION)
        ds = p * (product(grad, tl.trans(v), WIDE, PRECISION) - delta[:, None])
        dk += product(tl.trans(ds), unit(q, factor_i), WIDE, PRECISION)
    dk = project(dk * (scale * LN2), k, inverse)
    DQKV += image * size * 3 * width + head * D
    store_rows(DQKV + width, token_j, channel, 3 * width, dk, D)
    store_rows(DQKV + 2 * width, token_j, channel, 3 * width, dv, D)


@triton.jit
def backward_table_kernel(
    GRAD, QKV, TABLE, SCALE, TOKENS, CELLS, REGIONS, LSE, DELTA, PARTS,
    size, heads, windows, area, masked, count, share,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, ROW: tl.constexpr, PATCH: tl.constexpr,
    OUTPUTS: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (displacement of patches, head, share of the windows): sums of dS, (2 PATCH - 1) x (2 ROW - 1) of them.

    ROW: Ww. A patch is PATCH * ROW <= BM tokens. count: windows of all images; share: windows of a program.
    """
    patches: tl.constexpr = (N + PATCH * ROW - 1) // (PATCH * ROW)
    shift, head = tl.program_id(0) - (patches - 1), tl.program_id(1)
    width = heads * D
    TABLE += head * area + area // 2
    scale = tl.load(SCALE + head)
    channel = tl.arange(0, DP)
    r = tl.arange(0, BM)
    ds = tl.zeros([BM, BM], tl.float32)
    first = tl.program_id(2).to(tl.int64) * share
    for step in range(0, tl.minimum(share, count - first)):
        n = first + step
        window, image = n % windows, n // windows
        base = QKV + image * size * 3 * width + head * D
        row = (n * heads + head) * N
        for patch in range(tl.maximum(shift, 0), tl.minimum(patches, patches + shift)):
            i, j = patch * PATCH * ROW + r, (patch - shift) * PATCH * ROW + r
            token_i, cell_i, region_i = load_places(
                TOKENS, CELLS, REGIONS, window, i, (r < PATCH * ROW) & (i < N), N, MASKED
            )
            token_j, cell_j, region_j = load_places(
                TOKENS, CELLS, REGIONS, window, j, (r < PATCH * ROW) & (j < N), N, MASKED
            )
            q = load_rows(base, token_i, channel, 3 * width, D)
            k = load_rows(base + width, token_j, channel, 3 * width, D)
            v = load_rows(base + 2 * width, token_j, channel, 3 * width, D)
            grad = load_rows(GRAD + image * size * width + head * D, token_i, channel, width, D)
            lse = tl.load(LSE + row + i, mask=token_i >= 0, other=0.0)
            delta = tl.load(DELTA + row + i, mask=token_i >= 0, other=0.0)
            s, _ = logits(
                q, k, scale * inverse_norm(q), inverse_norm(k), TABLE, cell_i, cell_j, region_i, region_j, token_j,
                masked, MASKED, WIDE, PRECISION,
            )  # fmt: skip
            p = tl.where(token_i[:, None] >= 0, tl.exp2(s - lse[:, None]), 0.0)
            ds += p * (product(grad, tl.trans(v), WIDE, PRECISION) - delta[:, None])
    # Row r of the tile holds displacement (dy, dx) in the column of the key that lies so far from it, if there is one.
    across: tl.constexpr = 2 * ROW - 1
    program = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * heads + head
    for start in range(0, OUTPUTS, BM):
        output = start + tl.arange(0, BM)
        y = (r // ROW)[:, None] - (output // across)[None, :] + (PATCH - 1)
        x = (r % ROW)[:, None] - (output % across)[None, :] + (ROW - 1)
        there = (r < PATCH * ROW)[:, None] & (y >= 0) & (y < PATCH) & (x >= 0) & (x < ROW)
        sums = tl.sum(tl.where(there, tl.gather(ds, tl.where(there, y * ROW + x, 0), 1), 0.0), 0)
        tl.store(PARTS + program * OUTPUTS + output, sums)
