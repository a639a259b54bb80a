/*
 * The calls of the CUDA driver that the example needs, from libcuda.so.1, which is opened at run time: neither CUDA's headers nor
 * its libraries are needed to build it. An engine has all of this already.
 */
#pragma once

#include <a2a.hpp>

#include <dlfcn.h>

#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>

namespace engine::cuda {

/** libcuda, with the device's primary context current on the thread that opened it. */
class Driver {
public:
    using Status = int;
    using Address = unsigned long long;

    // By their names in libcuda.
    Status (*cuInit)(unsigned flags);
    Status (*cuDeviceGet)(int *device, int ordinal);
    Status (*cuDevicePrimaryCtxRetain)(void **context, int device);
    Status (*cuCtxSetCurrent)(void *context);
    Status (*cuGetErrorName)(Status status, const char **name);
    Status (*cuMemAlloc_v2)(Address *memory, std::size_t bytes);
    Status (*cuMemFree_v2)(Address memory);
    Status (*cuMemcpyHtoD_v2)(Address to, const void *from, std::size_t bytes);
    Status (*cuMemcpyDtoH_v2)(void *to, Address from, std::size_t bytes);
    Status (*cuMemcpyDtoDAsync_v2)(Address to, Address from, std::size_t bytes, void *stream);
    Status (*cuStreamCreate)(void **stream, unsigned flags);
    Status (*cuStreamDestroy_v2)(void *stream);
    Status (*cuStreamSynchronize)(void *stream);
    Status (*cuStreamBeginCapture_v2)(void *stream, int mode);
    Status (*cuStreamEndCapture)(void *stream, void **graph);
    Status (*cuGraphInstantiateWithFlags)(void **executable, void *graph, unsigned long long flags);
    Status (*cuGraphLaunch)(void *executable, void *stream);
    Status (*cuGraphDestroy)(void *graph);
    Status (*cuGraphExecDestroy)(void *executable);

    /** The process's one, which stays open. */
    static a2a::Result<const Driver *> open()
    {
        static const a2a::Result<Driver> driver = load();
        if (!driver) return driver.error();
        return &*driver;
    }

    /** This thread's work is on the device. */
    a2a::Result<void> use(int ordinal) const
    {
        int device = 0;
        void *context = nullptr;
        if (auto done = check(cuDeviceGet(&device, ordinal), "cuDeviceGet"); !done) return done;
        if (auto done = check(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain"); !done) return done;
        return check(cuCtxSetCurrent(context), "cuCtxSetCurrent");
    }

    a2a::Result<void> check(Status status, const char *call) const
    {
        if (status == 0) return {};
        const char *name = nullptr;
        cuGetErrorName(status, &name);
        return a2a::Error(A2A_CUDA_ERROR, std::string(call) + ": " + (name ? name : std::to_string(status)));
    }

private:
    static a2a::Result<Driver> load()
    {
        void *library = dlopen("libcuda.so.1", RTLD_NOW);
        if (!library) return a2a::Error(A2A_UNSUPPORTED, dlerror());
        Driver driver{};
        std::string missing;
        const auto find = [&](auto &function, const char *name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            if (!function) missing += std::string(" ") + name;
        };
#define A2A_EXAMPLE_FIND(name) find(driver.name, #name)
        A2A_EXAMPLE_FIND(cuInit);
        A2A_EXAMPLE_FIND(cuDeviceGet);
        A2A_EXAMPLE_FIND(cuDevicePrimaryCtxRetain);
        A2A_EXAMPLE_FIND(cuCtxSetCurrent);
        A2A_EXAMPLE_FIND(cuGetErrorName);
        A2A_EXAMPLE_FIND(cuMemAlloc_v2);
        A2A_EXAMPLE_FIND(cuMemFree_v2);
        A2A_EXAMPLE_FIND(cuMemcpyHtoD_v2);
        A2A_EXAMPLE_FIND(cuMemcpyDtoH_v2);
        A2A_EXAMPLE_FIND(cuMemcpyDtoDAsync_v2);
        A2A_EXAMPLE_FIND(cuStreamCreate);
        A2A_EXAMPLE_FIND(cuStreamDestroy_v2);
        A2A_EXAMPLE_FIND(cuStreamSynchronize);
        A2A_EXAMPLE_FIND(cuStreamBeginCapture_v2);
        A2A_EXAMPLE_FIND(cuStreamEndCapture);
        A2A_EXAMPLE_FIND(cuGraphInstantiateWithFlags);
        A2A_EXAMPLE_FIND(cuGraphLaunch);
        A2A_EXAMPLE_FIND(cuGraphDestroy);
        A2A_EXAMPLE_FIND(cuGraphExecDestroy);
#undef A2A_EXAMPLE_FIND
        if (!missing.empty()) return a2a::Error(A2A_UNSUPPORTED, "libcuda.so.1 has no" + missing);
        if (auto done = driver.check(driver.cuInit(0), "cuInit"); !done) return done.error();
        return driver;
    }
};

/** Work that was enqueued once and can be launched again and again. Moves, is not copied. */
class Graph {
public:
    /** enqueue: puts work on the stream, returns a Result<void>, and throws nothing: a capture that has begun must be ended. */
    template <class Enqueue>
    static a2a::Result<Graph> capture(void *stream, Enqueue enqueue)
    {
        constexpr int thread_local_mode = 1; // other ranks of this process may allocate meanwhile
        auto driver = Driver::open();
        if (!driver) return driver.error();
        const Driver &cuda = **driver;
        if (auto done = cuda.check(cuda.cuStreamBeginCapture_v2(stream, thread_local_mode), "cuStreamBeginCapture"); !done) {
            return done.error();
        }
        auto enqueued = enqueue();
        // A capture that has begun must end, whatever became of it.
        void *recorded = nullptr;
        auto ended = cuda.check(cuda.cuStreamEndCapture(stream, &recorded), "cuStreamEndCapture");
        Graph graph(cuda);
        if (ended && enqueued) {
            ended = cuda.check(cuda.cuGraphInstantiateWithFlags(&graph.executable_, recorded, 0), "cuGraphInstantiate");
        }
        if (recorded) cuda.cuGraphDestroy(recorded);
        if (!enqueued) return enqueued.error();
        if (!ended) return ended.error();
        return graph;
    }

    Graph(Graph &&other) noexcept : cuda_(other.cuda_), executable_(std::exchange(other.executable_, nullptr)) {}
    Graph &operator=(Graph &&other) noexcept
    {
        std::swap(cuda_, other.cuda_);
        std::swap(executable_, other.executable_);
        return *this;
    }
    ~Graph()
    {
        if (executable_) cuda_->cuGraphExecDestroy(executable_);
    }

    a2a::Result<void> launch(void *stream) const
    {
        return cuda_->check(cuda_->cuGraphLaunch(executable_, stream), "cuGraphLaunch");
    }

private:
    explicit Graph(const Driver &cuda) : cuda_(&cuda) {}

    const Driver *cuda_;
    void *executable_ = nullptr;
};

}  // namespace engine::cuda
