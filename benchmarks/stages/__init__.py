"""The stages of the pipeline, one module each: calibrate, reference, generate, score, tables.

They are the only code that reads and writes files. Each has a ``run`` function that `python -m benchmarks` calls.
"""
