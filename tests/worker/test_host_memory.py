"""Host memory of a worker, in a process of its own: what libraries keep there cannot be taken back."""

from __future__ import annotations

import os
import subprocess
import sys

_PROGRAM = """
import psutil
from headrace.worker.host_memory import bound_kernel_caches, keep_freed_memory

bound_kernel_caches()
import torch

keep_freed_memory()
torch.set_num_threads(1)
weight = torch.zeros(256, 256, dtype=torch.bfloat16)
sizes = []
with torch.inference_mode():
    for rows in range(1, 1201):
        torch.nn.functional.linear(torch.zeros(rows % 600 + 1, 256, dtype=torch.bfloat16), weight)
        if rows % 600 == 0:
            sizes.append(psutil.Process().memory_full_info().uss >> 20)
        if rows == 1:
            begin = psutil.Process().memory_full_info().uss >> 20
print(*(size - begin for size in sizes))
"""
_MOST_MIB = 220
"""It takes 120; without a bound the 600 kernels that are made here take 390."""


def test_a_worker_s_memory_is_bounded_however_many_lengths_its_prompts_have() -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-P", "-c", _PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=True)
    first, again = map(int, done.stdout.split())
    assert first < _MOST_MIB
    assert again < first + 20
