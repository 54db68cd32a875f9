"""single_row.py: every way computes the same, any of them can be taken, and the fastest is found by timing."""
import itertools
import shutil

import pytest
import torch
from oracle import oracle
from test_attention import check, inputs, plan_for

import attention
import single_row
from attention import attend
from config import Config
from model import Llama
from plan import Plan, Region
from single_row import ATTENTIONS, PRODUCTS, Ways, attention_sums, fastest, fastest_ways, row_sums

SHAPE = (2, 4, 2, 16)  # B, H, Hkv, D
PLAIN = [name for name in ATTENTIONS if name != "compiled"]


def small_model(**fields):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, train_len=32)
    return Llama(Config(**sizes, **fields)).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("way", [PRODUCTS["linear"], PRODUCTS["mv"], row_sums])
def test_products_are_the_same(way, dtype, tolerance):
    x = torch.randn(1, 96).to(dtype)
    weight = torch.randn(40, 96).to(dtype)
    check(way(x, weight), x.double() @ weight.double().T, tolerance)


@pytest.mark.parametrize("method", ["rope", "rerope", "dca", "mesa", "streaming-llm", "alibi"])
@pytest.mark.parametrize("way", [*(ATTENTIONS[name] for name in PLAIN), attention_sums])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_attentions_are_the_same(method, way, dtype, tolerance):
    q, k, v = inputs(SHAPE, 1, 91, dtype)
    plan = plan_for(method, SHAPE, 90, 32, torch.tensor([90]), torch.arange(91))
    check(attend(q, k, v, plan, row=way), oracle(q, k, v, plan), tolerance)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_ways():
    q, k, v = inputs((1, 4, 2, 16), 1, 91)
    plan = plan_for("rerope", (1, 4, 2, 16), 90, 32, torch.tensor([90]), torch.arange(91))
    check(attend(q, k, v, plan, row=ATTENTIONS["compiled"]), oracle(q, k, v, plan))
    for rows in (40, 24):
        x = torch.randn(1, 96)
        weight = torch.randn(rows, 96)
        check(PRODUCTS["compiled"](x, weight), x.double() @ weight.double().T)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_any_way_can_be_taken(tied, monkeypatch):
    """And is taken: by each product of a decoding step, and by the attention of each layer."""
    calls = []

    def counted(table, name):
        way = table[name]
        return lambda *args: calls.append(name) or way(*args)
    for table, name in [(PRODUCTS, "linear"), (PRODUCTS, "mv"), (ATTENTIONS, "flash"), (ATTENTIONS, "matmul")]:
        monkeypatch.setitem(table, name, counted(table, name))
    model = small_model(tie_word_embeddings=tied)
    token = torch.tensor([[7]])
    want = model(token, model.plan("mesa", n=1))
    for product, row in itertools.product(["linear", "mv"], PLAIN):
        calls.clear()
        model.use_ways(Ways(product, row))
        check(model(token, model.plan("mesa", n=1)), want.double())
        assert calls.count(product) == 15 and calls.count(row) == 2 and len(calls) == 17


def test_the_fastest_is_found_by_timing_and_compiled_only_where_it_pays(monkeypatch):
    now = 0.0
    seconds = {"slow": 2.0, "quick": 1.0, "compiled": 0.5}
    ran = []

    def run(way):
        nonlocal now
        ran.append(way)
        now += seconds[way]
    monkeypatch.setattr(single_row.time, "perf_counter", lambda: now)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    table = {name: name for name in seconds}
    assert fastest(table, run, floor=0.5, times=10) == "quick" and "compiled" not in ran  # 10 * (1 - 0.5) seconds
    assert fastest(table, run, floor=0.5, times=100) == "compiled"
    assert fastest(table, run, floor=1.0, times=10 ** 9) == "quick"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert fastest(table, run, floor=0.5, times=100) == "quick"


def test_small_models_are_not_timed_and_larger_ones_are(monkeypatch):
    model = small_model()
    monkeypatch.setattr(single_row, "medians", None)  # no timing
    assert fastest_ways(model, tokens=10 ** 9) == Ways("mv", "flash")
    monkeypatch.undo()
    monkeypatch.setattr(single_row, "LEAST", 2 ** 14)
    ways = fastest_ways(model)
    assert ways.product in ("linear", "mv") and ways.attention in PLAIN


def test_without_a_flash_kernel_a_row_attends_by_matmul(monkeypatch):
    """As on MPS, and on CUDA without Triton, whatever way was asked for."""
    q, k, v = inputs(SHAPE, 1, 30)
    plan = plan_for("rerope", SHAPE, 29, 10, torch.tensor([29]), torch.arange(30))
    monkeypatch.setattr(attention, "has_flash", lambda q: False)
    check(attend(q, k, v, plan, row=None), oracle(q, k, v, plan))
    check(attend(q, k, v, plan, row=lambda *_: 1 / 0), oracle(q, k, v, plan))


def test_a_way_that_is_not_there_changes_nothing():
    model = small_model()
    with pytest.raises(ValueError, match="unknown way to multiply 'lin'"):
        model.use_ways(Ways(product="lin"))
    assert model.ways == Ways()


@pytest.mark.parametrize("queries", [1, 3])
def test_regions_in_which_nothing_is_seen(queries):
    """A geometry may leave them, and so may who makes a Plan by hand: the Plan drops them."""
    i = torch.arange(30 - queries, 30)
    whole = plan_for("rope", SHAPE, 30, 64, i, torch.arange(30))
    region = whole.regions[0]
    nothing = Region(region.q_pos, region.k_pos + 1, region.start + 5, region.start + 4)
    q, k, v = inputs(SHAPE, queries, 30)
    got = attend(q, k, v, Plan([region, nothing], whole.inv_freq), "tiled")
    check(got, oracle(q, k, v, whole))
    with pytest.raises(ValueError, match="no query sees a key"):
        Plan([nothing], whole.inv_freq)
