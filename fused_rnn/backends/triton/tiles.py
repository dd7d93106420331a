"""What the kernels in `scan.py` do with one tile: numbers, products, rows in memory, waiting."""

import triton
import triton.language as tl


@triton.jit
def narrow(x, dtype: tl.constexpr, SOFT: tl.constexpr):
    """Rounds float32 to `dtype`, to nearest even."""
    if SOFT == "bf16":  # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def widen(x, SOFT: tl.constexpr):
    # The same numbers as by the interpreter's own conversion, in a tenth of its time.
    if SOFT == "bf16" and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, SOFT: tl.constexpr):
    if SOFT == "bf16":  # the interpreter would multiply the bits as integers
        a = widen(a, SOFT)
        b = widen(b, SOFT)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def times_rows(
    p_a,  # [BLOCK_B, 1] where the rows of a [BLOCK_B, K] begin
    present,  # bool [BLOCK_B, 1] which of them there are, the others are zero
    p_w,  # [1, BLOCK_H] where the columns of w [K, BLOCK_H] begin
    stride_w,  # from one row of w to the next
    known,  # bool [1, BLOCK_H] which columns there are
    slices,  # w in tiles of BLOCK_K rows, where it is RESIDENT
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFT: tl.constexpr,
):
    """a w, float32 [BLOCK_B, BLOCK_H], of an a that other programs may have written just now."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if RESIDENT:
        parts = ()
        for i in tl.static_range(CHUNKS):
            k_a = (i * BLOCK_K + k)[None, :]
            part = tl.load(p_a + k_a, present & (k_a < K), 0.0, cache_modifier=".cg")
            parts = parts + (part,)
        for i in tl.static_range(CHUNKS):
            total = product(parts[i], slices[i], total, PRECISION, SOFT)
    else:
        for k0 in range(0, K, BLOCK_K):
            k_a = (k0 + k)[None, :]
            k_w = (k0 + k)[:, None]
            part = tl.load(p_a + k_a, present & (k_a < K), 0.0, cache_modifier=".cg")
            w_part = tl.load(p_w + tl.cast(k_w, tl.int64) * stride_w, known & (k_w < K), 0.0)
            total = product(part, w_part, total, PRECISION, SOFT)
    return total


@triton.jit
def place(t, b, length, offsets, T, B):
    """The first row of timestep t, int64, and whether each batch row takes the step."""
    # A tile of its own: the interpreter cannot combine a scalar condition with one of rows.
    at = tl.where(b < B, t, -1)
    taken = (at >= 0) & (at < T)
    if offsets is not None:
        known = tl.minimum(tl.maximum(t, 0), T - 1)
        first = tl.load(offsets + known)
        taken = taken & (b < tl.load(offsets + known + 1) - first)
    else:
        first = tl.cast(t, tl.int64) * B
    if length is not None:
        taken = taken & (t < length)
    return first, taken


@triton.jit
def restarts(t, b, taken_before, direction, resets, T, B):
    """Whether the state before step t is replaced, [BLOCK_B, 1]. In the second direction a row
    comes from timestep t+1, and a reset there separates the two."""
    at = tl.where(b < B, t + direction, -1)
    flag = tl.load(resets + tl.cast(at, tl.int64) * B + b, (at >= 0) & (at < T), 0)
    return (flag != 0) & (taken_before | (tl.zeros_like(b) + direction == 0))


@triton.jit
def apart(tile, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, COLUMNS: tl.constexpr):
    """The tiles [BLOCK_B, BLOCK_H] of each gate from one with a unit's gates side by side."""
    if COLUMNS == 4:
        even, odd = tl.split(tl.reshape(tile, (BLOCK_B, BLOCK_H, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth
    elif COLUMNS == 2:
        return tl.split(tl.reshape(tile, (BLOCK_B, BLOCK_H, 2)))
    else:
        return (tile,)


@triton.jit
def together(tiles, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `apart`."""
    if COLUMNS == 4:
        even, odd = tl.join(tiles[0], tiles[2]), tl.join(tiles[1], tiles[3])
        return tl.reshape(tl.join(even, odd), (BLOCK_B, BLOCK_H * 4))
    elif COLUMNS == 2:
        return tl.reshape(tl.join(tiles[0], tiles[1]), (BLOCK_B, BLOCK_H * 2))
    else:
        return tiles[0]


@triton.jit
def load_before(before, initial, fresh, inside, taken_before, restart, present):
    """What rows start a step from: at `before` the state after their step before, at `initial` the
    initial one, or after a restart that at `fresh`; the last two may be None.

    Loads of three places, all but one masked: to choose among pointers, AMD's compiler of Triton
    3.7 has no way.
    """
    old = taken_before
    new = present & (taken_before == 0)
    if restart is not None:
        old = old & (restart == 0)
        new = new & (restart == 0)
    value = tl.load(before, old & inside, 0.0, cache_modifier=".cg")
    value = tl.where(new, tl.load(initial, new & inside, 0.0), value)
    if fresh is not None:
        value = tl.where(restart, tl.load(fresh, restart & inside, 0.0), value)
    return value


@triton.jit
def scaled(value, factor, inside, SOFT: tl.constexpr):
    """`value` times what lies at `factor`, rounded to its own type."""
    return narrow(widen(value, SOFT) * tl.load(factor, inside, 0.0), value.dtype, SOFT)


@triton.jit
def zoned_out(before, after, kept, part, inside):
    """The state after a step that by itself gives `after`: `before` where there is a 1 at `kept`;
    without that it has a `part` of it."""
    if kept is not None:
        return tl.where(tl.load(kept, inside, 0) != 0, before, after)
    else:
        return part * before + (1.0 - part) * after


@triton.jit
def peepholes_of(peephole, direction, u, unit, H: tl.constexpr):
    """[1, BLOCK_H] for each of the gates i, f and o."""
    p = peephole + direction * (3 * H) + u
    return tl.load(p, unit, 0.0), tl.load(p + H, unit, 0.0), tl.load(p + 2 * H, unit, 0.0)


@triton.jit
def wait_for(counter, target):
    """Until `target` programs of this batch tile have arrived. One thread asks, so that all leave
    the loop together."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass


@triton.jit
def arrive(counter):
    # Triton before 3.9 lets the one thread's release overtake the stores of the others.
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def publish(counter, EXCHANGE: tl.constexpr):
    """Makes what this program has stored visible to those who read it in the next step."""
    if EXCHANGE == "grid":
        arrive(counter)
    elif EXCHANGE == "program":
        tl.debug_barrier()
