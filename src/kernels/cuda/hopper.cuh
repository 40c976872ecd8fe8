// What only compute capability 9.0 has: products of warpgroups (wgmma), tiles copied by the
// tensor memory accelerator (TMA), barriers in shared memory that count bytes, and registers
// moved between warpgroups. PTX ISA 8.0 has the instructions and layouts; own code.
//
// Matrices in shared memory are panels of 64 columns (128 bytes a row), rows one after another,
// the 16-byte columns of a row permuted by `column ^ (row % 8)`: the 128-byte swizzle of TMA and
// wgmma. Panels begin on 1,024 bytes.
#pragma once

#include "common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int WARPGROUP_SIZE = 128;
// Bytes of a row of a panel, and of its 8 rows that the swizzle repeats after.
constexpr int PANEL_ROW_BYTES = 128;
constexpr int PANEL_COLUMNS = 64;
constexpr int SWIZZLE_BYTES = 8 * PANEL_ROW_BYTES;

// CUtensorMap, passed by value as __grid_constant__.
struct alignas(128) TensorMap {
    char bytes[128];
};

// Returns the byte offset of 16-byte column `column` of row `row` in panels of `num_rows` rows.
__device__ __forceinline__ uint32_t panel_offset(int num_rows, int row, int column) {
    return (column / 8 * num_rows + row) * PANEL_ROW_BYTES + (((column % 8) ^ (row % 8)) << 4);
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals)
                 : "memory");
}
// Makes initialised barriers visible to TMA; __syncthreads() shows them to the other threads.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and lets the phase wait for `num_bytes` that TMA brings.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                     barrier),
                 "r"(num_bytes)
                 : "memory");
}
__device__ __forceinline__ bool has_passed(uint32_t barrier, uint32_t parity) {
    uint32_t passed;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}\n"
                 : "=r"(passed)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return passed != 0;
}
// Returns the time in units of 2^20 ns.
__device__ __forceinline__ uint32_t coarse_time() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return (uint32_t)(time >> 20);
}
// Waits for the end of the phase of that parity. A wait of more than 17 s is a fault of the
// kernel: it writes to address 0, so that the GPU reports an error instead of hanging. (With
// __trap() ptxas would leave setmaxnreg out of account and spill.)
__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
    if (has_passed(barrier, parity)) {
        return;
    }
    const uint32_t start = coarse_time();
    while (!has_passed(barrier, parity)) {
        if (coarse_time() - start > (1u << 14)) {
            asm volatile("st.global.u32 [%0], 0;" ::"l"(0ull) : "memory");
        }
    }
}

// Barriers of some of a block's threads, a multiple of 32; index 0 is __syncthreads()'s.
__device__ __forceinline__ void sync_threads(int index, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(index), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void arrive_threads(int index, int num_threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(index), "r"(num_threads) : "memory");
}

// Gives registers back, or takes them; all warps of a warpgroup call it.
template <int REGISTERS> __device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Makes this thread's writes to shared memory visible to wgmma and TMA.
__device__ __forceinline__ void fence_for_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Copies the map's box at (column, row) to shared memory; zeros where the tensor has no rows.
// The barrier is told of the box's bytes.
__device__ __forceinline__ void copy_box(uint32_t target, const TensorMap *map, int column, int row,
                                         uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(target),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// Describes a matrix of panels: 8 rows further on are SWIZZLE_BYTES. Where rows are the product's
// inner dimension (values) the next panel is `panel_bytes` away; elsewhere that has no meaning
// and is 16 by convention.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t panel_bytes) {
    constexpr uint64_t SWIZZLE_128 = 1;
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(panel_bytes >> 4) << 16 |
           (uint64_t)(SWIZZLE_BYTES >> 4) << 32 | SWIZZLE_128 << 62;
}
// Returns the descriptor of the matrix that begins `num_bytes` later.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t num_bytes) {
    return descriptor + (num_bytes >> 4);
}

// Orders register and shared-memory accesses before the products that follow.
__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most PENDING groups of products are under way.
template <int PENDING> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving accesses of registers over the calls above.
template <int N> __device__ __forceinline__ void pin(float (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+f"(registers[i])::"memory");
    }
}
template <int N> __device__ __forceinline__ void pin(uint32_t (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+r"(registers[i])::"memory");
    }
}

// A product's operands in PTX: its 32 or 64 accumulators come first.
#define ACCUMULATORS_32                                                                            \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ACCUMULATORS_64                                                                            \
    ACCUMULATORS_32                                                                                \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "           \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BIND_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BIND_16(d, i) BIND_4(d, i), BIND_4(d, i + 4), BIND_4(d, i + 8), BIND_4(d, i + 12)
#define BIND_32(d, i) BIND_16(d, i), BIND_16(d, i + 16)
#define BIND_64(d) BIND_32(d, 0), BIND_32(d, 32)

// Starts d (+)= A·Bᵀ: A is 64×16 and B 128×16, both with their 16 columns side by side. A thread
// has d[4 j + k] in row 16 (warp % 4) + lane / 4 + 8 (k / 2), column 8 j + 2 (lane % 4) + k % 2.
template <typename T>
__device__ __forceinline__ void multiply_transposed(float (&d)[64], uint64_t a, uint64_t b,
                                                    bool is_added);
// Starts d += A·B: A is 64×16 in registers (as d, two columns in one), B is 16×N.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t b);
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b);

#define PRODUCTS(T, PTX_TYPE)                                                                      \
    template <>                                                                                    \
    __device__ __forceinline__ void multiply_transposed<T>(float(&d)[64], uint64_t a, uint64_t b,  \
                                                           bool is_added) {                        \
        asm volatile("{\n"                                                                         \
                     ".reg .pred p;\n"                                                             \
                     "setp.ne.b32 p, %66, 0;\n"                                                    \
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32." PTX_TYPE "." PTX_TYPE          \
                     " {" ACCUMULATORS_64 "}, %64, %65, p, 1, 1, 0, 0;\n"                          \
                     "}\n"                                                                         \
                     : BIND_64(d)                                                                  \
                     : "l"(a), "l"(b), "r"((int)is_added));                                        \
    }                                                                                              \
    template <>                                                                                    \
    __device__ __forceinline__ void multiply<T>(float(&d)[64], const uint32_t(&a)[4],              \
                                                uint64_t b) {                                      \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." PTX_TYPE "." PTX_TYPE          \
                     " {" ACCUMULATORS_64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"            \
                     : BIND_64(d)                                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }                                                                                              \
    template <>                                                                                    \
    __device__ __forceinline__ void multiply<T>(float(&d)[32], const uint32_t(&a)[4],              \
                                                uint64_t b) {                                      \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." PTX_TYPE "." PTX_TYPE           \
                     " {" ACCUMULATORS_32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"            \
                     : BIND_32(d, 0)                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }

PRODUCTS(__half, "f16")
PRODUCTS(__nv_bfloat16, "bf16")

#undef PRODUCTS
#undef BIND_64
#undef BIND_32
#undef BIND_16
#undef BIND_4
#undef ACCUMULATORS_64
#undef ACCUMULATORS_32

#endif
