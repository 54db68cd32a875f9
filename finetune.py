"""Fine-tune a checkpoint at a longer window: Position Interpolation and its kin, as their papers do it.

Does: take any LLaMA that model.py loads, give it the frequencies of a method (pi, yarn, ntk, abf, llama3; rope for
direct fine-tuning; drope, which drops all positions), train it at --seq-len on a text or on the built-in mix of
train.py, and write a Hugging Face folder whose config.json says what was done. Weights are float32, products bfloat16.
A run that was interrupted, also a killed one, continues from its last save when the same command is given again, on a
CPU to the same bits: every step depends on (seed, step) alone. Does not: spread over several GPUs, or train other
geometries (mesa, ...).

    python finetune.py --init tiny --method pi:factor=8 --seq-len 2048 --steps 1000 --out tiny-pi
    python finetune.py --init tiny --method rope --seq-len 2048 --steps 1000 --out tiny-direct
    python finetune.py --init path/to/llama-7b --method pi:factor=4 --data books.jsonl --checkpointing --out llama-8k
    python finetune.py --init tiny --method pi:factor=8 --positions pose --steps 1000 --out tiny-pose
    python finetune.py --init tiny --method drope --steps 300 --out tiny-drope

The recipe for models above 100 million weights is that of Position Interpolation (arXiv 2306.15595, section 3.1): AdamW
(0.9, 0.95), no decay, 2e-5, 20 steps of warm-up from a tenth of it, then constant (which the paper does not say), 64
rows a step, next-token loss. For smaller ones it is Muon and AdamW at 7e-4, 4,096 tokens a step, found by trial.
--grow: factor and length grow together over so many steps. --positions: rows as short as the old window, at positions
of the new one, so that memory does not grow: pose has two runs with a gap between them (arXiv 2309.10400), randpos a
random choice in rising order (arXiv 2305.16843). drope: DroPE (arXiv 2512.12167): positions dropped, then a short
recalibration at the old window.

Letters: B rows of a batch, T tokens that the model reads in each row; a row holds T + 1 ids. L training length.
"""
import argparse
import datetime
import json
import os
import platform
import random
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from checkpoint import UNFINISHED, find_checkpoint, read_json, refuse_unfinished
from cli import (counts, fingerprint, number, pick_device, plain_parser, read_text, run_command, say, settings_line,
                 short_hash)
from config import Config
from frequencies import UNROTATED, llama3, ntk_base, power_of_two
from generate import generate
from model import linear, load_model
from plan import Region
from positions import Method, parameters
from show import figure_class, plot_training
from single_row import PRODUCTS
from tokenizer import load_tokenizer
from train import (MIXES, MUON, Corpus, batch, make_corpus, make_optimizers, prose, restore_state, save_state,
                   write_json)

TRAINABLE = ("rope", "pi", "ntk", "abf", "yarn", "llama3", "nope")  # methods that a config.json can say
STRETCHED = ("pi", "ntk", "yarn", "llama3")                         # those with a factor
SMALL = 10 ** 8          # weights below which the recipe is that of the tiny models
HELD_OUT = 16            # one document, or token, of so many is kept for the validation
COPIED = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
          "generation_config.json", "chat_template.jinja")
UNDECIDING = ("out", "save_every", "keep", "plot", "sample")        # settings that leave the weights as they are


# ---------------------------------------------------------------------------------------------------------------------
# the method, and what config.json says of it

def trained_method(text, config, seq_len):
    """(Method, tokens of a window) to train, with its factor as a number; seq_len None: what the factor reaches.

    "pi:factor=8" at L = 256 is trained at 2,048 tokens; "pi" at 2,048 has factor 8. ValueError for what config.json
    cannot say.
    """
    method = Method.parse("nope" if text == "drope" else text)
    if method.name not in TRAINABLE or method.freq or method.attn_scale:
        raise ValueError(f"--method {text}: a config.json can say {', '.join(TRAINABLE)} or drope alone")
    if config.freq not in ("rope", *UNROTATED) and method.name not in (config.freq, "nope", "rope"):
        raise ValueError(f"--method {text}: the checkpoint has been stretched already, by {config.freq}")
    L = config.train_len
    factor = method.params.get("factor")
    if seq_len is None and factor is None and method.name != "nope":
        raise ValueError("give --seq-len, or a factor: --method pi:factor=8")
    if seq_len is None:
        seq_len = round(L * (factor or 1))
    if method.name in STRETCHED:
        method = Method.of(method, factor=power_of_two(factor, seq_len, L))
    method.plan(config, n=2)  # a wrong setting shows here
    return method, seq_len


def method_at(method, length, seq_len):
    """The Method for rows of at most `length` tokens while they grow to seq_len: its factor in proportion."""
    if length == seq_len or method.name not in STRETCHED:
        return method
    return Method.of(method, factor=max(1.0, method.params["factor"] * length / seq_len))


def new_config(raw, config, method, seq_len):
    """The contents of config.json after training: raw, those before, with the positions of the method.

    linear, yarn and llama3 keep L as original_max_position_embeddings, since their factor counts from it; with rope, a
    larger base, or none, the whole new window is L.
    """
    raw = {name: value for name, value in raw.items()
           if name not in ("rope_parameters", "rope_scaling", "original_max_position_embeddings", "position_encoding")}
    D = config.head_dim
    theta = config.rope_theta
    scaling = None
    if method.name == "pi":
        scaling = {"rope_type": "linear", "factor": method.params["factor"]}
    elif method.name in ("yarn", "llama3"):
        rule = dict(method.params)
        if method.name == "llama3":
            rule = {**parameters(llama3), **rule}
        scaling = {**rule, "rope_type": method.name, "original_max_position_embeddings": config.train_len}
    elif method.name == "ntk":
        theta = ntk_base(theta, method.params["factor"], D)
    elif method.name == "abf":
        theta = method.params.get("rope_theta", 5e5)
    elif method.name == "nope":
        raw["position_encoding"] = "nope"
    if scaling:
        raw["original_max_position_embeddings"] = config.train_len
    return {**raw, "rope_scaling": scaling, "rope_theta": theta, "max_position_embeddings": seq_len}


def write_folder(out, source, model, raw, stored):
    """Write a Hugging Face folder: the tokenizer's files of the folder source, raw as config.json, weights of the torch
    type stored; they come last, so a folder that has them is whole."""
    out.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    write_json(out / "config.json", raw)
    tensors = {name: weight.detach().to("cpu", stored).contiguous() for name, weight in model.named_parameters()}
    save_file(tensors, out / "model.part", metadata={"format": "pt"})
    os.replace(out / "model.part", out / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# what rows are drawn from

@dataclass
class Source:
    """What rows are drawn from."""
    stream: Tensor | None     # (N,) int32: the tokens of --data, documents between BOS and EOS, one after the other
    corpus: Corpus | None     # of the built-in mix
    held_out: Tensor          # (M,) int32: tokens that are never trained on
    bos: list[int]            # in front of every row of stream and held_out


def make_source(args, tokenizer, config):
    """The Source of --data and --builtin. ValueError for a text without a row to train or to hold out."""
    bos = tokenizer.encode("")
    stream = corpus = None
    if args.builtin:
        documents = prose()
        held_out = packed(documents[::HELD_OUT], tokenizer, config)
        rest = [text for number, text in enumerate(documents) if number % HELD_OUT]
        shortest = argparse.Namespace(seed=args.seed, window=min(length_at(0, args), args.window))
        corpus = make_corpus(shortest, tokenizer, rest, config)
    if args.data:
        tokens = packed(read_documents(args.data), tokenizer, config)
        cut = len(tokens) - max(len(tokens) // HELD_OUT, args.seq_len)
        if cut <= args.seq_len:
            raise ValueError(f"--data {args.data}: {len(tokens)} tokens, too few to train and validate rows of "
                             f"{args.seq_len}")
        stream, held_out = tokens[:cut], tokens[cut:]
    if len(held_out) < args.seq_len:
        raise ValueError(f"--seq-len {args.seq_len}: longer than the {len(held_out)} tokens kept for the validation")
    return Source(stream, corpus, held_out, bos)


def read_documents(path):
    """The texts of a file: of a .jsonl each line's "text", else the whole file as one."""
    text = read_text(path)
    if Path(path).suffix != ".jsonl":
        return [text]
    texts = []
    for line_number, line in enumerate(text.splitlines(), 1):
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {line_number} is no JSON object with a \"text\"") from None
    return texts


def packed(texts, tokenizer, config):
    """The tokens (N,) int32 of all texts, each between BOS and EOS, where the model has them."""
    ids = []
    for text in texts:
        ids += tokenizer.encode(text) + list(config.eos_token_id[:1])
    return torch.tensor(ids, dtype=torch.int32)


def length_at(step, args):
    """The longest row of a step, in tokens of the method's window: it grows from L to --seq-len over --grow steps."""
    grown = min(1.0, (step + 1) / args.grow) if args.grow else 1.0
    return args.train_len + round((args.seq_len - args.train_len) * grown)


def rows_at(step, args, source, config):
    """(ids (B, T + 1), weights (B, T)) of a step: as many tokens in every step, to a row."""
    length = min(length_at(step, args), args.window)
    rows = max(1, args.batch * args.seq_len // length)
    rng = random.Random(f"{args.seed}/{step}/rows")
    if source.corpus is not None and rng.random() < args.builtin:
        mix = argparse.Namespace(seed=args.seed, window=length, grow=0, batch=rows, mix=args.mix)
        return batch(step, mix, source.corpus, config)
    room = length + 1 - len(source.bos)
    starts = [rng.randrange(len(source.stream) - room) for _ in range(rows)]
    ids = torch.stack([row_of(source, source.stream, start, room) for start in starts])
    return ids, torch.ones(rows, length)


def row_of(source, stream, start, room):
    """A row: BOS and `room` tokens of the stream from start on, int64."""
    return torch.cat((torch.tensor(source.bos, dtype=torch.int64), stream[start:start + room].long()))


def positions_at(step, args, T):
    """The positions (T,) of a step's tokens by --positions; None: 0, 1, 2, ..."""
    rng = random.Random(f"{args.seed}/{step}/positions")
    target = max(length_at(step, args), T)
    if args.positions == "pose":
        cut = rng.randrange(1, T)
        gap = rng.randint(0, target - T)
        return torch.arange(T) + gap * (torch.arange(T) >= cut)
    if args.positions == "randpos":
        return torch.tensor(sorted(rng.sample(range(target), T)))
    return None


# ---------------------------------------------------------------------------------------------------------------------
# one step

def token_losses(model, ids, plan, recompute=False):
    """-log p of ids[:, 1:] in nats (B, T) float32, for ids (B, T + 1).

    recompute: keep only each layer's input and compute the rest again for the gradient; the same for the logits, a
    thousand tokens at a time.
    """
    if not recompute:
        logits = model(ids[:, :-1], plan)
        return losses_of(logits.flatten(0, 1), ids[:, 1:].flatten()).view(ids.shape[0], -1)
    x = model.model.embed_tokens(ids[:, :-1])
    for block in model.model.layers:
        x = checkpoint(block, x, plan, None, "auto", use_reentrant=False)
    x = model.model.norm(x).flatten(0, 1)

    def piece(x, targets):
        if model.config.tie_word_embeddings:
            return losses_of(linear(x, model.model.embed_tokens.weight, None, PRODUCTS[model.ways.product]), targets)
        return losses_of(model.lm_head(x), targets)
    parts = zip(x.split(1024), ids[:, 1:].flatten().split(1024))
    losses = [checkpoint(piece, rows, targets, use_reentrant=False) for rows, targets in parts]
    return torch.cat(losses).view(ids.shape[0], -1)


def losses_of(logits, targets):
    """Cross entropies (N,) of logits (N, vocab) and targets (N,), in float32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def training_plan(model, method, T, positions=None):
    """The Plan of a method for T tokens, at these positions (T,) where they are given."""
    plan = model.plan(method, n=T)
    if positions is None:
        return plan
    regions = [Region(positions, positions, region.start, region.end) for region in plan.regions]
    return replace(plan, regions=regions)


def train_step(step, args, model, optimizers, source):
    """One update of the weights; the weighted mean of the loss before it."""
    ids, weights = rows_at(step, args, source, model.config)
    T = weights.shape[1]
    method = method_at(Method.parse(args.method), length_at(step, args), args.seq_len)
    plan = training_plan(model, method, T, positions_at(step, args, T))
    device = next(model.parameters()).device
    total = float(weights.sum())

    # the gradient of the whole step, gathered over passes of --micro rows
    model.zero_grad()
    mean = 0.0
    for part_ids, part_weights in zip(ids.split(args.micro), weights.split(args.micro)):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.compute == "bfloat16"):
            losses = token_losses(model, part_ids.to(device), plan, args.checkpointing)
        loss = (losses * part_weights.to(device)).sum() / total
        loss.backward()
        mean += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    # one learning rate for all, Muon's MUON times as high
    for optimizer, times in zip(optimizers, (1, MUON)):
        for group in optimizer.param_groups:
            group["lr"] = times * learning_rate(step, args)
        optimizer.step()
    return mean


def learning_rate(step, args):
    """Linear warm-up from a tenth, then constant (arXiv 2306.15595, section 3.1)."""
    if step >= args.warmup:
        return args.lr
    return args.lr * (0.1 + 0.9 * step / args.warmup)


def optimizers_of(args, model):
    """The optimizers of --optimizer: AdamW for all, or Muon and AdamW as in train.py."""
    if args.optimizer == "muon":
        return make_optimizers(model, args.lr)
    return [torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)]


# ---------------------------------------------------------------------------------------------------------------------
# looking at the model

@torch.no_grad()
def validation_loss(args, model, method, source, length):
    """The mean loss, in nats per token, of up to --val-rows rows of `length` tokens that are never trained on."""
    device = next(model.parameters()).device
    room = length + 1 - len(source.bos)
    plan = training_plan(model, method, length)
    losses = []
    for start in range(0, len(source.held_out) - room + 1, room):
        if len(losses) == args.val_rows:
            break
        ids = row_of(source, source.held_out, start, room)[None].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.compute == "bfloat16"):
            losses.append(float(token_losses(model, ids, plan).mean()))
    return sum(losses) / len(losses)


def say_sample(args, model, method, tokenizer, source):
    """Print what the model makes of --sample, or of the first tokens that it is not trained on."""
    ids = tokenizer.encode(args.sample) if args.sample else row_of(source, source.held_out, 0, 24).tolist()
    text = tokenizer.decode(list(generate(model, ids, method, max_new_tokens=32)))
    say(f"  {tokenizer.decode(ids)!r} goes on {text!r}")


def look(args, step, losses, model, tokenizer, source):
    """An entry of the curve after so many steps, whose losses are given; says it, and a sample."""
    method = Method.parse(args.method)  # as config.json will say it, also while factor and length still grow
    entry = {"step": step, "loss": round(sum(losses) / len(losses), 4) if losses else None,
             "validation": round(validation_loss(args, model, method, source, args.seq_len), 4),
             "old_window": round(validation_loss(args, model, method, source, args.train_len), 4)}
    say(" ".join(f"{name} {value}" for name, value in entry.items()))
    say_sample(args, model, method, tokenizer, source)
    return entry


# ---------------------------------------------------------------------------------------------------------------------
# the run

def train(args, model, tokenizer, source, keep):
    """All steps that are left; the curve, [{step, loss, validation, old_window}]. keep(step): called after each."""
    state = args.out / UNFINISHED
    settings = argparse.Namespace(**record(args))
    optimizers = optimizers_of(args, model)
    done, curve = restore_state(state, settings, model, optimizers)
    if done:
        say(f"continuing after step {done} of {args.steps}")
    else:
        curve = [look(args, 0, [], model, tokenizer, source)]
        keep(0)
    losses = []
    for step in range(done, args.steps):
        losses.append(train_step(step, args, model, optimizers, source))
        keep(step + 1)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            curve.append(look(args, step + 1, losses, model, tokenizer, source))
            save_state(state, settings, step + 1, model, optimizers, curve)
            losses = []
    return curve


def record(args):
    """The settings that decide the weights, as plain data."""
    return {name: value for name, value in vars(args).items() if name not in UNDECIDING}


def open_model(args, config, path):
    """The Llama of --init, in float32 and trainable, in memory of its own."""
    model = load_model(path, config, torch.float32, args.device)
    for weight in model.parameters():
        weight.data = weight.data.clone()  # may be mapped to a file
    return model.requires_grad_(True).train()


def parse_args(argv):
    parser, flag = plain_parser(__doc__)
    flag("init", required=True, metavar="FOLDER", help="the checkpoint: a folder, or a name in checkpoints/")
    flag("out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    flag("method", required=True, metavar="M", help=f"{', '.join(TRAINABLE)} with their settings, or drope")
    flag("seq-len", type=number(int, 8), help="the new window, in tokens; default: factor times the old one")
    flag("steps", type=number(int, 1), default=1000)
    flag("grow", type=number(int, 0), default=0, help="steps over which factor and length grow together")
    flag("positions", choices=("plain", "pose", "randpos"), default="plain", help="where the tokens of a row stand")
    flag("row-len", type=number(int, 8), help="with --positions: tokens of a row; default: the old window")
    flag("train-len", type=number(int, 2), help="override the old window L of config.json")
    flag("data", metavar="FILE", help="a UTF-8 text, or .jsonl with a \"text\" in each line; default: the built-in mix")
    flag("builtin", type=number(float, 0, 1), help="share of steps from the built-in mix; default: 1, with --data 0")
    flag("mix", choices=MIXES, default="records", help="kinds of rows of the built-in mix, as in train.py")
    flag("optimizer", choices=("adamw", "muon"), help="default: adamw, for small models muon and adamw")
    flag("lr", type=number(float, 1e-9, 1), help="default: 2e-5, for small models 7e-4")
    flag("warmup", type=number(int, 0), default=20, help="steps of rising learning rate")
    flag("batch", type=number(int, 1), help="rows of --seq-len tokens in a step; default: 64, for small models as many "
         "as hold 4,096 tokens")
    flag("micro", type=number(int, 1), help="rows in a pass, whose gradients add up; default: 1, for small models all")
    flag("checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    flag("compute", choices=("bfloat16", "float32"), default="bfloat16", help="type of products; weights are float32")
    flag("store", choices=("float32", "bfloat16", "float16"), help="type of the result; default: as --init")
    flag("device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    flag("threads", type=number(int, 1), help="of a CPU; default: all, for small models 1")
    flag("val-rows", type=number(int, 1), default=4, help="rows of the validation")
    flag("sample", metavar="TEXT", help="what a sample goes on from; default: held-out text")
    flag("keep", type=step_list, default=[], metavar="N,N,...", help="also write FOLDER/step-N after these steps")
    flag("save-every", type=number(int, 1), default=50, help="steps between saves of the unfinished run")
    flag("plot", metavar="FILE", help="the curve as a picture (needs matplotlib)")
    flag("seed", type=number(int, 0, 2 ** 63 - 1), default=1)
    return parser.parse_args(argv)


def step_list(text):
    """An argparse type: "0,50,200" -> [0, 50, 200]."""
    return [0 if part.strip() == "0" else counts(part)[0] for part in text.split(",")]


def complete(args, path, config):
    """Fill in the defaults that depend on the checkpoint; ValueError for settings that do not go together."""
    if config.bits:
        raise ValueError(f"--init {args.init}: quantised weights cannot be trained")
    method, args.seq_len = trained_method(args.method, config, args.seq_len)
    args.method = str(method)
    args.train_len = config.train_len
    if args.positions != "plain" and method.name == "nope":
        raise ValueError("--positions says where tokens stand, and drope drops that")
    args.window = args.seq_len if args.positions == "plain" else args.row_len or config.train_len
    if args.window > args.seq_len or args.seq_len < config.train_len:
        raise ValueError(f"--seq-len {args.seq_len}: shorter than the old window, or than --row-len")
    args.device = pick_device(args.device)
    args.init_weights = fingerprint(path)
    args.data_hash = short_hash(Path(args.data).read_bytes()) if args.data else None
    if args.builtin is None:
        args.builtin = 0.0 if args.data else 1.0
    if not args.data and args.builtin < 1:
        raise ValueError("--builtin below 1 needs --data")
    if args.plot:
        figure_class()


def complete_recipe(args, weights):
    """Fill in the recipe's defaults for a model of so many weights, and set the threads."""
    small = weights < SMALL
    args.optimizer = args.optimizer or ("muon" if small else "adamw")
    args.lr = args.lr or (7e-4 if small else 2e-5)
    args.batch = args.batch or (max(1, 4096 // args.seq_len) if small else 64)
    args.micro = args.micro or (10 ** 6 if small else 1)
    args.threads = args.threads or (1 if small else torch.get_num_threads())
    torch.set_num_threads(args.threads)  # sums are then made in one order, and a rerun gives the same weights


def write_record(args, argv, path, weights, curve):
    """Write training.json: how the weights were made, after what --init says of its own."""
    words = sys.argv[1:] if argv is None else argv
    before = path / "training.json"
    write_json(args.out / "training.json", {
        "command": " ".join(["python", "finetune.py", *words]), "date": datetime.date.today().isoformat(),
        "settings": {**record(args), "positions": args.positions}, "parameters": weights,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "curve_is": "loss: weighted mean of the rows since the last entry; validation, old_window: nats per token of "
                    "held-out text in rows of the new and of the old window",
        "curve": curve, "init": read_json(before) if before.is_file() else None})


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    path = find_checkpoint(args.init)
    refuse_unfinished(path)
    if (args.out / "training.json").exists() and not (args.out / UNFINISHED).exists():
        raise ValueError(f"{args.out} holds a finished run; choose another --out, or delete it")
    config = Config.from_hf(path, args.train_len)
    tokenizer = load_tokenizer(path, config.bos_token_id)
    complete(args, path, config)
    model = open_model(args, config, path)
    weights = sum(weight.numel() for weight in model.parameters())
    complete_recipe(args, weights)
    say("finetune " + settings_line(vars(args)))
    source = make_source(args, tokenizer, config)
    args.out.mkdir(parents=True, exist_ok=True)
    stored = getattr(torch, args.store or config.dtype)
    raw = {**read_json(path / "config.json"), "torch_dtype": str(stored).removeprefix("torch.")}
    raw = new_config({name: value for name, value in raw.items() if name != "dtype"}, config,
                     Method.parse(args.method), args.seq_len)

    def keep(step):
        if step in args.keep:
            write_folder(args.out / f"step-{step}", path, model, raw, stored)
    curve = train(args, model, tokenizer, source, keep)
    write_folder(args.out, path, model, raw, stored)
    write_record(args, argv, path, weights, curve)
    (args.out / UNFINISHED).unlink()
    if args.plot:
        plot_training(curve, args.method, args.plot)
    return 0


if __name__ == "__main__":
    run_command(run, "finetune.py")
