"""Weights of other formats: `interop.keras` and `interop.onnx_weights`."""

from . import keras as keras
from . import onnx_weights as onnx_weights
