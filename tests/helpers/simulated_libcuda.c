/* libcuda.so.1 of host memory: lets the real bindings make their real calls where there is no GPU.
 *
 * Only what cdkd_edge.engines.cuda calls. Work is done at once. Every call that needs a context checks that the
 * primary one is current in its thread; pointers are checked; a call can be made to fail. cuda-python looks functions
 * up with cuGetProcAddress, PyCUDA is linked to their versioned names. Signatures: CUDA driver API, cuda.h.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))
#define MOST 4096
#define ALIAS (1ull << 46)

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };

static const struct { int code; const char *name, *text; } ERRORS[] = {
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
};

static struct { void *address; size_t size; int kind; } blocks[MOST]; /* kind: 1 device, 2 host, 3 mapped host */
static int streams, events, graphs, retained;
static int primary; /* its address is the context */
static __thread void *stack[16];
static __thread int depth;
static char failing[64];
static int failing_code, integrated;
typedef struct { int kind; CUdeviceptr to, from; unsigned char value; size_t size; } Work;
static struct { int capturing, count; Work work[64]; } recording;

/* For tests, through ctypes. */
PUBLIC void simulated_fail(const char *function, int code) {
    snprintf(failing, sizeof failing, "%s", function);
    failing_code = code;
}
PUBLIC void simulated_integrated(int value) { integrated = value; }
PUBLIC int simulated_depth(void) { return depth; }
PUBLIC int simulated_retained(void) { return retained; }
PUBLIC int simulated_live(void) {
    int count = streams + events + graphs;
    for (int i = 0; i < MOST; i++) count += blocks[i].kind != 0;
    return count;
}

static CUresult fails(const char *function) {
    if (strcmp(function, failing)) return OK;
    failing[0] = 0;
    return failing_code;
}
#define ENTER(name) do { CUresult r_ = fails(name); if (r_) return r_; } while (0)
#define CONTEXT(name) do { ENTER(name); if (!depth || stack[depth - 1] != &primary) return INVALID_CONTEXT; } while (0)

static CUresult keep(void **address, size_t size, int kind) {
    for (int i = 0; i < MOST; i++)
        if (!blocks[i].kind) {
            if (!(blocks[i].address = malloc(size))) return OUT_OF_MEMORY;
            memset(blocks[i].address, 0xCD, size);
            blocks[i].size = size, blocks[i].kind = kind, *address = blocks[i].address;
            return OK;
        }
    return OUT_OF_MEMORY;
}
static int block_of(CUdeviceptr address, size_t size, int device) {
    for (int i = 0; i < MOST; i++) {
        CUdeviceptr base = (CUdeviceptr)(uintptr_t)blocks[i].address;
        if (device && blocks[i].kind == 3) base += ALIAS;
        if (blocks[i].kind && (device ? blocks[i].kind != 2 : blocks[i].kind != 1) && base <= address
            && address + size <= base + blocks[i].size) return i;
    }
    return -1;
}
static void *seen(CUdeviceptr address, size_t size) { /* by the device */
    int i = block_of(address, size, 1);
    return i < 0 ? NULL : (void *)(uintptr_t)(blocks[i].kind == 3 ? address - ALIAS : address);
}
static CUresult release(CUdeviceptr address, int device) {
    for (int i = 0; i < MOST; i++)
        if (blocks[i].kind && (blocks[i].kind == 1) == device && (CUdeviceptr)(uintptr_t)blocks[i].address == address) {
            free(blocks[i].address);
            blocks[i].kind = 0;
            return OK;
        }
    return INVALID_VALUE;
}
static CUresult run(const Work *w) {
    if (w->kind == 2) {
        void *to = seen(w->to, w->size);
        if (!to) return INVALID_VALUE;
        memset(to, w->value, w->size);
        return OK;
    }
    void *to = w->kind == 0 ? seen(w->to, w->size) : (block_of(w->to, w->size, 0) < 0 ? NULL : (void *)(uintptr_t)w->to);
    void *from = w->kind == 1 ? seen(w->from, w->size) : (block_of(w->from, w->size, 0) < 0 ? NULL : (void *)(uintptr_t)w->from);
    if (!to || !from) return INVALID_VALUE; /* also: a copy of memory that is not page-locked */
    memcpy(to, from, w->size);
    return OK;
}
static CUresult put(Work w, void *stream) {
    if (!stream) return INVALID_HANDLE;
    if (!recording.capturing) return run(&w);
    recording.work[recording.count++] = w;
    return OK;
}

PUBLIC CUresult cuGetErrorName(int code, const char **text) {
    for (unsigned i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code) return *text = ERRORS[i].name, OK;
    return *text = NULL, INVALID_VALUE;
}
PUBLIC CUresult cuGetErrorString(int code, const char **text) {
    for (unsigned i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code) return *text = ERRORS[i].text, OK;
    return *text = NULL, INVALID_VALUE;
}
PUBLIC CUresult cuInit(unsigned flags) { ENTER("cuInit"); return flags ? INVALID_VALUE : OK; }
PUBLIC CUresult cuDriverGetVersion(int *version) { return *version = 13000, OK; }
PUBLIC CUresult cuDeviceGetCount(int *count) { return *count = 1, OK; }
PUBLIC CUresult cuDeviceGet(int *device, int ordinal) { return *device = 0, ordinal ? INVALID_DEVICE : OK; }
PUBLIC CUresult cuDeviceGetName(char *name, int length, int device) { return snprintf(name, length, "Simulated"), OK; }
PUBLIC CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 18 ? integrated : 0;
    return OK;
}
PUBLIC CUresult cuDeviceComputeCapability(int *major, int *minor, int device) { return *major = 8, *minor = 7, OK; }
PUBLIC CUresult cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = 8ull << 30, OK; }
PUBLIC CUresult cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER("cuDevicePrimaryCtxRetain");
    retained++;
    return *context = &primary, OK;
}
PUBLIC CUresult cuDevicePrimaryCtxRelease_v2(int device) { return retained--, OK; }
PUBLIC CUresult cuCtxPushCurrent_v2(void *context) {
    ENTER("cuCtxPushCurrent");
    return stack[depth++] = context, OK;
}
PUBLIC CUresult cuCtxPopCurrent_v2(void **context) {
    if (!depth) return INVALID_CONTEXT;
    *context = stack[--depth];
    return OK;
}
PUBLIC CUresult cuMemGetInfo_v2(size_t *free_, size_t *total) {
    CONTEXT("cuMemGetInfo");
    return *free_ = 4ull << 30, *total = 8ull << 30, OK;
}
PUBLIC CUresult cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    CONTEXT("cuMemHostAlloc");
    return keep(address, size, flags & 2 ? 3 : 2);
}
PUBLIC CUresult cuMemFreeHost(void *address) { CONTEXT("cuMemFreeHost"); return release((CUdeviceptr)(uintptr_t)address, 0); }
PUBLIC CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *pointer, void *address, unsigned flags) {
    CONTEXT("cuMemHostGetDevicePointer");
    int i = block_of((CUdeviceptr)(uintptr_t)address, 1, 0);
    if (flags || i < 0 || blocks[i].kind != 3) return INVALID_VALUE;
    return *pointer = (CUdeviceptr)(uintptr_t)address + ALIAS, OK;
}
PUBLIC CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size) {
    CONTEXT("cuMemAlloc");
    void *address;
    CUresult result = keep(&address, size, 1);
    if (!result) *pointer = (CUdeviceptr)(uintptr_t)address;
    return result;
}
PUBLIC CUresult cuMemFree_v2(CUdeviceptr pointer) { CONTEXT("cuMemFree"); return release(pointer, 1); }
PUBLIC CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, void *stream) {
    CONTEXT("cuMemcpyHtoDAsync");
    return put((Work){0, to, (CUdeviceptr)(uintptr_t)from, 0, size}, stream);
}
PUBLIC CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, void *stream) {
    CONTEXT("cuMemcpyDtoHAsync");
    return put((Work){1, (CUdeviceptr)(uintptr_t)to, from, 0, size}, stream);
}
PUBLIC CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, void *stream) {
    CONTEXT("cuMemsetD8Async");
    return put((Work){2, to, 0, value, size}, stream);
}
PUBLIC CUresult cuStreamCreate(void **stream, unsigned flags) {
    CONTEXT("cuStreamCreate");
    if (flags != 1) return INVALID_VALUE;
    streams++;
    return *stream = malloc(1), OK;
}
PUBLIC CUresult cuStreamDestroy_v2(void *stream) { CONTEXT("cuStreamDestroy"); free(stream); return streams--, OK; }
PUBLIC CUresult cuStreamSynchronize(void *stream) { CONTEXT("cuStreamSynchronize"); return stream ? OK : INVALID_HANDLE; }
PUBLIC CUresult cuEventCreate(void **event, unsigned flags) {
    CONTEXT("cuEventCreate");
    if (flags != 3) return INVALID_VALUE;
    events++;
    return *event = malloc(1), OK;
}
PUBLIC CUresult cuEventDestroy_v2(void *event) { CONTEXT("cuEventDestroy"); free(event); return events--, OK; }
PUBLIC CUresult cuEventRecord(void *event, void *stream) { CONTEXT("cuEventRecord"); return event && stream ? OK : INVALID_HANDLE; }
PUBLIC CUresult cuEventSynchronize(void *event) { CONTEXT("cuEventSynchronize"); return event ? OK : INVALID_HANDLE; }
PUBLIC CUresult cuStreamBeginCapture_v2(void *stream, int mode) {
    CONTEXT("cuStreamBeginCapture");
    if (mode != 1 || recording.capturing) return INVALID_VALUE;
    recording.capturing = 1, recording.count = 0;
    return OK;
}
PUBLIC CUresult cuStreamEndCapture(void *stream, void **graph) {
    CONTEXT("cuStreamEndCapture");
    recording.capturing = 0, graphs++;
    return *graph = malloc(1), OK;
}
PUBLIC CUresult cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) {
    CONTEXT("cuGraphInstantiate");
    graphs++;
    return *exec = malloc(1), flags ? INVALID_VALUE : OK;
}
PUBLIC CUresult cuGraphDestroy(void *graph) { CONTEXT("cuGraphDestroy"); free(graph); return graphs--, OK; }
PUBLIC CUresult cuGraphExecDestroy(void *exec) { CONTEXT("cuGraphExecDestroy"); free(exec); return graphs--, OK; }
PUBLIC CUresult cuGraphLaunch(void *exec, void *stream) {
    CONTEXT("cuGraphLaunch");
    for (int i = 0; i < recording.count; i++) {
        CUresult result = run(&recording.work[i]);
        if (result) return result;
    }
    return OK;
}

/* cuda-python: the newest version of a function there is; 500 is CUDA_ERROR_NOT_FOUND. */
PUBLIC CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *found) {
    const char *suffixes[] = {"_v3", "_v2", "", "WithFlags"};
    char name[128];
    *function = NULL;
    for (int i = 0; i < 4 && !*function; i++) {
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        *function = dlsym(RTLD_DEFAULT, name);
        if (!*function) {
            void *self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
            *function = self ? dlsym(self, name) : NULL;
        }
    }
    if (found) *found = *function ? 0 : 2;
    return *function ? OK : 500;
}
PUBLIC CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}
