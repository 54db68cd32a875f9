"""Run a LLaMA checkpoint from the command line, past its training length, with any method of positions.py.

Does: load, prefill in pieces, sample, stream text to stdout (all else goes to stderr). Does not: chat, batch, train.

    python generate.py --method mesa                              # the shipped model, a passkey at 8 times its window
    python generate.py --method mesa --ckpt llama-7b --prompt-file book.txt
"""
import argparse
import ctypes
import itertools
import sys
import time
from pathlib import Path

import torch

from attention import IMPLEMENTATIONS
from model import DTYPES, Config, KVCache, compile_dense, load_model, load_tokenizer
from positions import (FREQUENCIES, METHODS, SCALES, advice, cosscale, describe, example, farthest, full, parameters,
                       parse_settings, picture, reach, run_command, within)

HERE = Path(__file__).parent
TASK = "There is a pass key hidden in the text below. Find it and remember it."
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
STATE = "training-state.pt"  # in a folder that train.py has not finished; it writes and deletes it


# ---------------------------------------------------------------------------------------------------------------------
# the library: token ids in, token ids out

def generate(model, ids, method=None, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, seed=None,
             prefill_chunk=8192, impl="auto", freq=None, attn_scale=None, params=None, progress=None):
    """Yield up to max_new_tokens token ids that continue ids; the eos id that ends a text is the last one.

    method, freq, attn_scale and params (a dict) are those of Llama.plan; method None is what config.json says.
    temperature 0 is greedy. progress(done, n) is called after every piece of the prefill. Raises ValueError for an
    empty prompt.
    """
    if not ids:
        raise ValueError("the prompt is empty")
    if min(ids) < 0 or max(ids) >= model.config.vocab_size:
        raise ValueError(f"token ids outside the model's vocabulary of {model.config.vocab_size}; wrong tokenizer?")
    generator = torch.Generator().manual_seed(seed) if seed is not None else None

    def choose(logits):
        return sample(logits.float().cpu(), temperature, top_k, top_p, generator)
    plan = plan_maker(model, len(ids), method, freq, attn_scale, params)
    logits, cache = prefill(model, torch.tensor([ids]), plan, max_new_tokens, prefill_chunk, impl, progress)
    for token in decode(model, logits, cache, plan, choose, max_new_tokens, impl):
        yield int(token)
        if int(token) in model.config.eos_token_id:
            return


def plan_maker(model, n, method=None, freq=None, attn_scale=None, params=None):
    """plan(i, j) of one method for a prompt of n tokens, for any queries and keys of it and of what follows it."""
    return lambda i, j: model.plan(method, n=n, i=i, j=j, freq=freq, attn_scale=attn_scale, **(params or {}))


@torch.no_grad()
def prefill(model, tokens, plan, room=64, chunk=8192, impl="auto", progress=None):
    """Read prompts tokens (B, n) in pieces: the logits (B, vocab_size) after them, and a cache with room for more."""
    n, device = tokens.shape[1], next(model.parameters()).device
    cache = KVCache(model.config, n + min(room, 1024))
    for begin in range(0, n, chunk):
        stop = min(begin + chunk, n)
        step = plan(torch.arange(begin, stop), torch.arange(stop))
        logits = model(tokens[:, begin:stop].to(device), step, cache, last_only=True, impl=impl)
        if progress:
            progress(stop, n)
    return logits[:, -1], cache


@torch.inference_mode()
def decode(model, logits, cache, plan, choose, max_new_tokens, impl="auto"):
    """Yield max_new_tokens times the next token (B,) of every row: choose(logits (B, vocab_size)). See prefill."""
    for left in range(max_new_tokens, 0, -1):
        token = choose(logits)
        yield token
        if left > 1:
            step = plan(torch.tensor([len(cache)]), torch.arange(len(cache) + 1))
            logits = model(token[:, None].to(logits.device), step, cache, impl=impl)[:, -1]


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """A token (B,) drawn from logits (B, vocab_size): the likeliest at temperature 0, else from the top_k likeliest
    (0: all) and the fewest that together hold top_p of the probability."""
    if temperature < 1e-5:  # where the division would overflow
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)
    if top_k:
        logits[:, top_k:] = -torch.inf
    p = logits.softmax(-1)
    p[p.cumsum(-1) - p > top_p] = 0  # the mass before a token already suffices; the first always stays
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


def passkey_parts(tokenizer, n, depth=0.5, key="71432", filler=FILLER):
    """Token ids (before, needle, after) of a passkey prompt of exactly n tokens; depth 0 is its start, 1 its end.

    Each part is encoded on its own, which puts a space in front of it, and the filler is cut by tokens, not words.
    Raises ValueError where n is too short to hold the question.
    """
    task, needle, question, fill = (tokenizer.encode(text, bos=False)
                                    for text in (TASK, NEEDLE.format(key=key), QUESTION, filler))
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = n - len(head + task + needle + question)
    if room < 0:
        raise ValueError(f"a passkey prompt takes at least {n - room} tokens, not {n}")
    first = round(depth * room)
    return head + task + cycled(fill, first), needle, cycled(fill, room - first) + question


def cycled(ids, count):
    """The first count of ids, over and over."""
    return list(itertools.islice(itertools.cycle(ids), count))


def passkey_prompt(tokenizer, n, depth=0.5, key="71432", filler=FILLER):
    """The token ids of passkey_parts in one list of exactly n."""
    before, needle, after = passkey_parts(tokenizer, n, depth, key, filler)
    return before + needle + after


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def find_checkpoint(name):
    """The folder of a checkpoint: name itself, or checkpoints/name here or beside this file."""
    places = [Path(name), Path("checkpoints") / name, HERE / "checkpoints" / name]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"no checkpoint folder {name} (looked at {', '.join(map(str, places))})")


def opened(args):
    """(folder, Config, tokenizer) of --ckpt and --train-len."""
    path = find_checkpoint(args.ckpt)
    if (path / STATE).exists():
        raise ValueError(f"{path}: an unfinished run of train.py; the same command finishes it")
    config = Config.from_hf(path, args.train_len)
    return path, config, load_tokenizer(path, config)


def placed(args, config):
    """(device, dtype) of --device and --dtype, with malloc set for running a model there."""
    keep_freed_memory()
    device = pick_device(args.device)
    return device, pick_dtype(args.dtype, config.dtype, device)


def keep_freed_memory(most=2 ** 29, block=2 ** 25):
    """Let malloc keep up to `most` bytes of freed memory, in blocks below `block`, for what comes next.

    Memory given back and taken anew costs a page fault per 4 KiB, up to a quarter of a long prefill on a CPU. Where
    malloc is not glibc's, nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-1, most)   # M_TRIM_THRESHOLD
    mallopt(-3, block)  # M_MMAP_THRESHOLD


def pick_device(name):
    """The torch device for --device, "auto" being the best one there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in there if there[device])
    if not there[name]:
        raise ValueError(f"--device {name}: this machine has none")
    return name


def pick_dtype(name, stored, device):
    """The torch dtype for --dtype; "auto" is as stored, but bfloat16 for float16 on a CPU, which is slow at it."""
    if name == "auto":
        name = "bfloat16" if stored == "float16" and device == "cpu" else stored
    if name not in DTYPES:
        raise ValueError(f"weights of type {name} are not supported; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def read_text(path):
    """The text of a UTF-8 file, - for stdin; ValueError where it is something else."""
    raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_prompt(args):
    """The prompt's text, or None where none is given."""
    if args.prompt_file is None:
        return args.prompt
    if args.prompt is not None:
        raise ValueError("give --prompt or --prompt-file, not both")
    return read_text(args.prompt_file)


def prompt_ids(args, tokenizer, L):
    """Token ids of the prompt, or of the built-in passkey prompt of 8 times the window L."""
    text = read_prompt(args)
    if text is None:
        say(f"no prompt given: a passkey prompt of {8 * L} tokens, 8 times the window; the key is 71432")
        return passkey_prompt(tokenizer, 8 * L)
    if not text.strip():
        raise ValueError("the prompt is empty")
    return tokenizer.encode(text)


def say(text, end="\n"):
    print(text, end=end, file=sys.stderr, flush=True)


def list_methods():
    """Every method with the sentence that explains it and its parameters."""
    for name, row in METHODS.items():
        geometry, frequencies, scale = row
        main_idea = geometry if geometry is not full else frequencies or scale
        settings = ", ".join(f"{k}={'auto' if v is None else v}" for k, v in parameters(*row).items())
        settings = settings or "cosine=32" * (geometry is cosscale)
        sharp = scale.__name__ if scale else "mscale" if "beta_fast" in parameters(frequencies) else "none"
        print(f"{name:13} {' '.join(main_idea.__doc__.split(chr(10))[0].split())}")
        print(" " * 13, f"parameters: {settings or 'none'}; attention scale: {sharp}")


def explain(config, n, method, freq, attn_scale, params):
    """What a method does with a prompt of n tokens on this model, how far it reaches, and a small picture of it."""
    L, name = config.train_len, method or config.freq

    def plan_at(n, i=None, j=None):
        return config.plan(method, n=n, i=i, j=j, freq=freq, attn_scale=attn_scale, **params)
    plan = plan_at(n)
    lines = [f"{name}: prompt of {n} tokens, training length {L} ({n / L:.3g} times)", *describe(plan, n, L)]
    if plan.q_scale is not None:
        lines.append(f"attention scale: {float(plan.q_scale.min()):.3f} to {float(plan.q_scale.max()):.3f}")
    if plan.mscale != 1:
        lines.append(f"logits times {plan.mscale ** 2:.3f}")
    far = reach(plan_at, L, config.rope_theta)
    lines.append(f"reach of a prompt with {'these parameters' if params else 'parameters that follow its length'}: "
                 f"{f'{far} tokens' if far < 2**20 else 'no limit below 2^20 tokens'}")
    return "\n".join([*lines, "in small, 24 tokens, training length 12:", picture(example(name, 24, 12, {}))])


def warnings(config, n, method, freq, attn_scale, params, new=0):
    """Sentences on methods that the model was not trained for, and on a prompt of n tokens, or the `new` tokens decoded
    after it, beyond a method's reach."""
    total = n + new

    def last_row(settings):
        return config.plan(method, n=n, i=torch.tensor([total - 1]), j=torch.arange(total), freq=freq,
                           attn_scale=attn_scale, **settings)

    def fits(over):
        return within(last_row({**params, **over}), config.train_len, config.rope_theta)
    out = config.warnings(method, freq, params.get("cosine"))
    if not fits({}):
        far = max(farthest(r) for r in last_row(params).regions)
        out.append(f"{method or config.freq} puts tokens {far:.6g} apart by token {total}, beyond the training length "
                   f"{config.train_len}: {advice(method or config.freq, freq or config.freq, total, fits)}")
    return out


def number(kind, least, most=float("inf")):
    """An argparse type: a number of this kind between least and most."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value
    parse.__name__ = kind.__name__
    return parse


def method_list(text):
    """An argparse type: "rope,mesa:overlap=32" in parts; see asked_methods."""
    found = [part for part in text.split(",") if part]
    if not found:
        raise argparse.ArgumentTypeError("no method given")
    return found


def asked_methods(config, asked, default):
    """The methods asked for, else the default ones; of these, and of "all", those that the model can take."""
    if asked and asked != ["all"]:
        return asked
    out = []
    for method in dict.fromkeys(METHODS if asked else default):
        try:
            config.plan(method, n=2)
            out.append(method)
        except ValueError:  # it sets frequencies that the model has not, or that only a config.json holds
            pass
    return out


def new_parser(description):
    """(parser, flag) of a script that runs a model, the flags about the model in it; flag("a-b") also takes --a_b."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0], allow_abbrev=False,
                                     usage="%(prog)s [flags]; --help lists them")

    def flag(name, **options):
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}")), **options)
    flag("ckpt", default="tiny", help="a folder, or a name in this one or in checkpoints/")
    flag("dtype", choices=["auto", *DTYPES], default="auto")
    flag("device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    flag("impl", choices=IMPLEMENTATIONS, default="auto", help="how attention is computed")
    flag("train-len", type=number(int, 1), help="override the training length L of config.json")
    return parser, flag


def parse_args(argv):
    parser, flag = new_parser(__doc__)
    flag("method", help="see --list-methods; default: what config.json says")
    flag("prompt", help="text to continue; default: a passkey prompt of 8 times the window")
    flag("prompt-file", metavar="PATH", help="read the prompt from a UTF-8 file, - for stdin")
    flag("max-new-tokens", type=number(int, 1, 10 ** 9), default=64)
    flag("temperature", type=number(float, 0), default=0.0, help="0 is greedy")
    flag("top-k", type=number(int, 0), default=0, help="0 is all")
    flag("top-p", type=number(float, 0, 1), default=1.0)
    flag("seed", type=number(int, 0, 2 ** 63 - 1), default=1337)
    flag("prefill-chunk", type=number(int, 1), default=8192, help="tokens per piece of the prefill")
    flag("set", action="append", default=[], metavar="name=value", help="a parameter of the method; repeatable")
    flag("freq", choices=FREQUENCIES, help="frequencies, for a method that has none of its own; default: the model's")
    flag("attn-scale", choices=SCALES, help="default: the method's own")
    flag("compile", action="store_true", help="fuse MLPs and norms with torch.compile: for long runs")
    flag("list-methods", action="store_true")
    flag("explain", action="store_true", help="say what the method would do with this prompt, and stop")
    return parser.parse_args(argv)


def settings_line(args, config, n, dtype, device):
    """The one line of resolved settings."""
    method = args.method or f"{config.freq} (config.json)"
    if args.method and config.freq != "rope":
        kept = (args.freq or args.method) == config.freq or METHODS[args.method][1] is None and not args.freq
        method += f" ({config.freq} of config.json {'kept' if kept else 'dropped'})"
    if args.freq:
        method += f" freq={args.freq}"
    scale = METHODS[args.method or config.freq][2]
    shown = {"ckpt": args.ckpt, "method": method, "set": ",".join(args.set) or "defaults",
             "attn-scale": args.attn_scale or (scale.__name__ if scale else "none"), "prompt": n,
             "train-len": config.train_len, "dtype": str(dtype).removeprefix("torch."), "device": device}
    for name in ("impl", "prefill-chunk", "max-new-tokens", "temperature", "top-k", "top-p", "seed"):
        shown[name] = getattr(args, name.replace("-", "_"))
    return " ".join(f"{name}={value}" for name, value in shown.items())


def peak_memory(device):
    """Peak memory in bytes: of the accelerator on cuda, else of the process; None where the platform does not say."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def stream(model, tokenizer, ids, args, params, device):
    """Print the continuation as it comes, then tokens/s and peak memory; Ctrl-C stops it early."""
    moments = [time.perf_counter()]

    def timed(tokens):
        for token in tokens:
            moments.append(time.perf_counter())
            yield token

    def progress(done, n):
        if n > args.prefill_chunk:
            say(f"\rprefill {done}/{n}", end="\n" if done == n else "")
    tokens = generate(model, ids, args.method, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed,
                      args.prefill_chunk, args.impl, args.freq, args.attn_scale, params, progress)
    code = 0
    try:
        for text in tokenizer.stream(timed(tokens), ids):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        say("\ninterrupted")
        code = 130
    print(flush=True)
    report(moments, len(ids), device)
    return code


def report(moments, n, device):
    """Tokens per second of prefill and decoding, from the start and the time of every token; and peak memory."""
    if len(moments) < 2:
        return
    start, first, *_, final = moments if len(moments) > 2 else [*moments, moments[-1]]
    line = f"prefill {n / (first - start):.1f} tokens/s"
    if len(moments) > 2:
        line += f", decode {(len(moments) - 2) / (final - first):.1f} tokens/s"
    peak = peak_memory(device)
    say(line + (f", peak memory {peak / 2**20:.0f} MiB" if peak else ""))


def run(argv=None):
    """The command: its exit code."""
    args = parse_args(argv)
    if args.list_methods:
        list_methods()
        return 0
    (path, config, tokenizer), params = opened(args), parse_settings(args.set)
    how = args.method, args.freq, args.attn_scale, params
    config.plan(args.method, n=1, freq=args.freq, attn_scale=args.attn_scale, **params)  # names, before anything long
    ids = prompt_ids(args, tokenizer, config.train_len)
    for warning in warnings(config, len(ids), *how, new=0 if args.explain else min(args.max_new_tokens, 10 ** 6)):
        say(f"warning: {warning}")
    if args.explain:
        print(explain(config, len(ids), *how))
        return 0
    device, dtype = placed(args, config)
    model = load_model(path, config, dtype, device)
    if args.compile:
        compile_dense(model)
    say(settings_line(args, config, len(ids), dtype, device))
    return stream(model, tokenizer, ids, args, params, device)


if __name__ == "__main__":
    run_command(run, "generate.py")
