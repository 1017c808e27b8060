"""What `make test-kinds` leaves out where it forces a lesser instruction set than the CPU's."""

import os
from pathlib import Path

import pytest

# torch packs bf16 for the CPU that is there and runs the kernel that is asked for: "pack_vnni2 is only supported when avx512 is".
LESS_THAN_THIS_CPU = os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2") and "avx512" in Path("/proc/cpuinfo").read_text()
needs_bf16_attention = pytest.mark.skipif(
    LESS_THAN_THIS_CPU, reason="torch's bf16 attention ends where ATEN_CPU_CAPABILITY is less than the CPU has"
)
