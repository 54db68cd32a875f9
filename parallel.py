"""Attention over keys that are spread over ranks: which keys a rank holds, what it needs of others, how parts merge.

Every rank reads its own share of a prompt through all layers and keeps the keys and values that this makes. In a layer
its queries first look at the keys held here. For what they see elsewhere either those keys are fetched, and only those,
or the queries are sent there and come back as attention and its log-sum-exp, by which parts merge: whichever is fewer
bytes. The keys of a plan are cut by slicing (Plan.of_keys), so this is one executor for all methods. MESA'S chunks see
the first chunk and themselves: where every rank also reads the first chunk, they need nothing of one another. The last
token of a prompt, and decoding, are read by all ranks alike: each attends to its own keys, one exchange merges them.

Does: share out a prompt, count what will travel, hold the cache of a rank. Does not: start processes, send by itself,
or notice that one has died (ranks.py); rotate or attend (attention.py).

    spread(model, ranks)                                    # then generate.prefill and decode as ever
    for what, count in traffic(plan, n, 64, sizes_of(config, dtype)).items(): ...

Letters: N ranks, B batch, H query heads, Hkv key heads, T tokens, Tq queries, D head width; i and j absolute indices.
"""
import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

from attention import attend_part, merge, merge_parts
from cache import KVCache, held_bytes, unpack, with_room
from plan import Plan, is_seen
from tiles import NEVER


# ---------------------------------------------------------------------------------------------------------------------
# how a prompt is shared out, from its plan alone

def sections(plan, begin, end):
    """[(begin, end)] of the queries begin..end-1, cut where all regions change over at once: from the first query of
    Mesa's last chunk on another rule holds. The first query of the plan is number begin."""
    visible = torch.stack([r.end > r.start for r in plan.regions])[:, :end - begin]
    visible = visible[visible.any(1)]
    rows = torch.arange(visible.shape[1])
    first = torch.where(visible, rows, len(rows)).amin(1)
    last = torch.where(visible, rows, -1).amax(1)
    cuts = [int(row) for row in first.unique() if row and bool(((last < row) | (first >= row)).all())]
    edges = [begin, *[begin + row for row in cuts], end]
    return list(zip(edges, edges[1:]))


def sinks(plan, row):
    """How many keys at the start query `row` sees before a gap: Mesa's first chunk, StreamingLLM's sinks; 0 without a
    gap. By causality a rank that reads these tokens needs nothing else for them."""
    intervals = sorted((int(r.start[row]), int(r.end[row])) for r in plan.regions if r.end[row] > r.start[row])
    reached = 0
    for start, end in intervals:
        if start > reached:
            return reached
        reached = max(reached, end)
    return 0


def borders(plan, rows, copied):
    """The rows of a slice at which the first key seen, of those from `copied` on, jumps ahead: where chunks begin."""
    low = torch.full((rows.stop - rows.start,), plan.Tk)
    for r in plan.regions:
        start, end = r.start[rows], r.end[rows]
        low = torch.where((end > start) & (end > copied), torch.minimum(low, start.clamp(min=copied)), low)
    return rows.start + 1 + (low.diff() > 1).nonzero().flatten()


def shares(begin, end, count, edges):
    """[(lo, hi)] * count, as equal as can be, of the tokens begin..end-1; cut only at the edges, where there are any.

    7 chunks of 10 tokens for 3 ranks: (0, 20), (20, 50), (50, 70).
    """
    targets = [begin + (end - begin) * k / count for k in range(count + 1)]
    if len(edges):
        allowed = torch.tensor([begin, *edges.tolist(), end], dtype=torch.float64)
        targets = [float(allowed[(allowed - target).abs().argmin()]) for target in targets]
    cuts = [round(target) for target in targets]
    return list(zip(cuts, cuts[1:]))


def leading(plans):
    """Of the plans of Config.plans the one by which a prompt is shared out: that of the method asked for."""
    return plans.get("") or next(iter(plans.values()))


@dataclass
class Wave:
    """What all ranks read at once: (lo, hi) for each; before it all but its holder also read the tokens 0..copied-1."""
    ranges: list[tuple[int, int]]
    copied: int = 0


def waves(plan, begin, end, N, piece):
    """The Waves in which N ranks read the tokens begin..end-1, about `piece` each at most; the plan's first query is
    token begin."""
    found = []
    for lo, hi in sections(plan, begin, end) if end > begin else []:
        copied = sinks(plan, hi - 1 - begin) if lo == 0 else 0
        edges = begin + borders(plan, slice(lo - begin, hi - begin), copied)
        count = N * math.ceil((hi - lo) / (N * piece))
        ranges = shares(lo, hi, count, edges)
        holder = next(number for number, (a, b) in enumerate(ranges) if b > a)
        if copied > ranges[holder][1] or copied > (hi - lo) / N:  # reading them everywhere would double the work
            ranges, copied = shares(lo, hi, count, begin + borders(plan, slice(lo - begin, hi - begin), 0)), 0
        for first in range(0, count, N):
            wave = ranges[first:first + N]
            if any(b > a for a, b in wave):
                found.append(Wave(wave, copied))
                copied = 0  # the copies stay
    return found


# ---------------------------------------------------------------------------------------------------------------------
# what one rank needs of another

@dataclass
class Sizes:
    """What bytes are counted with."""
    B: int
    H: int
    Hkv: int
    D: int
    e: int   # bytes of a number


def sizes_of(config, dtype, B=1):
    return Sizes(B, config.num_attention_heads, config.num_key_value_heads, config.head_dim, dtype.itemsize)


def key_bytes(sizes, keys):
    """Of so many keys and values."""
    return keys * 2 * sizes.B * sizes.Hkv * sizes.D * sizes.e


def query_bytes(sizes, queries):
    """(there, back) of so many queries, and of their attention and its log-sum-exp, in float32."""
    return queries * sizes.B * sizes.H * sizes.D * sizes.e, queries * sizes.B * sizes.H * 4 * (sizes.D + 1)


def merge_bytes(sizes, queries, N):
    """Sent by each rank where all read the same queries and merge their parts."""
    return queries * sizes.B * sizes.H * 4 * (sizes.D + 1) * (N - 1)


@dataclass
class Errand:
    """What the queries of one rank need of another's keys."""
    rows: slice          # of the queries that ask: from the first to the last that sees one of them
    keys: torch.Tensor   # which of the other's keys are seen, places in its cache, rising
    plan: Plan           # for these queries and these keys
    by_keys: bool        # the keys are fetched, rather than the queries sent

    def bytes(self, sizes):
        """What travels, there and back."""
        if self.by_keys:
            return key_bytes(sizes, len(self.keys))
        return sum(query_bytes(sizes, self.rows.stop - self.rows.start))


def errand(plan, here, least, sizes):
    """The Errand of the queries of a plan to a rank in whose cache are the keys here (T,), of which those from `least`
    on are wanted; None where nothing is seen."""
    skipped = int(torch.searchsorted(here, least))
    part = plan.of_keys(here[skipped:])
    if part is None:
        return None
    keys = is_seen(part).nonzero().flatten()
    seeing = torch.stack([r.end > r.start for r in part.regions]).any(0).nonzero().flatten()
    rows = slice(int(seeing[0]), int(seeing[-1]) + 1)
    part = part.of_queries(rows).of_keys(keys)
    by_keys = key_bytes(sizes, len(keys)) <= sum(query_bytes(sizes, rows.stop - rows.start))
    return Errand(rows, keys + skipped, part, by_keys)


@dataclass
class Holdings:
    """Which keys every rank holds, as data that each of them knows."""
    own: list[torch.Tensor]   # of every rank, rising
    copied: int = 0           # while a prompt is read: the keys 0..copied-1 are on all ranks
    holder: int = 0           # the rank that owns these

    @staticmethod
    def none(N):
        return Holdings([torch.zeros(0, dtype=torch.int64) for _ in range(N)])

    def tokens(self, wave, rank):
        """The indices that a rank reads in a wave."""
        own = torch.arange(*wave.ranges[rank])
        if wave.copied and rank != holder_of(wave):
            return torch.cat((torch.arange(wave.copied), own))
        return own

    def add(self, wave):
        """Take note of what the ranks hold when they read a wave."""
        if wave.copied:
            self.copied, self.holder = wave.copied, holder_of(wave)
        for rank, (lo, hi) in enumerate(wave.ranges):
            self.own[rank] = torch.cat((self.own[rank], torch.arange(lo, hi)))

    def grow(self, tokens):
        """Give the next tokens to the rank with the most room, and return it."""
        total = sum(map(len, self.own))
        rank = min(range(len(self.own)), key=lambda rank: len(self.own[rank]))
        self.own[rank] = torch.cat((self.own[rank], torch.arange(total, total + tokens)))
        return rank

    def here(self, rank):
        """The indices of the keys in a rank's cache: copies, then its own."""
        front = self.copied if rank != self.holder else 0
        return torch.cat((torch.arange(front), self.own[rank]))

    def errand(self, plan, begin, wave, asker, owner, sizes):
        """The Errand of an asker's queries in a wave to an owner; the plan's first query is token begin."""
        i = self.tokens(wave, asker)
        if not len(i):
            return None
        return errand(plan.of_queries(i - begin), self.here(owner), self.copied, sizes)


def holder_of(wave):
    """The first rank that reads something: of wave 0, the one that owns the first tokens."""
    return next(rank for rank, (lo, hi) in enumerate(wave.ranges) if hi > lo)


def errands(plan, holdings, wave, sizes):
    """Yield (asker, owner, Errand) for all that ranks need of one another in a wave, which is noted in holdings."""
    N = len(holdings.own)
    holdings.add(wave)
    for asker in range(N):
        for owner in range(N):
            found = None if asker == owner else holdings.errand(plan, 0, wave, asker, owner, sizes)
            if found:
                yield asker, owner, found


def traffic(plan, n, N, sizes, piece=8192, leader=None):
    """What N ranks send in a layer while they read a prompt of n tokens by its plan, all ranks together: a Counter of
    bytes {"keys", "queries", "parts", "merge"}, and its keys by rank, [tokens]. leader: the plan by which the prompt
    is shared out, where it is another layer's."""
    holdings = Holdings.none(N)
    sent = Counter()
    for wave in waves(leader or plan, 0, n - 1, N, piece):
        for _, _, found in errands(plan, holdings, wave, sizes):
            if found.by_keys:
                sent["keys"] += key_bytes(sizes, len(found.keys))
            else:
                there, back = query_bytes(sizes, found.rows.stop - found.rows.start)
                sent["queries"] += there
                sent["parts"] += back
    holdings.grow(1)
    sent["merge"] += N * merge_bytes(sizes, 1, N)
    return sent, [len(own) for own in holdings.own]


# ---------------------------------------------------------------------------------------------------------------------
# reading a wave

@dataclass
class Share:
    """What one rank does in a wave, in place of a plan; made once for all layers."""
    i: torch.Tensor                # the tokens read here
    plan: Plan | None              # for them and the keys held here, None where there are none
    asks: list[Errand | None]      # at step s = 1, 2, ...: what is needed of rank - s
    serves: list[Errand | None]    # and what rank + s needs of this one
    keys_only: bool = False

    @property
    def Tq(self):
        return 1 if self.keys_only else len(self.i)

    def last(self):
        """Of the last layer only the keys and values are wanted."""
        return replace(self, keys_only=True)


def make_share(holdings, plan, begin, wave, ranks, sizes):
    """The Share of a rank; every rank makes its own, and from the same plan that of the others' errands to it."""
    N = ranks.size
    i = holdings.tokens(wave, ranks.rank)
    local = plan.of_queries(i - begin).of_keys(holdings.here(ranks.rank)) if len(i) else None
    asks = []
    serves = []
    for step in range(1, N):
        source, asker = (ranks.rank - step) % N, (ranks.rank + step) % N
        asks.append(holdings.errand(plan, begin, wave, ranks.rank, source, sizes))
        serves.append(holdings.errand(plan, begin, wave, asker, ranks.rank, sizes))
    return Share(i, local, asks, serves)


class SpreadCache:
    """The cache of one rank among several, in the place of a cache.KVCache: its keys and values alone. It forgets
    nothing but by cut, also what no later query sees."""

    def __init__(self, config, ranks, size=64):
        self.ranks = ranks
        self.config = config
        self.size = size
        self.held = KVCache(config, size)
        self.holdings = Holdings.none(ranks.size)
        self.length = 0    # of all tokens on all ranks that have gone through all layers
        self.owner = 0     # of the tokens that are being read by all ranks

    def __len__(self):
        return self.length

    def is_full(self):
        """As KVCache.is_full asks whether to forget: never."""
        return False

    def indices(self, new=0):
        """The indices of all tokens on all ranks, and of `new` ones after them: the keys j of a plan."""
        return torch.arange(self.length + new)

    def cut(self, length):
        """Forget all but the first `length` tokens of the whole."""
        for rank, own in enumerate(self.holdings.own):
            self.holdings.own[rank] = own[:int(torch.searchsorted(own, length))]
        self.held.cut(len(self.holdings.own[self.ranks.rank]))
        self.length = min(self.length, length)

    def attend(self, layer, q, k, v, plan, impl, row):
        """As KVCache.attend, by a Share, or by a Plan for all keys: then every rank has the same q, k and v."""
        self.ranks.life.progress += 1
        if isinstance(plan, Share):
            return self.attend_share(layer, q, k, v, plan, impl)
        return self.attend_together(layer, q, k, v, plan, impl, row)

    # ---- all ranks read the same tokens

    def attend_together(self, layer, q, k, v, plan, impl, row):
        """Attend to the keys held here and merge with what the others find; one rank keeps the new keys."""
        if layer == 0:
            self.owner = self.holdings.grow(k.shape[2])
        if self.owner == self.ranks.rank:
            self.held.append(layer, k, v)
        part = self.own_part(layer, q, k, v, plan, impl, row)
        parts = self.ranks.gather(torch.cat((part[0], part[1][..., None]), -1), "merge")  # (N, B, H, Tq, D + 1)
        out, _ = merge_parts(parts[..., :-1], parts[..., -1])
        if layer == len(self.held.k) - 1:
            self.length += k.shape[2]
        return out.to(q.dtype)

    def own_part(self, layer, q, k, v, plan, impl, row):
        """attend_part of q to the keys held here."""
        own = self.holdings.own[self.ranks.rank]
        mine = plan.shared("of these keys", lambda: plan.of_keys(own)) if len(own) else None
        if mine is None:
            return nothing(q)
        keys, values = self.held.k[layer][:, :, :len(own)], self.held.v[layer][:, :, :len(own)]
        rotated = None
        if k.shape[2] == 1 and keys.dtype == k.dtype and not q.is_cuda:
            rotated = self.held.rotated(layer, mine)
        return attend_part(q, unpack(keys, k.dtype), unpack(values, k.dtype), mine, impl, rotated, row)

    # ---- every rank reads its own tokens

    def attend_share(self, layer, q, k, v, share, impl):
        """Attend to the keys held here, then step by step to those of the rank before, of the one before that, ..."""
        keys, values = self.held.append(layer, k, v)
        if share.keys_only:
            return torch.zeros_like(q)
        arrived = self.depart(1, share, q, keys, values)
        out, lse = attend_part(q, keys, values, share.plan, impl) if share.plan else nothing(q)
        for step in range(1, self.ranks.size):
            self.ranks.finish(arrived.works)
            current = arrived
            if step + 1 < self.ranks.size:  # travels while this rank computes
                arrived = self.depart(step + 1, share, q, keys, values)
            self.use(step, share, current, (out, lse), q, keys, values, impl)
        return out.to(q.dtype)

    def depart(self, step, share, q, keys, values):
        """Begin the exchange of a step: the keys or the queries that travel."""
        ranks = self.ranks
        source, asker = (ranks.rank - step) % ranks.size, (ranks.rank + step) % ranks.size
        ask, serve = share.asks[step - 1], share.serves[step - 1]
        fetched = q.new_empty(2, *keys.shape[:2], len(ask.keys), keys.shape[3]) if ask and ask.by_keys else None
        asked = q.new_empty(*q.shape[:2], serve.plan.Tq, q.shape[3]) if serve and not serve.by_keys else None
        sends = []
        if serve and serve.by_keys:
            sends = [(asker, torch.stack((take(keys, serve.keys), take(values, serve.keys))))]
        works = ranks.post(sends, [] if fetched is None else [(source, fetched)], "keys")
        sends = [] if ask is None or ask.by_keys else [(source, q[:, :, ask.rows].contiguous())]
        works += ranks.post(sends, [] if asked is None else [(asker, asked)], "queries")
        return Arrival(works, fetched, asked)

    def use(self, step, share, arrived, sums, q, keys, values, impl):
        """Use what has arrived in a step: merge what these queries see, and answer the queries of another rank."""
        ranks = self.ranks
        source, asker = (ranks.rank - step) % ranks.size, (ranks.rank + step) % ranks.size
        ask, serve = share.asks[step - 1], share.serves[step - 1]
        sends = []
        receives = []
        if arrived.asked is not None:
            found = attend_part(arrived.asked, take(keys, serve.keys), take(values, serve.keys), serve.plan, impl)
            sends = [(asker, torch.cat((found[0], found[1][..., None]), -1))]
        answer = None
        if ask and not ask.by_keys:
            answer = sums[0].new_empty(*q.shape[:2], ask.plan.Tq, q.shape[3] + 1)
            receives = [(source, answer)]
        works = ranks.post(sends, receives, "parts")
        if arrived.fetched is not None:
            found = attend_part(q[:, :, ask.rows], *arrived.fetched, ask.plan, impl)
            merge(sums[0][:, :, ask.rows], sums[1][:, :, ask.rows], *found)
        ranks.finish(works)
        if answer is not None:
            merge(sums[0][:, :, ask.rows], sums[1][:, :, ask.rows], answer[..., :-1], answer[..., -1])

    def drop_copies(self):
        """Forget the keys that other ranks own."""
        front = len(self.holdings.here(self.ranks.rank)) - len(self.holdings.own[self.ranks.rank])
        self.holdings.copied = 0
        if not front:
            return
        for layer, length in enumerate(self.held.length):
            for stored in (self.held.k, self.held.v):
                stored[layer] = with_room(stored[layer][:, :, front:length], max(self.held.size, length))
            self.held.length[layer] = length - front


@dataclass
class Arrival:
    """What is on its way in a step of attend_share."""
    works: list
    fetched: torch.Tensor | None   # keys and values (2, B, Hkv, T, D)
    asked: torch.Tensor | None     # another rank's queries (B, H, Tq, D)


def nothing(q):
    """attend_part of q (B, H, Tq, D) to no keys."""
    return torch.zeros_like(q, dtype=torch.float32), q.new_full(q.shape[:3], NEVER, dtype=torch.float32)


def take(x, places):
    """x (B, Hkv, T, D) at these places, rising: a view where they are all neighbours."""
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(places):
        return x[:, :, first:last + 1]
    return x[:, :, places.to(x.device)]


# ---------------------------------------------------------------------------------------------------------------------
# a model whose keys are spread

def spread(model, ranks):
    """Let the caches of a Llama be spread over ranks. ValueError where they have no GPU each."""
    processes = (ranks.whole or ranks).size
    if processes > 1 and next(model.parameters()).is_cuda and not ranks.has_nccl:
        raise ValueError(f"{processes} ranks need as many GPUs; --device cpu runs without")
    model.ranks = ranks


def new_cache(model, size=64):
    """An empty cache for a Llama, spread over ranks where the model is."""
    if model.ranks is not None and model.ranks.size > 1:
        return SpreadCache(model.config, model.ranks, size)
    return KVCache(model.config, size)


@torch.no_grad()
def prefill(model, tokens, method, cache, room=64, piece=8192, impl="auto", progress=None):
    """generate.prefill for a SpreadCache: the logits (B, vocab_size), the same on all ranks, and the cache."""
    n = tokens.shape[1]
    ranks = cache.ranks
    device = next(model.parameters()).device
    begin = min(len(cache), n - 1)
    cache.cut(begin)
    cache.held.size = max(cache.held.size, 64 + (n + min(room, 1024)) // ranks.size)
    sizes = sizes_of(model.config, next(model.parameters()).dtype, len(tokens))
    plans = model.config.plans(method, n, torch.arange(begin, n), torch.arange(n))
    layers = model.config.layer_methods or [""] * model.config.num_hidden_layers
    for wave in waves(leading(plans), begin, n - 1, ranks.size, piece):
        cache.holdings.add(wave)
        # layers with a method of their own read the same tokens, and see other keys of them
        shares = {own: make_share(cache.holdings, plan, begin, wave, ranks, sizes) for own, plan in plans.items()}
        here = cache.holdings.tokens(wave, ranks.rank)
        model(tokens[:, here].to(device), [shares[own] for own in layers], cache, last_only=True, impl=impl)
        cache.length = wave.ranges[-1][1]
        if progress:
            progress(cache.length, n)
    cache.drop_copies()
    last = model.plan(method, n=n, i=torch.tensor([n - 1]), j=torch.arange(n))
    logits = model(tokens[:, n - 1:].to(device), last, cache, impl=impl)
    if progress:
        progress(n, n)
    return logits[:, -1], cache


# ---------------------------------------------------------------------------------------------------------------------
# in words

def explain_ranks(config, method, n, new, N, dtype, piece=8192):
    """What N ranks send and hold for a prompt of n tokens and `new` ones after it, as text; piece as in prefill."""
    sizes = sizes_of(config, dtype)
    plans = config.plans(method, n)
    parts = []
    for own, plan in plans.items():
        sent, tokens = traffic(plan, n, N, sizes, piece, leading(plans))
        together = sent.pop("merge")
        ways = ", ".join(f"{kilobytes(count)} of {what}" for what, count in sent.items()) or "nothing"
        where = f"a layer of {own}" if own else "a layer"
        parts.append(f"{kilobytes(sum(sent.values()))} {where} ({ways})")
    cache = [2 * count * held_bytes(config, dtype) for count in tokens]
    return (f"{N} ranks: the prompt takes {', '.join(parts)}, all ranks together; its "
            f"last token, and each new one, {kilobytes(together)} a layer\n"
            f"cache of the prompt by rank: {', '.join(f'{count / 2**20:.2f}' for count in cache)} MiB, of "
            f"{sum(cache) / 2**20:.2f} MiB; the {new} new tokens go where there is room")


def kilobytes(count):
    return f"{count / 1e3:.1f} kB"
