/* A CUDA driver and runtime whose device memory is the process's own and whose kernels are run by a callback.

   What is launched or copied on a stream in capture becomes a node, and runs when the graph does. One thread captures, others wait. */
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* In a capture `record` is 1: the callback keeps the launch and returns its number. */
typedef int (*launch_t)(const char *name, const unsigned *config, void **parameters, int record);
typedef void (*replay_t)(int number);

typedef struct { int number; void *to; const void *from; size_t size; } Node;
typedef struct { Node *nodes; int count; } Graph;

enum { INVALID = 1, UNSUPPORTED = 900, INVALIDATED = 901, NOT_CAPTURING = 905 };
enum { RELAXED = 2, NON_BLOCKING = 1 };

/* What both libraries share, in the driver. */
extern Graph *fake_capture;
extern void *fake_stream;
extern pthread_t fake_owner;
extern pthread_mutex_t fake_lock;
extern int fake_broken, fake_counts[4];
extern replay_t fake_replay;
enum { LAUNCHED, REPLAYED, MALLOCS_IN_CAPTURE, GRAPHS_ALIVE };
#define COUNT(which, more) __sync_fetch_and_add(&fake_counts[which], more)

#define OK(name) int name(void) { return 0; }

#ifdef DRIVER
Graph *fake_capture;
void *fake_stream;
pthread_t fake_owner;
pthread_mutex_t fake_lock = PTHREAD_MUTEX_INITIALIZER;
int fake_broken, fake_counts[4];
replay_t fake_replay;
static launch_t launch;

void fake_callbacks(launch_t launched, replay_t replayed) {
  launch = launched;
  fake_replay = replayed;
}
int fake_count(int which) { return fake_counts[which]; }

int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)image;
  return memcmp(image, "\177ELF", 4) ? 200 : 0; /* CUDA_ERROR_INVALID_IMAGE */
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  int *limit = malloc(sizeof(int) + strlen(name) + 1); /* of shared memory, in front of what a function is here: its name */
  *limit = 48 << 10;
  *function = strcpy((char *)(limit + 1), name);
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  if (attribute == 8) ((int *)function)[-1] = value; /* CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES */
  return 0;
}
void fake_append(Node node) {
  fake_capture->nodes = realloc(fake_capture->nodes, ++fake_capture->count * sizeof(Node));
  fake_capture->nodes[fake_capture->count - 1] = node;
}
int cuLaunchKernelEx(const unsigned *config, void *function, void **parameters, void **extra) {
  if (config[6] > ((const unsigned *)function)[-1]) return INVALID;
  void *stream = *(void *const *)(config + 8); /* behind grid, block and bytes of shared memory */
  int record = fake_capture && stream == fake_stream;
  int number = launch(function, config, parameters, record);
  if (record) fake_append((Node){.number = number});
  else COUNT(LAUNCHED, 1);
  return 0;
}
int cuGetErrorName(int code, const char **name) { *name = "fake"; return 0; }
int cuGetErrorString(int code, const char **name) { *name = "fake"; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "fake", size); return 0; }
OK(cuModuleUnload) OK(cuTensorMapEncodeTiled)
#else
void fake_append(Node node);

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 0 : 1024; /* compute capability 8.0 */
  return 0;
}
int cudaMalloc(void **memory, size_t size) {
  if (posix_memalign(memory, 256, size + 256)) return 2;
  memset(*memory, 0xA5, size);
  if (fake_capture && pthread_equal(fake_owner, pthread_self())) COUNT(MALLOCS_IN_CAPTURE, 1);
  return 0;
}
int cudaMallocHost(void **memory, size_t size) { return cudaMalloc(memory, size); }
int cudaFree(void *memory) { free(memory); return 0; }
int cudaFreeHost(void *memory) { free(memory); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  if (fake_capture && stream == fake_stream) fake_append((Node){-1, to, from, size});
  else memcpy(to, from, size);
  return 0;
}
int cudaStreamSynchronize(void *stream) {
  if (!fake_capture || stream != fake_stream) return 0;
  fake_broken = 1;
  return UNSUPPORTED;
}
int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
  *stream = malloc(1);
  *(char *)*stream = flags;
  return 0;
}
int cudaStreamDestroy(void *stream) { free(stream); return 0; }
int cudaStreamIsCapturing(void *stream, int *status) {
  *status = fake_capture && stream == fake_stream;
  return 0;
}
int cudaStreamBeginCapture(void *stream, int mode) {
  /* others that allocate or use the default stream would break any other capture off */
  if (!stream || mode != RELAXED || *(char *)stream != NON_BLOCKING) return UNSUPPORTED;
  pthread_mutex_lock(&fake_lock);
  fake_owner = pthread_self();
  fake_stream = stream;
  fake_capture = calloc(1, sizeof(Graph));
  fake_broken = 0;
  return 0;
}
int cudaStreamEndCapture(void *stream, Graph **graph) {
  if (!fake_capture || stream != fake_stream) return NOT_CAPTURING;
  *graph = fake_broken ? NULL : fake_capture;
  fake_capture = NULL;
  int code = fake_broken ? INVALIDATED : 0;
  pthread_mutex_unlock(&fake_lock);
  return code;
}
int cudaGraphInstantiate(Graph **executable, const Graph *graph, unsigned long long flags) {
  Node *nodes = malloc(graph->count * sizeof(Node) + 1);
  if (flags) return INVALID;
  memcpy(nodes, graph->nodes, graph->count * sizeof(Node));
  *executable = malloc(sizeof(Graph));
  **executable = (Graph){nodes, graph->count};
  COUNT(GRAPHS_ALIVE, 1);
  return 0;
}
int cudaGraphLaunch(const Graph *executable, void *stream) {
  for (int i = 0; i < executable->count; i++) {
    const Node *node = &executable->nodes[i];
    if (node->number < 0) memcpy(node->to, node->from, node->size);
    else fake_replay(node->number), COUNT(REPLAYED, 1);
  }
  return 0;
}
int cudaGraphDestroy(Graph *graph) {
  free(graph->nodes);
  free(graph);
  return 0;
}
int cudaGraphExecDestroy(Graph *executable) {
  COUNT(GRAPHS_ALIVE, -1);
  return cudaGraphDestroy(executable);
}
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = 1 << 30; return 0; }
const char *cudaGetErrorString(int code) { return code == INVALIDATED ? "invalidated" : "fake"; }
const char *cudaGetErrorName(int code) { return "fake"; }
OK(cudaSetDevice) OK(cudaGetDeviceProperties) OK(cudaGetLastError) OK(cudaPeekAtLastError)
OK(cudaMemcpyPeerAsync) OK(cudaStreamCreate) OK(cudaStreamWaitEvent)
OK(cudaEventCreate) OK(cudaEventDestroy) OK(cudaEventRecord) OK(cudaEventSynchronize)
OK(cudaEventElapsedTime)
#endif
