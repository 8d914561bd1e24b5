/* A libcuda.so.1 that does nothing: what Triton's launcher calls, and a callback for every launch.
 *
 * Triton's JIT, binder, compiler and C launcher run against it as they are. It allocates no device memory and runs no
 * code: every pointer is taken for one of the device. A function's handle is a copy of its name. Which device it pretends
 * to be is told by stub_device().
 */
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

typedef void (*launch_callback)(CUfunction function, const unsigned *grid, unsigned threads, unsigned shared,
                                int cooperative, CUstream stream, void **params);

static launch_callback on_launch;
static int multiprocessors, shared_memory;

/* How many multiprocessors the device has, and bytes of shared memory that a thread block may take; and who hears of
 * launches: function, grid (3 numbers), threads of a block, dynamic shared memory, whether the launch is cooperative,
 * stream, and where the arguments lie. */
void stub_device(int processors, int bytes, launch_callback callback) {
    multiprocessors = processors;
    shared_memory = bytes;
    on_launch = callback;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
    const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    int cooperative = 0;
    for (unsigned i = 0; i < config->numAttrs; i++)
        if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
            cooperative = config->attrs[i].value.cooperative;
    /* What a real driver refuses, too. */
    if (grid[1] > 65535 || grid[2] > 65535 || config->sharedMemBytes > (unsigned)shared_memory)
        return CUDA_ERROR_INVALID_VALUE;
    if (cooperative && grid[0] * grid[1] * grid[2] > (unsigned)multiprocessors)
        return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE; /* all of this project take one multiprocessor each */
    on_launch(function, grid, config->blockDimX, config->sharedMemBytes, cooperative, config->hStream, params);
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)image;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_memory; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer;
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE ? "too many blocks in cooperative launch" : "invalid argument";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

/* Named by the launcher, called by nothing here. */
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { abort(); }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { abort(); }
