// Deals out random groups of linears as launches of linear_split_k_sm90.cu do, and looks at what each block would do: every step once, and
// for every partial sum that a block leaves, one block that waits for it. A block that waited for another one would wait forever.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <vector>

#include "stream_k.cuh"

using namespace ls;

struct Linear {
  int columns, steps;
};

#define CHECK(what)                                                  \
  if (!(what)) {                                                     \
    std::printf("group %d: %s (line %d)\n", group, #what, __LINE__); \
    std::exit(1);                                                    \
  }

int main(int, char **arguments) {
  const int groups = std::atoi(arguments[1]);
  std::mt19937 random{unsigned(std::atoi(arguments[2]))};
  auto to = [&](int most) { return int(random() % unsigned(most)) + 1; };  // 1 to most
  int paused = 0, alone = 0, several = 0;
  for (int group = 0; group < groups; ++group) {
    Schedule s = {};
    s.n_items = to(LS_MAX_GROUP), s.steps = to(group % 3 ? 240 : 20);
    Linear linears[LS_MAX_GROUP];
    for (int i = 0; i < s.n_items; ++i) linears[i] = {to(group % 5 ? 60 : 1500) * 8, to(4) == 1 ? 0 : to(group % 4 ? 8 : 1024)};
    const int most = group % 2 ? 132 : to(200), blocks = deal_out(s, linears, most);
    CHECK(blocks >= 1 && blocks <= most);
    paused += s.parts && s.pauses, alone += s.linear_blocks<blocks, several += s.parts> blocks;

    // The shrink: each part by one block, places of their partials apart, never two shares of a tile in a block.
    std::set<int> places;
    int next = 0;
    for (int block = 0; block < blocks && s.parts; ++block) {
      const int first = first_of(s, kShrink, blocks, block), end = first_of(s, kShrink, blocks, block + 1);
      CHECK(first == next && (s.shares == 1 || end - first <= 1));
      for (int part = first; part < end; ++part) {
        const Segment segment = segment_of(s, linears, kShrink, part, end);
        CHECK(segment.next == part + 1 && segment.length() > 0 && segment.column < segment.columns);
        CHECK(segment.begin == 0 || s.shares > 1);
        const int place = shrink_place(s, blocks, block, part);
        CHECK(place >= blocks && place < 2 * blocks);
        CHECK(part > first || places.insert(place).second);
      }
      next = end;
    }
    CHECK(next == s.parts && (s.shares < 2 || s.parts / s.shares <= blocks));

    // The linears.
    std::vector<char> left(blocks), wanted(blocks);
    next = 0;
    for (int block = 0; block < blocks; ++block) {
      const int first = first_of(s, kLinear, blocks, block), end = first_of(s, kLinear, blocks, block + 1);
      CHECK(first == next && end >= first);
      for (int at = first; at < end;) {
        const Segment segment = segment_of(s, linears, kLinear, at, end);
        CHECK(segment.length() > 0 && segment.next == at + segment.length() && segment.next <= end && segment.column < segment.columns);
        CHECK(segment.own() >= 0 && segment.first() + segment.own() <= s.steps);
        if (segment.begin > 0) {
          CHECK(at == first && !left[block]);  // one place for each block
          left[block] = 1;
        } else {  // as in the kernel
          const int tile_end = segment.next + segment.steps - segment.end;
          for (int other = block + 1; first_of(s, kLinear, blocks, other) < tile_end; ++other) {
            CHECK(other < blocks && !wanted[other]);
            wanted[other] = 1;
          }
        }
        at = segment.next;
      }
      next = end;
    }
    CHECK(next == s.begin[s.n_items] && left == wanted);
  }
  std::printf("%d paused, %d with blocks that only shrink, %d with several parts a block\n", paused, alone, several);
  return paused && alone && several ? 0 : 1;
}
