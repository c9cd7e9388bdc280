/* Calls the kernels of a library, as standard input asks, and answers with the tensor that each writes.
 *
 * A call is: the length of the kernel's name and the name, the number of tensors, then for each its type code, bits,
 * rank, shape and elements. The last one is the result. Integers are little-endian, of 32 and (shapes) 64 bits.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tvm/ffi/c_api.h>
#include <tvm/runtime/c_backend_api.h>

enum { MOST_TENSORS = 16, MOST_DIMENSIONS = 6, ALIGNMENT = 64 };

typedef int (*Kernel)(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    fprintf(stderr, "%s: ", kind);
    for (int32_t i = 0; i < count; ++i) fputs(parts[i], stderr);
    fputc('\n', stderr);
}

static void *allocate_workspace(int type, int id, uint64_t size, int code, int bits) {
    (void)type, (void)id, (void)code, (void)bits;
    return aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

static int free_workspace(int type, int id, void *memory) {
    (void)type, (void)id;
    free(memory);
    return 0;
}

/* Tasks one after the other: kernels wait for nothing between theirs. */
static int launch(FTVMParallelLambda task, void *data, int count) {
    TVMParallelGroupEnv group = {NULL, count > 0 ? count : 2};
    for (int32_t i = 0; i < group.num_task; ++i) {
        int status = task(i, &group, data);
        if (status != 0) return status;
    }
    return 0;
}

static void provide(void *library, const char *name, void *function) {
    void **place = dlsym(library, name);
    if (place != NULL) *place = function;
}

static void take(void *target, size_t size) {
    if (fread(target, 1, size, stdin) != size) exit(3);
}

static uint32_t take_word(void) {
    uint32_t word;
    take(&word, sizeof word);
    return word;
}

static size_t take_tensor(DLTensor *tensor, int64_t *shape) {
    memset(tensor, 0, sizeof *tensor);
    tensor->device.device_type = kDLCPU;
    tensor->dtype.code = (uint8_t)take_word();
    tensor->dtype.bits = (uint8_t)take_word();
    tensor->dtype.lanes = 1;
    tensor->ndim = (int32_t)take_word();
    tensor->shape = shape;
    take(shape, sizeof *shape * (size_t)tensor->ndim);
    size_t size = tensor->dtype.bits / 8;
    for (int32_t i = 0; i < tensor->ndim; ++i) size *= (size_t)shape[i];
    tensor->data = aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (tensor->data == NULL) exit(4);
    take(tensor->data, size);
    return size;
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    void *library = dlopen(argv[1], RTLD_LAZY);
    if (library == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    provide(library, "__TVMBackendAllocWorkspace", (void *)allocate_workspace);
    provide(library, "__TVMBackendFreeWorkspace", (void *)free_workspace);
    provide(library, "__TVMBackendParallelLaunch", (void *)launch);
    uint32_t length;
    while (fread(&length, sizeof length, 1, stdin) == 1) {
        char name[512] = "__tvm_ffi_";
        if (length > sizeof name - 16) return 3;
        take(name + strlen("__tvm_ffi_"), length);
        Kernel kernel;
        *(void **)&kernel = dlsym(library, name);
        uint32_t count = take_word();
        DLTensor tensors[MOST_TENSORS];
        int64_t shapes[MOST_TENSORS][MOST_DIMENSIONS];
        TVMFFIAny arguments[MOST_TENSORS];
        size_t size = 0;
        if (kernel == NULL || count > MOST_TENSORS) return 5;
        memset(arguments, 0, sizeof arguments);
        for (uint32_t i = 0; i < count; ++i) {
            size = take_tensor(&tensors[i], shapes[i]);
            arguments[i].type_index = kTVMFFIDLTensorPtr;
            arguments[i].v_ptr = &tensors[i];
        }
        TVMFFIAny result;
        memset(&result, 0, sizeof result);
        int32_t status = kernel(NULL, arguments, (int32_t)count, &result);
        fwrite(&status, sizeof status, 1, stdout);
        fwrite(tensors[count - 1].data, 1, size, stdout);
        fflush(stdout);
        for (uint32_t i = 0; i < count; ++i) free(tensors[i].data);
    }
    return 0;
}
