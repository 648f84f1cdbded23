// The kernels of dop/ops/generic on the host, with C entries for ctypes.
#include "cuda_on_host.h"

#include "plan.cu"

extern "C" void host_plan(const PlanParams* params, int threads, int shared_bytes, unsigned seed) {
  host::launch(dop_plan, *params, {1, 1, 1}, {(unsigned)threads, 1, 1}, shared_bytes, seed);
}

extern "C" void host_plan_annotate(const AnnotateParams* params, int blocks, unsigned seed) {
  host::launch(dop_plan_annotate, *params, {(unsigned)blocks, 1, 1}, {256, 1, 1}, 0, seed);
}
