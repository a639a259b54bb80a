/* A program in C that uses an installed liba2a: the library is the header's, and one rank comes and goes. */
#include <a2a.h>
#include <stdio.h>
#include <string.h>

int main(void)
{
    a2a_config_t config;
    a2a_comm_t *comm;
    if (strcmp(a2a_version(), A2A_VERSION) != 0) {
        printf("the library is %s, the header %s\n", a2a_version(), A2A_VERSION);
        return 1;
    }
    if (a2a_config_init(&config, sizeof config) != A2A_SUCCESS) return 1;
    config.num_ranks = 1;
    config.num_experts = 4;
    config.max_topk = 2;
    config.max_hidden = 64;
    config.max_tokens = 8;
    if (a2a_create(&config, &comm) != A2A_SUCCESS || a2a_destroy(comm) != A2A_SUCCESS) {
        printf("%s\n", a2a_last_error());
        return 1;
    }
    /* A refusal crosses the library's guard. */
    config.num_experts = 0;
    return a2a_create(&config, &comm) != A2A_INVALID_ARGUMENT || strstr(a2a_last_error(), "num_experts") == NULL;
}
