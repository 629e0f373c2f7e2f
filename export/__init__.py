"""From a collection to a bundle: snapshot, training, measuring, ONNX. The only place for torch."""
