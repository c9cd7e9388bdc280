/* @name@: the network as tables, and the code that runs them. Made by graphopt; see @name@.h for how to use it.
 *
 * The kernels in @name@_kernels.o take DLPack tensors by the C calling convention of tvm-ffi; no library of TVM is needed.
 * Build with -D@NAME@_SINGLE_THREAD for systems without POSIX threads.
 */
#if !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif

#include "@name@.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if !defined(@NAME@_SINGLE_THREAD)
#include <pthread.h>
#include <sched.h>
#endif

#if !defined(__@architecture@__)
#error "the kernels of @name@ are machine code for @architecture@"
#endif

#define ALIGNMENT 64 /* of every tensor that kernels read or write, and of workspaces */
#define ROUNDED(size) (((size) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT)

/* ---- What the kernels see: DLPack's tensor, an argument of tvm-ffi, and what they call back. ---- */

typedef struct {
    unsigned char *data;
    struct {
        int32_t type, id;
    } device;
    int32_t rank;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    const int64_t *shape;
    const int64_t *strides; /* NULL: row-major, without gaps */
    uint64_t byte_offset;
} dl_tensor;

typedef struct {
    int32_t type;
    uint32_t zero;
    union {
        int64_t bits;
        dl_tensor *tensor;
    } value;
} ffi_value;

typedef struct {
    void *sync_handle;
    int32_t task_count;
} parallel_environment;

typedef int kernel_function(void *self, const ffi_value *arguments, int32_t count, ffi_value *result);
typedef int task_function(int task, parallel_environment *environment, void *data);

enum { CPU_DEVICE = 1, TENSOR_ARGUMENT = 7 };

#if defined(__GNUC__)
#define HIDDEN __attribute__((visibility("hidden")))
#else
#define HIDDEN
#endif

static int launch(task_function *function, void *data, int task_count);
static void *allocate(int device, int device_id, uint64_t size, int type_code, int type_bits);
static int release(int device, int device_id, void *pointer);

/* The kernels' object file has weak definitions of these pointers, which these replace. */
typedef int launch_function(task_function *function, void *data, int task_count);
typedef void *allocate_function(int device, int device_id, uint64_t size, int type_code, int type_bits);
typedef int release_function(int device, int device_id, void *pointer);
extern HIDDEN launch_function *@name@_kernel_launch;
extern HIDDEN allocate_function *@name@_kernel_allocate;
extern HIDDEN release_function *@name@_kernel_release;
launch_function *@name@_kernel_launch = launch;
allocate_function *@name@_kernel_allocate = allocate;
release_function *@name@_kernel_release = release;

/* A kernel says what it does not like; the status that it returns is enough. */
HIDDEN void @name@_kernel_raise_parts(const char *kind, const char **parts, int32_t count);
HIDDEN void @name@_kernel_raise(const char *kind, const char *message);
void @name@_kernel_raise_parts(const char *kind, const char **parts, int32_t count) {
    (void)kind, (void)parts, (void)count;
}
void @name@_kernel_raise(const char *kind, const char *message) {
    (void)kind, (void)message;
}
