"""Write a checkpoint's weights in 8 or 4 bits, as a folder that loads in seconds; quantized.py says how they lie.

    python quantize.py llama-7b llama-7b-int4 --bits 4
    python generate.py --ckpt llama-7b-int4 --method mesa
"""
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint import QUANTIZATIONS, find_checkpoint, read_json, refuse_unfinished
from cli import plain_parser, run_command, say
from config import Config
from model import Llama
from quantized import weights_of

SHARD = 2 ** 30          # bytes of a written file
COPIED = ("tokenizer*", "*.jinja", "generation_config.json", "special_tokens_map.json")


def write_folder(path, out, config, model, bits):
    """Write a folder of a checkpoint's quantised weights; its index last, so that a folder that has it is whole."""
    if config.bits:
        raise ValueError(f"{path}: quantised already")
    if any(out.glob("model.safetensors*")):
        raise ValueError(f"{out}: there is a checkpoint in it already")
    out.mkdir(parents=True, exist_ok=True)
    for pattern in COPIED:
        for file in path.glob(pattern):
            shutil.copyfile(file, out / file.name)
    raw = read_json(path / "config.json") | {"quantization": QUANTIZATIONS[bits]}
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    places = save_shards(weights_of(model, path, quantize=f"int{bits}"), out)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}, indent=2), encoding="utf-8")


def save_shards(tensors, out):
    """Write an iterator of (name, tensor) as files of up to SHARD bytes: {name: file}."""
    places = {}
    shard = {}
    for name, tensor in tensors:
        if shard and sum(kept.nbytes for kept in shard.values()) + tensor.nbytes > SHARD:
            save_shard(shard, out, places)
        shard[name] = tensor
    save_shard(shard, out, places)
    return places


def save_shard(shard, out, places):
    """Write the tensors of a shard as the next file, put it in places, and empty the shard."""
    file = f"model-{1 + len(set(places.values())):05}.safetensors"
    save_file(shard, out / file, metadata={"format": "pt"})
    places.update(dict.fromkeys(shard, file))
    shard.clear()


def run(argv=None):
    """The command: its exit code."""
    parser, flag = plain_parser(__doc__)
    parser.add_argument("ckpt", help="a folder, or a name in this one or in checkpoints/")
    parser.add_argument("out", type=Path, help="the folder to write")
    flag("bits", type=int, choices=QUANTIZATIONS, default=8, help="of a weight; default: 8")
    args = parser.parse_args(argv)
    path = find_checkpoint(args.ckpt)
    refuse_unfinished(path)
    config = Config.from_hf(path)
    with torch.device("meta"):
        model = Llama(config)
    write_folder(path, args.out, config, model, args.bits)
    written = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    say(f"{args.out}: {written / 2 ** 20:.1f} MiB of weights")
    return 0


if __name__ == "__main__":
    run_command(run, "quantize.py")
