"""The two kernels: a scan forward and a scan backward, for every cell, layout and regime.

One program owns BLOCK_B batch rows and BLOCK_H hidden units of one direction, with all their
gates, for the scan's steps [s0, s1). Step s is timestep s, or T-1-s in the second direction.
h of the step before is all that programs need of each other, and it goes through y, where it is
an output anyway; backward it is the gradients of the gates. Each timestep has rows of its own
there, so nothing that somebody may still read is ever overwritten.

A GRU that resets before the product has two products in a step, the second of r * h. So programs
need of each other r * h as well, which goes through `gated_h`, and backward the gradient of n
before those of r and z: twice as many arrivals, and a launch for each HALF of a step.

EXCHANGE says how a program gets at what the others have written:

    "registers"  there are no others (BLOCK_H >= H) and one tile of the product holds all of h
    "program"    there are no others, but h is longer than a tile: through memory, with a barrier
    "grid"       all programs of a batch tile run at once and count arrivals in `counters`
    "launch"     one step per launch; the launches are the barrier

RESIDENT: W_hh's slice is loaded once and stays on the chip; else it is read in every step.

Shapes: D directions, N rows, T timesteps, B batch, H hidden_size, G gates; S = saved_gates and
Q = grad_gates of the cell. Arguments that may be None leave no code behind. Row offsets have 64
bits.
"""

import triton
import triton.language as tl

from .cells import sigmoid
from .tiles import (
    apart,
    load_before,
    narrow,
    peepholes_of,
    place,
    product,
    publish,
    restarts,
    scaled,
    times_rows,
    together,
    wait_for,
    widen,
    zoned_out,
)

# Sizes that change from batch to batch: no kernel may be compiled anew for one of them.
VARYING = ["s0", "s1", "T", "B", "N", "tile0"]


@triton.jit(do_not_specialize=VARYING)
def scan_forward(
    gx,  # [D, N, G*H] input side of the gates
    w,  # [D, G*H, H] W_hh
    b_hn,  # [D, H] GRU's bias inside the product with r, or None
    peephole,  # float32 [D, 3*H] LSTM's, from c to i, f and o, or None
    h0,  # [D, B, H]
    offsets,  # int64 [T+1] where the rows of each timestep begin, when packed, or None
    lengths,  # int64 [B] or None
    resets,  # uint8 [T, B] or None
    reset_h,  # [D, B, H] or None
    reset_c,  # float32 [D, B, H] or None
    h_factor,  # float32 [D, B, H] what h is multiplied by before W_hh, or None
    kept_h,  # uint8 [D, N, H] where a step leaves h as it was, or None
    kept_c,  # uint8 [D, N, H] the same of LSTM's c, or None
    part_h,  # without kept_h: which part of h a step leaves, or None
    part_c,
    y,  # [N, D*H] out
    h,  # float32 [D, B, H] the state, in and out
    c,  # float32 [D, B, H] the same of LSTM's c, or None
    gates,  # [D, N, S*H] out, or None; may be gx itself where S == G
    cells,  # float32 [D, N, H] out, or None
    gated_h,  # [D, B, H] scratch: r * h on its way into the second product, or None
    z_state,  # float32 [D, B, H] scratch: z between the halves of a step, or None
    counters,  # int32 [D * batch tiles] zeros, or None
    s0,
    s1,
    T,
    B,
    N,
    tile0,  # the first batch tile of this launch
    H: tl.constexpr,  # a layer has one, and offsets become immediate
    CELL: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    COLUMNS: tl.constexpr,  # gates side by side in the first product: S, or 1 where that is 0
    RESET_BEFORE: tl.constexpr,  # GRU whose n takes a second product, of r * h
    HALF: tl.constexpr,  # of a step in which there are two products: "first", "second", or ""
    D: tl.constexpr,
    TILES: tl.constexpr,
    EXCHANGE: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,  # tiles of BLOCK_K that make H
    PRECISION: tl.constexpr,
    SOFT: tl.constexpr,
):
    dtype: tl.constexpr = y.dtype.element_ty
    PRODUCTS: tl.constexpr = 2 if RESET_BEFORE else 1  # in a step, one after the other
    direction = tl.program_id(2)
    sign = 1 - 2 * direction
    side = tl.cast(direction, tl.int64)
    # Within a tile offsets have 32 bits; what they are added to is one number with 64.
    inner = tl.arange(0, BLOCK_B)[:, None]
    b0 = tl.cast(tl.program_id(0) + tile0, tl.int64) * BLOCK_B
    b = tl.cast(b0, tl.int32) + inner
    u = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    k = tl.arange(0, BLOCK_K)
    present = b < B
    unit = u < H
    gx += (side * N + b0) * (G * H)
    y += b0 * (D * H) + direction * H
    w += side * (G * H) * H
    state = (side * B + b0) * H
    own = inner * H + u
    if counters is not None:
        counters += direction * tl.num_programs(0) + tl.program_id(0)
    length = None
    if lengths is not None:
        length = tl.load(lengths + b, present, 0)
    # Column j of a product is gate j % COLUMNS of unit j // COLUMNS: one product and one load make
    # all gates, and they fall apart within the registers of a thread.
    j = (tl.program_id(1) * (BLOCK_H * COLUMNS) + tl.arange(0, BLOCK_H * COLUMNS))[None, :]
    gate, unit_j = j % COLUMNS, j // COLUMNS
    known_j = unit_j < H
    p_w, p_x = gate * H + unit_j, gate * H + unit_j
    from_w, from_x = known_j, known_j
    if G < COLUMNS:  # GRU: hn, r, z, n are gates 2, 0, 1 of W_hh and gates -, 0, 1, 2 of gx
        p_w = tl.where(gate == 0, 2, gate - 1) * H + unit_j
        p_x -= H
        from_w, from_x = known_j & (gate < G), known_j & (gate > 0)
    p_w = w + tl.cast(p_w, tl.int64) * H
    if RESIDENT:
        slices = ()
        for i in tl.static_range(CHUNKS):
            k_w = (i * BLOCK_K + k)[:, None]
            slices = slices + (tl.load(p_w + k_w, from_w & (k_w < H), 0.0),)
    if RESET_BEFORE:
        p_xn = inner * (G * H) + (2 * H + u)
        p_wn = w + tl.cast(2 * H + u, tl.int64) * H
        slices_n = ()
        if RESIDENT:
            for i in tl.static_range(CHUNKS):
                k_w = (i * BLOCK_K + k)[:, None]
                slices_n = slices_n + (tl.load(p_wn + k_w, unit & (k_w < H), 0.0),)
        if h_factor is not None:
            factor_own = tl.load(h_factor + state + own, present & unit, 0.0)
    if b_hn is not None:
        b_own = tl.load(b_hn + direction * H + unit_j, known_j & (gate == 0), 0.0)
        b_own = widen(b_own, SOFT)
    peep = None
    if peephole is not None:
        peep = peepholes_of(peephole, direction, u, unit, H)
    h_own = tl.load(h + state + own, present & unit, 0.0)
    c_own = h_own
    if c is not None:
        c_own = tl.load(c + state + own, present & unit, 0.0)
    if h_factor is not None:
        h_factor += state + inner * H

    t = direction * (T - 1) + sign * s0
    row_before, taken_before = place(t - sign, b, length, offsets, T, B)
    row, taken = place(t, b, length, offsets, T, B)
    p_x += inner * (G * H)
    x = tl.load(gx + row * (G * H) + p_x, taken & from_x, 0.0)
    if RESET_BEFORE:
        x_n = tl.load(gx + row * (G * H) + p_xn, taken & unit, 0.0)
    for s in range(s0, s1):
        t = direction * (T - 1) + sign * s
        if EXCHANGE == "launch":
            row_next, taken_next, x_next = row, taken, x
            if RESET_BEFORE:
                x_n_next = x_n
        else:
            # Asked for before the wait, so that memory answers meanwhile.
            row_next, taken_next = place(t + sign, b, length, offsets, T, B)
            x_next = tl.load(gx + row_next * (G * H) + p_x, taken_next & from_x, 0.0)
            if RESET_BEFORE:
                x_n_next = tl.load(gx + row_next * (G * H) + p_xn, taken_next & unit, 0.0)
        restart = None
        if resets is not None:
            restart = restarts(t, b, taken_before, direction, resets, T, B) & taken
            fresh_h = tl.zeros_like(h_own)
            if reset_h is not None:
                fresh_h += widen(tl.load(reset_h + state + own, restart & unit, 0.0), SOFT)
            h_own = tl.where(restart, fresh_h, h_own)
            if c is not None:
                fresh_c = tl.zeros_like(c_own)
                if reset_c is not None:
                    fresh_c += tl.load(reset_c + state + own, restart & unit, 0.0)
                c_own = tl.where(restart, fresh_c, c_own)

        if HALF != "second":
            total = tl.zeros((BLOCK_B, BLOCK_H * COLUMNS), tl.float32)
            if EXCHANGE == "registers":
                h_in = narrow(h_own, dtype, SOFT)
                if h_factor is not None:
                    h_in = scaled(h_in, h_factor + u, present & unit, SOFT)
                total = product(h_in, slices[0], total, PRECISION, SOFT)
            else:
                p_y = y + row_before * (D * H) + inner * (D * H)
                p_h0 = h0 + state + inner * H
                p_fresh = None
                if reset_h is not None:
                    p_fresh = reset_h + state + inner * H
                if EXCHANGE == "grid":
                    wait_for(counters, (s - s0) * (TILES * PRODUCTS))
                if RESIDENT:
                    h_in = ()
                    for i in tl.static_range(CHUNKS):
                        k_h = (i * BLOCK_K + k)[None, :]
                        p_part = None
                        if reset_h is not None:
                            p_part = p_fresh + k_h
                        part = load_before(
                            p_y + k_h, p_h0 + k_h, p_part, k_h < H, taken_before, restart, present
                        )
                        if h_factor is not None:
                            part = scaled(part, h_factor + k_h, present & (k_h < H), SOFT)
                        h_in = h_in + (part,)
                    for i in tl.static_range(CHUNKS):
                        total = product(h_in[i], slices[i], total, PRECISION, SOFT)
                else:
                    for k0 in range(0, H, BLOCK_K):
                        k_h = (k0 + k)[None, :]
                        k_w = (k0 + k)[:, None]
                        p_part = None
                        if reset_h is not None:
                            p_part = p_fresh + k_h
                        h_part = load_before(
                            p_y + k_h, p_h0 + k_h, p_part, k_h < H, taken_before, restart, present
                        )
                        if h_factor is not None:
                            h_part = scaled(h_part, h_factor + k_h, present & (k_h < H), SOFT)
                        w_part = tl.load(p_w + k_w, from_w & (k_w < H), 0.0)
                        total = product(h_part, w_part, total, PRECISION, SOFT)
            # Added afterwards: as the start of the sum it would cost exactness.
            pre = total + widen(x, SOFT)
            if b_hn is not None:
                pre += b_own
            parts = apart(pre, BLOCK_B, BLOCK_H, COLUMNS)
        if RESET_BEFORE:
            if HALF != "second":
                r, z = sigmoid(parts[0]), sigmoid(parts[1])
                rh = r * h_own
                if h_factor is not None:
                    rh *= factor_own
                rh = narrow(rh, dtype, SOFT)
                if EXCHANGE != "registers":
                    tl.store(gated_h + state + own, rh, present & unit)
                    publish(counters, EXCHANGE)
            if HALF == "first":
                tl.store(z_state + state + own, z, present & unit)
            elif EXCHANGE == "registers":
                total_n = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
                total_n = product(rh, slices_n[0], total_n, PRECISION, SOFT)
            else:
                if HALF == "second":
                    z = tl.load(z_state + state + own, present & unit, 0.0)
                    r = z  # r itself is in gated_h, and saved
                if EXCHANGE == "grid":
                    wait_for(counters, ((s - s0) * PRODUCTS + 1) * TILES)
                # One step's r * h takes the place of another's: whoever writes has seen that all
                # have arrived with the h that they made of it.
                total_n = times_rows(
                    gated_h + state + inner * H, present, p_wn, 1, unit, slices_n, H,
                    BLOCK_B, BLOCK_H, BLOCK_K, CHUNKS, RESIDENT, PRECISION, SOFT,
                )  # fmt: skip
            if HALF != "first":
                parts = (r, z, total_n + widen(x_n, SOFT))
        on = taken & unit
        if HALF == "first":
            saved = (r, z)
        else:
            h_new, c_new, saved = CELL(parts, h_own, c_own, peep)
            p_kept = (side * N + b0 + row) * H + own
            if kept_h is not None:
                h_new = zoned_out(h_own, h_new, kept_h + p_kept, part_h, on)
            if part_h is not None:
                h_new = zoned_out(h_own, h_new, None, part_h, on)
            if kept_c is not None:
                c_new = zoned_out(c_own, c_new, kept_c + p_kept, part_c, on)
            if part_c is not None:
                c_new = zoned_out(c_own, c_new, None, part_c, on)
            written = on
            h_out = h_new
            if lengths is not None:  # rows past their length are zero
                written = present & unit
                h_out = tl.where(on, h_new, 0.0)
            p_out = y + row * (D * H) + (inner * (D * H) + u)
            tl.store(p_out, narrow(h_out, dtype, SOFT), written)
            publish(counters, EXCHANGE)
            # What nobody waits for comes after.
            h_own = tl.where(on, h_new, h_own)
            if c is not None:
                c_own = tl.where(on, c_new, c_own)
        if gates is not None:
            p_gates = gates + (side * N + b0 + row) * (S * H)
            from_row = taken
            if lengths is not None:
                from_row = present
            if HALF != "second":
                kept = together(saved, BLOCK_B, BLOCK_H, COLUMNS)
                if lengths is not None:
                    kept = tl.where(taken, kept, 0.0)
                p_saved = p_gates + (inner * (S * H) + gate * H + unit_j)
                tl.store(p_saved, narrow(kept, dtype, SOFT), from_row & known_j)
            if RESET_BEFORE and HALF != "first":
                n = saved[2]
                if lengths is not None:
                    n = tl.where(taken, n, 0.0)
                p_n = p_gates + (inner * (S * H) + 2 * H + u)
                tl.store(p_n, narrow(n, dtype, SOFT), from_row & unit)
        if cells is not None:
            c_out = c_new
            if lengths is not None:
                c_out = tl.where(on, c_new, 0.0)
            tl.store(cells + (side * N + b0 + row) * H + own, c_out, written)
        row_before, taken_before = row, taken
        row, taken, x = row_next, taken_next, x_next
        if RESET_BEFORE:
            x_n = x_n_next
    if HALF != "first":
        tl.store(h + state + own, h_own, present & unit)
    if c is not None:
        tl.store(c + state + own, c_own, present & unit)


@triton.jit(do_not_specialize=VARYING)
def scan_backward(
    y,  # [N, D*H]
    gates,  # [D, N, S*H], or None where the cell saves none
    cells,  # float32 [D, N, H], LSTM only, or None
    w,  # [D, G*H, H] W_hh
    peephole,  # float32 [D, 3*H] or None
    h0,  # [D, B, H]
    c0,  # float32 [D, B, H], LSTM only, or None
    grad_y,  # [N, D*H] or None
    grad_cells,  # [D, N, H] gradient of each step's c, or None
    offsets,  # as forward, and so are the next nine
    lengths,
    resets,
    reset_h,
    reset_c,
    h_factor,
    kept_h,
    kept_c,
    part_h,
    part_c,
    grad_gates,  # [D, N, Q*H] out
    grad_h,  # float32 [D, B, H] in: of the last state; out: of the state before step s0+1
    grad_c,  # float32 [D, B, H] the same of LSTM's c, or None
    grad_reset_h,  # float32 [D, B, H] added to, or None
    grad_reset_c,  # float32 [D, B, H] added to, or None
    counters,  # int32 [D * batch tiles] zeros, or None
    s0,  # -1 for the whole scan: the initial state is what "step -1" ends with
    s1,
    T,
    B,
    N,
    tile0,
    H: tl.constexpr,  # a layer has one, and offsets become immediate
    CELL: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    COLUMNS: tl.constexpr,  # gates side by side in memory: Q, and S where anything is saved
    RESET_BEFORE: tl.constexpr,
    HALF: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    EXCHANGE: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROTATE: tl.constexpr,  # gate g of the hidden side is gate (g + ROTATE) % G of W_hh
    PRECISION: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Steps s1-1 down to s0. Each turns what reaches the state after step s, through the gates of
    step s+1 and directly, into the gradients of the gates of step s."""
    dtype: tl.constexpr = grad_gates.dtype.element_ty
    PRODUCTS: tl.constexpr = 2 if RESET_BEFORE else 1  # in a step, one after the other
    FIRST: tl.constexpr = 2 if RESET_BEFORE else G  # gates of W_hh in the first of them
    direction = tl.program_id(2)
    sign = 1 - 2 * direction
    side = tl.cast(direction, tl.int64)
    # Within a tile offsets have 32 bits; what they are added to is one number with 64.
    inner = tl.arange(0, BLOCK_B)[:, None]
    b0 = tl.cast(tl.program_id(0) + tile0, tl.int64) * BLOCK_B
    b = tl.cast(b0, tl.int32) + inner
    u = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    k = tl.arange(0, BLOCK_K)
    present = b < B
    unit = u < H
    y += b0 * (D * H) + direction * H
    w += side * (G * H) * H
    grad_gates += (side * N + b0) * (Q * H)
    state = (side * B + b0) * H
    own = inner * H + u
    if counters is not None:
        counters += direction * tl.num_programs(0) + tl.program_id(0)
    length = None
    if lengths is not None:
        length = tl.load(lengths + b, present, 0)
    j = (tl.program_id(1) * (BLOCK_H * COLUMNS) + tl.arange(0, BLOCK_H * COLUMNS))[None, :]
    unit_j = j // COLUMNS
    # Where S is not zero it is Q.
    p_gate = inner * (Q * H) + (j % COLUMNS * H + unit_j)
    if RESIDENT:
        slices = ()
        for g in tl.static_range(FIRST):
            for i in tl.static_range(CHUNKS):
                k_w = (i * BLOCK_K + k)[:, None]
                w_rows = tl.cast((g + ROTATE) % G * H, tl.int64) + k_w
                slices = slices + (tl.load(w + w_rows * H + u, unit & (k_w < H), 0.0),)
    if RESET_BEFORE:
        p_wn = w + (tl.cast(2 * H, tl.int64) * H + u)
        slices_n = ()
        if RESIDENT:
            for i in tl.static_range(CHUNKS):
                k_w = (i * BLOCK_K + k)[:, None]
                slices_n = slices_n + (tl.load(p_wn + k_w * H, unit & (k_w < H), 0.0),)
    zero = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    peep = None
    if peephole is not None:
        peep = peepholes_of(peephole, direction, u, unit, H)
    dh_own = tl.load(grad_h + state + own, present & unit, 0.0)
    dc_own = zero
    if grad_c is not None:
        dc_own = tl.load(grad_c + state + own, present & unit, 0.0)
    reset_dh = zero
    reset_dc = zero
    if h_factor is not None:
        factor_own = tl.load(h_factor + state + own, present & unit, 0.0)

    t = direction * (T - 1) + sign * (s1 - 1)
    row_after, taken_after = place(t + sign, b, length, offsets, T, B)
    row, taken = place(t, b, length, offsets, T, B)
    if EXCHANGE == "registers":
        d = ()
        for g in tl.static_range(FIRST):
            p_d = grad_gates + row_after * (Q * H) + (inner * (Q * H) + g * H + u)
            d = d + (tl.load(p_d, taken_after & unit, 0.0),)
    for done in range(0, s1 - s0):
        t = direction * (T - 1) + sign * (s1 - 1 - done)
        on = taken & unit
        row_before, taken_before = place(t - sign, b, length, offsets, T, B)
        restart = None
        if resets is not None:
            restart = restarts(t, b, taken_before, direction, resets, T, B) & taken
            restart_after = restarts(t + sign, b, taken, direction, resets, T, B) & taken_after
        # What was saved is asked for before the wait.
        if gates is not None:
            p_gates = gates + (side * N + b0 + row) * (S * H)
            saved = tl.load(p_gates + p_gate, taken & (unit_j < H), 0.0)
            if RESET_BEFORE:
                saved_n = tl.load(p_gates + (inner * (S * H) + (2 * H + u)), on, 0.0)
        p_y = y + row * (D * H) + (inner * (D * H) + u)
        h_after = zero
        h_before = zero
        if S == 0:
            h_after = widen(tl.load(p_y, on, 0.0), SOFT)
        if Q > G or RESET_BEFORE:
            p_before = y + row_before * (D * H) + (inner * (D * H) + u)
            p_fresh_h = None
            if reset_h is not None:
                p_fresh_h = reset_h + state + own
            h_before = load_before(
                p_before, h0 + state + own, p_fresh_h, unit, taken_before & taken, restart, taken
            )
            h_before = widen(h_before, SOFT)
        c_after = zero
        c_before = zero
        if cells is not None:
            p_cells = cells + (side * N + b0) * H
            c_after = tl.load(p_cells + row * H + own, on, 0.0)
            p_fresh_c = None
            if reset_c is not None:
                p_fresh_c = reset_c + state + own
            c_before = load_before(
                p_cells + row_before * H + own, c0 + state + own, p_fresh_c, unit,
                taken_before & taken, restart, taken,
            )  # fmt: skip
        dy = zero
        if grad_y is not None:
            p_dy = grad_y + (b0 + row) * (D * H) + (inner * (D * H) + direction * H + u)
            dy += widen(tl.load(p_dy, on, 0.0), SOFT)
        if grad_cells is not None:
            p_dc = grad_cells + (side * N + b0 + row) * H + own
            dc_here = widen(tl.load(p_dc, on, 0.0), SOFT)

        if HALF != "second":
            through = zero
            if EXCHANGE == "registers":
                for g in tl.static_range(FIRST):
                    through = product(d[g], slices[g], through, PRECISION, SOFT)
            else:
                p_d = grad_gates + row_after * (Q * H) + inner * (Q * H)
                if EXCHANGE == "grid":
                    wait_for(counters, done * (TILES * PRODUCTS))
                if RESIDENT:
                    parts = ()
                    for g in tl.static_range(FIRST):
                        for i in tl.static_range(CHUNKS):
                            k_d = (i * BLOCK_K + k)[None, :]
                            known_d = taken_after & (k_d < H)
                            part = tl.load(p_d + g * H + k_d, known_d, 0.0, cache_modifier=".cg")
                            parts = parts + (part,)
                    for i in tl.static_range(FIRST * CHUNKS):
                        through = product(parts[i], slices[i], through, PRECISION, SOFT)
                else:
                    for g in tl.static_range(FIRST):
                        for k0 in range(0, H, BLOCK_K):
                            k_d = (k0 + k)[None, :]
                            k_w = (k0 + k)[:, None]
                            known_d = taken_after & (k_d < H)
                            part = tl.load(p_d + g * H + k_d, known_d, 0.0, cache_modifier=".cg")
                            w_rows = tl.cast((g + ROTATE) % G * H, tl.int64) + k_w
                            w_part = tl.load(w + w_rows * H + u, unit & (k_w < H), 0.0)
                            through = product(part, w_part, through, PRECISION, SOFT)
            if h_factor is not None:
                through *= factor_own
            # Added afterwards: as the start of the sum it would cost exactness.
            dh_own = through + dh_own
            if resets is not None:
                reset_dh += tl.where(restart_after, dh_own, 0.0)
                dh_own = tl.where(restart_after, 0.0, dh_own)
                reset_dc += tl.where(restart_after, dc_own, 0.0)
                dc_own = tl.where(restart_after, 0.0, dc_own)

        dc = dc_own
        if grad_cells is not None:
            dc = dc_own + dc_here
        kept = (zero,)
        if gates is not None:
            kept = apart(widen(saved, SOFT), BLOCK_B, BLOCK_H, COLUMNS)
            if RESET_BEFORE:
                kept = (kept[0], kept[1], widen(saved_n, SOFT))
        dh = dh_own + dy
        # What zoneout leads past the step, "past_", does not go through it.
        p_kept = (side * N + b0 + row) * H + own
        if kept_h is not None:
            past_h = zoned_out(dh, zero, kept_h + p_kept, part_h, on)
            dh -= past_h
        if part_h is not None:
            past_h = part_h * dh
            dh -= past_h
        if kept_c is not None:
            past_c = zoned_out(dc, zero, kept_c + p_kept, part_c, on)
            dc -= past_c
            c_after = kept[1] * c_before + kept[0] * kept[2]  # what the step itself gave
        if part_c is not None:
            past_c = part_c * dc
            dc -= past_c
            c_after = kept[1] * c_before + kept[0] * kept[2]
        d_new, dh_before, dc_before = CELL(kept, h_before, h_after, c_before, c_after, dh, dc, peep)
        if kept_h is not None:
            dh_before += past_h
        if part_h is not None:
            dh_before += past_h
        if kept_c is not None:
            dc_before += past_c
        if part_c is not None:
            dc_before += past_c
        p_d_row = grad_gates + row * (Q * H)
        at = tl.where(present, t, -1)
        there = (at >= 0) & (at < T)  # rows past their length are, and have no gradient
        if RESET_BEFORE:
            written = taken & unit
            if lengths is not None:
                written = there & unit
            p_d_own = p_d_row + (inner * (Q * H) + u)
            if HALF != "second":
                d_n = narrow(tl.where(on, d_new[2], 0.0), dtype, SOFT)
                d_z = narrow(tl.where(on, d_new[1], 0.0), dtype, SOFT)
                tl.store(p_d_own + 2 * H, d_n, written)
                publish(counters, EXCHANGE)
                tl.store(p_d_own + H, d_z, written)
                dh_own = tl.where(on, dh_before, dh_own)
            if HALF != "first":
                # The gradient of r * h.
                if EXCHANGE == "registers":
                    d_gated = product(d_n, slices_n[0], zero, PRECISION, SOFT)
                else:
                    if EXCHANGE == "grid":
                        wait_for(counters, (done * PRODUCTS + 1) * TILES)
                    d_gated = times_rows(
                        p_d_row + (inner * (Q * H) + 2 * H), taken, p_wn, H, unit, slices_n, H,
                        BLOCK_B, BLOCK_H, BLOCK_K, CHUNKS, RESIDENT, PRECISION, SOFT,
                    )  # fmt: skip
                if h_factor is not None:
                    d_gated *= factor_own
                d_r = narrow(tl.where(on, d_new[0] * d_gated, 0.0), dtype, SOFT)
                tl.store(p_d_own, d_r, written)
                publish(counters, EXCHANGE)
                dh_own = tl.where(on, dh_own + d_gated * kept[0], dh_own)
                if EXCHANGE == "registers":
                    d = (d_r, d_z)
        else:
            d_out = together(d_new, BLOCK_B, BLOCK_H, COLUMNS)
            written = taken & (unit_j < H)
            if lengths is not None:
                written = there & (unit_j < H)
                d_out = tl.where(taken, d_out, 0.0)
            tl.store(p_d_row + p_gate, narrow(d_out, dtype, SOFT), written)
            publish(counters, EXCHANGE)
            if EXCHANGE == "registers":
                d = ()
                for g in tl.static_range(G):
                    d = d + (narrow(tl.where(on, d_new[g], 0.0), dtype, SOFT),)
            dh_own = tl.where(on, dh_before, dh_own)
        dc_own = tl.where(on, dc_before, dc_own)
        row_after, taken_after = row, taken
        row, taken = row_before, taken_before
    tl.store(grad_h + state + own, dh_own, present & unit)
    if grad_c is not None:
        tl.store(grad_c + state + own, dc_own, present & unit)
    if grad_reset_h is not None and HALF != "second":
        p_reset = grad_reset_h + state + own
        tl.store(p_reset, tl.load(p_reset, present & unit, 0.0) + reset_dh, present & unit)
    if grad_reset_c is not None and HALF != "second":
        p_reset = grad_reset_c + state + own
        tl.store(p_reset, tl.load(p_reset, present & unit, 0.0) + reset_dc, present & unit)
