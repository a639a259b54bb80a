/*
 * Defects on purpose, one for each argument, so that a checker that is not there is found out: tests/c/presence.sh demands
 * that each of them ends the program with the checker's message. Run without a checker it proves nothing.
 */
#include <a2a.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Out of the compiler's sight. */
static volatile int one = 1;

int main(int argc, char **argv)
{
    const char *defect = argc > 1 ? argv[1] : "";
    size_t size = sizeof(a2a_config_t);
    if (strcmp(defect, "heap_overflow") == 0) {
        volatile char *volatile bytes = (volatile char *)malloc(16);
        bytes[15 + one] = 1;
        free((void *)bytes);
    } else if (strcmp(defect, "signed_overflow") == 0) {
        printf("%d\n", 2147483647 + one);
    } else if (strcmp(defect, "leak") == 0) {
        void *volatile lost = malloc(4000);
        lost = NULL;
        printf("%p\n", lost);
    } else if (strcmp(defect, "in_the_library") == 0) {
        /* A struct that says a word more than it has: the library, which believes it, reads past its end. */
        a2a_config_t *config = (a2a_config_t *)malloc(size);
        a2a_memory_t memory;
        memset(config, 0, size);
        memset(&memory, 0, sizeof memory);
        memory.struct_size = sizeof memory;
        config->struct_size = size + sizeof(size_t);
        printf("%s\n", a2a_status_name(a2a_query_memory(config, &memory)));
        free(config);
    } else {
        fprintf(stderr, "usage: %s heap_overflow|signed_overflow|leak|in_the_library\n", argv[0]);
        return 2;
    }
    return 0;
}
