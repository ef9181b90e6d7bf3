// Stream-K: how the work of a launch of linear_split_k_sm90.cu is dealt out to its blocks. Plain C++, so that a test on the host can look
// at it (tests/kernels/test_stream_k.py).
#pragma once
#include <cstdint>

#include "loraswitch.h"

#ifdef __CUDACC__
#define LS_BOTH __host__ __device__ __forceinline__  // host and device
#else
#define LS_BOTH inline
#endif

namespace ls {

LS_BOTH int lesser(int a, int b) { return a < b ? a : b; }

constexpr int kRows = 128;                // outputs of a tile
constexpr int kFeatures = 64;             // of a step
constexpr int kMostShares = 16;           // blocks that share a tile of the shrink
constexpr int kFewShares = 8;             // where these have few steps, and there is time: fewer have to exchange something
constexpr int kLong = 24, kFew = 8;       // steps of a block, of a share
constexpr int kLeastShare = 4;            // steps of a share
constexpr int kLeastSteps = 4;            // of a block, on average
// Steps that the exchange of a share costs a block that pauses for it, if all blocks do and if few do; and one that goes on.
constexpr int kPausing = 8, kPausingAlone = 26, kBeside = 2;
constexpr int kFewest = 5;  // blocks that shrink, of those that have a linear's tile: all but one are added up last

// Numbers that are dealt out evenly: the first one of a receiver.
struct Deal {
  int each, rest;
  Deal() = default;
  Deal(int all, int receivers) : each(all / receivers), rest(all % receivers) {}
  LS_BOTH int first(int receiver) const { return receiver * each + (receiver < rest ? receiver : rest); }
};

// First comes the shrink, whose tiles are columns of the hidden. It goes by parts, each a tile's share of the features; the last
// `shrink_blocks` blocks have them. Then the linears: all steps of all tiles, one after the other. Who shrinks has fewer of these.
//
// A step of experts can be taken only once the hidden is there. Either a tile begins with them, and they are taken last of it: then who
// has the beginning of a tile has them all. Or they are spread over the tile, so that all of its blocks have some, and taken when a
// block's other steps are done (kExperts, which has the same segments as kLinear).
enum Phase { kShrink, kLinear, kExperts };

// What every block reads first: it comes from memory in lines, so it stands together.
struct Schedule {
  int n_items, steps, width, shrink_blocks;  // steps: of in_features; width: of the hidden
  int shares, parts;                         // of a tile of the shrink; of all
  Deal of_blocks, of_shares, of_shrinking;   // steps: of all, of a tile's shares; parts
  int exchange;                              // steps that a share counts for beyond its own
  int linear_blocks;                         // that have steps of the linears, the first ones
  bool pauses;                               // who shrinks copies nothing more until its share of the hidden is there
  bool apart;                                // the linears' steps are dealt out evenly by themselves
  int begin[LS_MAX_GROUP + 1], begin_shrink[LS_MAX_GROUP + 1];  // first step of each linear's first tile; first tile
};

// Steps of the shrink that the blocks before this one have, and what their exchange counts for.
LS_BOTH int shrink_steps_before(const Schedule &p, int blocks, int block) {
  const int before = block - (blocks - p.shrink_blocks);
  if (before <= 0) return 0;
  const int part = p.of_shrinking.first(before);
  return part / p.shares * p.steps + p.of_shares.first(part % p.shares) + before * p.exchange;
}
// The first part or step of a block.
LS_BOTH int first_of(const Schedule &p, Phase phase, int blocks, int block) {
  if (phase != kShrink)
    return p.apart ? p.of_blocks.first(lesser(block, p.linear_blocks)) : p.of_blocks.first(block) - shrink_steps_before(p, blocks, block);
  const int shrinking = block - (blocks - p.shrink_blocks);
  return shrinking < 0 ? 0 : p.of_shrinking.first(shrinking);
}

// Where the partials of a part of the shrink are. A block that has several parts, which nobody shares, has one place for all.
LS_BOTH int shrink_place(const Schedule &p, int blocks, int block, int part) {
  return blocks + (p.shares > 1 ? part : block - (blocks - p.shrink_blocks));
}

// What a block has of a tile: steps `begin` to `end` of its `steps`. Of these the first `own` are of in_features, from step `first` on,
// the others of experts, from step `first_expert` on.
struct Segment {
  int item, column, columns, begin, end, steps;
  int first, own, first_expert;
  int next;  // part or step
  LS_BOTH int length() const { return end - begin; }
};
// Of so many steps of a tile with `steps`, those of its `experts`. Here and below: whether these are spread over the tile.
template <bool kSpread> LS_BOTH int experts_before(int step, int steps, int experts) {
  return kSpread ? (step * experts + steps - 1) / steps : lesser(step, experts);
}
// A linear, here and below: its `columns`, and its `steps` of experts.
template <bool kSpread, class Linear> LS_BOTH Segment segment_of(const Schedule &p, const Linear *linears, Phase phase, int at, int last) {
  Segment s;
  s.item = 0;
  if (phase == kShrink) {
    const int tile = at / p.shares, share = at - tile * p.shares;
    while (tile >= p.begin_shrink[s.item + 1]) ++s.item;
    s.steps = p.steps, s.begin = p.of_shares.first(share), s.end = p.of_shares.first(share + 1);
    s.first = s.begin, s.own = s.end - s.begin, s.first_expert = 0;
    s.column = (tile - p.begin_shrink[s.item]) * kRows, s.columns = linears[s.item].steps * kFeatures, s.next = at + 1;
  } else {
    while (at >= p.begin[s.item + 1]) ++s.item;
    const int experts = linears[s.item].steps, step = at - p.begin[s.item];
    s.steps = p.steps + experts;
    const int tile = step / s.steps;
    s.column = tile * kRows, s.columns = linears[s.item].columns;
    s.begin = step - tile * s.steps, s.end = lesser(s.steps, s.begin + last - at), s.next = at + s.end - s.begin;
    s.first_expert = experts_before<kSpread>(s.begin, s.steps, experts), s.first = s.begin - s.first_expert;
    s.own = s.end - experts_before<kSpread>(s.end, s.steps, experts) - s.first;
  }
  return s;
}

// What of a segment a block takes in a phase: steps `from` to `to`. Steps of experts come after all others, but of segments in the midst of
// the block's: there is no room to keep the sums of those.
struct Turn {
  int from, to;
  bool kept;  // the sums of its other steps: after those, to be taken up later
};
template <bool kSpread, class Linear> LS_BOTH bool has_later(const Schedule &p, const Linear *linears, int first, int last) {
  if (!kSpread || first == last) return false;
  const Segment s = segment_of<kSpread>(p, linears, kLinear, first, last);
  return s.next < last && s.own < s.length();
}
LS_BOTH Turn turn_of(Phase phase, const Segment &s, bool has_later, bool outer) {
  const bool later = has_later && outer && s.own < s.length();
  Turn turn;
  turn.from = phase == kExperts ? later ? s.own : s.length() : 0;
  turn.to = phase == kLinear && later ? s.own : s.length();
  turn.kept = later && s.own > 0;
  return turn;
}

// Deals everything out; returns the number of blocks, at most `most`, or 0: too many steps. `n_items` and `steps` are there.
template <class Linear> inline int deal_out(Schedule &p, const Linear *linears, int most) {
  int64_t steps = 0, tiles = 0;
  for (int i = 0; i < p.n_items; ++i) {
    const Linear &linear = linears[i];
    p.begin[i] = int(steps), p.begin_shrink[i] = int(tiles);
    steps += int64_t((linear.columns + kRows - 1) / kRows) * (p.steps + linear.steps);
    tiles += (linear.steps * kFeatures + kRows - 1) / kRows;
    if (steps + tiles * (p.steps + kMostShares * kPausingAlone) > INT32_MAX) return 0;
  }
  p.begin[p.n_items] = int(steps), p.begin_shrink[p.n_items] = int(tiles);
  const int shrink_steps = int(tiles) * p.steps;
  int blocks = (int(steps) + shrink_steps + kLeastSteps - 1) / kLeastSteps;
  if (blocks > most) blocks = most;
  p.of_blocks = Deal(int(steps), blocks), p.linear_blocks = blocks, p.apart = true;
  if (tiles == 0) return blocks;
  // No block has two shares, so all of a tile can wait for each other.
  int shares = blocks / int(tiles), limit = p.steps / kLeastShare;
  const bool little = int(steps) / blocks < kLong;
  const int most_shares = little || p.steps > kFewShares * kFew ? kMostShares : kFewShares;
  if (limit > most_shares) limit = most_shares;
  if (shares > limit) shares = limit;
  p.shares = shares > 0 ? shares : 1, p.parts = int(tiles) * p.shares;
  p.shrink_blocks = p.parts < blocks ? p.parts : blocks;
  p.of_shares = Deal(p.steps, p.shares), p.of_shrinking = Deal(p.parts, p.shrink_blocks);
  // A block that pauses has its share exchanged sooner, but gets so much less of the linears, of which it has the last tiles.
  const int others = blocks - p.shrink_blocks, last_tile = p.steps + linears[p.n_items - 1].steps;
  const int own = (p.of_shrinking.each + (p.of_shrinking.rest > 0)) * (p.of_shares.each + (p.of_shares.rest > 0));
  auto balanced = [&](bool pauses, int exchange, int least) {
    const Deal all(int(steps) + shrink_steps + p.shrink_blocks * exchange, blocks);
    if (all.each - own - exchange < least) return false;
    p.of_blocks = all, p.apart = false, p.pauses = pauses, p.exchange = exchange;
    return true;
  };
  const int pausing = kPausing + (kPausingAlone - kPausing) * others / blocks;
  if ((little || p.shrink_blocks <= blocks / 4) && balanced(true, pausing, (last_tile + kFewest - 1) / kFewest)) return blocks;
  if ((!little || p.shrink_blocks > blocks / 8) && balanced(false, kBeside, 1)) return blocks;
  p.pauses = true;
  if (others >= p.shrink_blocks) p.of_blocks = Deal(int(steps), others), p.linear_blocks = others;  // who shrinks does nothing else
  return blocks;
}

}  // namespace ls
