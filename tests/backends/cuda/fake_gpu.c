/* A CUDA driver and runtime whose device memory is the process's own and whose kernels are run by a callback. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef void (*launch_t)(const char *name, const unsigned *config, void **parameters);
static launch_t launch;

#define OK(name) int name(void) { return 0; }

#ifdef DRIVER
void fake_on_launch(launch_t callback) { launch = callback; }

int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)image;
  return memcmp(image, "\177ELF", 4) ? 200 : 0; /* CUDA_ERROR_INVALID_IMAGE */
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = strdup(name);
  return 0;
}
int cuLaunchKernelEx(const unsigned *config, void *function, void **parameters, void **extra) {
  launch(function, config, parameters);
  return 0;
}
int cuGetErrorName(int code, const char **name) { *name = "fake"; return 0; }
int cuGetErrorString(int code, const char **name) { *name = "fake"; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "fake", size); return 0; }
OK(cuModuleUnload) OK(cuFuncSetAttribute) OK(cuTensorMapEncodeTiled)
#else
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 0 : 1024; /* compute capability 8.0 */
  return 0;
}
int cudaMalloc(void **memory, size_t size) {
  if (posix_memalign(memory, 256, size + 256)) return 2;
  memset(*memory, 0xA5, size);
  return 0;
}
int cudaMallocHost(void **memory, size_t size) { return cudaMalloc(memory, size); }
int cudaFree(void *memory) { free(memory); return 0; }
int cudaFreeHost(void *memory) { free(memory); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  memcpy(to, from, size);
  return 0;
}
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = 1 << 30; return 0; }
const char *cudaGetErrorString(int code) { return "fake"; }
const char *cudaGetErrorName(int code) { return "fake"; }
OK(cudaSetDevice) OK(cudaGetDeviceProperties) OK(cudaGetLastError) OK(cudaPeekAtLastError)
OK(cudaMemcpyPeerAsync) OK(cudaStreamCreate) OK(cudaStreamCreateWithFlags) OK(cudaStreamDestroy)
OK(cudaStreamSynchronize) OK(cudaStreamWaitEvent) OK(cudaStreamBeginCapture) OK(cudaStreamEndCapture)
OK(cudaEventCreate) OK(cudaEventDestroy) OK(cudaEventRecord) OK(cudaEventSynchronize)
OK(cudaEventElapsedTime) OK(cudaGraphDestroy) OK(cudaGraphExecDestroy) OK(cudaGraphInstantiate)
OK(cudaGraphLaunch)
#endif
