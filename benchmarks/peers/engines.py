"""The engines' own kernels as contenders: vLLM's, and SGLang's three backends.

Taken from what is importable: an installed engine, or a folder of kernel files (`--peers DIR`) as
bench_peers.py's prepare.py makes it. Each is launched as its engine launches it with its default
configurations: vLLM's zero-fill, shrink and expand on one stream; SGLang's csgmv with chunks of 16
(and of up to 128 for prefills, "c128"), its triton backend with the segments merged by adapter in
decode, and triton_v2 with its plan table. Batch metadata is made once per case, as in the engines
once per forward pass.

Source: vllm/lora/ops/triton_ops, vllm/lora/punica_wrapper/punica_gpu.py (0.24, 0.33);
sglang/srt/lora/backend/{chunked,triton}_backend.py, sglang/srt/lora/dense/runner.py (0.5.23).
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.cases import Case
from benchmarks.peers.contenders import Contender, Prepared
from benchmarks.peers.data import Data
from dop.errors import ConfigError

VLLM_OPS = "vllm.lora.ops.triton_ops"
SGLANG_OPS = "sglang.kernels.ops.lora.dense"

_UNPACKED: list[tempfile.TemporaryDirectory[str]] = []
"""Folders that are removed when the process ends."""


def use_folder(folder: Path) -> None:
    """Makes the kernel files of a prepared folder importable, before any installed engine.

    Raises:
        ConfigError: it is no such folder.
    """
    if not (folder / "MANIFEST.json").is_file():
        raise ConfigError(
            f"{folder} holds no prepared kernel files.",
            "Make the folder with bench_peers.py's prepare.py.",
        )
    sys.path.insert(0, str(folder.resolve()))
    sys.path.append(str(folder.resolve() / "mini"))  # last: an installed pydantic or msgspec wins
    configs = folder / "csgmv_configs.zip"
    if configs.is_file() and "SGLANG_LORA_CONFIG_DIR" not in os.environ:
        target = tempfile.TemporaryDirectory(prefix="csgmv-configs-")
        _UNPACKED.append(target)
        with zipfile.ZipFile(configs) as archive:
            archive.extractall(target.name)
        os.environ["SGLANG_LORA_CONFIG_DIR"] = target.name


def find() -> tuple[list[Contender], list[str]]:
    """Engines' contenders that import here, and why the others do not."""
    found, missing = [], []
    wanted: dict[str, tuple[list[str], Callable[[Case, Data], Prepared]]] = {
        "vllm": ([f"{VLLM_OPS}.lora_shrink_op", f"{VLLM_OPS}.lora_kernel_metadata"], _vllm),
        "csgmv": ([f"{SGLANG_OPS}.chunked_sgmv_shrink"], _csgmv),
        "c128": ([f"{SGLANG_OPS}.chunked_sgmv_shrink"], partial(_csgmv, most_rows=128)),
        "triton": ([f"{SGLANG_OPS}.sgemm_lora_a"], _triton),
        "v2": (["sglang.srt.lora.dense.runner"], _v2),
    }
    for name, (modules, prepare) in wanted.items():
        try:
            for module in modules:
                importlib.import_module(module)
        except Exception as error:  # an engine may raise anything while it is imported
            missing.append(f"{name}: {type(error).__name__}: {str(error)[:80]}")
            continue
        suits = (lambda case: case.kind == "prefill") if name == "c128" else (lambda _: True)
        found.append(Contender(name, prepare, suits, compiles=True))
    return found, missing


def versions() -> dict[str, str]:
    """Versions of the installed engines; those of a prepared folder are in its manifest."""
    from importlib import metadata

    found = {}
    for name in ("vllm", "sglang", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _vllm(case: Case, data: Data) -> Prepared:
    utils = importlib.import_module(f"{VLLM_OPS}.utils")
    meta_type = importlib.import_module(f"{VLLM_OPS}.lora_kernel_metadata").LoRAKernelMeta
    lora_shrink = importlib.import_module(f"{VLLM_OPS}.lora_shrink_op").lora_shrink
    lora_expand = importlib.import_module(f"{VLLM_OPS}.lora_expand_op").lora_expand

    def forget() -> None:
        """Its tables of pointers are keyed by addresses, which the next case uses anew."""
        utils._LORA_A_PTR_DICT.clear()
        utils._LORA_B_PTR_DICT.clear()

    forget()
    w, tokens = case.workload, case.tokens
    meta = meta_type.make(case.slots, tokens, data.device)
    meta.prepare_tensors(data.slots.to(data.device))
    tables = meta.meta_args(tokens, False)
    weights = [tuple([t.unsqueeze(1) for t in stacks] for stacks in sets) for sets in data.sliced]

    def call(i: int) -> None:
        a, b = weights[i]
        v = torch.empty((w.slices, tokens, w.rank), dtype=torch.float32, device=data.device)
        lora_shrink(data.x[i], a, v, *tables, 1.0)
        lora_expand(v, b, data.y[i], *tables, offset_start=0, add_inputs=True)

    return Prepared(call, close=forget)


def _offsets(case: Case) -> list[int]:
    return [*case.workload.offsets, case.workload.total_out]


def _int32(values: list[int], data: Data) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=data.device)


def _batch_info(case: Case, data: Data, **fields: Any) -> Any:
    """SGLang's LoRABatchInfo with every adapter at full rank and scale 1."""
    batch_type = importlib.import_module("sglang.srt.lora.utils").LoRABatchInfo
    return batch_type(
        use_cuda_graph=case.kind == "decode",
        lora_ranks=_int32([case.workload.rank] * case.slots, data),
        scalings=torch.ones(case.slots, dtype=torch.float32, device=data.device),
        **fields,
    )


def _chunk_rows(case: Case, most_rows: int) -> int:
    """Rows per chunk as SGLang chooses them."""
    if most_rows <= 16:
        return 16
    return min(most_rows, 128 if case.tokens >= 256 else 32 if case.tokens >= 64 else 16)


def _csgmv(case: Case, data: Data, most_rows: int = 16) -> Prepared:
    shrink = importlib.import_module(f"{SGLANG_OPS}.chunked_sgmv_shrink")
    expand = importlib.import_module(f"{SGLANG_OPS}.chunked_sgmv_expand")
    rows = _chunk_rows(case, most_rows)
    order = torch.argsort(data.slots, stable=True)
    adapters, counts = torch.unique_consecutive(data.slots[order], return_counts=True)
    owners, lengths = [], []
    for slot, count in zip(adapters.tolist(), counts.tolist(), strict=True):
        parts = [min(rows, count - at) for at in range(0, count, rows)]
        owners += [slot] * len(parts)
        lengths += parts
    segments = len(owners)
    # A decode graph has a segment for every token of its batch size, used or not.
    grid = max(case.tokens, segments) if case.kind == "decode" else segments
    starts = [0, *accumulate(lengths + [0] * (grid - segments))]
    info = _batch_info(
        case,
        data,
        bs=case.requests,
        num_segments=segments,
        seg_indptr=_int32(starts, data),
        weight_indices=_int32(owners + [0] * (grid - segments), data),
        max_len=rows,
        seg_lens=None,
        permutation=order.int().to(data.device),
    )
    on_host = torch.tensor(_offsets(case), dtype=torch.int32)
    offsets, widest = on_host.to(data.device), max(case.workload.out_features)

    def call(i: int) -> None:
        a, b = data.joined[i]
        v = shrink.chunked_sgmv_lora_shrink_forward(
            x=data.x[i], weights=a, batch_info=info, num_slices=case.workload.slices
        )
        expand.chunked_sgmv_lora_expand_forward(
            x=v,
            weights=b,
            batch_info=info,
            slice_offsets=offsets,
            slice_offsets_cpu=on_host,
            max_slice_size=widest,
            base_output=data.y[i],
        )

    return Prepared(call, "joined", note={"chunk": rows, "segments": segments, "grid": grid})


def _triton(case: Case, data: Data) -> Prepared:
    w = case.workload
    shrink = importlib.import_module(f"{SGLANG_OPS}.sgemm_lora_a").sgemm_lora_a_fwd
    qkv = importlib.import_module(f"{SGLANG_OPS}.qkv_lora_b").qkv_lora_b_fwd
    gate_up = importlib.import_module(f"{SGLANG_OPS}.gate_up_lora_b").gate_up_lora_b_fwd
    plain = importlib.import_module(f"{SGLANG_OPS}.sgemm_lora_b").sgemm_lora_b_fwd
    if case.kind == "decode":  # one segment per slot of the stack
        order: Tensor | None = torch.argsort(data.slots, stable=True).int().to(data.device)
        lengths = torch.bincount(data.slots, minlength=case.slots).tolist()
        owners, longest = list(range(case.slots)), case.requests
    else:
        order, lengths, owners = None, case.request_rows, case.request_slots
        longest = max(lengths)
    info = _batch_info(
        case,
        data,
        bs=len(owners),
        num_segments=len(owners),
        seg_indptr=_int32([0, *accumulate(lengths)], data),
        weight_indices=_int32(owners, data),
        max_len=longest,
        seg_lens=_int32(lengths, data),
        permutation=order,
    )
    offsets, widest = _int32(_offsets(case), data), max(w.out_features)

    def call(i: int) -> None:
        a, b = data.joined[i]
        v = shrink(data.x[i], a, info, stack_num=w.slices)
        if w.slices == 3:
            qkv(v, b, info, offsets, widest, data.y[i], n_slices=3)
        elif w.slices == 2:
            gate_up(v, b, info, w.out_features[0], data.y[i])
        else:
            plain(v, b, info, data.y[i])

    return Prepared(call, "joined", note={"segments": len(owners), "longest": longest})


def _v2(case: Case, data: Data) -> Prepared:
    plan_module = importlib.import_module("sglang.srt.lora.dense.plan")
    runner_type = importlib.import_module("sglang.srt.lora.dense.runner").DenseLoraRunner
    phase_type = importlib.import_module("sglang.srt.lora.utils").Phase
    workspace = importlib.import_module("sglang.srt.lora.workspace").LoraWorkspace()
    w, kind = case.workload, plan_module.DenseLoraKind.LINEAR
    runner = runner_type(workspace, max_loras=case.slots, device=data.device, architecture=None)
    runner.begin_batch(
        token_slots=data.slots.int().to(data.device),
        lora_ranks=_int32([w.rank] * case.slots, data),
        scalings=torch.ones(case.slots, dtype=torch.float32, device=data.device),
        num_tokens=case.tokens,
        phase=phase_type(case.kind),
        graph_mode=True,
        is_prefill_graph=case.kind == "prefill",
    )
    plan = runner.plan_for(kind, w.rank, w.in_features, w.total_out, num_tokens=case.tokens)
    offsets = tuple(_offsets(case))

    def call(i: int) -> None:
        a, b = data.joined[i]
        v = runner.run_a(data.x[i], a, stack=w.slices, plan=plan)
        runner.run_b(v, b, data.y[i], offsets=offsets, plan=plan, add_inplace=True)

    return Prepared(call, "joined", note={"a": plan.a_family.value, "b": plan.b_family.value})
