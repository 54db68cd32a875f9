"""What a plan is: for every query, the intervals of keys it sees and their distances, as a few vectors.

A Region is the geometry, a Plan all that attention has to know about positions. Does: hold them, check their promises,
count and measure. Does not: make them (geometry.py, positions.py) or execute them (attention.py).

    plan = Plan([Region(i, j, 0 * i, i + 1)])              # plain causal attention, without rotation

Letters: i absolute query indices, j absolute key indices, Tq queries, Tk keys, D width of a head, H query heads.
"""
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Region:
    """Query i sees the keys start[i] <= j < end[i], each at the distance q_pos[i] - k_pos[j].

    Over the queries that see something neither bound ever falls; the regions of one query are disjoint; no key comes
    after its query, no distance is negative, and the first key of an interval is the farthest.
    Example, ReRoPE with window 3: query 5 sees 3 4 5 at 2 1 0 in its near region (q_pos 5, k_pos 3 4 5) and
    0 1 2 at 3 3 3 in its far region (q_pos 3, k_pos 0 0 0).
    """
    q_pos: Tensor  # (Tq,)
    k_pos: Tensor  # (Tk,)
    start: Tensor  # (Tq,) first key seen
    end: Tensor    # (Tq,) one past the last key seen; end <= start where nothing is seen


@dataclass
class Plan:
    """All that attention has to know about positions, for the queries i and the keys j it was made for."""
    regions: list[Region]
    inv_freq: Tensor | None = None   # (r/2,) float64 radians per token, r <= D the rotary width; None: no rotation
    mscale: float = 1.0              # multiplies cos and sin, hence the rotated part of the logits by its square (YaRN)
    q_scale: Tensor | None = None    # (Tq,) float64 factor on all logits of a query
    slopes: Tensor | None = None     # (H,) ALiBi: slope * distance is subtracted from the logits
    cosine: float | None = None      # CosScale: logits are this times the cosine of q and k, not q.k/sqrt(D)
    interleaved: bool = False        # which channels are a pair: (2p, 2p + 1), else (p, p + r/2)
    key_positions: list[Tensor] = field(init=False)  # the distinct k_pos of the regions: a key is rotated once for each
    key_set: list[int] = field(init=False)           # for each region, the number of its k_pos among them
    memory: dict = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        """Drop regions in which nothing is seen, and number the positions of keys. ValueError where none is left."""
        self.regions = [r for r in self.regions if bool((r.end > r.start).any())]
        if not self.regions:
            raise ValueError("a plan in which no query sees a key")
        self.key_positions, self.key_set = [], []
        for region in self.regions:
            equal = [number for number, known in enumerate(self.key_positions) if same(known, region.k_pos)]
            if not equal:
                equal = [len(self.key_positions)]
                self.key_positions.append(region.k_pos)
            self.key_set.append(equal[0])

    @property
    def Tq(self):
        return len(self.regions[0].q_pos)

    @property
    def Tk(self):
        return len(self.regions[0].k_pos)

    def shared(self, key, make):
        """make(), computed once and remembered under a key: what all layers of a forward pass need alike."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    def rotation_rule(self):
        """What decides, beside positions, how keys are rotated: equal for plans that can share rotated keys."""
        def rule():
            inv_freq = None if self.inv_freq is None else tuple(self.inv_freq.tolist())
            return inv_freq, self.mscale, self.cosine, self.interleaved
        return self.shared("rotation rule", rule)

    def last(self):
        """The plan of the last query alone."""
        return self.of_queries(slice(-1, None))

    def of_queries(self, rows):
        """The plan of some of its queries: a slice, or indices in rising order."""
        regions = [Region(r.q_pos[rows], r.k_pos, r.start[rows], r.end[rows]) for r in self.regions]
        return replace(self, regions=regions, q_scale=None if self.q_scale is None else self.q_scale[rows])

    def of_keys(self, keys):
        """The plan for some of its keys alone, indices in rising order: keys 0 10 20 of an interval [5, 25) are [1, 3).

        One interval stays one interval. The attention scale stays that of all keys. None where none of them is seen.
        """
        regions = []
        for r in self.regions:
            start = torch.searchsorted(keys, r.start)
            end = torch.searchsorted(keys, r.end)
            regions.append(Region(r.q_pos, r.k_pos[keys], start, end))
        if not any(bool((r.end > r.start).any()) for r in regions):
            return None
        return replace(self, regions=regions)


def same(a, b):
    """Whether two vectors of positions are equal."""
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))


# ---------------------------------------------------------------------------------------------------------------------
# the promises of Region, checked

def check_regions(method, regions, i, Tk):
    """ValueError, with the method, the first query concerned and the rule, where regions break a promise of Region.

    In O(Tq + Tk). Executors rely on every one of these rules.
    """
    def refuse(bad, queries, rule):
        if bool(bad.any()):
            query = int(queries[bad.nonzero()[0]])
            raise ValueError(f"{method}: query {query} {rule}")

    if not regions:
        raise ValueError(f"{method}: query {int(i[0])} sees no key at all: the geometry has no region")
    for number, r in enumerate(regions):
        where = f"in region {number + 1}"
        lengths = [len(r.q_pos), len(r.start), len(r.end), len(r.k_pos)]
        if lengths != [len(i), len(i), len(i), Tk]:
            raise ValueError(f"{method}: query {int(i[0])} has no place {where}: q_pos, start, end and k_pos have "
                             f"lengths {lengths} for {len(i)} queries and {Tk} keys")
        visible = r.end > r.start
        queries, start, end = i[visible], r.start[visible], r.end[visible]
        refuse((start < 0) | (end > Tk), queries, f"sees keys outside of 0..{Tk - 1} {where}")
        refuse(end > queries + 1, queries, f"sees keys that come after it {where}")
        refuse(start.diff() < 0, queries[1:], f"sees an earlier first key than a query before it {where}")
        refuse(end.diff() < 0, queries[1:], f"sees an earlier last key than a query before it {where}")
        if len(queries):
            nearest = r.q_pos[visible] - largest_within(r.k_pos, start, end)
            refuse(~(nearest >= 0), queries, f"is at a negative distance from a key {where}")
            if bool((r.k_pos.diff() < 0).any()):
                farther = -largest_within(-r.k_pos, start, end) < r.k_pos[start]
                refuse(farther, queries, f"has a key that is farther than the first of its interval {where}")

    starts = torch.stack([torch.where(r.end > r.start, r.start, Tk) for r in regions])
    ends = torch.stack([torch.where(r.end > r.start, r.end, Tk) for r in regions])
    starts, order = starts.sort(0)
    ends = ends.gather(0, order)
    refuse((ends[:-1] > starts[1:]).any(0), i, "sees a key in two regions: they overlap")
    refuse((starts[0] == Tk), i, "sees no key at all")


def among(method, regions, i, j):
    """Regions of queries i whose intervals count the keys j (Tk,), rising indices of which some may be left out.

    Keys 0 1 7 8 9: the interval [7, 10) becomes [2, 5). ValueError where a query sees a key that is left out.
    """
    found = []
    for r in regions:
        start = torch.searchsorted(j, r.start)
        end = torch.searchsorted(j, r.end)
        incomplete = (r.end > r.start) & (end - start < r.end - r.start)
        if bool(incomplete.any()):
            raise ValueError(f"{method}: query {int(i[incomplete][0])} sees a key that the cache has forgotten")
        found.append(Region(r.q_pos, r.k_pos, start, end))
    return found


def largest_within(values, start, end):
    """max(values[start:end]) (Tq,) of every interval, none of them empty, whose bounds never fall."""
    if len(start) == 1:  # decoding
        return values[int(start):int(end)].max()[None]
    first = int(start[0])
    values, start, end = values[first:int(end[-1])], start - first, end - first
    if bool((values.diff() >= 0).all()):
        return values[end - 1]
    # neighbours[x] = max(values[x:x + size]), size 1, 2, 4, ...; two such runs, one from each end, cover an interval
    neighbours = values
    size = 1
    out = torch.empty(len(start), dtype=values.dtype)
    while size <= int((end - start).max()):
        fits = (end - start >= size) & (end - start < 2 * size)
        out[fits] = torch.maximum(neighbours[start[fits]], neighbours[end[fits] - size])
        neighbours = torch.maximum(neighbours[:-size], neighbours[size:])
        size *= 2
    return out


# ---------------------------------------------------------------------------------------------------------------------
# looking at a plan

def visible_keys(plan):
    """Number of keys that each query sees, (Tq,) int64. Its sum is the cost of the method in (query, key) pairs."""
    return sum((r.end - r.start).clamp(min=0) for r in plan.regions)


def is_seen(plan):
    """Which keys some query sees, (Tk,) bool, in O(Tq + Tk)."""
    steps = torch.zeros(plan.Tk + 1, dtype=torch.int64)  # at every key, how many intervals begin less how many end
    for r in plan.regions:
        visible = r.end > r.start
        steps += torch.bincount(r.start[visible], minlength=plan.Tk + 1)
        steps -= torch.bincount(r.end[visible], minlength=plan.Tk + 1)
    return steps.cumsum(0)[:-1] > 0


def distance(plan):
    """The (Tq, Tk) float64 matrix of distances, nan where a key is unseen. For tests and pictures: it is T x T.

    Raises ValueError if two regions overlap.
    """
    out = torch.full((plan.Tq, plan.Tk), math.nan, dtype=torch.float64)
    j = torch.arange(out.shape[1])
    for r in plan.regions:
        inside = (j >= r.start[:, None]) & (j < r.end[:, None])
        if bool((inside & ~out.isnan()).any()):
            raise ValueError("two regions overlap")
        out = torch.where(inside, (r.q_pos[:, None] - r.k_pos).double(), out)
    return out


def farthest(r):
    """The largest distance in a region: that of the first key of some query's interval."""
    visible = r.end > r.start
    return float((r.q_pos[visible] - r.k_pos[r.start[visible]]).max())
