// Program: a CUDA process with a known payload, to be checkpointed.
//
//   worker HOME MIB[xCOUNT][,MIB[xCOUNT]...]
//
// Talks through files as tests/gpu/control.py says. Verbs: check, spin MS, alloc MIB, exit.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unistd.h>
#include <vector>

struct Block {
    uint64_t *at;
    size_t words;
};

static std::string home;
static std::vector<Block> blocks;

__device__ uint64_t mixed(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ULL;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebULL;
    return x ^ x >> 31;
}

__global__ void fill(uint64_t *at, size_t words, uint64_t seed) {
    size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += stride)
        at[i] = mixed(seed + i);
}

// Wrong words are counted, each against what it must be.
__global__ void verify(const uint64_t *at, size_t words, uint64_t seed, unsigned long long *wrong) {
    size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += stride)
        if (at[i] != mixed(seed + i))
            atomicAdd(wrong, 1ULL);
}

__global__ void spin(long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - start < (unsigned long long)nanoseconds);
}

static void reply(long number, const std::string &text) {
    std::string path = home + "/reply.new";
    FILE *file = fopen(path.c_str(), "w");
    fputs(text.c_str(), file);
    fclose(file);
    rename(path.c_str(), (home + "/reply." + std::to_string(number)).c_str());
}

static std::string failed(cudaError_t error) {
    return std::string("{\"ok\": false, \"error\": \"") + cudaGetErrorName(error) + "\"}";
}

static cudaError_t allocate(size_t mib) {
    Block block = {nullptr, mib << 17};
    cudaError_t error = cudaMalloc(&block.at, mib << 20);
    if (error != cudaSuccess)
        return error;
    fill<<<1024, 256>>>(block.at, block.words, blocks.size() << 40);
    blocks.push_back(block);
    return cudaDeviceSynchronize();
}

static std::string check() {
    static unsigned long long *wrong = nullptr;
    cudaError_t error = wrong ? cudaSuccess : cudaMalloc(&wrong, sizeof *wrong);
    if (error == cudaSuccess)
        error = cudaMemset(wrong, 0, sizeof *wrong);
    for (size_t i = 0; i < blocks.size(); i++)
        verify<<<1024, 256>>>(blocks[i].at, blocks[i].words, i << 40, wrong);
    unsigned long long count = 0;
    if (error == cudaSuccess)
        error = cudaMemcpy(&count, wrong, sizeof count, cudaMemcpyDeviceToHost);
    if (error != cudaSuccess)
        return failed(error);
    return std::string("{\"ok\": ") + (count ? "false" : "true") + ", \"wrong\": " + std::to_string(count) + "}";
}

static std::string serve(const std::string &verb, long argument) {
    if (verb == "check")
        return check();
    cudaError_t error = cudaSuccess;
    if (verb == "alloc")
        error = allocate(argument);
    if (verb == "spin") {
        spin<<<1, 1>>>(argument * 1000000LL);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? "{\"ok\": true}" : failed(error);
}

static void allocate_all(char *layout) {
    for (char *each = strtok(layout, ","); each; each = strtok(nullptr, ",")) {
        char *times = strchr(each, 'x');
        for (long left = times ? atol(times + 1) : 1; left > 0; left--) {
            cudaError_t error = allocate(atol(each));
            if (error != cudaSuccess) {
                reply(0, failed(error));
                exit(1);
            }
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    home = argv[1];
    allocate_all(argv[2]);
    check(); // so that its own allocation and code are there before the first look
    reply(0, "{\"ready\": true}");
    for (long number = 1;; number++) {
        std::string path = home + "/ask." + std::to_string(number);
        FILE *file;
        while (!(file = fopen(path.c_str(), "r")))
            usleep(3000);
        char verb[64] = "", argument[64] = "0";
        if (fscanf(file, "%63s %63s", verb, argument) < 1)
            strcpy(verb, "none");
        fclose(file);
        reply(number, strcmp(verb, "exit") ? serve(verb, atol(argument)) : "{}");
        if (!strcmp(verb, "exit"))
            return 0;
    }
}
