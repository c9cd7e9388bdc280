/* ---- The CPU: its instructions as Linux reports them; other systems do not say, and are believed. ---- */

#if defined(__linux__)
#include <sys/auxv.h>
#endif

static bool cpu_is_able(void) {
#if defined(__linux__)
    const unsigned long first = @hwcap@UL;   /* of AT_HWCAP */
    const unsigned long second = @hwcap2@UL; /* of AT_HWCAP2 */
    return (getauxval(AT_HWCAP) & first) == first && (getauxval(AT_HWCAP2) & second) == second;
#else
    return true;
#endif
}
