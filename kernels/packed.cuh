// Everybody's rows by rank, told in one hop, and what follows from them where rows have no gaps.
#pragma once
#include "counts.cuh"

namespace a2a {

// What a block shares that hears counts by rank.
struct Hearing {
  // By rank: the next row there.
  uint32_t next[kMaxRanks];
  uint32_t missing;
  uint32_t exceeded;
};

// Tells every rank how many of this one's tokens go where; in the place of those that take part no more, itself that they have
// none. The block calls it.
__device__ __forceinline__ void tell_rows(const PlaceParams& p, uint32_t epoch, const uint32_t* count, bool absent) {
  const Seat& seat = p.seat;
  const uint32_t twos = (seat.ranks + 1) / 2;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < seat.ranks * twos; i += blockDim.x) {
    A2A_JITTER_HERE;
    const uint32_t peer = i / twos, two = i - peer * twos;
    auto* to = reinterpret_cast<ulonglong2*>(count_at(seat, p.counts, peer, seat.rank, 0));
    ptx::st_relaxed_sys(to + two, make_ulonglong2(pack(epoch, count[2 * two]), pack(epoch, count[2 * two + 1])));
  }
  __syncthreads();
#pragma unroll 1
  for (uint32_t peer = threadIdx.x; peer < seat.ranks; peer += blockDim.x) {
    ptx::st_relaxed_sys(mail64(mailbox(seat, peer, seat.rank), kCountsFlag), pack(epoch, 0));
  }
  if (!absent) return;
  for_absent(seat, threadIdx.x, blockDim.x, [&](uint32_t rank) {
    auto* to = reinterpret_cast<ulonglong2*>(count_at(seat, p.counts, seat.rank, rank, 0));
    for (uint32_t two = 0; two < twos; ++two) ptx::st_relaxed_sys(to + two, make_ulonglong2(pack(epoch, 0), pack(epoch, 0)));
    ptx::st_relaxed_sys(mail64(mailbox(seat, seat.rank, rank), kCountsFlag), pack(epoch, 0));
  });
}

// What everybody's counts come to: where this rank's rows start at each rank, into s.next, and how many are kept; what is
// received here. The block calls it.
__device__ __forceinline__ void hear_rows(const PlaceParams& p, uint32_t epoch, Hearing& s) {
  const Seat& seat = p.seat;
  if (threadIdx.x == 0) s.missing = 0, s.exceeded = kNone;
  __syncthreads();
#pragma unroll 1
  for (uint32_t to = threadIdx.x; to < seat.ranks; to += blockDim.x) {
    const auto keep = [&](uint32_t source, uint32_t kept) {
      if (to == seat.rank && source < seat.ranks) p.kept_counts[source] = kept;
    };
    const Shares shares = add_sources(seat, p.counts, to, epoch, p.room, keep);
    const uint32_t all = shares.all, kept = shares.kept_of_mine(p.room);
    s.next[to] = shares.before;
    p.route.rows_for[to] = kept, p.demands[to] = all;
    if (shares.mine != kept) atomicAdd(&s.missing, shares.mine - kept);
    if (p.limit != 0 && all > p.limit) atomicMin(&s.exceeded, to);
    if (to == seat.rank) p.received[0] = min(all, p.room), p.summary[0] = all, p.summary[1] = all - min(all, p.room);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  p.summary[2] = s.missing;
  if (s.exceeded != kNone) p.summary[1] = ~s.exceeded;
}

}  // namespace a2a
