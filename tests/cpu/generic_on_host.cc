// The kernels of dop/ops/generic on the host, with C entries for ctypes.
#include "cuda_on_host.h"

#include "generic.cu"
#include "plan.cu"

struct Launch {
  unsigned grid[3];
  unsigned threads;
  unsigned shared_bytes;
  unsigned seed;
};

// Arguments as the driver takes them: an array of pointers to the values.
template <class... Parameters, size_t... I>
static void call(void (*kernel)(Parameters...), void* const* values, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<Parameters>*)values[I]...);
}

template <class... Parameters>
static void run(void (*kernel)(Parameters...), const Launch& how, void* const* values) {
  host::launch([=] { call(kernel, values, std::index_sequence_for<Parameters...>()); },
               {how.grid[0], how.grid[1], how.grid[2]}, {how.threads, 1, 1}, how.shared_bytes,
               how.seed);
}

#define DOP_KERNEL(name) \
  if (std::strcmp(which, #name) == 0) return run(name, *how, values), 0;

extern "C" int host_run(const char* which, const Launch* how, void* const* values) {
  DOP_KERNEL(dop_plan)
  DOP_KERNEL(dop_plan_annotate)
  DOP_KERNEL(dop_shrink_rows_f16)
  DOP_KERNEL(dop_shrink_rows_bf16)
  DOP_KERNEL(dop_shrink_rows_f32)
  DOP_KERNEL(dop_expand_rows_f16)
  DOP_KERNEL(dop_expand_rows_bf16)
  DOP_KERNEL(dop_expand_rows_f32)
  DOP_KERNEL(dop_shrink_tiles16_f16)
  DOP_KERNEL(dop_shrink_tiles16_bf16)
  DOP_KERNEL(dop_shrink_tiles64_f16)
  DOP_KERNEL(dop_shrink_tiles64_bf16)
  DOP_KERNEL(dop_expand_tiles16_f16)
  DOP_KERNEL(dop_expand_tiles16_bf16)
  DOP_KERNEL(dop_expand_tiles64_f16)
  DOP_KERNEL(dop_expand_tiles64_bf16)
  return 1;
}
