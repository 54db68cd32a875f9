"""Every executor against an oracle that turns each pair of tokens by its own distance, in float64.

Sizes are never multiples of a block, heads are grouped in every way, and queries, keys and values come transposed as
the model makes them. 2e-6 of the largest value is float32 rounding; 2e-2 is bfloat16's.
"""
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import oracle

import attention
from attention import attend, attend_tiled
from positions import METHODS, distance, farthest, make_plan

METHODS = [name for name in METHODS if name != "longrope"]  # its factors come from a config, see test_strategies.py

SHAPES = [(1, 4, 4, 8), (2, 8, 2, 16), (1, 4, 1, 64), (2, 3, 3, 16), (1, 8, 2, 8)]  # B, H, Hkv, D
BLOCKS = [(48, 40), (7, 5)]  # neither divides any length below

COMPOSITIONS = [  # any geometry, any frequencies, any attention scale
    ("mesa", {"freq": "alibi"}), ("mesa", {"freq": "yarn", "factor": 4.0}), ("mesa", {"attn_scale": "none"}),
    ("mesa", {"first": 3, "chunk": 9, "width": 2, "last": 4}), ("self-extend", {"attn_scale": "logn", "freq": "ntk"}),
    ("rerope", {"freq": "alibi", "window": 5}), ("leaky-rerope", {"freq": "nope", "window": 5, "k": 3}),
    ("stair", {"freq": "llama3"}), ("yarn", {"attn_scale": "logn", "factor": 8.0}), ("alibi", {"attn_scale": "logn"}),
]


def inputs(shape, Tq, Tk, dtype=torch.float32, seed=0, device="cpu"):
    """Random q (B, H, Tq, D), k and v (B, Hkv, Tk, D), as views of (B, T, H, D) like the model's projections."""
    B, H, Hkv, D = shape
    g = torch.Generator().manual_seed(seed)
    def draw(heads, T):  # noqa: E306
        return torch.randn(B, T, heads, D, generator=g).to(device, dtype).transpose(1, 2)
    return draw(H, Tq), draw(Hkv, Tk), draw(Hkv, Tk)


def plan_for(method, shape, n, L, i=None, j=None, **params):
    i = torch.arange(n) if i is None else i
    j = torch.arange(n) if j is None else j
    return make_plan(method, i, j, n=n, L=L, D=shape[3], H=shape[1], **params)


def allowed(plan, tolerance):
    """Rounding grows with the logits, and CosScale's reach 32."""
    return tolerance * (1 if plan.cosine is None else plan.cosine / 8)


def check(got, want, tolerance):
    """Largest error as a part of the largest value."""
    assert got.shape == want.shape and got.isfinite().all()
    error = float((got.double().cpu() - want).abs().max() / want.abs().max())
    assert error <= tolerance, f"relative error {error:.2e}"


def check_all(q, k, v, plan, tolerance=2e-6):
    """dense, auto and tiled at three block sizes (the smallest on short inputs: it is slow) against the oracle."""
    want, tolerance = oracle(q.cpu(), k.cpu(), v.cpu(), plan), allowed(plan, tolerance)
    for impl in ("dense", "auto", "tiled"):
        check(attend(q, k, v, plan, impl), want, tolerance)
    for block_q, block_k in BLOCKS[:1 + (q.shape[2] < 64)]:
        check(attend_tiled(q, k, v, plan, block_q, block_k), want, tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# prompts

@pytest.mark.parametrize("n, L", [(1, 32), (2, 32), (37, 32), (130, 32), (300, 32), (2, 512), (130, 512)])
@pytest.mark.parametrize("method", METHODS)
def test_prompt(method, n, L):
    shape = SHAPES[4] if n == 300 else SHAPES[(n + list(METHODS).index(method)) % len(SHAPES)]
    check_all(*inputs(shape, n, n), plan_for(method, shape, n, L))


@pytest.mark.parametrize("method", METHODS)
def test_few_heads_and_few_rows_at_a_time(method, monkeypatch):
    """As with long prompts: one key head, then two, and ten rows, to a turn, and 50 rows to a fused call."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(attention, "LONG", 50)
    for shape, share, block in ((SHAPES[1], 1, 640), ((2, 6, 3, 8), 2 * 2 * 2 * 130 * 8, 480)):
        monkeypatch.setattr(attention, "SHARE", share)
        monkeypatch.setattr(attention, "BLOCK", block)
        check_all(*inputs(shape, 130, 130), plan_for(method, shape, 130, 32))


@pytest.mark.parametrize("threads, turns", [(1, [2, 2, 2, 2]), (2, [2, 2, 2, 2]), (3, [4, 4]), (16, [8])])
@torch.no_grad()
def test_no_thread_is_without_a_head(threads, turns, monkeypatch):
    """8 query heads on 4 key heads, each too large for SHARE: query heads per turn."""
    monkeypatch.setattr(attention, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k, v = inputs((1, 8, 4, 8), 40, 40)
    found = []

    def seen(q, k, v, plan, kept=None, out=None):
        found.append(q.shape[1])
        return q
    attention.by_heads(seen, q, k, v, plan_for("rope", (1, 8, 4, 8), 40, 32), None)
    assert found == turns


@pytest.mark.parametrize("method, params", COMPOSITIONS, ids=str)
def test_compositions(method, params):
    for shape, n in ((SHAPES[1], 37), (SHAPES[4], 101)):
        check_all(*inputs(shape, n, n), plan_for(method, shape, n, 16, **params))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_head_layouts(method, shape):
    """Query head h reads key head h // G, for MHA, GQA and one key head, in batches of one and two."""
    check_all(*inputs(shape, 45, 45), plan_for(method, shape, 45, 32))


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method, shape):
    check_all(*inputs(shape, 61, 61, torch.bfloat16), plan_for(method, shape, 61, 32), tolerance=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_on_a_gpu(dtype, tolerance):
    for method in METHODS:
        for shape, n in ((SHAPES[1], 130), (SHAPES[2], 301)):
            check_all(*inputs(shape, n, n, dtype, device="cuda"), plan_for(method, shape, n, 32), tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# decoding, chunks, and other choices of queries

@pytest.mark.parametrize("n", [1, 31, 130])
@pytest.mark.parametrize("method", METHODS)
def test_decode_row(method, n):
    """One query after a prompt of n and five decoded tokens."""
    for shape in (SHAPES[0], SHAPES[1]):
        plan = plan_for(method, shape, n, 32, torch.tensor([n + 4]), torch.arange(n + 5))
        check_all(*inputs(shape, 1, n + 5), plan)


@pytest.mark.parametrize("a, b", [(0, 50), (50, 87), (127, 134)])
@pytest.mark.parametrize("method", METHODS)
def test_chunk_of_queries(method, a, b):
    """Queries a..b over the keys so far, for a prompt of 130: the first piece, one inside, the end and decoding."""
    shape = SHAPES[(a + list(METHODS).index(method)) % len(SHAPES)]
    check_all(*inputs(shape, b - a, b), plan_for(method, shape, 130, 32, torch.arange(a, b), torch.arange(b)))


@pytest.mark.parametrize("method", METHODS)
def test_every_seventh_query(method):
    """The queries need not be neighbours, only in order."""
    i = torch.arange(3, 130, 7)
    check_all(*inputs(SHAPES[1], len(i), 130), plan_for(method, SHAPES[1], 130, 32, i))


def test_queries_out_of_order_are_refused():
    """Regions promise bounds that never decrease; tiles rely on it."""
    with pytest.raises(ValueError, match=r"\bi\b"):
        plan_for("rope", SHAPES[0], 8, 32, torch.tensor([5, 4, 3]))


def test_batch_entries_do_not_mix():
    shape = SHAPES[1]
    q, k, v = inputs(shape, 37, 37)
    plan = plan_for("mesa", shape, 37, 16)
    alone = attend(q[1:], k[1:], v[1:], plan)
    assert torch.allclose(attend(q, k, v, plan)[1:], alone, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# ALiBi by hand, sharpness by hand

def test_alibi_of_one_query():
    """Two heads, equal scores: weights e^(-slope * distance), slopes 2^-4 and 2^-8."""
    q, k, v = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 3, 8), torch.eye(3, 8).expand(1, 2, 3, 8)
    plan = plan_for("alibi", (1, 2, 2, 8), 3, 32, torch.tensor([2]))
    for impl in ("dense", "tiled", "auto"):
        got = attend(q, k, v, plan, impl)[0, :, 0, :3]
        want = torch.softmax(torch.tensor([[-2 / 16, -1 / 16, 0], [-2 / 256, -1 / 256, 0]]), -1)
        assert torch.allclose(got, want, atol=1e-6)


def test_attention_scale_multiplies_alibi_too():
    """q_scale is a factor on all logits of a query, the ALiBi term included, as in the released ports."""
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 3, 8), torch.eye(3, 8)[None, None]
    plan = plan_for("alibi", (1, 1, 1, 8), 3, 2, torch.tensor([2]), attn_scale="logn")
    scale = float(plan.q_scale[0])
    want = torch.softmax(scale * torch.tensor([-2., -1., 0.]) / 256, -1)
    assert scale > 1.5
    for impl in ("dense", "tiled"):
        assert torch.allclose(attend(q, k, v, plan, impl)[0, 0, 0, :3], want, atol=1e-6)


def test_large_logits_stay_finite():
    """Sixty times the usual queries: softmax is all on one key, and merging parts must not overflow."""
    shape = SHAPES[1]
    q, k, v = inputs(shape, 61, 61)
    for method in ("rope", "mesa", "rerope", "alibi"):
        check_all(60 * q, k, v, plan_for(method, shape, 61, 32), tolerance=1e-4)


def test_far_positions_keep_their_precision():
    """Angles are computed in float64: float32 ones would be off by 1.5e-3 at position 131,072."""
    i = torch.arange(131072, 131112)
    q, k, v = inputs(SHAPES[0], 40, 131112)
    for method in ("rope", "rerope"):
        plan = plan_for(method, SHAPES[0], 131072, 2048, i, torch.arange(131112))
        few = slice(131000, None)  # the oracle on the newest keys alone
        for r in plan.regions:
            r.start = r.start.clamp(min=few.start)
        plan.regions = [r for r in plan.regions if (r.end > r.start).any()]
        check(attend(q, k, v, plan, "tiled"), oracle_of_the_newest(q, k, v, plan, few.start), 2e-6)


def oracle_of_the_newest(q, k, v, plan, first):
    """The oracle with keys from `first` on, distances unchanged: all positions stay, only the list of keys is cut."""
    cut = [SimpleNamespace(q_pos=r.q_pos, k_pos=r.k_pos[first:], start=r.start - first, end=r.end - first)
           for r in plan.regions]
    fields = {name: getattr(plan, name) for name in ("inv_freq", "mscale", "q_scale", "slopes", "cosine")}
    return oracle(q, k[:, :, first:], v[:, :, first:], SimpleNamespace(regions=cut, **fields))


# ---------------------------------------------------------------------------------------------------------------------
# gradients

@pytest.mark.parametrize("wanted", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("method", ["rope", "yarn", "rerope", "mesa", "alibi"])
def test_gradient_of_auto_is_that_of_dense(method, wanted):
    """Whichever of q, k, v asks for it: fused autograd where the plan is causal, dense elsewhere, never half of one."""
    shape = SHAPES[1]
    plan = plan_for(method, shape, 37, 16)
    gradients = []
    for implementation in ("auto", "dense"):
        tensors = dict(zip("qkv", inputs(shape, 37, 37)))
        for name in wanted:
            tensors[name].requires_grad_()
        attend(*tensors.values(), plan, implementation).square().sum().backward()
        gradients.append([tensors[name].grad for name in wanted])
    for auto, dense in zip(*gradients):
        assert torch.allclose(auto, dense, rtol=0, atol=2e-5 * float(dense.abs().max()))


# ---------------------------------------------------------------------------------------------------------------------
# the branch that other devices take

@pytest.mark.parametrize("method", METHODS)
def test_pieces_without_the_flash_kernel(method, monkeypatch):
    """attend_piece as it is off the CPU, in every method: plain products, a log-sum-exp, rows that see nothing."""
    monkeypatch.setattr(attention, "has_fused", lambda q, plan: False)
    monkeypatch.setattr(attention, "flash_piece", lambda q, k, v, bias, causal: attention.plain_piece(q, k, v, bias))
    for (block_q, block_k), shape, n in zip(BLOCKS, (SHAPES[4], SHAPES[1]), (130, 37)):
        q, k, v = inputs(shape, n, n)
        plan = plan_for(method, shape, n, 32)
        check(attend_tiled(q, k, v, plan, block_q, block_k), oracle(q, k, v, plan), 2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# cost and errors

MEMORY = """
import torch
from attention import attend
from positions import make_plan

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

def run(method, T):
    i = torch.arange(T)
    plan = make_plan(method, i, i, n=T, L=2048, D=16, H=1)
    x = torch.randn(1, 1, T, 16)
    attend(x, x, x, plan)

torch.set_num_threads(2)
run("alibi", 500)  # libraries, thread pools
before = status("VmRSS")
for method, T in (("alibi", 8000), ("rerope", 10000), ("mesa", 20000)):
    run(method, T)
    print(method, T, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_nothing_is_ever_T_by_T():
    """In a process of its own, in MB: T x T float32 would be 256 for ALiBi, 400 for ReRoPE, 1,600 for Mesa."""
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parents[1]).stdout
    assert all(float(line.split()[-1]) < 100 for line in out.splitlines()), out


def test_a_plan_serves_all_layers():
    """cos and sin are made once per plan, and a second call with other keys uses them unchanged."""
    shape = SHAPES[1]
    plan = plan_for("mesa", shape, 37, 16)
    for seed in (0, 1):
        q, k, v = inputs(shape, 37, 37, seed=seed)
        check(attend(q, k, v, plan), oracle(q, k, v, plan), 2e-6)


@pytest.mark.parametrize("change", [
    {"q": (1, 4, 5, 8)}, {"k": (1, 2, 6, 8)}, {"v": (1, 2, 6, 8)}, {"q": (2, 4, 6, 8)}, {"q": (1, 3, 6, 8)},
    {"k": (1, 2, 6, 16), "v": (1, 2, 6, 16)}], ids=str)
def test_shapes_that_do_not_fit(change):
    shapes = {"q": (1, 4, 6, 8), "k": (1, 2, 7, 8), "v": (1, 2, 7, 8)} | change
    plan = plan_for("rope", (1, 4, 2, 8), 7, 32, torch.arange(1, 7))
    with pytest.raises(ValueError):
        attend(*(torch.zeros(s) for s in shapes.values()), plan)


def test_unknown_implementation():
    q, k, v = inputs(SHAPES[0], 3, 3)
    with pytest.raises(ValueError, match="flash.*tiled"):
        attend(q, k, v, plan_for("rope", SHAPES[0], 3, 32), "flash")


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_plain_pieces_in_half_precision(dtype, rounding):
    """Large logits must not overflow or lose their digits before the softmax."""
    q, k, v = (3 * x.to(dtype) for x in inputs((1, 2, 2, 64), 40, 40))
    for ours, theirs in zip(attention.plain_piece(q, k, v, None), attention.flash_piece(q, k, v, None)):
        assert float((ours.float() - theirs.float()).abs().max() / theirs.abs().max()) < rounding
    big = torch.full((1, 1, 4, 128), 25.0, dtype=dtype)
    assert attention.plain_piece(big, big, big, None)[0].isfinite().all()


@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_what_has_no_gradient_says_so(impl):
    q, k, v = inputs(SHAPES[1], 37, 37)
    with pytest.raises(ValueError, match="gradient"):
        attend(q, k.requires_grad_(), v, plan_for("mesa", SHAPES[1], 37, 16), impl)


@pytest.mark.parametrize("method", METHODS)
def test_farthest_is_the_largest_distance(method):
    """What --explain prints, against the whole matrix."""
    for n, L in ((300, 40), (41, 16)):
        plan = plan_for(method, SHAPES[0], n, L)
        assert max(farthest(r) for r in plan.regions) == float(distance(plan).nan_to_num(0).max())
