"""Train the tiny LLaMAs that ship in checkpoints/, each on one CPU core in less than an hour.

Does: collect the prose that comes with every Python (help topics, docstrings), train a sentencepiece model on it,
then a LLaMA on a mix of prose, passkey prompts, and records of lines and of key-value pairs, of every length up to its
window; or start from the weights and the tokenizer of another such model (--init). Writes a Hugging Face folder and
training.json, the record of the run. An interrupted run, also a killed one, continues from its last save when the same
command is given again, and ends in the same weights: batches depend on (seed, step) alone.

Does not: read any other data, or show the model a position beyond --window. Whatever the model does out there is the
doing of the extrapolation method.

    python train.py --out start --cosine 16 --store bfloat16 --steps 2000 --grow 1000
    python train.py --out middle --init start --steps 1200 --grow 100 --lr 1.5e-3
    python train.py --out checkpoints/tiny --init middle --steps 1000 --warmup 50 --grow 1 --lr 2e-3
    python train.py --out checkpoints/tiny-cosine --init start --cosine 16 --store bfloat16 --steps 600 --grow 100
    python train.py --out checkpoints/tiny-nope --position nope --store bfloat16 --steps 2000 --grow 1000
"""
import argparse
import ast
import datetime
import json
import math
import os
import platform
import pydoc_data.topics
import random
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save

from eval_passkey import PAIRS, RECORDS, TASKS, WORDS, entries
from generate import FILLER, NEEDLE, QUESTION, STATE, TASK, cycled, number, passkey_parts
from model import ENCODINGS, Config, Llama, Tokenizer, load_model, load_tokenizer
from positions import run_command

ANSWER = "{key}."              # what follows QUESTION; sentencepiece puts the space in front
MIX = ("kv", "prose", "kv", "lines", "passkey", "lines")  # kinds of rows, over and over
MUON = 7                       # its learning rate over that of AdamW


# ---------------------------------------------------------------------------------------------------------
# prose that every machine with a Python has

def docstrings(file):
    """The longer docstrings of one source file, each on one line; none where the file does not parse."""
    try:
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented))
    return [" ".join(text.split()) for text in texts if len(text) > 200]


def prose():
    """The documents: Python's help topics, then the docstrings of its standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = [file for file in sorted(root.rglob("*.py")) if not skipped & set(file.relative_to(root).parts)]
    topics = [" ".join(text.split()) for _, text in sorted(pydoc_data.topics.topics.items())]
    return topics + [text for file in files for text in docstrings(file)]


def train_tokenizer(path, documents, vocab_size):
    """LLaMA's kind of sentencepiece model: BPE, a piece per digit, bytes for rare characters."""
    # Repeated, the passkey sentences get a piece per word: a short needle rarely meets the border of a chunk.
    texts = [TASK, FILLER, NEEDLE, QUESTION, *(text for record in RECORDS.values() for text in record)]
    sentences = [text.format(key=71432, name="", value=52908) for text in texts] * 500 + [" ".join(WORDS)] * 500
    lines = [text[k:k + 2000] for text in documents for k in range(0, len(text), 2000)]
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences + lines), model_writer=file, model_type="bpe",
                vocab_size=vocab_size, byte_fallback=True, split_digits=True, character_coverage=0.9995,
                normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2)
        except RuntimeError as error:
            raise ValueError(f"--vocab {vocab_size}: {str(error).strip().splitlines()[-1]}") from None
    os.replace(part, path)


@dataclass
class Corpus:
    """What batches are drawn from."""
    tokenizer: Tokenizer
    documents: list[str]
    sentences: list[str]   # of 20 to 120 characters, to repeat as filler
    stream: list[int]      # all documents in random order, each between <s> and </s>
    shortest: int          # tokens of the shortest prompt and its answer, of any task
    longest: str           # of WORDS, in tokens


def make_corpus(args, tokenizer, documents, config):
    """The Corpus of these documents."""
    sentences = [part.strip() + "." for text in documents for part in text.split(". ")]
    sentences = [text for text in sentences if 20 <= len(text) <= 120]
    stream = []
    for text in random.Random(args.seed).sample(documents, len(documents)):
        stream += tokenizer.encode(text, bos=True) + [config.eos_token_id[0]]
    name = max(WORDS, key=lambda word: len(tokenizer.encode(word)))
    fixed = [(TASK, NEEDLE, QUESTION, ANSWER), *RECORDS.values()]
    shortest = 1 + max(len(tokenizer.encode(" ".join(texts).format(key=71432, name=name, value=52908)))
                       for texts in fixed)
    if shortest > args.window:
        raise ValueError(f"--window {args.window}: the shortest prompt and its answer take {shortest} tokens")
    return Corpus(tokenizer, documents, sentences, stream, shortest, name)


# ---------------------------------------------------------------------------------------------------------
# one batch: a function of (seed, step)

def random_filler(rng, corpus):
    """The evaluation's own filler, repeated sentences, prose, word salad, or sentences with numbers."""
    kind = rng.random()
    text = rng.choice(corpus.documents)
    if kind < 0.30:
        return FILLER
    if kind < 0.55:
        return " ".join(rng.choices(corpus.sentences, k=rng.randint(1, 8)))
    if kind < 0.75:
        start = rng.randrange(max(1, len(text) - 1500))
        return text[start:start + 1500]
    words = rng.choices(text.split(), k=rng.randint(5, 200))
    if kind < 0.90:
        return " ".join(words)
    return " ".join(f"The {word} is {rng.randint(0, 99999)}." for word in words[:30])


def passkey_row(rng, corpus, length, eos):
    """(length + 1 ids, length weights of the loss): a passkey prompt, its answer, and </s>."""
    key, encode = str(rng.randint(10000, 99999)), corpus.tokenizer.encode
    answer = encode(ANSWER.format(key=key), bos=False) + [eos]
    before, needle, after = passkey_parts(
        corpus.tokenizer, length + 1 - len(answer), rng.random(), key, random_filler(rng, corpus))
    cut, gap = len(needle), 0
    if rng.random() < 0.2:  # filler inside the needle, as where the border of a chunk cuts it
        cut, gap = rng.randrange(1, cut), rng.randint(0, len(after) - len(encode(QUESTION, bos=False)))
    ids = before + needle[:cut] + after[:gap] + needle[cut:] + after[gap:]
    weights = [0.1] * (len(ids) - 1) + [8.0] * len(answer)  # filler need not be predicted
    digits = answer[1:-2]
    for k in [k for k in range(len(ids)) if ids[k:k + len(digits)] == digits][1:]:
        weights[k - 1:k - 1 + len(digits)] = [4.0] * len(digits)  # second mention: a first lesson in copying
    return ids + answer, weights


def record_row(rng, task, corpus, length, eos):
    """As passkey_row, for a record of lines or of key-value pairs: entries, half of the time the same entries again in
    another order, and a question with its answer. Each value that is said again is a lesson in finding it by its name;
    one name of eight is learned sooner than one of hundreds."""
    first, _, question, answer = RECORDS[task]
    encode, head = corpus.tokenizer.encode, corpus.tokenizer.encode(first)
    wide = length >= corpus.shortest + 40
    names = rng.choice((WORDS[:8], WORDS[:64], WORDS, PAIRS if wide else WORDS))
    name = "-".join([corpus.longest] * 2) if names is PAIRS else corpus.longest
    room = length - len(head) - len(encode((question + " " + answer).format(name=name, value=52908), bos=False)) - 4
    part = room // 2 if rng.random() < 0.5 else room  # all of it: what is asked may be as far as can be
    found = (entries(corpus.tokenizer, task, part, rng, names) or entries(corpus.tokenizer, task, room, rng, names)
             or entries(corpus.tokenizer, task, room, rng))
    name, value, _ = rng.choice(found)
    body, tail, weights = sum((ids for *_, ids in found), []), [], []
    told = len(encode(answer.format(value=value), bos=False))
    for *_, ids in rng.sample(found, len(found)):
        if len(body) + len(tail) + len(ids) <= room:
            tail, weights = tail + ids, weights + [0.1] * (len(ids) - told) + [8.0] * told
    before, after = (encode(text.format(name=name, value=value), bos=False) for text in (question, answer))
    ids = body + tail + before + after + [eos]
    pad = length + 1 - len(head) - len(ids)
    weights += [0.1] * len(before) + [8.0] * (len(after) + 1)
    ids = head + cycled(encode(FILLER, bos=False), pad) + ids
    return ids, [0.1] * (length - len(weights)) + weights


def batch(step, args, corpus, config):
    """(ids (B, T + 1), weights (B, T)) of a step, all rows as long, no padding: MIX, over and over.

    T grows to the window during the first args.grow steps: copying is found much sooner over short distances.
    """
    rng = random.Random(f"{args.seed}/{step}")
    longest = corpus.shortest + (args.window - corpus.shortest) * (step + 100) // (args.grow + 100)
    longest = min(longest, args.window)
    length = longest if rng.random() < 0.5 else rng.randint(corpus.shortest, longest)
    rows = []
    for kind in kinds(args.batch * args.window // length):
        if kind == "prose":
            start = rng.randrange(len(corpus.stream) - length)
            rows.append(([config.bos_token_id] + corpus.stream[start:start + length], [1.0] * length))
        elif kind == "passkey":
            rows.append(passkey_row(rng, corpus, length, config.eos_token_id[0]))
        else:
            rows.append(record_row(rng, kind, corpus, length, config.eos_token_id[0]))
    ids, weights = zip(*rows)
    return torch.tensor(ids), torch.tensor(weights)


def kinds(rows):
    """The kind of every row of a batch."""
    return [MIX[row % len(MIX)] for row in range(rows)]


# ---------------------------------------------------------------------------------------------------------
# the model and its folder

def new_model(args):
    """A LLaMA with fresh weights: the one place that decides its shape."""
    config = Config(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=args.width * 8 // 3 // 8 * 8,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        head_dim=args.width // args.heads, rms_norm_eps=1e-5, rope_theta=args.rope_theta,
        max_position_embeddings=args.window, train_len=args.window, tie_word_embeddings=True, dtype=args.store,
        freq=args.position, cosine_attention=args.cosine)
    model = Llama(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:  # norms stay at one; what writes to the residual starts smaller, as in GPT-2
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * args.layers) if writes else 0.02)
    return model


def start_from(folder, model):
    """Copy the weights of a checkpoint into a model of the same shape. Where its logits are s cos(q, k) and the model's
    are q.k/sqrt(D), queries and keys are made so long that these are about as large: |q| |k| = s sqrt(D)."""
    theirs, c = Config.from_hf(folder), model.config
    held = load_model(folder, theirs, torch.float32).state_dict()
    if {name: w.shape for name, w in held.items()} != {name: w.shape for name, w in model.state_dict().items()}:
        raise ValueError(f"{folder}: its matrices have not the shapes of these settings")
    if theirs.freq == c.freq == "rope" and theirs.rope_theta != c.rope_theta:
        raise ValueError(f"{folder}: trained with --rope-theta {theirs.rope_theta:g}, not {c.rope_theta:g}")
    model.load_state_dict(held)
    if theirs.cosine_attention and not c.cosine_attention:
        square = theirs.cosine_attention * math.sqrt(c.head_dim)
        for name, w in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                w.data *= (square / (c.head_dim * w.data.square().sum(1).mean())).sqrt()


def own_keys(config):
    """What config.json says of positions that Hugging Face's LLaMA does not know; nothing for a plain rotary model."""
    keys = {"position_encoding": config.freq, "cosine_attention": config.cosine_attention}
    return {name: value for name, value in keys.items() if value not in ("rope", None)}


def write_json(path, data):
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_folder(out, model):
    """The Hugging Face files beside tokenizer.model; the weights last, so a folder that has them is whole."""
    c = model.config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings",
             "tie_word_embeddings", "attention_bias", "mlp_bias")
    marks = {"bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id[0]}
    write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "rope_scaling": None, "torch_dtype": c.dtype, **{name: getattr(c, name) for name in sizes}, **marks,
        **own_keys(c)})
    write_json(out / "generation_config.json", marks)
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "legacy": True, "clean_up_tokenization_spaces": False,
        "model_max_length": c.max_position_embeddings})
    stored = getattr(torch, c.dtype)
    tensors = {name: weight.detach().to(stored).contiguous() for name, weight in model.named_parameters()}
    (out / "model.part").write_bytes(save(tensors, metadata={"format": "pt"}))
    os.replace(out / "model.part", out / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------
# the run

def settings(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description="Train a tiny LLaMA; an interrupted run continues.",
                                usage="%(prog)s --out FOLDER [flags]; --help lists them")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--steps", type=number(int, 1), default=2400)
    p.add_argument("--batch", type=number(int, len(MIX)), default=16,
                   help="rows of a step, if as long as the window; at least one of each kind")
    p.add_argument("--window", type=number(int, 64), default=256, help="longest input, in tokens")
    p.add_argument("--vocab", type=number(int, 300), default=1024)
    p.add_argument("--width", type=number(int, 1), default=128)
    p.add_argument("--layers", type=number(int, 1), default=5)
    p.add_argument("--heads", type=number(int, 1), default=4)
    p.add_argument("--kv-heads", type=number(int, 1), default=2)
    # LLaMA's 10,000 goes with a window of 2,048 or 4,096, where its slowest pair of channels turns 0.24 or 0.47
    # radians; 500 makes that 0.75 in 256 tokens. With 10,000 it is 0.05, and plain RoPE itself reaches four windows.
    p.add_argument("--rope-theta", type=number(float, 2), default=500.0)
    p.add_argument("--lr", type=number(float, 1e-9, 1), default=3e-3, help="the highest learning rate")
    p.add_argument("--init", metavar="FOLDER", help="start from the weights and the tokenizer of this checkpoint")
    p.add_argument("--position", choices=ENCODINGS, default="rope", help="how the model knows where tokens are")
    p.add_argument("--cosine", type=number(float, 1e-3), metavar="S", help="CosScale: logits are S cos(q, k)")
    p.add_argument("--warmup", type=number(int, 0), default=150, help="steps of rising learning rate")
    p.add_argument("--grow", type=number(int, 0), default=1000, help="steps over which rows grow to the window")
    p.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=1)
    p.add_argument("--compute", choices=("bfloat16", "float32"), default="bfloat16", help="type of products")
    p.add_argument("--store", choices=("bfloat16", "float32"), default="float32", help="type of the result")
    p.add_argument("--save-every", type=number(int, 1), default=100, help="steps between saves of the unfinished run")
    args = p.parse_args(argv)
    if args.width % args.heads or args.width // args.heads % 2 or args.heads % args.kv_heads:
        p.error("--heads must divide --width into even widths, and --kv-heads divide --heads")
    return args


class Muon(torch.optim.Optimizer):
    """Momentum whose every update of a matrix is made orthogonal (Keller Jordan, 2024): far fewer steps than AdamW."""

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                mean = self.state[w].setdefault("mean", torch.zeros_like(w))
                mean.lerp_(w.grad, 1 - group["momentum"])
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.add_(orthogonal(w.grad.lerp(mean, group["momentum"])),
                       alpha=-group["lr"] * max(1, w.shape[0] / w.shape[1]) ** 0.5)


def orthogonal(x, steps=5):
    """x with its singular values brought to 0.7 to 1.2, by Newton-Schulz iteration."""
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if tall else x).float()


def make_optimizers(model, lr):
    """Muon for matrices, but AdamW for embeddings, norms, and the products that decide where attention looks."""
    rest, matrices = [], []
    for name, weight in model.named_parameters():
        looks = weight.ndim == 1 or any(part in name for part in ("embed_tokens", "q_proj", "k_proj"))
        (rest if looks else matrices).append(weight)
    return [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0), Muon(matrices, MUON * lr)]


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to a fiftieth."""
    fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return args.lr * min((step + 1) / max(args.warmup, 1), fall)


def train_step(step, args, model, optimizers, corpus):
    """One update; returns (loss of prose, and for each of TASKS the share of right digits) on the batch before it."""
    ids, weights = batch(step, args, corpus, model.config)
    for optimizer, times in zip(optimizers, (1, MUON)):
        for group in optimizer.param_groups:
            group["lr"] = times * learning_rate(step, args)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.compute == "bfloat16"):
        logits = model(ids[:, :-1], model.plan(n=ids.shape[1] - 1))
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    loss = loss.view_as(weights)
    model.zero_grad()
    ((loss * weights).sum() / weights.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    # a row with an answer ends in five digits, "." or what else closes it, and </s>
    right = (logits[:, -7:-2].argmax(-1) == ids[:, -7:-2]).float().mean(1)
    where = {kind: torch.tensor([k == kind for k in kinds(len(ids))]) for kind in ("prose", *TASKS)}
    return torch.stack([loss[where["prose"]].mean(), *(right[where[task]].mean() for task in TASKS)]).detach()


def save_state(path, args, step, model, optimizers, curve):
    """Write the unfinished run so that a kill at any moment leaves the old file or the new one."""
    part = path.with_suffix(".part")
    torch.save({"settings": record(args), "step": step, "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers], "curve": curve}, part)
    os.replace(part, path)


def restore_state(path, args, model, optimizers):
    """(step, curve) of the unfinished run, loaded into model and optimizers; (0, []) where there is none."""
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    if state["settings"] != record(args):
        raise ValueError(f"{path}: an unfinished run with other settings; finish or delete it: {state['settings']}")
    model.load_state_dict(state["model"])
    for optimizer, held in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(held)
    return state["step"], state["curve"]


def record(args):
    """The settings that decide the weights, as plain data."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "save_every")}


def train(args, model, corpus):
    """All steps that are left; returns the curve, [{step, prose, passkey, lines, kv, seconds}]."""
    optimizers = make_optimizers(model, args.lr)
    done, curve = restore_state(args.out / STATE, args, model, optimizers)
    if done:
        print(f"continuing after step {done} of {args.steps}", file=sys.stderr, flush=True)
    start, seen = time.time() - (curve[-1]["seconds"] if curve else 0), []
    for step in range(done, args.steps):
        seen.append(train_step(step, args, model, optimizers, corpus))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            means = dict(zip(("prose", *TASKS), (round(x, 4) for x in torch.stack(seen).mean(0).tolist())))
            curve.append({"step": step + 1, **means, "seconds": round(time.time() - start)})
            print(*(f"{name} {value}" for name, value in curve[-1].items()), file=sys.stderr, flush=True)
            save_state(args.out / STATE, args, step + 1, model, optimizers, curve)
            seen = []
    return curve


def main(argv=None):
    args = settings(argv)
    print("train", *(f"{name}={value}" for name, value in vars(args).items()), flush=True)
    if (args.out / "training.json").exists():
        raise ValueError(f"{args.out} holds a finished run; choose another --out, or delete it")
    torch.set_num_threads(1)  # so that sums are made in one order, and a rerun gives the same weights
    torch.manual_seed(args.seed)
    model = new_model(args)
    if args.init:
        start_from(args.init, model)
    documents = prose()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / STATE).exists():
        if args.init:
            shutil.copyfile(Path(args.init) / "tokenizer.model", args.out / "tokenizer.model")
        else:
            train_tokenizer(args.out / "tokenizer.model", documents, args.vocab)
    corpus = make_corpus(args, load_tokenizer(args.out, model.config), documents, model.config)
    curve = train(args, model, corpus)
    write_folder(args.out, model)
    write_json(args.out / "training.json", {
        "command": " ".join(["python", "train.py", *(argv if argv is not None else sys.argv[1:])]),
        "date": datetime.date.today().isoformat(), "settings": record(args),
        "parameters": sum(w.numel() for w in model.parameters()), "prose_tokens": len(corpus.stream),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "sentencepiece": sentencepiece.__version__},
        "curve_is": "means since the last entry: nats per token of prose, share of right digits in answers by task",
        "curve": curve})
    (args.out / STATE).unlink()


if __name__ == "__main__":
    run_command(main, "train.py")
