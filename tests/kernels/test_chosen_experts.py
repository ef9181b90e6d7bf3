"""csrc/chosen_experts.cuh on the host: every row of lora_a and every unit of lora_b of the chosen experts is dealt out once."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from paths import ROOT

SOURCE = r"""
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <tuple>
#include <vector>
#define __host__
#define __device__
#include "chosen_experts.cuh"

#define CHECK(x) if (!(x)) { std::printf("line %d: %s\n", __LINE__, #x); std::exit(1); }

int pick(int n) { return std::rand() % n; }

void set_of_experts() {
  unsigned bits[ls::kExpertWords] = {};
  std::set<int> chosen;
  const int experts = 1 + pick(LS_MAX_EXPERTS);
  for (int i = pick(experts + 1); i > 0; --i) chosen.insert(pick(experts));
  for (int e : chosen) bits[e / 32] |= 1u << e % 32;
  int place = 0;
  for (int e : chosen) CHECK(ls::place_of(bits, e) == place++);
  CHECK(ls::place_of(bits, (experts + 31) / 32 * 32) == int(chosen.size()));
}

void rows_of_a() {
  ls_item items[LS_MAX_GROUP] = {};
  const int n_items = 1 + pick(LS_MAX_GROUP), experts = pick(20);
  int rows = 0;
  for (int i = 0; i < n_items; ++i) items[i].rank = pick(4) * (pick(2) ? 8 : 40), rows += items[i].rank * experts;
  const int tiles = ls::shrink_tiles(items, n_items, experts);
  std::set<std::tuple<int, int, int>> seen;
  for (int tile = 0; tile < tiles; ++tile) {
    const ls::ShrinkTile at = ls::shrink_tile(items, experts, tile);
    CHECK(at.item >= 0 && at.item < n_items && at.place[0] >= 0);
    for (int h = 0; h < 2; ++h) {
      if (at.place[h] < 0) continue;
      CHECK(at.place[h] < experts && at.rank[h] + 8 <= items[at.item].rank);
      for (int r = 0; r < 8; ++r) CHECK(seen.insert({at.item, at.place[h], at.rank[h] + r}).second);
    }
  }
  CHECK(int(seen.size()) == rows && tiles >= (rows + 15) / 16 && tiles <= rows / 16 + n_items);
}

void units_of_b() {
  const int rank = pick(33) * 8, experts = pick(257);
  std::set<std::pair<int, int>> seen;
  int times[4] = {};
  for (int lane = 0; lane < 4; ++lane) {
    ls::Units units(rank, experts, lane);
    do {
      ++times[lane];
      if (units.place >= experts) continue;
      CHECK(rank > 0 && units.place >= 0 && units.unit >= 0 && units.unit * 8 + 8 <= rank);
      CHECK(seen.insert({units.place, units.unit}).second);
    } while (units.next());
    CHECK(times[lane] == times[0]);
  }
  CHECK(int(seen.size()) == experts * rank / 8);
  CHECK(times[0] == (seen.size() > 0 ? (int(seen.size()) + 3) / 4 : 1));
}

int main() {
  for (int i = 0; i < 20000; ++i) set_of_experts(), rows_of_a(), units_of_b();
}
"""


def test_every_row_and_unit_is_dealt_out_once(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    (tmp_path / "count.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-I", str(ROOT / "csrc"), "count.cpp", "-o", "count"]
    subprocess.run(command, cwd=tmp_path, check=True)
    run = subprocess.run([str(tmp_path / "count")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
