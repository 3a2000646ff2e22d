/* A CUDA driver without a device: it loads anything, and notes what is launched instead of running it.

   Handles of kernels are their names. Each launch is a line on the file that ANYEP_TEST_LAUNCHES names:
   kernel, grid, threads, stream, and the first four arguments as int64. A thread without a context launches nothing,
   nor does stream 13. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned num_attributes;
} CUlaunchConfig;

enum { MAX_SHARED_OPTIN = 97, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, WARP_SIZE = 10, MULTIPROCESSORS = 16 };

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 12080; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == CAPABILITY_MAJOR ? 9 : attribute == CAPABILITY_MINOR ? 0
         : attribute == MAX_SHARED_OPTIN ? 232448 : attribute == WARP_SIZE ? 32
         : attribute == MULTIPROCESSORS ? 132 : 65536;
  return 0;
}
static __thread void *current;
CUresult cuCtxGetCurrent(void **context) { *context = current; return 0; }
CUresult cuCtxSetCurrent(void *context) { current = context; return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "an error"; return 0; }
CUresult cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
CUresult cuModuleUnload(void *module) { return 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = strdup(name); return 0; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; /* threads a block, registers */
  return 0;
}
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { return 1; }
CUresult cuPointerGetAttributes(unsigned n, int *attributes, void **data, uint64_t pointer) { return 1; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return 0; }
CUresult cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
CUresult cuTensorMapEncodeTiled(void) { return 1; }
CUresult cuTensorMapEncodeIm2col(void) { return 1; }
CUresult cuCtxPushCurrent_v2(void *context) { current = context; return 0; }
CUresult cuCtxPopCurrent_v2(void **context) { *context = current; current = NULL; return 0; }
static CUresult note(const CUlaunchConfig *config, void *function, void **arguments) {
  if (current == NULL) return 201;
  if (config->stream == (void *)13) return 700;
  const char *name = getenv("ANYEP_TEST_LAUNCHES");
  if (name == NULL) return 0;
  FILE *file = fopen(name, "a");
  fprintf(file, "%s %u %u %u %u %ld", (char *)function, config->grid[0], config->grid[1], config->grid[2],
          config->block[0], (long)config->stream);
  for (int i = 0; i < 4; i++) fprintf(file, " %ld", (long)*(int64_t *)arguments[i]);
  fprintf(file, "\n");
  fclose(file);
  return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, void *function, void **arguments, void **extra) {
  return note(config, function, arguments);
}
CUresult cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned two,
                        unsigned three, unsigned shared, void *stream, void **arguments, void **extra) {
  CUlaunchConfig config = {{x, y, z}, {threads, two, three}, shared, stream, NULL, 0};
  return note(&config, function, arguments);
}
