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

// The linears; returns of how many tiles sums are kept.
template <bool kSpread> int check_linears(const Schedule &s, const Linear *linears, int blocks, int group) {
  std::vector<char> left(blocks), wanted(blocks);
  int next = 0, own = 0, expert = 0, kept = 0;
  for (int block = 0; block < blocks; ++block) {
    const int first = first_of(s, kLinear, blocks, block), end = first_of(s, kLinear, blocks, block + 1);
    const bool later = has_later<kSpread>(s, linears, first, end);
    CHECK(first_of(s, kExperts, blocks, block) == first);
    CHECK(first == next && end >= first);
    for (int at = first; at < end;) {
      const Segment segment = segment_of<kSpread>(s, linears, kLinear, at, end);
      CHECK(segment.length() > 0 && segment.next == at + segment.length() && segment.next <= end && segment.column < segment.columns);
      // Steps of a tile follow each other, those of in_features and those of the experts.
      if (segment.begin == 0) own = 0, expert = 0;
      CHECK(segment.own >= 0 && segment.own <= segment.length() && segment.first == own && segment.first_expert == expert);
      own += segment.own, expert += segment.length() - segment.own;
      CHECK(segment.end < segment.steps || (own == s.steps && expert == linears[segment.item].steps));
      // In both phases together each step of the segment has its turn, those of the experts last; sums are kept of two tiles at the most.
      const bool outer = at == first || segment.next == end;
      const Turn turn = turn_of(kLinear, segment, later, outer), rest = turn_of(kExperts, segment, later, outer);
      CHECK(turn.from == 0 && (turn.to == segment.length() ? rest.from == rest.to : turn.to == segment.own && rest.from == turn.to));
      CHECK(rest.to == segment.length() && (outer || !rest.kept) && (kSpread || !rest.kept) && turn.kept == rest.kept);
      kept += rest.kept;
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
  return kept;
}

int main(int, char **arguments) {
  const int groups = std::atoi(arguments[1]);
  std::mt19937 random{unsigned(std::atoi(arguments[2]))};
  auto to = [&](int most) { return int(random() % unsigned(most)) + 1; };  // 1 to most
  int paused = 0, alone = 0, several = 0, kept = 0;
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
        const Segment segment = segment_of<true>(s, linears, kShrink, part, end);
        CHECK(segment.next == part + 1 && segment.length() > 0 && segment.column < segment.columns);
        CHECK(segment.begin == 0 || s.shares > 1);
        const int place = shrink_place(s, blocks, block, part);
        CHECK(place >= blocks && place < 2 * blocks);
        CHECK(part > first || places.insert(place).second);
      }
      next = end;
    }
    CHECK(next == s.parts && (s.shares < 2 || s.parts / s.shares <= blocks));

    kept += check_linears<true>(s, linears, blocks, group);
    CHECK(check_linears<false>(s, linears, blocks, group) == 0);
  }
  std::printf("%d paused, %d with blocks that only shrink, %d with several parts a block, sums kept of %d tiles\n", paused, alone,
              several, kept);
  return paused && alone && several && kept ? 0 : 1;
}
