// Matrices into the layout of PackedMatrix.

#if defined(FUSED_RNN_PARTS)
// Depth k and k + 16 of a vector of columns, in parts.
FUSED_RNN_INLINE void store_in_parts(const Panel& panel, int column, int64_t k, Vector first,
                                     Vector second) {
  Parts of_first, of_second;
  if (cut(first, of_first)) *panel.exceptional = true;
  if (cut(second, of_second)) *panel.exceptional = true;
  FUSED_RNN_UNROLL
  for (int part = 0; part < kParts; part++) {
    float* to = const_cast<float*>(panel.data) +
                tile_words_before(panel.depth, column, k, part, kParts) + k % kWidth * kWidth;
    store(to, words_of(of_first.part[part], of_second.part[part]));
  }
}
#endif

// Where a panel of words has those of one vector of columns at depth k.
FUSED_RNN_INLINE float* words_of_panel(const Panel& panel, int columns, int column, int64_t k) {
  float* data = const_cast<float*>(panel.data);
#if defined(FUSED_RNN_AMX) && defined(FUSED_RNN_BFLOAT16)
  return data + tile_words_before(panel.depth, column, k, 0, 1) + k % kTileDepth / kPairs * kWidth;
#else
  if (!has_halves(columns) || !panel.in_halves) {
    return data + (k / kPairs * columns + column) * kWidth;
  }
  const int64_t block = k / kBlock * kBlock, depth = smaller(kBlock, panel.depth - block);
  return data + (block * 4 + (column / 2 * depth + k - block) * 2 + column % 2) * kWidth;
#endif
}

// Panel `index` of m, which nothing is written to yet.
FUSED_RNN_INLINE Panel new_panel(const PackedMatrix& m, int64_t index, int gates) {
  const Panel panel(m, index, gates);
  if (panel.exceptional) *panel.exceptional = false;
  return panel;
}

template <int GATES>
static void pack_gates_panel(const Element* weights, const PackedMatrix& m, int64_t index) {
  const Panel panel = new_panel(m, index, GATES);
  const int columns = GATES * panel.vectors;
  for (int gate = 0; gate < GATES; gate++) {
    for (int v = 0; v < panel.vectors; v++) {
      const int64_t unit = panel.column + v * kWidth;
      const int valid = valid_lanes(unit, m.columns);
      const Element* from = weights + (gate * m.columns + unit) * m.depth;
      const int column = gate * panel.vectors + v;
      // [words from depth k on][columns]
      const auto block_at = [&](int64_t k, Vector(&block)[kWidth]) __attribute__((always_inline)) {
        FUSED_RNN_UNROLL
        for (int i = 0; i < kWidth; i++) {
          const bool inside = i < valid && k < m.depth;
          block[i] = inside ? load_words(from + i * m.depth + k, m.depth - k) : Vector{};
        }
        transpose(block);
      };
      Vector block[kWidth];
#if defined(FUSED_RNN_PARTS)
      for (int64_t k = 0; m.parts > 1 && k < m.depth; k += kTileDepth) {
        Vector second[kWidth];
        block_at(k, block);
        block_at(k + kWidth, second);
        for (int i = 0; i < kWidth; i++) store_in_parts(panel, column, k + i, block[i], second[i]);
      }
      if (m.parts > 1) continue;
#endif
      const int64_t filled = filled_depth(m.depth, m.parts);
      for (int64_t k = 0; k < filled; k += kWidth * kPairs) {
        block_at(k, block);
        float* to = words_of_panel(panel, columns, column, k);
        const int64_t next = words_of_panel(panel, columns, column, kPairs) -
                             words_of_panel(panel, columns, column, 0);
        FUSED_RNN_UNROLL
        for (int i = 0; i < kWidth; i++) {
          if (k + i * kPairs < filled) store(to + i * next, block[i]);
        }
      }
    }
  }
}

static void pack_gates(const PackGatesParams& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; index++) {
    switch (p.gates) {
      case 2:
        pack_gates_panel<2>(p.weights, p.packed, index);
        break;
      case 3:
        pack_gates_panel<3>(p.weights, p.packed, index);
        break;
      case 4:
        pack_gates_panel<4>(p.weights, p.packed, index);
        break;
      default:
        pack_gates_panel<1>(p.weights, p.packed, index);
    }
  }
}

// Takes a matrix row by row and writes a panel's columns of it. A Source gives `valid` elements of
// a row from a column on: source(row, column, valid).
template <class Row>
struct RowPacker {
  const Panel& panel;
  const int64_t columns;
  const int group;  // so many rows are written at a time
  int64_t k = 0;    // depth that is written
  Row rows[32]{};   // that wait for what they are paired with
  int waiting = 0;

  RowPacker(const Panel& panel, int64_t columns)
      : panel(panel), columns(columns), group(panel.parts > 1 ? 32 : kPairs) {}

  template <class Source>
  void add(Row row, const Source& source) {
    ask_for(row);
    rows[waiting++] = row;
    if (waiting == group) write(source);
  }

  // Zeros are the other halves of pairs, and fill the panel.
  template <class Source>
  void finish(const Source& source) {
    while (waiting > 0 || k < filled_depth(panel.depth, panel.parts)) write(source);
  }

  // Rows of wide matrices are pages apart, and cutting leaves no room to load several ahead: for
  // H=1024 twice as fast.
  template <class Other>
  void ask_for(const Other&) const {}
  void ask_for(const Element* row) const {
    if (panel.parts > 1) prefetch(row + panel.column, 0, 1, panel.vectors);
  }

  // Rows outside: the vectors of a row lie together.
  template <class Source>
  void write(const Source& source) {
    const auto elements = [&](int i, int v) {
      const int64_t column = panel.column + v * kWidth;
      return i < waiting ? source(rows[i], column, valid_lanes(column, columns)) : Elements{};
    };
#if defined(FUSED_RNN_PARTS)
    for (int i = 0; panel.parts > 1 && i < kWidth; i++) {
      for (int v = 0; v < panel.vectors; v++) {
        store_in_parts(panel, v, k + i, elements(i, v), elements(i + kWidth, v));
      }
    }
#endif
    const auto write_columns = [&](int vectors, auto place) __attribute__((always_inline)) {
      for (int v = 0; v < vectors; v++) {
        Elements paired[kPairs];
        for (int i = 0; i < kPairs; i++) paired[i] = elements(i, v);
        store(place(v), pair(paired));
      }
    };
    if (has_halves(panel.vectors) && panel.in_halves) {
      float* first = words_of_panel(panel, kMaxColumns, 0, k);
      float* second = words_of_panel(panel, kMaxColumns, 2, k);
      write_columns(kMaxColumns,
                    [&](int v) { return v < 2 ? first + v * kWidth : second + (v - 2) * kWidth; });
    } else if (panel.parts == 1) {
      write_columns(panel.vectors,
                    [&](int v) { return words_of_panel(panel, panel.vectors, v, k); });
    }
    waiting = 0;
    k += group;
  }
};

// Elements of a row that lies in memory. A type of its own: a pointer to a function is called, not
// inlined, where nothing is optimised.
constexpr auto elements_of = [](const Element* row, int64_t column, int valid) {
  return load_elements(row + column, valid);
};

static void pack_columns(const PackColumnsParams& p, int64_t begin, int64_t end) {
  const int64_t depth = p.packed.depth, columns = p.packed.columns;
  for (int64_t index = begin; index < end; index++) {
    const Panel panel = new_panel(p.packed, index, 1);
    RowPacker<const Element*> packer(panel, columns);
    for (int64_t k = 0; k < depth; k++) {
      const int64_t row = k + p.rotate < depth ? k + p.rotate : k + p.rotate - depth;
      packer.add(p.matrix + row * columns, elements_of);
    }
    packer.finish(elements_of);
  }
}

static void pack_rows(const PackRowsParams& p, int64_t begin, int64_t end) {
  const BackwardCall& call = *p.call;
  const LayerShape& shape = call.shape;
  const int64_t d = p.direction, output = shape.output, width = shape.directions * output;
  const Element* y = call.y + d * output;
  const Element* h0 = call.h0 + d * shape.rows.batch * output;
  const int64_t row_end = p.chunk.first_row + p.chunk.rows;
  const Share all{d, 0, 1, shape.rows.batch, 0, 0};
  const int64_t hidden = shape.hidden;
  // Calls body(row, h that it started from, batch row, row before it or -1).
  const auto for_each_state = [&](auto body) {
    for (int64_t t = p.chunk.begin; t < p.chunk.end; t++) {
      const Step step(shape.rows, all, d == 1 ? shape.rows.timesteps - 1 - t : t);
      const int64_t first = offset(shape.rows, t);
      for (int64_t i = 0; i < step.from_previous; i++) {
        const int64_t before = offset(shape.rows, step.previous) + i;
        body(first + i, y + before * width, i, before);
      }
      for (int64_t i = step.from_previous; i < step.rows; i++) {
        body(first + i, h0 + i * output, i, -1);
      }
    }
  };
  // What a second product took is computed anew from what is saved: a projected LSTM's o * tanh(c),
  // c being what the step gave, so that zoneout asks for the c before it, or what is normalised,
  struct Unprojected {
    const Element* gates;
    const float *c, *c_prev;
  };
  const NormGainsOf<const float>& gains = call.weights[d].norm;
  const auto unprojected = [&](const Unprojected& row, int64_t unit, int valid) {
    Vector c = load(row.c + unit, valid);
    if (shape.normed) {
      c *= load(gains.c + unit, valid);
      if (gains.c_bias) c += load(gains.c_bias + unit, valid);
    } else if (call.zoneout_c.any()) {
      Vector saved[3];
      for (int i = 0; i < 3; i++) saved[i] = load(row.gates + i * hidden + unit, valid);
      c = LstmCell<Math>::new_c(saved, load(row.c_prev + unit, valid));
    }
    return narrow(load(row.gates + 3 * hidden + unit, valid) * Math::tanh(c));
  };
  // or r * h_prev; and what the first one took, where h had a factor.
  const float* factors = call.h_factor ? call.h_factor + d * shape.rows.batch * output : nullptr;
  struct Product {
    const Element *h_prev, *r;
    const float* factor;
  };
  const auto product = [](const Product& row, int64_t unit, int valid) {
    Vector value = load(row.h_prev + unit, valid);
    if (row.r) value *= load(row.r + unit, valid);
    if (row.factor) value *= load(row.factor + unit, valid);
    return narrow(value);
  };
  const auto factor_of = [&](int64_t i) { return factors ? factors + i * output : nullptr; };
  for (int64_t index = begin; index < end; index++) {
    const Panel panel = new_panel(p.packed, index, 1);
    if (p.source == RowSource::between && reset_before(shape)) {
      constexpr int S = GruResetBeforeCell<Math>::kSavedGates;
      RowPacker<Product> packer(panel, hidden);
      for_each_state([&](int64_t row, const Element* h_prev, int64_t i, int64_t) {
        const Element* r = call.gates + (d * shape.count + row) * S * hidden;
        packer.add({h_prev, r, factor_of(i)}, product);
      });
      packer.finish(product);
      continue;
    }
    if (p.source == RowSource::between) {
      constexpr int S = LstmCell<Math>::kSavedGates;
      RowPacker<Unprojected> packer(panel, hidden);
      const int64_t first = d * shape.count;
      const float* seen = shape.normed ? call.normed.c : call.cells;
      for_each_state([&](int64_t row, const Element*, int64_t i, int64_t before) {
        const float* c_prev = before < 0 ? call.c0 + (d * shape.rows.batch + i) * hidden
                                         : call.cells + (first + before) * hidden;
        packer.add({call.gates + (first + row) * S * hidden, seen + (first + row) * hidden, c_prev},
                   unprojected);
      });
      packer.finish(unprojected);
      continue;
    }
    if (p.source == RowSource::states && factors) {
      RowPacker<Product> packer(panel, output);
      for_each_state([&](int64_t, const Element* h_prev, int64_t i, int64_t) {
        packer.add({h_prev, nullptr, factor_of(i)}, product);
      });
      packer.finish(product);
      continue;
    }
    RowPacker<const Element*> packer(panel, p.packed.columns);
    if (p.source == RowSource::x) {
      for (int64_t row = p.chunk.first_row; row < row_end; row++) {
        packer.add(call.x + row * shape.input, elements_of);
      }
    } else {
      for_each_state(
          [&](int64_t, const Element* h, int64_t, int64_t) { packer.add(h, elements_of); });
    }
    packer.finish(elements_of);
  }
}
