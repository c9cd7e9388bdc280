/* ---- The four functions. ---- */

static void place_tensor(@name@_model *model, size_t number) {
    model->tensors[number].data = model->bases[TENSORS[number].base] + TENSORS[number].offset;
}

static void fill_tables(@name@_model *model) {
    for (size_t i = 0; i < TENSOR_COUNT; i++) {
        const tensor_row *row = &TENSORS[i];
        dl_tensor *tensor = &model->tensors[i];
        tensor->device.type = CPU_DEVICE;
        tensor->rank = row->rank;
        tensor->dtype.code = row->type_code;
        tensor->dtype.bits = row->type_bits;
        tensor->dtype.lanes = 1;
        tensor->shape = SHAPES + row->shape;
        if (row->base < FIRST_INPUT) {
            place_tensor(model, i);
        }
    }
    for (size_t i = 0; i < ARGUMENT_COUNT; i++) {
        model->arguments[i].type = TENSOR_ARGUMENT;
        model->arguments[i].value.tensor = &model->tensors[ARGUMENTS[i]];
    }
}

static @name@_status call_all(@name@_model *model, const call_row *calls, size_t count) {
    @name@_status status = @NAME@_OK;
    enter(model);
    for (size_t i = 0; i < count && status == @NAME@_OK; i++) {
        ffi_value result = {0, 0, {0}};
        if (calls[i].kernel(NULL, model->arguments + calls[i].first, calls[i].count, &result) != 0) {
            status = @NAME@_KERNEL_FAILED;
        }
    }
    leave();
    return status;
}

static bool holds_indices(const unsigned char *data, size_t size, int bits, int64_t below) {
    size_t step = (size_t)bits / 8;
    for (size_t at = 0; at + step <= size; at += step) {
        int64_t value;
        if (step == sizeof value) {
            memcpy(&value, data + at, sizeof value);
        } else {
            int32_t narrow;
            memcpy(&narrow, data + at, sizeof narrow);
            value = narrow;
        }
        if (value < 0 || value >= below) {
            return false;
        }
    }
    return true;
}

/* The images that the inputs and outputs are for, by their sizes. */
static @name@_status check_run(const @name@_input *inputs, const @name@_output *outputs, size_t *images) {
    *images = INPUTS[0].size == 0 ? SMALLEST_BATCH : inputs[0].size / INPUTS[0].size;
    if (*images < SMALLEST_BATCH || *images > LARGEST_BATCH) {
        return @NAME@_WRONG_SIZE;
    }
    for (size_t i = 0; i < INPUT_COUNT; i++) {
        const input_row *row = &INPUTS[i];
        if (inputs[i].size != *images * row->size) {
            return @NAME@_WRONG_SIZE;
        }
        if (inputs[i].data == NULL && inputs[i].size > 0) {
            return @NAME@_NULL_ARGUMENT;
        }
        if ((uintptr_t)inputs[i].data % row->element != 0) {
            return @NAME@_MISALIGNED;
        }
        if (row->below > 0 && !holds_indices(inputs[i].data, inputs[i].size, (int)row->element * 8, row->below)) {
            return @NAME@_WRONG_INDEX;
        }
    }
    for (size_t i = 0; i < OUTPUT_COUNT; i++) {
        if (outputs[i].size != *images * OUTPUTS[i].size) {
            return @NAME@_WRONG_SIZE;
        }
        if (outputs[i].data == NULL && outputs[i].size > 0) {
            return @NAME@_NULL_ARGUMENT;
        }
    }
    return @NAME@_OK;
}

/* Let the tensors of an input be one image of the caller's data: in place where it lies well, else copied. */
static void take_input(@name@_model *model, size_t number, const unsigned char *data) {
    const input_row *row = &INPUTS[number];
    if (row->alignment > row->element && (uintptr_t)data % row->alignment != 0) {
        unsigned char *copy = model->bases[ARENA] + row->copy;
        memcpy(copy, data, row->size);
        data = copy;
    }
    model->bases[FIRST_INPUT + number] = (unsigned char *)(uintptr_t)data; /* kernels only read it */
}

static @name@_status run_images(@name@_model *model, const @name@_input *inputs, const @name@_output *outputs, size_t images) {
    for (size_t image = 0; image < images; image++) {
        for (size_t i = 0; i < INPUT_COUNT; i++) {
            take_input(model, i, (const unsigned char *)inputs[i].data + image * INPUTS[i].size);
        }
        for (size_t i = 0; i < INPUT_TENSOR_COUNT; i++) {
            place_tensor(model, INPUT_TENSORS[i]);
        }
        @name@_status status = call_all(model, CALLS, CALL_COUNT);
        if (status != @NAME@_OK) {
            return status;
        }
        for (size_t i = 0; i < OUTPUT_COUNT; i++) {
            unsigned char *target = outputs[i].data;
            if (OUTPUTS[i].size > 0) {
                memcpy(target + image * OUTPUTS[i].size, model->tensors[OUTPUTS[i].tensor].data, OUTPUTS[i].size);
            }
        }
    }
    return @NAME@_OK;
}

/* An instance in one block, without weights and threads. */
static @name@_model *lay_out(int threads) {
    unsigned char *block = aligned_alloc(ALIGNMENT, MODEL_SIZE + (size_t)threads * THREAD_SIZE);
    if (block == NULL) {
        return NULL;
    }
    @name@_model *model = (@name@_model *)(void *)block;
    memset(model, 0, sizeof *model);
    atomic_flag_clear(&model->running);
    model->threads = threads;
    block += ROUNDED(sizeof *model);
    model->bases[ARENA] = block;
    block += ARENA_SIZE;
    unsigned char *bytes = block;
    block += (size_t)threads * WORKSPACE_SIZE;
    model->spaces = (workspace *)(void *)block;
    for (int i = 0; i < threads; i++) {
        model->spaces[i] = (workspace){bytes + (size_t)i * WORKSPACE_SIZE, 0, 0};
    }
#if !defined(@NAME@_SINGLE_THREAD)
    model->workers = (worker *)(void *)(model->spaces + threads);
#endif
    return model;
}

const @name@_description *@name@_query(void) {
    static const char *const messages[] = {
        "it worked",
        "an argument, or what it points to, is NULL",
        "the number of threads must be at least 1, and 1 where @name@.c is built with @NAME@_SINGLE_THREAD",
        "this CPU lacks instructions that the kernels use; compile the model for it",
        "there is not enough memory",
        "the system starts no further thread",
        "the weights file cannot be opened or read",
        "this is no weights file of graphopt",
        "the weights are cut off, or something follows them",
        "the weights are those of another export; use the file that lay beside this code",
        "the weights are damaged: their checksum is wrong",
        "weights in memory must begin at a multiple of 64 bytes, inputs at a multiple of their element's size",
        "the number of inputs or outputs is wrong",
        "the size of an input or output is wrong",
        "an input holds an index outside of its table",
        "this instance is running on another thread; make one for each",
        "a kernel refused its arguments, which is an error of graphopt",
    };
    static const @name@_description description = {
        .target = "@target@",
        .features = "@features@",
        .input_count = INPUT_COUNT,
        .output_count = OUTPUT_COUNT,
        .inputs = INPUT_DESCRIPTIONS,
        .outputs = OUTPUT_DESCRIPTIONS,
        .smallest_batch = SMALLEST_BATCH,
        .largest_batch = LARGEST_BATCH,
        .weights_size = HEADER_SIZE + WEIGHTS_SIZE,
        .memory = MODEL_SIZE + THREAD_SIZE,
        .memory_per_thread = THREAD_SIZE,
        .messages = messages,
    };
    return &description;
}

@name@_status @name@_create(@name@_model **model, const @name@_options *options) {
    if (model == NULL) {
        return @NAME@_NULL_ARGUMENT;
    }
    *model = NULL;
    if (options == NULL || (options->weights_path == NULL && options->weights == NULL)) {
        return @NAME@_NULL_ARGUMENT;
    }
#if defined(@NAME@_SINGLE_THREAD)
    const int most = 1;
#else
    const int most = 1024;
#endif
    if (options->threads < 1 || options->threads > most) {
        return @NAME@_BAD_THREADS;
    }
    if (!cpu_is_able()) {
        return @NAME@_UNSUPPORTED_CPU;
    }
    @name@_model *made = lay_out(options->threads);
    if (made == NULL) {
        return @NAME@_NO_MEMORY;
    }
    @name@_status status = load_weights(made, options);
#if !defined(@NAME@_SINGLE_THREAD)
    if (status == @NAME@_OK) {
        status = start_threads(made);
        if (status != @NAME@_OK && made->owns_weights) {
            free(made->bases[WEIGHTS]);
        }
    }
#endif
    if (status != @NAME@_OK) {
        free(made);
        return status;
    }
    fill_tables(made);
    status = call_all(made, TRANSFORMS, TRANSFORM_COUNT);
    if (status != @NAME@_OK) {
        @name@_destroy(made);
        return status;
    }
    *model = made;
    return @NAME@_OK;
}

@name@_status @name@_run(@name@_model *model, const @name@_input *inputs, size_t input_count,
                         const @name@_output *outputs, size_t output_count) {
    if (model == NULL || inputs == NULL || outputs == NULL) {
        return @NAME@_NULL_ARGUMENT;
    }
    if (input_count != INPUT_COUNT || output_count != OUTPUT_COUNT) {
        return @NAME@_WRONG_COUNT;
    }
    size_t images;
    @name@_status status = check_run(inputs, outputs, &images);
    if (status != @NAME@_OK) {
        return status;
    }
    if (atomic_flag_test_and_set(&model->running)) {
        return @NAME@_BUSY;
    }
    status = run_images(model, inputs, outputs, images);
    atomic_flag_clear(&model->running);
    return status;
}

void @name@_destroy(@name@_model *model) {
    if (model == NULL) {
        return;
    }
#if !defined(@NAME@_SINGLE_THREAD)
    stop_threads(model, model->threads - 1);
#endif
    if (model->owns_weights) {
        free(model->bases[WEIGHTS]);
    }
    free(model);
}
