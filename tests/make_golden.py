"""What transformers computes, written to golden.json, so that the tests compare with it where it is not installed.

    pip install "transformers>=5,<6" && python tests/make_golden.py

Each of HF_CONFIGS is a small LLaMA whose weights are a formula of their names, so that only a few of its logits need to
be kept. The shipped model is read as it is. Does not import anything of ours.
"""
import json
import zlib
from pathlib import Path

import numpy
import torch

SHIPPED = Path(__file__).parents[1] / "checkpoints/tiny"
GOLDEN = Path(__file__).parent / "golden.json"

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 1.5, 2.5, 4.0]}

HF_CONFIGS = {
    "plain": {},
    "mha": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "eos-list": {"eos_token_id": [2, 5]},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 10000.0}},
    "yarn-options": {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 0.5, "mscale": 0.7,
                                         "mscale_all_dim": 1.0}},
    "yarn-attention": {"rope_parameters": {**YARN, "attention_factor": 1.5, "truncate": False}},
    "llama3": {"rope_parameters": LLAMA3},
    "longrope, long": {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 16}},
    "longrope, short": {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 60},
                        "max_position_embeddings": 240},
}

TOKENS = torch.arange(50).pow(2).mul(7).remainder(64)[None]  # (1, 50), past max_position_embeddings = 32
KEPT = [0, 1, 9, 31, 32, 49], slice(0, 64, 8)                # of the logits (50, 64): 6 tokens, every 8th entry

STORY = "One day a little bear found a red ball in the wood. He took it home and put it in a box. " * 16
KEPT_OF_STORY = slice(0, 400, 57), slice(0, 1024, 64)        # of the logits (400, 1024), past the window of 256
PROMPT = ("Find the pass key. The grass is green. The pass key is 41827. The sky is blue. "
          "What is the pass key? The pass key is")
GREEDY = 32


def weight(name, shape):
    """The weight of a name: normal numbers of size 0.3, around 1 for norms and biases. The stream of RandomState is
    frozen, so that they are the same with every version of numpy."""
    numbers = numpy.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(0.3 * numbers + (len(shape) == 1)).float()


def hf_model(changes):
    """The LlamaForCausalLM of SIZES with these changes."""
    import transformers
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes})).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(weight(name, parameter.shape))
    return model


def rounded(logits):
    return [[float(f"{x:.6g}") for x in row] for row in logits.tolist()]


def random_checkpoint(changes):
    """Its config.json, and some of its logits."""
    model = hf_model(changes)
    config = json.loads(model.config.to_json_string())
    del config["transformers_version"]
    return {"config": config, "logits": rounded(model(TOKENS).logits[0][KEPT[0]][:, KEPT[1]])}


def shipped_checkpoint():
    """Of the shipped model: some of its logits on 400 tokens of STORY, and the likeliest 32 tokens after PROMPT."""
    import sentencepiece
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED / "tokenizer.model"))
    story = [1, *tokenizer.encode(STORY)][:400]
    logits = model(torch.tensor([story])).logits[0]
    ids = [1, *tokenizer.encode(PROMPT)]
    for _ in range(GREEDY):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return {"logits": rounded(logits[KEPT_OF_STORY]), "greedy": ids[-GREEDY:]}


def main():
    golden = {name: random_checkpoint(changes) for name, changes in HF_CONFIGS.items()}
    golden["checkpoints/tiny"] = shipped_checkpoint()
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in golden.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
