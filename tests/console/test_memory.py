"""Freed memory that stays in the process, by its resident pages."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from ccl_timm.console.memory import keep_freed_memory
from ccl_timm.experiments.compare import _start_worker
{'neither': int, 'program': keep_freed_memory, 'worker': _start_worker}[sys.argv[1]]()
import torch
for _ in range(3):
    torch.ones(2**25)  # 128 MiB, freed at once
pages = int(open('/proc/self/statm').read().split()[1])
ones = torch.ones(2**25)
print((int(open('/proc/self/statm').read().split()[1]) - pages) * 4096 >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of the GNU C library')
@pytest.mark.parametrize('start, new', [('neither', True), ('program', False), ('worker', False)])
def test_the_next_tensor_takes_the_memory_of_the_last(start, new):
    done = subprocess.run([sys.executable, '-c', PROGRAM, start], capture_output=True, text=True, timeout=120)
    assert (int(done.stdout) > 100) == new, done.stderr
