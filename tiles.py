"""How a region is cut into pieces that a fused attention kernel takes: runs of rows, rectangles and triangles of keys.

Does: pieces as index ranges, made once for all layers, and masks for the ragged ones. Does not: compute attention
(attention.py).

    for rows, pieces in region_tiles(plan, number, block_q=256, block_k=plan.Tk, fused=True):
        for lo, hi, kind in pieces: ...

A run of rows sees a rectangle, a triangle or a sliding window of keys. The first two make few large fused calls, of at
most LONG rows; a window is cut into blocks of rows, each of which sees a triangle, a rectangle, and a triangle again.
Large calls on whole pieces are what makes attention fast on a CPU: with 256 rows and masks a window of 2,048 among
16,384 keys takes a sixth longer.
"""
import itertools

import torch

NEVER = -1e30  # the log of a weight that is zero; finite, so that what sees nothing gives no nan
LONG = 8192    # rows of one fused call at most
WINDOW = 2048  # the same where a window slides


def visible_span(plan, key_set):
    """(first, stop) of the keys that some query sees in the regions of this key set."""
    def find():
        regions = [r for r, number in zip(plan.regions, plan.key_set) if number == key_set]
        first = min(int(r.start[r.end > r.start].min()) for r in regions)
        stop = max(int(r.end[r.end > r.start].max()) for r in regions)
        return first, stop
    return plan.shared(("span", key_set), find)


def region_tiles(plan, number, block_q, block_k, fused):
    """[(rows, pieces)] of a region: slices of queries, and the pieces of keys that each of these sees."""
    def cut():
        region = plan.regions[number]
        return [(slice(a, b), list(key_pieces(region, a, b, block_k, fused)))
                for a, b in row_runs(region, block_q, fused)]
    return plan.shared(("tiles", number, block_q, block_k, fused), cut)


def row_runs(region, block, fused):
    """(a, b) ranges of rows that see something, within which start and end each stand still or move by one key a row.

    At most `block` rows, or with a fused call as many as rows_at_once says.
    """
    visible = region.end > region.start
    steps = torch.stack((region.start.diff(), region.end.diff()))
    jump = (steps.abs() > 1).any(0) | visible.diff()
    turn = (steps.diff() != 0).any(0) & ~jump[:-1]  # the slope changes; not compared with the step over a jump
    jump[1:] |= turn
    cuts = [0, *(jump.nonzero().flatten() + 1).tolist(), len(visible)]
    for a, b in itertools.pairwise(cuts):
        if visible[a]:
            step = rows_at_once(region, a, b, block) if fused else block
            for c in range(a, b, step):
                yield c, min(c + step, b)


def rows_at_once(region, a, b, block):
    """How many of the rows a..b a fused call should take: LONG where start stands still; where it moves, WINDOW, but so
    few that one key is seen by all, or `block` where the window is so narrow that this would be many calls."""
    if region.start[a] == region.start[b - 1]:
        return LONG
    narrowest = int((region.end[a:b] - region.start[a:b]).min())
    return min(WINDOW, narrowest) if narrowest >= block // 2 else block


def key_pieces(region, a, b, block, fused):
    """Cut the keys that rows a..b see into (lo, hi, kind): a "rectangle" that all rows see, in blocks, and what is
    ragged: a "growing" triangle of b - a keys of which each row sees one more, a "shrinking" one of b - a - 1 keys of
    which each row sees one less and the last none, or an "edge" that needs a mask.

    Rows 4 5 6 with a window of 4 see [1,5) [2,6) [3,7): [1,3) shrinking, the rectangle [3,4), [4,7) growing.
    """
    first_start, last_start = int(region.start[a]), int(region.start[b - 1])
    first_end, last_end = int(region.end[a]), int(region.end[b - 1])
    if last_start >= first_end:  # no key is seen by all rows
        yield first_start, last_end, "edge"
        return
    triangle = b - a - 1  # keys by which a side moves that moves with every row
    grows = fused and 0 < triangle == last_end - first_end
    shrinks = fused and 0 < triangle == last_start - first_start
    top = first_end - 1 if grows else first_end
    if last_start > first_start:
        yield first_start, last_start, "shrinking" if shrinks else "edge"
    for lo in range(last_start, top, block):
        yield lo, min(lo + block, top), "rectangle"
    if last_end > top:
        yield top, last_end, "growing" if grows else "edge"


def edge_mask(plan, start, end, width):
    """(rows, width) float32: NEVER outside of start..end of each row; blocks of a narrow window share one."""
    def make():
        j = torch.arange(width)
        outside = (j < start[:, None]) | (j >= end[:, None])
        return torch.zeros(outside.shape).masked_fill_(outside, NEVER)
    corners = tuple(int(x) for x in (start[0], start[-1], end[0], end[-1]))  # within a run these decide all rows
    return plan.shared(("mask", corners, len(start), width), make)
