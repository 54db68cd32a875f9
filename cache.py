"""The cache of a LLaMA: un-rotated keys and values of every layer, and the rotated copies that decoding wants.

Does: hold them, attend to them, forget the last ones and those that no later query sees, write them to a file and read
them back. Does not: choose positions (positions.py) or rotate by itself (rotation.py). parallel.py has one whose keys
are spread over processes.

    cache = KVCache(config)
    k, v = cache.append(layer, k, v)            # all keys and values of the layer, (B, Hkv, Tk, D)

Letters: B batch, Hkv key heads, T tokens, Tk all tokens, D head width.
"""
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from attention import attend
from frequencies import pick
from plan import same
from rotation import is_unrotated, rotate_keys


class KVCache:
    """Un-rotated keys and values of every layer, (B, Hkv, size, D) each; size doubles where it was too small.

    Un-rotated, because the position of a cached key depends on the method, the region and the query that looks at it.
    After two appends of 5 and 3 tokens, append returns views of 8 tokens and len(cache) is 8. Beside them it holds
    the copies that decoding wants rotated, see rotated(). With config.cache_dtype "bfloat16" or "int8" it holds fewer
    bytes than it is given: then append returns all of them unpacked, and there are no rotated copies.
    """

    def __init__(self, config, size=64):
        layers = config.num_hidden_layers
        self.size = max(size, 1)
        self.dtype = config.cache_dtype and pick(CACHE_DTYPES, "type of caches", config.cache_dtype)
        self.length = [0] * layers
        self.k = [None] * layers
        self.v = [None] * layers
        self.copies = [[] for _ in range(layers)]
        self.until = 0                  # the tokens before it were looked through by forget, which has kept
        self.kept = torch.arange(0)     # these of them, indices in rising order

    def __len__(self):
        """How many tokens have been appended, forgotten ones included."""
        return self.length[-1] + self.forgotten

    @property
    def forgotten(self):
        return self.until - len(self.kept)

    def is_full(self):
        """Whether it grows with the next token."""
        return self.length[-1] >= self.size

    def indices(self, new=0):
        """The indices (Tk,) of all tokens that are held, and of `new` ones after them: the keys j of a plan."""
        return torch.cat((self.kept, torch.arange(self.until, len(self) + new)))

    def forget(self, keep):
        """Forget the tokens outside of the intervals keep, [(start, stop)]: see Method.later_keys.

        Of tokens 0..9 with [(0, 2), (5, 10)] seven stay; len(cache) is 10 as before, and the next token has index 10.
        """
        indices = self.indices()
        stays = torch.zeros(len(indices), dtype=torch.bool)
        for start, stop in keep:
            stays |= (indices >= start) & (indices < stop)
        if bool(stays.all()):
            return
        now = len(self)
        places = stays.nonzero()[:, 0]
        self.empty()  # what it is, where Ctrl-C comes before all layers are done
        for stored in (*self.k, *self.v):
            stored[:, :, :len(places)] = stored[:, :, places.to(stored.device)]
        self.until = now
        self.kept = indices[places]
        self.length = [len(places)] * len(self.length)

    def empty(self):
        """Forget everything, as if nothing had been appended."""
        self.length = [0] * len(self.length)
        self.copies = [[] for _ in self.length]
        self.until = 0
        self.kept = torch.arange(0)

    def cut(self, length):
        """Forget all but the first `length` tokens; all of them, where those after have had what is forgotten."""
        if length < self.until:
            self.empty()
            return
        length -= self.forgotten
        self.length = [length] * len(self.length)
        for copies in self.copies:
            for copy in copies:
                copy.positions = copy.positions[:length]

    def append(self, layer, k, v):
        """Store k, v (B, Hkv, T, D) after what the layer holds; returns views of all its keys and values."""
        old = self.length[layer]
        new = old + k.shape[2]
        while new > self.size:
            self.size *= 2
        for stored, fresh in ((self.k, pack(k, self.dtype)), (self.v, pack(v, self.dtype))):
            if stored[layer] is None:
                stored[layer] = with_room(fresh[:, :, :0], self.size)
            elif stored[layer].shape[2] < new:
                stored[layer] = with_room(stored[layer][:, :, :old], self.size)
            stored[layer][:, :, old:new] = fresh
        self.length[layer] = new
        return unpack(self.k[layer][:, :, :new], k.dtype), unpack(self.v[layer][:, :, :new], v.dtype)

    def attend(self, layer, q, k, v, plan, impl, row):
        """Append k, v (B, Hkv, T, D) and let queries q (B, H, Tq, D) look at all there are; see attention.attend."""
        tokens = k.shape[2]
        k, v = self.append(layer, k, v)                     # (B, Hkv, Tk, D), un-rotated
        rotated = None
        is_plain = self.k[layer].dtype == k.dtype
        if tokens == 1 and is_plain and not q.is_cuda:      # decoding; the Triton kernel rotates keys as it reads them
            rotated = self.rotated(layer, plan)
        return attend(q, k, v, plan, impl, rotated, row)

    def rotated(self, layer, plan):
        """For each of plan.key_positions the layer's keys (B, Hkv, Tk, D) rotated to it; only what is new is computed.

        A copy serves a plan as long as the positions of the keys it holds have not changed; a plan that moves them gets
        a new one. Self-Extend decodes with two copies, at j and at j // group.
        """
        k = self.k[layer][:, :, :self.length[layer]]
        keys = []
        for number in range(len(plan.key_positions)):
            if is_unrotated(plan, number) and plan.cosine is None:
                keys.append(k)
                continue
            copy = next((c for c in self.copies[layer] if c.serves(plan, number)), None)
            if copy is None:
                copy = RotatedKeys(plan.rotation_rule(), plan.key_positions[number][:0], k[:, :, :0])
                newest = max(4, len(plan.key_positions)) - 1
                alike = [c for c in self.copies[layer] if c.rule == copy.rule]  # frequencies that follow leave none
                self.copies[layer] = [*alike[-newest:], copy]  # of old plans none is held for ever
            keys.append(copy.extend(k, plan, number))
        return keys


@dataclass
class RotatedKeys:
    """Keys of one layer, rotated for the positions of one key set of a plan."""
    rule: tuple              # plan.rotation_rule() of the plans that it serves
    positions: torch.Tensor  # (T,) of the keys held
    keys: torch.Tensor       # (B, Hkv, room, D), the first T in use

    def serves(self, plan, number):
        """Whether the keys held stand where plan.key_positions[number] says, and are rotated by the plan's rule."""
        positions = plan.key_positions[number][:len(self.positions)]
        return self.rule == plan.rotation_rule() and same(self.positions, positions)

    def extend(self, k, plan, number):
        """All keys k (B, Hkv, Tk, D) rotated, of which only those that are not held yet are computed."""
        old = len(self.positions)
        new = k.shape[2]
        if self.keys.shape[2] < new:
            self.keys = with_room(self.keys[:, :, :old], new + new // 2)
        self.keys[:, :, old:new] = rotate_keys(k[:, :, old:], plan, number, old)
        self.positions = plan.key_positions[number]
        return self.keys[:, :, :new]


CACHE_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
SCALE = 4  # bytes of the scale of a row


def pack(x, dtype):
    """Keys or values x (B, Hkv, T, D) as a cache of this type holds them: int8 as rows of D numbers and, in the last
    four bytes, their float32 scale, which makes the largest of them 127 or -127: (B, Hkv, T, D + 4)."""
    if dtype != torch.int8:
        return x if dtype is None else x.to(dtype)
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-30) / 127
    return torch.cat(((x / scale).round().to(torch.int8), scale.view(torch.int8)), -1)


def unpack(rows, dtype):
    """The inverse of pack, but for rounding: (B, Hkv, T, D) in dtype; without a copy where that is what rows are."""
    if rows.dtype != torch.int8:
        return rows.to(dtype)
    scale = rows[..., -SCALE:].contiguous().view(torch.float32)
    return rows[..., :-SCALE].to(dtype).mul_(scale.to(dtype))


def held_bytes(config, dtype):
    """Bytes of a token's keys in all layers, as a cache holds them; its values take as many."""
    kind = CACHE_DTYPES.get(config.cache_dtype, dtype)
    width = config.head_dim * kind.itemsize + SCALE * (kind == torch.int8)
    return config.num_hidden_layers * config.num_key_value_heads * width


def with_room(x, room):
    """A copy of x (B, H, T, D) at the start of a tensor (B, H, room, D), which may be written to in and outside of
    torch.inference_mode alike."""
    with torch.inference_mode(False):
        grown = torch.empty(*x.shape[:2], room, x.shape[3], dtype=x.dtype, device=x.device)
    grown[:, :, :x.shape[2]] = x
    return grown


# ---------------------------------------------------------------------------------------------------------------------
# files

def save_cache(file, cache, ids, settings, note=""):
    """Write a cache and the token ids that it holds, a list, to a safetensors file.

    settings: {name: text} of all that must be the same where the cache is used again. note: any text to keep with it.
    """
    tensors = {"ids": torch.tensor(ids), "kept": cache.kept, "until": torch.tensor(cache.until)}
    held = len(ids) - cache.forgotten
    for layer in range(len(cache.length)):
        tensors[f"k.{layer}"] = cache.k[layer][:, :, :held].contiguous()  # (B, Hkv, T, D)
        tensors[f"v.{layer}"] = cache.v[layer][:, :, :held].contiguous()
    metadata = {"format": "beyond cache", "settings": json.dumps(settings), "ids": ids_hash(ids), "note": note}
    partial = f"{file}.partial"
    try:
        save_file(tensors, partial, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{file}: cannot be written ({error})") from None
    os.replace(partial, file)


def load_cache(file, config, settings, device="cpu"):
    """(KVCache, token ids, note) of a file that save_cache has written with the same settings, for a model of config.

    Raises FileNotFoundError or ValueError that names the file: no cache, a damaged one, or one of other settings.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        with safetensors.safe_open(file, framework="pt", device=str(device)) as saved:
            metadata = saved.metadata() or {}
            check_settings(file, metadata, settings)
            ids = saved.get_tensor("ids").tolist()
            kept, until = saved.get_tensor("kept"), int(saved.get_tensor("until"))
            held = len(ids) - until + len(kept)
            cache = KVCache(config, held + 1024)
            width = config.head_dim + SCALE * (cache.dtype == torch.int8)
            shape = (1, config.num_key_value_heads, held, width)
            for layer in range(config.num_hidden_layers):
                k, v = saved.get_tensor(f"k.{layer}"), saved.get_tensor(f"v.{layer}")
                is_sound = len(kept) <= until <= len(ids) and ids_hash(ids) == metadata["ids"]
                if k.shape != shape or v.shape != shape or not is_sound:
                    raise ValueError(f"{file}: a damaged cache")
                cache.k[layer], cache.v[layer] = with_room(k, cache.size), with_room(v, cache.size)
            cache.length = [held] * len(cache.length)
            cache.kept, cache.until = kept.cpu(), until
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    return cache, ids, metadata["note"]


def check_settings(file, metadata, settings):
    """ValueError unless a file's metadata are of a cache with these settings."""
    if metadata.get("format") != "beyond cache":
        raise ValueError(f"{file}: not a saved cache")
    saved = json.loads(metadata["settings"])
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(f"{file}: saved with {name} {saved.get(name)}, but this run has {name} {value}")


def ids_hash(ids):
    """A hash of a list of token ids."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
