// The forward pass: the input side of a few steps at a time, then those steps.

// The input side of so many bytes is computed at a time: half of a usual L2 cache per thread. But
// of so many rows at least: W_ih is read once for them, and at H=1024 the weights exceed the L3
// cache, where 256 rows instead of 64 made LSTM 1.2 times faster on a Xeon with AMX. Where products
// ask for their weights, 128 do: on an Ice Lake inference at H=512 takes 1.06 to 1.08 times less
// so, and the same at H = 256 and 1024. CPUs without AVX-512 have less of both caches: on a Zen 3
// inference at H = 128 and 256 takes 1.03 to 1.1 times less so, and the same within noise at
// H = 512 and 1024.
constexpr int64_t kInputSideBytes = (FUSED_RNN_VECTOR_WIDTH == 8 ? 128 : 512) << 10;
constexpr int64_t kInputSideRows = kAsksAhead ? 128 : 256;

// Rows that lie anywhere.
template <class T>
struct RowTable {
  T* const* rows;

  T* operator[](int64_t i) const { return rows[i]; }
};

// Rows of the input side, x times W_ih, with every bias that adds to it. Or of h where it is
// projected, W_hr being a single gate; or of the hidden side where that is normalised.
template <class To, class Results = RowsOf<To>>
struct InputRows {
  Operand x;   // [I]
  Results gx;  // [G*H]
};

template <int GATES, class To, class Results, class Pause>
FUSED_RNN_INLINE void store_projected(const Tile<InputRows<To, Results>>& tile,
                                      const PackedMatrix& w, const float* bias,
                                      const Pause& pause) {
  const Columns& panel = tile.panel;
  const int64_t hidden = w.columns;
  const int columns = GATES * panel.vectors;
  for (int gate = 0; gate < GATES; gate++) {
    for (int v = 0; v < panel.vectors; v++) {
      const int64_t unit = panel.column + v * kWidth;
      const int valid = valid_lanes(unit, hidden);
      const Vector b = bias ? load(bias + gate * hidden + unit, valid) : Vector{};
      for (int m = 0; m < tile.rows; m++) {
        const Vector sum = tile.product[m * columns + gate * panel.vectors + v];
        if (gate == 0) pause();
        store(tile.from.gx[tile.first + m] + gate * hidden + unit, bias ? sum + b : sum, valid);
      }
    }
  }
}

template <int GATES, class To, class Results>
FUSED_RNN_INLINE void project_tile(const InputRows<To, Results>& r, int64_t first, int rows,
                                   const Panel& panel, const PackedMatrix& w, const float* bias) {
  Vector product[kMaxRows * kMaxColumns];
  multiply(GATES * panel.vectors, rows, r.x, first, panel, product);
  store_projected<GATES>(Tile<InputRows<To, Results>>{r, first, rows, panel, product}, w, bias,
                         [] {});
}

// Asks for what of the input side a tile is about to write, or to read.
template <int GATES, class Side>
__attribute__((noinline)) static void prefetch_side(const Side& gx, int64_t first, int rows,
                                                    const Columns& panel, int64_t hidden) {
  for (int m = 0; m < rows; m++) {
    for (int gate = 0; gate < GATES; gate++) {
      prefetch(gx[first + m] + gate * hidden + panel.column, 0, 1, panel.vectors);
    }
  }
}

// Inlined, with `project`, into every scan: 2.5% of an LSTM's inference at (T, B, H) = (32, 8, 64).
template <int GATES, class To, class Results>
FUSED_RNN_INLINE void project_panel(const InputRows<To, Results>& r, int64_t count,
                                    const Panel& panel, const PackedMatrix& w, const float* bias,
                                    bool far = false) {
  Tiles<InputRows<To, Results>> tiles;
  const auto pointwise = [&](const auto& tile, const auto& pause) {
    store_projected<GATES>(tile, w, bias, pause);
  };
  const auto ask = [&](const auto& from, int64_t first, int rows, const Columns& columns) {
    if (far) prefetch_side<GATES>(from.gx, first, rows, columns, w.columns);
  };
  for_each_tile(0, count, panel, GATES * panel.vectors, [&](int64_t first, int rows) {
    tiles.add(GATES * panel.vectors, r, r.x, first, rows, panel, pointwise, ask);
  });
  tiles.finish(pointwise, ask);
}

// Whether all rows of a tile get through the first part of the cell before the second, which
// waits for it: what a core looks ahead at is little more than one row of an LSTM. With AVX2 on a
// Zen 3 its pointwise part takes 24.8 ns for eight units instead of 29.6, GRU's 14.4 instead of 20.
// With AVX-512 on an Ice Lake layers of 32 units take 1.05 to 1.06 times less, of 128 as long.
template <class Cell, bool MORE>
constexpr bool kInTwoParts = kOnX86WithoutAmx && !MORE && Cell::kSavedGates > 0;

// The sums of a row's units, of which gate i's product is at product[i * stride]. `bias` is b_hn,
// which is no part of the input side.
template <class Cell>
FUSED_RNN_INLINE void load_sums(const ForwardRows& r, int64_t row, int64_t unit, int64_t hidden,
                                int valid, const Vector* product, int stride, Vector bias,
                                Vector* gx, Vector* gh) {
  FUSED_RNN_UNROLL
  for (int gate = 0; gate < Cell::kGates; gate++) {
    gx[gate] = load(r.gx[row] + gate * hidden + unit, valid);
    gh[gate] = product[gate * stride];
  }
  if constexpr (Cell::kGates == 3) gh[2] += bias;
}

template <class Cell>
FUSED_RNN_INLINE Vector load_hidden_bias(const float* hidden_bias, int64_t unit, int valid) {
  return Cell::kGates == 3 && hidden_bias ? load(hidden_bias + unit, valid) : Vector{};
}

// The pointwise part of a row's units in two parts.
template <class Cell>
FUSED_RNN_INLINE void begin_units(const ForwardRows& r, int64_t row, int64_t unit, int64_t hidden,
                                  int valid, const Vector* product, int stride, Vector bias,
                                  Vector* saved) {
  Vector gx[Cell::kGates], gh[Cell::kGates];
  load_sums<Cell>(r, row, unit, hidden, valid, product, stride, bias, gx, gh);
  Cell::begin(gx, gh, saved);
}

template <class Cell, bool MORE>
FUSED_RNN_INLINE void finish_units(const ForwardRows& r, int64_t row, int64_t unit, int64_t hidden,
                                   int valid, Vector* saved) {
  const auto new_h = [&](Vector h_prev, Vector& c)
                         __attribute__((always_inline)) { return Cell::finish(saved, h_prev, c); };
  update_units<Cell, MORE>(r, row, unit, hidden, valid, saved, new_h);
}

template <class Cell, bool MORE, class Pause>
FUSED_RNN_INLINE void forward_tile(const Tile<ForwardRows>& tile, const PackedMatrix& w_hh,
                                   const float* hidden_bias, const Pause& pause) {
  constexpr int G = Cell::kGates;
  const ForwardRows& r = tile.from;
  const Columns& panel = tile.panel;
  const int64_t hidden = w_hh.columns, first = tile.first;
  const int columns = G * panel.vectors;
  for (int v = 0; v < panel.vectors; v++) {
    const int64_t unit = panel.column + v * kWidth;
    const int valid = valid_lanes(unit, hidden);
    const Vector bias = load_hidden_bias<Cell>(hidden_bias, unit, valid);
    const auto product_of = [&](int m) { return tile.product + m * columns + v; };
    const auto forward_row = [&](int m) __attribute__((always_inline)) {
      Vector gx[G], gh[G];
      load_sums<Cell>(r, first + m, unit, hidden, valid, product_of(m), panel.vectors, bias, gx,
                      gh);
      pause();
      forward_units<Cell, MORE>(r, first + m, unit, hidden, valid, gx, gh);
    };
    if constexpr (kInTwoParts<Cell, MORE>) {
      if (tile.rows == 1) {
        forward_row(0);
        continue;
      }
      Vector saved[kMaxRows][4];
      for (int m = 0; m < tile.rows; m++) {
        begin_units<Cell>(r, first + m, unit, hidden, valid, product_of(m), panel.vectors, bias,
                          saved[m]);
      }
      for (int m = 0; m < tile.rows; m++) {
        finish_units<Cell, MORE>(r, first + m, unit, hidden, valid, saved[m]);
      }
    } else {
      for (int m = 0; m < tile.rows; m++) forward_row(m);
    }
  }
}

// The pointwise part of a step of a single row.
template <class Cell, bool MORE>
FUSED_RNN_INLINE void forward_group(const ForwardRows& r, const PanelGroup& group,
                                    const PackedMatrix& w_hh, const float* hidden_bias) {
  if constexpr (kInTwoParts<Cell, MORE>) {
    static_assert(kMaxColumns / Cell::kGates == 1);  // vectors of a panel
    const int64_t hidden = w_hh.columns;
    Vector saved[kVectorsTogether][4];
    group.for_each(r, [&](int i, const Tile<ForwardRows>& tile) {
      const int64_t unit = tile.panel.column;
      const int valid = valid_lanes(unit, hidden);
      begin_units<Cell>(r, 0, unit, hidden, valid, tile.product, 1,
                        load_hidden_bias<Cell>(hidden_bias, unit, valid), saved[i]);
    });
    group.for_each(r, [&](int i, const Tile<ForwardRows>& tile) {
      const int64_t unit = tile.panel.column;
      finish_units<Cell, MORE>(r, 0, unit, hidden, valid_lanes(unit, hidden), saved[i]);
    });
  } else {
    group.for_each(r, [&](int, const Tile<ForwardRows>& tile) {
      forward_tile<Cell, MORE>(tile, w_hh, hidden_bias, [] {});
    });
  }
}

// Where the input side of a direction lies: row n at base + (n - first_row) * stride.
struct InputSide {
  float* base;
  int64_t stride;
  bool far;  // beyond L2, for all that is known, and to be asked for
};

template <class Cell>
static InputSide input_side(const ForwardParams& p, const Share& share) {
  constexpr int G = Cell::kGates;
  const int64_t hidden = p.shape.hidden, d = share.direction;
  // Shares of interleaved rows have one each: where steps differ in size, another share's rows of
  // a later chunk may lie where this one's still are.
  const int64_t copy = share.first % share.stride;
  if (p.scratch[d]) {
    const bool fits = p.chunk_rows * G * hidden * (int64_t)sizeof(float) <= 2 * kInputSideBytes;
    return {p.scratch[d] + copy * p.scratch_rows * G * hidden, G * hidden, kAsksAhead && !fits};
  }
#if defined(FUSED_RNN_BFLOAT16)
  return {};
#else
  // In place: each element is read before the same step writes there.
  constexpr int S = Cell::kSavedGates;
  if constexpr (S == 0) return {p.y + d * hidden, p.shape.directions * hidden, kAsksAhead};
  return {p.gates + d * p.shape.count * S * hidden + (S - G) * hidden, S * hidden, kAsksAhead};
#endif
}

// Where steps [begin, end) of the order in which the scan takes them lie in memory.
struct Span {
  int64_t begin, end;  // timesteps
  int64_t first_row, rows;

  Span(const RowLayout& layout, bool reverse, int64_t index_begin, int64_t index_end) {
    begin = reverse ? layout.timesteps - index_end : index_begin;
    end = reverse ? layout.timesteps - index_begin : index_end;
    first_row = offset(layout, begin);
    rows = offset(layout, end - 1) + batch_size(layout, end - 1) - first_row;
  }
};

// The end of the steps from `index` on that have at most `limit` rows; at least one step.
static int64_t span_end(const RowLayout& layout, bool reverse, int64_t index, int64_t limit) {
  int64_t rows = 0;
  for (int64_t end = index; end < layout.timesteps; end++) {
    rows += batch_size(layout, reverse ? layout.timesteps - 1 - end : end);
    if (rows > limit && end > index) return end;
  }
  return layout.timesteps;
}

// `share` is one of panels of W_ih.
template <class Cell>
FUSED_RNN_INLINE void project(const ForwardParams& p, const Share& share, const Span& span,
                              float* gx, int64_t gx_stride, bool far, float* memory) {
  const int64_t d = share.direction, input = p.shape.input;
  const PackedMatrix& w_ih = p.w_ih[d];
  const bool whole_batch =
      share.first == 0 && share.stride == 1 && share.limit >= p.shape.rows.batch;
  // Rows that lie together: of the whole span, or of one step after the other.
  const auto for_each_group = [&](auto body) {
    if (whole_batch) return body(Rows{p.x + span.first_row * input, input}, 0, span.rows);
    for (int64_t t = span.begin; t < span.end; t++) {
      const int64_t row = offset(p.shape.rows, t);
      body(rows_of(p.x, row, input, share), row - span.first_row,
           rows_below(share, batch_size(p.shape.rows, t)));
    }
  };
  const auto results = [&](int64_t row) {
    return whole_batch ? RowsOf<float>{gx, gx_stride} : rows_of(gx, row, gx_stride, share);
  };
#if defined(FUSED_RNN_PARTS)
  // Rows in parts lie one after the other, whatever steps they are of, and fill tiles together:
  // with two threads, GRU's and LSTM's inference at B = 40 and 80, H=256, takes 1.1 times less.
  if (w_ih.parts > 1) {
    int64_t all = 0, cut = 0;
    for_each_group([&](Rows, int64_t, int64_t count) { all += count; });
    float** table = (float**)(memory + all * row_words(input));
    for_each_group([&](Rows x, int64_t row, int64_t count) {
      operand_of(w_ih, x, 0, count, memory + cut * row_words(input));
      for (int64_t i = 0; i < count; i++) table[cut + i] = results(row)[i];
      cut += count;
    });
    const InputRows<float, RowTable<float>> rows{operand_of(w_ih, {}, 0, 0, memory), {table}};
    return for_each_panel(w_ih, share, Cell::kGates, 0, [&](const Panel& panel) {
      project_panel<Cell::kGates>(rows, all, panel, w_ih, p.bias[d]);
    });
  }
#endif
  for_each_panel(w_ih, share, Cell::kGates, 0, [&](const Panel& panel) {
    for_each_group([&](Rows x, int64_t row, int64_t count) {
      const InputRows<float> rows{{x.base, x.stride, nullptr, 0}, results(row)};
      project_panel<Cell::kGates>(rows, count, panel, w_ih, p.bias[d], far);
    });
  });
}

template <class Cell, bool PROJECTED = false, bool NORMED = false>
static void forward_share(const ForwardParams& p, const Share& share, Meeting* meeting,
                          float* memory) {
  constexpr int G = Cell::kGates, S = Cell::kSavedGates;
  const LayerShape& shape = p.shape;
  const int64_t hidden = shape.hidden, output = PROJECTED ? shape.output : hidden;
  const int64_t d = share.direction, y_width = shape.directions * output;
  const int64_t timesteps = shape.rows.timesteps;
  const PackedMatrix& w_hh = p.w_hh[d];
  const PackedMatrix& w_second = p.w_second[d];
  const PackedMatrix& to_units = kResetBefore<Cell> ? w_second : w_hh;
  const Share inputs = same_units(p.w_ih[d], share, to_units);
  const Units units(share, to_units);
  const Share outputs = PROJECTED ? share_of(w_second, share, w_hh) : share;
  const Units output_units(outputs, PROJECTED ? w_second : to_units);
  const InputSide side = input_side<Cell>(p, share);
  Element* y = p.y + d * output;
  Element* gates = S > 0 && p.gates ? p.gates + d * shape.count * S * hidden : nullptr;
  float* cells = p.cells ? p.cells + d * shape.count * hidden : nullptr;
  const int64_t state = d * shape.rows.batch;
  const auto h0 = rows_of(p.h0, state, output, share);
  const auto c0 = rows_of_or_null(p.c0, state, hidden, share);
  const auto h_n = rows_of(p.h_n, state, output, share);
  const auto c_n = rows_of_or_null(p.c_n, state, hidden, share);

  const bool more = has_more(p, d);

  // With a running h, h_n holds it: all rows start as those that have no steps end.
  const int64_t started =
      timesteps > 0 && !kRunningH<Cell> ? rows_below(share, batch_size(shape.rows, 0)) : 0;
  for (int64_t i = started; i < rows_below(share, share.limit); i++) {
    copy_row(h0[i], h_n[i], output_units);
    if (Cell::kHasC) copy_row(c0[i], c_n[i], units);
  }
  const RowsOf<float> running_h = kRunningH<Cell> ? h_n : RowsOf<float>{nullptr, 0};

  // What the products take where h has a factor: of steps in turns, since while one is written
  // others still read the one before.
  const auto factor = rows_of_or_null(p.h_factor, state, output, share);
  const auto operand = [&](int64_t which) {
    return rows_of(p.operands[d], which * shape.rows.batch, output, share);
  };
  if (factor.base) {
    for (int64_t i = 0; i < rows_below(share, share.limit); i++) {
      multiply_row(h0[i], factor[i], operand(0)[i], output_units);
    }
    if (meeting) meeting->wait();
  }

  int64_t projected = 0;  // steps whose input side is there
  int64_t first_row = 0;  // the one at side.base
  for (int64_t index = 0; index < timesteps; index++) {
    const Step step(shape.rows, share, index);
    const int64_t row = offset(shape.rows, step.t);
    if (index == projected) {
      projected = span_end(shape.rows, d == 1, index, p.chunk_rows);
      const Span span(shape.rows, d == 1, index, projected);
      if (p.scratch[d]) first_row = span.first_row;
      float* gx = side.base + (span.first_row - first_row) * side.stride;
      project<Cell>(p, inputs, span, gx, side.stride, side.far, memory);
      if constexpr (NORMED) normalise_input_side<Cell>(p, share, span, gx, side.stride);
    }
    float* gx = side.base + (row - first_row) * side.stride;
    const auto y_here = rows_of(y, row, y_width, share);
    const auto between = rows_of_or_null(p.between[d], 0, hidden, share);
    ForwardRows joining{rows_of(gx, 0, side.stride, share),
                        h0,
                        running_h,
                        c0,
                        between,
                        PROJECTED ? between : y_here,
                        c_n,
                        rows_of_or_null(gates, row, S * hidden, share),
                        rows_of_or_null(cells, row, hidden, share),
                        h0,
                        factor,
                        zoneout_rows(p.zoneout_h, d * shape.count + row, output, share),
                        zoneout_rows(p.zoneout_c, d * shape.count + row, hidden, share),
                        p.weights[d].peephole};
    const ZoneoutRows of_projected = joining.zoneout_h;
    if (PROJECTED) joining.zoneout_h = {};
    if (factor.base) {
      const RowsOf<Element> initial = operand(0);
      joining.taken = {initial.base, initial.stride};
    }
    ForwardRows carrying_on = joining;
    if (step.previous >= 0) {
      carrying_on.h_prev =
          rows_of<const Element>(y, offset(shape.rows, step.previous), y_width, share);
      carrying_on.c_prev = {c_n.base, c_n.stride};
      carrying_on.taken = carrying_on.h_prev;
      if (factor.base) {
        const RowsOf<Element> before = operand(1 + (index - 1) % 2);
        carrying_on.taken = {before.base, before.stride};
      }
    }
    // Calls body for the tiles of m's product with the rows that `taken` gives.
    const auto for_each = [&](const Share& columns, const PackedMatrix& m, int gates, auto taken,
                              auto body) {
      const int64_t joined = step.from_previous;
      const Operand before = operand_of(m, taken(carrying_on), 0, joined, memory);
      const Operand initial = operand_of(m, taken(joining), joined, step.rows, memory);
      for_each_panel(m, columns, gates, index, [&](const Panel& panel) {
        const auto tiles = [&](const ForwardRows& from, const Operand& rows_of_product,
                               int64_t begin, int64_t end) {
          for_each_tile(begin, end, panel, gates * panel.vectors, [&](int64_t first, int rows) {
            body(from, rows_of_product, first, rows, panel);
          });
        };
        tiles(carrying_on, before, 0, joined);
        tiles(joining, initial, joined, step.rows);
      });
    };
    const auto states = [](const ForwardRows& rows) { return rows.taken; };
    const auto reset_states = [](const ForwardRows& rows) {
      return Rows{rows.between.base, rows.between.stride};
    };
    if constexpr (NORMED) {
      constexpr int kFirst = kResetBefore<Cell> ? kResetGates : G;
      const NormedStep normed{rows_of(p.hidden_side[d], 0, G * hidden, share),
                              p.weights[d].norm,
                              p.weights[d].b_hh,
                              {p.normed, shape, row, share}};
      const auto for_each_row = [&](auto body) {
        for (int64_t i = 0; i < step.rows; i++) {
          body(i < step.from_previous ? carrying_on : joining, normed, i, hidden);
        }
      };
      for_each(
          same_units(w_hh, share, to_units), w_hh, kFirst, states,
          [&](const ForwardRows&, const Operand& h, int64_t first, int rows, const Panel& panel) {
            project_tile<kFirst>(InputRows<float>{h, normed.gh}, first, rows, panel, w_hh, nullptr);
          });
      for_each_row(normed_row<Cell>);
      if constexpr (kResetBefore<Cell>) {
        const RowsOf<float> gh_n{normed.gh.base + kFirst * hidden, normed.gh.stride};
        for_each(share, w_second, 1, reset_states,
                 [&](const ForwardRows&, const Operand& r_h, int64_t first, int rows,
                     const Panel& panel) {
                   project_tile<1>(InputRows<float>{r_h, gh_n}, first, rows, panel, w_second,
                                   nullptr);
                 });
        for_each_row(normed_candidate_row<Cell>);
      }
    } else if constexpr (kResetBefore<Cell>) {
      for_each(
          same_units(w_hh, share, to_units), w_hh, kResetGates, states,
          [&](const ForwardRows& from, const Operand& h, int64_t first, int rows,
              const Panel& panel) { reset_gates_tile<Cell>(from, h, first, rows, panel, w_hh); });
      if (meeting) meeting->wait();
      for_each(share, w_second, 1, reset_states,
               [&](const ForwardRows& from, const Operand& r_h, int64_t first, int rows,
                   const Panel& panel) {
                 candidate_tile<Cell>(from, r_h, first, rows, panel, w_second);
               });
    } else if (is_one_row(w_hh, G, step.rows)) {
      const ForwardRows& from = step.from_previous ? carrying_on : joining;
      for_each_panel_group(w_hh, share, G, index, from.taken[0], [&](const PanelGroup& group) {
        more ? forward_group<Cell, true>(from, group, w_hh, p.hidden_bias[d])
             : forward_group<Cell, false>(from, group, w_hh, p.hidden_bias[d]);
      });
    } else {
      Tiles<ForwardRows> tiles;
      const auto pointwise = [&](const Tile<ForwardRows>& tile, const auto& pause) {
        more ? forward_tile<Cell, true>(tile, w_hh, p.hidden_bias[d], pause)
             : forward_tile<Cell, false>(tile, w_hh, p.hidden_bias[d], pause);
      };
      const auto ask = [&](const ForwardRows& from, int64_t first, int rows, const Columns& panel) {
        if (side.far) prefetch_side<G>(from.gx, first, rows, panel, hidden);
      };
      for_each(share, w_hh, G, states,
               [&](const ForwardRows& from, const Operand& h, int64_t first, int rows,
                   const Panel& panel) {
                 tiles.add(G * panel.vectors, from, h, first, rows, panel, pointwise, ask);
               });
      tiles.finish(pointwise, ask);
    }
    if constexpr (PROJECTED) {
      if (meeting) meeting->wait();
      const Operand unprojected =
          operand_of(w_second, {joining.y.base, joining.y.stride}, 0, step.rows, memory);
      const InputRows<Element> results{unprojected, y_here};
      if (is_one_row(w_second, 1, step.rows)) {
        for_each_panel_group(
            w_second, outputs, 1, index, unprojected.rows, [&](const PanelGroup& group) {
              group.for_each(results, [&](int, const Tile<InputRows<Element>>& tile) {
                store_projected<1>(tile, w_second, nullptr, [] {});
              });
            });
      } else {
        for_each_panel(w_second, outputs, 1, index, [&](const Panel& panel) {
          project_panel<1>(results, step.rows, panel, w_second, nullptr);
        });
      }
      for (int64_t i = 0; of_projected.any() && i < step.rows; i++) {
        const auto& from = i < step.from_previous ? carrying_on.h_prev : h0;
        zone_out_row(of_projected, i, from[i], y_here[i], output_units);
      }
    }
    for (int64_t i = step.into_next; !kRunningH<Cell> && i < step.rows; i++) {
      copy_row(y_here[i], h_n[i], output_units);
    }
    for (int64_t i = 0; factor.base && i < step.into_next; i++) {
      multiply_row(y_here[i], factor[i], operand(1 + index % 2)[i], output_units);
    }
    if (meeting) meeting->wait();
  }
}

static void forward(const ForwardParams& p, const Share& share, Meeting* meeting, float* memory) {
  const TileSession session;
  for_cell(p.shape, [&]<class Cell, bool PROJECTED, bool NORMED>() {
    forward_share<Cell, PROJECTED, NORMED>(p, share, meeting, memory);
  });
}
