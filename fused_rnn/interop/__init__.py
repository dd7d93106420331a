"""Weights of other formats: `interop.keras` and `interop.onnx_weights`."""
