// Gradients of gains and biases where a layer normalises: sums over rows of the gradients of what
// the gates add up, and of those times the normalised values.

#if !defined(FUSED_RNN_BFLOAT16)

// Rows are added up in blocks of so many, for the sums of a long sequence to be exact.
constexpr int64_t kNormBlock = 64;
constexpr int kNormVectors = 4;

// Over rows of up to kNormVectors vectors of columns: `sums`, where wanted, of the gradients, and
// `products` of them times the values.
static void add_norm_sums(RowsOf<const float> grads, RowsOf<const float> values, int64_t rows,
                          int64_t columns, float* sums, float* products, bool accumulate) {
  for (int64_t begin = 0; begin == 0 || begin < rows; begin += kNormBlock) {
    const int64_t end = smaller(begin + kNormBlock, rows);
    Vector of_grads[kNormVectors] = {}, of_products[kNormVectors] = {};
    const auto add_row = [&](int64_t row, int64_t width) __attribute__((always_inline)) {
      FUSED_RNN_UNROLL
      for (int v = 0; v < kNormVectors; v++) {
        if (v * kWidth >= width) break;
        const int valid = valid_lanes(v * kWidth, width);
        const Vector grad = load(grads[row] + v * kWidth, valid);
        of_grads[v] += grad;
        of_products[v] += grad * load(values[row] + v * kWidth, valid);
      }
    };
    if (columns == kNormVectors * kWidth) {
      for (int64_t row = begin; row < end; row++) add_row(row, kNormVectors * kWidth);
    } else {
      for (int64_t row = begin; row < end; row++) add_row(row, columns);
    }
    const bool add = accumulate || begin > 0;
    for (int v = 0; v * kWidth < columns; v++) {
      const int valid = valid_lanes(v * kWidth, columns);
      const auto put = [&](float* to, Vector sum) {
        if (to == nullptr) return;
        to += v * kWidth;
        store(to, add ? load(to, valid) + sum : sum, valid);
      };
      put(sums, of_grads[v]);
      put(products, of_products[v]);
    }
  }
}

static void norm_grad(const NormGradParams& p, int64_t begin, int64_t end) {
  const LayerShape& s = p.call->shape;
  const CellSizes sizes = cell_sizes(s.cell);
  const int64_t hidden = s.hidden, row = p.direction * s.count + p.chunk.first_row;
  const WeightGradsOf<Element>& g = p.call->grads[p.direction];
  const NormValuesOf<const float>& normed = p.call->normed;
  const int64_t first = begin * kWidth, last = smaller(end * kWidth, hidden);
  const auto add = [&](const float* grads, int64_t grads_width, const float* values,
                       int64_t values_width, float* sums, float* products) {
    for (int64_t unit = first; unit < last; unit += kNormVectors * kWidth) {
      add_norm_sums({grads + unit, grads_width}, {values + row * values_width + unit, values_width},
                    p.chunk.rows, smaller(kNormVectors * kWidth, last - unit),
                    sums ? sums + unit : nullptr, products ? products + unit : nullptr,
                    p.accumulate);
    }
  };
  const int64_t side = sizes.gates * hidden, grads_width = sizes.grad_gates * hidden;
  for (int64_t gate = 0; gate < sizes.gates; gate++) {
    const int64_t at = gate * hidden;
    const auto of = [&](float* grads) { return grads ? grads + at : nullptr; };
    const int64_t of_input = grad_of_input(sizes, gate), of_hidden = grad_of_hidden(sizes, gate);
    if (g.b_ih || g.norm.ih) {
      add(p.grad_sums + of_input * hidden, grads_width, normed.ih + at, side, of(g.b_ih),
          of(g.norm.ih));
    }
    if (g.b_hh || g.norm.hh) {
      add(p.grad_sums + of_hidden * hidden, grads_width, normed.hh + at, side, of(g.b_hh),
          of(g.norm.hh));
    }
  }
  if (g.norm.c) add(p.grad_c_seen, hidden, normed.c, hidden, g.norm.c_bias, g.norm.c);
}

#endif
