"""Rows of different lengths, decoded together, so that weights are read once for all of them at each step.

Does: one token for every row at a time, each row with its own plan and its own cache; rows that end make room for
waiting ones; prompts from a file of JSON lines, answers to another. Does not: read prompts into caches, which
generate.py does one by one.

    for row in decode_rows(model, rows, most=16):       # Rows as they end
        print(row.number, row.tokens)
"""
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cache import KVCache
from cli import Progress, read_rows, read_text, short_hash
from positions import Method
from tokenizer import until_stop


# ---------------------------------------------------------------------------------------------------------------------
# decoding

@dataclass
class Row:
    """A prompt that has been read, and the tokens that follow it."""
    number: int
    n: int                          # tokens of the prompt
    method: Method
    logits: torch.Tensor            # (1, vocab_size) after all tokens so far
    cache: KVCache                  # of all tokens but the last one written
    choose: Callable                # choose(logits (1, vocab_size)) -> token (1,)
    room: int                       # tokens that may be written
    ended: Callable                 # ended(tokens): whether the list of tokens written is a whole text
    tokens: list[int] = field(default_factory=list)

    def write(self):
        """Choose the next token; whether it is the last one."""
        self.tokens.append(int(self.choose(self.logits)))
        return len(self.tokens) == self.room or self.ended(self.tokens)


class RowCaches:
    """The caches of several rows, each with its own plan, in the place of one KVCache for a step of all of them."""

    def __init__(self, caches, plans):
        self.caches = caches    # of each row
        self.plans = plans      # of each row its Plan for one query, or a list with one for each layer

    def attend(self, layer, q, k, v, plan, impl, row):
        """KVCache.attend row by row, by the rows' own plans: q (B, H, 1, D), and k, v (B, Hkv, 1, D)."""
        outs = []
        for b, (cache, plan) in enumerate(zip(self.caches, self.plans)):
            own = plan[layer] if isinstance(plan, list) else plan
            outs.append(cache.attend(layer, q[b:b + 1], k[b:b + 1], v[b:b + 1], own, impl, row))
        return torch.cat(outs)


def next_plan(model, method, n, cache):
    """The plan of one more token: the one query, at index len(cache), which looks at all that is cached, and at itself.

    Before a full cache has to grow, it forgets what no query from this one on sees, if that is a quarter of it.
    """
    if cache.is_full():
        keep = model.config.later_keys(method, n, len(cache))
        if sum(stop - start for start, stop in keep) <= 0.75 * cache.size:
            cache.forget(keep)
    return model.plan(method, n=n, i=torch.tensor([len(cache)]), j=cache.indices(new=1))


@torch.inference_mode()
def decode_rows(model, waiting, most=16, impl="auto"):
    """Yield Rows as they end, from an iterable of Rows that have not begun; at most `most` of them run at once.

    The iterable is asked for its next Row when there is room for it. A row gets the tokens that it gets alone: its
    attention is the same, and products of all rows at once differ from those of one by rounding.
    """
    waiting = iter(waiting)
    rows = []
    while True:
        # 1. rows that wait take the places of those that have ended; their prompts' logits give the first token
        while len(rows) < most:
            row = next(waiting, None)
            if row is None:
                break
            if row.write():
                yield row
            else:
                rows.append(row)
        if not rows:
            return
        # 2. one step of all rows
        tokens = torch.tensor([row.tokens[-1] for row in rows]).to(rows[0].logits.device)
        plans = [next_plan(model, row.method, row.n, row.cache) for row in rows]
        caches = RowCaches([row.cache for row in rows], plans)
        logits = model(tokens[:, None], plans[0], caches, impl=impl)[:, -1]  # of the plan, but how many queries it has
        for row, row_logits in zip(rows, logits.split(1)):
            row.logits = row_logits
        # 3. each chooses its next token; those that end leave
        is_last = [row.write() for row in rows]
        ending = [row for row, last in zip(rows, is_last) if last]
        rows = [row for row, last in zip(rows, is_last) if not last]
        yield from ending


# ---------------------------------------------------------------------------------------------------------------------
# prompts and answers in files

@dataclass
class Prompt:
    """One prompt of a batch."""
    name: str           # for people: the file, or the line in it
    ids: list[int]
    seed: int
    fields: dict = field(default_factory=dict)  # what is to stand in the row of its answer as well

    def key(self, number):
        """What tells its row in a file of answers from others: its place, and a hash of its tokens and its seed."""
        return number, short_hash(json.dumps([self.seed, self.ids]).encode())


def read_prompts(path, tokenizer, seed):
    """The Prompts of a file with a JSON object a line: a text "prompt", or token ids as a list "ids"; a "seed" of its
    own where it has one. ValueError, with the line, for anything else."""
    prompts = []
    for line, text in enumerate(read_text(path).splitlines(), 1):
        if text.strip():
            prompts.append(read_line(f"{path}: line {line}", text, tokenizer, seed))
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def read_line(name, text, tokenizer, seed):
    """The Prompt of one line; name: the file and the line."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error})") from None
    if not isinstance(fields, dict) or ("prompt" in fields) == ("ids" in fields):
        raise ValueError(f"{name}: not an object with a \"prompt\" or \"ids\"")
    ids = fields.pop("ids", None)
    if ids is None:
        ids = prompt_tokens(name, fields.pop("prompt"), tokenizer)
    seed = fields.pop("seed", seed)
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in [*ids, seed]) or seed < 0:
        raise ValueError(f"{name}: \"ids\" is a list of whole numbers, \"seed\" a whole number")
    return Prompt(name, ids, seed, fields)


def prompt_tokens(name, text, tokenizer):
    """Token ids of a prompt's text. ValueError where it is none."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}: the prompt is empty")
    return tokenizer.encode(text)


def text_of(tokens, prompt, tokenizer, stops=()):
    """The text of the tokens that follow a Prompt, up to the first of the texts in stops."""
    return "".join(until_stop(tokenizer.stream(iter(tokens), prompt.ids), stops))


def ends_with_stop(prompts, tokenizer, stops, number, tokens):
    """Whether the text of the tokens that follow a prompt holds one of the texts in stops."""
    if not stops:
        return False
    text = text_of(tokens, prompts[number], tokenizer)
    return any(stop in text for stop in stops)


def keep_answers(answers, prompts, missing, results, tokenizer, args, eos):
    """Add a row to a Results file for each of answers, (place in missing, tokens); missing: the numbers of the prompts
    that are answered."""
    progress = Progress("answered")
    progress(0, len(missing))
    for count, (place, tokens) in enumerate(answers, 1):
        number = missing[place]
        prompt = prompts[number]
        _, name = prompt.key(number)
        ended = "eos" if tokens[-1] in eos else "length" if len(tokens) == args.max_new_tokens else "stop"
        answer = text_of(tokens, prompt, tokenizer, args.stop)
        results.add([{**prompt.fields, "row": number, "prompt_hash": name, "prompt_tokens": len(prompt.ids),
                      "seed": prompt.seed, "answer": answer, "ids": tokens, "ended": ended}])
        progress(count, len(missing))


def print_answers(answers, prompts, tokenizer, stops):
    """Print each of answers, (number, tokens), under the name of its prompt, in the order of the prompts."""
    texts = {}
    shown = 0
    for number, tokens in answers:
        texts[number] = text_of(tokens, prompts[number], tokenizer, stops)
        while shown in texts:
            print(f"==> {prompts[shown].name} <==\n{texts[shown]}", flush=True)
            shown += 1


def put_in_order(results):
    """Sort the rows of a Results file as their prompts are, after rows of other settings: a run that was killed ends
    with the file of one that was not. In one step, so that being killed here leaves the one file or the other."""
    rows = read_rows(results.path)
    others = [row for row in rows if not results.has_settings_of(row)]
    ordered = others + [results.rows[key] for key in sorted(results.rows)]
    if ordered == rows:
        return
    partial = Path(f"{results.path}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in ordered), encoding="utf-8")
    os.replace(partial, results.path)
