// Segment plans on the device: one launch of one block makes every table of a batch.
//
// In:  the slot of each token (int32 or int64; any value outside [0, slots) means no adapter), and
//      optionally the rank and the scale of each slot.
// Out: one int32 buffer whose layout is `layout` in dop/ops/plan.py: the row form's tables, row_index,
//      the tile tables for tiles of 8, 16, 32, 48, 64, 80 and 128 rows, then scratch for large
//      batches.
//
// How: the tokens are sorted by slot with a stable counting sort on digits of 8 bits (one pass below
// 256 slots, two up to 65,535). Warp w owns the w-th range of tokens and counters of its own, and
// lanes with equal digits find each other by match, so there are no atomics and the tables are the
// same in every run. The sorted keys then give a bit per position, "a segment starts here"; tiles
// follow from a prefix maximum (start of my segment) and prefix sums (tiles before me).
//
// The file compiles for the host as well, see tests/cpu/cuda_on_host.h.

#ifndef DOP_ON_HOST
#define DOP_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

struct PlanParams {
  const void* ids;      // int32 or int64 [tokens]
  const int* ranks;     // [slots], or null: every slot has max_rank
  const float* scales;  // [slots], or null: every slot has `scale`
  int* tables;          // the buffer, 64-byte aligned
  int ids_are_64_bit;
  int tokens;
  int slots;
  int max_rank;
  float scale;
};

struct AnnotateParams {
  const int* from;      // a filled buffer
  int* to;              // a buffer of the same layout, may be the same one
  const int* ranks;     // [slots], or null: as in `from`
  const float* scales;  // [slots], or null: 1
  int tokens;
  int slots;
  float scale;  // new scale = from's * scales[slot] * scale
};

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kMaxWarps = 32;
constexpr int kDigits = 256;
constexpr int kForms = 7;             // heights of tiles, see rows_of
constexpr int kSharedTokens = 16384;  // up to here the sorted keys stay in shared memory
constexpr int kBatch = 8;             // loads in flight per lane

typedef unsigned short Key;

__device__ __forceinline__ int padded(int n) { return (n + 15) & ~15; }

// Rows of a form's tiles: multiples of 8, kMaxRows at most. Twin of TILE_SIZES in dop/ops/plan.py.
__device__ __forceinline__ int rows_of(int form) {
  return form < 3 ? 8 << form : form < 6 ? 16 * form : 128;
}

// Where each table starts in the buffer.
struct Layout {
  int tokens, step, bound;

  __device__ __forceinline__ Layout(int tokens_, int slots) {
    tokens = tokens_;
    step = padded(tokens_);
    bound = tokens_ < slots ? tokens_ : slots;
  }
  __device__ __forceinline__ int token_slot() const { return 0; }
  __device__ __forceinline__ int token_rank() const { return step; }
  __device__ __forceinline__ int token_scale() const { return 2 * step; }
  __device__ __forceinline__ int row_index() const { return 3 * step; }
  // No division by what is known at run time only.
  __device__ __forceinline__ int tiles(int form) const {
    const unsigned sixteens = (unsigned)tokens >> 4;
    const unsigned full = form < 3 ? (unsigned)tokens >> (3 + form)
                          : form == 3 ? sixteens / 3
                          : form == 4 ? sixteens >> 2
                          : form == 5 ? sixteens / 5
                                      : sixteens >> 3;
    return (int)full + bound;
  }
  // tile_slot, tile_row0, tile_rows, tile_rank, tile_scale follow each other.
  __device__ __forceinline__ int tile_tables(int form) const {
    int at = 4 * step;
#pragma unroll
    for (int f = 0; f < kForms; ++f) at += f < form ? 5 * padded(tiles(f)) : 0;
    return at;
  }
  // Two tables of tokens.
  __device__ __forceinline__ int scratch() const { return tile_tables(kForms); }
};

struct Facts {
  int rank;
  float scale;
};

// Rank and scale of a slot. An adapter of rank 0 becomes one of rank 1 whose scale is 0: kernels
// rely on a rank of at least 1.
__device__ __forceinline__ Facts facts_of(const int* ranks, const float* scales, int slot,
                                          int any_rank, float scale) {
  const int rank = ranks == nullptr ? any_rank : ranks[slot];
  const float factor = scales == nullptr ? scale : scales[slot];
  return {rank < 1 ? 1 : rank, rank < 1 ? 0.0f : factor};
}

// Exclusive sum over the block of one value per thread. `sums` has a place per warp.
__device__ __forceinline__ int sum_before(int value, int* sums) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  int sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += left;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  const int others = lane < warps && lane < warp ? sums[lane] : 0;
  return (int)__reduce_add_sync(kAll, (unsigned)others) + sum - value;
}

// The counters of one digit are `warps` neighbours; the odd stride spreads digits over the banks.
struct Counters {
  int* at;
  int warps;
  __device__ __forceinline__ int& of(int digit, int warp) { return at[digit * (warps + 1) + warp]; }
  __device__ __forceinline__ void clear(int digits) {
    for (int i = threadIdx.x; i < digits * (warps + 1); i += blockDim.x) at[i] = 0;
  }
  // Counts to places: exclusive sums over digits, then warps.
  __device__ __forceinline__ void scan(int digits, int* sums) {
    const int all = digits * warps, shift = 31 - __clz(warps);
    const int each = (digits + 31) >> 5;  // at most 8
    const int first = threadIdx.x * each;
    int total = 0;
    for (int i = first; i < first + each && i < all; ++i) total += of(i >> shift, i & (warps - 1));
    int place = sum_before(total, sums);
    for (int i = first; i < first + each && i < all; ++i) {
      int& counter = of(i >> shift, i & (warps - 1));
      const int count = counter;
      counter = place;
      place += count;
    }
  }
};

__device__ __forceinline__ void count_digit(Counters& counters, int digit, int warp, int lane) {
  const unsigned same = __match_any_sync(kAll, digit);
  if (digit >= 0 && lane == __ffs(same) - 1) counters.of(digit, warp) += __popc(same);
  __syncwarp();
}

// Place of this lane's token in the sorted order; takes it from the counters.
__device__ __forceinline__ int take_place(Counters& counters, int digit, int warp, int lane) {
  const unsigned same = __match_any_sync(kAll, digit);
  const int first = digit >= 0 ? counters.of(digit, warp) : 0;
  __syncwarp();
  if (digit >= 0 && lane == __ffs(same) - 1) counters.of(digit, warp) = first + __popc(same);
  __syncwarp();
  return first + __popc(same & ((1u << lane) - 1));
}

// Reads the ids, writes the row form's tables and counts the low digits. Tokens without adapter get
// the rank and scale of slot 0.
__device__ __forceinline__ void read_ids(const PlanParams& p, const Layout& at, Counters& counters,
                                         int begin, int end, int warp, int lane) {
  int* const token_slot = p.tables + at.token_slot();
  int* const token_rank = p.tables + at.token_rank();
  float* const token_scale = (float*)(p.tables + at.token_scale());
#pragma unroll 1
  for (int first = begin; first < end; first += 32 * kBatch) {
    int slot[kBatch];
    Facts fact[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int token = first + i * 32 + lane;
      long long id = -1;
      if (token < end)
        id = p.ids_are_64_bit ? ((const long long*)p.ids)[token] : ((const int*)p.ids)[token];
      slot[i] = id >= 0 && id < p.slots ? (int)id : -1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      fact[i] = facts_of(p.ranks, p.scales, slot[i] < 0 ? 0 : slot[i], p.max_rank, p.scale);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int token = first + i * 32 + lane;
      if (first + i * 32 >= end) break;
      const bool mine = token < end;
      if (mine) {
        token_slot[token] = slot[i];
        token_rank[token] = fact[i].rank;
        token_scale[token] = fact[i].scale;
      }
      const int key = slot[i] < 0 ? p.slots : slot[i];
      count_digit(counters, mine ? key & (kDigits - 1) : -1, warp, lane);
    }
  }
}

// Tiles that nobody needs: no rows, slot 0. Those that are needed are written over later.
__device__ __forceinline__ void clear_tiles(const PlanParams& p, const int* places) {
  const Facts none = facts_of(p.ranks, p.scales, 0, p.max_rank, p.scale);
  const float s = none.scale;
  const int r = none.rank;
#pragma unroll 1
  for (int f = 0; f < kForms; ++f) {
    const int quads = places[kForms + f] / 4;
    int4* const slot = (int4*)(p.tables + places[f]);
    float4* const scale = (float4*)(slot + 4 * quads);
    for (int i = threadIdx.x; i < quads; i += blockDim.x) {
      slot[i] = slot[i + quads] = slot[i + 2 * quads] = make_int4(0, 0, 0, 0);
      slot[i + 3 * quads] = make_int4(r, r, r, r);
      scale[i] = make_float4(s, s, s, s);
    }
  }
}

constexpr int kMaxRows = 128;  // of a tile

// How far the segment of `position` goes on from there, kMaxRows at most. Segments start where a bit
// of `starts` is set; five words hold the answer.
__device__ __forceinline__ int rows_left(const unsigned* starts, int position, int tokens) {
  const int word = position >> 5, words = (tokens + 31) >> 5;
  unsigned bits = starts[word] & ~((2u << (position & 31)) - 1);
  int end = tokens;
  for (int w = word; w < words && w <= word + kMaxRows / 32; ++w) {
    if (w > word) bits = starts[w];
    if (bits != 0) {
      end = w * 32 + __ffs(bits) - 1;
      break;
    }
  }
  return min(end - position, kMaxRows);
}

// The tile tables of all forms, from the sorted keys. `places`: where those of each form begin, then
// how long each of a form's is.
__device__ __forceinline__ void make_tiles(const PlanParams& p, const Layout& at, const Key* sorted,
                                           unsigned* starts, int (*sums)[kMaxWarps],
                                           const int* places, int begin, int end, int warp,
                                           int lane) {
  const int warps = blockDim.x >> 5;
  int last = -1;
#pragma unroll 1
  for (int first = begin; first < end; first += 32) {
    const int position = first + lane;
    const bool start = position < end && (position == 0 || sorted[position] != sorted[position - 1]);
    const unsigned mask = __ballot_sync(kAll, start);
    if (mask != 0) last = first + 31 - __clz(mask);
    if (lane == 0) starts[first >> 5] = mask;
  }
  if (lane == 0) sums[kForms][warp] = last;
  __syncthreads();
  const int before = __reduce_max_sync(kAll, lane < warps && lane < warp ? sums[kForms][lane] : -1);

  int count[kForms] = {};
  int segment = before;
#pragma unroll 1
  for (int first = begin; first < end; first += 32) {
    const unsigned mask = starts[first >> 5], upto = mask & (kAll >> (31 - lane));
    const int position = first + lane;
    const int row = position - (upto != 0 ? first + 31 - __clz(upto) : segment);
    const bool valid = position < end && sorted[position] != p.slots;
    if (mask != 0) segment = first + 31 - __clz(mask);
#pragma unroll
    for (int f = 0; f < kForms; ++f)
      count[f] += __popc(__ballot_sync(kAll, valid && row % rows_of(f) == 0));
  }
#pragma unroll
  for (int f = 0; f < kForms; ++f)
    if (lane == 0) sums[f][warp] = count[f];
  __syncthreads();
  int held = 0;  // lane f's is the number of tiles of form f so far
#pragma unroll
  for (int f = 0; f < kForms; ++f) {
    const unsigned mine = lane < warps && lane < warp ? sums[f][lane] : 0;
    const int all = (int)__reduce_add_sync(kAll, mine);
    if (lane == f) held = all;
  }

  segment = before;
#pragma unroll 1
  for (int first = begin; first < end; first += 32) {
    const unsigned mask = starts[first >> 5], upto = mask & (kAll >> (31 - lane));
    const int position = first + lane;
    const int row = position - (upto != 0 ? first + 31 - __clz(upto) : segment);
    const int key = position < end ? sorted[position] : p.slots;
    if (mask != 0) segment = first + 31 - __clz(mask);
    const bool tile = key != p.slots && (row & 7) == 0;
    const Facts fact = facts_of(p.ranks, p.scales, tile ? key : 0, p.max_rank, p.scale);
    const int left = tile ? rows_left(starts, position, p.tokens) : 0;
#pragma unroll
    for (int f = 0; f < kForms; ++f) {
      const bool mine = tile && row % rows_of(f) == 0;
      const unsigned all = __ballot_sync(kAll, mine);
      const int index = __shfl_sync(kAll, held, f) + __popc(all & ((1u << lane) - 1));
      if (lane == f) held += __popc(all);
      if (!mine) continue;
      int* const table = p.tables + places[f] + index;
      const int step = places[kForms + f];
      table[0] = key;
      table[step] = position;
      table[2 * step] = min(left, rows_of(f));
      table[3 * step] = fact.rank;
      ((float*)table)[4 * step] = fact.scale;
    }
  }
}

}  // namespace

// One block of 128 to 1024 threads (a power of two). Dynamic shared memory: `shared_bytes` in plan.py.
extern "C" __global__ void __launch_bounds__(1024) dop_plan(const PlanParams p) {
  __shared__ int sums[kForms + 1][kMaxWarps], places[2 * kForms];
  DOP_DYNAMIC_SHARED(dynamic);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Layout at(p.tokens, p.slots);
  Counters counters = {(int*)dynamic, (int)(blockDim.x >> 5)};
  unsigned* const starts = (unsigned*)(dynamic + kDigits * (counters.warps + 1) * 4);
  int* const row_index = p.tables + at.row_index();
  int* const scratch = p.tables + at.scratch();
  Key* const halfway = (Key*)(scratch + at.step);
  const bool in_shared = p.tokens <= kSharedTokens;
  Key* const sorted = in_shared ? (Key*)(starts + ((p.tokens + 31) >> 5)) : halfway + at.step;

  const int share = (p.tokens + (int)blockDim.x - 1) / (int)blockDim.x * 32;
  const int begin = min(warp * share, p.tokens), end = min(begin + share, p.tokens);
  const int low = p.slots + 1 < kDigits ? p.slots + 1 : kDigits;
  const bool two_passes = p.slots >= kDigits;

  if (threadIdx.x < kForms) {
    const int form = (int)threadIdx.x;
    places[form] = at.tile_tables(form);
    places[kForms + form] = padded(at.tiles(form));
  }
  counters.clear(low);
  __syncthreads();
  read_ids(p, at, counters, begin, end, warp, lane);
  clear_tiles(p, places);
  __syncthreads();
  counters.scan(low, sums[0]);
  __syncthreads();
#pragma unroll 1
  for (int first = begin; first < end; first += 32) {
    const int token = first + lane;
    const bool mine = token < end;
    const int slot = mine ? p.tables[at.token_slot() + token] : 0;
    const int key = slot < 0 ? p.slots : slot;
    const int place = take_place(counters, mine ? key & (kDigits - 1) : -1, warp, lane);
    if (!mine) continue;
    (two_passes ? halfway : sorted)[place] = (Key)key;
    (two_passes ? scratch : row_index)[place] = token;
  }
  __syncthreads();

  if (two_passes) {
    const int high = p.slots / kDigits + 1;
    counters.clear(high);
    __syncthreads();
#pragma unroll 1
    for (int first = begin; first < end; first += 32) {
      const int i = first + lane;
      count_digit(counters, i < end ? halfway[i] / kDigits : -1, warp, lane);
    }
    __syncthreads();
    counters.scan(high, sums[0]);
    __syncthreads();
#pragma unroll 1
    for (int first = begin; first < end; first += 32) {
      const int i = first + lane;
      const int key = i < end ? halfway[i] : 0;
      const int place = take_place(counters, i < end ? key / kDigits : -1, warp, lane);
      if (i >= end) continue;
      sorted[place] = (Key)key;
      row_index[place] = scratch[i];
    }
    __syncthreads();
  }
  make_tiles(p, at, sorted, starts, sums, places, begin, end, warp, lane);
}

// New ranks and scales for a plan that exists: the rank and scale tables of `to`, from those of
// `from`. Any grid.
extern "C" __global__ void __launch_bounds__(256) dop_plan_annotate(const AnnotateParams p) {
  const Layout at(p.tokens, p.slots);
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
#pragma unroll 1
  for (int f = -1; f < kForms; ++f) {
    const bool rows = f < 0;
    const int slots = rows ? at.token_slot() : at.tile_tables(f);
    const int step = rows ? at.step : padded(at.tiles(f));
    const int ranks = rows ? at.token_rank() : slots + 3 * step, scales = ranks + step;
    const int count = rows ? p.tokens : at.tiles(f);
    for (int i = thread; i < count; i += threads) {
      const int slot = p.from[slots + i];
      const Facts fact = facts_of(p.ranks, p.scales, slot < 0 ? 0 : slot, p.from[ranks + i], 1.0f);
      p.to[ranks + i] = fact.rank;
      ((float*)p.to)[scales + i] = ((const float*)p.from)[scales + i] * fact.scale * p.scale;
    }
  }
}
