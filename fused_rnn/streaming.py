"""Some timesteps of a recurrent module at a time, with as little as possible around the products.

On the CPU in float32 the weights of all layers are packed once into the layout that the kernels
read fastest, and a step is a single call (csrc/cpu/stepper.cpp), past torch's dispatcher where
nobody needs that (`direct`). Everything else goes through a frozen copy of the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import checks, direct, dispatch, flops, looks, modules
from .cells import CELL_OF_MODE, CELLS, Cell, equal_parts
from .convert import from_torch
from .native import cpu_library_error
from .once import once
from .problem import in_memory

# As in csrc/cpu/kernels.h.
_WIDTH = 16
# Of a packed matrix, how many numbers are in the place of one float.
_PER_WORD = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
# Bounds that csrc/cpu/stepper.cpp has too.
_MAX_SIZE, _MAX_BYTES = 2**19, 2**17
_PLAIN = (modules.RNN, modules.GRU, modules.LSTM)
_TORCH = (torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM)


class Stepper:
    """What `stepper` returns.

    Attributes:
        input_size, hidden_size, num_layers: those of the module.
        output_size: P, the features of y: proj_size where there is a projection, else hidden_size.
        dtype, device: those of the module's weights, of x and states.
        weight_dtype: that of the weights as they are kept.
        packed: whether steps run from packed weights, not through a copy of the module.
    """

    packed = False

    def __init__(self, module: torch.nn.RNNBase, cell: Cell) -> None:
        weight = getattr(module, module._flat_weights_names[0])
        self.input_size, self.hidden_size = module.input_size, module.hidden_size
        self.num_layers, self.output_size = module.num_layers, module.proj_size or self.hidden_size
        self.dtype, self.device = weight.dtype, weight.device
        self.weight_dtype = weight.dtype
        self._cell_name = cell.name

    def __call__(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def __repr__(self) -> str:
        how = "packed" if self.packed else "through the module"
        if self.weight_dtype != self.dtype:
            how += f", weight_dtype={self.weight_dtype}"
        sizes = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        projected = self.output_size != self.hidden_size
        projection = f", proj_size={self.output_size}" if projected else ""
        return f"Stepper({self._cell_name}, {sizes}{projection}, {how})"

    def _checked(self, x: Any, state: Any) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """x and the states, if they fit.

        Raises:
            TypeError: x or a state is no tensor.
            RuntimeError: its shape, dtype or device does not fit.
        """
        cell = CELLS[self._cell_name]
        checks.is_dense_tensor(x, "x")
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size or 0 in x.shape:
            raise RuntimeError(
                f"x: expected shape [B, {self.input_size}] or [T, B, {self.input_size}], of at "
                f"least one row, got {list(x.shape)}"
            )
        self._matches(x, "x")
        if state is None:
            return x.detach(), None
        states = checks.states(state, cell.has_c, "state")
        for i, (given, size) in enumerate(
            zip(states, (self.output_size, self.hidden_size), strict=False)
        ):
            name = f"state[{i}]" if cell.has_c else "state"
            expected = [self.num_layers, x.shape[-2], size]
            if list(given.shape) != expected:
                raise RuntimeError(f"{name}: expected shape {expected}, got {list(given.shape)}")
            self._matches(given, name)
        return x.detach(), tuple(given.detach() for given in states)

    def _matches(self, tensor: Tensor, name: str) -> None:
        for what in ("dtype", "device"):
            expected, got = getattr(self, what), getattr(tensor, what)
            if expected != got:
                raise RuntimeError(f"{name}: expected {what} {expected} as the weights, got {got}")


class _Packed(Stepper):
    """With the CPU library's kernel, from weights packed once."""

    packed = True

    def __init__(self, module: torch.nn.RNNBase, cell: Cell, weight_dtype: torch.dtype) -> None:
        super().__init__(module, cell)
        self.weight_dtype = weight_dtype
        weights = [getattr(module, name).detach() for name in module._flat_weights_names]
        layers = equal_parts(weights, self.num_layers)
        with torch.inference_mode(False), torch.no_grad():
            self._weights = torch.cat(
                [_packed_layer(cell, layer, self.weight_dtype) for layer in layers]
            )
        self._bias = bool(module.bias)
        self._bind()

    def _bind(self) -> None:
        """The operator with all that stays the same."""
        cell = CELLS[self._cell_name]
        operator, sizes = _operator(cell.has_c), [] if cell.has_c else [cell.index]
        sizes += self.num_layers, self.input_size, self.hidden_size, self.output_size
        options = self._bias, _PER_WORD[self.weight_dtype]
        self._step = partial(operator, self._weights, *sizes, *options)
        sizes = sizes if not cell.has_c else [cell.index, *sizes]
        prepared = direct.calls().prepare_step(self._weights, *sizes, *options)
        self._direct = prepared or direct.no_answer

    def __call__(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if not is_dynamo_compiling():
            result = self._direct(x, state)
            if result is not None:
                return result
        # Somebody watches, or something is odd or wrong, and there is the time to hear about it.
        return self._by_operator(x, state)

    def _by_operator(self, x: Any, state: Any) -> tuple[Tensor, Any]:
        has_c = CELLS[self._cell_name].has_c
        x, states = self._checked(x, state)
        given = map(_dense, states) if states else (None,) * (1 + has_c)
        y, *new = self._step(_dense(x), *given)
        return y, tuple(new) if has_c else new[0]

    def __getstate__(self) -> dict[str, Any]:
        bound = ("_step", "_direct")
        return {name: value for name, value in vars(self).items() if name not in bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if (error := cpu_library_error()) is not None:
            raise RuntimeError(f"a Stepper with packed weights needs the CPU library: {error}")
        vars(self).update(state)
        self._bind()


class _General(Stepper):
    """Through a frozen copy of the module."""

    def __init__(self, module: torch.nn.RNNBase, cell: Cell) -> None:
        super().__init__(module, cell)
        self._module = copy.deepcopy(module).eval().requires_grad_(False)
        if getattr(module, "stateful", False):
            self._module.stateful = False  # the state is the caller's here

    def __call__(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        x, states = self._checked(x, state)
        if states is not None and not CELLS[self._cell_name].has_c:
            states = states[0]
        steps = x if x.dim() == 3 else x.unsqueeze(0)
        batch_first = self._module.batch_first
        with torch.no_grad():
            y, states = self._module(steps.transpose(0, 1) if batch_first else steps, states)
        y = y.transpose(0, 1) if batch_first else y
        return y if x.dim() == 3 else y.squeeze(0), states


def stepper(module: torch.nn.RNNBase, *, weight_dtype: torch.dtype | None = None) -> Stepper:
    """A function of one timestep for a stream, or of some: the module's weights, frozen, and
    nothing else.

    Args:
        module: an RNN, GRU or LSTM of ours or of torch.nn, in one direction, with any number of
            layers. Its weights are copied: later changes of the module do not reach the stepper.
            Nothing is dropped out, as in eval mode, and `batch_first` has no meaning. Where steps
            run from packed weights, hooks are not called, but for those that compute weights:
            once, here. Other steps call a copy of the module, with its hooks.
        weight_dtype: `torch.bfloat16` keeps the matrices of a float32 module in half the memory,
            which is what a step's time goes to: as if they had been rounded to 8 bits of
            precision. All arithmetic, biases, states, x and y stay float32. `torch.int8` keeps
            whole numbers from -127 to 127 and a scale of each row of a matrix, and multiplies
            by such numbers, too: those of every row of x and h, made anew in each step with a
            scale of their own. Sums are exact; gates, biases, states, x and y are float32. A row
            with a number that is not finite gives NaN. None for the module's own dtype.

    Returns:
        A callable `y, state = step(x, state)`:

        - x: [B, I], or [T, B, I] for T timesteps, to the bit what T calls give.
        - state: shaped as the module's hx, [L, B, H], for LSTM a pair ([L, B, P], [L, B, H]); None
          at the start, for zeros. It is not written to: the new state has memory of its own.
        - y: [B, H], or [B, P] with a projection; [T, B, ...] for T timesteps.

        x and the state have the dtype and device of the weights; no gradients are computed. It
        can be called from several threads, copied and pickled.

    float32 on the CPU runs from packed weights, in one operator call for all layers, and gives bit
    for bit what the module gives for a sequence, but where that sums in another order: in calls of
    up to 48 rows, and with AMX of 512 or more. Every other dtype and device, `reset_after=False`,
    `layer_norm`, `peepholes`, `zoneout`, subclasses, and a backend other than the CPU's chosen by
    `FUSED_RNN_BACKEND` or `backend`, run through a copy of the module: slower.

    Raises:
        TypeError: `module` is not a recurrent module.
        RuntimeError: its weights do not have the shapes that its sizes ask for.
        ValueError: it is bidirectional: the reverse direction begins at the end of the sequence;
            or `weight_dtype` is neither its dtype nor, where steps run from packed weights,
            bfloat16 or, of products of less than 2^17 numbers, int8.

    Example:
        >>> step = stepper(torch.nn.GRU(3, 4, num_layers=2))
        >>> y, state = step(torch.randn(1, 3))
        >>> for x in torch.randn(5, 1, 3):
        ...     y, state = step(x, state)
        >>> y.shape, state.shape
        (torch.Size([1, 4]), torch.Size([2, 1, 4]))
    """
    if not isinstance(module, (*_PLAIN, *_TORCH)):
        raise TypeError(
            f"module: expected an RNN, GRU or LSTM of fused_rnn or torch.nn, got "
            f"{type(module).__name__}"
        )
    if module.bidirectional:
        raise ValueError(
            "module: expected one direction, got a bidirectional "
            f"{type(module).__name__}, whose reverse direction begins at the sequence's end"
        )
    if type(module) in _TORCH:
        module = from_torch(module)
    cell = CELL_OF_MODE[module.mode]
    looks.refresh(module)
    checks.module_weights(module, cell)
    own = getattr(module, module._flat_weights_names[0]).dtype
    packs = _packs(module, cell)
    sizes = module.input_size, module.hidden_size
    allowed = (own, *(_PER_WORD if packs else ()))
    if packs and max(sizes) >= _MAX_BYTES:  # a sum of products might exceed its 32 bits
        allowed = tuple(dtype for dtype in allowed if dtype is not torch.int8)
    if weight_dtype is not None and weight_dtype not in allowed:
        raise ValueError(
            f"weight_dtype: expected {' or '.join(map(str, dict.fromkeys(allowed)))} for this "
            f"module{'' if packs else ', which has no packed weights'}, got {weight_dtype}"
        )
    if not packs:
        return _General(module, cell)
    return _Packed(module, cell, weight_dtype or own)


def _packs(module: torch.nn.RNNBase, cell: Cell) -> bool:
    if type(module) not in _PLAIN or not cell.in_torch:
        return False
    if not module._regularisation.is_idle(training=False):
        return False
    if cpu_library_error() is not None or dispatch.requested() not in ("", "cpu"):
        return False
    weights = [getattr(module, name) for name in module._flat_weights_names]
    sizes = module.input_size, module.hidden_size, module.num_layers
    return 0 < min(sizes) <= max(sizes) < _MAX_SIZE and all(
        w.is_cpu and w.dtype == torch.float32 for w in weights
    )


def _dense(tensor: Tensor) -> Tensor:
    # Compilers know no zeros without memory.
    return (tensor if torch.compiler.is_compiling() else in_memory(tensor)).contiguous()


def _packed_layer(cell: Cell, weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Everything of a layer, one after the other, as csrc/cpu/stepper.cpp expects it; the matrices
    in `dtype`, those of bytes with the scales of their rows behind them."""
    w_ih, w_hh, *rest = weights
    hidden = w_ih.shape[0] // cell.gates
    matrices = [(w_ih, cell.gates), (w_hh, cell.gates)]
    if len(rest) in (1, 3):
        matrices.append((rest[-1], 1))
    scales = []
    if dtype is torch.int8:
        quantised = [(*_quantised(weight), gates) for weight, gates in matrices]
        matrices = [(numbers, gates) for numbers, _, gates in quantised]
        scales = [_padded(scale) for _, scale, _ in quantised]
    parts = [*(_packed_matrix(weight, gates, dtype) for weight, gates in matrices), *scales]
    if len(rest) >= 2:
        b_ih, b_hh = rest[:2]
        if cell.gates_b_hn:
            # r multiplies the hidden side of n with its bias.
            parts.append(_padded(torch.cat((b_ih[: 2 * hidden] + b_hh[: 2 * hidden],
                                            b_ih[2 * hidden :]))))  # fmt: skip
            parts.append(_padded(b_hh[2 * hidden :]))
        else:
            parts.append(_padded(b_ih + b_hh))
    return torch.cat(parts)


def _packed_matrix(weight: Tensor, gates: int, dtype: torch.dtype) -> Tensor:
    """[gates*H, K] in panels of [K][gate][vector][16] with up to 4 vectors of units where there is
    one gate, else 1; zeros beyond the last unit. Of bfloat16 two that follow one another in K lie
    together, as one float, of int8 four, as bytes that are 128 more."""
    weight = F.pad(weight, (0, -weight.shape[1] % _PER_WORD[dtype])).to(dtype)
    if dtype is torch.int8:
        weight = (weight.to(torch.int16) + 128).to(torch.uint8)
    weight = weight.view(torch.float32)
    depth = weight.shape[1]
    units = weight.reshape(gates, -1, depth)
    units = F.pad(units, (0, 0, 0, -units.shape[1] % _WIDTH)).view(gates, -1, _WIDTH, depth)
    panels = units.split(4 if gates == 1 else 1, 1)
    return torch.cat([panel.permute(3, 0, 1, 2).flatten() for panel in panels])


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The whole numbers from -127 to 127 [R, K] and their scales [R] whose products are nearest to
    the weights; a row that is not finite gets NaN for its scale."""
    scale = weight.abs().amax(1) / 127
    numbers = weight / torch.where(scale == 0, 1, scale).unsqueeze(1)
    finite = torch.isfinite(scale)
    numbers = torch.where(finite.unsqueeze(1), numbers.round().clamp(-127, 127), 0)
    return numbers, torch.where(finite, scale, torch.nan)


def _padded(bias: Tensor) -> Tensor:
    return F.pad(bias, (0, -bias.shape[0] % _WIDTH))


def _operator(has_c: bool) -> Callable[..., Any]:
    """The library's operator of a step; the library has to be there."""
    _describe_operators()
    ops = torch.ops.fused_rnn_cpu
    return (ops.step_lstm if has_c else ops.step).default


@once
def _describe_operators() -> None:
    """Some versions of torch, 2.12 among them, take no second registration of a fake."""
    flops.register(torch.ops.fused_rnn_cpu.step, flops.step)
    flops.register(torch.ops.fused_rnn_cpu.step_lstm, flops.step_lstm)

    @torch.library.register_fake("fused_rnn_cpu::step")
    def _step(packed, cell, layers, input, hidden, output, bias, per_word, x, h, c=None):
        if x.device != packed.device:
            raise RuntimeError(f"x: expected device {packed.device} as the weights, got {x.device}")
        # As the kernel does, of which a graph would tell when it runs.
        if not all(t is None or t.is_contiguous() for t in (x, h, c)):
            raise RuntimeError("x, h, c: expected contiguous tensors")
        y = x.new_empty((*x.shape[:-1], output))
        return y, x.new_empty((layers, x.shape[-2], output))

    @torch.library.register_fake("fused_rnn_cpu::step_lstm")
    def _step_lstm(packed, layers, input, hidden, output, bias, per_word, x, h, c):
        sizes = layers, input, hidden, output
        y, h = _step(packed, CELLS["lstm"].index, *sizes, bias, per_word, x, h, c)
        return y, h, x.new_empty((layers, x.shape[-2], hidden))
