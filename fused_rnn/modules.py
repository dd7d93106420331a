"""RNN, GRU and LSTM: torch.nn's contract over the functions of `functional`.

Constructors, parameters, initialisation, state_dict, repr and pickling are torch.nn.RNNBase's
own; `forward` is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Unpack

from . import checks, compiled, direct, functional, looks, symbolic, torchscript, training
from .cells import CELL_OF_MODE, CELLS, Cell, zero_states
from .regularised import (
    NAMES,
    PLAIN,
    Regularisation,
    RegularisationOptions,
    RegularisedLayers,
)
from .stateful import StatefulLayers


class _RecurrentLayers(
    torchscript.NotScriptable, StatefulLayers, RegularisedLayers, torch.nn.RNNBase
):
    """What RNN, GRU and LSTM share: every form of input torch.nn takes.

    A subclass of RNNBase and not of nn.LSTM and friends: torch.compile breaks the graph at
    those and their subclasses.
    """

    _torch_class: type[torch.nn.RNNBase]

    # Of the class too, for modules that were made before there was such an option.
    recompute = False

    def __init__(
        self,
        *args,
        recompute: bool = False,
        stateful: bool = False,
        **kwargs,
    ) -> None:
        checks.flags(recompute=recompute, stateful=stateful)
        options = Regularisation(**{name: kwargs.pop(name) for name in NAMES if name in kwargs})
        super().__init__(*args, **kwargs)
        # The one flag of torch.nn's that its constructor takes as it comes; a call then does not.
        checks.flags(bidirectional=self.bidirectional)
        self._regularise(options)
        if recompute:
            self.recompute = True
        if stateful:
            self._start_carrying()

    def extra_repr(self) -> str:
        options = {"recompute": self.recompute, "stateful": self._carries()}
        extras = [f"{name}=True" for name, given in options.items() if given]
        return ", ".join([super().extra_repr(), *extras, *self._regularisation.given()])

    def flatten_parameters(self) -> None:
        """Does nothing: weights are read where they lie. Here because torch.nn has it."""

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # Bound to this module: a copy would run it. Module leaves it out, RNNBase does not.
        state.pop("_compiled_call_impl", None)
        return state

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_hx: Any = None,
        return_states: bool = False,
    ) -> Any:
        """Runs the layers over a sequence.

        T timesteps, B batch, I input_size, H hidden_size, P proj_size of an LSTM that has one, else
        H, L num_layers, D directions. All tensors but `lengths` and `resets` have the dtype and
        device of the parameters; under autocast they may have others, and the results have
        autocast's dtype.

        Args:
            input: [T, B, I] ([B, T, I] with `batch_first`), [T, I] unbatched, or a PackedSequence
                of rows [N, I].
            hx: the states to start from, [D*L, B, P] ([D*L, P] unbatched), of an LSTM a pair with c
                [D*L, B, H]; None for zeros, or for the last call's where `stateful`.
            lengths: integers [B] from 0 to T: row b ends before step lengths[b].
            resets: bool [T, B] ([B, T] with `batch_first`, [T] unbatched): before which steps a row
                starts afresh.
            reset_hx: shaped as hx: the states it then starts from; None for zeros.
            return_states: whether to give the states of every layer and step as well.

        Returns:
            output [T, B, D*P], laid out as the input is, and h_n [D*L, B, P], of an LSTM
            (h_n, c_n), c_n [D*L, B, H]. With `return_states` also a tuple (h,), or (h, c), of
            [D*L, T, B, P or H] ([D*L, B, T, ...] with `batch_first`, [D*L, N, ...] for a
            PackedSequence).

        Raises:
            TypeError: an argument is of another type, or `lengths` or `resets` of another dtype.
            ValueError: input has another dtype or number of dimensions; `lengths` or `resets`
                come with what has its own, or `reset_hx` without `resets`.
            RuntimeError: shapes, devices, states or values of `lengths` do not fit.
            UnsupportedProblemError: no backend takes the layer, or not the one that was forced.

        Example:
            >>> layer = GRU(10, 20, batch_first=True)
            >>> x, resets = torch.randn(3, 5, 10), torch.zeros(3, 5, dtype=torch.bool)
            >>> resets[0, 2] = True
            >>> output, h_n = layer(x, resets=resets)
            >>> output.shape, h_n.shape
            (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
            >>> output, h_n, (h,) = layer(x, lengths=torch.tensor([2, 5, 4]), return_states=True)
            >>> h.shape
            torch.Size([1, 3, 5, 20])
        """
        carries = self.stateful and self._carries()
        if carries:
            self._check_carries()
            hx = self._carried(input) if hx is None else hx
        plain = reset_hx is None
        options = self._regularisation
        plain = plain and (options is PLAIN or options.is_idle(self.training))
        looked = []  # see `looks`
        result = None
        if plain:
            result = self._shortest(looked, input, hx, lengths, resets, return_states)
        if result is None:
            masks = {"lengths": lengths, "resets": resets, "reset_hx": reset_hx}
            result = self._forward(looked, input, hx, masks, return_states)
        if carries and not symbolic.is_proxy(result):
            self._carry(result[1])
        return result

    def _shortest(self, looked, input, hx, lengths, resets, return_states):
        """A call without reset_hx and regularisation in the way that is for it, or None."""
        more = lengths is not None or resets is not None or return_states
        if torch.compiler.is_compiling():
            return None if more else compiled.layers(self, looked, input, hx)
        if more or torch.is_grad_enabled() or type(input) is PackedSequence:
            return training.layers(self, looked, input, hx, lengths, resets, return_states)
        return direct.layers(self, looked, input, hx)

    def _traced(self, looked, input, hx, masks: dict[str, Any], return_states: bool):
        own = return_states or any(mask is not None for mask in masks.values())
        regularised = not self._regularisation.is_idle(self.training)
        if own or regularised or not self._cell().in_torch:
            options = "".join(f", {option}" for option in self._regularisation.changes())
            raise RuntimeError(
                f"torch.jit.trace of fused_rnn.{self._torch_class.__name__}: expected no lengths, "
                f"resets, reset_hx, return_states and reset_after=False{options}, which torch.nn "
                "does not have; use torch.export"
            )
        names = self._flat_weights_names
        values = dict(zip(names, looks.attributes(self, names, looked), strict=True))
        return torchscript.traced(self, self._torch_class, values, input, hx)

    def _forward(self, looked, input, hx, masks: dict[str, Any], return_states: bool):
        """Any call, the general way."""
        if symbolic.is_proxy(input):
            given = {"hx": hx, **masks, "return_states": return_states or None}
            return symbolic.node(self, input, given)
        cell = self._cell()
        if torch.jit.is_tracing():
            return self._traced(looked, input, hx, masks, return_states)
        checks.layer_input(input, self._get_name())
        packed = isinstance(input, PackedSequence)
        batched = packed or input.dim() == 3
        if hx is not None:
            hx = checks.states(hx, cell.has_c)
            checks.state_dimensions(hx, batched)
        run_batched = self._run_packed if packed else self._run
        run = run_batched if batched else self._run_unbatched
        output, states, *histories = run(cell, looked, input, hx, masks, return_states)
        return output, states if cell.has_c else states[0], *histories

    def _run_unbatched(self, cell, looked, input, hx, masks, return_states):
        batch_dim = 0 if self.batch_first else 1
        if masks["lengths"] is not None:
            raise ValueError("lengths: expected none with unbatched input, which has one sequence")
        if masks["resets"] is not None:
            checks.is_dense_tensor(masks["resets"], "resets")
            masks["resets"] = masks["resets"].unsqueeze(batch_dim)
        if masks["reset_hx"] is not None:
            given = checks.states(masks["reset_hx"], cell.has_c, "reset_hx")
            checks.state_dimensions(given, False, "reset_hx")
            given = tuple(state.unsqueeze(1) for state in given)
            masks["reset_hx"] = given if cell.has_c else given[0]
        hx = None if hx is None else tuple(state.unsqueeze(1) for state in hx)
        output, states, *histories = self._run(
            cell, looked, input.unsqueeze(batch_dim), hx, masks, return_states
        )
        return (
            output.squeeze(batch_dim),
            tuple(state.squeeze(1) for state in states),
            *(tuple(h.squeeze(1 + batch_dim) for h in history) for history in histories),
        )

    def _run_packed(self, cell, looked, input: PackedSequence, hx, masks, return_states):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is not None and sorted_indices is not None:
            checks.permutable(hx, sorted_indices)
            hx = tuple(state.index_select(1, sorted_indices) for state in hx)
        elif hx is None and sorted_indices is not None and torch.compiler.is_compiling():
            hx = self._zero_states(cell, data, sorted_indices.shape[0])
        output, states, *histories = self._run(
            cell, looked, data, hx, masks, return_states, batch_sizes
        )
        if unsorted_indices is not None:
            states = tuple(state.index_select(1, unsorted_indices) for state in states)
        output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return output, states, *histories

    def _zero_states(self, cell: Cell, data: Tensor, batch_size: int) -> tuple[Tensor, ...]:
        """What None stands for. A compiler needs to know the batch size without looking at the
        values of batch_sizes, or it breaks its graph."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        output = self.proj_size or self.hidden_size
        return zero_states(cell, data, (layers, batch_size), output, self.hidden_size)

    def _run(self, cell, looked, input, hx, masks, return_states, batch_sizes=None):
        if hx is not None and not cell.has_c:
            hx = hx[0]
        output, states, *histories = functional.recurrent(
            cell.name,
            input,
            hx,
            self._weights(looked),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            batch_first=self.batch_first,
            batch_sizes=batch_sizes,
            return_states=return_states,
            recompute=self.recompute,
            general=self._general_scan(looked),
            **masks,
        )
        return output, states if cell.has_c else (states,), *histories

    def _cell(self) -> Cell:
        return CELL_OF_MODE[self.mode]


_NO_PROJECTION = "proj_size argument is only supported for LSTM, not RNN or GRU"


class RNN(_RecurrentLayers):
    r"""Elman layers, h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu for tanh.

    A drop-in replacement for `torch.nn.RNN`: same arguments, parameters, initialisation
    from the same seed, and results.

    All masks of a call are drawn by torch's global generator on the way: weight dropout's for all
    layers, then layer by layer and direction by direction recurrent dropout's and zoneout's for h
    and for c, and after each layer that of `dropout`. The three probabilities can be changed later,
    as attributes, and so can `dropout` and `recompute`.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        num_layers: layers stacked on each other, L.
        nonlinearity: "tanh" or "relu".
        bias: whether to add b_ih and b_hh.
        batch_first: whether input and output are [B, T, ...] instead of [T, B, ...].
        dropout: probability of zeroing elements between layers, in training.
        bidirectional: whether to run a second set of weights from the last timestep to the
            first; D is then 2, else 1.
        recompute: whether backward computes again what forward would otherwise have to keep
            for it: less memory, more time. An RNN has nothing to keep but its output.
        stateful: whether a call without hx goes on where the call before it ended. The states
            are kept detached; they move with the module and are not in its state_dict.
            `reset_states()` forgets them. To be chosen here: as an attribute only False, which
            turns it off, means something later.
        recurrent_dropout: probability p, in training, of dropping a unit of h from the product
            W_hh h: W_hh (m * h_{t-1}), m 0 or 1/(1-p), drawn once a call for each row of the
            batch and unit, the same at all steps and for all gates (Gal and Ghahramani 2016 with
            tied weights). What goes past the product, as z_t * h_{t-1} of a GRU, is h itself.
            Keras' argument of that name differs in that each gate has a mask of its own. Runs on
            the CPU and Triton kernels.
        zoneout: probability p, in training, that a unit keeps its old state instead of taking
            the new one, drawn for each step (Krueger et al. 2017). In eval mode the expectation,
            p * h_{t-1} + (1 - p) * h_t. Runs on the CPU and Triton kernels.
        weight_dropout: probability p, in training, of dropping an element of W_hh for a whole
            call; the others are divided by 1 - p (Merity et al. 2018). Runs on every kernel.
        init: "uniform" as torch.nn has it, or "orthogonal": W_hh orthogonal (Saxe et al. 2014),
            W_ih Glorot uniform, both gate by gate, and biases zero.
        device, dtype: of the parameters.

    Inputs:
        input: [T, B, I] (or [B, T, I]), [T, I] unbatched, or a PackedSequence. The dtype, any
            floating-point one of 16 bits or more, is the parameters', and the results'.
        hx: [D*L, B, H] ([D*L, H] unbatched) initial states, or None for zeros.
        lengths: integers [B] from 0 to T, in any order: row b ends before step lengths[b]. Its
            h_n is the state at its own end, its output after that is zero, and the reverse
            direction starts at its own end. Nothing past the end is read.
        resets: bool [T, B] ([B, T] with `batch_first`, [T] unbatched): before each such step the
            row's state becomes zero, as if the row began there. The reverse direction runs
            through each piece between resets on its own.
        reset_hx: shaped like hx: the states after a reset, instead of zeros.
        return_states: whether to return the states of every layer and step as well.

    Returns:
        output: [T, B, D*H], laid out as the input is; a PackedSequence for one.
        h_n: [D*L, B, H] ([D*L, H] unbatched) the states after the last timestep.
        states, with `return_states`: a tuple (h,) of [D*L, T, B, H] ([D*L, B, T, H] with
            `batch_first`, [D*L, T, H] unbatched, [D*L, N, H] in the order of the rows of a
            PackedSequence).

    Raises:
        TypeError: an argument of the constructor or of a call is of another type.
        ValueError: an option has another value than those above; input has another dtype or
            number of dimensions.
        RuntimeError: shapes, devices or states do not fit.
        UnsupportedProblemError: no backend takes the layer, or not the one that was forced.

    Example:
        >>> layer = RNN(10, 20, num_layers=2)
        >>> output, h_n = layer(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> output, h_n = layer(torch.randn(5, 3, 10), lengths=torch.tensor([2, 5, 0]))
        >>> output[2:, 0].abs().max()
        tensor(0., grad_fn=<MaxBackward1>)
    """

    _torch_class = torch.nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        recompute: bool = False,
        stateful: bool = False,
        **options: Unpack[RegularisationOptions],
    ) -> None:
        _reject(options, "RNN")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh' or 'relu'."
            )
        # torch.nn.RNN has the attribute too; Module.__init__ has not run, so set it plainly.
        object.__setattr__(self, "nonlinearity", nonlinearity)
        super().__init__(
            f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first,
            dropout, bidirectional, device=device, dtype=dtype, recompute=recompute,
            stateful=stateful, **options,
        )  # fmt: skip


class GRU(_RecurrentLayers):
    r"""Gated recurrent units (Cho et al. 2014), the reset gate after the matrix product.

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
    z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
    n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    A drop-in replacement for `torch.nn.GRU`. Arguments are those of `RNN`, without
    `nonlinearity`, and

    Args:
        reset_after: without it the reset gate comes before the product, as in the first paper
            and in much teaching code: n_t = tanh(W_in x_t + b_in + W_hn (r_t * h_{t-1}) + b_hn).
        layer_norm: whether to normalise the products (Ba et al. 2016): W_ih x by LN(W_ih x), and
            W_hh h likewise, r and z together, n by itself. LN(v) = g * (v - mean) / sqrt(var +
            1e-5) over the units, with gains g of its own for each; biases come after it. The
            gains are the parameters ln_ih_weight_l0 and ln_hh_weight_l0 [3*H], and so on. Runs on
            the CPU and Triton kernels.

    z_t keeps the old state, here as in torch.nn. Where a text has h_t = z_t * n_t +
    (1 - z_t) * h_{t-1}, the rows of its z, of both weights and biases, change their sign.

    Inputs:
        input, hx, lengths, resets, reset_hx, return_states: as for `RNN`; input [T, B, I] and hx
            [D*L, B, H] in the parameters' dtype, any floating-point one of 16 bits or more.

    Returns:
        output: [T, B, D*H], laid out as the input is.
        h_n: [D*L, B, H].
        states, with `return_states`: (h,), of [D*L, T, B, H].

    Raises:
        TypeError: an argument is of another type.
        ValueError: an option has a value that it cannot have; input has another dtype or number of
            dimensions.
        RuntimeError: shapes, devices or states do not fit.
        UnsupportedProblemError: no backend takes the layer, or not the one that was forced.

    Example:
        >>> layer = GRU(10, 20, batch_first=True, bidirectional=True)
        >>> output, h_n = layer(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 40]), torch.Size([2, 3, 20]))
    """

    _torch_class = torch.nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        reset_after: bool = True,
        recompute: bool = False,
        stateful: bool = False,
        **options: Unpack[RegularisationOptions],
    ) -> None:
        _reject(options, "GRU")
        checks.flags(reset_after=reset_after)
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype, recompute=recompute, stateful=stateful, **options,
        )  # fmt: skip
        if not reset_after:
            self.mode = CELLS["gru_reset_before"].torch_mode

    @property
    def reset_after(self) -> bool:
        return self.mode == "GRU"

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class LSTM(_RecurrentLayers):
    r"""Long short-term memory (Hochreiter and Schmidhuber 1997), optionally projected
    (Sak et al. 2014).

    i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
    f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
    g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
    o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
    c_t = f_t * c_{t-1} + i_t * g_t
    h_t = o_t * tanh(c_t), times W_hr where proj_size > 0

    A drop-in replacement for `torch.nn.LSTM`. Arguments are those of `RNN`, with these
    differences.

    Args:
        proj_size: if positive, the size P < H of the states h and of the output; else P is H.
        zoneout: also a pair, the probabilities for h and for c. With one number it is that of
            both. h is made from the new c, whether c keeps its old value or not.
        layer_norm: as for :class:`GRU`, all gates together, and h_t = o_t * tanh(LN(c_t)), with
            the parameters ln_ih_weight_l0, ln_hh_weight_l0 [4*H], and ln_c_weight_l0 and (with
            biases) ln_c_bias_l0 [H].
        peepholes: whether gates see c (Gers et al. 2002, Graves 2013): p_i * c_{t-1} is added
            inside i_t, p_f * c_{t-1} inside f_t, p_o * c_t inside o_t. The parameter
            weight_peephole_l0 [3*H] has p_i, p_f, p_o. Runs on the CPU and Triton kernels.
        forget_bias: what the bias of f starts at, in b_if, with b_hf zero (Gers et al. 2000;
            1.0 in Jozefowicz et al. 2015).

    Inputs:
        input: [T, B, I], as for `RNN`, in the parameters' dtype, any floating-point one of 16 bits
            or more.
        hx: a pair (h_0 [D*L, B, P], c_0 [D*L, B, H]), or None for zeros; reset_hx likewise.
        lengths, resets, return_states: as for `RNN`.

    Returns:
        output: [T, B, D*P], laid out as the input is.
        (h_n, c_n): [D*L, B, P] and [D*L, B, H].
        states, with `return_states`: (h, c), of [D*L, T, B, P] and [D*L, T, B, H].

    Raises:
        TypeError: an argument is of another type, as hx that is no pair.
        ValueError: an option has a value that it cannot have, as a P of H or more; input
            has another dtype or number of dimensions.
        RuntimeError: shapes, devices or states do not fit.
        UnsupportedProblemError: no backend takes the layer, or not the one that was forced.

    Example:
        >>> layer = LSTM(10, 20, proj_size=5)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 5]), torch.Size([1, 3, 5]), torch.Size([1, 3, 20]))
    """

    _torch_class = torch.nn.LSTM

    # Methods that torch.nn.LSTM has beyond its base. Ours has no use for them, but subclasses may,
    # and so has torch.nn's forward where somebody wrapped that before `replace`.
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args
    permute_hidden = torch.nn.LSTM.permute_hidden

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        recompute: bool = False,
        stateful: bool = False,
        **options: Unpack[RegularisationOptions],
    ) -> None:
        _reject(options, "LSTM")
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, device=device, dtype=dtype, recompute=recompute,
            stateful=stateful, **options,
        )  # fmt: skip


def _reject(options: Mapping[str, Any], owner: str) -> None:
    """Refuses keyword arguments that no option has."""
    if "proj_size" in options:
        raise ValueError(_NO_PROJECTION)
    for name in options:
        if name not in NAMES:
            raise TypeError(f"{owner}: unexpected keyword argument {name!r}")


def make_module(cell: str, *args, **options) -> RNN | GRU | LSTM:
    """A layer module for a name in `cells.CELLS`; the rest as its class takes it."""
    if cell == "lstm":
        return LSTM(*args, **options)
    if "gru" in cell:
        return GRU(*args, reset_after=cell == "gru", **options)
    return RNN(*args, nonlinearity=cell.removeprefix("rnn_"), **options)
