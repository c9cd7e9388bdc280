/* ---- Weights: a header of 64 bytes, then the data. ---- */

enum { HEADER_SIZE = 64 };

static uint32_t checksum(const unsigned char *data, size_t size) {
    uint32_t table[8][256]; /* CRC-32 of IEEE 802.3, eight bytes a step */
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) {
            value = (value >> 1) ^ (value & 1 ? 0xEDB88320u : 0u);
        }
        table[0][i] = value;
    }
    for (int k = 1; k < 8; k++) {
        for (int i = 0; i < 256; i++) {
            table[k][i] = (table[k - 1][i] >> 8) ^ table[0][table[k - 1][i] & 255];
        }
    }
    uint32_t crc = 0xFFFFFFFFu;
    for (; size >= 8; data += 8, size -= 8) {
        uint32_t low, high;
        memcpy(&low, data, 4);
        memcpy(&high, data + 4, 4);
        low ^= crc;
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^
              table[4][low >> 24] ^ table[3][high & 255] ^ table[2][high >> 8 & 255] ^
              table[1][high >> 16 & 255] ^ table[0][high >> 24];
    }
    for (; size > 0; data++, size--) {
        crc = (crc >> 8) ^ table[0][(crc ^ *data) & 255];
    }
    return ~crc;
}

/* The header against what this network was exported with. */
static @name@_status check_header(const unsigned char *header) {
    uint32_t version, crc;
    uint64_t size;
    if (memcmp(header, "gopt-wts", 8) != 0) {
        return @NAME@_NOT_WEIGHTS;
    }
    memcpy(&version, header + 8, sizeof version);
    memcpy(&crc, header + 12, sizeof crc);
    memcpy(&size, header + 16, sizeof size);
    if (version != 1) {
        return @NAME@_NOT_WEIGHTS;
    }
    return crc == WEIGHTS_CRC && size == WEIGHTS_SIZE ? @NAME@_OK : @NAME@_OTHER_WEIGHTS;
}

static @name@_status weights_in_memory(const unsigned char *file, size_t size, unsigned char **weights) {
    if ((uintptr_t)file % ALIGNMENT != 0) {
        return @NAME@_MISALIGNED;
    }
    if (size < HEADER_SIZE) {
        return @NAME@_TRUNCATED_WEIGHTS;
    }
    @name@_status status = check_header(file);
    if (status != @NAME@_OK) {
        return status;
    }
    if (size != HEADER_SIZE + WEIGHTS_SIZE) {
        return @NAME@_TRUNCATED_WEIGHTS;
    }
    if (checksum(file + HEADER_SIZE, WEIGHTS_SIZE) != WEIGHTS_CRC) {
        return @NAME@_CORRUPT_WEIGHTS;
    }
    *weights = (unsigned char *)(uintptr_t)(file + HEADER_SIZE); /* kernels only read them */
    return @NAME@_OK;
}

static @name@_status read_weights(FILE *file, unsigned char **weights) {
    unsigned char header[HEADER_SIZE];
    if (fread(header, 1, HEADER_SIZE, file) != HEADER_SIZE) {
        return ferror(file) ? @NAME@_NO_WEIGHTS : @NAME@_TRUNCATED_WEIGHTS;
    }
    @name@_status status = check_header(header);
    if (status != @NAME@_OK) {
        return status;
    }
    unsigned char *data = aligned_alloc(ALIGNMENT, ROUNDED(WEIGHTS_SIZE + 1));
    if (data == NULL) {
        return @NAME@_NO_MEMORY;
    }
    size_t size = fread(data, 1, WEIGHTS_SIZE + 1, file); /* one more: nothing may follow */
    if (ferror(file)) {
        status = @NAME@_NO_WEIGHTS;
    } else if (size != WEIGHTS_SIZE) {
        status = @NAME@_TRUNCATED_WEIGHTS;
    } else if (checksum(data, WEIGHTS_SIZE) != WEIGHTS_CRC) {
        status = @NAME@_CORRUPT_WEIGHTS;
    }
    if (status != @NAME@_OK) {
        free(data);
        return status;
    }
    *weights = data;
    return @NAME@_OK;
}

static @name@_status load_weights(@name@_model *model, const @name@_options *options) {
    if (options->weights_path == NULL) {
        return weights_in_memory(options->weights, options->weights_size, &model->bases[WEIGHTS]);
    }
    FILE *file = fopen(options->weights_path, "rb");
    if (file == NULL) {
        return @NAME@_NO_WEIGHTS;
    }
    setvbuf(file, NULL, _IONBF, 0); /* two large reads need no buffer */
    @name@_status status = read_weights(file, &model->bases[WEIGHTS]);
    fclose(file);
    model->owns_weights = status == @NAME@_OK;
    return status;
}
