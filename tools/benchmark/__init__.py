"""Benchmarks of the trainer against a baseline: python -m tools.benchmark WHAT [flags].

__main__.py      the commands and their flags
measurements.py  a function a command: which jobs take turns, and the rows of its tables
harness.py       turns, processes, clocks, medians, tables; knows nothing of what is measured
programs.py      whole trainings, seen from outside: seconds to the first step, peak memory
variants.py      what is measured, in a process of its own: a step of ours or of the baseline, encoders, decoders
counters.py      FLOPs, bytes that collectives are given, memory of tensors, the machine's matmul peak
models.py        models with random weights;  sizes.py  the sizes that have names
reference.py     the baseline: how the original trainer works
"""
