// Work that is recorded once and launched many times on the caller's stream: a CUDA graph, and its
// host twin.
#pragma once

#include <cstdint>

#include "check_cuda.h"

#if defined(FUSED_RNN_EMULATED)
#include <stdexcept>

#include "emulator.h"
#else
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <vector>
#endif

namespace fused_rnn {

#if defined(FUSED_RNN_EMULATED)

class Graph {
 public:
  template <class Work>
  Graph(void*, int32_t, const Work& work) {
    const TorchsStream guard(&recording_);
    work(static_cast<void*>(&recording_));
    if (emulator::fails_to_record()) throw std::runtime_error("the emulator was told to fail");
  }
  Graph(const Graph&) = delete;

  void launch() const {
    for (const auto& work : recording_) work();
  }

 private:
  struct TorchsStream {
    explicit TorchsStream(void* stream) { emulator::torch_stream = stream; }
    TorchsStream(const TorchsStream&) = delete;
    ~TorchsStream() { emulator::torch_stream = nullptr; }
  };

  emulator::Recording recording_;
};

#else

// torch's current stream, changed for a while. torch_cpu does not have the functions, and this
// library loads beside a torch that has nothing else.
class TorchsStream {
 public:
  TorchsStream(void* stream, int32_t device) {
    const auto create =
        find<decltype(&aoti_torch_create_cuda_stream_guard)>("aoti_torch_create_cuda_stream_guard");
    remove_ = find<decltype(remove_)>("aoti_torch_delete_cuda_stream_guard");
    if (create(stream, device, &guard_) != 0) throw std::runtime_error("torch takes no stream");
  }
  TorchsStream(const TorchsStream&) = delete;
  ~TorchsStream() { remove_(guard_); }

 private:
  template <class Function>
  static Function find(const char* name) {
    static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const found = library != nullptr ? dlsym(library, name) : nullptr;
    if (found == nullptr) throw std::runtime_error(std::string("torch has no ") + name);
    return reinterpret_cast<Function>(found);
  }

  CUDAStreamGuardHandle guard_ = nullptr;
  decltype(&aoti_torch_delete_cuda_stream_guard) remove_ = nullptr;
};

// A stream to record on, the caller's for as long as this lives. One of our own: the default stream
// cannot be captured, and to one of torch's somebody else may be giving work.
//
// torch has a cuBLAS workspace for each stream that a product was called on, here for this one, so
// that what was recorded on it may not run twice at a time: the caller's stream waits for the graph
// that was launched last, and there are as many such streams as threads that record at once.
class RecordingStream {
 public:
  RecordingStream(void* caller, int32_t device)
      : caller_(static_cast<cudaStream_t>(caller)), device_(device), own_(taken(device)) {
    const cudaError_t status = cudaStreamWaitEvent(caller_, own_.ended, 0);
    if (status == cudaSuccess) return;
    give_back();
    check_cuda(status);
  }
  RecordingStream(const RecordingStream&) = delete;
  ~RecordingStream() {
    cudaEventRecord(own_.ended, caller_);
    give_back();
  }

  cudaStream_t get() const { return own_.stream; }

 private:
  struct Stream {
    cudaStream_t stream;
    cudaEvent_t ended;  // of the last launch of what was recorded on it
  };
  // Of each device those that nobody has. Never destroyed: at the end of the process CUDA may be
  // gone before.
  struct Idle {
    std::mutex mutex;
    std::map<int32_t, std::vector<Stream> > streams;
  };
  static Idle& idle() {
    static auto* const all = new Idle;
    return *all;
  }

  static Stream taken(int32_t device) {
    const std::lock_guard<std::mutex> lock(idle().mutex);
    auto& streams = idle().streams[device];
    if (!streams.empty()) {
      const Stream last = streams.back();
      streams.pop_back();
      return last;
    }
    Stream made{};
    check_cuda(cudaEventCreateWithFlags(&made.ended, cudaEventDisableTiming));
    check_cuda(cudaStreamCreateWithFlags(&made.stream, cudaStreamNonBlocking));
    return made;
  }

  void give_back() {
    const std::lock_guard<std::mutex> lock(idle().mutex);
    idle().streams[device_].push_back(own_);
  }

  const cudaStream_t caller_;
  const int32_t device_;
  const Stream own_;
};

class Graph {
 public:
  // Records what `work` gives to the stream that it is called with, and torch to its own; nothing
  // of it runs. What it throws is thrown.
  template <class Work>
  Graph(void* caller, int32_t device, const Work& work)
      : caller_(static_cast<cudaStream_t>(caller)), stream_(caller, device) {
    cudaGraph_t graph = captured(device, work);
    const cudaError_t status = cudaGraphInstantiate(&launchable_, graph, 0);
    cudaGraphDestroy(graph);
    check_cuda(status);
  }
  Graph(const Graph&) = delete;
  // While it runs, too: CUDA frees it when it has ended.
  ~Graph() { cudaGraphExecDestroy(launchable_); }

  void launch() const { check_cuda(cudaGraphLaunch(launchable_, caller_)); }

 private:
  template <class Work>
  cudaGraph_t captured(int32_t device, const Work& work) const {
    const TorchsStream guard(stream_.get(), device);
    check_cuda(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeRelaxed));
    cudaGraph_t graph = nullptr;
    try {
      work(static_cast<void*>(stream_.get()));
    } catch (...) {
      cudaStreamEndCapture(stream_.get(), &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    check_cuda(cudaStreamEndCapture(stream_.get(), &graph));
    return graph;
  }

  const AnyCalls allowed_;
  const cudaStream_t caller_;
  const RecordingStream stream_;
  cudaGraphExec_t launchable_ = nullptr;
};

#endif

}  // namespace fused_rnn
