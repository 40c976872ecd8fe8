// What Hopper alone has: bulk tensor copies, barriers that count bytes, warpgroup products.
//
// Compiled to something for sm_90a only (HAS_HOPPER); kernels that use it are empty elsewhere and
// must be launched on compute capability 9.0 alone. Tiles in shared memory are rows of 128 bytes
// (64 elements of K) with the 128-byte swizzle that CU_TENSOR_MAP_SWIZZLE_128B writes and the
// descriptors below name; they begin at multiples of 1,024 bytes. Source: PTX ISA 9.0, "Asynchronous
// Warpgroup Level Matrix Multiply-Accumulate" and "Tensor".
#pragma once

#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAS_HOPPER 1
#define CLUSTER_OF(SIZE) __cluster_dims__(SIZE, 1, 1)
#define BODY(...) __VA_ARGS__
#else
#define CLUSTER_OF(SIZE)
#define BODY(...)
#endif

// A CUtensorMap, passed by value.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

#ifdef HAS_HOPPER

constexpr int WARPGROUP = 128;
// Cache policies of createpolicy, as constants: nothing special, read once, kept.
constexpr uint64_t EVICT_NORMAL = 0x1000000000000000ull;
constexpr uint64_t EVICT_FIRST = 0x12F0000000000000ull;
constexpr uint64_t EVICT_LAST = 0x14F0000000000000ull;
// A wait that long means a bug: the kernel traps instead of hanging.
constexpr int MAX_TRIES = 1 << 24;

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals));
}
// Makes initialised barriers visible to the cluster and to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(num_bytes)
                 : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives at the same barrier of another block of the cluster.
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                 "}" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
    for (int tries = 0;; tries++) {
        uint32_t is_done;
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n"
                     "}"
                     : "=r"(is_done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
        if (is_done) {
            return;
        }
        if (tries == MAX_TRIES) {
            asm volatile("trap;");
        }
    }
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
__device__ __forceinline__ float4 read_cluster16(uint32_t address, uint32_t rank) {
    float4 value;
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n"
                 "}"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(address), "r"(rank)
                 : "memory");
    return value;
}

__device__ __forceinline__ void prefetch_map(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Copies a box at (column, row) to shared memory; its bytes count at `barrier`.
__device__ __forceinline__ void copy_box(uint32_t target, const TensorMap &map, uint32_t barrier,
                                         int column, int row, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
                 : "memory");
}
// The same to the same place of every block of the cluster that `ranks` has a bit for, and its
// bytes count at each one's barrier.
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

template <int COUNT> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Describes a tile whose rows are 128 swizzled bytes, K running along them.
__device__ __forceinline__ uint64_t describe_tile(uint32_t address) {
    const uint64_t group_stride = 1024 >> 4;  // From 8 rows to the next 8.
    const uint64_t swizzle_128 = 1;
    return ((address & 0x3ffff) >> 4) | 1ull << 16 | group_stride << 32 | swizzle_128 << 62;
}
// The step from 16 elements of K to the next 16 in a descriptor.
constexpr uint64_t NEXT_16 = 32 >> 4;

__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most PENDING groups of products run.
template <int PENDING> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving uses of the sums across a wait.
template <int COUNT> __device__ __forceinline__ void pin(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+f"(sums[i])::"memory");
    }
}

// Adds A·Bᵀ to sums, A 64×16 and B N×16 in shared memory, or only sets them where `adds` is 0. Of
// rows lane / 4 and lane / 4 + 8 of its warp's 16, a thread holds at [4 j + 2 half + i] column
// 8 j + 2 (lane % 4) + i.
template <typename T, int N>
__device__ __forceinline__ void multiply(float (&sums)[N / 2], uint64_t a, uint64_t b, int adds);

#define SUMS4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS8(i) SUMS4(i), SUMS4(i + 4)
#define SUMS16(i) SUMS8(i), SUMS8(i + 8)
#define SUMS32(i) SUMS16(i), SUMS16(i + 16)
#define SUMS64(i) SUMS32(i), SUMS32(i + 32)
#define NAMES4 "%0, %1, %2, %3"
#define NAMES8 NAMES4 ", %4, %5, %6, %7"
#define NAMES16 NAMES8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES32                                                                                   \
    NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES64                                                                                   \
    NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES80                                                                                   \
    NAMES64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES96                                                                                   \
    NAMES80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES112                                                                                   \
    NAMES96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "  \
             "%110, %111"
#define NAMES128                                                                                  \
    NAMES112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "    \
             "%125, %126, %127"
#define MULTIPLY(T, TYPE, N, NAMES, A, B, ADDS, ...)                                               \
    template <>                                                                                    \
    __device__ __forceinline__ void multiply<T, N>(float (&sums)[N / 2], uint64_t a, uint64_t b,   \
                                                   int adds) {                                     \
        asm volatile("{\n"                                                                         \
                     ".reg .pred p;\n"                                                             \
                     "setp.ne.b32 p, " ADDS ", 0;\n"                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES    \
                     "}, " A ", " B ", p, 1, 1, 0, 0;\n"                                           \
                     "}"                                                                           \
                     : __VA_ARGS__                                                                 \
                     : "l"(a), "l"(b), "r"(adds));                                                 \
    }
#define MULTIPLY_ALL(T, TYPE)                                                                      \
    MULTIPLY(T, TYPE, 8, NAMES4, "%4", "%5", "%6", SUMS4(0))                                      \
    MULTIPLY(T, TYPE, 16, NAMES8, "%8", "%9", "%10", SUMS8(0))                                    \
    MULTIPLY(T, TYPE, 32, NAMES16, "%16", "%17", "%18", SUMS16(0))                                 \
    MULTIPLY(T, TYPE, 64, NAMES32, "%32", "%33", "%34", SUMS32(0))                                \
    MULTIPLY(T, TYPE, 128, NAMES64, "%64", "%65", "%66", SUMS64(0))                               \
    MULTIPLY(T, TYPE, 160, NAMES80, "%80", "%81", "%82", SUMS64(0), SUMS16(64))                   \
    MULTIPLY(T, TYPE, 192, NAMES96, "%96", "%97", "%98", SUMS64(0), SUMS32(64))                   \
    MULTIPLY(T, TYPE, 224, NAMES112, "%112", "%113", "%114", SUMS64(0), SUMS32(64), SUMS16(96))    \
    MULTIPLY(T, TYPE, 256, NAMES128, "%128", "%129", "%130", SUMS64(0), SUMS64(64))
MULTIPLY_ALL(__half, "f16")
MULTIPLY_ALL(__nv_bfloat16, "bf16")

#endif  // HAS_HOPPER
