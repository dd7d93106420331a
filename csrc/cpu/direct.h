// Inference in one call, and a layer's training in two: what the library's operators and the direct
// calls of Python (csrc/python) share. Plain, so that the border to Python needs nothing of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace fused_rnn {

enum class NumberType : int8_t { float32, bfloat16, float16, int64 };
// Of arrays.
constexpr NumberType kNumberTypes[] = {NumberType::float32, NumberType::bfloat16,
                                       NumberType::float16};

inline int64_t count_of(const int64_t* sizes, int64_t dimensions) {
  int64_t count = 1;
  for (int64_t i = 0; i < dimensions; i++) count *= sizes[i];
  return count;
}

// An array on the CPU, of float32 or of a half type; anything else has no numbers.
struct Array {
  const float* data;  // of float32, else null
  int64_t dimensions;
  const int64_t* sizes;
  const int64_t* strides;            // null where it is dense
  const uint16_t* halves = nullptr;  // of a half type, else null
  NumberType type = NumberType::float32;

  // Array of `numbers`, which are of that type.
  static Array of(const void* numbers, NumberType type, int64_t dimensions, const int64_t* sizes,
                  const int64_t* strides) {
    Array array{nullptr, dimensions, sizes, strides, nullptr, type};
    if (type == NumberType::float32) {
      array.data = static_cast<const float*>(numbers);
    } else {
      array.halves = static_cast<const uint16_t*>(numbers);
    }
    return array;
  }

  int64_t count() const { return count_of(sizes, dimensions); }
  bool exists() const { return data != nullptr || halves != nullptr; }
  bool is_dense() const { return exists() && strides == nullptr; }
  bool has_shape(std::initializer_list<int64_t> shape) const {
    return exists() && dimensions == static_cast<int64_t>(shape.size()) &&
           std::equal(shape.begin(), shape.end(), sizes);
  }
  // Dense, and of float32.
  bool is_plain() const { return data != nullptr && strides == nullptr; }
  bool is_plain(std::initializer_list<int64_t> shape) const {
    return is_plain() && has_shape(shape);
  }
};

// Memory for the next output, of that shape, in the order y, h, c. It is the caller's. Swapped, it
// is dense with the first two of three dimensions in each other's place.
struct Allocator {
  void* (*allocate)(void* context, NumberType type, const int64_t* sizes, int64_t dimensions,
                    bool swapped);
  void* context;
  // For [D, N, width] of float32 that only a backward call will see; null where that is an output
  // like any other.
  void* (*allocate_saved)(void* context, const int64_t* sizes) = nullptr;

  float* operator()(std::initializer_list<int64_t> shape, bool swapped = false) const {
    return static_cast<float*>(of_type(NumberType::float32, shape, swapped));
  }
  uint16_t* halves(NumberType type, std::initializer_list<int64_t> shape,
                   bool swapped = false) const {
    return static_cast<uint16_t*>(of_type(type, shape, swapped));
  }
  int64_t* integers(std::initializer_list<int64_t> shape) const {
    return static_cast<int64_t*>(of_type(NumberType::int64, shape, false));
  }
  float* saved(int64_t directions, int64_t count, int64_t width) const {
    const int64_t sizes[] = {directions, count, width};
    return static_cast<float*>(allocate_saved
                                   ? allocate_saved(context, sizes)
                                   : allocate(context, NumberType::float32, sizes, 3, false));
  }

 private:
  void* of_type(NumberType type, std::initializer_list<int64_t> shape, bool swapped) const {
    return allocate(context, type, shape.begin(), static_cast<int64_t>(shape.size()), swapped);
  }
};

// The strides of memory that it gives.
inline void set_strides(const int64_t* sizes, int64_t dimensions, bool swapped, int64_t* strides) {
  for (int64_t i = dimensions - 1, stride = 1; i >= 0; i--) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  if (swapped) {
    strides[0] = sizes[2];
    strides[1] = sizes[0] * sizes[2];
  }
}

struct States {
  const Array* h;  // null for zeros
  const Array* c;  // beside h where the cell has one, else null
};

// The arguments as torch.nn's modules take them; x and states may be strided; `weights` as in
// ForwardCallOf, layer after layer.
struct InferCall {
  int64_t cell;
  Array x;
  const Array* weights;
  int64_t weight_count;
  States states;
  // What is computed with and returned. It is the type of all arrays, but with autocast, which
  // rounds those of float32 to it.
  NumberType type;
  bool autocast;

  // Numbers of all gates of a layer's rows, about.
  int64_t gates() const {
    const int64_t width = std::max<int64_t>(1, x.sizes[x.dimensions - 1]);
    return x.count() / width * weights[1].sizes[0];
  }
};

struct LayersCall : InferCall {
  int64_t layers, directions;
  bool time_first;
};

struct CellCall : InferCall {
  int64_t hidden_size;
};

// A step of a stack whose weights were packed in advance (fused_rnn/streaming.py), or several.
struct StepCall {
  Array packed;
  int64_t cell, layers, input, hidden, output;
  bool bias;
  int64_t per_word;  // numbers of the matrices in a float: 1, of BFloat16 2, bytes 4
  Array x;           // [B, I], or [T, B, I] for so many steps
  States states;     // [L, B, P], [L, B, H]
};

// How a piece is saved for backward, see pieces.h: row, start, length, and the flags as bits.
constexpr int64_t kPieceNumbers = 4;

// Which steps a padded batch has: `lengths` [B] and `resets`, or one of them, and in a backward
// call the `pieces` that they cut it into.
struct Masks {
  const int64_t* lengths;
  const bool* resets;
  const int64_t* pieces;  // [piece_count, kPieceNumbers]
  int64_t piece_count;
  bool batch_first;  // whether resets, x and y have batch rows before timesteps

  bool any() const { return lengths || resets || pieces; }
};

// A layer in training, or a cell's timestep (csrc/cpu/train.cpp).
struct TrainCall : InferCall {
  int64_t directions;
  const int64_t* batch_sizes;  // [timesteps] of packed rows, else null
  int64_t timesteps;
  Masks masks;     // of a padded batch
  bool save;       // whether there will be a backward call
  bool all_cells;  // whether c after every step is wanted whatever follows; not with masks
};

struct TrainBackwardCall : TrainCall {
  const Array *grad_y, *grad_h_n, *grad_c_n;  // null: zero
  const Array* grad_cells;                    // [D, N, H] of float32, or null: zero; not with masks
  const Array *y, *gates, *cells;             // as saved; null where the cell has none
  int64_t needs;                              // a bit for x, h0, c0 and each of the weights
};

// Each gives y (but for infer_cell), h_n and, where the cell has it, c_n.
// False, and nothing was allocated: the call is out of the ordinary, and not for here.
bool infer_layers(const LayersCall& call, const Allocator& allocate);
bool infer_cell(const CellCall& call, const Allocator& allocate);
// Gives y, h_n (not of a timestep), c_n and, to be saved, gates and cells, those that the cell has,
// and the pieces that masks cut a batch into. cells are c after every step, [D, N, H].
bool train_layer(const TrainCall& call, const Allocator& allocate);
// Gives the gradients that are needed.
bool train_layer_backward(const TrainBackwardCall& call, const Allocator& allocate);
// Raises where an argument does not fit.
void step(const StepCall& call, const Allocator& allocate);

// For who has only the loaded library: the same, but false where they raise.
struct DirectCalls {
  bool (*infer_layers)(const LayersCall&, const Allocator&);
  bool (*infer_cell)(const CellCall&, const Allocator&);
  bool (*step)(const StepCall&, const Allocator&);
  bool (*train_layer)(const TrainCall&, const Allocator&);
  bool (*train_layer_backward)(const TrainBackwardCall&, const Allocator&);
};

}  // namespace fused_rnn
