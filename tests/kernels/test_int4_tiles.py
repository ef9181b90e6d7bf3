"""csrc/int4_tiles.cuh on the host: threads in place of lanes, barriers in place of what a warp does together. Against float64;
shared memory is NaN at first, and what is copied arrives when it is waited for and not before."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from paths import ROOT

# In place of CUDA, cp_async.cuh and mma.cuh.
STUB = r"""
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <thread>
#include <vector>
#include "loraswitch.h"
#define __device__
#define __forceinline__ inline
#define __shared__
#define __align__(x)
#define CHECK(x) if (!(x)) { std::printf("line %d: %s\n", __LINE__, #x); std::exit(1); }
using std::min;

struct uint4 { uint32_t x, y, z, w; };
struct Index { unsigned x; };
thread_local Index threadIdx;
bool aligned(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

struct bf16 {};
struct __nv_bfloat162 { uint16_t low, high; };
float __uint_as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
float of_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
uint16_t to_bf16(float f) { uint32_t u; std::memcpy(&u, &f, 4); return (u + 0x7fff + (u >> 16 & 1)) >> 16; }
__nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {to_bf16(of_bf16(a.low) - of_bf16(b.low)), to_bf16(of_bf16(a.high) - of_bf16(b.high))};
}
int __ffs(int v) { return __builtin_ffs(v); }
template <class T> T __ldg(const T *p) { return *p; }

struct Warp { std::barrier<> barrier{32}; uint32_t words[32], a[32][4], b[32][2]; };
std::unique_ptr<Warp> warps[8];
Warp &own() { return *warps[threadIdx.x / 32]; }
void __syncwarp() { own().barrier.arrive_and_wait(); }
uint32_t __shfl_sync(unsigned, uint32_t word, int lane) {
  own().words[threadIdx.x % 32] = word;
  __syncwarp();
  const uint32_t got = own().words[lane];
  __syncwarp();
  return got;
}

namespace ls {
alignas(16) char shared[1 << 17];
uint32_t shared_address(const char *p) { return uint32_t(p - shared); }
struct Copy { uint32_t to; const void *from; };
thread_local std::deque<std::vector<Copy>> groups;
thread_local std::vector<Copy> open_group;
void copy16_kept(uint32_t to, const void *from) {
  CHECK(to % 16 == 0 && aligned(from));
  open_group.push_back({to, from});
}
void store_zeros16(uint32_t to) { CHECK(to % 16 == 0); std::memset(shared + to, 0, 16); }
void copy_commit() { groups.push_back(open_group), open_group.clear(); }
template <int N> void copy_wait() {
  for (; groups.size() > N; groups.pop_front())
    for (const Copy &copy : groups.front()) std::memcpy(shared + copy.to, copy.from, 16);
}
uint32_t load_shared4(uint32_t from) { uint32_t v; std::memcpy(&v, shared + from, 4); return v; }
uint4 load_static(const void *p) { CHECK(aligned(p)); uint4 v; std::memcpy(&v, p, 16); return v; }

// m16n8k16, fragments as the PTX manual lays them out.
template <class E> void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  Warp &warp = own();
  const int lane = threadIdx.x % 32;
  const uint32_t a[4] = {a0, a1, a2, a3};
  std::memcpy(warp.a[lane], a, sizeof(a));
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2 * 8 + lane / 4, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t w = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], x = warp.b[column * 4 + k % 8 / 2][k / 8];
      sum += double(of_bf16(w >> k % 2 * 16 & 0xffff)) * of_bf16(x >> k % 2 * 16 & 0xffff);
    }
    c[i] = float(sum);
  }
  __syncwarp();
}
}  // namespace ls
"""

MAIN = r"""
#include "int4_tiles.h"

std::mt19937 random_bits(1);
uint16_t number() { return to_bf16((int(random_bits() % 2001) - 1000) / 1000.f); }
template <class T> T *align(std::vector<T> &v) {
  T *p = v.data();
  while (!aligned(p)) ++p;
  return p;
}

template <int TOKENS, int MT, int R, int RX, int P> void check(int tokens, int out, int in, int block) {
  using Tiles = ls::Int4Tiles<bf16, TOKENS, MT, R, RX, P, 8, 1>;
  constexpr int NT = Tiles::NT, kRows = 16 * MT;
  static_assert(Tiles::kShared <= sizeof(ls::shared));
  const int rows = (out + 7) / 8 * 8, width = (in + 1023) / 1024 * 1024;
  std::vector<int> q(rows * width);
  for (int &v : q) v = random_bits() % 16;
  std::vector<uint32_t> tiles_memory(rows * width / 8 + 4);
  uint32_t *word = align(tiles_memory);
  const uint32_t *tiles = word;
  for (int tile = 0; tile < rows / 8; ++tile)
    for (int chunk = 0; chunk < width / 128; ++chunk)
      for (int lane = 0; lane < 32; ++lane)
        for (int j = 0; j < 4; ++j, ++word)
          for (int k = 0; k < 8; ++k)
            *word |= uint32_t(q[(tile * 8 + lane / 4) * width + chunk * 128 + j * 32 + lane % 4 * 2 + k / 2 * 8 + k % 2])
                     << (k / 2 * 4 + k % 2 * 16);
  std::vector<uint16_t> scales(width / block * rows * 2), x_memory(tokens * in + 8);
  for (uint16_t &v : scales) v = number();
  uint16_t *x = align(x_memory);
  for (int i = 0; i < tokens * in; ++i) x[i] = number();
  ls_group group = {};
  group.x = x, group.tokens = tokens, group.in_features = in, group.scale_block = block;
  ls_item item = {};
  item.weight = tiles, item.scales = scales.data(), item.out_features = out;
  CHECK(Tiles::shared_bytes(group) <= Tiles::kShared);

  for (int row0 = 0; row0 < out; row0 += kRows) {
    std::memset(ls::shared, 0xff, sizeof(ls::shared));
    static float sums[8][8 * NT][kRows];
    std::vector<std::thread> threads;
    for (auto &warp : warps) warp = std::make_unique<Warp>();
    for (unsigned i = 0; i < 256; ++i)
      threads.emplace_back([&, i] {
        threadIdx.x = i;
        const int g = i % 32 / 4, t = i % 4;
        int row[MT][2];
        float acc[MT][NT][4] = {};
        for (int m = 0; m < MT; ++m)
          for (int h = 0; h < 2; ++h) row[m][h] = min(row0 + m * 16 + h * 8 + g, out - 1);
        Tiles tiles_of_lane;
        tiles_of_lane.begin(group, item, row);
        tiles_of_lane.begin_inputs(group);
        tiles_of_lane.run(group, acc);
        for (int m = 0; m < MT; ++m)
          for (int n = 0; n < NT; ++n)
            for (int k = 0; k < 4; ++k) sums[i / 32][n * 8 + t * 2 + k % 2][m * 16 + k / 2 * 8 + g] = acc[m][n][k];
      });
    for (std::thread &thread : threads) thread.join();
    for (int token = 0; token < tokens; ++token)
      for (int r = 0; r < kRows && row0 + r < out; ++r) {
        double sum = 0, expected = 0, size = 0;
        for (auto &warp : sums) sum += warp[token][r];
        for (int f = 0; f < in; ++f) {
          const uint16_t *scale = &scales[(f / block * rows + row0 + r) * 2];
          const double weight = (q[(row0 + r) * width + f] - 8) * double(of_bf16(scale[0])) + of_bf16(scale[1]);
          expected += weight * of_bf16(x[token * in + f]), size += std::fabs(weight * of_bf16(x[token * in + f]));
        }
        CHECK(std::fabs(sum - expected) <= 1e-6 * size);
      }
  }
}

int main() {
SHAPES
}
"""
SIZES = ((8, 17, 32), (136, 40, 64), (1160, 17, 128), (1160, 40, 256), (3208, 8, 64))  # features, outputs, of a scale


@pytest.mark.slow
def test_tiles_times_x_on_emulated_warps(tmp_path):
    """The shapes that `linear_registers.cu` launches."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    tiles, kernel = ((ROOT / "csrc" / name).read_text() for name in ("int4_tiles.cuh", "linear_registers.cu"))
    tiles, asm = re.subn(r"\basm\(\"lop3.*?;\n", "v = (word >> bits & 0x000f000fu) | 0x43004300u;\n", tiles)
    tiles, includes = re.subn(r'#include "(cp_async|mma)\.cuh"', '#include "stub.h"', tiles)
    shapes = re.findall(r"launch_int4<(\d+), (\d), \d, (\d), (\d), (\d+), \d>", kernel)
    assert (asm, includes, [int(most) for most, *_ in shapes]) == (1, 2, [2, 8, 16, 32])
    calls, least = [], 1
    for most, *others in shapes:
        for i, (width, out, block) in enumerate(SIZES):
            tokens = least + (int(most) - least) * i // (len(SIZES) - 1)
            calls.append(f"  check<{', '.join([most, *others])}>({tokens}, {out}, {width}, {block});")
        least = int(most) + 1
    (tmp_path / "stub.h").write_text(STUB)
    (tmp_path / "int4_tiles.h").write_text(tiles)
    (tmp_path / "main.cpp").write_text(MAIN.replace("SHAPES", "\n".join(calls)))
    command = ["g++", "-std=c++20", "-O2", "-pthread", "-I", str(ROOT / "csrc"), "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    run = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout
