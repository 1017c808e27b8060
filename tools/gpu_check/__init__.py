"""Every claim about GPUs, predicted beside measured, in ten minutes: python -m tools.gpu_check (docs/gpu.md).

__main__.py   the command: one process a case, the time, the table, the files, the exit code
cases.py      the list of cases
rows.py       claims with their verdicts, and the tables of them
worker.py     one case in this process, and what cases share: models, flags, freed memory
steps.py      cases of optimizer steps: against the baseline, flags, copies of offloaded weights, several GPUs
phases.py     cases of memory, encoding, validation, scores and checkpoints
families.py   steps of the other models of the family
exactness.py  cases of equal numbers: CPU and GPU, resume, attention, the base in two precisions
"""
