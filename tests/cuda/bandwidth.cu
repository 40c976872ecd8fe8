// read_all: reads a buffer once and writes one word a block, the ceiling that weights are read at.
//
// source uint4 [num_vectors], sink u32 [blocks]; grid any, block 512.
extern "C" __global__ void __launch_bounds__(512) read_all(unsigned *sink, const uint4 *source,
                                                           long long num_vectors) {
    unsigned mixed = 0;
    const long long stride = (long long)gridDim.x * blockDim.x;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 7 * stride < num_vectors; i += 8 * stride) {
        uint4 values[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            values[j] = __ldcs(source + i + j * stride);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            mixed ^= values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
        }
    }
    for (; i < num_vectors; i += stride) {
        mixed ^= source[i].x;
    }
    if (mixed == 0x12345678u) {
        sink[blockIdx.x] = mixed;
    }
}
