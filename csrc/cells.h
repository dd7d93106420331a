// The pointwise part of each cell, forward and backward.
//
// Math supplies Value (a scalar or a vector of units) and its functions, so that the same text
// serves every instruction set and CUDA. Gate orders are those of fused_rnn/cells.py.
//
// forward:  gx, gh   input- and hidden-side pre-activations (GRU: gh[2] holds b_hn already)
//           h_prev   state before the step; given only where kUsesPreviousH
//           c        LSTM's c, in and out
//           saved    what backward will want
//           returns the new h
//           begin, finish: the same in two parts, of which the first has no state
// factors:  what backward needs of the saved values, before any gradient is known
// backward: d_h      whole gradient of the new h
//           carry    LSTM: gradient of c, in and out. GRU: out, the part of d_h that does
//                    not pass through W_hh
//           grads    gradients of the pre-activations, linear in d_h and carry
#pragma once

#if defined(__CUDACC__)
#define FUSED_RNN_CELL __device__ __forceinline__ static
#else
#define FUSED_RNN_CELL static inline
#endif

namespace fused_rnn {

template <class Math, bool kRelu>
struct RnnCell {
  using Value = typename Math::Value;
  static constexpr int kGates = 1;
  static constexpr int kSavedGates = 0;
  static constexpr int kGradGates = 1;
  static constexpr int kFactors = 1;
  static constexpr bool kHasC = false;
  static constexpr bool kUsesPreviousH = false;

  FUSED_RNN_CELL Value forward(const Value* gx, const Value* gh, Value, Value&, Value*) {
    const Value sum = gx[0] + gh[0];
    if constexpr (kRelu) {
      return Math::relu(sum);
    } else {
      return Math::tanh(sum);
    }
  }

  FUSED_RNN_CELL void factors(const Value*, Value h, Value, Value, Value, Value* k) {
    if constexpr (kRelu) {
      k[0] = h;
    } else {
      k[0] = 1.0f - h * h;
    }
  }

  FUSED_RNN_CELL void backward(const Value* k, Value d_h, Value&, Value* grads) {
    if constexpr (kRelu) {
      grads[0] = Math::relu_grad(k[0], d_h);
    } else {
      grads[0] = d_h * k[0];
    }
  }
};

template <class Math>
struct GruCell {
  using Value = typename Math::Value;
  static constexpr int kGates = 3;
  static constexpr int kSavedGates = 4;
  static constexpr int kGradGates = 4;
  static constexpr int kFactors = 5;
  static constexpr bool kHasC = false;
  static constexpr bool kUsesPreviousH = true;

  FUSED_RNN_CELL Value forward(const Value* gx, const Value* gh, Value h_prev, Value& c,
                               Value* saved) {
    begin(gx, gh, saved);
    return finish(saved, h_prev, c);
  }

  FUSED_RNN_CELL void begin(const Value* gx, const Value* gh, Value* saved) {
    saved[0] = gh[2];
    saved[1] = Math::sigmoid(gx[0] + gh[0]);
    saved[2] = Math::sigmoid(gx[1] + gh[1]);
    saved[3] = gx[2];  // until n is there
  }

  FUSED_RNN_CELL Value finish(Value* saved, Value h_prev, Value&) {
    const Value z = saved[2], n = Math::tanh(saved[1] * saved[0] + saved[3]);
    saved[3] = n;
    return z * (h_prev - n) + n;
  }

  FUSED_RNN_CELL void factors(const Value* saved, Value, Value h_prev, Value, Value, Value* k) {
    const Value hn = saved[0], r = saved[1], z = saved[2], n = saved[3];
    k[0] = (1.0f - z) * (1.0f - n * n);
    k[1] = r;
    k[2] = hn * r * (1.0f - r);
    k[3] = (h_prev - n) * z * (1.0f - z);
    k[4] = z;
  }

  FUSED_RNN_CELL void backward(const Value* k, Value d_h, Value& carry, Value* grads) {
    const Value d_n = d_h * k[0];
    grads[0] = d_n * k[1];
    grads[1] = d_n * k[2];
    grads[2] = d_h * k[3];
    grads[3] = d_n;
    carry = d_h * k[4];
  }
};

// Both ways in two parts, with a product in between: r and z come first, then W_hn takes r * h_prev
// to n; backward, the gradient of n comes before that of r.
template <class Math>
struct GruResetBeforeCell {
  using Value = typename Math::Value;
  static constexpr int kGates = 3;
  static constexpr int kSavedGates = 3;
  static constexpr int kGradGates = 3;
  static constexpr int kFactors = 3;
  static constexpr bool kHasC = false;
  static constexpr bool kUsesPreviousH = true;

  // Returns r * h_prev.
  FUSED_RNN_CELL Value forward_gates(const Value* gx, const Value* gh, Value h_prev, Value& r,
                                     Value& z) {
    r = Math::sigmoid(gx[0] + gh[0]);
    z = Math::sigmoid(gx[1] + gh[1]);
    return r * h_prev;
  }

  FUSED_RNN_CELL Value forward_candidate(Value gx, Value gh, Value h_prev, Value z, Value& n) {
    n = Math::tanh(gx + gh);
    return z * (h_prev - n) + n;
  }

  FUSED_RNN_CELL void factors(const Value* saved, Value, Value h_prev, Value, Value, Value* k) {
    const Value z = saved[1], n = saved[2];
    k[0] = (h_prev - n) * z * (1.0f - z);
    k[1] = (1.0f - z) * (1.0f - n * n);
    k[2] = z;
  }

  // All but grads[0].
  FUSED_RNN_CELL void backward(const Value* k, Value d_h, Value& carry, Value* grads) {
    grads[1] = d_h * k[0];
    grads[2] = d_h * k[1];
    carry = d_h * k[2];
  }

  // Returns grads[0]. d_product: gradient of r * h_prev; carry: in and out.
  FUSED_RNN_CELL Value backward_reset(Value r, Value h_prev, Value d_product, Value& carry) {
    carry = d_product * r + carry;
    return d_product * h_prev * r * (1.0f - r);
  }
};

template <class Math>
struct LstmCell {
  using Value = typename Math::Value;
  static constexpr int kGates = 4;
  static constexpr int kSavedGates = 4;
  static constexpr int kGradGates = 4;
  static constexpr int kFactors = 6;
  static constexpr bool kHasC = true;
  static constexpr bool kUsesPreviousH = false;

  FUSED_RNN_CELL Value forward(const Value* gx, const Value* gh, Value h_prev, Value& c,
                               Value* saved) {
    begin(gx, gh, saved);
    return finish(saved, h_prev, c);
  }

  FUSED_RNN_CELL void begin(const Value* gx, const Value* gh, Value* saved) {
    saved[0] = Math::sigmoid(gx[0] + gh[0]);
    saved[1] = Math::sigmoid(gx[1] + gh[1]);
    saved[2] = Math::tanh(gx[2] + gh[2]);
    saved[3] = Math::sigmoid(gx[3] + gh[3]);
  }

  FUSED_RNN_CELL Value finish(Value* saved, Value, Value& c) {
    c = new_c(saved, c);
    return saved[3] * Math::tanh(c);
  }

  FUSED_RNN_CELL Value new_c(const Value* saved, Value c_prev) {
    return saved[1] * c_prev + saved[0] * saved[2];
  }

  // With peepholes, p of i, f and o: the first two see the old c, o the new one.
  FUSED_RNN_CELL Value forward_peeping(const Value* p, const Value* gx, const Value* gh, Value& c,
                                       Value* saved) {
    const Value seen[] = {p[0] * c + gx[0], p[1] * c + gx[1], gx[2], gx[3]};
    forward(seen, gh, c, c, saved);  // all but o, and h
    saved[3] = Math::sigmoid(p[2] * c + gx[3] + gh[3]);
    return saved[3] * Math::tanh(c);
  }

  FUSED_RNN_CELL void factors(const Value* saved, Value, Value, Value c, Value c_prev, Value* k) {
    const Value i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const Value tanh_c = Math::tanh(c);
    k[0] = o * (1.0f - tanh_c * tanh_c);
    k[1] = g * i * (1.0f - i);
    k[2] = c_prev * f * (1.0f - f);
    k[3] = i * (1.0f - g * g);
    k[4] = tanh_c * o * (1.0f - o);
    k[5] = f;
  }

  FUSED_RNN_CELL void backward(const Value* k, Value d_h, Value& carry, Value* grads) {
    grads[3] = d_h * k[4];
    backward_c(k, d_h * k[0] + carry, carry, grads);
  }

  // All but grads[3], from the whole gradient of c.
  FUSED_RNN_CELL void backward_c(const Value* k, Value d_c, Value& carry, Value* grads) {
    grads[0] = d_c * k[1];
    grads[1] = d_c * k[2];
    grads[2] = d_c * k[3];
    carry = d_c * k[5];
  }

  FUSED_RNN_CELL void backward_peeping(const Value* p, const Value* k, Value d_h, Value& carry,
                                       Value* grads) {
    carry = d_h * k[4] * p[2] + carry;
    backward(k, d_h, carry, grads);
    carry = grads[0] * p[0] + grads[1] * p[1] + carry;
  }
};

// The gate of W_hh, in torch's order, that the q-th gradient faces. GRU's come as (n, r, z).
template <class Cell>
constexpr int gate_of_grad(int q) {
  return Cell::kGradGates > Cell::kGates ? (q + 2) % 3 : q;
}

}  // namespace fused_rnn

#undef FUSED_RNN_CELL
