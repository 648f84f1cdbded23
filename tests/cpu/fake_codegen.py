"""A code generator for tests: SGMV in C, in the object form that TVM's LLVM back end gives, with
faults on demand. A trace of one pragma says what is wanted: ("tile_rows", n) or (fault, n)."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from dop.errors import BuildError, ConstraintError, TraceError
from dop.measure.artifact import ROW_TABLES, TILE_TABLES
from dop.space.step import PragmaStep
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload

CODE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef struct { void *data; int32_t dev[2]; int32_t ndim; uint32_t type;
                 int64_t *shape, *strides; uint64_t offset; } Tensor;
typedef struct { int32_t type_index; uint32_t pad; union { int64_t i; void *p; } v; } Any;
struct group { void *sync; int32_t num_task; };
__attribute__((weak)) int (*__TVMBackendParallelLaunch)(int (*)(int, struct group *, void *),
                                                        void *, int);
__attribute__((weak)) void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
__attribute__((weak)) int (*__TVMBackendFreeWorkspace)(int, int, void *);
void TVMFFIErrorSetRaisedFromCStrParts(const char *, const char **, int32_t);
#define T(i) ((Tensor *)args[i].v.p)
static const int64_t outs[] = {OUTS};
static int body(int task, struct group *g, void *data) {
  const Any *args = data;
  int64_t tiles = T(3)->shape[0];
  int64_t n = T(Y)->shape[1];
  float *x = T(0)->data, *y = T(Y)->data;
  int32_t *slot = T(3)->data;
#if TM
  int32_t *row0 = T(4)->data, *rows = T(5)->data, *index = T(8)->data;
  int32_t *ranks = T(6)->data;
  float *scales = T(7)->data;
#else
  int32_t *ranks = T(4)->data;
  float *scales = T(5)->data;
#endif
  float *v = __TVMBackendAllocWorkspace(1, 0, sizeof(float) * R, 2, 32);
  for (int64_t t = task; t < tiles; t += g->num_task) {
    int64_t count = 1;
#if TM
    count = rows[t];
#else
    if (slot[t] < 0) continue;
#endif
    for (int64_t i = 0; i < count; ++i) {
      int64_t row = t;
#if TM
      row = index[row0[t] + i];
#endif
      int64_t column = 0;
      for (int s = 0; s < S; ++s) {
        int64_t a_shift = s ? args[Y + s].v.i * 4 : 0;
        int64_t b_shift = s ? args[Y + S - 1 + s].v.i * 4 : 0;
        float *a = (float *)T(1)->data + a_shift + (int64_t)slot[t] * R * K;
        float *b = (float *)T(2)->data + b_shift + (int64_t)slot[t] * R * outs[s];
        for (int r = 0; r < R; ++r) {
          float sum = 0;
          for (int k = 0; k < K; ++k) sum += x[row * K + k] * a[r * K + k];
          v[r] = sum;
        }
        for (int64_t o = 0; o < outs[s]; ++o, ++column) {
          float sum = 0;
          for (int r = 0; r < R && r < ranks[t]; ++r) sum += v[r] * b[o * R + r];
          y[row * n + column] += scales[t] * sum;
        }
      }
    }
  }
  __TVMBackendFreeWorkspace(1, 0, v);
  return 0;
}
int __tvm_ffi_main(void *self, const Any *args, int32_t n, Any *result) {
  if (n != NARGS || T(0)->ndim != 2 || T(0)->shape[1] != K || args[0].type_index != 7) {
    const char *parts[] = {"bad ", 0, "arguments"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 3);
    return -1;
  }
  float *y = T(Y)->data;
  int64_t tokens = T(Y)->shape[0], width = T(Y)->shape[1];
  FAULT
  return __TVMBackendParallelLaunch(body, (void *)args, 0);
}
"""

RUN_FAULTS = {
    "crash": "*(volatile int *)8 = 1;",
    "abort": "abort();",
    "hang": 'for (;;) __asm__ volatile("");',
    "hang_at": 'if (tokens == VALUE) for (;;) __asm__ volatile("");',
    "wrong": "y[0] += 1.0f;",
    "wrong_at": "if (tokens == VALUE) y[0] += 1.0f;",
    "unwritten": "{ float keep = y[5 * width]; body(0, &(struct group){0, 1}, (void *)args);"
    " y[5 * width] = keep; return 0; }",
    "everything_unwritten": "return 0;",
    "poisoned": "{ float *w = __TVMBackendAllocWorkspace(1, 0, 4096, 2, 32); y[0] += 0 * w[7];"
    " __TVMBackendFreeWorkspace(1, 0, w); }",
    "overrun": "y[tokens * width] = 7.0f;",
    "underrun": "y[-1] = 7.0f;",
    "bare": "for (int64_t i = 0; i < tokens; ++i) y[i * width] += 0.0f * i + 1e-3f * (i % 2);",
    "refuse": "return body ? -1 : 0;",
    "exit": "_exit(7);",
    "killed": "kill(getpid(), 9);",
    "slow": "{ struct timespec t = {0, VALUE * 1000}; nanosleep(&t, 0); }",
}


@dataclass(frozen=True)
class Code:
    """Same attributes as dop.lowering.codegen.Generated."""

    workload_key: str
    tile_rows: int
    source: str
    object_code: bytes
    arguments: tuple[str, ...]
    kernels: tuple[object, ...] = ()
    workspaces: tuple[object, ...] = ()
    kind: str = "cpu"


def trace(what: str = "tile_rows", value: int | str = 0) -> Trace:
    """A trace that asks for a tile height or a fault; `value` tells traces apart."""
    return Trace((PragmaStep(0, 0, what, value),))


def generate(workload: Workload, steps: Trace, target: Target) -> Code:
    step = steps.steps[0]
    assert isinstance(step, PragmaStep)
    _fail_build(step.name, step.value)
    tile_rows = int(step.value) if step.name == "tile_rows" else 0  # type: ignore[arg-type]
    tables = TILE_TABLES if tile_rows else ROW_TABLES
    names = ("x", "a", "b", *tables, "y_in", "y")
    shifts = tuple(f"{stack}{s}_shift" for stack in "ab" for s in range(1, workload.slices))
    fault = RUN_FAULTS.get(step.name, "").replace("VALUE", str(step.value))
    source = CODE.replace("OUTS", ", ".join(map(str, workload.out_features)))
    source = source.replace("FAULT", fault)
    if fault:
        source = "#include <unistd.h>\n#include <signal.h>\n#include <time.h>\n" + source
    defines = {
        "S": workload.slices,
        "R": workload.rank,
        "K": workload.in_features,
        "TM": tile_rows,
        "Y": len(names) - 1,
        "NARGS": len(names) + len(shifts),
    }
    code = source if step.name != "undefined" else source + "\nint f(void);int h(){return f();}\n"
    object_code = b"not an object" if step.name == "compile_error" else _compile(code, defines)
    return Code(workload.key, tile_rows, source, object_code, names + shifts)


def _fail_build(what: str, value: object) -> None:
    if what == "build_error":
        raise BuildError("TVM refused the program: planted.")
    if what == "trace_error":
        raise TraceError("step 3: planted.")
    if what == "constraint":
        raise ConstraintError("too much of everything.")
    if what == "build_bug":
        raise KeyError("planted")
    if what == "build_hang":
        time.sleep(1000)
    if what == "build_crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "build_killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "build_killed_once" and not Path(str(value)).exists():
        Path(str(value)).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _compile(source: str, defines: dict[str, int]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "k.o"
        flags = [f"-D{name}={value}" for name, value in defines.items()]
        command = ["gcc", "-O2", "-std=gnu11", "-fPIC", "-w", *flags]
        command += ["-xc", "-c", "-", "-o", str(target)]
        subprocess.run(command, input=source, text=True, check=True)
        return target.read_bytes()
