// Steps of a single row, for which a core would wait at the end of every panel: for the cells'
// arithmetic, of which there is a vector or a few, and for the weights of the next panel. Panels
// are multiplied two at a time, and the cells of up to twelve vectors of units follow together.
// With AVX2 on a Zen 3 LSTM and GRU take 1.15 to 1.35 times less so at H = 64 to 1024, RNN 1.05
// to 1.3; with AVX-512 on an Ice Lake 1.0 to 1.2 times, RNN 0.98 to 1.06. Of two or three rows the
// products alone keep a core as busy. Layers that normalise, GRUs that reset before the product and
// the gradient of the state before the first step do without.

constexpr bool kPanelsTogether = kOnX86WithoutAmx;

// So many vectors of units have their products, and LSTM's and GRU's their cells, together.
constexpr int kVectorsTogether = 12;

// tile [1, columns] = a row times a panel.
struct RowProduct {
  int64_t depth;
  const Element* row;
  const float* panel;
  Vector* tile;
};

// A word of a row of which so many elements are left.
FUSED_RNN_INLINE Vector word_of(const Element* row, int64_t left) {
#if defined(FUSED_RNN_BFLOAT16)
  if (left < kPairs) return broadcast_last(row);
#endif
  (void)left;
  return broadcast_word(row);
}

// A chain each (tile-inl.h) of two rows times panels, in turns: the multiply-adds of one product
// alone wait for each other.
template <int COLUMNS>
__attribute__((noinline)) void multiply_chains(int64_t depth, int64_t other_depth,
                                               const Element* row, const float* panel,
                                               const Element* other_row, const float* other_panel,
                                               bool add, Vector* tile, Vector* other_tile) {
  Vector sum[COLUMNS], other_sum[COLUMNS];
  FUSED_RNN_UNROLL
  for (int column = 0; column < COLUMNS; column++) sum[column] = other_sum[column] = Vector{};
  const auto advance = [](Vector(&to)[COLUMNS], Vector value,
                          const float*& from) __attribute__((always_inline)) {
    FUSED_RNN_UNROLL
    for (int column = 0; column < COLUMNS; column++) {
      to[column] = multiply_add(to[column], value, load(from + column * kWidth));
    }
    from += COLUMNS * kWidth;
  };
  const int64_t both = smaller(depth, other_depth);
  int64_t k = 0;
  for (; k < both; k += kPairs) {
    const Vector value = word_of(row + k, depth - k);
    const Vector other_value = word_of(other_row + k, other_depth - k);
    advance(sum, value, panel);
    advance(other_sum, other_value, other_panel);
  }
  for (int64_t i = k; i < depth; i += kPairs) advance(sum, word_of(row + i, depth - i), panel);
  for (int64_t i = k; i < other_depth; i += kPairs) {
    advance(other_sum, word_of(other_row + i, other_depth - i), other_panel);
  }
  FUSED_RNN_UNROLL
  for (int column = 0; column < COLUMNS; column++) {
    tile[column] = add ? tile[column] + sum[column] : sum[column];
    other_tile[column] = add ? other_tile[column] + other_sum[column] : other_sum[column];
  }
}

// Two products of as many columns, each as multiply_tile has it.
template <int COLUMNS>
static void multiply_both(const RowProduct& one, const RowProduct& other) {
  const auto panel_at = [](const RowProduct& p, int64_t k) {
    return p.panel + words(k) * COLUMNS * kWidth;
  };
  int64_t k = 0;
  for (; k == 0 || (k < one.depth && k < other.depth); k += kChain) {
    multiply_chains<COLUMNS>(smaller(kChain, one.depth - k), smaller(kChain, other.depth - k),
                             one.row + k, panel_at(one, k), other.row + k, panel_at(other, k),
                             k > 0, one.tile, other.tile);
  }
  const auto finish = [&](const RowProduct& p) {
    for (int64_t at = k; at < p.depth; at += kChain) {
      multiply_block<COLUMNS, 1>(smaller(kChain, p.depth - at), p.row + at, 0, panel_at(p, at),
                                 true, p.tile);
    }
  };
  finish(one);
  finish(other);
}

// Whether a product of so many rows with a matrix of so many gates is such a one.
FUSED_RNN_INLINE bool is_one_row(const PackedMatrix& m, int gates, int64_t rows) {
  return kPanelsTogether && rows == 1 && !(m.in_halves && has_halves(gates * m.vectors));
}

// Some panels of a matrix and the products of a row with them.
struct PanelGroup {
  int count, stride;
  Columns panels[kVectorsTogether];
  Vector products[kVectorsTogether * kMaxColumns];  // of panel i from i * stride on

  // Calls body(number, tile) for every panel.
  template <class From, class Body>
  FUSED_RNN_INLINE_METHOD void for_each(const From& from, const Body& body) const {
    for (int i = 0; i < count; i++) {
      body(i, Tile<From>{from, 0, 1, panels[i], products + i * stride});
    }
  }
};

// Calls body(group) for the share's panels of m, in the order of for_each_panel.
template <class Body>
FUSED_RNN_INLINE void for_each_panel_group(const PackedMatrix& m, const Share& share, int gates,
                                           int64_t step, const Element* row, const Body& body) {
  PanelGroup group;
  group.stride = gates * m.vectors;
  const int64_t most = kVectorsTogether / (2 * m.vectors) * 2;
  for (int64_t j = share.panel_begin; j < share.panel_end; j += most) {
    const int64_t end = smaller(j + most, share.panel_end);
    group.count = 0;
    const auto add = [&](const Panel& panel) {
      group.panels[group.count] = panel;
      return group.products + group.count++ * group.stride;
    };
    for (int64_t i = j; i < end; i++) {
      const Panel one(m, zigzag(i, share, step), gates);
      Vector* product = add(one);
      if (i + 1 < end) {
        const Panel other(m, zigzag(i + 1, share, step), gates);
        if (one.vectors == other.vectors) {
          i++;
          Vector* other_product = add(other);
          for_columns(gates * one.vectors, [&]<int COLUMNS>() {
            multiply_both<COLUMNS>({one.depth, row, one.data, product},
                                   {other.depth, row, other.data, other_product});
          });
          continue;
        }
      }
      multiply(gates * one.vectors, 1, {row, 0, nullptr, 0}, 0, one, product);
    }
    body(group);
  }
}
