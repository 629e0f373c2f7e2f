"""What plans a search: hooks, cells, calibration, and the ONNX file they come from."""
