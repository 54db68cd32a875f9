"""How much memory a run takes, said before it is taken.

Does: count the bytes of weights, of a cache and of what is computed on the way, from sizes alone, compare them with
what is free, and say what would lower them. Does not: load or run anything.

    memory = estimate(config, method, [len(ids)], new=64, dtype=torch.bfloat16, quantize="int8")
    print(memory, memory.total)

Letters: T tokens of a piece of the prompt, D head width, R regions of a plan, N ranks that keys are spread over.
"""
import math
from dataclasses import dataclass

import torch

from cache import CACHE_DTYPES, held_bytes
from checkpoint import available_memory
from cli import peak_memory, process_bytes
from model import Llama
from parallel import Holdings, leading, sizes_of, waves
from quantized import BITS, BLOCK, bits_asked, quantize_layers
from rotation import is_unrotated

CODE = 16 * 2 ** 20         # bytes of libraries that come into memory when a model first runs
MORE_CODE = 48 * 2 ** 20    # where it is quantised, or not in float32
HEADS_AT_ONCE = 2 ** 22     # numbers of queries that attention.head_groups takes at once
ROWS_AT_ONCE = 2048         # tokens that model.by_rows takes at once


@dataclass
class Memory:
    """Bytes that a run takes at once, by what they are for."""
    process: int            # Python and its libraries: there already, or nearly
    weights: int
    cache: int              # keys and values
    rotated: int            # keys rotated for decoding
    activations: int        # what a piece of the prompt needs while it is read
    loading: int            # what loading needs beyond the weights

    @property
    def needed(self):
        """Beyond the process: while the weights are loaded, or all that follows (what activations leave free is in
        pieces that keys rotated later do not all fit into)."""
        return self.weights + max(self.loading, self.cache + self.activations + self.rotated)

    @property
    def total(self):
        return self.process + self.needed

    def __str__(self):
        return (f"memory: about {mebibytes(self.total)} at once: process {mebibytes(self.process)}, "
                f"weights {mebibytes(self.weights)}, cache {mebibytes(self.cache)}, rotated keys "
                f"{mebibytes(self.rotated)}, activations {mebibytes(self.activations)}")


def mebibytes(count):
    return f"{count / 2**20:.1f} MiB"


def estimate(config, method, lengths, new, dtype, quantize=None, chunk=8192, rows=1, device="cpu",
             stored=None, N=1):
    """The Memory of a run: prompts of these lengths, `rows` of them at once, each followed by `new` tokens.

    dtype: of the weights and of what is computed, a torch type; quantize and config.cache_dtype as asked for; chunk:
    tokens of a piece of the prompt; stored: the bytes of the weights as stored, for a model that model.py does not
    know. N: of so many ranks, over which the keys of one prompt are spread, the Memory of the one that takes most.
    """
    longest = [max(n, 1) for n in sorted(lengths)[-rows:]]     # a chat begins with none
    bits = bits_asked(config, quantize)
    held = [held_tokens(method, config, n, new, chunk) for n in longest]
    plans = config.plans(method, longest[-1], *last_piece(method, config, longest[-1], chunk)).values()
    plan = max(plans, key=lambda plan: len(plan.regions))
    activations = activation_bytes(config, plan, dtype, bits)
    if N > 1:
        held[-1], activations = largest_share(config, method, longest[-1], new, dtype, bits, chunk, N)
    copies = 0
    if config.cache_dtype is None or CACHE_DTYPES[config.cache_dtype] == dtype:
        copies = rotated_copies(plan) if device == "cpu" else 0
    is_plain = bits is None and dtype == torch.float32
    code = CODE if is_plain else CODE + MORE_CODE
    return Memory(process=0 if device == "cuda" else process_memory() + code,
                  weights=stored or weight_bytes(config, dtype, bits),
                  cache=2 * sum(held) * held_bytes(config, dtype),
                  rotated=copies * sum(held) * held_bytes(config, dtype),
                  activations=activations,
                  loading=0 if stored else loading_bytes(config, dtype, bits))


def process_memory():
    """Bytes that this process holds now; the most that it has held where the platform does not say."""
    return process_bytes("VmRSS") or peak_memory("cpu") or 0


def free_memory(device):
    """Bytes that are free for a run on this device."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()


# ---------------------------------------------------------------------------------------------------------------------
# the parts

def weight_bytes(config, dtype, bits):
    """Bytes of the weights of a model: floats of a torch dtype, and integers where it is quantised to bits."""
    return sum(weight.numel() * (dtype.itemsize if weight.is_floating_point() else 1)
               for weight in meta_model(config, bits).state_dict().values())


def meta_model(config, bits=None):
    """A Llama of sizes alone."""
    with torch.device("meta"):
        model = Llama(config)
    if bits:
        quantize_layers(model, bits)
    return model


def loading_bytes(config, dtype, bits):
    """The largest tensor, as it is read from its file while what becomes of it is written, and blocks of float32."""
    largest = max(weight.numel() for weight in meta_model(config).state_dict().values())
    return largest * dtype.itemsize + (4 * 4 * BLOCK if bits else 0)


def held_tokens(method, config, n, new, chunk):
    """How many tokens the cache holds at most: all, or what later queries see of a prompt of n, a piece, new ones."""
    seen = sum(stop - start for start, stop in config.later_keys(method, n, n))
    if seen == n:
        return n + new
    last = n - (n - 1) // chunk * chunk     # tokens of the last piece, before which the cache forgets
    return max(min(n, seen + chunk), min(seen + last + new, seen + chunk + 1024))


def largest_share(config, method, n, new, dtype, bits, chunk, N):
    """(tokens held, bytes of activations) of those of N ranks that have most; see parallel.prefill. Beside what reading
    needs, keys or queries travel, of two steps at once, from here and to here, and every rank has the whole plan."""
    plans = config.plans(method, n)
    sizes = sizes_of(config, dtype)
    holdings = Holdings.none(N)
    held = math.ceil((n + new) / N)
    most = 0
    for wave in waves(leading(plans), 0, n - 1, N, chunk):
        holdings.add(wave)
        held = max(held, *[len(holdings.here(rank)) for rank in range(N)])
        reads = [len(holdings.tokens(wave, rank)) for rank in range(N)]
        rank = reads.index(max(reads))
        for plan in plans.values():
            part = plan.of_queries(holdings.tokens(wave, rank)).of_keys(holdings.here(rank))
            asked = [holdings.errand(plan, 0, wave, rank, owner, sizes) for owner in range(N) if owner != rank]
            travelling = 4 * max(errand.bytes(sizes) if errand else 0 for errand in asked)
            most = max(most, activation_bytes(config, part, dtype, bits) + travelling)
    vectors = sum(3 * len(plan.regions) + len(plan.key_positions) for plan in plans.values())
    return held, most + 8 * n * vectors


def last_piece(method, config, n, chunk):
    """(i, j): the queries of the last piece of a prompt, and the keys that the cache then holds."""
    begin = (n - 1) // chunk * chunk
    kept = [torch.arange(start, stop) for start, stop in config.later_keys(method, n, begin)] if begin else []
    i = torch.arange(begin, n)
    return i, torch.cat([*kept, i])


def rotated_copies(plan):
    """How often the cache holds the keys that this plan sees in rotated form."""
    numbers = range(len(plan.key_positions))
    return sum(plan.cosine is not None or not is_unrotated(plan, number) for number in numbers)


def activation_bytes(config, plan, dtype, bits):
    """What the last and largest piece of a prompt needs beside weights and cache: the larger of attention and
    feed-forward network, and the plan."""
    c = config
    T = plan.Tq
    size = dtype.itemsize
    query = c.num_attention_heads * c.head_dim
    key = c.num_key_value_heads * c.head_dim
    copied = 1 if bits else 0                        # quantized.py pads what it multiplies, which copies it
    rows = min(T, ROWS_AT_ONCE)
    # residual, its norm, queries, keys, values, what is attended, the same in order of tokens, its projection
    around = T * size * (3 * c.hidden_size + (3 + copied) * query + 2 * key)
    within = T * size * (2 * c.hidden_size + 2 * query + 2 * key) + attention_bytes(c, plan, size)
    network = T * size * 4 * c.hidden_size + rows * size * ((3 + copied) * c.intermediate_size + 2 * c.hidden_size)
    return max(around, within, network) + plan_bytes(plan)


def attention_bytes(config, plan, size):
    """Of the heads that are attended at once: queries rotated, sums in float32, the part of a piece, rotated keys."""
    width = config.num_attention_heads * config.head_dim
    share = min(1.0, HEADS_AT_ONCE / (plan.Tq * width))
    keys = config.num_key_value_heads * config.head_dim * plan.Tk * size
    unpacked = 2 * keys if config.cache_dtype else 0
    return math.ceil(share * (plan.Tq * width * (4 + 2 * size) + 2 * keys)) + unpacked


def plan_bytes(plan):
    """Of positions in int64, and of tables of cos and sin in float32."""
    pairs = 0 if plan.inv_freq is None else len(plan.inv_freq)
    queries = len(plan.regions) * plan.Tq
    keys = len(plan.key_positions) * plan.Tk
    return (queries + keys) * (3 * 8 + 8 * pairs) + plan.Tk * 8 * pairs


# ---------------------------------------------------------------------------------------------------------------------
# is there room?

def refuse(memory, free, config, quantize, chunk, rows=1):
    """ValueError, with what would lower it, for a Memory beyond the bytes that are free."""
    if memory.needed <= free:
        return
    lower = []
    worth_it = max(memory.weights, memory.cache + memory.rotated, memory.activations) / 4
    kinds = [kind for kind in BITS if quantize is None or BITS[kind] < BITS[quantize]]
    if memory.weights > worth_it and config.bits is None and kinds:
        lower.append(f"the weights, by --quantize {' or '.join(kinds)}")
    if memory.cache + memory.rotated > worth_it:
        ways = ["a shorter prompt"]
        ways += [] if config.cache_dtype == "int8" else ["--cache-dtype int8"]
        ways += [f"--rows below {rows}"] if rows > 1 else []
        lower.append(f"the cache, by {', '.join(ways)}")
    if memory.activations > worth_it:
        lower.append(f"the activations, by --prefill-chunk below {chunk}")
    raise ValueError(f"{memory}; {mebibytes(free)} are free. Lower {'; '.join(lower)}; or go on with --force")
