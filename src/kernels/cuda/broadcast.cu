// broadcast_ids: gives every rank the tokens that rank 0 has drawn.
//
// Shapes:  ids u32 [4 · num_vectors], of rank 0 the source, of the others the target; whatever
//          lies after the ids in the last vector goes along. None may be 0xffffffff.
// Launch:  one block of at least world_size threads; on all ranks, in the order of all other
//          collectives.
// Slot:    slot_bytes at least 16 · (num_vectors + ranks).
// Limits:  ids on 16 bytes.
// Method:  own. Rank 0 stores the ids into the others' workspaces (peers.cuh). Since every rank
//          must hear from every other in each collective, the others send a vector of zeros.
#include "peers.cuh"

extern "C" __global__ void __launch_bounds__(1024)
    broadcast_ids(uint32_t *ids, int num_vectors, const __grid_constant__ Peers peers) {
    wait_for_producer();
    release_consumer();
    const uint32_t epoch = read_epoch(peers);
    const int64_t slot = slot_of(peers, epoch);
    const int64_t signs = slot + 16 * (int64_t)num_vectors;
    char *workspace = peers.workspaces[peers.rank];
    const int other = threadIdx.x;
    const bool has_other = other < peers.world_size && other != peers.rank;
    if (peers.rank == 0) {
        for (int i = threadIdx.x; i < num_vectors; i += blockDim.x) {
            const uint4 value = presentable(load16(ids + 4 * (int64_t)i));
            for (int rank = 1; rank < peers.world_size; rank++) {
                store_system16(peers.workspaces[rank] + slot + 16 * (int64_t)i, value);
            }
        }
    } else {
        if (has_other) {
            store_system16(peers.workspaces[other] + signs + 16 * peers.rank,
                           make_uint4(0, 0, 0, 0));
        }
        for (int i = threadIdx.x; i < num_vectors; i += blockDim.x) {
            store16(ids + 4 * (int64_t)i, receive(workspace + slot + 16 * (int64_t)i, peers, 0));
        }
    }
    if (has_other && other != 0) {
        receive(workspace + signs + 16 * other, peers, other);
    }
    __syncthreads();
    advance_epoch(peers, epoch);
}
