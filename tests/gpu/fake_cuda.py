"""A code generator for tests: plain CUDA SGMV in two kernels, with faults on demand. A trace of one
pragma says what is wanted: ("tile_rows", n) or (fault, n)."""

from __future__ import annotations

from dataclasses import dataclass

from dop.errors import BuildError
from dop.measure.artifact import ROW_TABLES, TILE_TABLES
from dop.space.step import PragmaStep
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload

CODE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef ELEMENT E;
#define ARGS const E *x, const E *a, const E *b, TABLES float *v, const E *y_in, E *y, SHIFTS \
             int tokens, int tiles
#if TM
#define COUNT tile_rows[t]
#define ROW(i) row_index[tile_row0[t] + (i)]
#define SLOT tile_slot[t]
#define RANK (tile_rank ? min(tile_rank[t], R) : R)
#define SCALE (tile_scale ? tile_scale[t] : 1.f)
#define ROWS TM
#else
#define COUNT (token_slot[t] >= 0)
#define ROW(i) t
#define SLOT token_slot[t]
#define RANK (token_rank ? min(token_rank[t], R) : R)
#define SCALE (token_scale ? token_scale[t] : 1.f)
#define ROWS 1
#endif
__device__ const int outs[] = {OUTS};
extern "C" __global__ void shrink(ARGS) {
  int t = blockIdx.x;
  const long long a_shift[] = {A_SHIFTS};
  for (int i = 0; i < COUNT; ++i)
    for (int n = threadIdx.x; n < S * R; n += blockDim.x) {
      const E *w = a + a_shift[n / R] * (16 / sizeof(E)) + ((long long)SLOT * R + n % R) * K;
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += (float)x[(long long)ROW(i) * K + k] * (float)w[k];
      v[((long long)t * ROWS + i) * S * R + n] = sum;
    }
}
extern "C" __global__ void expand(ARGS) {
  extern __shared__ float room[];
  int t = blockIdx.x;
  const long long b_shift[] = {B_SHIFTS};
  FAULT
  for (int i = 0; i < COUNT; ++i)
    for (int s = 0, begin = 0; s < S; begin += outs[s++])
      for (int n = threadIdx.x; n < outs[s]; n += blockDim.x) {
        const E *w = b + b_shift[s] * (16 / sizeof(E)) + ((long long)SLOT * outs[s] + n) * R;
        float sum = 0;
        for (int r = 0; r < RANK; ++r)
          sum += v[(((long long)t * ROWS + i) * S + s) * R + r] * (float)w[r];
        long long at = (long long)ROW(i) * N + begin + n;
        y[at] = (E)((float)y_in[at] + SCALE * sum);
      }
}
"""

FAULTS = {
    "illegal": "if (t == 0) *(volatile int *)16 = 1;",
    # A loop that reads a clock: compilers may take any other endless loop away.
    "hang": 'unsigned long long now; do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));'
    " while (now);",
    "wrong": "if (t == 0 && threadIdx.x == 0) y[0] = (E)7.5f;",
    "unwritten": "if (t == 1) return;",
    "poisoned": "if (COUNT > 0 && threadIdx.x == 0) y[(long long)ROW(0) * N] = (E)v[V_SIZE];",
    "overrun": "if (t == 0 && threadIdx.x == 0) y[(long long)tokens * N + 5] = (E)1.f;",
    "bare": "for (int i = threadIdx.x; i < tokens; i += blockDim.x)"
    " y[(long long)i * N] = (E)((float)y[(long long)i * N] * 1.01f);",
    "compile_error": "int broken = ;",
    "smem": "",
    "big_smem": "room[20000] = 1.f;",
    "threads": "",
    "no_such_kernel": "",
}
ELEMENTS = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}


@dataclass(frozen=True)
class Kernel:
    name: str
    grid: tuple[str, str, str]
    block: tuple[int, int, int]
    dynamic_smem_bytes: int
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Space:
    name: str
    dtype: str
    elements: str


@dataclass(frozen=True)
class Code:
    """Same attributes as dop.lowering.codegen.Generated."""

    workload_key: str
    tile_rows: int
    source: str
    kernels: tuple[Kernel, ...]
    workspaces: tuple[Space, ...]
    arguments: tuple[str, ...]
    object_code: bytes = b""
    kind: str = "cuda"


def _element(table: str) -> str:
    return "float" if table.endswith("_scale") else "int"


def trace(what: str = "tile_rows", value: int = 0) -> Trace:
    return Trace((PragmaStep(0, 0, what, value),))


def generate(workload: Workload, steps: Trace, target: Target) -> Code:
    step = steps.steps[0]
    assert isinstance(step, PragmaStep)
    what = step.name
    if what == "build_error":
        raise BuildError("TVM refused the program: planted.")
    tile_rows = int(step.value) if what == "tile_rows" else 0  # type: ignore[arg-type]
    tables = TILE_TABLES if tile_rows else ROW_TABLES
    s = workload.slices
    shifts = tuple(f"{stack}{i}_shift" for stack in "ab" for i in range(1, s))
    rows = max(tile_rows, 1)
    tiles = "tiles" if tile_rows else "tokens"
    elements = f"{tiles} * {rows * s * workload.rank} + 1"
    changes = {
        "FAULT": FAULTS.get(what, ""),
        "V_SIZE": f"{'tiles' if tile_rows else 'tokens'} * {rows * s * workload.rank}",
        "TABLES": "".join(f"const {_element(name)} *{name}, " for name in tables),
        "A_SHIFTS": ", ".join(["0", *(f"a{i}_shift" for i in range(1, s))]),
        "B_SHIFTS": ", ".join(["0", *(f"b{i}_shift" for i in range(1, s))]),
        "SHIFTS": "".join(f"long long {name}, " for name in shifts),
        "OUTS": ", ".join(map(str, workload.out_features)),
        "ELEMENT": ELEMENTS[workload.dtype],
    }
    source = CODE
    for name, text in changes.items():
        source = source.replace(name, text)
    sizes = {"S": s, "R": workload.rank, "K": workload.in_features, "N": workload.total_out}
    defines = "".join(f"#define {n} {v}\n" for n, v in {**sizes, "TM": tile_rows}.items())
    arguments = ("x", "a", "b", *tables, "v", "y_in", "y", *shifts, "tokens", "tiles")
    smem = {"smem": 1 << 20, "big_smem": 100 << 10}.get(what, 0)
    second = "missing" if what == "no_such_kernel" else "expand"
    threads = 2048 if what == "threads" else 128
    kernels = (
        Kernel("shrink", (tiles, "1", "1"), (64, 1, 1), 0, arguments),
        Kernel(second, (tiles, "1", "1"), (threads, 1, 1), smem, arguments),
    )
    plain = tuple(n for n in arguments if n not in ("v", "tokens", "tiles"))
    # the defines of short names come behind the headers, which use such names themselves
    head, _, body = source.partition("typedef")
    source = head + defines + "typedef" + body
    spaces = (Space("v", "float32", elements),)
    return Code(workload.key, tile_rows, source, kernels, spaces, plain)
