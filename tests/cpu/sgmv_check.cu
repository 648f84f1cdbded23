// Checks an exported sgmv.cuh.  check choose [own] | tables | problems: on the host, without a GPU.
// check gpu [most tokens] [i/n]: every workload on the device against double precision on the host;
// of its lines, each n-th from the i-th on.
#include "sgmv.cuh"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using namespace dop::sgmv;

int workloads_seen_elsewhere();  // second.cu: the header in another translation unit

// stdin: "in slices out0 out1 out2 rank dtype tokens rows" per line -> name of the kernel
static int run_choose(bool own) {
  Shape s;
  int dtype, tokens;
  double rows;
  while (std::scanf("%d %d %d %d %d %d %d %d %lf", &s.in_features, &s.slices, &s.out_features[0],
                    &s.out_features[1], &s.out_features[2], &s.rank, &dtype, &tokens, &rows) == 9) {
    s.dtype = (Dtype)dtype;
    const char* name = choose(s, tokens, rows, own);
    std::printf("%d %s\n", (int)supports(s), name ? name : "-");
  }
  return 0;
}

// stdin: "tokens slots rows tiles", then the slots -> needed, then the four tables
static int run_tables() {
  int tokens, slots, rows, tiles;
  if (std::scanf("%d %d %d %d", &tokens, &slots, &rows, &tiles) != 4) return 1;
  std::vector<int> token_slot((size_t)tokens), a((size_t)tiles), b((size_t)tiles), c((size_t)tiles),
      d((size_t)tokens);
  for (int& slot : token_slot)
    if (std::scanf("%d", &slot) != 1) return 1;
  Tables t{rows, tiles, a.data(), b.data(), c.data(), d.data()};
  std::printf("%d\n", make_tables_host(token_slot.data(), tokens, slots, t));
  for (const auto* v : {&a, &b, &c, &d}) {
    for (int x : *v) std::printf("%d ", x);
    std::printf("\n");
  }
  return 0;
}

static void say(const Problem& p) {
  const char* text = check(p);
  std::printf("%s\n", text ? text : "ok");
}

static int run_problems() {
  const Shape& shape = detail::workloads()[0].shape;
  alignas(16) static char memory[64];
  Problem good;
  good.shape = shape;
  good.tokens = 4;
  good.slots = 2;
  good.x = good.y = memory;
  for (int s = 0; s < 3; ++s) good.a[s] = good.b[s] = memory;
  say(good);
  Problem p = good; p.shape.slices = 0; say(p);
  p = good; p.shape.rank += 1; say(p);
  p = good; p.tokens = -1; say(p);
  p = good; p.slots = 0; say(p);
  p = good; p.rows_per_segment = NAN; say(p);
  p = good; p.x = nullptr; say(p);
  p = good; p.y = memory + 8; say(p);
  p = good; p.b[0] = nullptr; say(p);
  p = good; p.a[0] = memory + 2; say(p);
  p = good; p.tokens = 2000000000; say(p);
  p = good; p.table_count = 1; say(p);
  p = good; p.slots = 0;
  std::printf("%d %d\n", (int)sgmv(p, nullptr, 0), workloads_seen_elsewhere());
  return 0;
}

// ---- on the device ---------------------------------------------------------------------------

#define CUDA_OK(call)                                                                   \
  do {                                                                                  \
    const cudaError_t error_ = (call);                                                  \
    if (error_ != cudaSuccess) {                                                        \
      std::printf("%s: %s (line %d)\n", #call, cudaGetErrorString(error_), __LINE__);   \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (0)

static unsigned seed = 1;
static double uniform() {
  seed = seed * 1664525u + 1013904223u;
  return (seed >> 8) * (1.0 / (1 << 24)) - 0.5;
}

static size_t size_of(Dtype t) { return t == Dtype::f32 ? 4 : 2; }

static void put(std::vector<char>& to, Dtype t, size_t i, double v) {
  if (t == Dtype::f32) ((float*)to.data())[i] = (float)v;
  if (t == Dtype::f16) ((__half*)to.data())[i] = __float2half((float)v);
  if (t == Dtype::bf16) ((__nv_bfloat16*)to.data())[i] = __float2bfloat16((float)v);
}

static double get(const std::vector<char>& from, Dtype t, size_t i) {
  if (t == Dtype::f32) return ((const float*)from.data())[i];
  if (t == Dtype::f16) return __half2float(((const __half*)from.data())[i]);
  return __bfloat162float(((const __nv_bfloat16*)from.data())[i]);
}

struct Array {
  std::vector<char> host;
  std::vector<float> values;  // what the elements are
  void* device = nullptr;
  Array(size_t n, Dtype t, double scale) : host(n * size_of(t)), values(n) {
    for (size_t i = 0; i < n; ++i) {
      put(host, t, i, uniform() * scale);
      values[i] = (float)get(host, t, i);
    }
    CUDA_OK(cudaMalloc(&device, host.size()));
    CUDA_OK(cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice));
  }
  ~Array() { cudaFree(device); }
};

static std::vector<int> batch(int tokens, int slots, int kind) {
  std::vector<int> ids((size_t)tokens);
  for (int t = 0; t < tokens; ++t) {
    const int any = (int)((uniform() + 0.5) * slots) % slots;
    ids[(size_t)t] = kind == 0 ? t % slots : kind == 1 ? slots - 1 : (t % 5 == 0 ? -1 : any);
  }
  return ids;
}

static void check_tables(const std::vector<int>& ids, int slots, int rows, int adapters) {
  const int tokens = (int)ids.size(), tiles = tile_bound(tokens, rows, adapters);
  std::vector<int> want((size_t)(3 * tiles + tokens)), got(want.size());
  int *device, *slot_of;
  void* scratch;
  CUDA_OK(cudaMalloc(&device, want.size() * 4 + 4));
  CUDA_OK(cudaMemset(device, 0xff, want.size() * 4));
  CUDA_OK(cudaMalloc(&slot_of, ids.size() * 4));
  CUDA_OK(cudaMalloc(&scratch, make_tables_bytes(slots)));
  CUDA_OK(cudaMemcpy(slot_of, ids.data(), ids.size() * 4, cudaMemcpyHostToDevice));
  auto tables = [&](int* base) {
    return Tables{rows, tiles, base, base + tiles, base + 2 * tiles, base + 3 * tiles};
  };
  make_tables_host(ids.data(), tokens, slots, tables(want.data()));
  CUDA_OK(make_tables(slot_of, tokens, slots, tables(device), scratch, 0));
  CUDA_OK(cudaMemcpy(got.data(), device, got.size() * 4, cudaMemcpyDeviceToHost));
  if (got != want) {
    std::printf("tables differ: tokens %d slots %d rows %d\n", tokens, slots, rows);
    std::exit(1);
  }
  cudaFree(device), cudaFree(slot_of), cudaFree(scratch);
}

static double error_of(const Shape& s, const Problem& p, const std::vector<int>& ids,
                       const Array& x, const Array& y, const std::vector<Array*>& a,
                       const std::vector<Array*>& b) {
  size_t total = 0, column = 0;
  for (int i = 0; i < s.slices; ++i) total += (size_t)s.out_features[i];
  std::vector<char> got(y.host.size());
  CUDA_OK(cudaMemcpy(got.data(), p.y, got.size(), cudaMemcpyDeviceToHost));
  double worst = 0, largest = 1e-30;
  const size_t in = (size_t)s.in_features, rank = (size_t)s.rank;
  for (int slice = 0; slice < s.slices; column += (size_t)s.out_features[slice++])
    for (size_t i = 0; i < ids.size() && i < 24; ++i) {  // a sample: the host is slow
      const size_t t = i * 7919 % ids.size();
      const size_t width = (size_t)s.out_features[slice], slot = ids[t] < 0 ? 0 : (size_t)ids[t];
      std::vector<double> v(rank, 0.0);
      const float* row = x.values.data() + t * in;
      for (size_t r = 0; ids[t] >= 0 && r < rank; ++r) {
        const float* a_row = a[(size_t)slice]->values.data() + (slot * rank + r) * in;
        for (size_t k = 0; k < in; ++k) v[r] += (double)row[k] * a_row[k];
      }
      for (size_t n = 0; n < width; ++n) {
        const size_t at = t * total + column + n;
        const float* b_row = b[(size_t)slice]->values.data() + (slot * width + n) * rank;
        double want = y.values[at];
        const double found = get(got, s.dtype, at);
        if (ids[t] < 0 && found != want) return INFINITY;
        for (size_t r = 0; ids[t] >= 0 && r < rank; ++r) want += v[r] * b_row[r];
        if (!(std::fabs(found - want) <= worst)) worst = std::fabs(found - want);
        if (std::fabs(want) > largest) largest = std::fabs(want);
      }
    }
  return worst / largest;
}

// Captured once with one batch, replayed with others: what is launched must not depend on them.
static int run_workload(const Shape& s, int tokens, double rows, int slots, bool own) {
  size_t total = 0;
  for (int i = 0; i < s.slices; ++i) total += (size_t)s.out_features[i];
  Array x((size_t)tokens * (size_t)s.in_features, s.dtype, 2.0), y(tokens * total, s.dtype, 2.0);
  std::vector<Array*> a, b;
  Problem p;
  for (int i = 0; i < s.slices; ++i) {
    const size_t one = (size_t)slots * (size_t)s.rank;
    a.push_back(new Array(one * (size_t)s.in_features, s.dtype, 4.0 / std::sqrt(s.in_features)));
    b.push_back(new Array(one * (size_t)s.out_features[i], s.dtype, 4.0 / std::sqrt(s.rank)));
    p.a[i] = a.back()->device;
    p.b[i] = b.back()->device;
  }
  int* ids_device;
  CUDA_OK(cudaMalloc(&ids_device, (size_t)tokens * 4));
  CUDA_OK(cudaMemset(ids_device, 0xff, (size_t)tokens * 4));
  p.shape = s, p.tokens = tokens, p.slots = slots, p.x = x.device, p.y = y.device;
  p.token_slot = ids_device, p.rows_per_segment = rows;
  void* workspace;
  const size_t bytes = workspace_bytes(p);
  CUDA_OK(cudaMalloc(&workspace, bytes + 16));
  CUDA_OK(cudaMemset(workspace, 0xff, bytes + 16));
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  CUDA_OK(sgmv(p, workspace, stream));
  CUDA_OK(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  CUDA_OK(sgmv(p, workspace, stream));
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&replay, graph, 0));
  double worst = 0;
  for (int kind = 0; kind < 3; ++kind) {
    const std::vector<int> ids = batch(tokens, slots, kind);
    CUDA_OK(cudaMemcpy(ids_device, ids.data(), ids.size() * 4, cudaMemcpyHostToDevice));
    CUDA_OK(cudaMemcpy(y.device, y.host.data(), y.host.size(), cudaMemcpyHostToDevice));
    CUDA_OK(cudaGraphLaunch(replay, stream));
    CUDA_OK(cudaStreamSynchronize(stream));
    const double error = error_of(s, p, ids, x, y, a, b);
    if (!(error <= worst)) worst = error;
  }
  const double limit = s.dtype == Dtype::f32 ? 1e-4 : s.dtype == Dtype::f16 ? 2e-3 : 1e-2;
  const bool fine = worst <= limit;
  std::printf("%s %-60s T %d rows %g error %.2e\n", fine ? "ok " : "BAD",
              choose(s, tokens, rows, own), tokens, rows, worst);
  for (Array* array : a) delete array;
  for (Array* array : b) delete array;
  cudaGraphExecDestroy(replay), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
  cudaFree(workspace), cudaFree(ids_device);
  return fine ? 0 : 1;
}

static int run_gpu(int most_tokens, int shard, int shards) {
  if (shard == 0) {
    for (int tokens : {1, 31, 32, 33, 1000, 1025, 4097, 65536})
      for (int slots : {1, 7, 64, 1025})
        for (int kind = 0; kind < 3; ++kind)
          for (int rows : {1, 4, 16}) check_tables(batch(tokens, slots, kind), slots, rows, slots);
    std::printf("ok  tables\n");
  }
  int bad = 0, line = 0, device = 0, major = 0;
  CUDA_OK(cudaGetDevice(&device));
  CUDA_OK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  for (int w = 0; w < detail::kWorkloads; ++w) {
    const detail::Workload& found = detail::workloads()[w];
    const bool own = found.own_rows && major == 9 && detail::compiled_for_own(device);
    for (int r = 0; r < (own ? found.own_rows : found.rows); ++r) {
      const detail::Row& row = detail::rows()[(own ? found.own_row : found.first_row) + r];
      const double rows = row.rows_upto > 1e9 ? row.tokens : row.rows_upto;
      for (int tokens : {row.tokens, row.tokens > 1 ? row.tokens - 1 : 1})
        if (tokens <= most_tokens && line++ % shards == shard)
          bad += run_workload(found.shape, tokens, rows, 9, own);
    }
  }
  return bad ? 1 : 0;
}

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "choose") return run_choose(argc > 2);
  if (what == "tables") return run_tables();
  if (what == "problems") return run_problems();
  if (what == "gpu") {
    int shard = 0, shards = 1;
    if (argc > 3 && (std::sscanf(argv[3], "%d/%d", &shard, &shards) != 2 || shards < 1)) return 2;
    return run_gpu(argc > 2 ? std::atoi(argv[2]) : 128, shard, shards);
  }
  return 2;
}
