/* The run time of generated CPU code: a thread pool, workspaces, errors. Nothing else is linked.
 *
 * An object made by TVM's LLVM back end calls through three pointers, __TVMBackendParallelLaunch,
 * __TVMBackendAllocWorkspace and __TVMBackendFreeWorkspace, which it defines weakly as null, and
 * reports errors by TVMFFIErrorSetRaisedFromCStrParts. The strong definitions here win at link
 * time and are hidden, so two libraries in one process keep their own pools.
 *
 * Idle threads spin for SPIN_US and then sleep on a futex: the regions of one call follow each
 * other within microseconds, calls of a model's layers within tens of them.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define HIDDEN __attribute__((visibility("hidden")))
#define SPIN_US 50
#define MAX_THREADS 256
#define MAX_CACHED 16
#define ALIGNMENT 64

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ __volatile__("yield")
#else
#define PAUSE() ((void)0)
#endif

/* ---- errors ---------------------------------------------------------------------------- */

static _Thread_local char error_text[1024];

HIDDEN void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t n) {
  size_t used = (size_t)snprintf(error_text, sizeof error_text, "%s: ", kind ? kind : "Error");
  for (int32_t i = 0; i < n && used < sizeof error_text; ++i)
    if (parts[i])
      used += (size_t)snprintf(error_text + used, sizeof error_text - used, "%s", parts[i]);
}

HIDDEN void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1);
}

/* Text of the last error of this thread; valid until the next one. */
EXPORT const char *dop_last_error(void) { return error_text; }

/* ---- workspaces: cached per thread, never given back before the thread ends -------------- */

struct block {
  void *data;
  uint64_t bytes;
  int used;
};
static _Thread_local struct block blocks[MAX_CACHED];
static atomic_int poison;

/* With 1, every workspace is filled with NaN when it is handed out: reading what was never
 * written then shows in the result. For checks only. */
EXPORT void dop_poison(int on) { atomic_store(&poison, on); }

static int allocate(struct block *b, uint64_t bytes) {
  uint64_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  void *data = aligned_alloc(ALIGNMENT, rounded ? rounded : ALIGNMENT);
  if (!data) return -1;
  free(b->data);
  b->data = data;
  b->bytes = rounded;
  return 0;
}

static void *alloc_workspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  struct block *best = NULL, *spare = NULL;
  for (int i = 0; i < MAX_CACHED; ++i) {
    struct block *b = &blocks[i];
    if (b->used) continue;
    if (b->data && b->bytes >= bytes && (!best || b->bytes < best->bytes)) best = b;
    if (!spare || b->bytes < spare->bytes) spare = b;
  }
  if (!best && spare && allocate(spare, bytes) == 0) best = spare;
  if (!best) return NULL;
  best->used = 1;
  if (atomic_load_explicit(&poison, memory_order_relaxed)) memset(best->data, 0xff, best->bytes);
  return best->data;
}

static int free_workspace(int device_type, int device_id, void *data) {
  (void)device_type, (void)device_id;
  for (int i = 0; i < MAX_CACHED; ++i)
    if (blocks[i].data == data && blocks[i].used) {
      blocks[i].used = 0;
      return 0;
    }
  return -1;
}

static void drop_workspaces(void) {
  for (int i = 0; i < MAX_CACHED; ++i) {
    free(blocks[i].data);
    blocks[i] = (struct block){0};
  }
}

/* ---- thread pool ------------------------------------------------------------------------- */

struct group {
  void *sync_handle;
  int32_t num_task;
};
typedef int (*region_fn)(int task, struct group *group, void *data);

static pthread_t threads[MAX_THREADS];
static int cores[MAX_THREADS];
static int pool_size = 1; /* threads, the caller included */
static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int inside; /* this thread runs a region: nested regions are serial */

static region_fn region;
static void *region_data;
static struct group region_group;
static _Alignas(64) atomic_uint epoch; /* unsigned: it may wrap */
static _Alignas(64) atomic_int pending;
static _Alignas(64) atomic_int sleepers;
static atomic_int stopping;
static atomic_int failed;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

static void pin(int core) {
  if (core < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set); /* refused: run unpinned */
}

static void run_tasks(int thread) {
  for (int task = thread; task < region_group.num_task; task += pool_size)
    if (region(task, &region_group, region_data)) atomic_store(&failed, 1);
}

static void wait_for_work(unsigned seen) {
  int64_t end = now_ns() + SPIN_US * 1000;
  for (int i = 0; atomic_load_explicit(&epoch, memory_order_acquire) == seen; ++i) {
    PAUSE();
    if ((i & 63) == 63 && now_ns() > end) break;
  }
  while (atomic_load_explicit(&epoch, memory_order_acquire) == seen) {
    atomic_fetch_add(&sleepers, 1);
    if (atomic_load(&epoch) == seen)
      syscall(SYS_futex, &epoch, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&sleepers, 1);
  }
}

struct start {
  int thread;
  unsigned seen;
};

static void *worker(void *arg) {
  struct start start = *(struct start *)arg;
  free(arg);
  pin(cores[start.thread]);
  inside = 1;
  for (unsigned seen = start.seen;; ++seen) {
    wait_for_work(seen);
    if (atomic_load(&stopping)) break;
    run_tasks(start.thread);
    atomic_fetch_sub_explicit(&pending, 1, memory_order_release);
  }
  drop_workspaces();
  return NULL;
}

static void publish(void) {
  atomic_fetch_add(&epoch, 1);
  if (atomic_load(&sleepers)) syscall(SYS_futex, &epoch, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void stop(void) {
  if (pool_size > 1) {
    atomic_store(&stopping, 1);
    publish();
    for (int i = 1; i < pool_size; ++i) pthread_join(threads[i], NULL);
    atomic_store(&stopping, 0);
  }
  pool_size = 1;
}

/* Sets the number of threads, the caller included, and the core of each (NULL, or -1 for one: not
 * pinned). The caller is pinned to the first core. Returns the threads running. */
EXPORT int dop_threads(int count, const int *pins) {
  pthread_mutex_lock(&owner);
  stop();
  if (count < 1) count = 1;
  if (count > MAX_THREADS) count = MAX_THREADS;
  for (int i = 0; i < count; ++i) cores[i] = pins ? pins[i] : -1;
  pin(cores[0]);
  for (int i = 1; i < count; ++i) {
    struct start *start = malloc(sizeof *start);
    if (!start) break;
    *start = (struct start){i, atomic_load(&epoch)};
    if (pthread_create(&threads[i], NULL, worker, start)) {
      free(start);
      break;
    }
    pool_size = i + 1;
  }
  int running = pool_size;
  pthread_mutex_unlock(&owner);
  return running;
}

/* Ends the threads and frees the caller's workspaces; to be called before the library is closed. */
EXPORT void dop_shutdown(void) {
  pthread_mutex_lock(&owner);
  stop();
  pthread_mutex_unlock(&owner);
  drop_workspaces();
}

static int serial_launch(region_fn fn, void *data, int tasks) {
  struct group group = {NULL, tasks};
  int result = 0;
  for (int task = 0; task < tasks; ++task) result |= fn(task, &group, data);
  return result ? -1 : 0;
}

static int parallel_launch(region_fn fn, void *data, int tasks) {
  if (inside || pool_size == 1 || pthread_mutex_trylock(&owner))
    return serial_launch(fn, data, tasks > 0 ? tasks : 1);
  region = fn;
  region_data = data;
  region_group = (struct group){NULL, tasks > 0 ? tasks : pool_size};
  atomic_store(&failed, 0);
  atomic_store(&pending, pool_size - 1);
  inside = 1;
  publish();
  run_tasks(0);
  for (unsigned i = 1; atomic_load_explicit(&pending, memory_order_acquire) > 0; ++i) {
    PAUSE();
    if (i % 4096 == 0) sched_yield(); /* a thread we wait for may have no core */
  }
  inside = 0;
  int result = atomic_load(&failed) ? -1 : 0;
  pthread_mutex_unlock(&owner);
  return result;
}

/* What the objects look for. */
HIDDEN void *__TVMBackendParallelLaunch = (void *)parallel_launch;
HIDDEN void *__TVMBackendAllocWorkspace = (void *)alloc_workspace;
HIDDEN void *__TVMBackendFreeWorkspace = (void *)free_workspace;

/* ---- measuring ---------------------------------------------------------------------------- */

typedef int (*entry_fn)(void **arguments, const int64_t *scalars);

/* Times `calls` calls of `entry`, call i with argument set (first + i) % sets. Returns the time
 * of all calls in seconds, negative if one failed. */
EXPORT double dop_time(entry_fn entry, void ***arguments, int sets, const int64_t *scalars,
                       int64_t calls, int64_t first) {
  int64_t start = now_ns();
  for (int64_t i = 0; i < calls; ++i)
    if (entry(arguments[(first + i) % sets], scalars)) return -1.0;
  return (double)(now_ns() - start) * 1e-9;
}

static int empty_region(int task, struct group *group, void *data) {
  (void)task, (void)group, (void)data;
  return 0;
}

/* Seconds of one parallel region that does nothing: the floor of a launch. */
EXPORT double dop_launch_floor(int64_t calls) {
  int64_t start = now_ns();
  for (int64_t i = 0; i < calls; ++i) parallel_launch(empty_region, NULL, 0);
  return (double)(now_ns() - start) * 1e-9 / (double)calls;
}

struct stream {
  char *to; /* NULL: only read */
  const char *from;
  size_t bytes;
};
typedef uint64_t lanes __attribute__((vector_size(32), aligned(32)));
static atomic_ullong sink;

static void read_bytes(const char *from, size_t bytes) {
  const lanes *data = (const lanes *)from;
  lanes a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t i = 0; i + 4 <= bytes / sizeof(lanes); i += 4)
    a ^= data[i], b ^= data[i + 1], c ^= data[i + 2], d ^= data[i + 3];
  a ^= b ^ c ^ d;
  atomic_fetch_xor(&sink, a[0] ^ a[1] ^ a[2] ^ a[3]);
}

static int stream_region(int task, struct group *group, void *data) {
  struct stream *s = data;
  size_t part = s->bytes / (size_t)group->num_task / ALIGNMENT * ALIGNMENT;
  size_t begin = part * (size_t)task;
  size_t end = task == group->num_task - 1 ? s->bytes : begin + part;
  if (s->to)
    memcpy(s->to + begin, s->from + begin, end - begin);
  else
    read_bytes(s->from + begin, end - begin);
  return 0;
}

/* Bytes moved per second over all threads: read and written by a copy, or read if `to` is NULL.
 * Pointers must be 64-byte aligned. */
EXPORT double dop_bandwidth(void *to, const void *from, int64_t bytes) {
  struct stream s = {to, from, (size_t)bytes};
  int64_t start = now_ns();
  if (parallel_launch(stream_region, &s, 0)) return -1.0;
  return (to ? 2e9 : 1e9) * (double)bytes / (double)(now_ns() - start);
}
