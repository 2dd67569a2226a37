"""The memory of freed tensors is there for the next ones: counted in page faults, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource, sys
from rlhf_lit.training.malloc import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] != "plain" else None
if sys.argv[1] == "asked":
    sys.exit(print(kept, 0))
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
import torch
for i in range(7):
    if i == 2:
        before = pages()
    tensors = [torch.ones(megabytes * 2**18) for megabytes in range(34, 44)]
    del tensors
print(kept, pages() - before)
"""


def faults(setting: str, **environment: str) -> tuple[str, int]:
    """What was returned, and the page faults of five rounds of ten tensors, after two; 0 where it is asked alone."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS, setting], env={**own, **environment}, capture_output=True, text=True, check=True
    )
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_pages_are_asked_for_once() -> None:
    kept, few = faults("kept")
    assert kept == "True"
    assert 10 * few < faults("plain")[1]


def test_what_the_environment_says_of_malloc_stays() -> None:
    assert faults("asked", MALLOC_ARENA_MAX="4")[0] == "False"
    assert faults("asked", GLIBC_TUNABLES="glibc.malloc.arena_max=4")[0] == "False"
