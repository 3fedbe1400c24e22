"""Quantised networks for other programs: OpenVINO, where they execute in integers, and ONNX for interchange.

`tfmq.export.openvino.export_openvino` writes a folder, `tfmq.export.runner.ExportedNetwork` runs it in stock pipelines;
`tfmq.export.onnx.export_onnx` writes an ONNX file. All need `pip install tfmq-bench[deploy]`.
"""
