// The backward scan over one chunk of timesteps.

template <class Cell, bool MORE>
FUSED_RNN_INLINE void backward_cell(const BackwardRows& r, int64_t unit, int64_t hidden, int valid,
                                    const Vector* factors, Vector d_h, Vector& carry,
                                    Vector* grads) {
  if constexpr (MORE && Cell::kHasC) {
    if (r.peephole) {
      Vector peephole[3];
      load_peephole(r.peephole, unit, hidden, valid, peephole);
      return Cell::backward_peeping(peephole, factors, d_h, carry, grads);
    }
  }
  Cell::backward(factors, d_h, carry, grads);
}

// `weights` [depth, H] makes the gradient of the cell's output from grad_next: W_hh, or where h is
// projected W_hr, grad_next being the gradient of h then and the other sources null. MORE: see
// forward_units.
template <class Cell, bool MORE, class Pause>
__attribute__((noinline)) static void backward_tile(const Tile<BackwardRows>& tile,
                                                    const PackedMatrix& weights,
                                                    const Pause& pause) {
  const BackwardRows& r = tile.from;
  const Columns& panel = tile.panel;
  const int64_t hidden = weights.columns;
  // A row's own grad_h_n, once; and whatever went round W_hh.
  const bool zoned = MORE && r.zoneout_h.any();
  const bool add_grad_h = Cell::kUsesPreviousH || zoned || !r.grad_next.base;
  for (int m = 0; m < tile.rows; m++) {
    const int64_t row = tile.first + m;
    for (int v = 0; v < panel.vectors; v++) {
      const int64_t unit = panel.column + v * kWidth;
      const int valid = valid_lanes(unit, hidden);
      Vector d_h{};
      if (r.grad_next.base) {
        d_h = through_factor(r.factor, row, unit, valid, tile.product[m * panel.vectors + v]);
      }
      pause();
      if (add_grad_h) d_h += load(r.grad_h[row] + unit, valid);
      if (r.grad_y.base) d_h += load(r.grad_y[row] + unit, valid);
      Vector saved[4], grads[4], h{}, h_prev{}, c{}, c_prev{}, carry{}, past_h{}, past_c{};
      if (zoned) {
        past_h = past_the_step(r.zoneout_h, row, unit, valid, d_h);
        d_h -= past_h;
      }
      if constexpr (Cell::kSavedGates > 0) {
        FUSED_RNN_UNROLL
        for (int i = 0; i < Cell::kSavedGates; i++) {
          saved[i] = load(r.gates[row] + i * hidden + unit, valid);
        }
      } else {
        const bool apart = MORE && r.cells.base;
        h = apart ? load(r.cells[row] + unit, valid) : load(r.y[row] + unit, valid);
      }
      if constexpr (Cell::kUsesPreviousH) h_prev = load(r.h_prev[row] + unit, valid);
      if constexpr (Cell::kHasC) {
        c = load(r.cells[row] + unit, valid);
        c_prev = load(r.c_prev[row] + unit, valid);
        carry = load(r.grad_c[row] + unit, valid);
        if (r.grad_cells.base) carry += load(r.grad_cells[row] + unit, valid);
        if (MORE && r.zoneout_c.any()) {
          c = LstmCell<Math>::new_c(saved, c_prev);
          past_c = past_the_step(r.zoneout_c, row, unit, valid, carry);
          carry -= past_c;
        }
      }
      Vector factors[Cell::kFactors];
      Cell::factors(saved, h, h_prev, c, c_prev, factors);
      backward_cell<Cell, MORE>(r, unit, hidden, valid, factors, d_h, carry, grads);
      FUSED_RNN_UNROLL
      for (int i = kResetBefore<Cell> ? 1 : 0; i < Cell::kGradGates; i++) {
        store(r.grad_gates[row] + i * hidden + unit, grads[i], valid);
      }
      if constexpr (Cell::kUsesPreviousH) past_h = zoned ? past_h + carry : carry;
      if (Cell::kUsesPreviousH || zoned) store(r.grad_h[row] + unit, past_h, valid);
      if constexpr (Cell::kHasC) store(r.grad_c[row] + unit, MORE ? carry + past_c : carry, valid);
    }
  }
}

// Asks for what a tile's pointwise part will read.
template <class Cell>
FUSED_RNN_INLINE void prefetch_tile(const BackwardRows& r, int64_t first, int rows,
                                    const Columns& panel, int64_t hidden) {
  const auto ask = [&](auto from, int64_t column) {
    if (from.base) prefetch(from[first] + column, from.stride, rows, panel.vectors);
  };
  for (int i = 0; i < Cell::kSavedGates; i++) ask(r.gates, i * hidden + panel.column);
  ask(r.grad_y, panel.column);
  if (Cell::kHasC) ask(r.c_prev, panel.column);
  if (!Cell::kHasC) ask(Cell::kUsesPreviousH ? r.h_prev : r.y, panel.column);
}

// The gradient of r, and what of h_prev's comes through it, from that of n by W_hn.
template <class Cell>
static void reset_grad_tile(const BackwardRows& from, const Operand& grad_n, int64_t first,
                            int rows, const Panel& panel, const PackedMatrix& w_n) {
  const int64_t hidden = w_n.columns;
  Vector tile[kMaxRows * kMaxColumns];
  multiply(panel.vectors, rows, grad_n, first, panel, tile);
  for (int m = 0; m < rows; m++) {
    const int64_t row = first + m;
    for (int v = 0; v < panel.vectors; v++) {
      const int64_t unit = panel.column + v * kWidth;
      const int valid = valid_lanes(unit, hidden);
      float* grad_h = from.grad_h[row] + unit;
      Vector carry = load(grad_h, valid);
      const Vector grad = Cell::backward_reset(
          load(from.gates[row] + unit, valid), load(from.h_prev[row] + unit, valid),
          through_factor(from.factor, row, unit, valid, tile[m * panel.vectors + v]), carry);
      store(from.grad_gates[row] + unit, grad, valid);
      store(grad_h, carry, valid);
    }
  }
}

// Gradient of h where it is projected or a layer normalises, for the rows of one step; where there
// is zoneout, of what the step gave. `add_grad_h`: what went past the next step.
static void output_grad_tile(const BackwardRows& r, const Operand& grad_next, RowsOf<Element> to,
                             int64_t first, int rows, const Panel& panel, const PackedMatrix& w_hh,
                             bool add_grad_h) {
  Vector tile[kMaxRows * kMaxColumns];
  if (r.grad_next.base) {
    if (r.grad_y.base) {
      prefetch(r.grad_y[first] + panel.column, r.grad_y.stride, rows, panel.vectors);
    }
    multiply(panel.vectors, rows, grad_next, first, panel, tile);
  }
  const bool zoned = r.zoneout_h.any();
  for (int m = 0; m < rows; m++) {
    const int64_t row = first + m;
    for (int v = 0; v < panel.vectors; v++) {
      const int64_t column = panel.column + v * kWidth;
      const int valid = valid_lanes(column, w_hh.columns);
      Vector sum{};
      if (r.grad_next.base) {
        sum = through_factor(r.factor, row, column, valid, tile[m * panel.vectors + v]);
      }
      if (add_grad_h || zoned || !r.grad_next.base) sum += load(r.grad_h[row] + column, valid);
      if (r.grad_y.base) sum += load(r.grad_y[row] + column, valid);
      if (zoned) {
        const Vector past = past_the_step(r.zoneout_h, row, column, valid, sum);
        store(r.grad_h[row] + column, past, valid);
        sum -= past;
      }
      store(to[row] + column, sum, valid);
    }
  }
}

// Gradient of the state that rows [begin, end) started from. `add`: to what went round W_hh.
static void initial_state_grad(Rows grad_gates, RowsOf<float> grad_h, RowsOf<const float> factor,
                               int64_t begin, int64_t end, const Share& share,
                               const PackedMatrix& w_hh, bool add, float* memory) {
  const Operand grads = operand_of(w_hh, grad_gates, begin, end, memory);
  if (begin == end) return;
  for_each_panel(w_hh, share, 1, 0, [&](const Panel& panel) {
    for_each_tile(begin, end, panel, panel.vectors, [&](int64_t first, int rows) {
      Vector tile[kMaxRows * kMaxColumns];
      multiply(panel.vectors, rows, grads, first, panel, tile);
      for (int m = 0; m < rows; m++) {
        for (int v = 0; v < panel.vectors; v++) {
          const int64_t unit = panel.column + v * kWidth;
          const int valid = valid_lanes(unit, w_hh.columns);
          float* to = grad_h[first + m] + unit;
          Vector sum = through_factor(factor, first + m, unit, valid, tile[m * panel.vectors + v]);
          if (add) sum += load(to, valid);
          store(to, sum, valid);
        }
      }
    });
  });
}

template <class Cell, bool PROJECTED = false, bool NORMED = false>
static void backward_share(const BackwardParams& p, const Share& share, Meeting* meeting,
                           float* memory) {
  // Of grad_gates, Q are there, and the first M go through W_hh.
  constexpr int S = Cell::kSavedGates, Q = NORMED ? 2 * Cell::kGates : Cell::kGradGates;
  constexpr int M = NORMED ? Cell::kGates : Q;
  const LayerShape& shape = p.shape;
  const int64_t hidden = shape.hidden, output = PROJECTED ? shape.output : hidden;
  const int64_t d = share.direction, y_width = shape.directions * output;
  const int64_t last = shape.rows.timesteps - 1;
  const Chunk& chunk = p.chunk[d];
  const PackedMatrix& w_hh = p.w_hh[d];
  const PackedMatrix& to_units = PROJECTED ? p.w_second[d] : w_hh;
  const Units units(share, to_units);
  const Share outputs = PROJECTED ? share_of(w_hh, share, to_units) : share;
  const Units output_units(outputs, w_hh);
  const Element* gates = S > 0 ? p.gates + d * shape.count * S * hidden : nullptr;
  const float* cells = p.cells ? p.cells + d * shape.count * hidden : nullptr;
  const float* grad_cells = p.grad_cells ? p.grad_cells + d * shape.count * hidden : nullptr;
  const Element* y = p.y + d * output;
  const Element* grad_y = p.grad_y ? p.grad_y + d * output : nullptr;
  Element* grad_gates = p.grad_gates[d];
  constexpr int kSums = Cell::kGradGates;
  Element* grad_sums = p.grad_sums[d];
  const int64_t state = d * shape.rows.batch;
  const auto h0 = rows_of(p.h0, state, output, share);
  const auto c0 = rows_of_or_null(p.c0, state, hidden, share);
  const auto grad_h_n = rows_of_or_null(p.grad_h_n, state, output, share);
  const auto grad_c_n = rows_of_or_null(p.grad_c_n, state, hidden, share);
  const auto grad_h = rows_of(p.grad_h0, state, output, share);
  const auto grad_c = rows_of_or_null(p.grad_c0, state, hidden, share);
  const auto carried = rows_of(p.carried[d], 0, Q * hidden, share);
  const auto factor = rows_of_or_null(p.h_factor, state, output, share);

  const bool more = has_more(p, d);

  // The order of the forward scan, which this one follows from its end.
  const int64_t index_begin = d == 1 ? last + 1 - chunk.end : chunk.begin;
  const int64_t index_end = d == 1 ? last + 1 - chunk.begin : chunk.end;
  if (index_end == last + 1) {
    for (int64_t i = 0; i < rows_below(share, share.limit); i++) {
      copy_row(grad_h_n.base ? grad_h_n[i] : nullptr, grad_h[i], output_units);
      if (Cell::kHasC) copy_row(grad_c_n.base ? grad_c_n[i] : nullptr, grad_c[i], units);
    }
  }

  for (int64_t index = index_end - 1; index >= index_begin; index--) {
    const Step step(shape.rows, share, index);
    const int64_t row = offset(shape.rows, step.t);
    const auto grads = rows_of(grad_gates, row - chunk.first_row, Q * hidden, share);
    BackwardRows r{
        {nullptr, 0},
        rows_of_or_null(grad_y, row, y_width, share),
        rows_of_or_null(gates, row, S * hidden, share),
        rows_of(y, row, y_width, share),
        h0,
        rows_of_or_null(cells, row, hidden, share),
        c0,
        rows_of_or_null(grad_cells, row, hidden, share),
        NORMED ? rows_of(grad_sums, row - chunk.first_row, kSums * hidden, share) : grads,
        grad_h,
        grad_c,
        factor,
        zoneout_rows(p.zoneout_h, d * shape.count + row, output, share),
        zoneout_rows(p.zoneout_c, d * shape.count + row, hidden, share),
        p.weights[d].peephole};
    // Rows without a previous or a next step come last; at most three kinds of rows.
    const int64_t low = smaller(step.from_previous, step.into_next);
    const int64_t high = step.from_previous + step.into_next - low;
    const int64_t bounds[] = {0, low, high, step.rows};
    BackwardRows kinds[3];
    for (int kind = 0; kind < 3; kind++) {
      const int64_t begin = bounds[kind], end = bounds[kind + 1];
      if (begin == end) continue;
      BackwardRows& rows_here = kinds[kind];
      rows_here = r;
      if (begin < step.into_next) {
        if (index + 1 < index_end) {
          const int64_t next_row = offset(shape.rows, step.next) - chunk.first_row;
          rows_here.grad_next = rows_of<const Element>(grad_gates, next_row, Q * hidden, share);
        } else {
          rows_here.grad_next = {carried.base, carried.stride};
        }
      }
      if (begin < step.from_previous) {
        const int64_t before = offset(shape.rows, step.previous);
        rows_here.h_prev = rows_of(y, before, y_width, share);
        rows_here.c_prev = rows_of_or_null(cells, before, hidden, share);
      }
    }
    // Calls body for the tiles of m's product with the rows that `taken` gives, if any.
    const auto for_each = [&](const Share& columns, const PackedMatrix& m, auto taken, auto body) {
      for (int kind = 0; kind < 3; kind++) {
        const int64_t begin = bounds[kind], end = bounds[kind + 1];
        if (begin == end) continue;
        const Rows rows_here = taken(kinds[kind]);
        const Operand operand =
            operand_of(m, rows_here, begin, rows_here.base ? end : begin, memory);
        for_each_panel(m, columns, 1, index, [&](const Panel& panel) {
          for_each_tile(begin, end, panel, panel.vectors, [&](int64_t first, int rows) {
            body(kinds[kind], operand, first, rows, panel);
          });
        });
      }
    };
    const auto next_step = [](const BackwardRows& rows) { return rows.grad_next; };
    if constexpr (PROJECTED) {
      const auto grad_output = rows_of(p.grad_h[d], row - chunk.first_row, output, share);
      for_each(outputs, w_hh, next_step,
               [&](const BackwardRows& from, const Operand& grad_next, int64_t first, int rows,
                   const Panel& panel) {
                 output_grad_tile(from, grad_next, grad_output, first, rows, panel, w_hh, false);
               });
      for (BackwardRows& kind : kinds) {
        kind.grad_next = {grad_output.base, grad_output.stride};
        kind.grad_y = {nullptr, 0};
        kind.factor = {nullptr, 0};  // the gradient of h itself goes into W_hr's product
        kind.zoneout_h = {};
      }
      if (meeting) meeting->wait();
    }
    // Calls body for all rows of the step.
    const auto for_each_row = [&](auto body) {
      for (int kind = 0; kind < 3; kind++) {
        for (int64_t i = bounds[kind]; i < bounds[kind + 1]; i++) body(kinds[kind], i);
      }
    };
    const auto grad_given = rows_of_or_null(p.grad_given[d], 0, hidden, share);
    const NormedGradStep normed{
        {grad_given.base, grad_given.stride},
        grads,
        rows_of_or_null(p.grad_c_seen[d], row - chunk.first_row, hidden, share),
        p.weights[d].norm,
        {p.normed, shape, row, share}};
    if constexpr (NORMED) {
      for_each(share, to_units, next_step,
               [&](const BackwardRows& from, const Operand& grad_next, int64_t first, int rows,
                   const Panel& panel) {
                 output_grad_tile(from, grad_next, grad_given, first, rows, panel, to_units,
                                  Cell::kUsesPreviousH);
               });
      for_each_row([&](const BackwardRows& from, int64_t i) {
        normed_grad_row<Cell>(from, normed, i, hidden);
      });
    } else {
      const auto pointwise = [&](const Tile<BackwardRows>& tile, const auto& pause) {
        more ? backward_tile<Cell, true>(tile, to_units, pause)
             : backward_tile<Cell, false>(tile, to_units, pause);
      };
      if (is_one_row(to_units, 1, step.rows) && step.into_next > 0) {
        // One row with a next step is of the first kind if it has a previous one, else the second.
        const BackwardRows& from = kinds[1 - step.from_previous];
        for_each_panel_group(
            to_units, share, 1, index, from.grad_next[0], [&](const PanelGroup& group) {
              group.for_each(from, [&](int, const auto& tile) { pointwise(tile, [] {}); });
            });
      } else {
        const auto ask = [&](const BackwardRows& from, int64_t first, int rows,
                             const Columns& panel) {
          prefetch_tile<Cell>(from, first, rows, panel, hidden);
        };
        Tiles<BackwardRows> tiles;
        for_each(share, to_units, next_step,
                 [&](const BackwardRows& from, const Operand& grad_next, int64_t first, int rows,
                     const Panel& panel) {
                   if (!from.grad_next.base) {
                     return tiles.add_without_product(from, first, rows, panel, pointwise, ask);
                   }
                   tiles.add(panel.vectors, from, grad_next, first, rows, panel, pointwise, ask);
                 });
        tiles.finish(pointwise, ask);
      }
    }
    if constexpr (kResetBefore<Cell>) {
      if (meeting) meeting->wait();
      const auto of_n = [&](const BackwardRows&) {
        return Rows{grads.base + 2 * hidden, grads.stride};
      };
      for_each(share, p.w_second[d], of_n,
               [&](const BackwardRows& from, const Operand& grad_n, int64_t first, int rows,
                   const Panel& panel) {
                 reset_grad_tile<Cell>(from, grad_n, first, rows, panel, p.w_second[d]);
               });
      if constexpr (NORMED) {
        for_each_row([&](const BackwardRows& from, int64_t i) {
          normed_group_grads<Cell>(from, normed, {0, 0, kResetGates}, i, hidden);
        });
      }
    }
    if (meeting) meeting->wait();
    if (!p.spares_h0) {
      initial_state_grad({grads.base, grads.stride}, grad_h, factor, step.from_previous, step.rows,
                         outputs, w_hh, Cell::kUsesPreviousH || p.zoneout_h.any(), memory);
    }
    // The next chunk goes on from here, after grad_gates has been given to other steps.
    for (int64_t i = 0; index == index_begin && i < step.rows; i++) {
      for (int gate = 0; gate < M; gate++) {
        copy_row(grads[i] + gate * hidden, carried[i] + gate * hidden, units);
      }
    }
  }
}

static void backward(const BackwardParams& p, const Share& share, Meeting* meeting, float* memory) {
  const TileSession session;
  for_cell(p.shape, [&]<class Cell, bool PROJECTED, bool NORMED>() {
    backward_share<Cell, PROJECTED, NORMED>(p, share, meeting, memory);
  });
}
