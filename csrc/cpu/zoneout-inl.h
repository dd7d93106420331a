// What of a state stays as it was before a step.

typedef unsigned char Flags __attribute__((vector_size(FUSED_RNN_VECTOR_WIDTH)));

// All bits of a lane where its byte is not 0; of `valid` lanes, the others are 0.
FUSED_RNN_INLINE VectorIndex load_flags(const uint8_t* p, int valid) {
  Flags flags{};
  if (valid == kWidth) {
    __builtin_memcpy(&flags, p, sizeof(flags));
  } else {
    for (int i = 0; i < valid; i++) flags[i] = p[i];
  }
  return __builtin_convertvector(flags, VectorIndex) != 0;
}

// Whether a call has zoneout or peepholes.
template <class Params>
FUSED_RNN_INLINE bool has_more(const Params& p, int64_t direction) {
  return p.zoneout_h.any() || p.zoneout_c.any() || p.weights[direction].peephole;
}

// The rows of one step.
struct ZoneoutRows {
  RowsOf<const uint8_t> kept;  // [P] or [H], or null
  float part;

  bool any() const { return kept.base != nullptr || part != 0; }
};

// `row` is the first of the step among all rows of all directions.
FUSED_RNN_INLINE ZoneoutRows zoneout_rows(const Zoneout& zoneout, int64_t row, int64_t width,
                                          const Share& share) {
  return {rows_of_or_null(zoneout.kept, row, width, share), zoneout.part};
}

// The state after a step that by itself would give `after`.
FUSED_RNN_INLINE Vector zoned_out(const ZoneoutRows& z, int64_t row, int64_t unit, int valid,
                                  Vector before, Vector after) {
  if (z.kept.base) return load_flags(z.kept[row] + unit, valid) ? before : after;
  return z.part * before + (1.0f - z.part) * after;
}

// What of the gradient of the state after a step goes to the state before; the rest is that of what
// the step by itself gave.
FUSED_RNN_INLINE Vector past_the_step(const ZoneoutRows& z, int64_t row, int64_t unit, int valid,
                                      Vector grad) {
  if (z.kept.base) return load_flags(z.kept[row] + unit, valid) ? grad : Vector{};
  return z.part * grad;
}

// The same as `zoned_out` for units of a row of h, of which `h` has what the step gave.
FUSED_RNN_INLINE void zone_out_row(const ZoneoutRows& z, int64_t row, const Element* before,
                                   Element* h, const Units& units) {
  for (int64_t i = units.begin; i < units.end; i += kWidth) {
    const int valid = valid_lanes(i, units.end);
    store(h + i, zoned_out(z, row, i, valid, load(before + i, valid), load(h + i, valid)), valid);
  }
}
