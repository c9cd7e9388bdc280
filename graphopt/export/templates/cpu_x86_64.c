/* ---- The CPU: its instructions by CPUID, and whether the operating system saves their registers. ---- */

#include <cpuid.h>

typedef struct {
    unsigned leaf, subleaf;
    int word; /* of eax, ebx, ecx, edx */
    uint32_t bits;
} feature_row;

static const feature_row FEATURES[] = {
@features@
};
static const uint32_t SAVED_REGISTERS = @saved@; /* of XCR0 */

static bool cpu_is_able(void) {
    for (size_t i = 0; i < sizeof FEATURES / sizeof *FEATURES; i++) {
        unsigned words[4] = {0, 0, 0, 0};
        if (!__get_cpuid_count(FEATURES[i].leaf, FEATURES[i].subleaf, &words[0], &words[1], &words[2], &words[3])) {
            return false;
        }
        if ((words[FEATURES[i].word] & FEATURES[i].bits) != FEATURES[i].bits) {
            return false;
        }
    }
    if (SAVED_REGISTERS == 0) {
        return true;
    }
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & SAVED_REGISTERS) == SAVED_REGISTERS;
}
