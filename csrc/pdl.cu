// Programmatic dependent launch (PDL): which launches may start before their predecessor has ended. Host code only.
//
// Those that a stream captures right behind another launch of this library. Between two of ours a programmatic edge saves 9 %
// (the linears alone, docs/kernel_log.md). Behind a launch of somebody else, which never lets its successor start early, it saves
// nothing, and a graph with such edges may take the host longer to launch. Outside of a capture nobody can say what came before, and
// the host is slower than the GPU anyway.
#include "common.cuh"

namespace ls {
namespace {

struct Node {
  unsigned long long capture = 0;
  cudaGraphNode_t node = nullptr;
};
thread_local Node ours;  // the last launch of ours that this thread has captured

// The one node that the next launch on `stream` will depend on, if it is being captured.
Node last_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();
    return Node{};
  }
  if (status != cudaStreamCaptureStatusActive) return Node{};
  Node last;
  const cudaGraphNode_t *nodes = nullptr;
  const cudaGraphEdgeData *edges = nullptr;
  size_t n = 0;
#if CUDART_VERSION >= 13000
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &last.capture, nullptr, &nodes, &edges, &n);
#else
  const cudaError_t error = cudaStreamGetCaptureInfo_v3(stream, &status, &last.capture, nullptr, &nodes, &edges, &n);
#endif
  if (error != cudaSuccess) cudaGetLastError();
  if (error != cudaSuccess || n != 1) return Node{};
  last.node = nodes[0];
  return last;
}

}  // namespace

bool follows_ours(cudaStream_t stream) {
  if (!ours.node) return false;
  const Node last = last_of(stream);
  return last.node == ours.node && last.capture == ours.capture;
}

void launched(cudaStream_t stream) { ours = last_of(stream); }

}  // namespace ls
