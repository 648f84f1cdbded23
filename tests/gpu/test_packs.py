"""Shipped packs on a GPU that runs their binaries: every kernel loads, serves the batches that its
table gives to it, and is right, those transferred from the other type too."""

from __future__ import annotations

import itertools
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import guarded  # noqa: E402

from dop import ops, packs  # noqa: E402
from dop.export.index import runs_on  # noqa: E402
from dop.export.load import load_cuda  # noqa: E402
from dop.measure import tensor_map  # noqa: E402
from dop.ops import launch, sources, warm  # noqa: E402
from dop.packs.answer import Batch, explain  # noqa: E402
from dop.workload import Workload  # noqa: E402

NAME = torch.cuda.get_device_name()
MAJOR, MINOR = torch.cuda.get_device_capability()
ARCH = f"sm_{MAJOR}{MINOR}"
HERE = [entry for entry in packs.shipped() if runs_on(entry.arch, ARCH)]
CASES = sorted({key for entry in HERE for key in entry.workloads})
MOST_SLOTS, MOST_TOKENS = 16, 4096
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def batches_of(workload: Workload) -> dict[str, tuple[int, int | None]]:
    """For each kernel of the workload a batch that it serves."""
    library = packs.find(NAME, ARCH, workload.key)[0].library()
    table = library.table.workloads[workload.key]
    counts = sorted({row.tokens for row in table.rows if row.tokens <= MOST_TOKENS})
    found: dict[str, tuple[int, int | None]] = {}
    for tokens, adapters in itertools.product(counts, (None, 1, 2, 3, 4, 6, 8, 12, 16)):
        if adapters is None or adapters <= tokens:
            found.setdefault(table.choose(tokens, adapters), (tokens, adapters))
    for bound in table.bounds:
        if bound.tokens <= MOST_TOKENS:
            found.setdefault(bound.trace_key, (bound.tokens, None))
    for tokens in counts:  # every token its own adapter: the hint alone decides
        found.setdefault(table.choose(tokens, tokens), (tokens, tokens))
    large = {row.trace_key for row in table.rows if row.tokens > MOST_TOKENS}
    large |= {bound.trace_key for bound in table.bounds if bound.tokens > MOST_TOKENS}
    assert set(found) >= set(table.trace_keys) - large
    return found


@pytest.mark.parametrize("key", CASES)
def test_every_kernel_is_right_where_it_serves(key):
    workload = Workload.parse(key)
    dtype = getattr(torch, workload.dtype)
    generator = torch.Generator("cuda").manual_seed(7)
    slots = MOST_SLOTS

    def draw(*shape: int):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    a = [draw(slots, workload.rank, workload.in_features) / 64 for _ in workload.out_features]
    b = [draw(slots, out, workload.rank) for out in workload.out_features]
    library = packs.find(NAME, ARCH, key)[0].library()
    for trace, (tokens, adapters) in batches_of(workload).items():
        used = min(slots, adapters or slots)
        ids = torch.randint(-1, used, (tokens,), generator=generator, device="cuda").int()
        x, y = draw(tokens, workload.in_features), draw(tokens, workload.total_out)
        want = y.double()
        for slot in range(used):
            mine = ids == slot
            v = [x[mine].double() @ stack[slot].double().T for stack in a]
            parts = [part @ stack[slot].double().T for part, stack in zip(v, b, strict=True)]
            want[mine] += torch.cat(parts, dim=1)
        before = y.clone()
        plan = ops.segment_plan(ids, slots=slots, adapters=adapters)
        # Fewer slots than a batch of that kind has in earnest: the kernel is named, not chosen.
        with only(library, library.kernel(key, trace).name):
            ops.add_lora(y, x, a, b, plan)
            torch.cuda.synchronize()
        assert torch.equal(y[ids < 0], before[ids < 0])
        error = (y.double() - want).abs().max() / want.abs().max()
        assert error <= TOLERANCE[dtype], (key, trace, tokens, adapters, float(error))


@contextmanager
def only(library, name):
    """Every call is served by one kernel of a pack."""
    source = guarded.pack_source(library, name)
    with patch.object(sources, "SOURCES", [source]):
        warm.forget()
        try:
            yield
        finally:
            warm.forget()


@pytest.mark.parametrize("key", CASES)
def test_the_operator_chooses_what_explain_says(key):
    workload = Workload.parse(key)
    for tokens, adapters in batches_of(workload).values():
        for slots in (1, 4, 16, 300, 5000):
            batch = Batch(workload, tokens, adapters, NAME, ARCH, slots)
            choice = ops.explain_choice(key, tokens=tokens, adapters=adapters, slots=slots)
            assert choice.name == explain(batch).kernel, (tokens, adapters, slots)


def test_shipped_packs_know_this_gpu():
    """On another GPU there is nothing to test: say so instead of passing in silence."""
    if not HERE:
        pytest.skip(f"no shipped pack has binaries for {ARCH}")
    assert CASES


@pytest.mark.skipif(MAJOR != 9, reason="packs have such kernels for Hopper only")
def test_clusters_of_more_than_eight_blocks_have_room():
    """The driver says of each shipped kernel with such clusters how many run at once: on a whole
    GPU there is room. Where there is none, the operator passes the kernel over."""
    driver, counts = launch.driver(), []
    driver.ensure_context(0)
    for entry in HERE:
        library = load_cuda(entry.path)
        for info in library.kernels.values():
            if any(tensor_map.wanted(one.arguments) for one in info.launches):
                functions = driver.load(library.binary(info), info.launches)
                counts += map(driver.clusters_at_once, functions, info.launches)
    large = [count for count in counts if count is not None]
    assert large, "no kernel has such clusters, or the driver cannot tell"
    assert min(large) > 0
