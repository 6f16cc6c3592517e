"""Exports of a checkpoint: TorchServe archive, ONNX."""
