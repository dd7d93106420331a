"""What a module goes through in its life, in any order, beside torch.nn's with the same weights.

The short ways look at a module's parameters as little as they may. So whatever may happen to these
between two calls happens here: they are trained in place, replaced, moved, cast, frozen, shared,
reparametrized, loaded and copied, and after each of it a call gives what torch.nn's gives.
"""

import copy
import io

import pytest
import torch
from helpers.outcomes import flat, leaves, near
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn

either = st.booleans()
seeds = st.integers(0, 2**16)
_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}


def _pickled(module):
    memory = io.BytesIO()
    torch.save(module, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


def _reloaded(module):
    """Another module of the kind, with other weights, that loads this one's."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(torch.nan)
    other.load_state_dict(module.state_dict())
    return other


def _assigned(module):
    """The module whose parameters are now those of another one."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module


def _flat_in_memory(module):
    """All parameters in one storage, as distributed training keeps them."""
    parameters = list(module.parameters())
    memory = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, part in zip(
        parameters, memory.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.data = part.view(parameter.shape)
    return module


def _through_meta(module):
    """Left without memory, and given memory and weights again."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    module.to("meta").to_empty(device="cpu").load_state_dict(state)
    return module


_MOVES = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "load_state_dict": _reloaded,
    "assign": _assigned,
    "flat in memory": _flat_in_memory,
    "through meta": _through_meta,
    "share_memory": nn.Module.share_memory,
    "apply": lambda module: module.apply(lambda _: None),
    "zero_grad": lambda module: module.zero_grad(False) or module,
}


class _Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


class ModuleLife(RuleBasedStateMachine):
    """Two modules, ours and torch.nn's, to which everything happens at once."""

    @initialize(
        name=st.sampled_from(["RNN", "GRU", "LSTM"]),
        sizes=st.tuples(st.integers(1, 9), st.integers(1, 20)),
        layers=st.integers(1, 2),
        flags=st.fixed_dictionaries(
            {"bias": either, "batch_first": either, "bidirectional": either}
        ),
        dropout=st.sampled_from([0.0, 0.5]),
        projected=either,
        seed=seeds,
    )
    def made(self, name, sizes, layers, flags, dropout, projected, seed):
        options = {"num_layers": layers, **flags}
        if layers > 1:
            options["dropout"] = dropout
        if name == "LSTM" and projected and sizes[1] > 1:
            options["proj_size"] = sizes[1] // 2
        torch.manual_seed(seed)
        self.ours = getattr(fused_rnn, name)(*sizes, **options)
        self.theirs = getattr(nn, name)(*sizes, **options)
        self.theirs.load_state_dict(self.ours.state_dict())
        self.hooks = []
        self.can_be_pickled = True

    @property
    def both(self):
        return self.ours, self.theirs

    @property
    def dtype(self):
        return next(self.ours.parameters()).dtype

    def parameter_name(self, number):
        """Of a parameter that a module holds as it is."""
        names = [name for name, _ in self.ours.named_parameters(recurse=False)]
        return names[number % len(names)] if names else None

    # Calls.

    def arguments(self, steps, batch, kind, with_states):
        """Input and states, of torch's own generator."""
        m = self.ours
        lengths = torch.randint(1, steps + 1, (batch,))
        x = torch.randn(steps, batch, m.input_size, dtype=self.dtype)
        if kind == "packed":
            x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        elif kind == "unbatched":
            x = x[:, 0]
        elif m.batch_first:
            x = x.transpose(0, 1)
        if not with_states:
            return (x,)
        parts = m.num_layers * (1 + m.bidirectional)
        rows = () if kind == "unbatched" else (batch,)
        widths = [m.proj_size or m.hidden_size]
        if m.mode == "LSTM":
            widths.append(m.hidden_size)
        states = tuple(torch.randn(parts, *rows, width, dtype=self.dtype) for width in widths)
        return x, (states if len(states) > 1 else states[0])

    def compare(self, arguments, seed, grads, call=lambda module, *args: module(*args)):
        """A call of both, and if it may, backward; gradients add up in the parameters."""
        found = []
        for module in self.both:
            given = tuple(map(leaves, arguments)) if grads else arguments
            torch.manual_seed(seed)  # of dropout's masks
            output, finals = call(module, *given)
            if isinstance(arguments[0], PackedSequence):
                assert torch.equal(output.batch_sizes, arguments[0].batch_sizes)
            outputs = flat((output, finals))
            found.append(outputs)
            if not grads:
                assert not any(o.requires_grad for o in outputs)
                continue
            torch.autograd.backward(outputs, [o.detach().cos() for o in outputs])
            of_parameters = [p.grad for p in module.parameters() if p.grad is not None]
            found[-1] = [*outputs, *(t.grad for t in flat(given)), *of_parameters]
        near(*found, rtol=_TOLERANCE[self.dtype], of_largest=True)

    @rule(
        sizes=st.tuples(st.integers(1, 5), st.integers(1, 4)),
        kind=st.sampled_from(["padded", "padded", "unbatched", "packed"]),
        with_states=either,
        mode=st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode]),
        seed=seeds,
    )
    def called(self, sizes, kind, with_states, mode, seed):
        torch.manual_seed(seed)
        arguments = self.arguments(*sizes, kind, with_states)
        with mode():
            self.compare(arguments, seed, mode is torch.enable_grad)

    @rule(sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=seeds)
    def called_with_other_weights(self, sizes, seed):
        torch.manual_seed(seed)
        others = {name: torch.randn_like(p) for name, p in self.ours.named_parameters()}
        arguments = self.arguments(*sizes, "padded", True)
        with torch.no_grad():
            self.compare(arguments, seed, False, lambda m, *args: functional_call(m, others, args))

    @rule(kind=st.sampled_from(["padded", "packed"]), seed=seeds)
    def called_on_the_reference(self, kind, seed):
        torch.manual_seed(seed)
        arguments = self.arguments(4, 3, kind, False)
        with fused_rnn.backend("reference"):
            self.compare(arguments, seed, True)

    # What changes numbers.

    @rule(momentum=st.sampled_from([0.0, 0.9]), foreach=either)
    def trained(self, momentum, foreach):
        if not list(self.ours.parameters()):  # what was frozen may have become a buffer
            return
        for module in self.both:
            torch.optim.SGD(module.parameters(), lr=0.01, momentum=momentum, foreach=foreach).step()

    @rule(number=seeds, factor=st.sampled_from([0.5, -1.0]))
    def changed_in_place(self, number, factor):
        for module in self.both:
            if name := self.parameter_name(number):
                getattr(module, name).data.mul_(factor)

    @rule(number=seeds, how=st.sampled_from(["data", "parameter"]), transposed=either)
    def given_other_memory(self, number, how, transposed):
        for module in self.both:
            if not (name := self.parameter_name(number)):
                continue
            parameter = getattr(module, name)
            value = parameter.detach().clone()
            # torch.nn's own operators want weights one after the other in memory
            if transposed and module is self.ours and value.dim() == 2:
                value = value.t().contiguous().t()
            if how == "data":
                parameter.data = value
            else:
                new = nn.Parameter(value, parameter.requires_grad)
                new.grad = parameter.grad
                setattr(module, name, new)

    @rule(how=st.sampled_from(sorted(_MOVES)))
    def moved(self, how):
        if self.is_pruned() or parametrize.is_parametrized(self.ours):
            return  # torch's own limits, as of local functions
        if how == "pickle" and not self.can_be_pickled:
            return
        self.ours, self.theirs = map(_MOVES[how], self.both)
        if how not in ("zero_grad", "apply", "flat in memory", "share_memory"):
            for module in self.both:  # copies may have gradients or not
                module.zero_grad()
        self.hooks = [] if how == "deepcopy" else self.hooks

    @rule(dtype=st.sampled_from(sorted(_TOLERANCE, key=str)))
    def cast(self, dtype):
        for module in self.both:
            module.to(dtype).zero_grad()
        # Trained in float32 they differ in the last bits, which are not float64's last.
        with torch.no_grad():
            for name, value in self.theirs.state_dict().items():
                value.copy_(self.ours.state_dict()[name])

    # What changes ways.

    @rule(number=seeds)
    def frozen_or_not(self, number):
        for module in self.both:
            if name := self.parameter_name(number):
                parameter = getattr(module, name)
                parameter.requires_grad_(not parameter.requires_grad)
                parameter.grad = None

    @rule(mode=either)
    def in_mode(self, mode):
        for module in self.both:
            module.train(mode)

    @rule(threads=st.integers(1, 3))
    def threads(self, threads):
        torch.set_num_threads(threads)

    @rule(before=either)
    def watched(self, before):
        if len(self.hooks) > 2:
            return
        self.can_be_pickled = False
        for module in self.both:
            if before:
                hook = module.register_forward_pre_hook(lambda _, args: (args[0], *args[1:]))
            else:
                hook = module.register_forward_hook(lambda _, args, out: out)
            self.hooks.append(hook)

    @precondition(lambda self: self.hooks)
    @rule()
    def watched_no_more(self):
        while self.hooks:
            self.hooks.pop().remove()

    @rule(number=seeds, kind=st.sampled_from(["weight_norm", "doubled"]))
    def parametrized(self, number, kind):
        name = self.parameter_name(number)
        if name is None or not name.startswith("weight") or self.is_pruned():
            return
        self.can_be_pickled &= kind != "weight_norm"
        for module in self.both:
            getattr(module, name).grad = None
            if kind == "weight_norm":
                parametrizations.weight_norm(module, name)
            else:
                parametrize.register_parametrization(module, name, _Doubled())

    @precondition(lambda self: parametrize.is_parametrized(self.ours))
    @rule()
    def parametrized_no_more(self):
        for module in self.both:
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
            module.zero_grad()

    def is_pruned(self):
        return any(name.endswith("_mask") for name, _ in self.ours.named_buffers())

    @rule(number=seeds)
    def pruned(self, number):
        name = self.parameter_name(number)
        if name is None or name.endswith("_orig") or parametrize.is_parametrized(self.ours):
            return
        for module in self.both:
            getattr(module, name).grad = None
            mask = torch.ones(getattr(module, name).shape, dtype=self.dtype)
            mask.view(-1)[1::2] = 0  # not all: norms of zeros are no numbers
            prune.custom_from_mask(module, name, mask)

    @precondition(lambda self: self.is_pruned())
    @rule()
    def pruned_for_good(self):
        for module in self.both:
            for name in [n for n, _ in module.named_buffers() if n.endswith("_mask")]:
                prune.remove(module, name.removesuffix("_mask"))
            module.zero_grad()


ModuleLife.TestCase.settings = settings(max_examples=40, stateful_step_count=25)


@pytest.mark.usefixtures("num_threads")
class TestLives(ModuleLife.TestCase):
    pass
