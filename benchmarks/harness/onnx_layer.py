"""A torch.nn.RNN, GRU or LSTM as an ONNX model, which OpenVINO and ONNX Runtime both read.

Not exported: one standard node per layer, static shapes, weights as constants.

    input   x            [T, B, I]
            h0_<l> c0_<l> [D, B, H]  of layer l; only with states, c only for LSTM
    output  y            [T, B, D*H], or [T, 1, B, H], which has the same elements in the same
                         order, where a layer has one direction: no node is spent on the shape
            hn_<l> cn_<l> [D, B, H]  as the states of the input
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from fused_rnn.interop.onnx_weights import to_onnx
from harness.cases import Case

# From 14 on the three nodes have not changed; both runtimes have known it for years.
OPSET, IR_VERSION = 14, 8


def build(layer: torch.nn.RNNBase, case: Case, states: bool) -> bytes:
    """The serialised model. With `states`, initial and final states are inputs and outputs."""
    directions, hidden = 1 + case.bidirectional, case.H
    state_shape = [directions, case.B, hidden]
    state_names = ("h", "c") if case.cell == "lstm" else ("h",)
    inputs = [_value("x", [case.T, case.B, case.I])]
    outputs, nodes, constants = [], [], []

    previous = "x"
    for index, node in enumerate(to_onnx(layer)):
        constants += [
            numpy_helper.from_array(getattr(node, name).numpy(), f"{name}_{index}")
            for name in ("W", "R", "B")
        ]
        y = "y" if index == case.layers - 1 else f"y_{index}"
        started = [f"{s}0_{index}" for s in state_names] if states else []
        ended = [f"{s}n_{index}" for s in state_names] if states else []
        inputs += [_value(name, state_shape) for name in started]
        outputs += [_value(name, state_shape) for name in ended]
        in_torch_order = directions == 1 and y == "y"
        nodes.append(
            helper.make_node(
                node.operator,
                # The empty name is that of sequence_lens, which is absent.
                [previous, f"W_{index}", f"R_{index}", f"B_{index}", "", *started],
                [y if in_torch_order else f"Y_{index}", *ended],
                **node.attributes,
            )
        )
        if not in_torch_order:  # [T, D, B, H] -> [T, B, D*H]
            nodes += [
                helper.make_node("Transpose", [f"Y_{index}"], [f"Z_{index}"], perm=[0, 2, 1, 3]),
                helper.make_node("Reshape", [f"Z_{index}", "rows"], [y]),
            ]
        previous = y
    rows = np.array([case.T, case.B, directions * hidden], dtype=np.int64)
    constants.append(numpy_helper.from_array(rows, "rows"))
    y_shape = [case.T, case.B, 2 * hidden] if directions == 2 else [case.T, 1, case.B, hidden]
    outputs.insert(0, _value("y", y_shape))

    graph = helper.make_graph(nodes, case.cell, inputs, outputs, constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _value(name: str, shape: list[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
