"""One step of a layer that normalises, forward and backward: what comes between two products.

A normalisation needs all units of a row, so a program owns a row of one direction with all of them,
and the products of a step are torch's, each a launch of its own. A step is

    forward    sums = operand W_hh^T,    then this kernel: normalises them, gates, c, h, operand
    backward   this kernel: from the gradient of h to that of `sums`,    then times W_hh

Step s is timestep s, or T-1-s in the second direction. A GRU that resets before the product has two
products in a step, and both kernels two halves: "gates" is about r and z, "candidate" about n. The
first of them makes r * h of h, and backward d_r of the gradient of r * h, so it comes last there.

The input side, normalised, comes in `gx` for the whole sequence. Everything is float32; row offsets
have 64 bits. Arguments that may be None leave no code behind.

Shapes: D directions, N rows, T timesteps, B batch, H hidden_size, G gates; S = saved_gates and
Q = grad_gates of the cell.
"""

import triton
import triton.language as tl

from .cells import (
    gru_backward,
    gru_forward,
    gru_reset_before_backward,
    gru_reset_before_forward,
    lstm_forward,
    lstm_gates_backward,
    lstm_past_backward,
    sigmoid,
    tanh,
)
from .tiles import load_before, peepholes_of, place, restarts, zoned_out

# Sizes that change from batch to batch or from step to step: no kernel is compiled anew for one.
VARYING = ["s", "T", "B", "N"]
UNALIGNED = ["scales"]  # behind as many rows as there are


@triton.jit
def normalised(values, unit, GATES: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr):
    """The tiles of so many gates with mean 0 and variance 1 over all of them, and the factor that
    made the variance so. Zero where there is no unit."""
    COUNT: tl.constexpr = GATES * H
    total = values[0]
    for i in tl.static_range(1, GATES):
        total += values[i]
    mean = tl.sum(total, 1)[:, None] / COUNT
    squares = tl.zeros_like(total)
    centred = ()
    for i in tl.static_range(GATES):
        deviation = tl.where(unit, values[i] - mean, 0.0)
        squares += deviation * deviation
        centred = centred + (deviation,)
    scale = 1.0 / tl.sqrt(tl.sum(squares, 1)[:, None] / COUNT + EPS)
    results = ()
    for i in tl.static_range(GATES):
        results = results + (centred[i] * scale,)
    return results, scale


@triton.jit
def normalised_backward(grads, gains, normed, scale, GATES: tl.constexpr, H: tl.constexpr):
    """The gradients of what `normalised` made `normed` of, and `gains` then multiplied."""
    COUNT: tl.constexpr = GATES * H
    total = grads[0] * gains[0]
    shared = total * normed[0]
    for i in tl.static_range(1, GATES):
        total += grads[i] * gains[i]
        shared += grads[i] * gains[i] * normed[i]
    mean = tl.sum(total, 1)[:, None] / COUNT
    part = tl.sum(shared, 1)[:, None] / COUNT
    results = ()
    for i in tl.static_range(GATES):
        results = results + (scale * (grads[i] * gains[i] - mean - normed[i] * part),)
    return results


@triton.jit
def load_gates(p, inside, FIRST: tl.constexpr, GATES: tl.constexpr, H: tl.constexpr):
    """The tiles of GATES gates from FIRST on, of a row at p."""
    tiles = ()
    for g in tl.static_range(GATES):
        tiles = tiles + (tl.load(p + (FIRST + g) * H, inside, 0.0),)
    return tiles


@triton.jit
def store_gates(
    p, tiles, written, there, FIRST: tl.constexpr, GATES: tl.constexpr, H: tl.constexpr
):
    """The inverse of `load_gates`; zeros where a row is `written` but not `there`."""
    for g in tl.static_range(GATES):
        tl.store(p + (FIRST + g) * H, tl.where(there, tiles[g], 0.0), written)


@triton.jit
def hidden_side(
    sums,  # a row of W_hh h, of the gates from FIRST on
    gains,  # [G*H] of the direction
    bias,  # [G*H] or None
    normed,  # where the row's normalised gates [G*H] are kept, or None
    scale,  # where the group's factor is kept, or None
    u,
    unit,
    taken,
    written,
    EPS: tl.constexpr,
    FIRST: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
):
    """The gates FIRST to FIRST + GATES, which are normalised together."""
    values, factor = normalised(load_gates(sums + u, unit, 0, GATES, H), unit, GATES, H, EPS)
    if normed is not None:
        store_gates(normed + u, values, written, taken & unit, FIRST, GATES, H)
        tl.store(scale, factor, taken)
    results = ()
    for g in tl.static_range(GATES):
        value = values[g] * tl.load(gains + (FIRST + g) * H + u, unit, 0.0)
        if bias is not None:
            value += tl.load(bias + (FIRST + g) * H + u, unit, 0.0)
        results = results + (value,)
    return results


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def normed_forward(
    gx,  # [D, N, G*H] input side of the gates, normalised, with gains and biases
    sums,  # [D, B, ...] W_hh h: of all gates, or of those of the half
    gains,  # [D, G*H] of W_hh h
    bias,  # [D, G*H] b_hh, or None
    gains_c,  # [D, H] LSTM's of c, or None
    bias_c,  # [D, H] or None
    peephole,  # [D, 3*H] LSTM's, from c to i, f and o, or None
    offsets,  # int64 [T+1] where the rows of each timestep begin, when packed, or None
    lengths,  # int64 [B] or None
    resets,  # uint8 [T, B] or None
    reset_h,  # [D, B, H] or None
    reset_c,  # [D, B, H] or None
    h_factor,  # [D, B, H] what h is multiplied by before W_hh, or None
    kept_h,  # uint8 [D, N, H] where a step leaves h as it was, or None
    kept_c,  # uint8 [D, N, H] the same of LSTM's c, or None
    part_h,  # without kept_h: which part of h a step leaves, or None
    part_c,
    y,  # [N, D*H] out
    h,  # [D, B, H] the state, in and out
    c,  # [D, B, H] the same of LSTM's c, or None
    operand,  # [D, B, H] out: what the next product takes
    z_state,  # [D, B, H] scratch: z between the halves of a step, or None
    gates,  # [D, N, S*H] out, or None, and with it the next three
    normed_hh,  # [D, N, G*H] out
    normed_c,  # [D, N, H] out, LSTM only
    scales,  # [D, N, 5] out: of W_ih x (two groups), of W_hh h, of c
    cells,  # [D, N, H] out, or None
    s,
    T,
    B,
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    HALF: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    direction = tl.program_id(1)
    sign = 1 - 2 * direction
    side = tl.cast(direction, tl.int64)
    b = tl.program_id(0) + tl.arange(0, 1)[:, None]
    u = tl.arange(0, BLOCK_H)[None, :]
    unit = u < H
    present = b < B
    width: tl.constexpr = G * H if HALF == "" else 2 * H if HALF == "gates" else H
    state = (side * B + b) * H + u
    length = None
    if lengths is not None:
        length = tl.load(lengths + b, present, 0)
    t = direction * (T - 1) + sign * s
    first_row, taken = place(t, b, length, offsets, T, B)
    written = taken & unit
    if lengths is not None:  # rows past their length are zero
        written = present & unit
    row = first_row + b
    on = taken & unit
    at = side * N + row
    gains += direction * (G * H)
    if bias is not None:
        bias += direction * (G * H)
    p_x = gx + at * (G * H) + u
    p_sums = sums + (side * B + b) * width
    p_normed = None
    p_scale = None
    if gates is not None:
        gates += at * (S * H) + u
        p_normed = normed_hh + at * (G * H)
        p_scale = scales + at * 5 + 2
    h_own = tl.load(h + state, present & unit, 0.0)

    if HALF == "gates":
        from_h = hidden_side(
            p_sums, gains, bias, p_normed, p_scale, u, unit, taken, written, EPS, 0, 2, H
        )
        x = load_gates(p_x, on, 0, 2, H)
        r = sigmoid(x[0] + from_h[0])
        z = sigmoid(x[1] + from_h[1])
        gated = r * h_own
        if h_factor is not None:
            gated *= tl.load(h_factor + state, present & unit, 0.0)
        tl.store(operand + state, gated, present & unit)
        tl.store(z_state + state, z, present & unit)
        if gates is not None:
            store_gates(gates, (r, z), written, on, 0, 2, H)
    else:
        c_own = h_own
        if G == 4:  # LSTM
            from_h = hidden_side(
                p_sums, gains, bias, p_normed, p_scale, u, unit, taken, written, EPS, 0, 4, H
            )
            x = load_gates(p_x, on, 0, 4, H)
            c_own = tl.load(c + state, present & unit, 0.0)
            peep = None
            if peephole is not None:
                peep = peepholes_of(peephole, direction, u, unit, H)
            pre = (x[0] + from_h[0], x[1] + from_h[1], x[2] + from_h[2], x[3] + from_h[3])
            _, c_new, saved = lstm_forward(pre, h_own, c_own, peep)
            seen, factor = normalised((c_new,), unit, 1, H, EPS)
            if gates is not None:
                store_gates(gates, saved, written, on, 0, 4, H)
                store_gates(normed_c + at * H + u, seen, written, on, 0, 1, H)
                tl.store(p_scale + 2, factor, taken)
            c_seen = seen[0] * tl.load(gains_c + direction * H + u, unit, 0.0)
            if bias_c is not None:
                c_seen += tl.load(bias_c + direction * H + u, unit, 0.0)
            h_new = saved[3] * tanh(c_seen)
        else:
            if HALF == "candidate":
                z = tl.load(z_state + state, present & unit, 0.0)
            else:
                both = hidden_side(
                    p_sums, gains, bias, p_normed, p_scale, u, unit, taken, written, EPS, 0, 2, H
                )
                p_sums += 2 * H
            if gates is not None:
                p_scale += 1
            from_h = hidden_side(
                p_sums, gains, bias, p_normed, p_scale, u, unit, taken, written, EPS, 2, 1, H
            )
            x = load_gates(p_x, on, 0, 3, H)
            if HALF == "candidate":
                pre = (z, z, x[2] + from_h[0])  # r is in what W_hh has multiplied
                h_new, c_new, saved = gru_reset_before_forward(pre, h_own, c_own, None)
                if gates is not None:
                    store_gates(gates, (saved[2],), written, on, 2, 1, H)
            else:
                pre = (from_h[0], x[0] + both[0], x[1] + both[1], x[2])
                h_new, c_new, saved = gru_forward(pre, h_own, c_own, None)
                if gates is not None:
                    store_gates(gates, saved, written, on, 0, 4, H)
        p_kept = at * H + u
        if kept_h is not None:
            h_new = zoned_out(h_own, h_new, kept_h + p_kept, part_h, on)
        if part_h is not None:
            h_new = zoned_out(h_own, h_new, None, part_h, on)
        tl.store(y + row * (D * H) + (direction * H + u), tl.where(on, h_new, 0.0), written)
        h_own = tl.where(on, h_new, h_own)
        if c is not None:
            if kept_c is not None:
                c_new = zoned_out(c_own, c_new, kept_c + p_kept, part_c, on)
            if part_c is not None:
                c_new = zoned_out(c_own, c_new, None, part_c, on)
            if cells is not None:
                tl.store(cells + p_kept, tl.where(on, c_new, 0.0), written)
            c_own = tl.where(on, c_new, c_own)
        if resets is not None:  # before the next step
            _, taken_next = place(t + sign, b, length, offsets, T, B)
            restart = restarts(t + sign, b, taken, direction, resets, T, B) & taken_next
            fresh = tl.zeros_like(h_own)
            if reset_h is not None:
                fresh += tl.load(reset_h + state, restart & unit, 0.0)
            h_own = tl.where(restart, fresh, h_own)
            if c is not None:
                fresh = tl.zeros_like(h_own)
                if reset_c is not None:
                    fresh += tl.load(reset_c + state, restart & unit, 0.0)
                c_own = tl.where(restart, fresh, c_own)
        tl.store(h + state, h_own, present & unit)
        if c is not None:
            tl.store(c + state, c_own, present & unit)
        if h_factor is not None:
            h_own *= tl.load(h_factor + state, present & unit, 0.0)
        tl.store(operand + state, h_own, present & unit)


@triton.jit
def hidden_side_backward(
    grads,  # of the gates FIRST to FIRST + GATES
    gains,  # [G*H] of the direction
    normed,  # the row's normalised gates [G*H]
    scale,  # the group's factor
    out,  # where the gradient of the row's products [G*H] is kept
    carried,  # and of the step's, of the gates from FIRST on
    u,
    unit,
    taken,
    written,
    present,
    FIRST: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
):
    on = taken & unit
    factor = tl.load(scale, taken, 0.0)
    values = load_gates(normed + u, on, FIRST, GATES, H)
    d = normalised_backward(
        grads, load_gates(gains + u, unit, FIRST, GATES, H), values, factor, GATES, H
    )
    store_gates(out + u, d, written, on, FIRST, GATES, H)
    store_gates(carried + u, d, present & unit, on, 0, GATES, H)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def normed_backward(
    y,  # [N, D*H]
    gates,  # [D, N, S*H]
    normed_hh,  # [D, N, G*H]
    normed_c,  # [D, N, H], LSTM only, or None
    scales,  # [D, N, 5]
    cells,  # [D, N, H], LSTM only, or None
    gains,  # [D, G*H]
    gains_c,  # [D, H], LSTM only, or None
    bias_c,  # [D, H] or None
    peephole,  # [D, 3*H] or None
    h0,  # [D, B, H]
    c0,  # [D, B, H], LSTM only, or None
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
    grad_sums,  # [D, N, Q*H] out: of what the gates add up
    grad_products,  # [D, N, G*H] out: of W_hh h
    grad_seen,  # [D, N, H] out: of the normalised c, LSTM only, or None
    carried,  # [D, B, ...] out: of the step's W_hh h, of all gates or those of the half
    product,  # [D, B, H] the last `carried` times W_hh
    grad_h,  # [D, B, H] in and out: what reaches h past the products
    grad_c,  # [D, B, H] the same of LSTM's c, or None
    grad_reset_h,  # [D, B, H] added to, or None
    grad_reset_c,  # [D, B, H] added to, or None
    s,
    T,
    B,
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    direction = tl.program_id(1)
    sign = 1 - 2 * direction
    side = tl.cast(direction, tl.int64)
    b = tl.program_id(0) + tl.arange(0, 1)[:, None]
    u = tl.arange(0, BLOCK_H)[None, :]
    unit = u < H
    present = b < B
    width: tl.constexpr = G * H if HALF == "" else H if HALF == "candidate" else 2 * H
    state = (side * B + b) * H + u
    length = None
    if lengths is not None:
        length = tl.load(lengths + b, present, 0)
    t = direction * (T - 1) + sign * s
    first_row, taken = place(t, b, length, offsets, T, B)
    row_before, taken_before = place(t - sign, b, length, offsets, T, B)
    written = taken & unit
    if lengths is not None:  # rows past their length are, and have no gradient
        written = present & unit
    row = first_row + b
    row_before += b
    on = taken & unit
    at = side * N + row
    restart = None
    if resets is not None:
        restart = restarts(t, b, taken_before, direction, resets, T, B) & taken
    gains += direction * (G * H)
    gates += at * (S * H) + u
    grad_sums += at * (Q * H) + u
    p_normed = normed_hh + at * (G * H)
    p_scale = scales + at * 5 + 2
    p_products = grad_products + at * (G * H)
    p_carried = carried + (side * B + b) * width
    dh_own = tl.load(grad_h + state, present & unit, 0.0)
    through = tl.load(product + state, present & unit, 0.0)
    if h_factor is not None:
        through *= tl.load(h_factor + state, present & unit, 0.0)
    h_before = dh_own
    if G < 4:
        p_fresh = None
        if reset_h is not None:
            p_fresh = reset_h + state
        h_before = load_before(
            y + row_before * (D * H) + (direction * H + u), h0 + state, p_fresh, unit,
            taken_before & taken, restart, taken,
        )  # fmt: skip

    if HALF == "gates":  # `through` is the gradient of r * h
        r = tl.load(gates, on, 0.0)
        per_gated, _, _ = gru_reset_before_backward(
            (r, r, r), h_before, r, r, r, dh_own, dh_own, None
        )
        d_r = through * per_gated[0]
        tl.store(grad_sums, tl.where(on, d_r, 0.0), written)
        d_z = tl.load(grad_sums + H, on, 0.0)
        hidden_side_backward(
            (d_r, d_z), gains, p_normed, p_scale, p_products, p_carried, u, unit, taken, written,
            present, 0, 2, H,
        )  # fmt: skip
        tl.store(grad_h + state, tl.where(on, dh_own + through * r, dh_own), present & unit)
    else:
        dh_own += through
        dc_own = dh_own
        if grad_c is not None:
            dc_own = tl.load(grad_c + state, present & unit, 0.0)
        if resets is not None:
            _, taken_after = place(t + sign, b, length, offsets, T, B)
            fresh = restarts(t + sign, b, taken, direction, resets, T, B) & taken_after
            if grad_reset_h is not None:
                p_reset = grad_reset_h + state
                tl.store(p_reset, tl.load(p_reset, fresh & unit, 0.0) + dh_own, fresh & unit)
            if grad_reset_c is not None:
                p_reset = grad_reset_c + state
                tl.store(p_reset, tl.load(p_reset, fresh & unit, 0.0) + dc_own, fresh & unit)
            dh_own = tl.where(fresh, 0.0, dh_own)
            dc_own = tl.where(fresh, 0.0, dc_own)
        dh = dh_own
        if grad_y is not None:
            dh += tl.load(grad_y + row * (D * H) + (direction * H + u), on, 0.0)
        # What zoneout leads past the step, "past_", does not go through it.
        past_h = tl.zeros_like(dh)
        p_kept = at * H + u
        if kept_h is not None:
            past_h = zoned_out(dh, past_h, kept_h + p_kept, part_h, on)
        if part_h is not None:
            past_h = part_h * dh
        dh -= past_h
        if G == 4:
            kept = load_gates(gates, on, 0, 4, H)
            p_fresh = None
            if reset_c is not None:
                p_fresh = reset_c + state
            c_before = load_before(
                cells + (side * N + row_before) * H + u, c0 + state, p_fresh, unit,
                taken_before & taken, restart, taken,
            )  # fmt: skip
            seen = tl.load(normed_c + p_kept, on, 0.0)
            gain_c = tl.load(gains_c + direction * H + u, unit, 0.0)
            c_seen = seen * gain_c
            if bias_c is not None:
                c_seen += tl.load(bias_c + direction * H + u, unit, 0.0)
            o, tanh_c = kept[3], tanh(c_seen)
            dh = tl.where(on, dh, 0.0)
            d_o = dh * tanh_c * o * (1.0 - o)
            d_seen = dh * o * (1.0 - tanh_c * tanh_c)
            tl.store(grad_seen + p_kept, d_seen, written)
            factor = tl.load(p_scale + 2, taken, 0.0)
            dc_new = normalised_backward((d_seen,), (gain_c,), (seen,), factor, 1, H)[0]
            dc = dc_own
            if grad_cells is not None:
                dc += tl.load(grad_cells + p_kept, on, 0.0)
            past_c = tl.zeros_like(dc)
            if kept_c is not None:
                past_c = zoned_out(dc, past_c, kept_c + p_kept, part_c, on)
            if part_c is not None:
                past_c = part_c * dc
            dc_new += dc - past_c
            peep = None
            if peephole is not None:
                peep = peepholes_of(peephole, direction, u, unit, H)
                dc_new += d_o * peep[2]
            of_c = lstm_gates_backward(kept, c_before, dc_new)
            dc_before = lstm_past_backward(kept, of_c, dc_new, peep) + past_c
            d = (of_c[0], of_c[1], of_c[2], d_o)
            store_gates(grad_sums, d, written, on, 0, 4, H)
            hidden_side_backward(
                d, gains, p_normed, p_scale, p_products, p_carried, u, unit, taken, written,
                present, 0, 4, H,
            )  # fmt: skip
            dh_before = past_h
            tl.store(grad_c + state, tl.where(on, dc_before, dc_own), present & unit)
        elif HALF == "candidate":
            kept = load_gates(gates, on, 0, 3, H)
            zero = tl.zeros_like(dh)
            d, dh_before, _ = gru_reset_before_backward(
                kept, h_before, zero, zero, zero, tl.where(on, dh, 0.0), zero, None
            )
            store_gates(grad_sums, (d[1], d[2]), written, on, 1, 2, H)
            hidden_side_backward(
                (d[2],), gains, p_normed, p_scale + 1, p_products, p_carried, u, unit, taken,
                written, present, 2, 1, H,
            )  # fmt: skip
            dh_before += past_h
        else:
            kept = load_gates(gates, on, 0, 4, H)
            zero = tl.zeros_like(dh)
            d, dh_before, _ = gru_backward(
                kept, h_before, zero, zero, zero, tl.where(on, dh, 0.0), zero, None
            )
            store_gates(grad_sums, d, written, on, 0, 4, H)
            hidden_side_backward(
                (d[1], d[2]), gains, p_normed, p_scale, p_products, p_carried, u, unit, taken,
                written, present, 0, 2, H,
            )  # fmt: skip
            hidden_side_backward(
                (d[0],), gains, p_normed, p_scale + 1, p_products, p_carried + 2 * H, u, unit,
                taken, written, present, 2, 1, H,
            )  # fmt: skip
            dh_before += past_h
        tl.store(grad_h + state, tl.where(on, dh_before, dh_own), present & unit)
