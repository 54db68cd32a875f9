"""hf.py: every family of its table, as a small random model beyond its window, against the model's own attention.

`python tests/test_hf.py` prints the README's table of families, as it is found to be here. Needs transformers.
"""
import io
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
transformers = pytest.importorskip("transformers", minversion="5")

import eval_harness  # noqa: E402
import eval_passkey  # noqa: E402
import eval_perplexity  # noqa: E402
import eval_ruler  # noqa: E402
import hf  # noqa: E402
from cache import KVCache  # noqa: E402
from checkpoint import fields_of  # noqa: E402
from generate import generate, run  # noqa: E402
from model import load  # noqa: E402

transformers.logging.set_verbosity_error()
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = ROOT / "checkpoints" / "tiny"
METHODS = ["rope", "rerope", "dca", "mesa", "streaming-llm"]  # one of each shape
L, T = 32, 75
SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=L, original_max_position_embeddings=L,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
WINDOW = dict(sliding_window=9)
CASES = {  # row of the table: settings of its config that make it small, and its layers differ
    "llama": {}, "mistral": dict(sliding_window=None), "mistral with sliding_window": WINDOW,
    "mixtral": EXPERTS, "qwen2": dict(use_sliding_window=True, max_window_layers=2, **WINDOW),
    "qwen3": dict(use_sliding_window=True, max_window_layers=2, **WINDOW), "qwen3_moe": EXPERTS, "phi": {}, "phi3": {},
    "phi3 with sliding_window": WINDOW, "gemma": {}, "gemma2": dict(query_pre_attn_scalar=32, **WINDOW),
    "gemma3_text": dict(layer_types=["sliding_attention", "full_attention"] * 2, **WINDOW),
    "smollm3": {}, "olmo2": {}, "cohere": {}, "cohere2": WINDOW, "granite": dict(attention_multiplier=0.3),
    "starcoder2": {}, "starcoder2 with sliding_window": WINDOW, "stablelm": {}, "glm": {}, "nemotron": {},
    "gpt_neox": dict(num_key_value_heads=None),
    "llama4_text": dict(attention_chunk_size=9, intermediate_size_mlp=64, num_local_experts=2, floor_scale=8),
    "llama4_text with attention_chunk_size null": dict(attention_chunk_size=None, intermediate_size_mlp=64,
                                                       num_local_experts=2),
    "gpt_oss": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4), num_local_experts=4,
                    num_experts_per_tok=2, **WINDOW),
}


def tiny_model(name, **settings):
    """A random model, with weights so large that its attention is not uniform."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name.split()[0], **{**SIZES, **CASES.get(name, {}), **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1 or "sinks" in key:
                weight.normal_(std=1.0 if "sinks" in key else 0.15)
    return model


def prompt(tokens=T, rows=1, vocab=97):
    return torch.randint(3, vocab, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def extended(model, *args, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a method changes nothing: test_what_is_refused
        return hf.extend(model, *args, **settings)


@torch.no_grad()
def logits_of(model, ids, **settings):
    return model(ids, **settings).logits.float()


def in_pieces(model, ids, sizes=(10, 27, 1, 35, 1)):
    """The logits of a prompt that is read piece by piece, and token by token at its end."""
    cache = transformers.DynamicCache(config=model.config)
    hf.announce(cache, ids.shape[1])
    pieces = ids.split([*sizes, *[1] * (ids.shape[1] - sum(sizes))], 1)
    return torch.cat([logits_of(model, piece, **hf.cache_argument(model, cache)) for piece in pieces], 1)


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() < tolerance * max(1.0, float(b.abs().max()))


# ---- every family

@pytest.mark.parametrize("name", CASES)
def test_family(name):
    """rope is the model's own attention; pieces and decoding are one pass; restore leaves no trace."""
    model, ids = tiny_model(name), prompt()
    own = logits_of(model, ids)
    assert close(logits_of(extended(model), ids), own)
    for method in METHODS:
        whole = logits_of(extended(model, method), ids)
        changes = any(layer.own is None for layer in hf.decoder_of(model).beyond.layers) and method != "rope"
        assert close(whole, own) != changes, method
        assert close(in_pieces(model, ids), whole), method
    assert torch.equal(logits_of(hf.restore(model), ids), own)


def family_table():
    """The README's table, from what extend finds in the models of CASES."""
    lines = ["| family | runs in | layers that a method changes | layers that stay as trained | also exact |",
             "|---|---|---|---|---|"]
    for name in CASES:
        model = extended(tiny_model(name))
        layers = hf.decoder_of(model).beyond.layers
        own = {(layer.own.name + " without positions" * (layer.own.freq == "nope")).replace("nope", "no positions")
               for layer in layers if layer.own}
        changed = {True: "none", False: "all"}.get(all(layer.own is not None for layer in layers))
        if changed == "all" and own:
            changed = "full" if "no positions" not in own else "with positions"
        try:
            fields_of(model.config.to_dict())
            native = "model.py, hf.py"
        except ValueError:
            native = "hf.py"
        config = layers[0].config
        also = {"interleaved pairs": config.interleaved, "partial rotary": config.rotary_dim < config.head_dim,
                "capped logits": getattr(model.config, "attn_logit_softcapping", None), "sinks": name == "gpt_oss"}
        exact = ", ".join(fact for fact, is_so in also.items() if is_so)
        lines.append(f"| {name} | {native} | {changed} | {', '.join(sorted(own))} | {exact} |")
    return "\n".join(lines)


def test_the_table_of_families_is_in_the_readme():
    assert {name.split()[0] for name in CASES} == set(hf.FAMILIES)
    assert family_table() in README


# ---- the same as our engine

@pytest.fixture(scope="module")
def shipped():
    """(the shipped model in transformers, the same in model.py, its tokenizer)"""
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval(), *load(TINY)


def test_mesa_on_the_shipped_model_is_our_engine(shipped):
    theirs, ours, _ = shipped
    ids = prompt(700, vocab=ours.config.vocab_size)
    with torch.no_grad():
        expected = ours(ids, ours.plan("mesa:first=16", n=700))
    assert close(logits_of(hf.extend(theirs, "mesa:first=16"), ids), expected)
    for method in ("mesa", "rerope"):  # another method needs no reload
        tokens = theirs_tokens(hf.extend(theirs, method), ids, 12)
        assert tokens == list(generate(ours, ids[0].tolist(), method, max_new_tokens=12))


def theirs_tokens(model, ids, new, **settings):
    return model.generate(ids, max_new_tokens=new, do_sample=False, **settings)[0, ids.shape[1]:].tolist()


def test_n_grows_on_a_second_turn(shipped):
    """The cache of a first turn goes on; one pass over both turns, as our engine's second turn, has the same logits."""
    theirs, ours, _ = shipped
    ids = prompt(900, vocab=ours.config.vocab_size)
    hf.extend(theirs, "self-extend")
    cache = transformers.DynamicCache(config=theirs.config)
    logits_of(theirs, ids[:, :200], **hf.cache_argument(theirs, cache))
    assert cache.prompt_length == 200
    second = logits_of(theirs, ids[:, 200:], **hf.cache_argument(theirs, cache))
    assert cache.prompt_length == 900
    native = KVCache(ours.config)
    with torch.no_grad():
        for first, n in ((0, 200), (200, 900)):
            plan = ours.plan("self-extend", n=n, i=torch.arange(first, n), j=torch.arange(n))
            expected = ours(ids[:, first:n], plan, native)
    assert close(second, expected)
    logits_of(theirs, ids[:, :1], **hf.cache_argument(theirs, cache))
    assert cache.prompt_length == 900  # decoding keeps it


# ---- batches

@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "llama4_text", "gpt_oss"])
@pytest.mark.parametrize("method", ["mesa", "self-extend"])
def test_left_padded_rows_are_what_each_is_alone(name, method):
    model = extended(tiny_model(name, **({"floor_scale": 8192} if name == "llama4_text" else {})), method)
    lengths = [75, 40, 62, 75]
    rows = [prompt(n) for n in lengths]
    ids = torch.cat([torch.cat((torch.zeros(1, T - n, dtype=torch.long), row), 1) for n, row in zip(lengths, rows)])
    mask = (torch.arange(T) >= T - torch.tensor(lengths)[:, None]).long()
    together = logits_of(model, ids, attention_mask=mask)
    new = model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for number, row in enumerate(rows):
        assert close(together[number, T - row.shape[1]:], logits_of(model, row)[0])
        assert theirs_tokens(model, row, 8, min_new_tokens=8) == new[number, T:].tolist()


# ---- positions a model was trained with

SCALINGS = {
    "linear": dict(factor=4.0), "dynamic": dict(factor=4.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=L),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=L),
    "longrope": dict(factor=4.0, short_factor=[1.0 + p / 8 for p in range(8)], long_factor=[2.0 + p for p in range(8)],
                     original_max_position_embeddings=L),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_trained_frequencies_are_kept_unless_the_method_has_its_own(kind):
    rope = dict(rope_type=kind, rope_theta=1e4, **SCALINGS[kind])
    model, ids = tiny_model("phi3" if kind == "longrope" else "llama", rope_parameters=rope), prompt()
    own = logits_of(model, ids)
    assert close(logits_of(hf.extend(model), ids), own)
    layer = hf.decoder_of(model).beyond.layers[0]
    trained, plain = layer.config.plan(n=T), layer.config.plan("rope", n=T)
    mesa = layer.config.plan("mesa", n=T)
    assert torch.equal(mesa.inv_freq, trained.inv_freq) and mesa.mscale == trained.mscale
    assert not torch.equal(plain.inv_freq, trained.inv_freq)
    assert not close(logits_of(hf.extend(model, "rope"), ids), own)


# ---- what is around it, unchanged

def saved(name, folder, **settings):
    """A checkpoint folder of a family, with a tokenizer of words w1 w2 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, 97)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_model(name, **settings).save_pretrained(folder)
    core = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>",
                                                model_input_names=["input_ids", "attention_mask"])
    core.save_pretrained(folder)
    return folder


TEXT = " ".join(f"w{token}" for token in prompt(130)[0].tolist())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_neox"])
def test_the_five_lines_of_the_readme_and_a_pipeline(name, tmp_path, capsys):
    """At 4 times the window, with 64 tokens decoded."""
    lines = README.split("## Inside transformers")[1].split("\n\n    ")[1].split("\n\n")[0].replace("\n    ", "\n")
    assert len(lines.splitlines()) == 5
    session = {"folder": saved(name, tmp_path, eos_token_id=None), "text": TEXT}
    for method in ("mesa", "rerope"):
        capsys.readouterr()
        exec(lines.replace("mesa", method), session)
        words = capsys.readouterr().out.split()
        assert len(words) == 130 + 64 > 4 * L and words[:130] == TEXT.split()
    model, tokenizer = session["model"], session["tokenizer"]
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert len(pipe(TEXT, max_new_tokens=4, do_sample=True, top_k=5)[0]["generated_text"]) > len(TEXT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: a checkpoint folder} of families that model.py does not know."""
    made = {name: saved(name, tmp_path_factory.mktemp(name)) for name in ("gemma3_text", "gpt_neox")}
    assert all(hf.takes(folder) for folder in made.values())
    return made


def test_generate_py_takes_the_folder(folders, capsys):
    flags = ["--ckpt", str(folders["gemma3_text"]), "--prompt", TEXT, "--max-new-tokens", "6", "--prefill-chunk", "50"]
    flags += ["--method", "mesa", "--train-len", "20"]
    assert run(flags) == 0
    said = capsys.readouterr()
    assert "method=mesa" in said.err and "train-len=20" in said.err and "memory: about" in said.err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders["gemma3_text"])
    _, tokenizer = hf.open_folder(folders["gemma3_text"])
    ids = torch.tensor([tokenizer.encode(TEXT)])
    tokens = theirs_tokens(hf.extend(theirs, "mesa", train_len=20), ids, 6)
    assert said.out.split() == tokenizer.decode(tokens).split()
    assert run([*flags, "--explain"]) == 0
    said = capsys.readouterr().out
    assert "layers: 2 by sliding:window=9, 2 by the method" in said and "memory: about" in said
    for flag, words in ((["--compile"], "--compile is not there"), (["--quantize", "int8"], "--quantize is for")):
        with pytest.raises(ValueError, match=words):
            run([*flags, *flag])


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_model_is_transformers_with_our_cache(name):
    """Reading in pieces, decoding, batches of a length and changes of the method."""
    theirs, ids = tiny_model(name), prompt(rows=2)
    ids[1] = ids[1].flip(0)
    wholes = {method: logits_of(extended(theirs, method), ids) for method in ("rerope", "mesa")}
    config = hf.governed(hf.decoder_of(theirs).beyond.layers).config
    model = hf.Model(theirs, config)
    for method, whole in wholes.items():
        assert close(model(ids, model.plan(method, n=T)), whole)
        cache, pieces = KVCache(config), []
        for piece in ids.split([10, 27, 1, 30] + [1] * (T - 68), 1):
            end = len(cache) + piece.shape[1]
            plan = model.plan(method, n=T, i=torch.arange(len(cache), end), j=torch.arange(end))
            pieces.append(model(piece, plan, cache))
        assert close(torch.cat(pieces, 1), whole)
        assert close(model(ids, model.plan(method, n=T), last_only=True), whole[:, -1:])
    assert close(logits_of(extended(theirs, "rerope"), ids), wholes["rerope"])  # and generate goes on as before


def test_evaluations_take_the_folder(folders, tmp_path, capsys):
    """A family that model.py does not know: every script's table has its methods; and the losses are transformers'."""
    folder = str(folders["gpt_neox"])
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 2, encoding="utf-8")
    common = ["--ckpt", folder, "--methods", "rope,mesa", "--results"]
    eval_perplexity.run([str(text), *common, str(tmp_path / "p"), "--length", "75", "--buckets", "1"])
    assert "| mesa |" in capsys.readouterr().out
    ids = hf.open_folder(folder)[1].encode(text.read_text())[:74]
    theirs = hf.extend(transformers.AutoModelForCausalLM.from_pretrained(folder), "mesa")
    logits = logits_of(theirs, torch.tensor([ids]))[0]
    want = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    rows = [json.loads(line) for line in (tmp_path / "p").read_text().splitlines()]
    assert abs(rows[1]["nll"] - float(want)) < 1e-4 and rows[1]["method"] == "mesa"
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps({"input": TEXT, "outputs": ["w1"]}) + "\n", encoding="utf-8")
    eval_ruler.run([*common, str(tmp_path / "r"), "--data", str(cases), "--max-new-tokens", "4"])
    assert "mesa" in capsys.readouterr().out
    eval_passkey.run([*common, str(tmp_path / "k"), "--lengths", "110", "--depths", "1", "--trials", "2"])
    assert "| mesa |" in capsys.readouterr().out


def test_chat_and_saved_caches_take_the_folder(folders, tmp_path, capsys, monkeypatch):
    """A prompt that is read once answers as one that is read anew; turns of a chat compute only what they add."""
    flags = ["--ckpt", str(folders["gpt_neox"]), "--method", "mesa", "--max-new-tokens", "6"]
    assert run([*flags, "--prompt", TEXT, "--save-cache", str(tmp_path / "book")]) == 0
    capsys.readouterr()
    assert run([*flags, "--prompt", "w5 w6", "--load-cache", str(tmp_path / "book")]) == 0
    said = capsys.readouterr()
    assert "130 tokens" in said.err
    assert run([*flags, "--prompt", f"{TEXT} w5 w6"]) == 0
    anew = capsys.readouterr().out
    assert len(said.out.split()) == 6 and said.out.split()[:1] == anew.split()[:1]
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2 w3\nw4 w5\n/stats\n"))
    assert run([*flags, "--chat"]) == 0
    said = capsys.readouterr().err
    assert "turns 2, " in said and "prompts: 6 computed, 8 taken from the cache" in said


def test_weights_that_torchao_has_quantised(tmp_path, capsys):
    """A model in 8 bits, by mesa beyond its window, and its folder through generate.py."""
    torchao = pytest.importorskip("torchao.quantization")
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved("qwen3", tmp_path / "plain"))
    settings = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    assert "Int8" in type(model.model.layers[0].self_attn.q_proj.weight).__name__
    ids = prompt()
    want = logits_of(hf.extend(plain, "mesa"), ids)
    found = logits_of(hf.extend(model, "mesa"), ids)
    assert 1e-4 < (found - want).abs().max() / want.abs().max() < 0.1
    assert close(in_pieces(model, ids), found, 1e-4)
    hf.restore(model).save_pretrained(tmp_path / "int8")
    for file in (tmp_path / "plain").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "int8")
    assert hf.takes(tmp_path / "int8") and not hf.takes(tmp_path / "plain")
    assert run(["--ckpt", str(tmp_path / "int8"), "--prompt", TEXT, "--method", "mesa", "--max-new-tokens", "6"]) == 0
    assert len(capsys.readouterr().out.split()) == 6


TASK = """task: words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
KINDS = {
    "loglikelihood": "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false",
    "generate_until": "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
                      "generation_kwargs:\n  max_gen_toks: 4\n  until: [w99]",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_harness_of_eleutherai(kind, folders, tmp_path, capsys, monkeypatch):
    """A task file of one's own, offline: likelihoods are those of the extended model, and answers are its answers."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(folders["gpt_neox"], tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "w96"}), encoding="utf-8")
    theirs = hf.extend(transformers.AutoModelForCausalLM.from_pretrained(folder), "mesa")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    answer = tokenizer.decode(theirs_tokens(theirs, ids, 4))
    target = " w7" if kind == "loglikelihood" else answer
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": TEXT, "answer": target}) + "\n", encoding="utf-8")
    task = TASK.format(file=tmp_path / "docs.jsonl", kind=kind, more=KINDS[kind])
    (tmp_path / "words.yaml").write_text(task, encoding="utf-8")
    flags = ["--ckpt", str(folder), "--tasks", "words", "--include-path", str(tmp_path)]
    assert eval_harness.run([*flags, "--methods", "rope,mesa"]) == 0
    rope, mesa = [float(cells.split("|")[7]) for cells in capsys.readouterr().out.splitlines() if "|words|" in cells]
    loss = -logits_of(theirs, ids)[0, -1].log_softmax(-1)[tokenizer.encode("w7")[-1]]
    want = float(loss.exp()) if kind == "loglikelihood" else 1.0
    assert abs(mesa - want) < 1e-3 * want and rope != mesa
    with pytest.raises(ValueError, match="no task wrods"):
        eval_harness.run(["--ckpt", str(folder), "--tasks", "wrods"])


# ---- what is refused, in one sentence

def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="cannot extend models of type gpt2; it knows llama"):
        hf.extend(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2)))
    model, ids = tiny_model("llama"), prompt()
    with pytest.raises(ValueError, match="did you mean mesa"):
        hf.extend(model, "meza")
    with pytest.warns(UserWarning, match="mesa changes nothing"):
        hf.extend(tiny_model("cohere2"), "mesa")
    hf.extend(model, "mesa")
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    with pytest.raises(ValueError, match="padding must be at the left"):
        logits_of(model, ids, attention_mask=mask)
    with pytest.raises(ValueError, match="four dimensions"):
        logits_of(model, ids, attention_mask=torch.ones(1, 1, T, T))
    with pytest.raises(ValueError, match="static caches"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install 'transformers>=5'"):
        hf.extend(model, "mesa")


if __name__ == "__main__":
    print(family_table())
