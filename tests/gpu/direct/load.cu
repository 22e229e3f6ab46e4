// A program of the CUDA runtime that uses the device in every way at once, without pause.
//
// load DIRECTORY MIB BLOCKS: blocks of MIB with a pattern; threads look at them by kernels on streams of their own, by
// CUDA graphs, capture graphs, call host functions, change blocks, allocate and free, run long kernels, wait in all
// ways. Writes DIRECTORY/status again and again; ends when DIRECTORY/stop is there.
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>
#include <cuda_runtime.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <unistd.h>
typedef unsigned long long u64;
static std::atomic<u64> answers{0}, wrong{0}, errors{0}, interrupted{0}, graphs{0}, captures{0}, callbacks{0}, changed{0}, made{0}, pooled{0}, longs{0};
static std::atomic<bool> ending{false};
static std::atomic<int> last_error{0}, last_line{0};
static std::atomic<u64> slowest_us{0};
static size_t size; static int count; static std::vector<u64 *> blocks; static std::vector<u64> sums;
#define CK(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { if (!errors++) { last_error = e_; last_line = __LINE__; fprintf(stderr, "%d: %s: %s\n", __LINE__, #x, cudaGetErrorString(e_)); } usleep(1000); return; } } while (0)
__device__ u64 word(u64 block, u64 i) { return (block << 40 | i) * 0x9E3779B97F4A7C15ull; }
__global__ void fill(u64 *p, size_t n, u64 block) { for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) p[i] = word(block, i); }
// counts words that differ
__global__ void look(const u64 *p, size_t n, u64 block, u64 *bad) { u64 b = 0; for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) b += p[i] != word(block, i); if (b) atomicAdd(bad, b); }
__global__ void more(u64 *p, size_t n) { for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) p[i] += 1; }
__global__ void differ(const u64 *p, size_t n, u64 is, u64 *bad) { u64 b = 0; for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) b += p[i] != is; if (b) atomicAdd(bad, b); }
__global__ void spin(long long cycles) { long long t = clock64(); while (clock64() - t < cycles) {} }
static void answered(std::chrono::steady_clock::time_point began, u64 bad) { answers++; if (bad) wrong++; u64 us = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - began).count(), was = slowest_us; while (us > was && !slowest_us.compare_exchange_weak(was, us)) {} }
static void looker(unsigned seed, bool deaf) {
  if (deaf) { sigset_t all; sigfillset(&all); pthread_sigmask(SIG_SETMASK, &all, nullptr); }
  cudaStream_t s; u64 *bad, *host; CK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)); CK(cudaMalloc(&bad, 8)); CK(cudaMallocHost(&host, 8));
  while (!ending) { auto began = std::chrono::steady_clock::now(); int b = rand_r(&seed) % count; *host = 77; CK(cudaMemsetAsync(bad, 0, 8, s)); look<<<256, 256, 0, s>>>(blocks[b], size / 8, b, bad); CK(cudaGetLastError()); CK(cudaMemcpyAsync(host, bad, 8, cudaMemcpyDeviceToHost, s)); CK(cudaStreamSynchronize(s)); answered(began, *host); }
}
static void grapher(unsigned seed) {
  cudaStream_t s; u64 *bad, *host; CK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)); CK(cudaMalloc(&bad, 8)); CK(cudaMallocHost(&host, 8)); cudaEvent_t e; CK(cudaEventCreateWithFlags(&e, cudaEventBlockingSync | cudaEventDisableTiming));
  std::vector<cudaGraphExec_t> execs;
  for (int i = 0; i < 4; i++) { int b = rand_r(&seed) % count; cudaGraph_t g; cudaGraphExec_t x; CK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal)); CK(cudaMemsetAsync(bad, 0, 8, s)); look<<<256, 256, 0, s>>>(blocks[b], size / 8, b, bad); CK(cudaMemcpyAsync(host, bad, 8, cudaMemcpyDeviceToHost, s)); CK(cudaLaunchHostFunc(s, [](void *) { callbacks++; }, nullptr)); CK(cudaStreamEndCapture(s, &g)); CK(cudaGraphInstantiate(&x, g, 0)); CK(cudaGraphDestroy(g)); execs.push_back(x); }
  while (!ending) { auto began = std::chrono::steady_clock::now(); *host = 77; u64 was = callbacks; CK(cudaGraphLaunch(execs[rand_r(&seed) % 4], s)); CK(cudaEventRecord(e, s)); CK(cudaEventSynchronize(e)); if (callbacks == was) wrong++; graphs++; answered(began, *host); }
}
static void capturer(unsigned seed) {
  cudaStream_t s; u64 *bad, *host; CK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)); CK(cudaMalloc(&bad, 8)); CK(cudaMallocHost(&host, 8));
  while (!ending) { auto began = std::chrono::steady_clock::now(); int b = rand_r(&seed) % count; cudaGraph_t g; cudaGraphExec_t x; CK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal)); CK(cudaMemsetAsync(bad, 0, 8, s)); look<<<64, 256, 0, s>>>(blocks[b], size / 8 / 8, b, bad); usleep(300); CK(cudaMemcpyAsync(host, bad, 8, cudaMemcpyDeviceToHost, s)); CK(cudaStreamEndCapture(s, &g)); CK(cudaGraphInstantiate(&x, g, 0)); *host = 77; CK(cudaGraphLaunch(x, s)); CK(cudaStreamSynchronize(s)); CK(cudaGraphExecDestroy(x)); CK(cudaGraphDestroy(g)); captures++; answered(began, *host); usleep(2000); }
}
static void changer() {  // nothing may be lost, nothing done twice
  cudaStream_t s; u64 *bad, *host, *mine, times = 0; size_t n = (64 << 20) / 8; CK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)); CK(cudaMalloc(&bad, 8)); CK(cudaMallocHost(&host, 8)); CK(cudaMalloc(&mine, n * 8)); CK(cudaMemsetAsync(mine, 0, n * 8, s)); CK(cudaStreamSynchronize(s));
  while (!ending) { auto began = std::chrono::steady_clock::now(); for (int i = 0; i < 20; i++) { more<<<256, 256, 0, s>>>(mine, n); times++; } *host = 77; CK(cudaMemsetAsync(bad, 0, 8, s)); differ<<<256, 256, 0, s>>>(mine, n, times, bad); CK(cudaMemcpyAsync(host, bad, 8, cudaMemcpyDeviceToHost, s)); CK(cudaStreamSynchronize(s)); changed = times; answered(began, *host); }
}
static void maker(unsigned seed) {
  u64 *bad; CK(cudaMalloc(&bad, 8));
  while (!ending) { auto began = std::chrono::steady_clock::now(); size_t n = (9 << 20) + rand_r(&seed) % (40 << 20); n = n / 8 * 8; u64 *p, *q, host = 77; CK(cudaMalloc(&p, n)); CK(cudaMemset(bad, 0, 8)); fill<<<128, 256>>>(p, n / 8, 3); look<<<128, 256>>>(p, n / 8, 3, bad); CK(cudaMemcpy(&host, bad, 8, cudaMemcpyDeviceToHost)); CK(cudaFree(p)); CK(cudaMalloc(&q, 4096)); CK(cudaFree(q)); made++; answered(began, host); }
}
static void pooler() {
  cudaStream_t s; u64 *host; CK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)); CK(cudaMallocHost(&host, 8));
  while (!ending) { auto began = std::chrono::steady_clock::now(); u64 *p, *bad; size_t n = 24 << 20; *host = 77; CK(cudaMallocAsync(&p, n, s)); CK(cudaMallocAsync(&bad, 8, s)); CK(cudaMemsetAsync(bad, 0, 8, s)); fill<<<128, 256, 0, s>>>(p, n / 8, 5); look<<<128, 256, 0, s>>>(p, n / 8, 5, bad); CK(cudaMemcpyAsync(host, bad, 8, cudaMemcpyDeviceToHost, s)); CK(cudaFreeAsync(p, s)); CK(cudaFreeAsync(bad, s)); CK(cudaStreamSynchronize(s)); pooled++; answered(began, *host); }
}
static void slow() { cudaStream_t s; CK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)); while (!ending) { for (int i = 0; i < 3; i++) spin<<<1, 1, 0, s>>>(40000000); CK(cudaStreamSynchronize(s)); longs++; } }
static void sleeper() { int set = epoll_create1(0); epoll_event e; while (!ending) { if (epoll_wait(set, &e, 1, 100) < 0 && errno == EINTR) interrupted++; timespec t{0, 50000000}; if (nanosleep(&t, nullptr)) interrupted++; } }
static void begin() {
  for (int i = 0; i < count; i++) { u64 *p; CK(cudaMalloc(&p, size)); fill<<<1024, 256>>>(p, size / 8, i); CK(cudaGetLastError()); blocks.push_back(p); } CK(cudaDeviceSynchronize());
}
int main(int argc, char **argv) {
  std::string home = argv[1]; size = (size_t)atoll(argv[2]) << 20; count = atoi(argv[3]);
  cudaSetDeviceFlags(cudaDeviceScheduleBlockingSync); begin(); if (errors) return 1;
  std::vector<std::thread> all; auto go = [&](auto f) { all.emplace_back(f); };
  for (unsigned i = 0; i < 4; i++) go([i] { looker(i + 1, i == 3); }); for (unsigned i = 0; i < 2; i++) go([i] { grapher(i + 11); });
  go([] { capturer(21); }); go([] { changer(); }); go([] { maker(31); }); go([] { pooler(); }); go([] { slow(); }); go([] { sleeper(); });
  while (access((home + "/stop").c_str(), F_OK)) {
    FILE *f = fopen((home + "/status.new").c_str(), "w"); fprintf(f, "{\"answers\": %llu, \"wrong\": %llu, \"errors\": %llu, \"error\": %d, \"line\": %d, \"interrupted\": %llu, \"graphs\": %llu, \"captures\": %llu, \"callbacks\": %llu, \"changed\": %llu, \"made\": %llu, \"pooled\": %llu, \"longs\": %llu, \"slowest_us\": %llu}\n", answers.load(), wrong.load(), errors.load(), last_error.load(), last_line.load(), interrupted.load(), graphs.load(), captures.load(), callbacks.load(), changed.load(), made.load(), pooled.load(), longs.load(), slowest_us.load()); fclose(f); rename((home + "/status.new").c_str(), (home + "/status").c_str()); usleep(20000); }
  ending = true; for (auto &t : all) t.join(); return errors || wrong ? 1 : 0;
}
