/* What an eager add_lora does between its arguments and the driver, compiled.
 *
 *   Call      the launches of one block: the argument area and the launch structures, filled once;
 *             a call writes addresses and starts the kernels (launch.py: PythonCall does the same).
 *             Calls of the short path that come again are kept as graphs (graphs.py says why).
 *   Weights   what was found when weight stacks were checked (stacks.py).
 *   Short     the short path of add_lora (short.py: `_in_python` does the same).
 *
 * No header of CUDA or torch is used. The driver's entry points come as addresses; tensors are read
 * through DLPack's C exchange API, which torch publishes as a capsule. Only CPython's stable ABI is
 * used, so that one binary serves every version from 3.10 on.
 */

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* ---- the driver's structures (cuda.h: CUlaunchAttribute, CUlaunchConfig) ---- */

typedef struct {
    uint32_t id;
    uint32_t pad;
    int32_t value[16];
} Attribute;

typedef struct {
    uint32_t grid[3], block[3];
    uint32_t smem_bytes;
    void *stream;
    Attribute *attributes;
    uint32_t attribute_count;
} Config;

typedef int (*Launcher)(const Config *, void *function, void **parameters, void **extra);

/* cuTensorMapEncodeTiled: map, type, axes, address, dims, strides, box, steps in a box, interleave,
 * swizzle, promotion in L2, what is read beyond the tensor. tensor_map.py names the numbers. */
typedef int (*Encoder)(void *map, int kind, uint32_t axes, void *address, const uint64_t *dims,
                       const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
                       int interleave, int swizzle, int promotion, int fill);

enum { MAP_WORDS = 16, BOX_COLUMNS = 64, ELEMENT_BYTES = 2 };
enum { NO_INTERLEAVE = 0, SWIZZLE_128B = 3, PROMOTE_256B = 3, ZEROS = 0 };

_Static_assert(sizeof(void *) == 8, "addresses are words of 8 bytes");
_Static_assert(sizeof(Attribute) == 72 && sizeof(Config) == 56, "as in cuda.h");

enum { SERIALIZATION = 6 }; /* CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION */

/* ---- DLPack's structures (dlpack.h, version 1) ---- */

typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct ExchangeApi {
    uint32_t major, minor;
    struct ExchangeApi *older;
    void *allocate, *owned_from, *owned_to;
    int (*read)(void *object, DLTensor *out);
    void *current_stream;
} ExchangeApi;

_Static_assert(sizeof(DLTensor) == 48, "as in dlpack.h");

static const char *const CAPSULE = "dlpack_exchange_api";

/* ---- the argument area, in words of 8 bytes; launch.py describes it ---- */

enum { XY = 0, STACKS = 3, TABLES = 9, FIXED = 15, STACK_BYTES = 48, TABLE_BYTES = 48 };
enum { EARLY = 2 }; /* a launch that is neither plain (0) nor always dependent (1) */
enum { SHIFT_BYTES = 16 }; /* unit of the distances between stacks */
enum { MAX_SLICES = 3, MAX_AXES = 4, MAX_WORDS = 1 << 12, MAX_PARAMETERS = 1 << 10 };

static PyObject *call_type, *weights_type;

static PyObject *
fresh(PyTypeObject *type)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return alloc(type, 0); /* zeroed */
}

static void
release(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* ======================================= Call ======================================= */

typedef struct {
    Config config;
    Attribute attribute;
    void *function;
    void **parameters;
    int early; /* dependent if the call may overlap (settled.py), else not */
} Launch;

/* A tensor map of the argument area: `MapPlace.figures` of calls.py. */
typedef struct {
    uint64_t place; /* first of its words */
    uint64_t base;  /* word of the tensor's address */
    uint64_t shift; /* word of its distance from there; 0: there is none */
    uint64_t kind, dims[3], box_rows;
} Map;

_Static_assert(sizeof(Map) == 64, "as calls.py packs it");

/* What records and replays graphs, as graphs.py packs it: cuStreamBeginCapture_v2,
 * cuStreamEndCapture, cuGraphInstantiateWithFlags, cuGraphLaunch, cuGraphExecDestroy,
 * cuGraphDestroy, cuThreadExchangeStreamCaptureMode, and the stream to record on. */
typedef struct {
    int (*begin)(void *stream, int mode);
    int (*end)(void *stream, void **graph);
    int (*instantiate)(void **exec, void *graph, unsigned long long flags);
    int (*launch)(void *exec, void *stream);
    int (*drop_exec)(void *exec);
    int (*drop_graph)(void *graph);
    int (*exchange_mode)(int *mode);
    void *stream;
} Graphs;

_Static_assert(sizeof(Graphs) == 64, "as graphs.py packs it");

enum { RELAXED = 2 }; /* CU_STREAM_CAPTURE_MODE_RELAXED */

/* Kept calls are found by their addresses: in one of SETS places by a hash, and there among WAYS,
 * of which the one that was not used for longest gives way. A call that was seen SEEN times is
 * recorded when it comes again. */
enum { SETS = 64, WAYS = 4, SEEN = 2 };

/* All threads' graphs, counted while the GIL is held. A graph of two kernels takes some 10 kB. */
enum { MAX_GRAPHS = 4096 };
static int graphs_alive;

typedef struct {
    uint64_t key[FIXED];
    uint64_t used; /* 0: nothing stands here */
    void *exec;
    int seen;
} Kept;

typedef struct {
    PyObject_HEAD
    Launcher start;
    Encoder encode;
    Graphs graphs; /* launch is NULL where there are none */
    Kept *kept;
    uint64_t clock;
    Map *maps;
    Py_ssize_t map_count;
    uint64_t *area;
    Py_ssize_t words;
    Launch *launches;
    Py_ssize_t count;
    int64_t tokens, width, total_out;
    unsigned long long stream;
    PyObject *tile_rows;
    int early; /* one of the launches is */
} Call;

/* One that runs lives on until its end. */
static void
drop(Call *self, Kept *kept)
{
    if (kept->exec == NULL)
        return;
    self->graphs.drop_exec(kept->exec);
    kept->exec = NULL;
    --graphs_alive;
}

static void
call_dealloc(PyObject *object)
{
    Call *self = (Call *)object;
    for (Py_ssize_t i = 0; i < self->count; ++i)
        PyMem_Free(self->launches[i].parameters);
    for (int i = 0; self->kept != NULL && i < SETS * WAYS; ++i)
        drop(self, &self->kept[i]);
    PyMem_Free(self->kept);
    PyMem_Free(self->launches);
    PyMem_Free(self->maps);
    PyMem_Free(self->area);
    Py_XDECREF(self->tile_rows);
    release(object);
}

static int
fill_launch(Call *self, Launch *out, PyObject *item)
{
    unsigned long long function;
    const char *figures, *places;
    Py_ssize_t figure_bytes, place_bytes;
    int dependent;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "a launch is a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(item, "Ky#iy#", &function, &figures, &figure_bytes, &dependent, &places,
                          &place_bytes))
        return -1;
    Py_ssize_t count = place_bytes / 4;
    if (figure_bytes != 28 || place_bytes % 4 || count > MAX_PARAMETERS) {
        PyErr_SetString(PyExc_ValueError, "a launch has 7 figures, and places of 4 bytes");
        return -1;
    }
    out->parameters = PyMem_Malloc(sizeof(void *) * (size_t)(count ? count : 1));
    if (out->parameters == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        uint32_t place;
        memcpy(&place, places + 4 * i, 4);
        if ((Py_ssize_t)place >= self->words) {
            PyErr_SetString(PyExc_ValueError, "a parameter lies outside of the argument area");
            return -1;
        }
        out->parameters[i] = self->area + place;
    }
    out->function = (void *)(uintptr_t)function;
    memcpy(&out->config, figures, 28);
    out->config.stream = (void *)(uintptr_t)self->stream;
    out->attribute.id = SERIALIZATION;
    out->attribute.value[0] = 1;
    out->early = dependent == EARLY;
    self->early |= out->early;
    out->config.attributes = dependent ? &out->attribute : NULL;
    out->config.attribute_count = dependent ? 1 : 0;
    return 0;
}

/* Takes the maps over; their bytes are checked, so that a call stays within its area. */
static int
fill_maps(Call *self, const char *bytes, Py_ssize_t size)
{
    Py_ssize_t count = size / (Py_ssize_t)sizeof(Map);
    if (count == 0 && size == 0)
        return 0;
    if (size % (Py_ssize_t)sizeof(Map) || count > MAX_PARAMETERS || self->encode == NULL) {
        PyErr_SetString(PyExc_ValueError, "maps are 8 words each, and want an entry point");
        return -1;
    }
    self->maps = PyMem_Malloc((size_t)size);
    if (self->maps == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(self->maps, bytes, (size_t)size);
    self->map_count = count;
    uint64_t words = (uint64_t)self->words;
    for (Py_ssize_t i = 0; i < count; ++i) {
        const Map *map = &self->maps[i];
        if (map->place < FIXED || map->place > words || words - map->place < MAP_WORDS ||
            map->base >= words || map->shift >= words) {
            PyErr_SetString(PyExc_ValueError, "a map lies outside of the argument area");
            return -1;
        }
    }
    return 0;
}

static PyObject *
call_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    unsigned long long entry, stream, encode = 0;
    const char *fixed, *maps = "", *graphs = "";
    Py_ssize_t fixed_bytes, map_bytes = 0, graph_bytes = 0;
    PyObject *launches, *tile_rows;
    long long tokens, width, total_out;
    if (!PyArg_ParseTuple(args, "KKy#O!O!LLL|Ky#y#:Call", &entry, &stream, &fixed, &fixed_bytes,
                          &PyTuple_Type, &launches, &PyLong_Type, &tile_rows, &tokens, &width,
                          &total_out, &encode, &maps, &map_bytes, &graphs, &graph_bytes))
        return NULL;
    Py_ssize_t count = PyTuple_Size(launches);
    if (entry == 0 || fixed_bytes % 8 || fixed_bytes / 8 > MAX_WORDS || count > MAX_PARAMETERS) {
        PyErr_SetString(PyExc_ValueError, "an entry point and words of 8 bytes are wanted");
        return NULL;
    }
    if (graph_bytes != 0 && graph_bytes != sizeof(Graphs)) {
        PyErr_SetString(PyExc_ValueError, "graphs are 8 words");
        return NULL;
    }
    Call *self = (Call *)fresh(type);
    if (self == NULL)
        return NULL;
    if (graph_bytes != 0)
        memcpy(&self->graphs, graphs, sizeof(Graphs));
    Py_INCREF(tile_rows);
    self->tile_rows = tile_rows;
    self->start = (Launcher)(uintptr_t)entry;
    self->encode = (Encoder)(uintptr_t)encode;
    self->stream = stream;
    self->tokens = tokens, self->width = width, self->total_out = total_out;
    self->words = FIXED + fixed_bytes / 8;
    self->area = PyMem_Calloc((size_t)self->words, 8);
    self->launches = PyMem_Calloc((size_t)(count ? count : 1), sizeof(Launch));
    if (self->area == NULL || self->launches == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    memcpy(self->area + FIXED, fixed, (size_t)fixed_bytes);
    if (fill_maps(self, maps, map_bytes) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    self->count = count;
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (fill_launch(self, &self->launches[i], PyTuple_GetItem(launches, i)) < 0) {
            Py_DECREF(self);
            return NULL;
        }
    }
    return (PyObject *)self;
}

/* Makes the map of the tensor that the area names now; the driver's code. */
static int
make_map(Call *self, const Map *map)
{
    _Alignas(64) uint64_t made[MAP_WORDS]; /* as the driver wants it, which the area need not be */
    uint64_t address = self->area[map->base];
    if (map->shift)
        address += self->area[map->shift] * SHIFT_BYTES;
    uint64_t row_bytes = map->dims[0] * ELEMENT_BYTES;
    const uint64_t strides[2] = {row_bytes, row_bytes * map->dims[1]};
    const uint32_t box[3] = {BOX_COLUMNS, (uint32_t)map->box_rows, 1}, steps[3] = {1, 1, 1};
    int code = self->encode(made, (int)map->kind, 3, (void *)(uintptr_t)address, map->dims, strides,
                            box, steps, NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_256B, ZEROS);
    if (code == 0)
        memcpy(self->area + map->place, made, sizeof(made));
    return code;
}

/* Makes the tensor maps and starts the kernels; the rest of the area has been filled. The GIL is
 * given away meanwhile: the driver waits where its queue is full. The area belongs to this thread,
 * so nobody else writes it. Returns the first error of the driver, less than 0 for one of a map.
 * `overlap`: early kernels are launched as dependent ones. */
static int
start(Call *self, int overlap)
{
    int code = 0;
    for (Py_ssize_t i = 0; self->early && i < self->count; ++i)
        if (self->launches[i].early)
            self->launches[i].config.attribute_count = overlap ? 1 : 0;
    Py_INCREF(self);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < self->map_count && code == 0; ++i)
        code = -make_map(self, &self->maps[i]);
    for (Py_ssize_t i = 0; i < self->count && code == 0; ++i) {
        Launch *one = &self->launches[i];
        code = self->start(&one->config, one->function, one->parameters, NULL);
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(self);
    return code;
}

/* ---- calls that come again ---- */

static uint64_t
hash_of(const uint64_t *words)
{
    uint64_t hash = 0;
    for (int i = 0; i < FIXED; ++i) {
        hash = (hash ^ words[i]) * UINT64_C(0x9e3779b97f4a7c15);
        hash ^= hash >> 32;
    }
    return hash;
}

/* The place of the call whose addresses stand in the area; NULL without memory. */
static Kept *
find_kept(Call *self)
{
    if (self->kept == NULL) {
        self->kept = PyMem_Calloc(SETS * WAYS, sizeof(Kept));
        if (self->kept == NULL)
            return NULL;
    }
    Kept *set = self->kept + hash_of(self->area) % SETS * WAYS, *oldest = set;
    for (Kept *one = set; one < set + WAYS; ++one) {
        if (one->used != 0 && memcmp(one->key, self->area, sizeof(one->key)) == 0) {
            one->used = ++self->clock;
            return one;
        }
        if (one->used < oldest->used)
            oldest = one;
    }
    drop(self, oldest);
    memcpy(oldest->key, self->area, sizeof(oldest->key));
    oldest->used = ++self->clock;
    oldest->seen = 0;
    return oldest;
}

/* Records the launches of the area's addresses; NULL if the driver refuses, for which there is no
 * need to know a reason: the call is launched as others are. The first kernel has no predecessor in
 * a graph, so it is not a dependent one; the graph starts when all before it is complete. */
static void *
record(Call *self)
{
    Graphs *graphs = &self->graphs;
    void *graph = NULL, *exec = NULL;
    int mode = RELAXED, code = 0, begun = 0;
    if (graphs->exchange_mode(&mode) != 0)
        return NULL;
    for (Py_ssize_t i = 0; i < self->map_count && code == 0; ++i)
        code = make_map(self, &self->maps[i]);
    if (code == 0)
        code = graphs->begin(graphs->stream, RELAXED), begun = code == 0;
    for (Py_ssize_t i = 0; i < self->count && code == 0; ++i) {
        Launch *one = &self->launches[i];
        Config config = one->config;
        config.stream = graphs->stream;
        config.attribute_count = i > 0 && !one->early && config.attributes != NULL ? 1 : 0;
        code = self->start(&config, one->function, one->parameters, NULL);
    }
    if (begun) {
        int end = graphs->end(graphs->stream, &graph);
        code = code != 0 ? code : end;
    }
    if (code == 0 && graphs->instantiate(&exec, graph, 0) != 0)
        exec = NULL;
    if (graph != NULL)
        graphs->drop_graph(graph);
    graphs->exchange_mode(&mode);
    return exec;
}

/* As `start`, but for a call that came before: that is replayed. Never while the stream is being
 * captured. */
static int
start_or_replay(Call *self, int overlap)
{
    Kept *kept = self->graphs.launch == NULL || self->count == 0 ? NULL : find_kept(self);
    if (kept == NULL)
        return start(self, overlap);
    int code = 0, new = 0;
    if (kept->exec == NULL) {
        new = kept->seen >= SEEN && graphs_alive < MAX_GRAPHS;
        kept->seen += kept->seen < SEEN;
        if (!new)
            return start(self, overlap);
        ++graphs_alive;
    }
    Py_INCREF(self);
    Py_BEGIN_ALLOW_THREADS
    if (new)
        kept->exec = record(self);
    if (kept->exec != NULL)
        code = self->graphs.launch(kept->exec, (void *)(uintptr_t)self->stream);
    Py_END_ALLOW_THREADS
    Py_DECREF(self);
    if (kept->exec != NULL)
        return code;
    --graphs_alive;
    self->graphs.launch = NULL; /* the driver does not record: never again */
    return start(self, overlap);
}

static int
put_tables(Call *self, PyObject *tables)
{
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(tables, &bytes, &size) < 0)
        return -1;
    if (size > TABLE_BYTES) {
        PyErr_SetString(PyExc_ValueError, "more tables than the argument area has room for");
        return -1;
    }
    memcpy(self->area + TABLES, bytes, (size_t)size);
    return 0;
}

static void
put_xy(Call *self, uint64_t x, uint64_t y)
{
    self->area[XY] = x;
    self->area[XY + 1] = y;
    self->area[XY + 2] = y;
}

PyDoc_STRVAR(call_run_doc, "run(x, y, stacks, tables, overlap=False): launches; the driver's code, 0 "
                           "if all is well, less than 0 for a tensor map.");

static PyObject *
call_run(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    Call *self = (Call *)object;
    char *stacks;
    Py_ssize_t size;
    if (count != 4 && count != 5) {
        PyErr_SetString(PyExc_TypeError, "run takes x, y, stacks, tables and overlap");
        return NULL;
    }
    int overlap = count == 5 ? PyObject_IsTrue(args[4]) : 0;
    if (overlap < 0)
        return NULL;
    uint64_t x = PyLong_AsUnsignedLongLong(args[0]);
    if (PyErr_Occurred())
        return NULL;
    uint64_t y = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred() || PyBytes_AsStringAndSize(args[2], &stacks, &size) < 0)
        return NULL;
    if (size != STACK_BYTES) {
        PyErr_SetString(PyExc_ValueError, "stacks are 6 words");
        return NULL;
    }
    if (put_tables(self, args[3]) < 0)
        return NULL;
    memcpy(self->area + STACKS, stacks, STACK_BYTES);
    put_xy(self, x, y);
    return PyLong_FromLong(start(self, overlap));
}

static PyMethodDef call_methods[] = {
    {"run", (PyCFunction)(void (*)(void))call_run, METH_FASTCALL, call_run_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot call_slots[] = {
    {Py_tp_new, call_new},
    {Py_tp_dealloc, call_dealloc},
    {Py_tp_methods, call_methods},
    {0, NULL},
};

static PyType_Spec call_spec = {"dop.ops._launch.Call", sizeof(Call), 0, Py_TPFLAGS_DEFAULT,
                                call_slots};

/* ===================================== Weights ====================================== */

typedef struct {
    void *data;
    int64_t shape[MAX_AXES];
    int32_t ndim;
} Fact;

typedef struct {
    PyObject_HEAD
    Fact facts[2 * MAX_SLICES]; /* a of all slices, then b */
    Py_ssize_t slices;
    uint64_t words[STACK_BYTES / 8];
    int32_t device_type, device_id;
    uint8_t code, bits;
    long long slots;
    PyObject *number, *device; /* of the Shape */
} Weights;

static ExchangeApi *
exchange_api(PyObject *capsule)
{
    ExchangeApi *api = PyCapsule_GetPointer(capsule, CAPSULE);
    if (api == NULL)
        return NULL;
    while (api != NULL && api->major > 1)
        api = api->older;
    if (api == NULL || api->major != 1 || api->read == NULL) {
        PyErr_SetString(PyExc_ValueError, "another version of DLPack's exchange interface");
        return NULL;
    }
    return api;
}

static void *
address_of(const DLTensor *tensor)
{
    return (char *)tensor->data + tensor->byte_offset;
}

static int
is_contiguous(const DLTensor *tensor)
{
    int64_t step = 1;
    if (tensor->strides == NULL)
        return 1;
    for (int32_t i = tensor->ndim - 1; i >= 0; --i) {
        if (tensor->shape[i] != 1 && tensor->strides[i] != step)
            return 0;
        step *= tensor->shape[i];
    }
    return 1;
}

static void
weights_dealloc(PyObject *object)
{
    Weights *self = (Weights *)object;
    Py_XDECREF(self->number);
    Py_XDECREF(self->device);
    release(object);
}

static PyObject *
weights_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    PyObject *capsule, *tensor_type, *number, *device, *tensors;
    const char *words;
    Py_ssize_t size;
    long long slots;
    if (!PyArg_ParseTuple(args, "OOO!O!Ly#O!:Weights", &capsule, &tensor_type, &PyLong_Type,
                          &number, &PyLong_Type, &device, &slots, &words, &size, &PyTuple_Type,
                          &tensors))
        return NULL;
    ExchangeApi *api = exchange_api(capsule);
    if (api == NULL)
        return NULL;
    Py_ssize_t count = PyTuple_Size(tensors);
    if (size != STACK_BYTES || count < 2 || count > 2 * MAX_SLICES || count % 2) {
        PyErr_SetString(PyExc_ValueError, "1 to 3 stacks a and as many b, and 6 words");
        return NULL;
    }
    Weights *self = (Weights *)fresh(type);
    if (self == NULL)
        return NULL;
    Py_INCREF(number);
    Py_INCREF(device);
    self->number = number, self->device = device;
    self->slots = slots;
    self->slices = count / 2;
    memcpy(self->words, words, STACK_BYTES);
    for (Py_ssize_t i = 0; i < count; ++i) {
        DLTensor tensor;
        PyObject *object = PyTuple_GetItem(tensors, i);
        int is_tensor = PyObject_IsInstance(object, tensor_type);
        if (is_tensor == 0)
            PyErr_SetString(PyExc_TypeError, "stacks are tensors");
        if (is_tensor != 1 || api->read(object, &tensor) != 0)
            goto error;
        if (tensor.ndim < 1 || tensor.ndim > MAX_AXES) {
            PyErr_SetString(PyExc_ValueError, "stacks have 3 or 4 axes");
            goto error;
        }
        Fact *fact = &self->facts[i];
        fact->data = address_of(&tensor);
        fact->ndim = tensor.ndim;
        memcpy(fact->shape, tensor.shape, sizeof(int64_t) * (size_t)tensor.ndim);
        self->device_type = tensor.device_type, self->device_id = tensor.device_id;
        self->code = tensor.code, self->bits = tensor.bits;
    }
    return (PyObject *)self;
error:
    Py_DECREF(self);
    return NULL;
}

static int
same_kind(const Weights *self, const DLTensor *tensor)
{
    return tensor->code == self->code && tensor->bits == self->bits && tensor->lanes == 1 &&
           tensor->device_type == self->device_type && tensor->device_id == self->device_id &&
           is_contiguous(tensor);
}

static PyType_Slot weights_slots[] = {
    {Py_tp_new, weights_new},
    {Py_tp_dealloc, weights_dealloc},
    {0, NULL},
};

static PyType_Spec weights_spec = {"dop.ops._launch.Weights", sizeof(Weights), 0,
                                   Py_TPFLAGS_DEFAULT, weights_slots};

/* ====================================== Short ======================================= */

/* Everything that Short holds, in the order of its arguments. */
enum {
    TENSOR,         /* torch.Tensor */
    PARAMETER,      /* torch.nn.Parameter */
    CHECKED_STACKS, /* stacks.STACKS */
    LOCAL,          /* launch.LOCAL */
    CHECKED,        /* switches.CHECKED */
    MODES,          /* number of dispatch modes */
    GRAD_ENABLED,
    STREAM_OF, /* CUstream of a device */
    CAPTURING,
    CURRENT_DEVICE,
    OWN_WORDS, /* (plan, tile_rows, ranks, scale) -> table addresses */
    REFUSED,   /* (code): raises CudaError */
    PARTS
};

enum { BLOCKS, NATIVE, CALL, BATCH, SLOTS, WORDS, VALUE, REQUIRES_GRAD, SETTLED, VERSION, NAMES };
static const char *const NAME_TEXTS[NAMES] = {"blocks", "native",        "call",    "batch",
                                              "slots",  "words",         "value",   "requires_grad",
                                              "settled", "_version"};

typedef struct {
    PyObject_HEAD
    PyObject *capsule;
    ExchangeApi *api;
    PyObject *part[PARTS];
    PyObject *name[NAMES];
} Short;

static int
short_traverse(PyObject *object, visitproc visit, void *arg)
{
    Short *self = (Short *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->capsule);
    for (int i = 0; i < PARTS; ++i)
        Py_VISIT(self->part[i]);
    return 0;
}

static int
short_clear(PyObject *object)
{
    Short *self = (Short *)object;
    Py_CLEAR(self->capsule);
    for (int i = 0; i < PARTS; ++i)
        Py_CLEAR(self->part[i]);
    for (int i = 0; i < NAMES; ++i)
        Py_CLEAR(self->name[i]);
    return 0;
}

static void
short_dealloc(PyObject *object)
{
    PyObject_GC_UnTrack(object);
    short_clear(object);
    release(object);
}

static PyObject *
short_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    if (PyTuple_Size(args) != 1 + PARTS) {
        PyErr_Format(PyExc_TypeError, "Short takes %d arguments", 1 + PARTS);
        return NULL;
    }
    PyObject *capsule = PyTuple_GetItem(args, 0);
    ExchangeApi *api = exchange_api(capsule);
    if (api == NULL)
        return NULL;
    if (!PyDict_Check(PyTuple_GetItem(args, 1 + CHECKED_STACKS))) {
        PyErr_SetString(PyExc_TypeError, "the checked stacks are a dict");
        return NULL;
    }
    Short *self = (Short *)fresh(type);
    if (self == NULL)
        return NULL;
    Py_INCREF(capsule);
    self->capsule = capsule;
    self->api = api;
    for (int i = 0; i < PARTS; ++i) {
        self->part[i] = PyTuple_GetItem(args, 1 + i);
        Py_INCREF(self->part[i]);
    }
    for (int i = 0; i < NAMES; ++i) {
        self->name[i] = PyUnicode_InternFromString(NAME_TEXTS[i]);
        if (self->name[i] == NULL) {
            Py_DECREF(self);
            return NULL;
        }
    }
    return (PyObject *)self;
}

/* What a step of the short path says. */
enum { ERROR = -1, LONG = 0, GO = 1 };

/* GO if a result (which is consumed) is true, LONG if not. */
static int
truth(PyObject *result)
{
    if (result == NULL)
        return ERROR;
    int is = PyObject_IsTrue(result);
    Py_DECREF(result);
    return is;
}

static int
integer(PyObject *result, long long *out)
{
    if (result == NULL)
        return ERROR;
    *out = PyLong_AsLongLong(result);
    Py_DECREF(result);
    return *out == -1 && PyErr_Occurred() ? ERROR : GO;
}

static int
is_plain_tensor(const Short *self, PyObject *object, int or_parameter)
{
    PyObject *type = (PyObject *)Py_TYPE(object);
    return type == self->part[TENSOR] || (or_parameter && type == self->part[PARAMETER]);
}

/* The tensors of a or b, borrowed: their number, 0 for what only the long path takes. */
static Py_ssize_t
members(PyObject *value, PyObject **out)
{
    if (PyList_CheckExact(value)) {
        Py_ssize_t count = PyList_Size(value);
        for (Py_ssize_t i = 0; i < count && i < MAX_SLICES; ++i)
            out[i] = PyList_GetItem(value, i);
        return count > MAX_SLICES ? 0 : count;
    }
    if (PyTuple_CheckExact(value)) {
        Py_ssize_t count = PyTuple_Size(value);
        for (Py_ssize_t i = 0; i < count && i < MAX_SLICES; ++i)
            out[i] = PyTuple_GetItem(value, i);
        return count > MAX_SLICES ? 0 : count;
    }
    out[0] = value;
    return 1;
}

/* The arguments of a call and what was found for them. What is owned is dropped at the end. */
typedef struct {
    PyObject *y, *x, *plan, *scale, *ranks;
    PyObject *stack[2 * MAX_SLICES]; /* borrowed until held */
    Py_ssize_t slices;
    PyObject *checked; /* the Stacks, owned */
    Weights *weights;  /* owned */
    Call *call;        /* owned */
    PyObject *words;   /* owned */
    PyObject *note;    /* of a plain launch that settles A, owned; NULL: nothing to note */
    int overlap;
} Found;

static int
find_weights(const Short *self, Found *found, PyObject *a, PyObject *b)
{
    PyObject *sides[2][MAX_SLICES];
    Py_ssize_t slices = members(a, sides[0]);
    if (slices < 1 || members(b, sides[1]) != slices)
        return LONG;
    for (Py_ssize_t i = 0; i < slices; ++i) {
        found->stack[i] = sides[0][i];
        found->stack[slices + i] = sides[1][i];
    }
    for (Py_ssize_t i = 0; i < 2 * slices; ++i)
        if (!is_plain_tensor(self, found->stack[i], 1))
            return LONG;
    /* Held from here on: the lists may change while Python code runs. */
    found->slices = slices;
    for (Py_ssize_t i = 0; i < 2 * slices; ++i)
        Py_INCREF(found->stack[i]);
    PyObject *key = PyLong_FromVoidPtr(found->stack[0]);
    if (key == NULL)
        return ERROR;
    PyObject *stacks = PyDict_GetItemWithError(self->part[CHECKED_STACKS], key);
    Py_DECREF(key);
    if (stacks == NULL)
        return PyErr_Occurred() ? ERROR : LONG;
    Py_INCREF(stacks);
    found->checked = stacks;
    PyObject *native = PyObject_GetAttr(stacks, self->name[NATIVE]);
    if (native == NULL)
        return ERROR;
    if ((PyObject *)Py_TYPE(native) != weights_type) {
        Py_DECREF(native);
        return LONG;
    }
    found->weights = (Weights *)native;
    return found->weights->slices == slices ? GO : LONG;
}

/* The launches of this thread for the weights' shape, the plan's batch and the current stream. */
static int
find_call(const Short *self, Found *found)
{
    PyObject *stream = PyObject_CallFunctionObjArgs(self->part[STREAM_OF], found->weights->device,
                                                    NULL);
    if (stream == NULL)
        return ERROR;
    PyObject *batch = PyObject_GetAttr(found->plan, self->name[BATCH]);
    PyObject *key = batch == NULL ? NULL : PyTuple_Pack(3, found->weights->number, batch, stream);
    Py_XDECREF(batch);
    Py_DECREF(stream);
    if (key == NULL)
        return ERROR;
    PyObject *blocks = PyObject_GetAttr(self->part[LOCAL], self->name[BLOCKS]);
    if (blocks == NULL) {
        Py_DECREF(key);
        return ERROR;
    }
    PyObject *block = PyDict_Check(blocks) ? PyDict_GetItemWithError(blocks, key) : NULL;
    PyObject *call = block == NULL ? NULL : PyObject_GetAttr(block, self->name[CALL]);
    Py_DECREF(key);
    Py_DECREF(blocks);
    if (call == NULL)
        return PyErr_Occurred() ? ERROR : LONG;
    if ((PyObject *)Py_TYPE(call) != call_type) {
        Py_DECREF(call);
        return LONG;
    }
    found->call = (Call *)call;
    return GO;
}

/* Nothing is switched on that only the long path knows. */
static int
check_surroundings(const Short *self, const Found *found)
{
    long long device, wanted, slots;
    int is = integer(PyObject_CallNoArgs(self->part[CURRENT_DEVICE]), &device);
    if (is != GO)
        return is;
    wanted = PyLong_AsLongLong(found->weights->device);
    if (wanted != device)
        return PyErr_Occurred() ? ERROR : LONG;
    is = integer(PyObject_GetAttr(found->plan, self->name[SLOTS]), &slots);
    if (is != GO)
        return is;
    if (slots > found->weights->slots)
        return LONG;
    is = truth(PyObject_GetAttr(self->part[CHECKED], self->name[VALUE]));
    if (is != 0)
        return is < 0 ? ERROR : LONG;
    if (found->call->stream != 0) { /* the default stream cannot be captured */
        is = truth(PyObject_CallNoArgs(self->part[CAPTURING]));
        if (is != 0)
            return is < 0 ? ERROR : LONG;
    }
    is = truth(PyObject_CallNoArgs(self->part[GRAD_ENABLED]));
    if (is <= 0)
        return is < 0 ? ERROR : GO;
    for (Py_ssize_t i = -2; i < 2 * found->slices; ++i) {
        PyObject *one = i == -2 ? found->x : i == -1 ? found->y : found->stack[i];
        is = truth(PyObject_GetAttr(one, self->name[REQUIRES_GRAD]));
        if (is != 0)
            return is < 0 ? ERROR : LONG;
    }
    return GO;
}

/* Addresses of the tables: the plan's own, or those of a call with ranks or a scale. */
static int
find_words(const Short *self, Found *found)
{
    PyObject *tile_rows = found->call->tile_rows;
    if (found->ranks == Py_None && PyFloat_CheckExact(found->scale) &&
        PyFloat_AsDouble(found->scale) == 1.0) {
        PyObject *known = PyObject_GetAttr(found->plan, self->name[WORDS]);
        if (known == NULL)
            return ERROR;
        PyObject *words = PyDict_Check(known) ? PyDict_GetItemWithError(known, tile_rows) : NULL;
        Py_XINCREF(words);
        Py_DECREF(known);
        found->words = words;
        if (words != NULL)
            return GO;
        if (PyErr_Occurred())
            return ERROR;
    }
    found->words = PyObject_CallFunctionObjArgs(self->part[OWN_WORDS], found->plan, tile_rows,
                                                found->ranks, found->scale, NULL);
    return found->words == NULL ? ERROR : GO;
}

/* The stream and A's counts of changes, as `stamp` of settled.py; LONG where torch does not count. */
static int
stamp(const Short *self, const Found *found, uint64_t *words)
{
    words[0] = found->call->stream;
    for (Py_ssize_t i = 0; i < found->slices; ++i) {
        PyObject *version = PyObject_GetAttr(found->stack[i], self->name[VERSION]);
        if (version == NULL) {
            if (!PyErr_ExceptionMatches(PyExc_RuntimeError))
                return ERROR;
            PyErr_Clear();
            return LONG;
        }
        words[1 + i] = PyLong_AsUnsignedLongLong(version);
        Py_DECREF(version);
        if (words[1 + i] == (uint64_t)-1 && PyErr_Occurred())
            return ERROR;
    }
    return GO;
}

/* Whether an early kernel may overlap with what is before it; settled.py has the reasons. */
static int
find_overlap(const Short *self, Found *found)
{
    if (!found->call->early)
        return GO;
    uint64_t words[1 + MAX_SLICES];
    Py_ssize_t size = (1 + found->slices) * 8;
    int is = stamp(self, found, words);
    if (is != GO)
        return is == LONG ? GO : ERROR;
    PyObject *before = PyObject_GetAttr(found->checked, self->name[SETTLED]);
    if (before == NULL)
        return ERROR;
    int known = PyBytes_Check(before) && PyBytes_Size(before) == size &&
                memcmp(PyBytes_AsString(before), words, (size_t)size) == 0;
    Py_DECREF(before);
    if (!known) {
        found->note = PyBytes_FromStringAndSize((const char *)words, size);
        return found->note == NULL ? ERROR : GO;
    }
    found->overlap = truth(PyObject_GetAttr(found->plan, self->name[SETTLED]));
    return found->overlap < 0 ? ERROR : GO;
}

static int
read_rows(const Short *self, const Found *found, PyObject *object, int64_t width, uint64_t *out)
{
    DLTensor tensor;
    if (self->api->read(object, &tensor) != 0) {
        PyErr_Clear();
        return LONG;
    }
    *out = (uint64_t)(uintptr_t)address_of(&tensor);
    return tensor.ndim == 2 && tensor.shape[0] == found->call->tokens &&
           tensor.shape[1] == width && same_kind(found->weights, &tensor) && *out != 0 &&
           !(*out & 15);
}

/* Weights where they were and as they were. Only values are compared: that a tensor died and
 * another took its place does no harm where all of them are equal. */
static int
same_weights(const Short *self, const Found *found)
{
    for (Py_ssize_t i = 0; i < 2 * found->slices; ++i) {
        DLTensor tensor;
        const Fact *fact = &found->weights->facts[i];
        if (self->api->read(found->stack[i], &tensor) != 0) {
            PyErr_Clear();
            return LONG;
        }
        if (address_of(&tensor) != fact->data || tensor.ndim != fact->ndim ||
            memcmp(tensor.shape, fact->shape, sizeof(int64_t) * (size_t)fact->ndim) != 0 ||
            !same_kind(found->weights, &tensor))
            return LONG;
    }
    return GO;
}

/* All addresses are read after the last piece of Python code has run, and used at once. */
static int
read_and_start(const Short *self, Found *found)
{
    Call *call = found->call;
    uint64_t x, y;
    int is = same_weights(self, found);
    if (is == GO)
        is = read_rows(self, found, found->x, call->width, &x);
    if (is == GO)
        is = read_rows(self, found, found->y, call->total_out, &y);
    if (is != GO)
        return is;
    if (put_tables(call, found->words) < 0)
        return ERROR;
    memcpy(call->area + STACKS, found->weights->words, STACK_BYTES);
    put_xy(call, x, y);
    int code = start_or_replay(call, found->overlap);
    if (code == 0 && found->note != NULL &&
        PyObject_SetAttr(found->checked, self->name[SETTLED], found->note) < 0)
        PyErr_Clear(); /* the call is done; the next one is plain again */
    if (code != 0) {
        PyObject *raised = PyObject_CallFunction(self->part[REFUSED], "i", code);
        Py_XDECREF(raised);
        return raised == NULL ? ERROR : GO;
    }
    return GO;
}

static int
short_steps(const Short *self, Found *found, PyObject *a, PyObject *b)
{
    long long modes;
    int is = integer(PyObject_CallNoArgs(self->part[MODES]), &modes);
    if (is != GO)
        return is;
    if (modes > 0 || !is_plain_tensor(self, found->x, 0) || !is_plain_tensor(self, found->y, 0))
        return LONG;
    if ((is = find_weights(self, found, a, b)) != GO || (is = find_call(self, found)) != GO ||
        (is = check_surroundings(self, found)) != GO || (is = find_words(self, found)) != GO ||
        (is = find_overlap(self, found)) != GO)
        return is;
    return read_and_start(self, found);
}

/* What a wrong argument raises on the way; the long path says what is wrong with it. */
static int
is_of_arguments(void)
{
    return PyErr_ExceptionMatches(PyExc_KeyError) || PyErr_ExceptionMatches(PyExc_AttributeError) ||
           PyErr_ExceptionMatches(PyExc_IndexError) || PyErr_ExceptionMatches(PyExc_TypeError) ||
           PyErr_ExceptionMatches(PyExc_ValueError);
}

PyDoc_STRVAR(short_run_doc, "run(y, x, a, b, plan, scale, ranks): whether it was done.");

static PyObject *
short_run(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    if (count != 7) {
        PyErr_SetString(PyExc_TypeError, "run takes y, x, a, b, plan, scale and ranks");
        return NULL;
    }
    Found found = {.y = args[0], .x = args[1], .plan = args[4], .scale = args[5],
                   .ranks = args[6]};
    int is = short_steps((Short *)object, &found, args[2], args[3]);
    for (Py_ssize_t i = 0; i < 2 * found.slices; ++i)
        Py_DECREF(found.stack[i]);
    Py_XDECREF(found.checked);
    Py_XDECREF(found.weights);
    Py_XDECREF(found.call);
    Py_XDECREF(found.words);
    Py_XDECREF(found.note);
    if (is == ERROR) {
        if (!is_of_arguments())
            return NULL;
        PyErr_Clear();
        is = LONG;
    }
    return PyBool_FromLong(is == GO);
}

static PyMethodDef short_methods[] = {
    {"run", (PyCFunction)(void (*)(void))short_run, METH_FASTCALL, short_run_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot short_slots[] = {
    {Py_tp_new, short_new},         {Py_tp_dealloc, short_dealloc},
    {Py_tp_traverse, short_traverse}, {Py_tp_clear, short_clear},
    {Py_tp_methods, short_methods}, {0, NULL},
};

static PyType_Spec short_spec = {"dop.ops._launch.Short", sizeof(Short), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, short_slots};

/* ====================================== module ====================================== */

static PyObject *
add_type(PyObject *module, PyType_Spec *spec, const char *name)
{
    PyObject *type = PyType_FromSpec(spec);
    if (type == NULL || PyModule_AddObjectRef(module, name, type) < 0) {
        Py_XDECREF(type);
        return NULL;
    }
    return type;
}

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "dop.ops._launch",
    .m_doc = "The short path of add_lora and its launches, compiled; see short.py and launch.py.",
    .m_size = -1,
};

PyMODINIT_FUNC
PyInit__launch(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    PyObject *short_type;
    if ((call_type = add_type(module, &call_spec, "Call")) == NULL ||
        (weights_type = add_type(module, &weights_spec, "Weights")) == NULL ||
        (short_type = add_type(module, &short_spec, "Short")) == NULL) {
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(short_type); /* the module holds it */
    return module;
}
