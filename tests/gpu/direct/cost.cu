// cost: what a call of the driver, an allocation, a kernel over memory cost; one JSON line. With the library and without.
#include <chrono>
#include <cstdio>
#include <vector>
#include <cuda_runtime.h>
static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
__global__ void nothing() {}
__global__ void sweep(float4 *p, size_t n) { for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) { float4 v = p[i]; v.x += 1; p[i] = v; } }
int main() {
  double t = now(); cudaFree(0); double init = now() - t;
  for (int i = 0; i < 2000; i++) nothing<<<1, 1>>>(); cudaDeviceSynchronize();
  t = now(); for (int i = 0; i < 200000; i++) nothing<<<1, 1>>>(); cudaDeviceSynchronize(); double launch = (now() - t) / 200000;
  cudaEvent_t e; cudaEventCreate(&e); t = now(); for (int i = 0; i < 1000000; i++) cudaEventQuery(e); double query = (now() - t) / 1e6;
  std::vector<void *> ps(64); t = now(); for (auto &p : ps) cudaMalloc(&p, 64 << 20); double alloc = (now() - t) / 64;
  t = now(); for (auto &p : ps) cudaFree(p); double release = (now() - t) / 64;
  std::vector<void *> qs(64); t = now(); for (auto &p : qs) cudaMalloc(&p, 20 << 20); double alloc20 = (now() - t) / 64; for (auto &p : qs) cudaFree(p);
  float4 *big; size_t n = 8ull << 30; t = now(); cudaMalloc(&big, n); double alloc8g = now() - t; cudaMemset(big, 0, n); sweep<<<4096, 256>>>(big, n / 16); cudaDeviceSynchronize();
  t = now(); for (int i = 0; i < 10; i++) sweep<<<4096, 256>>>(big, n / 16); cudaDeviceSynchronize(); double bandwidth = 10 * 2.0 * n / (now() - t) / 1e9;
  t = now(); cudaFree(big); double release8g = now() - t;
  printf("{\"init_s\": %.4f, \"launch_ns\": %.1f, \"query_ns\": %.1f, \"alloc64_us\": %.1f, \"free64_us\": %.1f, \"alloc20_us\": %.1f, \"alloc8g_us\": %.1f, \"free8g_us\": %.1f, \"GBps\": %.1f, \"error\": %d}\n", init, launch * 1e9, query * 1e9, alloc * 1e6, release * 1e6, alloc20 * 1e6, alloc8g * 1e6, release8g * 1e6, bandwidth, cudaGetLastError());
}
