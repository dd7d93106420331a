"""Regularisation and initialisation that torch.nn's recurrent layers do not have.

    recurrent dropout     Gal and Ghahramani 2016, "A Theoretically Grounded Application of Dropout
                          in Recurrent Neural Networks"
    zoneout               Krueger et al. 2017, "Zoneout: Regularizing RNNs by Randomly Preserving
                          Hidden Activations"
    weight dropout        Merity et al. 2018, "Regularizing and Optimizing LSTM Language Models"
    layer normalisation   Ba et al. 2016, "Layer Normalization"
    peepholes             Gers et al. 2002, "Learning Precise Timing with LSTM Recurrent Networks";
                          Graves 2013, "Generating Sequences With Recurrent Neural Networks"
    forget bias           Gers et al. 2000, "Learning to Forget"; Jozefowicz et al. 2015
    orthogonal weights    Saxe et al. 2014, "Exact solutions to the nonlinear dynamics of learning
                          in deep linear neural networks"

What they compute is told at :class:`fused_rnn.RNN` and :class:`fused_rnn.LSTM`, and computed by
`general_scan`; weight dropout alone is a matter of W_hh, and runs on every kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, looks
from .cells import Cell, state_dtype
from .general_scan import Extras, GeneralScan
from .problem import EXTRAS


class RegularisationOptions(TypedDict, total=False):
    """Keyword arguments of the layers' constructors; see :class:`fused_rnn.RNN`."""

    recurrent_dropout: float  # 0
    zoneout: float | tuple[float, float]  # 0; for LSTM a pair of p_h and p_c, too
    weight_dropout: float  # 0
    layer_norm: bool  # False; GRU and LSTM
    peepholes: bool  # False; LSTM
    forget_bias: float | None  # None; LSTM
    init: str  # "uniform"


@dataclass(frozen=True)
class Regularisation:
    """The options of a module.

    Raises:
        TypeError: one has a wrong type. ValueError: it has a wrong value.
    """

    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_dropout: float = 0.0
    layer_norm: bool = False
    peepholes: bool = False
    forget_bias: float | None = None
    init: str = "uniform"

    def __post_init__(self) -> None:
        for name in ("recurrent_dropout", "weight_dropout"):
            self._set(name, checks.probability(name, getattr(self, name)))
        zoneout = self.zoneout
        if isinstance(zoneout, (tuple, list)):
            if len(zoneout) != 2:
                raise ValueError(
                    f"zoneout: expected a number or a pair (p_h, p_c), got {zoneout!r}"
                )
            pair = (checks.probability(f"zoneout[{i}]", p) for i, p in enumerate(zoneout))
            self._set("zoneout", tuple(pair))
        else:
            self._set("zoneout", checks.probability("zoneout", zoneout))
        checks.flags(layer_norm=self.layer_norm, peepholes=self.peepholes)
        if self.forget_bias is not None:
            self._set("forget_bias", checks.real_number("forget_bias", self.forget_bias))
            if not math.isfinite(self.forget_bias):
                raise ValueError(f"forget_bias: expected a finite number, got {self.forget_bias}")
        if not isinstance(self.init, str):
            raise TypeError(f"init: expected a str, got {type(self.init).__name__}")
        if self.init not in ("uniform", "orthogonal"):
            raise ValueError(f"init: expected 'uniform' or 'orthogonal', got {self.init!r}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def check(self, owner: str, cell: Cell, bias: bool) -> None:
        """The options suit the cell.

        Raises:
            ValueError: one does not.
        """
        if self.layer_norm and cell.name.startswith("rnn_"):
            raise ValueError(f"layer_norm: expected a GRU or an LSTM, got {owner}")
        if cell.has_c:
            if self.forget_bias is not None and not bias:
                raise ValueError("forget_bias: expected bias=True to go with it, got bias=False")
            return
        if isinstance(self.zoneout, tuple):
            raise ValueError(
                f"zoneout: expected one number, since {owner} has no c, got {self.zoneout}"
            )
        if self.peepholes:
            raise ValueError(f"peepholes: expected an LSTM, whose c they look at, got {owner}")
        if self.forget_bias is not None:
            raise ValueError(f"forget_bias: expected an LSTM, got {owner}, without a forget gate")

    def given(self) -> list[str]:
        """ "name=value" of everything that is not as it would be anyway."""
        values = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        # A pair of zeros is none, too.
        return [f"{name}={value!r}" for name, value, no in values if value not in (no, (0, 0))]

    def changes(self) -> list[str]:
        """The options, as text, that make a module compute something else than torch.nn's."""
        return [text for text in self.given() if not text.startswith(("init=", "forget_bias="))]

    def scanned(self, training: bool) -> tuple[str, ...]:
        """The names of what is in effect and needs the general scan."""
        return tuple(
            name
            for name in EXTRAS
            if getattr(self, name) not in (0, (0, 0)) and (training or name != "recurrent_dropout")
        )

    def is_idle(self, training: bool) -> bool:
        """Whether a module computes what torch.nn's would."""
        return not (self.scanned(training) or (training and self.weight_dropout))


PLAIN = Regularisation()
NAMES = tuple(field.name for field in dataclasses.fields(Regularisation))


def _option(name: str, fixed: bool = False) -> property:
    """An attribute of modules that reads, and unless it is `fixed` writes, their option.

    torch.nn's modules have none of that name. So what a subclass registers under it, or what was
    there before `replace`, stays what its owner finds there.
    """

    def read(module: RegularisedLayers) -> Any:
        for own in (vars(module), module._modules, module._parameters, module._buffers):
            if name in own:
                return own[name]
        return getattr(module._regularisation, name)

    def write(module: RegularisedLayers, value: Any) -> None:
        if name in vars(module):
            vars(module)[name] = value
            return
        if fixed:
            raise AttributeError(f"{name}: cannot be changed after construction")
        changed = dataclasses.replace(module._regularisation, **{name: value})
        changed.check(module._get_name(), module._cell(), module.bias)
        module._regularisation = changed

    return property(read, write)


class RegularisedLayers:
    """What the layer modules have of all this: to be mixed into a torch.nn.RNNBase.

    Beyond torch.nn's parameters a layer has, with k its number, followed by _reverse in the
    reverse direction,

        weight_peephole_lk   [3*H], for the gates i, f and o
        ln_ih_weight_lk      [G*H], gains of the normalised W_ih x
        ln_hh_weight_lk      [G*H], of W_hh h
        ln_c_weight_lk       [H], of c; LSTM
        ln_c_bias_lk         [H], LSTM with biases
    """

    _regularisation = PLAIN

    recurrent_dropout = _option("recurrent_dropout")
    zoneout = _option("zoneout")
    weight_dropout = _option("weight_dropout")
    layer_norm = _option("layer_norm", fixed=True)
    peepholes = _option("peepholes", fixed=True)
    forget_bias = _option("forget_bias", fixed=True)
    init = _option("init", fixed=True)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self._regularisation is not PLAIN:
            self._initialise()

    def _regularise(self, regularisation: Regularisation) -> None:
        """Adds the options and their parameters; for the constructor, once."""
        regularisation.check(self._get_name(), self._cell(), self.bias)
        if regularisation == PLAIN:
            return
        self._regularisation = regularisation
        bound = 1 / math.sqrt(self.hidden_size)
        like = self.weight_ih_l0
        for suffix in self._suffixes():
            for name, width in self._extra_widths().items():
                parameter = torch.nn.Parameter(like.new_empty(width))
                self.register_parameter(name + suffix, parameter)
                # As torch.nn.RNNBase.reset_parameters, which comes by again when it is called.
                torch.nn.init.uniform_(parameter, -bound, bound)
        self._initialise()

    def _suffixes(self) -> Iterator[str]:
        for layer in range(self.num_layers):
            yield f"_l{layer}"
            if self.bidirectional:
                yield f"_l{layer}_reverse"

    def _extra_widths(self) -> dict[str, int]:
        """The parameters of one direction of one layer beyond torch.nn's, all of one dimension."""
        cell, hidden, options = self._cell(), self.hidden_size, self._regularisation
        widths = {"weight_peephole": 3 * hidden} if options.peepholes else {}
        if options.layer_norm:
            widths |= dict.fromkeys(("ln_ih_weight", "ln_hh_weight"), cell.gates * hidden)
            if cell.has_c:
                widths["ln_c_weight"] = hidden
                if self.bias:
                    widths["ln_c_bias"] = hidden
        return widths

    @torch.no_grad()
    def _initialise(self) -> None:
        """What is not drawn as torch.nn draws it."""
        options = self._regularisation
        for suffix in self._suffixes():
            for name in self._extra_widths():
                if name.startswith("ln_"):
                    getattr(self, name + suffix).fill_(0 if name == "ln_c_bias" else 1)
            biases = [getattr(self, f"bias_{of}{suffix}") for of in ("ih", "hh") if self.bias]
            if options.init == "orthogonal":
                self._draw_orthogonal(suffix)
                for bias in biases:
                    bias.zero_()
            if options.forget_bias is not None:
                for bias, value in zip(biases, (options.forget_bias, 0), strict=True):
                    bias[self.hidden_size : 2 * self.hidden_size] = value

    def _draw_orthogonal(self, suffix: str) -> None:
        for name, draw in (
            ("weight_ih", torch.nn.init.xavier_uniform_),
            ("weight_hh", torch.nn.init.orthogonal_),
        ):
            for gate in getattr(self, name + suffix).split(self.hidden_size):
                # LAPACK has no half types.
                gate.copy_(draw(torch.empty_like(gate, dtype=state_dtype(gate.dtype))))

    def _weights(self, looked: list[Tensor]) -> list[Tensor]:
        """torch.nn's weights, with weight dropout, one mask for each W_hh in the order of layers
        and directions."""
        names = self._flat_weights_names
        # By name, not from _flat_weights: a parametrization or functional_call may be in place.
        weights = looks.attributes(self, names, looked)
        p = self._regularisation.weight_dropout
        if not (p and self.training):
            return weights
        pairs = zip(names, weights, strict=True)
        return [F.dropout(w, p) if name.startswith("weight_hh") else w for name, w in pairs]

    def _general_scan(self, looked: list[Tensor]) -> GeneralScan | None:
        """The recurrence, where it is not the cell's own."""
        options = self._regularisation
        if options is PLAIN or not (names := options.scanned(self.training)):
            return None
        zoneout = options.zoneout
        return GeneralScan(
            self._extras(looked),
            options.recurrent_dropout if self.training else 0.0,
            zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout),
            self.training,
            names,
        )

    def _extras(self, looked: list[Tensor]) -> list[Extras]:
        """The extras of each layer and direction."""
        weights = dict(zip(self._flat_weights_names, looked, strict=True))
        names = ("weight_peephole", "ln_ih_weight", "ln_hh_weight", "ln_c_weight", "ln_c_bias")
        extras = []
        for suffix in self._suffixes():
            found = {}
            for name, width in self._extra_widths().items():
                parameter = checks.is_dense_tensor(getattr(self, name + suffix), name + suffix)
                checks.parameter(parameter, name + suffix, (width,), weights["weight_hh" + suffix])
                found[name] = parameter
            extras.append(Extras(*map(found.get, names)))
        return extras
