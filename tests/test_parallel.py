"""Several processes: every method over ranks against one process, what travels, what ends them, shared evaluations.

Processes are started as torchrun starts them, by hand where ranks are to differ, and by torchrun itself once.
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from ddp_case import TEXTS
from parallel_cases import SHAPES

import eval_passkey
import eval_perplexity
import generate
import train
from attention import attend_dense, attend_part, merge_parts
from checkpoint import UNFINISHED, find_checkpoint
from cli import agreed
from config import Config
from geometry import METHODS
from memory import estimate
from model import load
from parallel import Holdings, Sizes, borders, errand, key_bytes, sections, shares, sinks, traffic, waves
from plan import distance, is_seen
from positions import Method, make_plan
from ranks import Pulse, Ranks, verdict
from shards import COLUMNS, ROWS, load_shard, local_config
from tiles import NEVER

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def plan_of(method, n=211, i=None, **params):
    """A Plan for queries i, default all, of n tokens and a window of 40."""
    i = torch.arange(n) if i is None else i
    return make_plan(method, i, torch.arange(n), n=n, L=40, D=16, H=4, **params)


# ---- parts of attention

def random_inputs(Tq, Tk):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, T, 16, generator=generator) for heads, T in ((4, Tq), (2, Tk), (2, Tk))]


@pytest.mark.parametrize("impl", ["dense", "tiled", "triton"])
@pytest.mark.parametrize("method", ["rope", "mesa", "alibi", "streaming-llm"])
@pytest.mark.parametrize("decoding", [False, True])
def test_parts_over_slices_of_the_keys_merge_to_the_whole(impl, method, decoding):
    """Three slices of keys, one of them not contiguous; many queries see nothing of some."""
    if impl == "triton":
        pytest.importorskip("triton", minversion="3.4")
    plan = plan_of(method, 97, torch.tensor([96]) if decoding else None)
    q, k, v = random_inputs(plan.Tq, 97)
    j = torch.arange(97)
    outs, lses = [], []
    for keys in (j[:30], j[30:60], torch.cat((j[60:70], j[80:])), j[70:80]):
        part = plan.of_keys(keys)
        if part is not None:
            out, lse = attend_part(q, k[:, :, keys], v[:, :, keys], part, impl)
            unseen = torch.stack([r.end <= r.start for r in part.regions]).all(0)
            assert (lse[:, :, unseen] <= NEVER / 2).all() and not out[:, :, unseen].any()
            outs.append(out)
            lses.append(lse)
    out, _ = merge_parts(torch.stack(outs), torch.stack(lses))
    assert (out - attend_dense(q, k, v, plan)).abs().max() < 2e-5


def test_what_sees_nothing_merges_to_nothing():
    out, lse = merge_parts(torch.zeros(2, 1, 4), torch.full((2, 1), NEVER))
    assert not out.any() and lse <= NEVER / 2


def test_seen_keys_are_those_of_the_matrix():
    plan = plan_of("mesa:overlap=5", i=torch.arange(90, 130))
    assert torch.equal(is_seen(plan), (~distance(plan).isnan()).any(0))


# ---- how a prompt is shared out

def test_shares_by_hand():
    assert shares(0, 70, 3, torch.tensor([10, 20, 30, 40, 50, 60])) == [(0, 20), (20, 50), (50, 70)]
    assert shares(0, 30, 4, torch.tensor([10, 20])) == [(0, 10), (10, 10), (10, 20), (20, 30)]
    assert shares(5, 16, 3, torch.tensor([])) == [(5, 9), (9, 12), (12, 16)]


def test_a_plan_says_where_it_can_be_cut():
    """Mesa with first 2, chunk 4: chunks [0,2) [2,6) [6,10) [10,12), the last by another rule."""
    plan = make_plan("mesa:first=2:chunk=4:width=2", torch.arange(16), torch.arange(16), n=16, L=6, D=16, H=1)
    assert sections(plan, 0, 15) == [(0, 14), (14, 15)]
    assert sinks(plan, 12) == 2 and sinks(plan, 15) == 0
    assert borders(plan, slice(0, 14), 2).tolist() == [6, 10]
    plan = plan_of("streaming-llm")
    assert sections(plan, 0, 210) == [(0, 210)] and sinks(plan, 209) == 4 and not len(borders(plan, slice(0, 210), 4))
    assert sinks(plan_of("rerope"), 209) == 0 and sections(plan_of("rerope"), 0, 210) == [(0, 210)]


@pytest.mark.parametrize("N", [1, 2, 3, 7])
@pytest.mark.parametrize("method", ["rope", "mesa", "mesa:overlap=5", "lm-infinite"])
@pytest.mark.parametrize("piece", [10, 8192])
def test_every_token_is_read_and_owned_once(method, N, piece):
    holdings = Holdings.none(N)
    for wave in waves(plan_of(method), 0, 210, N, piece):
        holdings.add(wave)
        assert len(wave.ranges) == N
    holdings.grow(1)
    assert torch.cat(holdings.own).sort()[0].tolist() == list(range(211))
    assert all(bool((own.diff() > 0).all()) for own in holdings.own)


@pytest.mark.parametrize("overlap", [0, 5])
@pytest.mark.parametrize("N", [2, 3, 4])
def test_middle_chunks_of_mesa_need_nothing_but_the_halo(N, overlap):
    plan = plan_of(f"mesa:overlap={overlap}")
    holdings = Holdings.none(N)
    middle = waves(plan, 0, 210, N, 8192)[0]
    assert middle.copied == 2 and middle.ranges[-1][1] == sections(plan, 0, 210)[0][1]
    holdings.add(middle)
    sizes = Sizes(1, 4, 2, 16, 4)
    for asker in range(N):
        for owner in range(N):
            found = holdings.errand(plan, 0, middle, asker, owner, sizes) if asker != owner else None
            is_neighbour = overlap and owner == asker - 1
            assert (found is not None) == bool(is_neighbour)
            if found:
                assert found.by_keys and len(found.keys) == overlap


@pytest.mark.parametrize("N", [2, 3, 4])
def test_a_causal_prompt_fetches_what_the_formula_says(N):
    """n(N - 1)/2 tokens of keys and values, where fetching them is cheaper than to send the queries."""
    n = 12 * N + 1
    sent, tokens = traffic(plan_of("rope", n), n, N, Sizes(1, 4, 1, 16, 4))
    assert sent["keys"] == key_bytes(Sizes(1, 4, 1, 16, 4), 12 * N * (N - 1) // 2)
    assert sent["merge"] == N * 4 * 4 * 17 * (N - 1) and sorted(tokens) == [12] * (N - 1) + [13]


def test_an_errand_takes_the_cheaper_way():
    """Two queries at the end see 100 keys: queries travel; many queries and few keys: keys do."""
    sizes = Sizes(1, 4, 2, 16, 4)
    few = errand(plan_of("rope", i=torch.tensor([200, 201])), torch.arange(100), 0, sizes)
    many = errand(plan_of("rope", i=torch.arange(50, 211)), torch.arange(20), 0, sizes)
    assert not few.by_keys and many.by_keys and len(few.keys) == 100 and few.rows == slice(0, 2)
    assert errand(plan_of("sliding", i=torch.arange(150, 211)), torch.arange(20), 0, sizes) is None


# ---- every method, on processes of their own

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(*commands, **options):
    """A process for each command, as torchrun would start them; rank 0's output is read, and every rank's errors."""
    port = str(free_port())
    processes = []
    for rank, command in enumerate(commands):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(commands)),
                 "LOCAL_WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(subprocess.Popen([sys.executable, *map(str, command)], env={**PLAIN, **place}, cwd=ROOT,
                                          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                          stdin=subprocess.DEVNULL, **options))
    return processes


def ends(processes, seconds=60):
    """[(exit code, stdout, stderr)] of processes that end in time."""
    limit = time.monotonic() + seconds
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1, limit - time.monotonic()))
            err = "\n".join(line for line in err.splitlines() if not re.match(r"\[[WE]\d+|\[rank", line))
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.fixture(scope="module")
def found_by_ranks():
    """What parallel_cases.py says: {"keys": of every method by 2 and 3 ranks, "shards": of matrices cut in two}."""
    found = ends(start(["tests/parallel_cases.py"]), 300)  # which forks itself
    assert found[0][0] == 0, found
    return json.loads(found[0][1].splitlines()[-1])


def test_every_method_gives_the_tokens_and_logits_of_one_process(found_by_ranks):
    """Each by two ranks, one of each shape by three; also with a layer of its own, and with a cache of int8."""
    rows = found_by_ranks["keys"]
    assert {row["name"] for row in rows if row["N"] == 2} > set(METHODS)
    assert {row["name"] for row in rows if row["N"] == 3} == set(SHAPES)
    for row in rows:
        assert row["same"] and row["error"] < 1e-4, row


def test_what_is_sent_is_what_the_formula_says(found_by_ranks):
    for row in found_by_ranks["keys"]:
        assert row["sent"] == row.get("formula", row["sent"]), row


def test_the_memory_that_is_said_is_what_the_fullest_rank_holds(found_by_ranks):
    """A rank holds copies, of the first chunk or of sinks, only while it reads."""
    for row in found_by_ranks["keys"]:
        held = row.get("held", 0)
        assert held <= row.get("estimate", 0) <= 1.15 * held, row


def test_a_rank_needs_less_than_one_process():
    config, n = Config.from_hf(find_checkpoint("tiny")), 4000
    for method in ("rope", "mesa", "streaming-llm"):
        one, two, four = (estimate(config, Method(method), [n], 10, torch.float32, N=N) for N in (1, 2, 4))
        assert one.weights == two.weights == four.weights
        assert two.activations > four.activations and two.cache > 1.7 * four.cache
    assert estimate(config, Method("rope"), [1], 1, torch.float32, N=3).cache  # no wave at all


# ---- tensor parallel

def test_matrices_cut_in_two_give_the_tokens_and_logits_of_one_process(found_by_ranks):
    """Rope, Mesa, ALiBi and CosScale; the last case with the keys spread over two ranks as well."""
    assert len(found_by_ranks["shards"]) == 5
    for row in found_by_ranks["shards"]:
        assert row["same"] and row["error"] < 1e-4 and row["sent"]["sums"], row


@pytest.mark.parametrize("folder", ["tiny", "tiny-alibi"])
def test_the_parts_of_all_ranks_are_the_whole_checkpoint(folder):
    """Each in memory of its own, the float weights of its heads and channels alone; ALiBi's slopes are cut as well."""
    whole, _ = load(folder, dtype=None)
    path = find_checkpoint(folder)
    shards = [load_shard(path, whole.config, Ranks(rank, 2)) for rank in range(2)]
    for name, weight in whole.named_parameters():
        parts = [dict(shard.named_parameters())[name] for shard in shards]
        dim = 0 if name.split(".")[-2] in ROWS else 1 if name.split(".")[-2] in COLUMNS else None
        found = parts[0] if dim is None else torch.cat(parts, dim)
        assert torch.equal(found, weight) and all(part.is_contiguous() for part in parts)
        assert dim is None or parts[0].untyped_storage().nbytes() == weight.nbytes // 2
    slopes = whole.plan(n=9).slopes
    if slopes is not None:
        assert torch.equal(torch.cat([shard.plan(n=9).slopes for shard in shards]), slopes)


def test_what_does_not_divide_is_said():
    config = Config.from_hf(find_checkpoint("tiny"))
    with pytest.raises(ValueError, match="--tensor-parallel 3 does not divide num_attention_heads 4"):
        local_config(config, 0, 3)
    with pytest.raises(ValueError, match="a multiple of 2 processes, not 1"):
        Ranks().split(2)


# ---- what several processes do not do

def test_several_prompts_are_for_one_process():
    with pytest.raises(ValueError, match="several prompts are answered in one process, not under torchrun"):
        generate.run(["--prompt-file", "a", "--prompt-file", "b"], Ranks(0, 2))


def test_a_model_of_transformers_is_not_shared_out(tmp_path):
    """Its trials are: each rank then works alone."""
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    for share, processes, parts in (("keys", 2, 1), ("trials", 1, 2)):
        with pytest.raises(ValueError, match="through transformers is not shared out among processes"):
            agreed(Ranks(0, processes), Namespace(share=share, tensor_parallel=parts, timeout=9.0), tmp_path)
    agreed(Ranks(), Namespace(share="keys", tensor_parallel=1, timeout=9.0), tmp_path)


def test_a_fit_is_for_one_process():
    with pytest.raises(ValueError, match="--fit-lampe and --probe run in one process"):
        eval_perplexity.run(["--probe"], Ranks(0, 2))


# ---- what ends them

def test_who_is_to_blame():
    fine = Pulse("computing", 1, 1, False)
    late = Pulse("waiting", 1, 40, False)
    assert verdict([fine, fine], 30) is None
    assert verdict([fine, Pulse("computing", 1, 1, True)], 30) == (1, "has died")
    assert verdict([fine, Pulse("done", 99, 99, True)], 30) is None
    assert verdict([Pulse("alone", 31, 50, False), fine], 30) == (0, "has not answered for 30 seconds")
    assert verdict([late, fine], 30) is None
    assert verdict([late, Pulse("computing", 1, 31, False)], 30)[0] == 1
    assert verdict([late, Pulse("starting", 1, 31, False)], 30) is None
    assert verdict([late, late], 30)[0] == 0
    assert verdict([Pulse("asking", 1, 999, False)] * 2, 30) is None


def generating(*flags):
    return ["generate.py", "--method", "mesa", "--max-new-tokens", "100000", *flags]


def test_ranks_that_disagree_end_with_one_line():
    prompts = [generating("--prompt", text) for text in ("The sky", "The sky", "The sea")]
    found = ends(start(*prompts))
    assert [code for code, _, _ in found] == [2, 2, 2]
    assert [err for _, _, err in found] == ["generate.py: rank 2 has another prompt than the other ranks", "", ""]


def test_an_error_of_one_rank_ends_all_with_its_line():
    found = ends(start(generating(), generating("--ckpt", "nowhere")))
    assert [code for code, _, _ in found][1] == 2 and all(code for code, _, _ in found)
    lines = "".join(err for _, _, err in found).splitlines()
    assert [line for line in lines if "rank" in line] == [line for line in lines if "nowhere" in line]
    assert "generate.py: rank 1: no checkpoint folder nowhere" in "\n".join(lines)


def test_a_rank_that_hangs_is_named():
    processes = start(*[generating("--timeout", "5")] * 2)
    processes[0].stdout.read(1)                # the first token
    os.kill(processes[1].pid, signal.SIGSTOP)
    found = ends(processes[:1])
    processes[1].kill()
    assert all(code for code, _, _ in found)
    said = [line for _, _, err in found for line in err.splitlines() if "rank 1" in line]
    assert len(said) == 1 and "has not answered for 5 seconds; all ranks end" in said[0]


def test_a_killed_rank_ends_the_others_with_one_line():
    """By torchrun, as users start it."""
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *generating()],
                           env=PLAIN, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.read(1)                         # the first token
    victim = next(pid for pid in children(run.pid) if environment(pid).get("RANK") == "1")
    os.kill(victim, signal.SIGKILL)
    [(code, _, err)] = ends([run])
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("generate.py: ")]
    assert len(said) == 1 and said[0].startswith(f"generate.py: rank 1 (process {victim} on ")
    assert said[0].endswith("has died; all ranks end")


def children(pid):
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment(pid):
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


# ---- evaluations whose trials are shared out

def passkeys(results, *flags):
    return ["eval_passkey.py", "--methods", "rope,mesa", "--lengths", "256,300", "--depths", "2", "--trials", "2",
            "--results", results, *flags]


def results_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_evaluation_runs_each_trial_once(tmp_path, monkeypatch):
    """By two ranks that share out the trials, and by two that share the keys of each; also after half a line."""
    monkeypatch.chdir(ROOT)
    assert eval_passkey.run([str(x) for x in passkeys(tmp_path / "one")][1:]) == 0
    want = {key_of(row): row for row in results_of(tmp_path / "one")}
    whole = (tmp_path / "one").read_text().splitlines(keepends=True)
    (tmp_path / "trials").write_text(whole[0] + whole[-1] + whole[3][:40])
    for ranks, share in ((2, "trials"), (2, "keys")):
        found = ends(start(*[passkeys(tmp_path / share, "--share", share)] * ranks))
        assert [code for code, _, _ in found] == [0] * ranks, found
        assert "| mesa |" in found[0][1] and not found[1][1]
        rows = results_of(tmp_path / share)
        assert len(rows) == len(want) and {key_of(row): row["answer"] for row in rows} == {
            key: row["answer"] for key, row in want.items()}


def key_of(row):
    return row["method"], row["length"], row["cell"], row["trial"]


# ---- training

SMALL = ("--batch 7 --window 160 --vocab 400 --width 16 --layers 1 --heads 2 --kv-heads 1 --save-every 2 "
         "--compute float32").split()


def test_two_ranks_train_as_one_process_does(tmp_path, monkeypatch):
    """The same batch, rows shared out unevenly; then a run of which a rank is killed, which the same command ends."""
    monkeypatch.setattr(train, "prose", lambda: TEXTS)
    threads = torch.get_num_threads()
    assert train.run(["--out", str(tmp_path / "one"), "--steps", "6", *SMALL]) == 0
    torch.set_num_threads(threads)
    found = ends(start(*[["tests/ddp_case.py", "--out", tmp_path / "two", "--steps", "6", *SMALL]] * 2))
    assert [code for code, _, _ in found] == [0, 0], found
    curves = [json.loads((tmp_path / name / "training.json").read_text())["curve"] for name in ("one", "two")]
    for one, two in zip(*curves, strict=True):
        for name in ("prose", "passkey", "lines", "kv"):
            assert one[name] == pytest.approx(two[name], abs=1e-3), name

    again = ["tests/ddp_case.py", "--out", tmp_path / "killed", "--steps", "400", *SMALL]
    processes = start(again, again)
    while "step 2" not in processes[0].stderr.readline():
        assert processes[0].poll() is None
    processes[1].kill()
    found = ends(processes)
    assert found[0][0] not in (0, None)
    assert [line for line in found[0][2].splitlines() if "rank 1" in line and "has died; all ranks end" in line]
    assert (tmp_path / "killed" / UNFINISHED).exists()
    processes = start(again, again)
    lines = [processes[0].stderr.readline() for _ in range(3)]
    ends_early(processes)
    assert any("continuing after step" in line for line in lines), lines


def ends_early(processes):
    for process in processes:
        process.kill()
        process.communicate()
