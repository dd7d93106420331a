// Gradients of an LSTM's peepholes: sums over rows of those of the gates, times the c they saw.

static void peephole_grad(const PeepholeGradParams& p, int64_t begin, int64_t end) {
  const BackwardCall& call = *p.call;
  const LayerShape& shape = call.shape;
  const int64_t d = p.direction, hidden = shape.hidden, width = 4 * hidden;
  const Element* gates = call.gates + d * shape.count * width;
  const float* cells = call.cells + d * shape.count * hidden;
  const float* c0 = call.c0 + d * shape.rows.batch * hidden;
  const Share all{d, 0, 1, shape.rows.batch, 0, 0};
  for (int64_t index = begin; index < end; index++) {
    const int64_t unit = index * kWidth;
    const int valid = valid_lanes(unit, hidden);
    CompensatedSum sums[3] = {};
    for (int64_t t = p.chunk.begin; t < p.chunk.end; t++) {
      const Step step(shape.rows, all, d == 1 ? shape.rows.timesteps - 1 - t : t);
      const int64_t first = offset(shape.rows, t);
      const float* before =
          step.previous < 0 ? nullptr : cells + offset(shape.rows, step.previous) * hidden;
      for (int64_t i = 0; i < step.rows; i++) {
        const int64_t row = first + i;
        const float* from = i < step.from_previous ? before : c0;
        const Vector c_prev = load(from + i * hidden + unit, valid);
        Vector c = load(cells + row * hidden + unit, valid);
        if (call.zoneout_c.any()) {
          Vector saved[3];
          for (int gate = 0; gate < 3; gate++) {
            saved[gate] = load(gates + row * width + gate * hidden + unit, valid);
          }
          c = LstmCell<Math>::new_c(saved, c_prev);
        }
        const Element* grads = p.grad_gates + (row - p.chunk.first_row) * width + unit;
        sums[0].add(load(grads, valid) * c_prev);
        sums[1].add(load(grads + hidden, valid) * c_prev);
        sums[2].add(load(grads + 3 * hidden, valid) * c);
      }
    }
    for (int gate = 0; gate < 3; gate++) {
      float* to = p.grad + gate * hidden + unit;
      store(to, p.accumulate ? load(to, valid) + sums[gate].sum : sums[gate].sum, valid);
    }
  }
}
