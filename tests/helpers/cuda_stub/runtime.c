// What torch asks of the CUDA runtime, answered as a machine with one GPU would that never computes. Its memory is the
// host's, and a launch succeeds and does nothing: so what torch checks on the host before a launch is checked.
// LORA_STUB_CAPABILITY: "9.0" by default. LORA_STUB_FREE: a file with the GPU's free bytes; without it all are free.
#include <driver_types.h> // of the environment: triton/backends/nvidia/include
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const size_t TOTAL = (size_t)80 << 30;
static long made = 0; // streams and events, which nothing is done with

static int capability(int part) {
  int numbers[2] = {9, 0};
  const char *text = getenv("LORA_STUB_CAPABILITY");
  if (text) sscanf(text, "%d.%d", numbers, numbers + 1);
  return numbers[part];
}

static int one(int *out, int value) {
  *out = value;
  return cudaSuccess;
}

static int handle(void **out) {
  *out = (void *)++made;
  return cudaSuccess;
}

int cudaGetDeviceCount(int *count) { return one(count, 1); }
int cudaGetDevice(int *device) { return one(device, 0); }
int cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
int cudaGetLastError(void) { return cudaSuccess; }
int cudaPeekAtLastError(void) { return cudaSuccess; }
int cudaDriverGetVersion(int *version) { return one(version, 13000); }
int cudaRuntimeGetVersion(int *version) { return one(version, 13000); }
int cudaDeviceSynchronize(void) { return cudaSuccess; }

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  return one(greatest, -5);
}

int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return handle(stream); }
int cudaStreamGetPriority(void *stream, int *priority) { return one(priority, 0); }
int cudaStreamQuery(void *stream) { return cudaSuccess; }
int cudaStreamSynchronize(void *stream) { return cudaSuccess; }
int cudaStreamIsCapturing(void *stream, int *status) { return one(status, 0); }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return cudaSuccess; }

int cudaStreamGetCaptureInfo_v2(void *stream, int *status, void *id, void *graph, void *needs, void *count) {
  return one(status, 0);
}

int cudaStreamGetCaptureInfo(void *stream, int *status, void *id, void *graph, void *needs, void *edges, void *count) {
  return one(status, 0);
}

int cudaThreadExchangeStreamCaptureMode(int *mode) { return cudaSuccess; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
int cudaEventRecord(void *event, void *stream) { return cudaSuccess; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return cudaSuccess; }
int cudaEventQuery(void *event) { return cudaSuccess; }
int cudaEventSynchronize(void *event) { return cudaSuccess; }
int cudaEventDestroy(void *event) { return cudaSuccess; }

int cudaEventElapsedTime(float *milliseconds, void *start, void *end) {
  *milliseconds = 1;
  return cudaSuccess;
}

int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  const char *path = getenv("LORA_STUB_FREE");
  FILE *file = path ? fopen(path, "r") : NULL;
  *total = *free_bytes = TOTAL;
  if (file) {
    if (fscanf(file, "%zu", free_bytes) != 1) *free_bytes = TOTAL;
    fclose(file);
  }
  return cudaSuccess;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *of, int device) {
  memset(of, 0, sizeof *of);
  strcpy(of->name, "no GPU");
  of->totalGlobalMem = TOTAL;
  of->major = capability(0);
  of->minor = capability(1);
  of->multiProcessorCount = 132;
  of->warpSize = 32;
  of->maxThreadsPerBlock = 1024;
  for (int i = 0; i < 3; i++) {
    of->maxThreadsDim[i] = i < 2 ? 1024 : 64;
    of->maxGridSize[i] = i ? 65535 : 2147483647;
  }
  of->maxThreadsPerMultiProcessor = 2048;
  of->sharedMemPerBlock = 49152;
  of->sharedMemPerBlockOptin = 232448;
  of->sharedMemPerMultiprocessor = 233472;
  of->regsPerBlock = 65536;
  of->l2CacheSize = 50 << 20;
  return cudaSuccess;
}

int cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
  case cudaDevAttrComputeCapabilityMajor: return one(value, capability(0));
  case cudaDevAttrComputeCapabilityMinor: return one(value, capability(1));
  case cudaDevAttrMultiProcessorCount: return one(value, 132);
  case cudaDevAttrMaxSharedMemoryPerBlockOptin: return one(value, 232448);
  default: return one(value, 1);
  }
}

int cudaMalloc(void **memory, size_t size) {
  *memory = aligned_alloc(512, (size + 511) / 512 * 512);
  if (*memory) memset(*memory, 0, size);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

int cudaFree(void *memory) {
  free(memory);
  return cudaSuccess;
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  memmove(to, from, size);
  return cudaSuccess;
}

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  return cudaMemcpyAsync(to, from, size, kind, NULL);
}

int cudaMemsetAsync(void *memory, int value, size_t size, void *stream) {
  memset(memory, value, size);
  return cudaSuccess;
}

int cudaMemset(void *memory, int value, size_t size) { return cudaMemsetAsync(memory, value, size, NULL); }
int cudaLaunchKernel() { return cudaSuccess; }
int cudaLaunchKernelExC() { return cudaSuccess; }
int cudaFuncSetAttribute() { return cudaSuccess; }

int cudaFuncGetAttributes(struct cudaFuncAttributes *of, const void *function) {
  memset(of, 0, sizeof *of);
  of->maxThreadsPerBlock = 1024;
  of->ptxVersion = of->binaryVersion = 10 * capability(0) + capability(1);
  return cudaSuccess;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { return one(blocks, 2); }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { return one(blocks, 2); }

int cudaHostAlloc(void **memory, size_t size, unsigned flags) {
  *memory = aligned_alloc(64, (size + 63) / 64 * 64);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

int cudaFreeHost(void *memory) {
  free(memory);
  return cudaSuccess;
}

int cudaHostRegister(void *memory, size_t size, unsigned flags) { return cudaSuccess; }
int cudaHostUnregister(void *memory) { return cudaSuccess; }

int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                     int *found) {
  *function = NULL;
  return one(found, 1); // no such function
}

int cudaPointerGetAttributes(struct cudaPointerAttributes *of, const void *memory) {
  memset(of, 0, sizeof *of);
  of->type = cudaMemoryTypeHost;
  return cudaSuccess;
}

// cuBLAS, which would ask the driver for more than is here
int cublasCreate_v2(void **out) { return handle(out); }
int cublasDestroy_v2(void *handle) { return 0; }
int cublasSetStream_v2() { return 0; }
int cublasSetWorkspace_v2() { return 0; }
int cublasSetMathMode() { return 0; }
int cublasGetMathMode(void *handle, int *mode) { return one(mode, 0); }
int cublasSetPointerMode_v2() { return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return one(mode, 0); }
int cublasSgemmEx() { return 0; }
int cublasGemmEx() { return 0; }
int cublasGemmStridedBatchedEx() { return 0; }
int cublasSgemm_v2() { return 0; }
int cublasSgemmStridedBatched() { return 0; }
int cublasLtCreate(void **out) { return handle(out); }
int cublasLtMatmulDescCreate(void **out) { return handle(out); }
int cublasLtMatmulDescDestroy() { return 0; }
int cublasLtMatmulDescSetAttribute() { return 0; }
int cublasLtMatrixLayoutCreate(void **out) { return handle(out); }
int cublasLtMatrixLayoutDestroy() { return 0; }
int cublasLtMatrixLayoutSetAttribute() { return 0; }
int cublasLtMatmulPreferenceCreate(void **out) { return handle(out); }
int cublasLtMatmulPreferenceDestroy() { return 0; }
int cublasLtMatmulPreferenceSetAttribute() { return 0; }
int cublasLtMatmul() { return 0; }

int cublasLtMatmulAlgoGetHeuristic(void *lt, void *of, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   void *results, int *found) {
  return one(found, 1);
}
