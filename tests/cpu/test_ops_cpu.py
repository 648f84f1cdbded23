"""`dop.ops` on CPU tensors: right for every case, errors that say what was given, tracing."""

import os
import subprocess
import sys

import pytest
import torch
from sgmv_reference import reference, rows, stacks

from dop import ops
from dop.errors import (
    AdapterIdError,
    ConfigError,
    DeviceError,
    DopError,
    DtypeError,
    ShapeError,
)
from dop.ops import cpu
from dop.ops.plan import TILE_SIZES

KINDS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def ids_of(tokens, slots, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, slots, (tokens,), generator=g, dtype=torch.int32)


def check(y, x, a, b, ids, plan, want_ranks=None, want_scale=1.0, **options):
    want = reference(y, x, a, b, ids.tolist(), want_ranks, want_scale)
    before = y.clone()
    assert ops.add_lora(y, x, a, b, plan, **options) is y
    error = (y.double() - want).abs() / want.abs().clamp(min=1)
    assert float(error.max() if error.numel() else 0) < TOLERANCE[y.dtype]
    bare = (ids < 0) | (ids >= a[0].shape[0])
    assert torch.equal(y[bare], before[bare])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "slots", "rank", "width", "outs"),
    [
        (0, 3, 4, 8, (8,)),
        (1, 1, 1, 1, (1,)),
        (7, 3, 129, 37, (150,)),
        (33, 5, 5, 65, (31, 2)),
        (64, 64, 16, 48, (16, 8, 8)),
        (40, 1024, 3, 9, (5, 6, 7)),
    ],
)
def test_shapes(kind, tokens, slots, rank, width, outs):
    a, b = stacks(slots, rank, width, outs, kind)
    x, y = rows(tokens, width, sum(outs), kind)
    ids = ids_of(tokens, slots)
    check(y, x, a, b, ids, ops.segment_plan(ids, slots=slots))


def test_one_adapter_many_times_and_nobody():
    a, b = stacks(2, 4, 16, (16,))
    x, y = rows(4096, 16, 16)
    for ids in (torch.ones(4096, dtype=torch.int64), torch.full((4096,), -1)):
        check(y.clone(), x, a, b, ids, ops.segment_plan(ids, slots=2))


@pytest.mark.parametrize("in_plan", [True, False])
def test_ranks_and_scales(in_plan):
    ranks, scale = [16, 1, 8, 0, 5], [1.0, 0.5, -2.0, 1.0, 3.0]
    a, b = stacks(5, 16, 24, (16, 4))
    for s in range(5):  # what stands behind the true rank has no influence
        for stack in a:
            stack[s, ranks[s] :] = 1e3
        for stack in b:
            stack[s, :, ranks[s] :] = 1e3
    x, y = rows(50, 24, 20)
    ids = ids_of(50, 5)
    facts = {"ranks": torch.tensor(ranks), "scale": torch.tensor(scale)}
    plan = ops.segment_plan(ids, slots=5, **(facts if in_plan else {}))
    check(y, x, a, b, ids, plan, ranks, scale, **({} if in_plan else facts))
    lists = ops.segment_plan(ids, slots=5, ranks=ranks, scale=scale)
    assert torch.equal(lists.table("token_rank"), ops.segment_plan(
        ids, slots=5, **facts).table("token_rank"))  # fmt: skip
    check(y, x, a, b, ids, lists, ranks, [2 * s for s in scale], scale=2.0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("chunk", [1, 6000, 1 << 20])
def test_small_adapters_are_gathered_in_chunks(kind, chunk, monkeypatch):
    """Adapters of three ranks, one of them 0, in mixed rows and in rows that lie together."""
    ranks, scale = [8, 3, 8, 0, 3, 8], [1.0, 0.5, -2.0, 1.0, 3.0, 0.25]
    a, b = stacks(6, 8, 24, (16, 4), kind)
    for s, rank in enumerate(ranks):
        for stack in a:
            stack[s, max(rank, 1) :] = torch.nan
        for stack in b:
            stack[s, :, max(rank, 1) :] = torch.nan
    done = []
    gathered = cpu._gathered
    monkeypatch.setattr(cpu, "_gathered", lambda *args: done.append(1) or gathered(*args))
    monkeypatch.setattr(cpu, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(cpu, "CHUNK_SEGMENTS", 0)
    for ids in (ids_of(40, 6), torch.arange(6, dtype=torch.int32).repeat_interleave(7)):
        x, y = rows(len(ids), 24, 20, kind)
        for limit in (0, 1 << 30):
            monkeypatch.setattr(cpu, "GATHERED_BYTES", limit)
            done.clear()
            plan = ops.segment_plan(ids, slots=6, ranks=ranks, scale=scale)
            check(y.clone(), x, a, b, ids, plan, ranks, scale)
            assert bool(done) == bool(limit)
            plain = ops.segment_plan(ids, slots=6)
            check(y.clone(), x, *stacks(6, 8, 24, (16, 4), kind), ids, plain)


def test_plans_on_a_cpu_have_the_tables_of_rows_and_no_tiles():
    ids = ids_of(40, 6)
    plan = ops.segment_plan(ids, slots=6)
    assert torch.equal(plan.table("token_slot"), ids)
    assert not any(plan.table("tile_rows", size).any() for size in TILE_SIZES)
    plan = ops.segment_plan(ids.flip(0), slots=6, out=plan)
    assert torch.equal(plan.table("token_slot"), ids.flip(0))


def test_vllm_layout_strides_and_integer_scale():
    a, b = stacks(4, 8, 24, (16, 8))
    wide, _ = rows(20, 50, 1)
    y = torch.randn(24, 20).T
    ids = ids_of(20, 4)
    four = [t[:, None] for t in a], tuple(t[:, None] for t in b)
    check(y, wide[:, 3:27], *four, ids, ops.segment_plan(ids, slots=4), scale=1)


def test_ids_out_of_range_are_no_adapter_and_raise_in_checked_mode():
    a, b = stacks(3, 4, 8, (8,))
    x, y = rows(4, 8, 8)
    ids = torch.tensor([0, 3, -7, 2])
    check(y, x, a, b, ids, ops.segment_plan(ids, slots=3))
    with ops.checked(), pytest.raises(AdapterIdError, match=r"token_to_adapter\[1\] is 3"):
        ops.segment_plan(ids[:2], slots=3)
    with ops.checked(), pytest.raises(AdapterIdError, match="is -7"):
        ops.segment_plan(ids, slots=3)
    with ops.checked(), pytest.raises(AdapterIdError, match="rank is -1"):
        ops.segment_plan(ids[:1], slots=3, ranks=[1, 2, -1])
    plan = ops.segment_plan(ids, slots=3)
    with ops.checked(), pytest.raises(AdapterIdError, match=r"rank is 5.*up to 4"):
        ops.add_lora(y, x, a, b, plan, ranks=torch.tensor([1, 2, 5]))


def test_halves_make_the_whole():
    a, b = stacks(4, 8, 24, (16, 8))
    x, y = rows(20, 24, 24)
    ids, ranks = ids_of(20, 4), [8, 3, 1, 5]
    plan = ops.segment_plan(ids, slots=4, ranks=ranks)
    v = ops.sgmv_shrink(x, a, plan)
    assert v.shape == (2, 20, 8)
    assert v.dtype == torch.float32
    assert not v[:, ids < 0].any()
    assert not v[:, ids == 1, 3:].any()
    want = reference(y, x, a, b, ids.tolist(), ranks, 0.5)
    assert ops.sgmv_expand(y, v, b, plan, scale=0.5) is y
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


BAD = {
    "x_shape": (ShapeError, r"x has shape \[4, 9\].*\[4, 8\]"),
    "y_shape": (ShapeError, r"y has shape \[4, 8\].*\[4, 12\]"),
    "x_type": (DtypeError, "x is torch.float16, the weights are torch.float32"),
    "y_no_tensor": (DtypeError, "y is a list"),
    "weight_strides": (ShapeError, r"b\[0\] is not contiguous"),
    "weight_type": (DtypeError, r"a\[0\] is torch.int8"),
    "mixed_types": (DtypeError, r"b\[1\] is torch.float16, a\[0\] is torch.float32"),
    "weight_shape": (ShapeError, r"b\[1\] has shape \[3, 4, 5\].*\[3, out, 2\]"),
    "a_shapes": (ShapeError, r"a\[1\] has shape \[3, 2, 7\]"),
    "axes": (ShapeError, r"a\[0\] has shape \[6, 8\]"),
    "four_slices": (ShapeError, "a holds 4 entries"),
    "unequal": (ShapeError, "1 stacks a and 2 stacks b"),
    "plan_slots": (ShapeError, "plan is for 4 slots, the stacks hold 3"),
    "plan_kind": (DtypeError, "plan is a Tensor"),
    "ranks": (ShapeError, r"2 ranks.*3"),
    "scale": (ShapeError, r"scale has shape \[2\].*\[3\]"),
    "device": (DeviceError, "x is on meta"),
    "gradient": (ConfigError, "no gradient"),
    "float_ranks": (DtypeError, "ranks is torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_errors_say_what_was_given_and_wanted(what):
    a, b = stacks(3, 2, 8, (8, 4))
    x, y = rows(4, 8, 12)
    ids = torch.zeros(4, dtype=torch.int32)
    plan = ops.segment_plan(ids, slots=4 if what == "plan_slots" else 3)
    options = {}
    if what == "x_shape":
        x = torch.zeros(4, 9)
    elif what == "y_shape":
        y = torch.zeros(4, 8)
    elif what == "x_type":
        x = x.half()
    elif what == "y_no_tensor":
        y = y.tolist()
    elif what == "weight_strides":
        b[0] = b[0].transpose(1, 2).contiguous().transpose(1, 2)
    elif what == "weight_type":
        a[0] = a[0].to(torch.int8)
    elif what == "mixed_types":
        b[1] = b[1].half()
    elif what == "weight_shape":
        b[1] = torch.zeros(3, 4, 5)
    elif what == "a_shapes":
        a[1] = torch.zeros(3, 2, 7)
    elif what == "axes":
        a = a[0].flatten(0, 1)
        b = b[0]
    elif what == "four_slices":
        a = a * 2
    elif what == "unequal":
        a = a[:1]
    elif what == "plan_kind":
        plan = plan.buffer
    elif what == "ranks":
        options["ranks"] = [1, 2]
    elif what == "scale":
        options["scale"] = torch.ones(2)
    elif what == "device":
        x = x.to("meta")
    elif what == "gradient":
        x.requires_grad_()
    elif what == "float_ranks":
        options["ranks"] = torch.ones(3)
    kind, words = BAD[what]
    with pytest.raises(kind, match=words) as caught:
        ops.add_lora(y, x, a, b, plan, **options)
    assert isinstance(caught.value, DopError)
    assert caught.value.action


def test_errors_of_plans():
    ids = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(DtypeError, match="float32"):
        ops.segment_plan(ids.float(), slots=2)
    with pytest.raises(DtypeError, match="list"):
        ops.segment_plan([0, 1], slots=2)
    with pytest.raises(ShapeError, match=r"\[2, 2\]"):
        ops.segment_plan(ids.view(2, 2), slots=2)
    with pytest.raises(ShapeError, match="0 slots"):
        ops.segment_plan(ids, slots=0)
    with pytest.raises(ShapeError, match=r"4 tokens and 2 slots.*given 3 tokens"):
        ops.segment_plan(ids[:3], slots=2, out=ops.segment_plan(ids, slots=2))


OPS = torch.ops.dop


def facts(plan):
    return plan.buffer, plan.tokens, plan.slots, -1


@pytest.mark.parametrize(
    "name", ["segment_plan", "segment_plan_out", "add_lora", "shrink", "expand"]
)
def test_opcheck(name):
    a, b = stacks(3, 2, 8, (8, 4))
    x, y = rows(6, 8, 12)
    ids, ranks, scales = ids_of(6, 3), torch.tensor([1, 2, 1], dtype=torch.int32), torch.rand(3)
    plan = ops.segment_plan(ids, slots=3)
    op, arguments = {
        "segment_plan": (OPS.segment_plan, (ids, 3, ranks, scales, 1.0)),
        "segment_plan_out": (OPS.segment_plan_out, (plan.buffer, ids, 3, None, None, 0.5)),
        "add_lora": (OPS.add_lora, (y, x, a, b, *facts(plan), ranks, scales, 1.0)),
        "shrink": (OPS.sgmv_shrink, (x, a, *facts(plan), ranks)),
        "expand": (OPS.sgmv_expand, (y, torch.rand(2, 6, 2), b, *facts(plan), None, None, 2.0)),
    }[name]
    results = torch.library.opcheck(op.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_the_ops_themselves_check_their_arguments():
    a, b = stacks(3, 2, 8, (8, 4))
    x, y = rows(6, 8, 12)
    plan = ops.segment_plan(ids_of(6, 3), slots=3)
    with pytest.raises(ShapeError, match="x has shape"):
        OPS.add_lora(y, x[:, 1:], a, b, *facts(plan), None, None, 1.0)
    with pytest.raises(ShapeError, match="x has shape"):
        OPS.sgmv_shrink(x[1:], a, *facts(plan), None)
    with pytest.raises(ShapeError, match="v has shape"):
        OPS.sgmv_expand(y, torch.zeros(2, 6, 3), b, *facts(plan), None, None, 1.0)
    with pytest.raises(ShapeError, match="a plan of"):
        OPS.add_lora(y, x, a, b, plan.buffer[:-16], 6, 3, -1, None, None, 1.0)
    with pytest.raises(ShapeError, match="elements"):
        OPS.segment_plan_out(plan.buffer[16:], ids_of(6, 3), 3, None, None, 1.0)


@pytest.mark.parametrize("plan_inside", [True, False])
def test_compile_with_dynamic_tokens(plan_inside):
    from torch._dynamo.testing import CompileCounterWithBackend

    a, b = stacks(3, 2, 8, (8, 4))
    scales = torch.tensor([1.0, 2.0, 3.0])

    def layer(y, x, ids, plan=None):
        if plan is None:
            plan = ops.segment_plan(ids, slots=3, ranks=torch.tensor([1, 2, 1]), scale=2.0)
        y = y * 2
        ops.add_lora(y, x + 1, a, b, plan, scale=scales)
        v = ops.sgmv_shrink(x, a, plan)
        return ops.sgmv_expand(y, v, b, plan, scale=0.5) + 1

    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counted, dynamic=True)
    for tokens in (5, 9, 16, 21):
        x, y = rows(tokens, 8, 12)
        ids = ids_of(tokens, 3, tokens)
        plan = None if plan_inside else ops.segment_plan(ids, slots=3, scale=2.0)
        torch.testing.assert_close(compiled(y, x, ids, plan), layer(y, x, ids, plan))
    assert counted.frame_count == 1


def test_fake_tensors_take_the_traced_way():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        a, b = [torch.empty(3, 2, 8)], [torch.empty(3, 4, 2)]
        plan = ops.segment_plan(torch.empty(5, dtype=torch.int32), slots=3)
        y = ops.add_lora(torch.empty(5, 4), torch.empty(5, 8), a, b, plan)
        assert y.shape == (5, 4)
        assert ops.sgmv_shrink(torch.empty(5, 8), a, plan).shape == (1, 5, 2)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    a, b = stacks(3, 2, 8, (8, 4))

    class Layer(torch.nn.Module):
        def forward(self, y, x, ids):
            plan = ops.segment_plan(ids, slots=3)
            return ops.add_lora(y + 1, x, a, b, plan)

    x, y = rows(6, 8, 12)
    ids = ids_of(6, 3)
    tokens = {0: torch.export.Dim("tokens", min=2, max=64)}
    program = torch.export.export(
        Layer(), (y, x, ids), strict=strict, dynamic_shapes=(tokens, tokens, tokens)
    )
    assert "dop.add_lora" in str(program.graph)
    for n in (6, 3, 40):
        x, y = rows(n, 8, 12)
        ids = ids_of(n, 3)
        torch.testing.assert_close(program.module()(y, x, ids), Layer()(y, x, ids))


def test_checked_mode_from_the_environment():
    code = (
        "import torch\nfrom dop import ops\nfrom dop.errors import AdapterIdError\n"
        "try:\n    ops.segment_plan(torch.tensor([5]), slots=2)\n"
        "except AdapterIdError as error:\n    print('refused', error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "DOP_CHECKED": "1"},
        timeout=120,
    )
    assert "refused" in result.stdout, result.stderr


def test_import_is_light():
    code = (
        "import sys\nimport dop.ops\n"
        "heavy = {'tvm', 'tvm_ffi', 'lightgbm', 'rich', 'typer', 'pydantic', 'orjson', 'psutil'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import torch\nplan = dop.ops.segment_plan(torch.tensor([0]), slots=1)\n"
        "dop.ops.add_lora(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 1, 2),"
        " torch.ones(1, 2, 1), plan)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_explain_and_warmup_on_a_cpu():
    choice = ops.explain_choice("sgmv/float32/r16/64->64", tokens=3, device="cpu")
    assert choice.kernel is None
    assert "torch" in str(choice)
    assert ops.warmup("sgmv/float32/r16/64->64", device="cpu") == []
    assert ops.warmup("Llama-3.1-8B", ranks=[8, 16], device="cpu") == []
    with pytest.raises(ConfigError):
        ops.warmup("no such model", device="cpu")
    with pytest.raises(ConfigError, match="made ready"):
        ops.warmup(7, device="cpu")
