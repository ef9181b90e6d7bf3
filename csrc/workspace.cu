// Counters that the blocks of one launch share, dealt out of the device memory that ls_set_workspace() was given. Host code only.
//
// Launches of one stream run one after the other, so they share counters. A captured launch keeps its own for good: two graphs that
// were captured on one stream may be replayed on two streams at once.
#include "group.cuh"

namespace ls {
namespace {

constexpr int kStreams = 256;  // of one device, that get counters
constexpr int kWordsEach = 4;  // in the size of one Sync

struct Workspace {
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  Sync *slots = nullptr;
  int64_t size = 0, used = 0;
  int n_streams = 0;
  unsigned long long streams[kStreams];
  Sync *of_stream[kStreams];
};
Workspace workspaces[kMaxDevices];

class Lock {
 public:
  explicit Lock(std::atomic_flag &flag) : flag_(flag) {
    while (flag_.test_and_set(std::memory_order_acquire)) {
    }
  }
  ~Lock() { flag_.clear(std::memory_order_release); }

 private:
  std::atomic_flag &flag_;
};

}  // namespace

// Counters and `words` words for one launch on `stream`; NULL: none to be had, make two launches.
Sync *next_sync(int device, void *stream, int words) {
  if (device < 0 || device >= kMaxDevices) return nullptr;
  Workspace &w = workspaces[device];
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (words > kHiddenInside) return nullptr;
  if (cuda_stream == cudaStreamPerThread) return nullptr;  // one handle, many streams
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(cuda_stream, &status);
  const bool captured = status != cudaStreamCaptureStatusNone;
  unsigned long long id = 0;  // a handle may come back after its stream is gone, an id does not; asking would end a capture
  if (error == cudaSuccess && !captured) error = cudaStreamGetId(cuda_stream, &id);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  Lock lock(w.busy);
  if (!w.slots) return nullptr;
  if (!captured) {
    for (int i = 0; i < w.n_streams; ++i)
      if (w.streams[i] == id) return w.of_stream[i];
    if (w.n_streams == kStreams) return nullptr;
  }
  const int64_t size = 1 + ((captured ? words : kHiddenInside) + kWordsEach - 1) / kWordsEach;
  if (w.size - w.used < size) return nullptr;
  Sync *sync = w.slots + w.used;
  w.used += size;
  if (!captured) w.streams[w.n_streams] = id, w.of_stream[w.n_streams++] = sync;
  return sync;
}

}  // namespace ls

LS_EXPORT int ls_set_workspace(int32_t device, void *zeroed, int64_t bytes) {
  if (device < 0 || device >= ls::kMaxDevices || bytes < 0) return LS_ERROR_ARGUMENT;
  if (!zeroed || !ls::aligned16(zeroed)) return LS_ERROR_POINTER;
  ls::Workspace &w = ls::workspaces[device];
  ls::Lock lock(w.busy);
  if (w.slots) return LS_ERROR_ARGUMENT;
  w.slots = static_cast<ls::Sync *>(zeroed), w.size = bytes / int64_t(sizeof(ls::Sync));
  return 0;
}

LS_EXPORT int64_t ls_workspace_left(int32_t device) {
  if (device < 0 || device >= ls::kMaxDevices) return -1;
  ls::Workspace &w = ls::workspaces[device];
  ls::Lock lock(w.busy);
  return w.slots ? (w.size - w.used) * int64_t(sizeof(ls::Sync)) : -1;
}
