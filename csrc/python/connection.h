// What every direct call asks before it runs, and how.
#pragma once

#include "../cpu/layer_plan.h"
#include "tensors.h"

#if defined(FUSED_RNN_DIRECT_CALLS)

namespace fused_rnn {

// Set once by `connect`; the objects are never given back.
struct Connection {
  const DirectCalls* calls;
  // Functions that give something true where a call is to do more than compute numbers; first those
  // that matter to a step of packed weights too.
  PyObject* guards;
  Py_ssize_t step_guards;
  PyObject* is_excused;    // whether what a guard has found changes nothing
  PyObject* cells;         // from torch.nn's modes to the cells' numbers
  PyObject* any_autocast;  // whether it is on for any device
  // The place in kNumberTypes of what it makes CPU tensors, 0 for nothing; -1 for another type.
  PyObject* autocast_type;
};
extern Connection connected;

bool read(PyObject* object, int64_t& value);
bool read(PyObject* object, bool& value);

// Whether the next arguments are numbers or flags, which `values` then hold.
template <class... Values>
bool read_all(PyObject* const* args, Values&... values) {
  return (read(*args++, values) && ...);
}

// Whether none of the first guards has anything against it: 1, 0, or -1 with an error set.
int is_time(Py_ssize_t guards);
inline int is_time() { return is_time(PyTuple_GET_SIZE(connected.guards)); }

// Whether FUSED_RNN_BACKEND leaves the choice open, or asks for this library. Only with Python's
// lock, which whoever changes os.environ has, too; where there is none a guard asks in Python.
bool cpu_is_welcome();

// Whether autocast leaves CPU tensors alone or makes them a type that there is here.
bool read_autocast(InferCall& call);

// Floating-point operations, about: every weight meets every row.
double flops_of(const InferCall& call);
double flops_of(const StepCall& call);

// The arguments keep all arrays alive. Where one thread does all, which takes some 10 us, other
// threads of Python may wait: giving its lock away and getting it back takes a tenth of a
// microsecond. A parallel region's threads might want that lock.
template <class Call>
bool run(bool (*function)(const Call&, const Allocator&), const Call& call, Outputs& outputs) {
  if (flops_of(call) < kSerialFlops) return function(call, outputs.allocator());
  bool done = false;
  Py_BEGIN_ALLOW_THREADS;
  done = function(call, outputs.allocator());
  Py_END_ALLOW_THREADS;
  return done;
}

}  // namespace fused_rnn

#endif
