"""Compiling the engines' Triton kernels before a run, with several processes at once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.peers.cases import Case
from benchmarks.peers.contenders import Contender
from benchmarks.peers.data import Data, Pools


def warm_compilers(cases: Sequence[Case], contenders: Sequence[Contender], device: str) -> None:
    """Calls each compiled contender once per case, so that its compiler's disk cache is full."""
    compiled = [contender for contender in contenders if contender.compiles]
    for case in cases:
        pools = Pools([case], device, getattr(torch, case.workload.dtype), 1)
        data = Data.carve(case, pools)
        for contender in compiled:
            if not contender.suits(case):
                continue
            try:
                prepared = contender.prepare(case, data)
                prepared.call(0)
                prepared.close()
            except Exception as error:  # measured again, and reported, by the run itself
                print(f"{contender.name} {case.key}: {str(error)[:100]}", file=sys.stderr)
        if device == "cuda":
            torch.cuda.synchronize()


def compile_ahead(jobs: int, arguments: Sequence[str], limit_s: float) -> None:
    """Fills Triton's disk cache with several processes at once; one alone takes minutes."""
    command = [sys.executable, "-m", "benchmarks.bench_sgmv", *arguments]
    children = [subprocess.Popen([*command, "--shard", f"{i}/{jobs}"]) for i in range(jobs)]
    deadline = time.monotonic() + limit_s
    for child in children:
        try:
            child.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
