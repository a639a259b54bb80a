/* What fragments of C in the pages use. They are compiled, not run. */
#include <a2a.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* An engine's own. */
void run_experts(void);
void run_shared_expert(void);
int32_t gather(const void *send, void *recv, size_t bytes, void *user);

void fragment(int rank, int num_ranks, a2a_unique_id_t id, a2a_config_t config, a2a_comm_t *comm, a2a_routing_t *routing,
              a2a_dispatch_in_t in, a2a_dispatch_out_t out, a2a_combine_in_t combine_in, a2a_combine_out_t combine_out,
              const int32_t *new_ranks, const int32_t *ranks, const int32_t *gone, int32_t n, int32_t m, int32_t k, void *stream)
{
    a2a_status_t status = A2A_SUCCESS;
    uint64_t gen;
    { FRAGMENT }
}
