// Which rows of which arrays a share works on, step by step.

FUSED_RNN_INLINE int64_t batch_size(const RowLayout& rows, int64_t t) {
  return rows.batch_sizes ? rows.batch_sizes[t] : rows.batch;
}

FUSED_RNN_INLINE int64_t offset(const RowLayout& rows, int64_t t) {
  return rows.offsets ? rows.offsets[t] : t * rows.batch;
}

// How many rows of the share are among the first `batch` ones.
FUSED_RNN_INLINE int64_t rows_below(const Share& share, int64_t batch) {
  const int64_t end = smaller(batch, share.limit);
  return end <= share.first ? 0 : (end - share.first - 1) / share.stride + 1;
}

// A step of one share, in the order in which the forward scan takes them.
struct Step {
  int64_t t, previous, next;  // timesteps; previous and next are -1 beyond the sequence
  int64_t rows;               // of the share in this step: numbers [0, rows)
  int64_t from_previous;      // of those, [0, from_previous) were in the previous step
  int64_t into_next;          // and [0, into_next) will be in the next one

  Step(const RowLayout& layout, const Share& share, int64_t index) {
    const bool reverse = share.direction == 1;
    const int64_t last = layout.timesteps - 1;
    const int64_t ahead = reverse ? -1 : 1;
    t = reverse ? last - index : index;
    previous = index > 0 ? t - ahead : -1;
    next = index < last ? t + ahead : -1;
    const int64_t batch = batch_size(layout, t);
    rows = rows_below(share, batch);
    from_previous =
        previous < 0 ? 0 : rows_below(share, smaller(batch, batch_size(layout, previous)));
    into_next = next < 0 ? 0 : rows_below(share, smaller(batch, batch_size(layout, next)));
  }
};

// Row numbers of a share, resolved to memory: row i of the share at base + i * stride.
template <class T>
struct RowsOf {
  T* base;
  int64_t stride;

  T* operator[](int64_t i) const { return base + i * stride; }
};

using Rows = RowsOf<const Element>;

// The share's rows of an array whose rows are `width` apart, the first batch row being `row`.
template <class T>
FUSED_RNN_INLINE RowsOf<T> rows_of(T* array, int64_t row, int64_t width, const Share& share) {
  return {array + (row + share.first) * width, share.stride * width};
}

template <class T>
FUSED_RNN_INLINE RowsOf<T> rows_of_or_null(T* array, int64_t row, int64_t width,
                                           const Share& share) {
  return array ? rows_of(array, row, width, share) : RowsOf<T>{nullptr, 0};
}

// The columns of a matrix, hidden units or elements of h, that belong to a share.
struct Units {
  int64_t begin, end;

  Units(const Share& share, const PackedMatrix& m)
      : begin(share.panel_begin * m.vectors * kWidth),
        end(smaller(share.panel_end * m.vectors * kWidth, m.columns)) {}
};

// Those units of a row; a null source is a row of zeros.
template <class From, class To>
FUSED_RNN_INLINE void copy_row(const From* from, To* to, const Units& units) {
  for (int64_t i = units.begin; i < units.end; i++) convert(from ? from[i] : From{}, to[i]);
}

// Likewise a row of h times a row of factors.
FUSED_RNN_INLINE void multiply_row(const Element* h, const float* factor, Element* to,
                                   const Units& units) {
  for (int64_t i = units.begin; i < units.end; i += kWidth) {
    const int valid = valid_lanes(i, units.end);
    store(to + i, load(h + i, valid) * load(factor + i, valid), valid);
  }
}

// Of i, f and o, from [3*H].
FUSED_RNN_INLINE void load_peephole(const float* from, int64_t unit, int64_t hidden, int valid,
                                    Vector* peephole) {
  for (int i = 0; i < 3; i++) peephole[i] = load(from + i * hidden + unit, valid);
}

// The share's part of a matrix other than the one with panels of hidden units: of as many of its
// panels, in proportion. Together the shares have all of them, but one may have none.
FUSED_RNN_INLINE Share share_of(const PackedMatrix& m, const Share& share,
                                const PackedMatrix& units) {
  const int64_t panels = panel_count(m, kWidth), all = panel_count(units, kWidth);
  Share part = share;
  part.panel_begin = panels * share.panel_begin / all;
  part.panel_end = panels * share.panel_end / all;
  return part;
}

// Those of its panels that hold the share's units: each panel of `units` is one or several of them.
FUSED_RNN_INLINE Share same_units(const PackedMatrix& m, const Share& share,
                                  const PackedMatrix& units) {
  const int64_t parts = units.vectors / m.vectors;
  Share part = share;
  part.panel_begin = share.panel_begin * parts;
  part.panel_end = smaller(share.panel_end * parts, panel_count(m, kWidth));
  return part;
}

// Which of a share's panels, or of its vectors of units, odd steps take from the end.
FUSED_RNN_INLINE int64_t zigzag(int64_t index, const Share& share, int64_t step) {
  return step % 2 ? share.panel_end - 1 - (index - share.panel_begin) : index;
}
