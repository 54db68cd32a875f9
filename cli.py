"""What the scripts share: flags, opening a checkpoint, errors in one line, tables, and a results file that can resume.

Does not: decide what a script measures.

    parser, flag = new_parser(__doc__)
    path, config, tokenizer = open_checkpoint(parser.parse_args())
"""
import argparse
import contextlib
import ctypes
import hashlib
import inspect
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path

import torch

import hf
from attention import IMPLEMENTATIONS
from cache import CACHE_DTYPES, KVCache, load_cache, save_cache
from checkpoint import find_checkpoint, refuse_unfinished
from config import Config
from geometry import METHODS
from model import DTYPES, load_model
from parallel import spread
from positions import Method
from quantized import BITS, bits_asked
from ranks import TIMEOUT, Ranks, join
from shards import load_shard
from single_row import has_compiler
from tasks import passkey_prompt
from tokenizer import load_tokenizer, until_stop

LONGEST_DEFAULT = 8192      # tokens of the prompt where none is given: a large model takes minutes for as many
KEY = "71432"               # that is hidden in it

# ---------------------------------------------------------------------------------------------------------------------
# running a script

def run_command(run, name):
    """Run a script and exit with the code that it returns; bad input is one line on stderr, "name: ...", and code 2.

    Where torchrun has started several processes, run gets their Ranks, as ranks=; only rank 0 prints.
    """
    ranks = join(name)
    stderr = sys.stderr     # --quiet changes it
    try:
        with warnings.catch_warnings():
            warnings.showwarning = say_warning
            code = run() if ranks.size == 1 else run_on_ranks(run, ranks)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout has gone; Python would complain again when it flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ValueError, OSError, OverflowError) as error:
        sys.stderr = stderr
        ranks.complain(f"{name}: {error}")
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:  # of argparse, which has said why
        code = end.code
    except RuntimeError as error:
        ranks.blame(error)
        raise
    sys.stderr = stderr
    ranks.leave(code)
    sys.exit(code)


def run_on_ranks(run, ranks):
    """run(ranks=ranks); ValueError for a script that has no use for several processes."""
    if "ranks" not in inspect.signature(run).parameters:
        raise ValueError("this script runs in one process, not under torchrun")
    return run(ranks=ranks)


class WarningsOnly:
    """In the place of stderr: passes on lines that begin with "warning: ", and drops the rest."""

    def __init__(self, stream):
        self.stream = stream
        self.unfinished = ""

    def write(self, text):
        *lines, self.unfinished = (self.unfinished + text).split("\n")
        for line in lines:
            if line.startswith("warning: "):
                self.stream.write(f"{line}\n")
        return len(text)

    def flush(self):
        self.stream.flush()

    def isatty(self):
        return False


def say_warning(message, category, file, line, *_):
    """A warning of ours in one line; others as Python shows them."""
    ours = Path(file).resolve().parent == Path(__file__).resolve().parent
    say(f"warning: {message}" if ours else warnings.formatwarning(message, category, file, line), end="\n" * ours)


def say(text, end="\n"):
    """Print to stderr: all that is not a result."""
    print(text, end=end, file=sys.stderr, flush=True)


def settings_line(settings):
    """{"a": 1, "b": [2, 3]} -> "a=1 b=2,3"."""
    parts = []
    for name, value in settings.items():
        if isinstance(value, list):
            value = ",".join(str(item) for item in value)
        if value is None:
            value = "none"
        parts.append(f"{name}={value}")
    return " ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# flags

def new_parser(doc):
    """(parser, flag) of a script that runs a checkpoint: plain_parser with the flags about the model in it."""
    parser, flag = plain_parser(doc)
    flag("ckpt", default="tiny", help="a folder, or a name in this one or in checkpoints/")
    flag("dtype", choices=["auto", *DTYPES], default="auto")
    flag("device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    flag("impl", choices=IMPLEMENTATIONS, default="auto", help="how attention is computed")
    flag("cache-dtype", choices=CACHE_DTYPES, help="hold keys and values in fewer bytes; default: as they are")
    flag("train-len", type=number(int, 1), help="override the training length L of config.json")
    flag("quantize", choices=BITS, help="weights of 8 or 4 bits, see quantized.py; default: as stored")
    flag("threads", type=number(int, 1, 1024), help="of the CPU; default: as many as it has cores")
    flag("quiet", action="store_true", help="on stderr only warnings, and what went wrong")
    return parser, flag


def plain_parser(doc):
    """(parser, flag) of a script with this docstring; flag("kv-heads") adds --kv-heads, which --kv_heads means too.

    flag("methods", "method") adds one flag with two names; the first names the attribute. --help shows the first
    spelling alone, and the default of every flag that takes a value.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False,
                                     usage="%(prog)s [flags]; --help lists them")

    def flag(*names, **options):
        shown = f"--{names[0]}"
        spellings = [f"--{spelling}" for name in names for spelling in (name, name.replace("-", "_"))]
        hidden = [spelling for spelling in dict.fromkeys(spellings) if spelling != shown]
        others = {**options, "dest": names[0].replace("-", "_"), "default": argparse.SUPPRESS, "required": False,
                  "help": argparse.SUPPRESS}
        text = help_text(options)
        group = parser
        if options.pop("required", False):
            group = parser.add_mutually_exclusive_group(required=True)  # any of the spellings will do
        group.add_argument(shown, **{**options, "help": text})
        if hidden:
            group.add_argument(*hidden, **others)
    return parser, flag


def help_text(options):
    """The help of a flag with these options of add_argument, with its default where it takes a value."""
    text = options.get("help", "")
    if options.get("action") == "store_true" or "default" in text or options.get("required"):
        return text
    default = options.get("default")
    value = "%(default)s" if default not in (None, []) else "none"
    return f"{text}; default: {value}".removeprefix("; ")


def number(kind, least, most=float("inf")):
    """An argparse type: a number of this kind, int or float, between least and most."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def rank_flags(flag, evaluation=False):
    """Add the flags about several processes; in an evaluation also what they share out."""
    flag("tensor-parallel", type=number(int, 1), default=1, metavar="N",
         help="under torchrun: cut the matrices among N ranks; default: 1")
    flag("timeout", type=number(float, 1), default=TIMEOUT,
         help="under torchrun: seconds after which a rank that does not answer is given up; default: %(default)g")
    if evaluation:
        flag("share", choices=["trials", "keys"], default="trials", help="what the ranks of torchrun share out: the "
             "trials, or the keys of every prompt, where one rank has no room for them")


def prompt_flags(flag):
    """Add the flags that say what is continued, and until when."""
    flag("prompt", help="text to continue; default: a passkey prompt of 8 times the window, of at most "
         f"{LONGEST_DEFAULT} tokens")
    flag("prompt-file", action="append", metavar="PATH", help="read the prompt from a UTF-8 file, - for stdin; "
         "repeatable: prompts that are answered together")
    flag("prompt-ids", type=token_ids, metavar="IDS", help="the prompt as token ids, 1,2,3; nothing is added")
    flag("prompts", metavar="FILE", help="many prompts from a file of JSON lines, each with a \"prompt\" or \"ids\"")
    flag("out", metavar="FILE", help="of --prompts: their answers as JSON lines; those that are there are kept")
    flag("rows", type=number(int, 1), default=16, help="prompts that are answered at once; default: %(default)s")
    flag("chat", action="store_true", help="turns on stdin and stdout, by the checkpoint's chat template")
    flag("system", metavar="TEXT", help="the system message of a chat")
    flag("stop", action="append", default=[], type=some_text, metavar="TEXT",
         help="end an answer where this text appears; repeatable")
    flag("save-cache", metavar="FILE", help="keep the cache of the prompt, or of the chat, in a safetensors file")
    flag("load-cache", metavar="FILE", help="go on after the prompt, or the chat, of a saved cache")


def token_ids(text):
    """An argparse type: "1,2,3" -> [1, 2, 3]."""
    return [int(part) for part in text.split(",")]


def some_text(text):
    """An argparse type: a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def counts(text):
    """An argparse type: "256,1024" -> [256, 1024], all at least 1."""
    parse = number(int, 1)
    return [parse(part) for part in text.split(",")]


def method_list(text):
    """An argparse type: methods, as text, from a comma-separated list. See positions.Method for how one is written.

    What has no name but a "=" goes on with the method before it, and a list keeps its commas:
    "mesa:first=16,last=8,rope" -> ["mesa:first=16:last=8", "rope"].
    """
    methods = []
    for part in re.split(r",(?![^\[]*\])", text):
        is_setting = "=" in part.split(":")[0]
        if is_setting and methods:
            methods[-1] += f":{part}"
        elif part:
            methods.append(part)
    if not methods:
        raise argparse.ArgumentTypeError("no method given")
    return methods


def methods_asked(config, asked, default):
    """The Methods of the texts asked for. None means the default texts and ["all"] every row of METHODS, of these only
    what the model can take."""
    if asked is None:
        candidates = dict.fromkeys(default)
    elif "all" in asked:
        if len(asked) > 1:
            raise ValueError(f"all means every method: name it alone, or the others without it ({', '.join(asked)})")
        candidates = METHODS
    else:
        return [Method.parse(text) for text in asked]
    methods = [Method.parse(text) for text in candidates]
    return [method for method in methods if can_take(config, method)]


def can_take(config, method):
    """Whether a model has what a method needs: rotary frequencies to change, or factors that a config.json holds."""
    try:
        method.plan(config, n=2)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# several processes

def agreed(ranks, args, path, **found):
    """The Ranks, those of a process alone where ranks is None, once all have the same checkpoint, and the same of all
    else that is found. ValueError that names who has another, or where the model cannot be shared out."""
    ranks = ranks or Ranks()
    ranks.timeout = args.timeout
    is_shared = args.tensor_parallel > 1 or ranks.size > 1 and is_together(args)
    if is_shared and hf.takes(path):
        raise ValueError(f"{path}: a model that runs through transformers is not shared out among processes")
    if ranks.size > 1:
        ranks.check_same(checkpoint=fingerprint(path),
                         **{name: short_hash(str(value).encode()) for name, value in found.items()})
    return ranks


def is_together(args):
    """Whether the ranks all work on every prompt: those of an evaluation may take a trial each."""
    return getattr(args, "share", "keys") == "keys" or args.tensor_parallel > 1


# ---------------------------------------------------------------------------------------------------------------------
# the model asked for

def open_checkpoint(args):
    """(folder, Config, Tokenizer) of --ckpt and --train-len."""
    path = find_checkpoint(args.ckpt)
    refuse_unfinished(path)
    if hf.takes(path):
        if args.quantize:
            raise ValueError(f"{path}: --quantize is for families of model.py; transformers quantises by its own means")
        return path, *hf.open_folder(path, args.train_len)
    config = Config.from_hf(path, args.train_len)
    return path, config, load_tokenizer(path, config.bos_token_id, config.vocab_size)


def open_model(args, path, config, dtype, device, tokens=0, ranks=None):
    """The model of open_checkpoint's folder: a model.Llama, its keys spread over ranks where they work together and its
    matrices cut by --tensor-parallel, or a hf.Model where only transformers knows the family; tokens as in
    model.load_model."""
    ranks = ranks or Ranks()
    if hf.takes(path):
        return hf.load_model(path, config, dtype, device, args.train_len)
    if args.tensor_parallel > 1:
        ranks, matrices = ranks.split(args.tensor_parallel)
        model = load_shard(path, config, matrices, dtype, device, tokens, args.quantize)
    else:
        model = load_model(path, config, dtype, device, tokens, args.quantize)
    if is_together(args):
        spread(model, ranks)
    return model


def place(args, config):
    """(device, torch dtype) of --device and --dtype, with malloc set for running a model there; and what --threads,
    --quiet, and for the config --cache-dtype say."""
    keep_freed_memory()
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    if getattr(args, "quiet", False):
        sys.stderr = WarningsOnly(sys.stderr)
    config.cache_dtype = args.cache_dtype
    bits_asked(config, args.quantize)  # a wrong one shows here, before anything long
    device = pick_device(args.device)
    return device, pick_dtype(args.dtype, config.dtype, device)


def pick_device(name):
    """The torch device for --device; "auto" is the best one there is."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in here if here[device])
    if not here[name]:
        raise ValueError(f"--device {name}: this machine has none")
    return name


def pick_dtype(name, stored, device):
    """The torch dtype for --dtype; "auto" is as stored, but bfloat16 for float16 on a CPU, which is slow at it."""
    if name == "auto":
        name = stored
        if stored == "float16" and device == "cpu":
            name = "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"weights of type {name} are not supported; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def read_prompt(args):
    """The prompt's text, or None where none is given."""
    given = [name for name in ("prompt", "prompt_file", "prompt_ids") if getattr(args, name) is not None]
    if len(given) > 1:
        flags = [f"--{name.replace('_', '-')}" for name in given]
        raise ValueError(f"give {' or '.join(flags)}, not both")
    if args.chat and (args.prompt_ids or args.explain):
        raise ValueError("--prompt-ids and --explain are for one prompt, not for --chat")
    if args.system is not None and not args.chat:
        raise ValueError("--system is for --chat")
    text = args.prompt if args.prompt_file is None else read_text(args.prompt_file[0])
    if text is not None and not text.strip():
        raise ValueError("the prompt is empty")
    return text


def prompt_ids(args, text, tokenizer, L, before=()):
    """Token ids of the prompt of this text, or of a passkey prompt of 8 times the window L, of at most LONGEST_DEFAULT
    tokens; before: ids in front."""
    if args.prompt_ids is not None:
        return [*before, *args.prompt_ids]
    if text is not None:
        return [*before, *tokenizer.encode_more(text)] if before else tokenizer.encode(text)
    if before:
        raise ValueError("--load-cache needs a prompt that goes on after it")
    n = min(8 * L, LONGEST_DEFAULT)
    say(f"no prompt given: a passkey prompt of {n} tokens, {n / L:.3g} times the window; the key is {KEY}")
    return passkey_prompt(tokenizer, n).ids


def cache_settings(args, path, config, method, dtype):
    """What a saved cache and the run that loads it must have in common, as {name: text}."""
    params = dict(sorted(method.params.items()))
    method = Method(method.name or config.freq, method.freq, method.attn_scale, params)
    return {"checkpoint": fingerprint(path), "method": str(method), "train-len": str(config.train_len),
            "dtype": type_name(dtype), "quantize": str(args.quantize),
            "cache-dtype": str(args.cache_dtype)}


def open_cache(file, config, settings, device):
    """(KVCache, the token ids in it, note) of a saved cache, see cache.load_cache; empty where file is None."""
    if file is None:
        return KVCache(config), [], ""
    cache, ids, note = load_cache(file, config, settings, device)
    say(f"{file}: {len(ids)} tokens")
    return cache, ids, note


def keep_cache(file, cache, ids, settings, note):
    """Save what a cache holds of ids, unless file is None; not, and say so, where Ctrl-C came before it held all."""
    if file is None:
        return
    if not 0 < len(ids) <= len(cache):
        say(f"{file}: not saved, as the prompt was not read to its end")
        return
    save_cache(file, cache, ids, settings, note)
    say(f"{file}: {len(ids)} tokens saved")


def model_settings(args, path, L, dtype, **protocol):
    """The settings that tell the rows of an evaluation from others: its protocol, and all that is about the model."""
    return {"ckpt": args.ckpt, "weights": fingerprint(path), **protocol, "train_len": L, "dtype": type_name(dtype),
            "impl": args.impl, "quantize": args.quantize, "cache_dtype": args.cache_dtype}


def type_name(dtype):
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def keep_freed_memory(most=2 ** 29, block=2 ** 25):
    """Let malloc keep up to `most` bytes of freed memory, in blocks below `block` bytes, for what comes next.

    Memory given back and taken anew costs a page fault per 4 KiB, up to a fifth of a 1B model's prefill on a CPU. Where
    malloc is not glibc's, nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-1, most)   # M_TRIM_THRESHOLD
    mallopt(-3, block)  # M_MMAP_THRESHOLD


def check_compile(args, path):
    """ValueError where --compile is asked for and cannot be had: without a C++ compiler, or for a hf.Model."""
    if args.compile and hf.takes(path):
        raise ValueError("--compile is not there for a model that runs through transformers")
    if args.compile and not has_compiler():
        raise ValueError("torch.compile needs a C++ compiler (g++ or clang++), and there is none")


def compile_dense(model):
    """Let torch.compile fuse the feed-forward networks of a Llama, in place, for more than one token at a time: takes
    half a minute, and a prompt is read up to a fifth faster."""
    for block in model.model.layers:
        block.feed_forward = compiled_for_many(block.feed_forward)


def compiled_for_many(f):
    """f(x) (B, T, *), compiled where T is more than one: single_row.py is for one."""
    compiled = torch.compile(f, dynamic=True)

    def run(x):
        return f(x) if x.shape[1] == 1 else compiled(x)
    return run


class Progress:
    """progress(done, total) says how far something has come and how long the rest will take, if all of it takes two
    seconds or more: on a terminal in one line that is written over, elsewhere in a line now and then."""

    def __init__(self, what):
        self.what = what
        self.last = None                # done, when it was told last; None before it begins, and after it has ended

    def __call__(self, done, total):
        now = time.monotonic()
        if self.last is None or done < self.last:
            self.first = done           # more than 0 where a cache holds the first tokens of a prompt
            self.began = now
            self.said = None            # when something was said last
        self.last = done if done < total else None
        if done == self.first:
            return
        elapsed = now - self.began
        left = elapsed / (done - self.first) * (total - done)
        pause = 0.2 if sys.stderr.isatty() else max(2.0, elapsed / 10)
        is_soon = self.said is not None and now - self.said < pause and done < total
        if elapsed + left < 2 or is_soon:
            return
        self.said = now
        say_over(f"{self.what} {done}/{total}, {left:.0f} s left", done == total)


def say_over(text, is_last=False):
    """Print to stderr: on a terminal in the place of the line before, unless that was the last one of its kind."""
    if sys.stderr.isatty():
        say(f"\r\033[K{text}", end="\n" if is_last else "")
    else:
        say(text)


def write_stream(tokens, tokenizer, ids, device, stops=(), cached=0, key=None):
    """Print the continuation of ids, an iterator of tokens, as it comes, then tokens/s and peak memory; Ctrl-C and the
    texts in stops end it early. cached: how many of ids need not be computed. key: the digits that are the right
    answer, if they are known. The exit code."""
    times = []  # when each new token came
    written = ""

    def timed():
        for token in tokens:
            times.append(time.perf_counter())
            yield token

    t_start = time.perf_counter()
    code = 0
    try:
        for text in until_stop(tokenizer.stream(timed(), ids), stops):
            print(text, end="", flush=True)
            written += text
    except KeyboardInterrupt:
        say("\ninterrupted")
        code = 130
    print(flush=True)
    if key is not None:
        found = re.search(r"\d+", written)
        is_right = found is not None and found.group() == key
        say(f"the answer is right: {key}" if is_right else f"the answer is wrong: the key was {key}")
    if times:
        say_speed(len(ids) - cached, t_start, times, device)
    return code


def say_speed(n, t_start, times, device):
    """Tokens per second of the prefill of n tokens and of decoding, and peak memory."""
    t_first = times[0]
    t_end = times[-1]
    line = f"prefill {n / (t_first - t_start):.1f} tokens/s"
    if len(times) > 1:
        line += f", decode {(len(times) - 1) / (t_end - t_first):.1f} tokens/s"
    peak = peak_memory(device)
    if peak:
        line += f", peak memory {peak / 2**20:.0f} MiB"
    say(line)


def peak_memory(device):
    """Peak memory in bytes: of the accelerator on cuda, else of the process; None where the platform does not say."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = process_bytes("VmHWM")  # what getrusage says may be the peak of the process that started this one
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def process_bytes(field):
    """A size of this process in bytes, VmRSS now or VmHWM at most; None on a platform without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
    except (OSError, StopIteration):
        return None


def read_text(path):
    """The text of a UTF-8 file, - for stdin; ValueError where it is something else."""
    raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


# ---------------------------------------------------------------------------------------------------------------------
# results

class Results:
    """A file of results that an interrupted run continues: a JSON object a line, each written as soon as it is known.

    rows: {key: row} of the rows in the file that were made with the same settings; a row's key is its values of
    key_fields. Rows of other settings stay in the file, and are not in rows.
    Of several ranks, which all see the file, each runs what it claims; with together all run everything, rank 0 writes.
    """

    def __init__(self, path, settings, key_fields, ranks=None, together=False):
        self.path = Path(path)
        self.settings = settings
        self.key_fields = key_fields
        self.ranks = ranks or Ranks()
        self.together = together
        self.rows = {}
        open(self.path, "a").close()  # an OSError, before anything long, where it cannot be written
        self.rows = self.ranks.share(self.read)
        if not together:
            self.ranks.life.state = "alone"

    def read(self):
        """The rows of these settings in the file, by key."""
        with locked(self.path):
            rows = read_rows(self.path)
        return {self.key(row): row for row in rows if self.has_settings_of(row)}

    def has_settings_of(self, row):
        return all(row.get(name) == value for name, value in self.settings.items())

    def key(self, row):
        return tuple(row[name] for name in self.key_fields)

    def claim(self, keys):
        """Whether this rank is to find the rows of these keys: one is missing, and no other rank is at it."""
        if all(key in self.rows for key in keys):
            return False
        return self.together or self.ranks.claim(keys[0])

    def add(self, rows):
        """Append the rows that are not there yet, in one write."""
        fresh = [{**row, **self.settings} for row in rows if self.key(row) not in self.rows]
        if not self.together or self.ranks.rank == 0:
            with locked(self.path):
                if self.ranks.size > 1:
                    read_rows(self.path)  # cuts off half a line of a rank that was killed
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in fresh))
        for row in fresh:
            self.rows[self.key(row)] = row

    def gather(self):
        """Take in what the other ranks have found so far."""
        if self.ranks.size > 1 and not self.together:
            self.rows = self.read()

    def finish(self):
        """Wait until all ranks have done what they claimed, and take it in."""
        self.ranks.barrier()
        self.gather()


@contextlib.contextmanager
def locked(path):
    """Hold a file for this process alone, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_rows(path):
    """The rows of a results file, none where there is no file. Half a line at its end, which a killed run has left, is
    cut off. ValueError for a line that is no result."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    rows = []
    for count, line in enumerate(data[:end].splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {count} is not a result; choose another --results file")
        rows.append(row)
    half = data[end:]
    if half and not half.startswith(b"{"):  # of another program: nothing of it is to be lost
        raise ValueError(f"{path}: its last line is not a result; choose another --results file")
    if half:
        os.truncate(path, end)
    return rows


def select(rows, **where):
    """The rows with these values: select(rows, method="mesa", length=256)."""
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def accuracy(rows):
    """The share of rows that are correct; nan of no rows."""
    if not rows:
        return float("nan")
    return sum(row["correct"] for row in rows) / len(rows)


def markdown(header, rows):
    """A table as markdown: the cells of the header, and of every row."""
    rule = "|---" * len(header) + "|"
    head, *lines = ["| " + " | ".join(str(cell) for cell in cells) + " |" for cells in [header, *rows]]
    return "\n".join([head, rule, *lines])


def short_hash(data):
    """16 hexadecimal digits that tell these bytes from others."""
    return hashlib.sha256(data).hexdigest()[:16]


def fingerprint(path):
    """A short hash of a checkpoint: its config, and the name, size and first megabyte of its weight files."""
    data = (path / "config.json").read_bytes()
    for file in sorted(path.glob("*.safetensors")):
        with open(file, "rb") as weights:
            data += f"{file.name} {file.stat().st_size}".encode() + weights.read(2 ** 20)
    return short_hash(data)
