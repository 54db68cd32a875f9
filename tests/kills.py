"""SIGKILL at random moments: an evaluation, a batch and a training each lose nothing that was finished, and end with
the files of a run that was not killed.

Does: fork, so that a run costs no imports; kill it after a random part of the time that a whole run takes; look at its
files; start it again, until it ends by itself. Does not: run in CI, as it takes minutes.

    python tests/kills.py --n 200 --seed 0
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import eval_passkey
import fuzz
import generate
import train
from cli import run_command


def evaluation(folder):
    return eval_passkey.run, ["--ckpt", "ckpt", "--methods", "rope,rerope,mesa", "--lengths", "120,150,200", "--depths",
                              "2", "--trials", "1", "--results", str(folder / "rows.jsonl")]


def batch(folder):
    lines = [json.dumps({"ids": [5 + number % 9] * (1 + number)}) for number in range(24)]
    (folder / "prompts").write_text("\n".join(lines))
    return generate.run, ["--ckpt", "ckpt", "--prompts", str(folder / "prompts"), "--out", str(folder / "rows.jsonl"),
                          "--rows", "3", "--max-new-tokens", "9"]


def training(folder):
    return train.run, ["--out", str(folder), "--steps", "8", "--save-every", "1", "--width", "16", "--layers", "1",
                       "--heads", "2", "--window", "160", "--grow", "0", "--warmup", "2", "--vocab", "400", "--batch",
                       "6", "--compute", "float32"]


WORK = [evaluation, batch, training]


def start(script, argv):
    """The process id of a script that runs in a fork of this process."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            run_command(partial(script, argv), "kills")
        except SystemExit as end:
            os._exit(end.code or 0)
        finally:
            os._exit(1)
    return child


def finished(folder):
    """What a run has finished so far: rows of results, or the step of a training."""
    rows = folder / "rows.jsonl"
    if rows.exists():
        return {line for line in rows.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")}
    state = folder / "training-state.pt"
    return set(range(torch.load(state, weights_only=True)["step"])) if state.exists() else set()


def outcome(folder):
    """{file: contents} of a finished run, without what depends on the clock and on its place."""
    found = {}
    for file in sorted(folder.iterdir()):
        found[file.name] = file.read_bytes()
    if "training.json" in found:
        record = json.loads(found["training.json"])
        del record["command"], record["date"]
        for entry in record["curve"]:
            del entry["seconds"]
        found["training.json"] = record
    return found


def new_folder(name):
    folder = Path(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def kill_until_done(work, rng, seconds, most):
    """(kills, what went wrong or None) of one run: killed at random moments, at most so often, then left alone."""
    folder = new_folder(work.__name__)
    script, argv = work(folder)
    kills = 0
    while True:
        before = finished(folder)
        child = start(script, argv)
        if kills < most:
            time.sleep(rng.random() * seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            return kills, None if status == 0 else f"exit code {os.WEXITSTATUS(status)} after {kills} kills"
        kills += 1
        is_done = (folder / "training.json").exists() and not (folder / "training-state.pt").exists()
        if is_done and finished(folder) == set():
            return kills, None
        lost = before - finished(folder)
        if lost:
            return kills, f"lost {len(lost)} of {len(before)} after {kills} kills"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    counts = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        fuzz.make_checkpoint(Path("ckpt"))
        whole = {}
        seconds = {}
        for work in WORK:
            folder = new_folder(work.__name__)
            begin = time.monotonic()
            _, status = os.waitpid(start(*work(folder)), 0)
            seconds[work] = time.monotonic() - begin
            whole[work] = outcome(folder)
            if status != 0:
                sys.exit(f"{work.__name__}: a run that was not killed failed")
        while sum(counts.values()) < args.n:
            work = min(WORK, key=lambda each: counts[each.__name__])
            kills, wrong = kill_until_done(work, rng, seconds[work], args.n - sum(counts.values()))
            counts[work.__name__] += kills
            found = outcome(Path(work.__name__))
            different = [name for name in {**found, **whole[work]} if found.get(name) != whole[work].get(name)]
            if wrong or different:
                failed += 1
                print(f"FAILED {work.__name__}: {wrong or 'another outcome'}; different: {different}", flush=True)
            print(f"{sum(counts.values())} kills ({dict(counts)}), {failed} failed", flush=True)
        os.chdir("/")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
