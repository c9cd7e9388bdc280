/* @name@: a neural network, compiled by graphopt for @target@ (@triple@).
 *
 * Four functions: create an instance, run it, query what it takes and gives, destroy it. No function but create
 * allocates memory or reads a file. An instance serves one thread at a time; several instances run at once.
 */
#ifndef @NAME@_H
#define @NAME@_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define @NAME@_API __attribute__((visibility("default")))
#else
#define @NAME@_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What create and run return; @name@_query()->messages[status] is a sentence for a person. */
typedef enum @name@_status {
    @NAME@_OK = 0,
    @NAME@_NULL_ARGUMENT,
    @NAME@_BAD_THREADS,        /* fewer than 1, or more than 1 where built without threads */
    @NAME@_UNSUPPORTED_CPU,    /* query()->features says what the kernels need */
    @NAME@_NO_MEMORY,
    @NAME@_NO_THREAD,          /* the system starts no further thread */
    @NAME@_NO_WEIGHTS,         /* the file cannot be opened or read */
    @NAME@_NOT_WEIGHTS,        /* it is no weights file of graphopt */
    @NAME@_TRUNCATED_WEIGHTS,  /* it has not the size of this network's */
    @NAME@_OTHER_WEIGHTS,      /* it belongs to another export */
    @NAME@_CORRUPT_WEIGHTS,    /* its checksum is not that of its data */
    @NAME@_MISALIGNED,         /* weights in memory: 64 bytes; inputs: the size of an element */
    @NAME@_WRONG_COUNT,        /* of inputs or outputs */
    @NAME@_WRONG_SIZE,         /* of an input or output, in bytes */
    @NAME@_WRONG_INDEX,        /* an input is an index, and outside of its table */
    @NAME@_BUSY,               /* another thread runs this instance */
    @NAME@_KERNEL_FAILED       /* a kernel refused its arguments: an error of graphopt */
} @name@_status;

/* Zero it, then set the weights in one of the two ways, and threads. */
typedef struct @name@_options {
    const char *weights_path; /* the file @name@.weights, read once by create; or */
    const void *weights;      /* its content in memory, at a multiple of 64 bytes: used in place by any number */
    size_t weights_size;      /* of instances, and not changed or freed before the last of them is destroyed */
    int threads;              /* that a run works on, the caller's own included; @threads@ is what kernels were split for */
} @name@_options;

/* A tensor is its elements in row-major order, without gaps, in the machine's byte order. */
typedef struct @name@_tensor {
    const char *name;
    const char *dtype;    /* "float32", "uint8", "int64" ... */
    int rank;
    const int64_t *shape; /* for the largest batch */
    size_t size;          /* bytes, for the largest batch */
    int64_t below;        /* where it is not 0, the values are indices: 0 <= value < below */
} @name@_tensor;

typedef struct @name@_description {
    const char *target;            /* as graphopt names it */
    const char *features;          /* of the CPU that the kernels need, as Linux names them */
    size_t input_count, output_count;
    const @name@_tensor *inputs, *outputs;
    size_t smallest_batch, largest_batch; /* of dimension 0, where a run may choose; both 1 where it may not */
    size_t weights_size;           /* bytes of the weights file */
    size_t memory;                 /* bytes that create allocates for one thread, weights from a file apart */
    size_t memory_per_thread;      /* and for each further one, its stack apart */
    const char *const *messages;   /* one for each status */
} @name@_description;

typedef struct @name@_input {
    const void *data;
    size_t size; /* bytes */
} @name@_input;

typedef struct @name@_output {
    void *data;
    size_t size; /* bytes */
} @name@_output;

typedef struct @name@_model @name@_model;

/* The description of this network; it needs no instance, and is never freed. */
@NAME@_API const @name@_description *@name@_query(void);

/* Make an instance: check the CPU and the weights, allocate all memory, start threads. *model is NULL after an error. */
@NAME@_API @name@_status @name@_create(@name@_model **model, const @name@_options *options);

/* Run the network once, in the order of query()->inputs and outputs. Allocates nothing. Outputs may not overlap inputs;
 * they are undefined after an error. For a batch of n, sizes are n / largest_batch of those in the description. */
@NAME@_API @name@_status @name@_run(@name@_model *model, const @name@_input *inputs, size_t input_count,
                                    const @name@_output *outputs, size_t output_count);

/* Stop the threads and free what create allocated. NULL is allowed. */
@NAME@_API void @name@_destroy(@name@_model *model);

#ifdef __cplusplus
}
#endif

#endif
