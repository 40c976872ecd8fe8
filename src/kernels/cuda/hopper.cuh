// What only compute capability 9.0 has: tiles copied by the tensor memory accelerator (TMA),
// barriers in shared memory that count bytes, clusters of blocks, products of warpgroups (wgmma),
// and registers moved between warpgroups. PTX ISA 9.0 has the instructions and layouts; own code.
//
// Kernels that use it exist in the image of sm_90a alone (HAS_HOPPER), so that a launch elsewhere
// is refused by name.
//
// Matrices in shared memory are panels of 64 columns of 16 bits (128 bytes a row), rows one after
// another, the 16-byte columns of a row permuted by `column ^ (row % 8)`: the 128-byte swizzle of
// TMA and wgmma. Panels begin at multiples of 1,024 bytes.
#pragma once

#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define HAS_HOPPER 1

constexpr int WARPGROUP_SIZE = 128;
constexpr int PANEL_COLUMNS = 64;
// Bytes of a row of a panel, and of its 8 rows that the swizzle repeats after.
constexpr int PANEL_ROW_BYTES = 2 * PANEL_COLUMNS;
constexpr int SWIZZLE_BYTES = 8 * PANEL_ROW_BYTES;
// Columns that one product has of each row of K-major operands, and their bytes.
constexpr int PRODUCT_COLUMNS = 16;
constexpr int PRODUCT_BYTES = 2 * PRODUCT_COLUMNS;
// L2 cache policies as createpolicy makes them: nothing special, read once, kept.
constexpr uint64_t EVICT_NORMAL = 0x1000000000000000ull;
constexpr uint64_t EVICT_FIRST = 0x12F0000000000000ull;
constexpr uint64_t EVICT_LAST = 0x14F0000000000000ull;
// A wait of so many times 2^20 ns (17 s) means a fault of the kernel.
constexpr uint32_t MAX_WAIT = 1 << 14;

// Two neighbours of E4M3, which maps and panels take for one element of 16 bits.
struct E4m3Pair {
    uint16_t bits;
};
template <typename T> constexpr bool IS_FP8 = false;
template <> constexpr bool IS_FP8<E4m3Pair> = true;
// What FP8 operands are multiplied by: one f32 for each row of x and of W.
struct Scales {
    const float *x;
    const float *w;
};

// A CUtensorMap, passed by value as __grid_constant__.
struct alignas(128) TensorMap {
    uint64_t opaque[16];
};

// Returns the first address from `address` on where a panel may begin.
__device__ __forceinline__ uint32_t panel_address(uint32_t address) {
    return (address + SWIZZLE_BYTES - 1) / SWIZZLE_BYTES * SWIZZLE_BYTES;
}
// Returns the byte offset of 16-byte column `column` of row `row` in panels of `num_rows` rows.
__device__ __forceinline__ uint32_t panel_offset(int num_rows, int row, int column) {
    return (column / 8 * num_rows + row) * PANEL_ROW_BYTES + (((column % 8) ^ (row % 8)) << 4);
}

// Returns the time in units of 2^20 ns.
__device__ __forceinline__ uint32_t coarse_time() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return (uint32_t)(time >> 20);
}
// Ends the launch when too much time has passed since `start`. It writes to address 0, so that the
// GPU reports an error instead of hanging. (With __trap() ptxas leaves setmaxnreg out of account in
// attention_prefill_wgmma, and spills.)
__device__ __forceinline__ void check_wait(uint32_t start) {
    if (coarse_time() - start > MAX_WAIT) {
        asm volatile("st.global.u32 [%0], 0;" ::"l"(0ull) : "memory");
    }
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals)
                 : "memory");
}
// Makes initialised barriers visible to TMA and to the cluster once it is synchronised;
// __syncthreads() shows them to the block's other threads.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;\n"
                 "fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and lets the phase wait for `num_bytes` that TMA brings.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(num_bytes)
                 : "memory");
}
// Arrives at the same barrier of block `rank` of the cluster.
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                 "}" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}
__device__ __forceinline__ bool has_passed(uint32_t barrier, uint32_t parity) {
    uint32_t passed;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(passed)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return passed != 0;
}
// Waits for the end of the phase of that parity.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
    if (has_passed(barrier, parity)) {
        return;
    }
    const uint32_t start = coarse_time();
    while (!has_passed(barrier, parity)) {
        check_wait(start);
    }
}

// Barriers of some of a block's threads, a multiple of 32; index 0 is __syncthreads()'s.
__device__ __forceinline__ void sync_threads(int index, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(index), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void arrive_threads(int index, int num_threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(index), "r"(num_threads) : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Gives registers back until COUNT a thread are left, or takes them; all warps of a warpgroup call
// it.
template <int COUNT> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Makes this thread's writes to shared memory visible to wgmma and TMA.
__device__ __forceinline__ void fence_for_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Copies the map's box at (column, row) to shared memory, zeros where the tensor has nothing. The
// box's bytes count at `barrier`.
__device__ __forceinline__ void copy_box(uint32_t target, const TensorMap &map, uint32_t barrier,
                                         int column, int row, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
                 : "memory");
}
// The same to the same place of every block of the cluster that `ranks` has a bit for; its bytes
// count at each one's barrier.
__device__ __forceinline__ void copy_box_to_all(uint32_t target, const TensorMap &map,
                                                uint32_t barrier, int column, int row,
                                                uint16_t ranks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(ranks)
                 : "memory");
}
// A box of four dimensions.
__device__ __forceinline__ void copy_box4(uint32_t target, const TensorMap &map, uint32_t barrier,
                                          int x, int y, int z, int w, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(target),
                 "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "l"(policy)
                 : "memory");
}

// Describes a matrix of panels. Where rows are the product's inner dimension the next panel is
// `panel_bytes` away; elsewhere that has no meaning and is 16 by convention.
__device__ __forceinline__ uint64_t describe_panels(uint32_t address, uint32_t panel_bytes = 16) {
    constexpr uint64_t SWIZZLE_128 = 1;
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(panel_bytes >> 4) << 16 |
           (uint64_t)(SWIZZLE_BYTES >> 4) << 32 | SWIZZLE_128 << 62;
}
// Returns the descriptor of the matrix that begins `num_bytes` later.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t num_bytes) {
    return descriptor + (num_bytes >> 4);
}

// Orders accesses of registers and shared memory before the products that follow.
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
template <int COUNT> __device__ __forceinline__ void pin(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+f"(registers[i])::"memory");
    }
}
template <int COUNT> __device__ __forceinline__ void pin(uint32_t (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+r"(registers[i])::"memory");
    }
}

// Gives each of four lanes one octet of columns of a row of sums, of which each had two columns:
// lane i % 4 == 0 the octet that a is of, and so on.
__device__ __forceinline__ uint4 gather_octet(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const bool is_odd = threadIdx.x & 1;
    const uint32_t ab = __shfl_xor_sync(FULL_MASK, is_odd ? a : b, 1);
    const uint32_t cd = __shfl_xor_sync(FULL_MASK, is_odd ? c : d, 1);
    (is_odd ? a : b) = ab;
    (is_odd ? c : d) = cd;
    const bool is_high = threadIdx.x & 2;
    const uint32_t ac = __shfl_xor_sync(FULL_MASK, is_high ? a : c, 2);
    const uint32_t bd = __shfl_xor_sync(FULL_MASK, is_high ? b : d, 2);
    (is_high ? a : c) = ac;
    (is_high ? b : d) = bd;
    return make_uint4(a, b, c, d);
}

// Starts sums += A·Bᵀ, or sums = A·Bᵀ where `adds` is 0: A is 64×16 and B N×16 in shared memory,
// both with their 16 columns side by side. Of rows lane / 4 and lane / 4 + 8 of its warp's 16, a
// thread has at [4 j + 2 half + i] column 8 j + 2 (lane % 4) + i. Products of E4m3Pair keep about
// 14 bits of sums on the way.
template <typename T, int N>
__device__ __forceinline__ void multiply_transposed(float (&sums)[N / 2], uint64_t a, uint64_t b,
                                                    int adds);
// Starts sums += A·B: A is 64×16 in registers (as sums, two columns in one), B is 16×N in shared
// memory, its N columns side by side.
template <typename T, int N>
__device__ __forceinline__ void multiply(float (&sums)[N / 2], const uint32_t (&a)[4], uint64_t b);

// A product's operands in PTX: its sums come first.
#define SUMS4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS8(i) SUMS4(i), SUMS4(i + 4)
#define SUMS16(i) SUMS8(i), SUMS8(i + 8)
#define SUMS32(i) SUMS16(i), SUMS16(i + 16)
#define SUMS64(i) SUMS32(i), SUMS32(i + 32)
#define NAMES8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES16 NAMES8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES32                                                                                    \
    NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES64                                                                                    \
    NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES96                                                                                    \
    NAMES64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "   \
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES112                                                                                   \
    NAMES96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "   \
            "%110, %111"
#define NAMES128                                                                                   \
    NAMES112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "    \
             "%125, %126, %127"
#define WGMMA(TYPE, N, K) "wgmma.mma_async.sync.aligned.m64n" #N "k" #K ".f32." TYPE "." TYPE
#define MULTIPLY_TRANSPOSED(T, TYPE, K, MAJORS, N, NAMES, A, B, ADDS, ...)                         \
    template <>                                                                                    \
    __device__ __forceinline__ void multiply_transposed<T, N>(float(&sums)[N / 2], uint64_t a,     \
                                                              uint64_t b, int adds) {              \
        asm volatile("{\n"                                                                         \
                     ".reg .pred p;\n"                                                             \
                     "setp.ne.b32 p, " ADDS ", 0;\n" WGMMA(TYPE, N, K) " {" NAMES "}, " A ", " B   \
                     ", p, 1, 1" MAJORS ";\n"                                                      \
                     "}"                                                                           \
                     : __VA_ARGS__                                                                 \
                     : "l"(a), "l"(b), "r"(adds));                                                 \
    }
#define MULTIPLY(T, TYPE, N, NAMES, A, B, ...)                                                     \
    template <>                                                                                    \
    __device__ __forceinline__ void multiply<T, N>(float(&sums)[N / 2], const uint32_t(&a)[4],     \
                                                   uint64_t b) {                                   \
        asm volatile(WGMMA(TYPE, N, 16) " {" NAMES "}, {" A "}, " B ", 1, 1, 1, 1;"                \
                     : __VA_ARGS__                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }
#define TRANSPOSED_PRODUCTS(T, TYPE, K, MAJORS)                                                    \
    MULTIPLY_TRANSPOSED(T, TYPE, K, MAJORS, 16, NAMES8, "%8", "%9", "%10", SUMS8(0))               \
    MULTIPLY_TRANSPOSED(T, TYPE, K, MAJORS, 32, NAMES16, "%16", "%17", "%18", SUMS16(0))           \
    MULTIPLY_TRANSPOSED(T, TYPE, K, MAJORS, 64, NAMES32, "%32", "%33", "%34", SUMS32(0))           \
    MULTIPLY_TRANSPOSED(T, TYPE, K, MAJORS, 128, NAMES64, "%64", "%65", "%66", SUMS64(0))          \
    MULTIPLY_TRANSPOSED(T, TYPE, K, MAJORS, 192, NAMES96, "%96", "%97", "%98",                     \
                        SUMS64(0), SUMS32(64))                                                     \
    MULTIPLY_TRANSPOSED(T, TYPE, K, MAJORS, 224, NAMES112, "%112", "%113", "%114",                 \
                        SUMS64(0), SUMS32(64), SUMS16(96))                                         \
    MULTIPLY_TRANSPOSED(T, TYPE, K, MAJORS, 256, NAMES128, "%128", "%129", "%130",                 \
                        SUMS64(0), SUMS64(64))
#define PRODUCTS(T, TYPE)                                                                          \
    TRANSPOSED_PRODUCTS(T, TYPE, 16, ", 0, 0")                                                     \
    MULTIPLY(T, TYPE, 64, NAMES32, "%32, %33, %34, %35", "%36", SUMS32(0))                         \
    MULTIPLY(T, TYPE, 128, NAMES64, "%64, %65, %66, %67", "%68", SUMS64(0))

PRODUCTS(__half, "f16")
PRODUCTS(__nv_bfloat16, "bf16")
// Elements of one byte are always side by side: the instruction has no choice of majors.
TRANSPOSED_PRODUCTS(E4m3Pair, "e4m3", 32, "")

#undef PRODUCTS
#undef TRANSPOSED_PRODUCTS
#undef MULTIPLY
#undef MULTIPLY_TRANSPOSED
#undef WGMMA
#undef NAMES128
#undef NAMES112
#undef NAMES96
#undef NAMES64
#undef NAMES32
#undef NAMES16
#undef NAMES8
#undef SUMS64
#undef SUMS32
#undef SUMS16
#undef SUMS8
#undef SUMS4

#else

// Elsewhere a file's image has this one kernel: an image without kernels may not load.
#define WITHOUT_HOPPER(FILE)                                                                       \
    extern "C" __global__ void FILE##_is_for_sm_90a() {}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL
