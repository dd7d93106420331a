// Layer normalisation of a row (Ba et al. 2016), forward and backward.

constexpr float kNormEps = 1e-5f;  // as in fused_rnn/recurrences.py

FUSED_RNN_INLINE float sum_lanes(Vector v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The sum of what term(i, valid) gives for the vectors of [0, count), in four chains: a vector that
// waits for the one before it would take four times as long.
template <class Term>
FUSED_RNN_INLINE float sum_of(int64_t count, Term term) {
  Vector sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    FUSED_RNN_UNROLL
    for (int chain = 0; chain < 4; chain++) sums[chain] += term(i + chain * kWidth, kWidth);
  }
  for (; i < count; i += kWidth) sums[0] += term(i, valid_lanes(i, count));
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// values [count] become gain * normalised + bias. `normalised`, where given, gets what they are
// before that. Returns the reciprocal deviation.
static float normalise(float* values, int64_t count, const float* gain, const float* bias,
                       float* normalised) {
  const float mean =
      sum_of(count, [&](int64_t i, int valid)
                        __attribute__((always_inline)) { return load(values + i, valid); }) /
      static_cast<float>(count);
  float means[kWidth];  // from where lanes beyond the last value load zero, as values do
  store(means, broadcast(mean));
  const float squares = sum_of(count, [&](int64_t i, int valid) __attribute__((always_inline)) {
    const Vector centred = load(values + i, valid) - load(means, valid);
    return centred * centred;
  });
  const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(count) + kNormEps);
  for (int64_t i = 0; i < count; i += kWidth) {
    const int valid = valid_lanes(i, count);
    Vector value = (load(values + i, valid) - mean) * scale;
    if (normalised) store(normalised + i, value, valid);
    value *= load(gain + i, valid);
    if (bias) value += load(bias + i, valid);
    store(values + i, value, valid);
  }
  return scale;
}

// From the gradients of the result those of the values: emit(i, valid, vector) for each.
template <class T, class Emit>
FUSED_RNN_INLINE void normalise_backward(const T* grads, int64_t count, const float* gain,
                                         const float* normalised, float scale, Emit emit) {
  const auto gained = [&](int64_t i, int valid) __attribute__((always_inline)) {
    return load(grads + i, valid) * load(gain + i, valid);
  };
  const auto size = static_cast<float>(count);
  const float mean = sum_of(count, gained) / size;
  const float along = sum_of(count,
                             [&](int64_t i, int valid) __attribute__((always_inline)) {
                               return gained(i, valid) * load(normalised + i, valid);
                             }) /
                      size;
  for (int64_t i = 0; i < count; i += kWidth) {
    const int valid = valid_lanes(i, count);
    emit(i, valid, (gained(i, valid) - mean - load(normalised + i, valid) * along) * scale);
  }
}
