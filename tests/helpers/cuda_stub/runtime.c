// What torch asks of the CUDA runtime, answered as a machine with one GPU would that never computes.
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
