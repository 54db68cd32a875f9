"""llama.cpp beside ours: the same weights written as a GGUF file, and llama.cpp at work in a process of its own.

Does: write a checkpoint of ours as GGUF in bfloat16, q8_0 or q4_0; answer bench.py's questions over a pipe. Does not:
choose what is compared (bench.py). Needs two optional packages: pip install llama-cpp-python gguf (which compiles
llama.cpp for this machine, about 15 minutes).

    engine = LlamaCpp(write_gguf(folder, "q8_0"), threads=2, context=4200)
    engine.prefill([1, 2, 3])                    # from an empty cache; the logits of the last token
    engine.decode(n=3, tokens=8)                 # eight steps after the first three tokens
"""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

from checkpoint import read_weights
from config import Config
from model import Llama

KINDS = ("bf16", "q8_0", "q4_0")
NAMES = {  # of a layer's weights: ours, and llama.cpp's
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def missing():
    """The optional packages that are not here."""
    packages = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
    return [package for module, package in packages.items() if importlib.util.find_spec(module) is None]


# ---------------------------------------------------------------------------------------------------------------------
# the file

def write_gguf(folder, kind):
    """The path of folder's checkpoint as a GGUF file of kind "bf16", "q8_0" or "q4_0"; written if it is not there."""
    import gguf
    path = Path(folder) / f"{kind}.gguf"
    if path.exists():
        return path
    config = Config.from_hf(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    write_settings(writer, config, kind)
    for name, weight in read_weights(folder, shapes, torch.bfloat16, "cpu").items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:
                weight = interleave_rows(weight, count)
        write_tensor(writer, gguf_name(name), weight, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return path


def write_settings(writer, config, kind):
    """The network's sizes, and a vocabulary of as many made-up words, as llama.cpp wants one."""
    import gguf
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    words = ["<unk>", "<s>", "</s>"] + [f"w{number}" for number in range(3, config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(words) - 3))


def gguf_name(name):
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem, _, end = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{end}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{end}"


def interleave_rows(weight, heads):
    """Rows of a query or key projection in Meta's order: llama.cpp turns the channels (2p, 2p + 1) of a head, ours and
    Hugging Face's checkpoints (p, p + D/2)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_tensor(writer, name, weight, kind):
    """Norms stay float32, all matrices are of the kind."""
    import gguf
    if weight.ndim == 1:
        writer.add_tensor(name, weight.float().numpy())
        return
    as_type = gguf.GGMLQuantizationType[kind.upper()]
    writer.add_tensor(name, gguf.quants.quantize(weight.float().numpy(), as_type), raw_dtype=as_type)


# ---------------------------------------------------------------------------------------------------------------------
# the process

class LlamaCpp:
    """llama.cpp on a GGUF file, in a process of its own, asked line by line. RuntimeError where it ends."""

    def __init__(self, path, threads, context):
        command = [sys.executable, __file__, str(path), str(threads), str(context)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            raise RuntimeError(f"its process ended with code {code}")
        return json.loads(answer)

    def prefill(self, ids):
        """Logits (vocab_size,) after the token ids, from an empty cache."""
        return torch.tensor(self.ask(prefill=ids))

    def decode(self, n, tokens):
        """So many steps after the first n tokens of the cache."""
        self.ask(decode=n, tokens=tokens)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve(path, threads, context):
    """Answer questions on standard input until it ends."""
    import llama_cpp
    engine = llama_cpp.Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512,
                             verbose=False)
    for line in sys.stdin:
        question = json.loads(line)
        if "prefill" in question:
            engine.reset()
            engine.eval(question["prefill"])
            logits = engine._ctx.get_logits()
            answer = [logits[i] for i in range(engine.n_vocab())]
        else:
            engine.n_tokens = question["decode"]  # eval forgets what is cached beyond
            for _ in range(question["tokens"]):
                engine.eval([3])
            answer = None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
