"""Every executor against an oracle that scores each pair of tokens at its own distance, in float64.

Sizes are never multiples of a block, heads are grouped in every way, and queries, keys and values come transposed as
the model makes them. 2e-6 of the largest value is float32 rounding; 2e-2 is bfloat16's.
"""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import oracle

import attention
import tiles
from attention import attend, attend_tiled
from geometry import METHODS
from positions import make_plan
from rotation import rotate

SHAPES = [(1, 4, 4, 8), (2, 8, 2, 16), (1, 4, 1, 64), (2, 3, 3, 16), (1, 8, 2, 8)]  # B, H, Hkv, D
BLOCKS = [(48, 40), (7, 5)]  # neither divides any length below
KINDS = ["rope", "rerope", "dca", "mesa", "streaming-llm", "alibi"]  # one method of each shape

COMPOSITIONS = [  # any geometry, any frequencies, any attention scale, any product
    ("mesa", {"freq": "alibi"}), ("mesa", {"freq": "longrope", "attn_scale": "none", "overlap": 3}),
    ("mesa", {"freq": "alibi", "overlap": 4, "cosine": 10.0}), ("rerope", {"freq": "alibi", "window": 5}),
    ("self-extend", {"attn_scale": "logn", "freq": "ntk"}), ("leaky-rerope", {"freq": "nope", "window": 5, "k": 3}),
    ("stair", {"freq": "llama3"}), ("dca", {"freq": "yarn", "factor": 4.0, "attn_scale": "logn"}),
    ("string", {"freq": "alibi", "attn_scale": "constant"}), ("alibi", {"attn_scale": "logn", "cosine": 6.0}),
    ("streaming-llm", {"freq": "ntk", "factor": 2.0, "attn_scale": "infoscale", "clamp": False, "recent": 9}),
    ("lm-infinite", {"freq": "nope", "attn_scale": "logn", "cosine": 8.0}),
    ("lampe", {"freq": "pi", "factor": 2.0, "attn_scale": "infoscale", "per_sequence": True}),
    ("cosscale", {"freq": "llama3", "attn_scale": "infoscale", "cosine": 16.0}),
]
ROTARY = {"half of the width": {"rotary_dim": 8}, "a pair": {"rotary_dim": 2}, "interleaved": {"interleaved": True},
          "interleaved, half": {"interleaved": True, "rotary_dim": 8}}  # for heads of width 16


def inputs(shape, Tq, Tk, dtype=torch.float32, seed=0, device="cpu"):
    """Random q (B, H, Tq, D), k and v (B, Hkv, Tk, D), as views of (B, T, H, D) like the model's projections."""
    B, H, Hkv, D = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, T):
        return torch.randn(B, T, heads, D, generator=generator).to(device, dtype).transpose(1, 2)
    return draw(H, Tq), draw(Hkv, Tk), draw(Hkv, Tk)


def plan_for(method, shape, n, L, i=None, j=None, **params):
    i = torch.arange(n) if i is None else i
    j = torch.arange(n) if j is None else j
    D = shape[3]
    if "longrope" in (method, params.get("freq")):  # found by search, kept in config.json; here made up
        params |= {"short_factor": [1.0] * (D // 2), "long_factor": [1.0 + p for p in range(D // 2)], "factor": 4.0}
    return make_plan(method, i, j, n=n, L=L, D=D, H=shape[1], **params)


def check(got, want, tolerance=2e-6):
    """Largest error as a part of the largest value."""
    assert got.shape == want.shape and got.isfinite().all()
    error = float((got.double().cpu() - want).abs().max() / want.abs().max())
    assert error <= tolerance, f"relative error {error:.2e}"


def check_all(q, k, v, plan, tolerance=2e-6):
    """dense, auto and tiled at three block sizes (the smallest on short inputs: it is slow) against the oracle."""
    want = oracle(q.cpu(), k.cpu(), v.cpu(), plan)
    if plan.cosine is not None:  # rounding grows with the logits, and CosScale's reach 32
        tolerance *= max(1.0, plan.cosine / 8)
    for impl in ("dense", "auto", "tiled"):
        check(attend(q, k, v, plan, impl), want, tolerance)
    for block_q, block_k in BLOCKS[:1 + (q.shape[2] < 64)]:
        check(attend_tiled(q, k, v, plan, block_q, block_k), want, tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# by hand

@pytest.mark.parametrize("L, attn_scale, factor", [(32, "none", 1), (2, "logn", math.log(3) / math.log(2))])
def test_alibi_of_one_query(L, attn_scale, factor):
    """Two heads, equal scores: weights e^(-slope * distance), slopes 2^-4 and 2^-8; an attention scale multiplies them,
    too, as in the released ports."""
    q, k, v = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 3, 8), torch.eye(3, 8).expand(1, 2, 3, 8)
    plan = plan_for("alibi", (1, 2, 2, 8), 3, L, torch.tensor([2]), attn_scale=attn_scale)
    want = torch.softmax(factor * torch.tensor([[-2 / 16, -1 / 16, 0], [-2 / 256, -1 / 256, 0]]), -1)
    for impl in ("dense", "tiled", "auto"):
        assert torch.allclose(attend(q, k, v, plan, impl)[0, :, 0, :3], want, atol=1e-6)


def test_rotation_of_four_channels():
    """A quarter turn of the first pair: half-split pairs are (0, 2) and (1, 3), interleaved (0, 1) and (2, 3)."""
    x = torch.tensor([1., 2., 3., 4.]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[0., 1.]]), torch.tensor([[1., 0.]])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert rotate(x, cos, sin).flatten().tolist() == [-3, 2, 1, 4]
            assert rotate(x, cos, sin, interleaved=True).flatten().tolist() == [-2, 1, 3, 4]
            assert rotate(x, cos[:, :1], sin[:, :1]).flatten().tolist() == [-2, 1, 3, 4]  # rotary width 2


# ---------------------------------------------------------------------------------------------------------------------
# prompts, pieces of them, and decoding, for every method

@pytest.mark.parametrize("method", METHODS)
def test_prompts(method):
    """Of one token, of a few more than training saw, and of four times as many."""
    for number, n in enumerate((1, 37, 130)):
        shape = SHAPES[(number + list(METHODS).index(method)) % len(SHAPES)]
        check_all(*inputs(shape, n, n), plan_for(method, shape, n, 32))


@pytest.mark.parametrize("method", METHODS)
def test_pieces_of_a_prompt_and_decoding(method):
    """Of a prompt of 130: the first piece, its end and four tokens more, every seventh query, one token."""
    shape = SHAPES[list(METHODS).index(method) % len(SHAPES)]
    for i in (torch.arange(50), torch.arange(127, 134), torch.arange(3, 130, 7), torch.tensor([134])):
        Tk = int(i[-1]) + 1
        check_all(*inputs(shape, len(i), Tk), plan_for(method, shape, 130, 32, i, torch.arange(Tk)))


@pytest.mark.parametrize("method, params", COMPOSITIONS, ids=str)
def test_compositions(method, params):
    """A prompt, and one token decoded after another prompt."""
    shape = (2, 6, 3, 16)
    check_all(*inputs(shape, 101, 101), plan_for(method, shape, 101, 32, **params))
    plan = plan_for(method, shape, 130, 32, torch.tensor([133]), torch.arange(134), **params)
    check_all(*inputs(shape, 1, 134), plan)


# ---------------------------------------------------------------------------------------------------------------------
# layouts of heads and channels, types and block sizes, for one method of each shape

@pytest.mark.parametrize("method", KINDS)
def test_head_layouts(method):
    """Query head h reads key head h // G, for MHA, GQA and one key head, in batches of one and two."""
    for shape in SHAPES:
        check_all(*inputs(shape, 45, 45), plan_for(method, shape, 45, 32))


@pytest.mark.parametrize("rotary", ROTARY.values(), ids=ROTARY)
def test_rotary_layouts(rotary):
    """A rotary width below the head's, and pairs of neighbours; with an attention scale, which all channels get."""
    shape, one, keys = SHAPES[1], torch.tensor([63]), torch.arange(64)
    for method in ("yarn:factor=4.0:attn-scale=logn", "mesa", "rerope", "dca", "lampe"):
        check_all(*inputs(shape, 61, 61), plan_for(method, shape, 61, 16, **rotary))
        check_all(*inputs(shape, 1, 64), plan_for(method, shape, 61, 16, one, keys, **rotary))


@pytest.mark.parametrize("method", KINDS)
def test_bfloat16(method):
    shape = SHAPES[1]
    check_all(*inputs(shape, 61, 61, torch.bfloat16), plan_for(method, shape, 61, 32), tolerance=2e-2)


@pytest.mark.parametrize("method", KINDS)
def test_few_heads_and_few_rows_at_a_time(method, monkeypatch):
    """As with long prompts: one key head at a time, blocks of ten rows, and 50 rows to a fused call."""
    monkeypatch.setattr(tiles, "LONG", 50)
    monkeypatch.setattr(attention.head_groups, "__defaults__", (1,))
    monkeypatch.setattr(attention.row_blocks, "__defaults__", None)
    monkeypatch.setattr(attention.row_blocks, "__kwdefaults__", {"numbers": 640})
    shape = (2, 6, 3, 8)
    check_all(*inputs(shape, 130, 130), plan_for(method, shape, 130, 32))


@pytest.mark.parametrize("method", KINDS)
def test_pieces_without_the_flash_kernel(method, monkeypatch):
    """What other devices do: plain products, a log-sum-exp, rows that see nothing."""
    monkeypatch.setattr(attention, "has_flash", lambda q: False)
    for (block_q, block_k), shape, n in zip(BLOCKS, (SHAPES[4], SHAPES[1]), (130, 37)):
        q, k, v = inputs(shape, n, n)
        plan = plan_for(method, shape, n, 32)
        check(attend_tiled(q, k, v, plan, block_q, block_k), oracle(q, k, v, plan))


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_plain_pieces_in_half_precision(dtype, rounding, monkeypatch):
    """Large logits must not overflow or lose their digits before the softmax."""
    q, k, v = (3 * x.to(dtype) for x in inputs((1, 2, 2, 64), 40, 40))
    flash = attention.attend_piece(q, k, v, None, "rectangle")
    for ours, theirs in zip(attention.plain_piece(q, k, v, None), flash):
        assert float((ours.float() - theirs.float()).abs().max() / theirs.abs().max()) < rounding
    big = torch.full((1, 1, 4, 128), 25.0, dtype=dtype)
    assert attention.plain_piece(big, big, big, None)[0].isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_on_a_gpu(dtype, tolerance):
    for method in METHODS:
        for shape, n in ((SHAPES[1], 130), (SHAPES[2], 301)):
            check_all(*inputs(shape, n, n, dtype, device="cuda"), plan_for(method, shape, n, 32), tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# other promises

def test_large_logits_stay_finite():
    """Sixty times the usual queries: softmax is all on one key, and merging parts must not overflow."""
    shape = SHAPES[1]
    q, k, v = inputs(shape, 61, 61)
    for method in ("rope", "mesa", "rerope", "alibi"):
        check_all(60 * q, k, v, plan_for(method, shape, 61, 32), tolerance=1e-4)


def test_far_positions_keep_their_precision():
    """Angles are computed in float64: float32 ones would be off by 1.5e-3 at position 131,072."""
    n, shape = 131072, (1, 2, 2, 8)
    q, k, v = inputs(shape, 2, n)
    for method in ("rope", "rerope"):
        plan = plan_for(method, shape, n, 2048, torch.arange(n - 2, n))
        check(attend(q, k, v, plan), oracle(q, k, v, plan), tolerance=1e-5)


@pytest.mark.parametrize("method, rotary", [
    ("rope", {}), ("yarn", {"rotary_dim": 8}), ("rerope", {"interleaved": True}), ("mesa", {}), ("alibi", {})])
def test_gradient_of_auto_is_that_of_dense(method, rotary):
    """Whichever of q, k, v asks for it: fused autograd where the plan is causal, dense elsewhere, never half of one."""
    shape = SHAPES[1]
    plan = plan_for(method, shape, 37, 16, **rotary)
    for wanted in ("q", "k", "v", "qkv"):
        gradients = []
        for impl in ("auto", "dense"):
            tensors = dict(zip("qkv", inputs(shape, 37, 37)))
            for name in wanted:
                tensors[name].requires_grad_()
            attend(*tensors.values(), plan, impl).square().sum().backward()
            gradients.append([tensors[name].grad for name in wanted])
        for auto, dense in zip(*gradients):
            assert torch.allclose(auto, dense, rtol=0, atol=2e-5 * float(dense.abs().max())), wanted


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

torch.set_num_threads(1)
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


# ---------------------------------------------------------------------------------------------------------------------
# errors

@pytest.mark.parametrize("change", [
    {"q": (1, 4, 5, 8)}, {"k": (1, 2, 6, 8)}, {"q": (2, 4, 6, 8)}, {"q": (1, 3, 6, 8)},
    {"k": (1, 2, 6, 8), "v": (1, 2, 6, 8)}], ids=str)
def test_shapes_that_do_not_fit(change):
    shapes = {"q": (1, 4, 6, 8), "k": (1, 2, 7, 8), "v": (1, 2, 7, 8)} | change
    plan = plan_for("rope", (1, 4, 2, 8), 7, 32, torch.arange(1, 7))
    with pytest.raises(ValueError, match="fit together|the plan is for 6 queries and 7 keys"):
        attend(*(torch.zeros(shape) for shape in shapes.values()), plan)


@pytest.mark.parametrize("impl, words", [("flash", "flash.*tiled"), ("tiled", "gradient"), ("triton", "gradient")])
def test_what_an_implementation_cannot_do(impl, words):
    """There is none of that name, or it has no gradient."""
    q, k, v = inputs(SHAPES[1], 37, 37)
    with pytest.raises(ValueError, match=words):
        attend(q, k.requires_grad_(), v, plan_for("mesa", SHAPES[1], 37, 16), impl)


@pytest.mark.parametrize("method, params", [("streaming-llm", {"recent": 300}), ("rerope", {"window": 200})])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_wide_windows_are_triangles_without_a_mask(method, params, dtype, tolerance):
    q, k, v = inputs((1, 2, 1, 8), 1000, 1000, dtype)
    plan = plan_for(method, (1, 2, 1, 8), 1000, 400, **params)
    kinds = set()
    for number in range(len(plan.regions)):
        for _, pieces in tiles.region_tiles(plan, number, 256, plan.Tk, fused=True):
            kinds |= {kind for _, _, kind in pieces}
    assert {"growing", "shrinking"} <= kinds and "edge" not in kinds
    check(attend(q, k, v, plan, "tiled"), oracle(q, k, v, plan), tolerance)
