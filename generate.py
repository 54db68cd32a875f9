"""Continue a prompt with a checkpoint, far past its training length, by any method of geometry.py.

Does: read the prompt in pieces, decode a token at a time, sample, stream text to stdout (all else goes to stderr);
answer many prompts at once. Does not: train.

    python generate.py --method mesa                              # the shipped model, a passkey at 8 times its window
    python generate.py --method mesa:overlap=32 --ckpt llama-7b --prompt-file book.txt
    python generate.py --method mesa --prompts questions.jsonl --out answers.jsonl
"""
from contextlib import contextmanager
from functools import partial

import torch

import hf
import parallel
from batch import (Prompt, Row, decode_rows, ends_with_stop, keep_answers, next_plan, print_answers, prompt_tokens,
                   put_in_order, read_prompts)
from chat import Conversation, chat, open_template
from checkpoint import weight_bytes
from cli import (KEY, Progress, Results, agreed, cache_settings, check_compile, compile_dense, keep_cache, method_list,
                 model_settings, new_parser, number, open_cache, open_checkpoint, open_model, place, prompt_flags,
                 prompt_ids, rank_flags, read_prompt, read_text, run_command, say, settings_line, type_name,
                 write_stream)
from frequencies import FREQUENCIES, SCALES
from geometry import METHODS
from memory import estimate, free_memory, refuse
from positions import Method, parse_settings, setting_text
from ranks import Ranks
from shards import local_config
from show import explain, list_methods, method_note, say_warnings

# ---------------------------------------------------------------------------------------------------------------------
# the library: token ids in, token ids out

def generate(model, ids, method=None, *, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, seed=None,
             prefill_chunk=8192, impl="auto", progress=None, cache=None, freq=None, attn_scale=None, **params):
    """Yield up to max_new_tokens token ids that continue the list ids; the eos id that ends a text is the last one.

    method, freq, attn_scale and params are those of model.plan: generate(model, ids, "mesa", first=16). For temperature
    (0 is greedy), top_k and top_p see sample. progress(done, n) is called while the prompt is read. cache: a
    KVCache that holds the first len(cache) of the ids; only the others are computed, and appended to it.
    Raises ValueError for an empty prompt, and for ids that the model does not have.
    """
    check_ids(model, ids)
    n = len(ids)
    method = Method.of(method, freq, attn_scale, **params).covering(model.config, n, max_new_tokens)
    choose = sampler(temperature, top_k, top_p, seed)
    logits, cache = prefill(model, torch.tensor([ids]), method, max_new_tokens, prefill_chunk, impl, progress,
                            cache)
    for token in decode(model, logits, cache, method, n, choose, max_new_tokens, impl):
        yield int(token)
        if int(token) in model.config.eos_token_id:
            return


def generate_batch(model, prompts, method=None, *, rows=16, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0,
                   seed=None, prefill_chunk=8192, impl="auto", progress=None, ended=None, freq=None, attn_scale=None,
                   **params):
    """Yield (number, its new tokens) of every prompt in a list of lists of ids, as they end: the tokens of generate.

    Prompts may have different lengths, and each has a plan and a cache of its own. rows: how many are decoded at once.
    seed: of every prompt, or a list with one for each. ended(number, tokens): whether the new tokens of a prompt are
    a whole text, if something else than eos may say so. The others are those of generate.
    """
    for ids in prompts:
        check_ids(model, ids)
    method = Method.of(method, freq, attn_scale, **params)
    seeds = seed if isinstance(seed, list) else [seed] * len(prompts)

    def is_whole(index, tokens):
        return tokens[-1] in model.config.eos_token_id or (ended is not None and ended(index, tokens))

    def read():
        for index, (ids, own_seed) in enumerate(zip(prompts, seeds, strict=True)):
            choose = sampler(temperature, top_k, top_p, own_seed)
            own = method.covering(model.config, len(ids), max_new_tokens)
            logits, cache = prefill(model, torch.tensor([ids]), own, max_new_tokens, prefill_chunk, impl, progress)
            yield Row(index, len(ids), own, logits, cache, choose, max_new_tokens, partial(is_whole, index))
    for row in decode_rows(model, read(), rows, impl):
        yield row.number, row.tokens


def check_ids(model, ids):
    """ValueError unless ids are a prompt for this model."""
    if not ids:
        raise ValueError("the prompt is empty")
    if min(ids) < 0 or max(ids) >= model.config.vocab_size:
        raise ValueError(f"token ids outside the model's vocabulary of {model.config.vocab_size}; wrong tokenizer?")


@torch.no_grad()
def prefill(model, tokens, method, room=64, chunk=8192, impl="auto", progress=None, cache=None):
    """Read prompts of equal length, tokens (B, n): the logits (B, vocab_size) after them, and a cache that holds them.

    method: a Method. room: tokens that the cache should have room for beyond the prompt. chunk: tokens per piece, as
    the activations of a long prompt would fill the memory at once. cache: one that holds the first len(cache) tokens.
    """
    n = tokens.shape[1]
    device = next(model.parameters()).device
    cache = parallel.new_cache(model) if cache is None else cache
    if isinstance(cache, parallel.SpreadCache):
        return parallel.prefill(model, tokens, method, cache, room, chunk, impl, progress)
    cache.size = max(cache.size, most_held(method, model.config, n, chunk) + min(room, 1024))
    cache.cut(min(len(cache), n - 1))  # the last token is computed anew for its logits, if it is in the cache
    for begin in range(len(cache), n, chunk):
        end = min(begin + chunk, n)
        # What neither these queries nor later ones see makes room for them: StreamingLLM keeps sinks and a window.
        if begin > 0:
            cache.forget(model.config.later_keys(method, n, begin))
        # The queries of this piece look at all keys up to its end. Where they stand depends on i, j and the length n
        # of the whole prompt, but not on where a piece begins, so pieces of any size give the same result.
        i = torch.arange(begin, end)
        j = cache.indices(new=end - begin)
        plan = model.plan(method, n=n, i=i, j=j)
        # The cache takes the keys and values of the piece, un-rotated. Only the last token's logits are needed.
        with reporting(model, progress, begin, end, n):
            logits = model(tokens[:, begin:end].to(device), plan, cache, last_only=True, impl=impl)
    return logits[:, -1], cache


@contextmanager
def reporting(model, progress, begin, end, n):
    """While the tokens begin..end of a prompt of n are read: progress(done, n) before the first layer and after each,
    as if each read its share of them."""
    hooks = []
    if progress:
        layers = model.layers

        def report(number, *_):
            progress(begin + (end - begin) * number // len(layers), n)
        report(0)
        hooks = [layer.register_forward_hook(partial(report, k + 1)) for k, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def most_held(method, config, n, chunk):
    """How many tokens of a prompt of n a cache holds at once: all, or what later queries see of them and a piece."""
    seen = sum(stop - start for start, stop in config.later_keys(method, n, n))
    return min(n, seen + chunk)


@torch.inference_mode()
def decode(model, logits, cache, method, n, choose, max_new_tokens, impl="auto"):
    """Yield the next token (B,) of every row, max_new_tokens times: choose(logits (B, vocab_size)).

    logits and cache are those of prefill, method a Method, n the length of the prompt.
    """
    for step in range(max_new_tokens):
        token = choose(logits)
        if model.ranks:
            token = model.ranks.agree(token)
        yield token
        if step + 1 == max_new_tokens:
            return  # nobody wants the logits after the last token
        # The new token becomes the one query, at index len(cache). It looks at all that is cached, and at itself.
        # n stays that of the prompt, since what is cached was computed at positions that may depend on it.
        plan = next_plan(model, method, n, cache)
        logits = model(token[:, None].to(logits.device), plan, cache, impl=impl)[:, -1]


def sampler(temperature=0.0, top_k=0, top_p=1.0, seed=None):
    """choose(logits (B, vocab_size)) -> token (B,), by sample with random numbers of its own."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def choose(logits):
        return sample(logits.float().cpu(), temperature, top_k, top_p, generator)
    return choose


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """A token (B,) drawn from logits (B, vocab_size): the likeliest at temperature 0, else from the top_k likeliest
    (0: all) and the fewest that together hold top_p of the probability."""
    if temperature < 1e-5:  # where the division would overflow
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)
    if top_k:
        logits[:, top_k:] = -torch.inf
    p = logits.softmax(-1)
    likelier = p.cumsum(-1) - p  # the probability of all tokens before this one
    p[likelier > top_p] = 0      # they suffice without it; the first one always stays
    choice = torch.multinomial(p, 1, generator=generator)
    return order.gather(-1, choice)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def parse_args(argv):
    parser, flag = new_parser(__doc__)
    flag("method", "methods", type=method_list, metavar="M",
         help="name[:parameter=value...]; see --list-methods; default: what config.json says")
    prompt_flags(flag)
    rank_flags(flag)
    flag("max-new-tokens", type=number(int, 1, 10 ** 9), default=64)
    flag("temperature", type=number(float, 0), default=0.0, help="0 is greedy")
    flag("top-k", type=number(int, 0), default=0, help="0 is all")
    flag("top-p", type=number(float, 0, 1), default=1.0)
    flag("seed", type=number(int, 0, 2 ** 63 - 1), default=1337)
    flag("prefill-chunk", type=number(int, 1), default=8192, help="tokens per piece of the prefill")
    flag("set", action="append", default=[], metavar="name=value",
         help="parameters of the method, a=1,b=2; repeatable")
    flag("freq", metavar="RULE", help="frequencies, for a method that has none of its own; default: the model's; "
         f"one of {', '.join(FREQUENCIES)}")
    flag("attn-scale", metavar="SCALE", help=f"default: the method's own; one of {', '.join(SCALES)}")
    flag("compile", action="store_true", help="use torch.compile wherever it is faster: for long runs")
    flag("force", action="store_true", help="go on where the machine has too little memory free")
    flag("list-methods", action="store_true")
    flag("explain", action="store_true", help="say what the method would do with this prompt, and stop")
    return parser.parse_args(argv)


def asked_method(args):
    """The Method of --method, --freq, --attn-scale and --set."""
    names = args.method or [None]
    if len(names) > 1:
        raise ValueError(f"--method takes one method here, not {len(names)}: {', '.join(names)}")
    settings = parse_settings(args.set)
    if args.freq:
        settings["freq"] = args.freq
    if args.attn_scale:
        settings["attn_scale"] = args.attn_scale
    return Method.of(names[0], **settings)


def resolved_settings(args, config, method, n, dtype, device):
    """All settings of a run by name, as they turned out, for a prompt of n tokens."""
    _, _, own_scale = METHODS[method.name or config.freq]
    params = [f"{name}={setting_text(value)}" for name, value in method.params.items()]
    settings = {"ckpt": args.ckpt,
                "method": method_note(config, method),
                "set": params or "defaults",
                "attn-scale": method.attn_scale or own_scale or "none",
                "prompt": n,
                "train-len": config.train_len,
                "dtype": type_name(dtype),
                "device": device}
    for name in ("quantize", "cache-dtype", "impl", "prefill-chunk", "max-new-tokens", "temperature", "top-k", "top-p",
                 "seed"):
        settings[name] = getattr(args, name.replace("-", "_"))
    return settings


def warn(args, config, method, n):
    """Say what goes wrong in a prompt of n tokens and what follows it."""
    new = 0 if args.explain else min(args.max_new_tokens, 10 ** 6)
    say_warnings(config, [method.covering(config, n, new)], [max(n, 1)], new)


def shared_input(ranks):
    """input, where rank 0 alone has a stdin."""
    def read(prompt):
        try:
            return input(prompt)
        except EOFError:
            return None

    def ask(prompt):
        line = ranks.share(partial(read, prompt), "asking")
        if line is None:
            raise EOFError
        return line
    return input if ranks.size == 1 else ask


def check_ranks(args, ranks):
    """ValueError for flags that several processes cannot follow."""
    if ranks.size > 1 and is_batch(args):
        raise ValueError("several prompts are answered in one process, not under torchrun")
    if ranks.size > 1 and (args.save_cache or args.load_cache):
        raise ValueError("--save-cache and --load-cache are for one process, not for several")
    if args.tensor_parallel > 1 and args.compile:
        raise ValueError("--compile does not go with --tensor-parallel")


def check_memory(args, path, config, method, lengths, dtype, device, rows=1, ranks=None):
    """Say what prompts of these lengths will take, of each of the ranks; ValueError where that is not free, unless
    --force is given."""
    ranks = ranks or Ranks()
    new = min(args.max_new_tokens, 10 ** 6)
    stored = weight_bytes(path) if hf.takes(path) else None
    models = ranks.models(args.tensor_parallel)
    part = local_config(config, 0, args.tensor_parallel) if args.tensor_parallel > 1 else config
    memory = estimate(part, method, lengths, new, dtype, args.quantize, args.prefill_chunk, rows, device, stored,
                      models)
    text = str(memory) if ranks.size == 1 else f"each of {ranks.size} ranks: {memory}"
    if args.explain:
        print(text)
    else:
        say(text)
    free = ranks.least(free_memory(device) // (ranks.local if device == "cpu" else 1))
    if not args.force and not args.explain:
        refuse(memory, free, config, args.quantize, args.prefill_chunk, rows)


def print_explanation(args, config, method, n, dtype, ranks):
    """What --explain prints before memory is counted."""
    print(explain(config, method, n))
    if ranks.size > args.tensor_parallel:
        print(parallel.explain_ranks(config, method, n, args.max_new_tokens, ranks.size // args.tensor_parallel, dtype,
                                     args.prefill_chunk))


def compiling_pays_for(args):
    """The tokens to decode, for which compiling may pay; see model.load_model."""
    if args.compile:
        return 10 ** 9
    return 0 if args.explain else args.max_new_tokens


def answering(args, model, method, cache):
    """ids -> an iterator of the tokens that continue them, by the flags."""
    return partial(generate, model, method=method, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                   top_k=args.top_k, top_p=args.top_p, seed=args.seed, prefill_chunk=args.prefill_chunk,
                   impl=args.impl, progress=Progress("prefill"), cache=cache)


def run(argv=None, ranks=None):
    """The command: its exit code; ranks: this process among others, a Ranks."""
    args = parse_args(argv)
    ranks = ranks or Ranks()
    if args.list_methods:
        print(list_methods())
        return 0
    check_ranks(args, ranks)
    if is_batch(args):
        return run_batch(args)
    path, config, tokenizer = open_checkpoint(args)
    check_compile(args, path)
    method = asked_method(args)
    method.plan(config, n=1)  # a wrong name or setting shows here, before anything long
    device, dtype = place(args, config)
    saving = cache_settings(args, path, config, method, dtype)
    cache, before, note = open_cache(args.load_cache, config, saving, device)
    template = open_template(path, args.system) if args.chat else None
    text = ranks.share(partial(read_prompt, args)) if args.prompt_file == ["-"] else read_prompt(args)
    ids = list(before) if args.chat else prompt_ids(args, text, tokenizer, config.train_len, before)
    agreed(ranks, args, path, prompt=ids, method=method, type=f"{dtype} {args.cache_dtype}")
    warn(args, config, method, len(ids))
    if args.explain:
        print_explanation(args, config, method, len(ids), dtype, ranks)
    check_memory(args, path, config, method, [len(ids)], dtype, device, ranks=ranks)
    model = open_model(args, path, config, dtype, device, compiling_pays_for(args), ranks)
    if args.explain:
        print(f"decoding on {device}: {model.ways}")
        return 0
    if args.compile:
        compile_dense(model)
    cache = cache if ranks.size == 1 else parallel.new_cache(model)
    say(settings_line(resolved_settings(args, config, method, len(ids), dtype, device)))
    answer = answering(args, model, method, cache)
    code = 0
    if args.chat:
        turns = Conversation(tokenizer, template, answer, cache, args.stop, partial(warn, args, config, method))
        ids, note = chat(turns, args.system, text, before, note, shared_input(ranks))
    else:
        key = KEY if text is None and args.prompt_ids is None else None
        code = write_stream(answer(ids), tokenizer, ids, device, args.stop, len(before), key)
    keep_cache(args.save_cache, cache, ids, saving, note if args.chat else "")
    return code


def is_batch(args):
    """Whether several prompts are to be answered. ValueError for flags that do not go together."""
    several = len(args.prompt_file or []) > 1
    if (args.prompts is None) != (args.out is None):
        raise ValueError("--prompts and --out go together")
    if args.prompts is None and not several:
        return False
    refuse_flags(args, "for several prompts", "chat", "system", "explain", "save_cache", "load_cache", "prompt",
                 "prompt_ids", *(["prompt_file"] if args.prompts else []))
    return True


def refuse_flags(args, where, *names):
    """ValueError where one of these flags is set."""
    for name in names:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} is not there {where}")


def run_batch(args):
    """The command, for several prompts: its exit code. Answers go to --out, or in the prompts' order to stdout."""
    path, config, tokenizer = open_checkpoint(args)
    if hf.takes(path):
        raise ValueError(f"{path}: several prompts are for families of model.py; this one runs through transformers")
    check_compile(args, path)
    method = asked_method(args)
    method.plan(config, n=1)
    device, dtype = place(args, config)
    prompts = asked_prompts(args, tokenizer)
    longest = max(len(prompt.ids) for prompt in prompts)
    warn(args, config, method, longest)
    missing = list(range(len(prompts)))
    if args.out:
        results = Results(args.out, batch_settings(args, path, config, method, dtype), ("row", "prompt_hash"))
        missing = [number for number in missing if prompts[number].key(number) not in results.rows]
    say(settings_line({"prompts": len(prompts), "to-answer": len(missing), "rows": args.rows,
                       **resolved_settings(args, config, method, longest, dtype, device)}))
    answers = iter(())
    if missing:
        lengths = [len(prompts[number].ids) for number in missing]
        check_memory(args, path, config, method, lengths, dtype, device, args.rows)
        model = open_model(args, path, config, dtype, device, 10 ** 9 if args.compile else 0)
        if args.compile:
            compile_dense(model)
        answers = asked_answers(args, model, tokenizer, method, [prompts[number] for number in missing])
    if args.out:
        keep_answers(answers, prompts, missing, results, tokenizer, args, config.eos_token_id)
        put_in_order(results)
    else:
        print_answers(answers, prompts, tokenizer, args.stop)
    return 0


def asked_prompts(args, tokenizer):
    """The Prompts of --prompts, or of several --prompt-file."""
    if args.prompts:
        return read_prompts(args.prompts, tokenizer, args.seed)
    texts = {file: read_text(file) for file in args.prompt_file}
    return [Prompt(file, prompt_tokens(file, text, tokenizer), args.seed) for file, text in texts.items()]


def asked_answers(args, model, tokenizer, method, prompts):
    """Yield (number, new tokens) of every one of the Prompts, as they end."""
    return generate_batch(model, [prompt.ids for prompt in prompts], method, rows=args.rows,
                          max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                          top_p=args.top_p, seed=[prompt.seed for prompt in prompts], prefill_chunk=args.prefill_chunk,
                          impl=args.impl, ended=partial(ends_with_stop, prompts, tokenizer, args.stop))


def batch_settings(args, path, config, method, dtype):
    """What tells the answers of a run from those of runs with other settings."""
    method = Method(method.name or config.freq, method.freq, method.attn_scale, method.params)
    return model_settings(args, path, config.train_len, dtype, method=str(method), stop=args.stop,
                          max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                          top_p=args.top_p)


if __name__ == "__main__":
    run_command(run, "generate.py")
