/* Runs @name@ on raw tensors from files:
 *
 *     run_@name@ [-t THREADS] [-n RUNS] WEIGHTS INPUT... OUTPUT...
 *
 * An input is its elements as they lie in memory (numpy: array.tofile(path)), an output is written likewise. With -n the
 * network is run that many times, and the fastest time printed.
 */
#include "@name@.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void explain(void) {
    const @name@_description *network = @name@_query();
    fprintf(stderr, "usage: run_@name@ [-t THREADS] [-n RUNS] WEIGHTS INPUT... OUTPUT...\n");
    for (size_t i = 0; i < network->input_count + network->output_count; i++) {
        int is_input = i < network->input_count;
        const @name@_tensor *tensor = is_input ? &network->inputs[i] : &network->outputs[i - network->input_count];
        fprintf(stderr, "%s %s: %s [", is_input ? "input" : "output", tensor->name, tensor->dtype);
        for (int axis = 0; axis < tensor->rank; axis++) {
            fprintf(stderr, "%s%lld", axis ? ", " : "", (long long)tensor->shape[axis]);
        }
        fprintf(stderr, "], %zu bytes\n", tensor->size);
    }
}

/* A whole file in memory that begins at 64 bytes; exits where it cannot be read. */
static void *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    long end;
    if (file == NULL || fseek(file, 0, SEEK_END) != 0 || (end = ftell(file)) < 0 || fseek(file, 0, SEEK_SET) != 0) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        exit(1);
    }
    *size = (size_t)end;
    void *data = aligned_alloc(64, (*size / 64 + 1) * 64);
    if (data == NULL || fread(data, 1, *size, file) != *size) {
        fprintf(stderr, "%s cannot be read\n", path);
        exit(1);
    }
    fclose(file);
    return data;
}

static void write_file(const char *path, const void *data, size_t size) {
    FILE *file = fopen(path, "wb");
    if (file == NULL || fwrite(data, 1, size, file) != size || fclose(file) != 0) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        exit(1);
    }
}

static double seconds(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void check(@name@_status status) {
    if (status != @NAME@_OK) {
        fprintf(stderr, "%s\n", @name@_query()->messages[status]);
        exit(1);
    }
}

int main(int count, char **values) {
    enum { INPUTS = @inputs@, OUTPUTS = @outputs@ };
    const @name@_description *network = @name@_query();
    @name@_options options = {.threads = 1};
    long runs = 1;
    int at = 1;
    for (; at + 1 < count && values[at][0] == '-'; at += 2) {
        if (strcmp(values[at], "-t") == 0) {
            options.threads = atoi(values[at + 1]);
        } else if (strcmp(values[at], "-n") == 0) {
            runs = atol(values[at + 1]);
        } else {
            break;
        }
    }
    if (count - at != 1 + INPUTS + OUTPUTS || runs < 1) {
        explain();
        return 2;
    }
    options.weights_path = values[at++];

    @name@_model *model;
    check(@name@_create(&model, &options));

    @name@_input inputs[INPUTS];
    for (int i = 0; i < INPUTS; i++) {
        inputs[i].data = read_file(values[at++], &inputs[i].size);
    }
    /* What share of the largest batch the first input is, the outputs are too. */
    size_t largest = network->inputs[0].size;
    size_t images = largest == 0 ? 0 : inputs[0].size / (largest / network->largest_batch);
    @name@_output outputs[OUTPUTS];
    for (int i = 0; i < OUTPUTS; i++) {
        outputs[i].size = network->outputs[i].size / network->largest_batch * images;
        outputs[i].data = malloc(outputs[i].size + 1);
        if (outputs[i].data == NULL) {
            fprintf(stderr, "there is not enough memory\n");
            return 1;
        }
    }

    double fastest = 1e300;
    for (long run = 0; run < runs; run++) {
        double started = seconds();
        check(@name@_run(model, inputs, INPUTS, outputs, OUTPUTS));
        double taken = seconds() - started;
        fastest = taken < fastest ? taken : fastest;
    }
    if (runs > 1) {
        printf("%.3f ms\n", 1e3 * fastest);
    }

    for (int i = 0; i < OUTPUTS; i++) {
        write_file(values[at++], outputs[i].data, outputs[i].size);
        free(outputs[i].data);
    }
    for (int i = 0; i < INPUTS; i++) {
        free((void *)(uintptr_t)inputs[i].data);
    }
    @name@_destroy(model);
    return 0;
}
