"""Train the tiny LLaMAs that ship in checkpoints/, each on one CPU core in less than an hour.

Does: collect the prose that comes with every Python (help topics, docstrings), train a sentencepiece model on it,
then a LLaMA on a mix of prose, passkey prompts, and records of lines and of key-value pairs, with --mix ruler also of
RULER's tasks, of every length up to its window; or start from the weights and the tokenizer of another such model
(--init). Of RULER's names, values and help topics, those that the evaluation draws from are neither in a prompt nor in
the prose (in the first runs of all shipped models, which are older, all help topics were in the prose). Writes a
Hugging Face folder and training.json, the record of the run. An interrupted run, also a killed one, continues from its
last save when the same command is given again, and ends in the same weights: batches depend on (seed, step) alone.
Started by torchrun, each process takes some rows of every batch (torch's DistributedDataParallel), and rank 0 writes.

Does not: read any other data, or show the model a position beyond --window. Whatever the model does out there is the
doing of the extrapolation method. (finetune.py trains a checkpoint further, at a longer window.)

    python train.py --out start --cosine 16 --store bfloat16 --steps 2000 --grow 1000
    python train.py --out middle --init start --steps 1200 --grow 100 --lr 1.5e-3
    python train.py --out checkpoints/tiny --init middle --steps 1000 --warmup 50 --grow 1 --lr 2e-3
    python train.py --out ruler --init checkpoints/tiny --mix ruler --steps 2600 --warmup 50 --grow 1 --lr 2e-3
    python train.py --out checkpoints/tiny-ruler --init ruler --mix ruler --steps 4600 --warmup 50 --grow 1 --lr 1.5e-3
    python train.py --out checkpoints/tiny-cosine --init start --cosine 16 --store bfloat16 --steps 600 --grow 100
    python train.py --out checkpoints/tiny-nope --position nope --store bfloat16 --steps 2000 --grow 1000
    torchrun --nproc-per-node 2 train.py --out mine

(Each training.json has the date of its run: the first three lines, `ruler` and the siblings were made by earlier forms
of this file, whose batches differed; tiny-ruler's has the record of `ruler` too.)

Letters: B rows of a batch, T tokens that the model reads in each row; a row holds T + 1 ids, the last only to predict.
"""
import ast
import datetime
import itertools
import json
import math
import os
import platform
import random
import re
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

import ruler_tasks
from checkpoint import ENCODINGS, UNFINISHED, read_json
from cli import number, plain_parser, run_command, say, settings_line
from config import Config
from model import Llama, load_model
from ranks import Ranks
from tasks import FILLER, NEEDLE, PAIRS, QUESTION, RECORDS, TASK, TASKS, WORDS, cycled, entries, joined, passkey_prompt
from tokenizer import Tokenizer, load_tokenizer

ANSWER = "{key}."              # what follows QUESTION; sentencepiece puts the space in front
MIX = ("kv", "prose", "kv", "lines", "passkey", "lines")  # kinds of rows, over and over
ALONE = Ranks()
RULER = tuple(task for task in ruler_tasks.TASKS if task != "qa")  # qa needs outside data
HARDEST = ("niah_multikey_2", "niah_multiquery", "niah_multikey_3", "niah_single_3")  # so they come twice
MIXES = {"records": MIX, "ruler": MIX + RULER + HARDEST}
MUON = 7                       # its learning rate over that of AdamW


# ---------------------------------------------------------------------------------------------------------------------
# prose that every machine with a Python has

def prose():
    """The documents, a list of texts: Python's help topics, but those held out for the evaluation, then the docstrings
    of its standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    documents = ruler_tasks.topics(test=False)
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if not skipped.intersection(parts):
            documents += docstrings(file)
    return documents


def docstrings(file):
    """The longer docstrings of one source file, each on one line; none where the file does not parse."""
    try:
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    return [" ".join(text.split()) for text in texts if len(text) > 200]


def train_tokenizer(path, documents, vocab_size):
    """Write LLaMA's kind of sentencepiece model: BPE, a piece per digit, bytes for rare characters. ValueError for a
    vocabulary that cannot be made."""
    lines = []
    for text in documents:
        lines += [text[start:start + 2000] for start in range(0, len(text), 2000)]
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(task_sentences() + lines), model_writer=file, model_type="bpe",
                vocab_size=vocab_size, byte_fallback=True, split_digits=True, character_coverage=0.9995,
                normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"--vocab {vocab_size}: {reason}") from None
    os.replace(part, path)


def task_sentences():
    """The sentences of all tasks, so often that they get a piece per word: a short needle rarely meets the border of a
    chunk."""
    texts = [TASK, FILLER, NEEDLE, QUESTION, *ruler_tasks.BRIEF.values()]
    for record in RECORDS.values():
        texts += record_texts(record)
    blanks = {"name": "", "kind": "number", "context": "", "query": "", "count": 3}
    sentences = [text.format(key=71432, value=52908, **blanks) for text in texts]
    return sentences * 500 + [" ".join(WORDS)] * 500


def record_texts(record):
    """The texts of a Record, as a prompt and its answer have them one after the other."""
    return [record.head, record.entry, record.question, record.answer]


# ---------------------------------------------------------------------------------------------------------------------
# what batches are drawn from

@dataclass
class Corpus:
    """What batches are drawn from."""
    tokenizer: Tokenizer
    documents: list[str]
    sentences: list[str]   # of 20 to 120 characters, to repeat as filler
    stream: list[int]      # all documents in random order, each between <s> and </s>
    shortest: int          # tokens of the shortest prompt and its answer, of passkey, lines and kv
    longest_word: str      # of WORDS, in tokens
    material: ruler_tasks.Material  # of RULER's tasks: what the evaluation does not draw from


def make_corpus(args, tokenizer, documents, config):
    """The Corpus of these documents. ValueError where the window is too short for a prompt and its answer."""
    sentences = []
    for text in documents:
        sentences += [part.strip() + "." for part in text.split(". ")]
    sentences = [text for text in sentences if 20 <= len(text) <= 120]
    stream = []
    for text in random.Random(args.seed).sample(documents, len(documents)):
        stream += tokenizer.encode(text) + [config.eos_token_id[0]]
    longest_word = max(WORDS, key=lambda word: len(tokenizer.encode(word)))
    shortest = shortest_row(tokenizer, longest_word)
    if shortest > args.window:
        raise ValueError(f"--window {args.window}: the shortest prompt and its answer take {shortest} tokens")
    material = ruler_tasks.new_material(test=False)
    return Corpus(tokenizer, documents, sentences, stream, shortest, longest_word, material)


def shortest_row(tokenizer, name):
    """Tokens of the shortest prompt and its answer, of the task where these are most; name: of the entry asked for."""
    prompts = [[TASK, NEEDLE, QUESTION, ANSWER]]
    prompts += [record_texts(record) for record in RECORDS.values()]
    lengths = []
    for texts in prompts:
        text = " ".join(texts).format(key=71432, name=name, value=52908)
        lengths.append(len(tokenizer.encode(text)))
    return 1 + max(lengths)


# ---------------------------------------------------------------------------------------------------------------------
# one batch: a function of (seed, step)

@dataclass
class Row:
    """A row of a batch."""
    ids: list[int]         # T + 1 of them
    weights: list[float]   # T of them: what it counts to predict ids[1], ids[2], ...


def batch(step, args, corpus, config):
    """(ids (B, T + 1), weights (B, T)) of a step, all rows as long, no padding.

    T grows to the window during the first args.grow steps: copying is found much sooner over short distances.
    """
    rng = random.Random(f"{args.seed}/{step}")
    growth = (args.window - corpus.shortest) * (step + 100) // (args.grow + 100)
    longest = min(corpus.shortest + growth, args.window)
    length = longest if rng.random() < 0.5 else rng.randint(corpus.shortest, longest)
    rows = []
    for kind in kinds(args, step, args.batch * args.window // length):
        if kind in RULER:
            rows.append(ruler_row(rng, kind, corpus, length, config.eos_token_id[0]))
        elif kind == "prose":
            rows.append(prose_row(rng, corpus, length, config.bos_token_id))
        elif kind == "passkey":
            rows.append(passkey_row(rng, corpus, length, config.eos_token_id[0]))
        else:
            rows.append(record_row(rng, kind, corpus, length, config.eos_token_id[0]))
    return torch.tensor([row.ids for row in rows]), torch.tensor([row.weights for row in rows])


def kinds(args, step, rows):
    """The kind of every row of a batch: those of the mix, over and over; where it has more kinds than a batch has rows,
    a step goes on where the last one ended."""
    mix = MIXES[args.mix]
    first = step * args.batch if len(mix) > args.batch else 0
    return [mix[(first + row) % len(mix)] for row in range(rows)]


def prose_row(rng, corpus, length, bos):
    """A Row of T = length: a piece of the stream."""
    start = rng.randrange(len(corpus.stream) - length)
    return Row([bos] + corpus.stream[start:start + length], [1.0] * length)


def passkey_row(rng, corpus, length, eos):
    """A Row of T = length: a passkey prompt, its answer, and </s>. Filler need not be predicted."""
    tokenizer = corpus.tokenizer
    key = str(rng.randint(10000, 99999))
    answer = tokenizer.encode(ANSWER.format(key=key), bos=False) + [eos]
    depth = rng.random()
    filler = tokenizer.encode(random_filler(rng, corpus), bos=False)
    prompt = passkey_prompt(tokenizer, length + 1 - len(answer), depth, [key], filler)
    ids = prompt.ids
    if rng.random() < 0.2:
        ids = torn(rng, prompt, len(tokenizer.encode(QUESTION, bos=False)))
    weights = [0.1] * (len(ids) - 1) + [8.0] * len(answer)
    digits = answer[1:-2]
    places = [k for k in range(len(ids)) if ids[k:k + len(digits)] == digits]
    for k in places[1:]:  # the needle says the key twice: a first lesson in copying
        weights[k - 1:k - 1 + len(digits)] = [4.0] * len(digits)
    return Row(ids + answer, weights)


def torn(rng, prompt, question):
    """The ids of a passkey prompt with filler inside the needle, as where the border of a chunk cuts it; question:
    tokens of the question at its end."""
    first, last = prompt.span
    needle = prompt.ids[first:last + 1]
    after = prompt.ids[last + 1:]
    cut = rng.randrange(1, len(needle))
    gap = rng.randint(0, len(after) - question)
    return prompt.ids[:first] + needle[:cut] + after[:gap] + needle[cut:] + after[gap:]


def random_filler(rng, corpus):
    """A text: the evaluation's own filler, repeated sentences, prose, word salad, or sentences with numbers."""
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


def record_row(rng, task, corpus, length, eos):
    """A Row of T = length: a record of lines or of key-value pairs, a question, its answer, and </s>; a piece of prose
    where that is too short for one entry.

    Half of the records say their entries once, and what is asked may be as far away as can be; the others repeat them
    in another order: each value that is said again is a lesson in finding it by its name.
    """
    tokenizer = corpus.tokenizer
    record = RECORDS[task]
    names, longest_name = random_names(rng, corpus, length)
    head = tokenizer.encode(record.head)
    longest_ending = (record.question + " " + record.answer).format(name=longest_name, value=52908)
    room = length - len(head) - len(tokenizer.encode(longest_ending, bos=False)) - 4
    found = record_entries(rng, task, tokenizer, names, room)
    if not found:  # not a single entry fits
        return prose_row(rng, corpus, length, head[0])
    asked = rng.choice(found)
    again = repeated(rng, found, room)

    question = tokenizer.encode(record.question.format(name=asked.name), bos=False)
    answer = tokenizer.encode(record.answer.format(value=asked.value), bos=False) + [eos]
    ids = joined(found) + joined(again) + question + answer
    padding = cycled(tokenizer.encode(FILLER, bos=False), length + 1 - len(head) - len(ids))

    weights = []
    for entry in again:
        value = len(tokenizer.encode(record.answer.format(value=entry.value), bos=False))
        weights += [0.1] * (len(entry.ids) - value) + [8.0] * value
    weights += [0.1] * len(question) + [8.0] * len(answer)
    weights = [0.1] * (length - len(weights)) + weights
    return Row(head + padding + ids, weights)


def ruler_row(rng, task, corpus, length, eos):
    """A Row of T = length: a prompt of a task of RULER, its answer, </s>, and its needles said again; the filler after
    them need not be predicted.

    Its size is one of the two smallest; where neither fits into this length, a piece of prose takes its place. Half of
    the prompts fill but half of the row, so that there is room for their needles.
    """
    tokenizer = corpus.tokenizer
    sizes = ruler_tasks.SIZES[-2:]
    part = length // 2 if rng.random() < 0.5 else length
    for longest, size in itertools.product((part, length), rng.sample(sizes, len(sizes))):
        room = ruler_tasks.answer_room(tokenizer, task, size, corpus.material)
        try:
            prompt = ruler_tasks.ruler_prompt(tokenizer, task, longest - room, rng, corpus.material, size)
        except ValueError:
            continue  # longer than this row
        answer = tokenizer.encode(in_order(prompt), bos=False) + [eos]
        rest = length + 1 - len(prompt.ids) - len(answer)
        if rest >= 0:
            again = needles_again(rng, tokenizer, prompt, rest)
            filler = cycled(tokenizer.encode(FILLER, bos=False), rest - len(again.ids))
            weights = [0.1] * (len(prompt.ids) - 1) + [8.0] * len(answer) + again.weights + [0.0] * len(filler)
            return Row(prompt.ids + answer + again.ids + filler, weights)
    return prose_row(rng, corpus, length, tokenizer.encode("")[0])


def needles_again(rng, tokenizer, prompt, room):
    """The needles of a RulerPrompt in another order, as many as fit into room tokens: each is a lesson in finding a
    value by its key. A Row with a weight for every id."""
    template = ruler_tasks.BRIEF["needle"].replace(".", r"\.")
    pattern = template.format(kind=r"\w+", key=r"\S+", value=r"(\S+)")
    needles = [(match.group(), match.group(1)) for match in re.finditer(pattern, prompt.text)]
    again = Row([], [])
    for needle, value in rng.sample(needles, len(needles)):
        ids = tokenizer.encode(needle, bos=False)
        copied = len(tokenizer.encode(value + ".", bos=False))
        if len(again.ids) + len(ids) <= room:
            again.ids += ids
            again.weights += [0.1] * (len(ids) - copied) + [4.0] * copied
    return again


def in_order(prompt):
    """The answer to a RulerPrompt; what it may list in any order, as the text has it: only one can be learned."""
    found = sorted(prompt.references, key=prompt.text.find)
    if prompt.task == "niah_multivalue":
        return ruler_tasks.listed(found) + "."
    if prompt.task == "cwe":
        return ruler_tasks.numbered(found) + "."
    return prompt.answer


def random_names(rng, corpus, length):
    """(what names of entries are drawn from, the longest of them in tokens): one name of eight is learned sooner than
    one of hundreds."""
    word = corpus.longest_word
    most = PAIRS if length >= corpus.shortest + 40 else WORDS
    names = rng.choice((WORDS[:8], WORDS[:64], WORDS, most))
    return names, f"{word}-{word}" if names is PAIRS else word


def record_entries(rng, task, tokenizer, names, room):
    """The entries of a record that has room for so many tokens; as a rule half of the time they fill but half of it."""
    part = room // 2 if rng.random() < 0.5 else room
    return (entries(tokenizer, task, part, rng, names) or entries(tokenizer, task, room, rng, names)
            or entries(tokenizer, task, room, rng))


def repeated(rng, found, room):
    """These entries in another order, as many as the room for both leaves."""
    left = room - len(joined(found))
    again = []
    for entry in rng.sample(found, len(found)):
        if len(entry.ids) <= left:
            again.append(entry)
            left -= len(entry.ids)
    return again


# ---------------------------------------------------------------------------------------------------------------------
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
        if weight.ndim == 1:  # norms stay at one
            continue
        std = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # what writes to the residual starts smaller, as GPT-2
            std /= math.sqrt(2 * args.layers)
        torch.nn.init.normal_(weight, std=std)
    return model


def start_from(folder, model):
    """Copy the weights of a checkpoint into a model. ValueError where their shapes or their frequencies differ.

    Where its logits are s cos(q, k) and the model's are q.k/sqrt(D), queries and keys are made so long that these are
    about as large: |q| |k| = s sqrt(D).
    """
    theirs = Config.from_hf(folder)
    ours = model.config
    weights = load_model(folder, theirs, torch.float32).state_dict()
    if shapes(weights) != shapes(model.state_dict()):
        raise ValueError(f"{folder}: its matrices have not the shapes of these settings")
    if theirs.freq == ours.freq == "rope" and theirs.rope_theta != ours.rope_theta:
        raise ValueError(f"{folder}: trained with --rope-theta {theirs.rope_theta:g}, not {ours.rope_theta:g}")
    model.load_state_dict(weights)
    if theirs.cosine_attention and not ours.cosine_attention:
        wanted = theirs.cosine_attention * math.sqrt(ours.head_dim)  # mean of |q|^2, and of |k|^2
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                found = ours.head_dim * weight.data.square().sum(1).mean()
                weight.data *= (wanted / found).sqrt()


def shapes(weights):
    """{name: shape} of {name: tensor}."""
    return {name: tensor.shape for name, tensor in weights.items()}


def write_folder(out, model):
    """Write the Hugging Face files beside tokenizer.model; the weights last, so a folder that has them is whole."""
    c = model.config
    marks = {"bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id[0]}
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings",
             "tie_word_embeddings", "attention_bias", "mlp_bias")
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


def own_keys(config):
    """What config.json says of positions that Hugging Face's LLaMA does not know; nothing for a plain rotary model."""
    keys = {}
    if config.freq != "rope":
        keys["position_encoding"] = config.freq
    if config.cosine_attention is not None:
        keys["cosine_attention"] = config.cosine_attention
    return keys


def write_json(path, data):
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# optimizers

class Muon(torch.optim.Optimizer):
    """Momentum whose every update of a matrix is made orthogonal (Keller Jordan, 2024): far fewer steps than AdamW."""

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                self.update(weight, group["lr"], group["momentum"], group["weight_decay"])

    def update(self, weight, lr, momentum, weight_decay):
        """One step of one matrix."""
        mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
        mean.lerp_(weight.grad, 1 - momentum)
        direction = orthogonal(weight.grad.lerp(mean, momentum))
        rows, columns = weight.shape
        weight.mul_(1 - lr * weight_decay)
        weight.add_(direction, alpha=-lr * max(1, rows / columns) ** 0.5)


def orthogonal(x, steps=5):
    """The matrix x with its singular values brought to 0.7 to 1.2, by Newton-Schulz iteration."""
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if tall else x).float()


def make_optimizers(model, lr):
    """Muon for matrices, but AdamW for embeddings, norms, and the products that decide where attention looks."""
    matrices = []
    others = []
    for name, weight in model.named_parameters():
        if weight.ndim == 1 or "embed_tokens" in name or "q_proj" in name or "k_proj" in name:
            others.append(weight)
        else:
            matrices.append(weight)
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [adamw, Muon(matrices, MUON * lr)]


def learning_rate(step, args):
    """The learning rate of AdamW: linear warm-up, then half a cosine down to a fiftieth."""
    rise = (step + 1) / max(args.warmup, 1)
    fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return args.lr * min(rise, fall)


# ---------------------------------------------------------------------------------------------------------------------
# the run

def train_step(step, args, model, optimizers, corpus, ranks=ALONE, forward=None):
    """One update. Returns, all before it: the loss of prose; for each of TASKS the share of right digits, and for each
    of RULER's in the mix that of right tokens; nan for what is not in the batch. Each of the ranks takes some rows of
    the one batch; forward: the model as torch's DistributedDataParallel wraps it, which averages their gradients."""
    # ids (B, T + 1) and weights (B, T) that depend on nothing but the seed and the step
    ids, weights = batch(step, args, corpus, model.config)
    found = kinds(args, step, len(ids))[ranks.rank::ranks.size]
    weights_of_all = weights.sum()
    ids = ids[ranks.rank::ranks.size]
    weights = weights[ranks.rank::ranks.size]
    targets = ids[:, 1:]

    # logits (B, T, vocab_size); weights stay float32, products are made in args.compute
    with torch.autocast("cpu", torch.bfloat16, enabled=args.compute == "bfloat16"):
        plan = model.plan(n=targets.shape[1])
        logits = (forward or model)(ids[:, :-1], plan)

    # the weighted mean of the loss (B, T), and its gradient, no longer than 1
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
    model.zero_grad()
    ((loss * weights).sum() * ranks.size / weights_of_all).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    # one learning rate for all, Muon's MUON times as high
    for optimizer, times in zip(optimizers, (1, MUON)):
        for group in optimizer.param_groups:
            group["lr"] = times * learning_rate(step, args)
        optimizer.step()

    # a row with an answer ends in five digits, "." or what else closes it, and </s>
    hits = (logits.argmax(-1) == targets).float()
    right = hits[:, -7:-2].mean(1)
    measures = [loss[rows_of("prose", found)].mean()]
    measures += [right[rows_of(task, found)].mean() for task in TASKS]
    for task in measured(args)[1 + len(TASKS):]:
        rows = rows_of(task, found)
        measures.append(hits[rows][weights[rows] == 8.0].mean())
    return mean_over_ranks(torch.stack(measures).detach(), args, found, ranks)


def mean_over_ranks(measures, args, found, ranks):
    """What train_step returns, over all ranks: means weighted by rows; found: the kinds of this rank's rows."""
    if ranks.size == 1:
        return measures
    rows = torch.tensor([float(found.count(kind)) for kind in measured(args)])
    sums = ranks.sum(torch.stack((measures.nan_to_num() * rows, rows)), "measures")
    return sums[0] / sums[1]


def rows_of(wanted, found):
    """(B,) bool: which rows of a batch of these kinds are of the one that is wanted."""
    return torch.tensor([kind == wanted for kind in found])


def measured(args):
    """The names of what train_step returns."""
    return ("prose", *TASKS, *(task for task in RULER if task in MIXES[args.mix]))


def train(args, model, corpus, ranks=ALONE):
    """All steps that are left; returns the curve, [{step, prose, passkey, lines, kv, seconds}]."""
    state = args.out / UNFINISHED
    forward = model if ranks.size == 1 else torch.nn.parallel.DistributedDataParallel(model)
    optimizers = make_optimizers(model, args.lr)
    done, curve = restore_state(state, args, model, optimizers)
    before = 0  # seconds that the run has taken so far
    if done:
        say(f"continuing after step {done} of {args.steps}")
        before = curve[-1]["seconds"]
    start = time.time() - before
    measures = []
    for step in range(done, args.steps):
        measures.append(train_step(step, args, model, optimizers, corpus, ranks, forward))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            means = [round(mean, 4) for mean in torch.stack(measures).nanmean(0).tolist()]
            means = dict(zip(measured(args), means))
            curve.append({"step": step + 1, **means, "seconds": round(time.time() - start)})
            say(" ".join(f"{name} {value}" for name, value in curve[-1].items()))
            if ranks.rank == 0:
                save_state(state, args, step + 1, model, optimizers, curve)
            measures = []
    return curve


def save_state(path, args, step, model, optimizers, curve):
    """Write the unfinished run so that a kill at any moment leaves the old file or the new one."""
    part = path.with_suffix(".part")
    torch.save({"settings": record(args), "step": step, "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers], "curve": curve}, part)
    os.replace(part, path)


def restore_state(path, args, model, optimizers):
    """(step, curve) of the unfinished run, loaded into model and optimizers; (0, []) where there is none. ValueError
    where it was made with other settings."""
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    if state["settings"] != record(args):
        raise ValueError(f"{path}: an unfinished run with other settings; finish or delete it: {state['settings']}")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return state["step"], state["curve"]


def record(args):
    """The settings that decide the weights, as plain data."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "save_every")}


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = plain_parser(__doc__)
    flag("out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    flag("steps", type=number(int, 1), default=2400)
    flag("batch", type=number(int, len(MIX)), default=16,
         help="rows of a step, if as long as the window; at least one of each kind")
    flag("mix", choices=MIXES, default="records",
         help="kinds of rows: prose, passkey, lines and key-value records; or RULER's tasks as well")
    flag("window", type=number(int, 64), default=256, help="longest input, in tokens")
    flag("vocab", type=number(int, 300), default=1024)
    flag("width", type=number(int, 1), default=128)
    flag("layers", type=number(int, 1), default=5)
    flag("heads", type=number(int, 1), default=4)
    flag("kv-heads", type=number(int, 1), default=2)
    # LLaMA's 10,000 goes with a window of 2,048 or 4,096, where its slowest pair of channels turns 0.24 or 0.47
    # radians; 500 makes that 0.75 in 256 tokens. With 10,000 it is 0.05, and plain RoPE itself reaches four windows.
    flag("rope-theta", type=number(float, 2), default=500.0)
    flag("lr", type=number(float, 1e-9, 1), default=3e-3, help="the highest learning rate")
    flag("init", metavar="FOLDER", help="start from the weights and the tokenizer of this checkpoint")
    flag("position", choices=ENCODINGS, default="rope", help="how the model knows where tokens are")
    flag("cosine", type=number(float, 1e-3), metavar="S", help="CosScale: logits are S cos(q, k)")
    flag("warmup", type=number(int, 0), default=150, help="steps of rising learning rate")
    flag("grow", type=number(int, 0), default=1000, help="steps over which rows grow to the window")
    flag("seed", type=number(int, 0, 2 ** 63 - 1), default=1)
    flag("compute", choices=("bfloat16", "float32"), default="bfloat16", help="type of products")
    flag("store", choices=("bfloat16", "float32"), default="float32", help="type of the result")
    flag("save-every", type=number(int, 1), default=100, help="steps between saves of the unfinished run")
    args = parser.parse_args(argv)
    if args.width % args.heads or args.width // args.heads % 2 or args.heads % args.kv_heads:
        parser.error("--heads must divide --width into even widths, and --kv-heads divide --heads")
    return args


def make_tokenizer(args, documents):
    """Write tokenizer.model into args.out: that of --init, or a new one."""
    path = args.out / "tokenizer.model"
    if args.init:
        shutil.copyfile(Path(args.init) / "tokenizer.model", path)
    else:
        train_tokenizer(path, documents, args.vocab)


def write_record(args, argv, model, corpus, curve):
    """Write training.json: how the weights were made; where they started from others, the record of those too."""
    words = sys.argv[1:] if argv is None else argv
    write_json(args.out / "training.json", {
        "command": " ".join(["python", "train.py", *words]),
        "date": datetime.date.today().isoformat(), "settings": record(args),
        "parameters": sum(weight.numel() for weight in model.parameters()), "prose_tokens": len(corpus.stream),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "sentencepiece": sentencepiece.__version__},
        "curve_is": "means since the last entry: nats per token of prose, share of right digits in answers by task",
        "curve": curve, **record_of(args.init)})


def record_of(init):
    """{"started_from": the record of a checkpoint}, {} where there is no checkpoint or no record."""
    file = None if init is None else Path(init) / "training.json"
    return {"started_from": read_json(file)} if file and file.is_file() else {}


def run(argv=None, ranks=ALONE):
    """The command: its exit code; ranks: this process among others, a Ranks."""
    args = parse_args(argv)
    ranks.check_same(settings=str(record(args)))
    say("train " + settings_line(vars(args)))
    if (args.out / "training.json").exists() and not (args.out / UNFINISHED).exists():
        raise ValueError(f"{args.out} holds a finished run; choose another --out, or delete it")
    torch.set_num_threads(1)  # so that sums are made in one order, and a rerun gives the same weights
    torch.manual_seed(args.seed)
    model = new_model(args)
    if args.init:
        start_from(args.init, model)
    documents = prose()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / UNFINISHED).exists() and ranks.rank == 0:
        make_tokenizer(args, documents)
    ranks.barrier()
    tokenizer = load_tokenizer(args.out, model.config.bos_token_id)
    corpus = make_corpus(args, tokenizer, documents, model.config)
    curve = train(args, model, corpus, ranks)
    if ranks.rank:
        return 0
    write_folder(args.out, model)
    write_record(args, argv, model, corpus, curve)
    (args.out / UNFINISHED).unlink()
    return 0


if __name__ == "__main__":
    run_command(run, "train.py")
