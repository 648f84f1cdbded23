
#ifdef __NVCC__
#pragma nv_diagnostic pop
#endif

// ---- dispatch ------------------------------------------------------------------------------

namespace sgmv {

namespace detail {

inline double any() { return std::numeric_limits<double>::infinity(); }

static inline const Kernel* kernels() {
  static const Kernel all[] = {
@KERNELS@
  };
  return all;
}

// A bucket's first row serves an unknown hint (0), its last row every longer segment.
static inline const Row* rows() {
  static const Row all[] = {
@ROWS@
  };
  return all;
}

static inline const Workload* workloads() {
  static const Workload all[] = {
@WORKLOADS@
  };
  return all;
}

constexpr int kWorkloads = @WORKLOAD_COUNT@;

static inline const Workload* find(const Shape& shape) {
  for (int i = 0; i < kWorkloads; ++i) {
    const Shape& other = workloads()[i].shape;
    bool same = other.in_features == shape.in_features && other.slices == shape.slices &&
                other.rank == shape.rank && other.dtype == shape.dtype;
    for (int s = 0; same && s < shape.slices; ++s)
      same = other.out_features[s] == shape.out_features[s];
    if (same) return &workloads()[i];
  }
  return nullptr;
}

static inline const Kernel* pick(const Workload& workload, int tokens, double rows_per_segment,
                                 bool own) {
  own = own && workload.own_rows;
  const Row* row = rows() + (own ? workload.own_row : workload.first_row);
  const Row* const end = row + (own ? workload.own_rows : workload.rows);
  int bucket = end[-1].tokens;
  for (const Row* r = row; r < end; ++r)
    if (r->tokens >= tokens) {
      bucket = r->tokens;
      break;
    }
  for (; row < end; ++row)
    if (row->tokens == bucket && rows_per_segment <= row->rows_upto)
      return kernels() + row->kernel;
  return nullptr;
}

// The table's kernel, or another one of the workload if this device cannot run it.
static inline const Kernel* pick_here(const Problem& p) {
  const Workload* workload = find(p.shape);
  if (!workload || p.tokens < 1 || !(p.rows_per_segment >= 0)) return nullptr;
  int device = 0, major = 0, minor = 0, smem = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return nullptr;
  const int arch = major * 10 + minor;
  const bool own = workload->own_rows && arch == 90 && compiled_for_own(device);
  const Kernel* chosen = pick(*workload, p.tokens, p.rows_per_segment, own);
  for (int i = 0; chosen && i <= workload->kernels; ++i) {
    if (chosen->min_arch <= arch && chosen->max_smem <= smem) return chosen;
    chosen = i < workload->kernels ? kernels() + workload->first_kernel + i : nullptr;
  }
  return nullptr;
}

static inline int adapters_of(const Problem& p) {
  return p.max_adapters > 0 && p.max_adapters < p.slots ? p.max_adapters : p.slots;
}

// Lays tables (if the call makes its own) and workspaces out behind `base`; returns the bytes.
static inline size_t arrange(const Problem& p, const Kernel& kernel, char* base, Call& call,
                             Tables& made, void*& scratch) {
  size_t end = 0;
  call.tiles = p.tokens;
  if (kernel.tile_rows) {
    const Tables* ready = nullptr;
    for (int i = 0; i < p.table_count; ++i)
      if (p.tables[i].rows == kernel.tile_rows) ready = &p.tables[i];
    if (!ready) {
      made.rows = kernel.tile_rows;
      made.tiles = tile_bound(p.tokens, made.rows, adapters_of(p));
      int** const arrays[] = {&made.tile_slot, &made.tile_row0, &made.tile_rows, &made.row_index};
      for (int i = 0; i < 4; ++i) {
        *arrays[i] = (int*)at(base, end);
        end += padded((long long)(i < 3 ? made.tiles : p.tokens) * (long long)sizeof(int));
      }
      if (p.token_rank) {
        made.tile_rank = (int*)at(base, end);
        end += padded((long long)made.tiles * (long long)sizeof(int));
      }
      if (p.token_scale) {
        made.tile_scale = (float*)at(base, end);
        end += padded((long long)made.tiles * (long long)sizeof(float));
      }
      scratch = at(base, end);
      end += padded((long long)make_tables_bytes(p.slots));
      ready = &made;
    }
    call.tiles = ready->tiles;
    call.tile_slot = ready->tile_slot;
    call.tile_row0 = ready->tile_row0;
    call.tile_rows = ready->tile_rows;
    call.row_index = ready->row_index;
    call.tile_rank = ready->tile_rank;
    call.tile_scale = ready->tile_scale;
  }
  return end + kernel.workspace(call, at(base, end));
}

static inline long long shift(const void* stack, const void* first) {
  return ((long long)(intptr_t)stack - (long long)(intptr_t)first) / 16;
}

static inline Call call_of(const Problem& p) {
  Call call = {};
  call.x = p.x;
  call.a = p.a[0];
  call.b = p.b[0];
  call.y = call.y_in = p.y;
  call.token_slot = p.token_slot;
  call.token_rank = p.token_rank;
  call.token_scale = p.token_scale;
  call.tokens = p.tokens;
  call.slots = p.slots;
  if (p.shape.slices > 1) {
    call.a1_shift = shift(p.a[1], p.a[0]);
    call.b1_shift = shift(p.b[1], p.b[0]);
  }
  if (p.shape.slices > 2) {
    call.a2_shift = shift(p.a[2], p.a[0]);
    call.b2_shift = shift(p.b[2], p.b[0]);
  }
  return call;
}

}  // namespace detail

/// Whether the header holds kernels for a shape.
static inline bool supports(const Shape& shape) {
  return shape.slices >= 1 && shape.slices <= 3 && detail::find(shape) != nullptr;
}

/// Name of the kernel that the table picks for a batch (see the top for the hint), whatever the
/// device, or where compiled for sm_90a (`own`); null if the shape is not supported.
static inline const char* choose(const Shape& shape, int tokens, double rows_per_segment,
                                 bool own = false) {
  if (!supports(shape) || tokens < 1 || !(rows_per_segment >= 0)) return nullptr;
  const detail::Kernel* kernel =
      detail::pick(*detail::find(shape), tokens, rows_per_segment, own);
  return kernel ? kernel->name : nullptr;
}

/// What is wrong with a problem, or null.
static inline const char* check(const Problem& p) {
  const Shape& shape = p.shape;
  if (shape.slices < 1 || shape.slices > 3) return "slices must be 1 to 3";
  if (!supports(shape)) return "no kernel for this shape: tune and export it";
  if (p.tokens < 0) return "tokens is negative";
  if (p.tokens == 0) return nullptr;
  if (p.slots < 1) return "slots must be 1 or more";
  if (!(p.rows_per_segment >= 0)) return "rows_per_segment must be 0 or more";
  if (!p.x || !p.y) return "x or y is null";
  if (((uintptr_t)p.x | (uintptr_t)p.y) & 15) return "x and y must be 16-byte aligned";
  long long width = 0;
  for (int s = 0; s < shape.slices; ++s) {
    width += shape.out_features[s];
    if (!p.a[s] || !p.b[s]) return "a stack is null";
    if (((uintptr_t)p.a[s] | (uintptr_t)p.b[s]) & 15) return "stacks must be 16-byte aligned";
  }
  if (width < shape.in_features) width = shape.in_features;
  if (p.tokens > 2147483647LL / width) return "tokens * width must stay below 2^31";
  if (p.table_count < 0 || (p.table_count > 0 && !p.tables)) return "tables is null";
  return nullptr;
}

/// Rows per tile that the kernel of this problem wants on the current device; 0 if it takes
/// token_slot alone; negative if there is no kernel.
static inline int tile_rows_of(const Problem& p) {
  const detail::Kernel* kernel = detail::pick_here(p);
  return kernel ? kernel->tile_rows : -1;
}

/// Bytes that `sgmv` wants on the current device: a function of the shape, tokens, slots,
/// max_adapters, the hint and which tables are given.
static inline size_t workspace_bytes(const Problem& p) {
  const detail::Kernel* kernel = detail::pick_here(p);
  if (!kernel) return 0;
  detail::Call call = detail::call_of(p);
  Tables made;
  void* scratch = nullptr;
  return detail::arrange(p, *kernel, nullptr, call, made, scratch);
}

/// y += SGMV on `stream`; y's rows of tokens without adapter stay as they are.
///
/// Returns cudaErrorInvalidValue if `check` finds something, cudaErrorNotSupported if this device
/// can run no kernel of the shape, else what the launches return.
static inline cudaError_t sgmv(const Problem& p, void* workspace, cudaStream_t stream) {
  if (check(p)) return cudaErrorInvalidValue;
  if (p.tokens == 0) return cudaSuccess;
  const detail::Kernel* kernel = detail::pick_here(p);
  if (!kernel) return cudaErrorNotSupported;
  detail::Call call = detail::call_of(p);
  Tables made;
  void* scratch = nullptr;
  const size_t bytes =
      detail::arrange(p, *kernel, (char*)workspace, call, made, scratch);
  if ((bytes && !workspace) || ((uintptr_t)workspace & 15)) return cudaErrorInvalidValue;
  if (!p.token_slot && (!kernel->tile_rows || made.rows)) return cudaErrorInvalidValue;
  if (made.rows) {
    const cudaError_t error =
        make_tables(p.token_slot, p.tokens, p.slots, made, scratch, stream, p.token_rank,
                    p.token_scale);
    if (error != cudaSuccess) return error;
  }
  return kernel->launch(call, stream);
}

}  // namespace sgmv
}  // namespace dop
