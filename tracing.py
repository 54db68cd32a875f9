"""What a model looks at: the attention of one token over all before it, per layer and head, and the logits after it.

Does: run a checkpoint on a prompt and keep the attention weights of its last token, sum them over stretches of the
prompt, write them as text. Does not: draw pictures (show.py, page_template.html) or decode.

    traced = trace(model, ids, Method("mesa"))          # traced.weights (layers, H, T)

Letters: H query heads, T tokens, n of them the prompt.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import attend_dense
from cache import KVCache
from tasks import answer_text, passkey_prompt

BARS = "▁▂▃▄▅▆▇█"   # shares of attention as text, from none to all
COLUMNS = 72        # characters of a strip as text
LIKELIEST = 3       # keys and next tokens that are named


@dataclass
class Case:
    """A prompt whose last token is traced."""
    ids: list[int]
    n: int                              # how many of the ids are the prompt; those after it count as decoded
    span: tuple[int, int] | None = None  # the first and the last token of the needle
    right: int | None = None            # the token that should come next


@dataclass
class Trace:
    """What the last token of a Case attends to, and what the model says after it."""
    weights: Tensor  # (layers, H, T) float32, each row of T sums to 1
    visible: Tensor  # (T,) bool: the keys that it sees, in one layer at least
    logits: Tensor   # (vocab_size,) float32
    case: Case

    def heads(self):
        """The best head of every layer, (layers,): the one that attends most to the needle. Without a needle the
        sharpest, whose largest weight is largest; the first token, where attention rests that has nowhere to go, and
        the traced token itself do not count."""
        if self.case.span:
            first, last = self.case.span
            return self.weights[:, :, first:last + 1].sum(-1).argmax(-1)
        if self.weights.shape[-1] < 3:
            return self.weights[:, :, 0].argmax(-1)
        return self.weights[:, :, 1:-1].amax(-1).argmax(-1)

    def best(self):
        """The weights of the best head of every layer, (layers, T)."""
        return self.weights[torch.arange(len(self.weights)), self.heads()]

    def mean(self):
        """The mean weights of the heads of every layer, (layers, T)."""
        return self.weights.mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# running the model

@torch.no_grad()
def trace(model, case, method, chunk=8192):
    """The Trace of the last token of a Case, read by a Llama with a Method; chunk: tokens per piece of what is before.

    Raises ValueError where the case holds no token, or one that the model does not have.
    """
    ids = case.ids
    if not ids:
        raise ValueError("the prompt is empty")
    if max(ids) >= model.config.vocab_size:
        raise ValueError(f"token ids outside the model's vocabulary of {model.config.vocab_size}; wrong tokenizer?")
    tokens = torch.tensor([ids], device=model.model.embed_tokens.weight.device)
    T = len(ids)
    cache = KVCache(model.config, T)
    for begin in range(0, T - 1, chunk):
        end = min(begin + chunk, T - 1)
        plan = model.plan(method, n=case.n, i=torch.arange(begin, end), j=torch.arange(end))
        model(tokens[:, begin:end], plan, cache, last_only=True)
    plan = model.plan(method, n=case.n, i=torch.tensor([T - 1]), j=torch.arange(T))
    plans = plan if isinstance(plan, list) else [plan] * model.config.num_hidden_layers
    weights, logits = look(model, tokens[:, -1:], plans, cache)
    j = torch.arange(T)
    visible = torch.zeros(T, dtype=torch.bool)
    for region in (region for plan in plans for region in plan.regions):
        visible |= (j >= region.start) & (j < region.end)
    return Trace(weights.cpu(), visible, logits.float().cpu(), case)


def look(model, token, plans, cache):
    """(weights (layers, H, T), logits (vocab_size,)) of one token (1, 1), whose cache holds the T - 1 before it, with a
    plan for each layer.

    The same steps as Llama.forward, with attend_dense, which can tell its weights.
    """
    x = model.model.embed_tokens(token)                                 # (1, 1, hidden_size)
    weights = []
    for layer, block in enumerate(model.model.layers):
        attention = block.self_attn
        normed = block.input_layernorm(x)
        q = attention.q_norm(attention.heads(attention.q_proj(normed)))   # (1, H, 1, D)
        k = attention.k_norm(attention.heads(attention.k_proj(normed)))
        v = attention.heads(attention.v_proj(normed))
        k, v = cache.append(layer, k, v)                                # (1, Hkv, T, D), un-rotated
        out, shares = attend_dense(q, k, v, plans[layer], return_weights=True)  # shares (1, H, 1, T)
        weights.append(shares[0, :, 0])
        x = block.feed_forward(x + attention.o_proj(out.transpose(1, 2).flatten(2)))
    x = model.model.norm(x)
    if model.config.tie_word_embeddings:
        logits = F.linear(x, model.model.embed_tokens.weight)
    else:
        logits = model.lm_head(x)
    return torch.stack(weights), logits[0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# prompts

def passkey_case(tokenizer, n, depth=0.3):
    """The prompt_case of a passkey prompt of n tokens."""
    return prompt_case(tokenizer, passkey_prompt(tokenizer, n, depth))


def prompt_case(tokenizer, prompt):
    """The Case of a Prompt, and of its answer what comes before the first digit.

    Many tokenizers write a space before it: that token then is the one that looks for the digit.
    """
    answer = tokenizer.encode(answer_text(prompt.task, prompt.answer), bos=False)
    begin = next(place for place, token in enumerate(answer) if any(c.isdigit() for c in tokenizer.decode([token])))
    return Case(prompt.ids + answer[:begin], len(prompt.ids), prompt.span, answer[begin])


def text_case(tokenizer, text, needle=None):
    """The Case of a text, the last place of a needle in it marked. ValueError where it is not in it."""
    if not text.strip():
        raise ValueError("the prompt is empty")
    ids = tokenizer.encode(text)
    span = None if needle is None else find(tokenizer, ids, needle)
    return Case(ids, len(ids), span)


def find(tokenizer, ids, text):
    """(first, last) of the fewest tokens of ids, the last such, whose decoded text holds a text; ValueError if none."""
    def holds(first, end):
        return text in tokenizer.decode(ids[first:end])

    if not text.strip() or not holds(0, len(ids)):
        raise ValueError(f"the needle {text!r} is not in the prompt")
    first = latest_start(holds, len(ids))
    end = next(end for end in range(first + 1, len(ids) + 1) if holds(first, end))
    return first, end - 1


def latest_start(holds, T):
    """The largest first with holds(first, T), where holds(0, T): by halving, as it holds up to some first only."""
    low = 0
    high = T
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle, T):
            low = middle
        else:
            high = middle
    return low


# ---------------------------------------------------------------------------------------------------------------------
# as numbers and text

def binned(values, bins):
    """Sums of values (*, T) over so many stretches of equal length, (*, bins): [1, 2, 3, 4] in 2 is [3, 7]."""
    T = values.shape[-1]
    place = torch.arange(T) * bins // T
    return torch.zeros(*values.shape[:-1], bins).index_add_(-1, place, values.float())


def trace_text(traced, tokenizer, columns=COLUMNS):
    """A Trace as text: for every layer the mean of its heads and its best head, the needle, the likeliest tokens."""
    T = len(traced.case.ids)
    columns = min(columns, T)
    seen = binned(traced.visible, columns) > 0
    lines = [f"a column: {T / columns:.3g} tokens; its bar: the root of their share of the attention, {BARS[-1]} all "
             "of it; blank: not seen"]
    if traced.case.span:
        lines.append(" " * 17 + needle_line(traced.case.span, T, columns))
    rows = zip(traced.heads().tolist(), traced.mean(), traced.best())
    for layer, (head, mean, best) in enumerate(rows, 1):
        lines.append(f"layer {layer:<3} mean    {bars(binned(mean, columns), seen)}")
        keys = keys_text(best, traced, tokenizer)
        lines.append(f"{'':9} head {head + 1:<3}{bars(binned(best, columns), seen)}  {keys}")
    lines.append(next_text(traced, tokenizer))
    return "\n".join(lines)


def needle_line(span, T, columns):
    """A mark above the columns that hold the needle."""
    first, last = [token * columns // T for token in span]
    return " " * first + "v" * (last - first + 1) + " needle"


def bars(shares, seen):
    """Shares of attention (bins,) as a row of bars."""
    heights = (shares.clamp(0, 1).sqrt() * (len(BARS) - 1)).round().long().tolist()
    return "".join(BARS[height] if is_seen else " " for height, is_seen in zip(heights, seen.tolist()))


def keys_text(weights, traced, tokenizer):
    """The keys with the largest weights (T,): "311 '7' 0.62, 0 '' 0.20"."""
    largest = weights.topk(min(LIKELIEST, len(weights)))
    texts = [f"{key} {tokenizer.decode([traced.case.ids[key]])!r} {weight:.2f}"
             for weight, key in zip(largest.values.tolist(), largest.indices.tolist())]
    return ", ".join(texts)


def next_text(traced, tokenizer):
    """What the model says next: the right token's logit, rank and probability, and the likeliest tokens."""
    p = traced.logits.softmax(-1)
    likeliest = traced.logits.topk(min(LIKELIEST, len(p))).indices.tolist()
    said = ", ".join(f"{tokenizer.decode([token])!r} {p[token]:.2f}" for token in likeliest)
    right = traced.case.right
    if right is None:
        return f"next: {said}"
    return (f"right digit {tokenizer.decode([right])}: logit {traced.logits[right]:.1f}, probability {p[right]:.2f}, "
            f"rank {answer_rank(traced)} of {len(p)}; likeliest next: {said}")


def answer_rank(traced):
    """The rank of the right token among the logits, 1 for the largest."""
    return 1 + int((traced.logits > traced.logits[traced.case.right]).sum())
