// A library that CUDA loads into any program (CUDA_INJECTION64_PATH): writes a line for each kernel,
// "gpu start end name" with nanoseconds, to the file that KERNEL_TRACE names, which one process may write.
// kernel_times.py builds it and reads the lines. Kernels of replayed graphs are there one by one. Source:
// CUPTI's activity API.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include <cupti.h>
#include <cxxabi.h>

namespace {

constexpr size_t BUFFER_BYTES = 8 << 20;
std::mutex file_lock;
FILE *file = nullptr;

void CUPTIAPI give_buffer(uint8_t **buffer, size_t *size, size_t *max_records) {
    *buffer = static_cast<uint8_t *>(aligned_alloc(8, BUFFER_BYTES));
    *size = *buffer != nullptr ? BUFFER_BYTES : 0;
    *max_records = 0;
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t *buffer, size_t, size_t valid_size) {
    const std::lock_guard<std::mutex> guard(file_lock);
    CUpti_Activity *record = nullptr;
    while (file != nullptr &&
           cuptiActivityGetNextRecord(buffer, valid_size, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const auto *kernel = reinterpret_cast<const CUpti_ActivityKernel9 *>(record);
            const char *name = kernel->name;
            char *readable = abi::__cxa_demangle(name, nullptr, nullptr, nullptr);
            fprintf(file, "%u %llu %llu %s\n", kernel->deviceId,
                    static_cast<unsigned long long>(kernel->start),
                    static_cast<unsigned long long>(kernel->end),
                    readable != nullptr ? readable : name);
            free(readable);
        }
    }
    free(buffer);
}

void finish() {
    cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    const std::lock_guard<std::mutex> guard(file_lock);
    fclose(file);
    file = nullptr;
}

}  // namespace

extern "C" int InitializeInjection() {
    const char *path = getenv("KERNEL_TRACE");
    if (path == nullptr || (file = fopen(path, "w")) == nullptr) {
        fprintf(stderr, "KERNEL_TRACE must name a file that can be written\n");
        return 0;
    }
    if (cuptiActivityRegisterCallbacks(give_buffer, take_buffer) != CUPTI_SUCCESS ||
        cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS) {
        fprintf(stderr, "CUPTI does not trace kernels here\n");
        return 0;
    }
    atexit(finish);
    return 1;
}
