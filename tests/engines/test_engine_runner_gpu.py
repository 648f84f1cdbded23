"""vLLM's own kernels, timed by Dop: default options are right, broken ones are a failure."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("vllm") is None or not torch.cuda.is_available():
    pytest.skip("needs vLLM and a GPU", allow_module_level=True)

from dop.engine_kernels.run_vllm import VllmRunner
from dop.engine_kernels.space import build_space, options
from dop.engine_kernels.task import scenarios_of, tasks_of
from dop.target import SM_90
from dop.workload import Workload

WORKLOADS = [
    Workload("qkv_proj", 1024, (1024, 256, 256), 16, "bfloat16"),
    Workload("down_proj", 2048, (1024,), 16, "bfloat16"),
]


@pytest.fixture(scope="module")
def runner():
    return VllmRunner(50 << 20)


@pytest.mark.parametrize("task", tasks_of("vllm", WORKLOADS, 8), ids=lambda t: t.key)
def test_defaults_run_and_are_right(runner, task):
    default = build_space(task, SM_90).defaults()[0]
    batches = scenarios_of(task, (1, 8, 64))
    for batch, found in zip(
        batches, runner.measure(task, options(task, default.values), batches), strict=True
    ):
        assert found.ok, (batch.key, found.message)
        assert 1e-7 < found.median_s < 1e-3


def test_impossible_options_are_a_failure_and_do_no_harm(runner):
    task = tasks_of("vllm", WORKLOADS, 8)[0]
    default = options(task, build_space(task, SM_90).defaults()[0].values)
    batches = scenarios_of(task, (8,))
    broken = {**default, "block_m": 64, "block_n": 128, "block_k": 2048, "num_stages": 4}
    assert not any(found.ok for found in runner.measure(task, broken, batches))
    assert all(found.ok for found in runner.measure(task, default, batches))
