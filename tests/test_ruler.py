"""ruler_tasks.py and eval_ruler.py: prompts of exact lengths that hold their answers, scores, files, the command."""
import json
import os
import random
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

import eval_ruler
import ruler_tasks
from config import Config
from eval_ruler import exact_score, f1_score, substring_score
from ruler_tasks import SIZES, TASKS, Size, is_held_out, new_material, ruler_prompt, zipf_counts
from test_eval import refused, rows_of, run
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SMALL, SMALLEST = SIZES[2:]
SQUAD = {"data": [{"paragraphs": [
    {"context": f"{city} is a city. It lies in {land}. It is old.",
     "qas": [{"question": f"Where is {city}?", "answers": [{"text": land}, {"text": f"in {land}"}]}]}
    for city, land in [("Paris", "France"), ("Rome", "Italy"), ("Oslo", "Norway")]]}]}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "checkpoints/tiny", Config.from_hf(ROOT / "checkpoints/tiny").bos_token_id)


@pytest.fixture(scope="module")
def material():
    return new_material(squad=SQUAD)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size, n", [(SMALLEST, 256), (SMALL, 301), (SIZES[1], 1500), (SIZES[0], 4096)])
def test_exact_lengths_and_seeds(tokenizer, material, task, size, n):
    """The text encodes to n tokens; another seed gives another prompt, the same one the same prompt."""
    first, again, other = [ruler_prompt(tokenizer, task, n, random.Random(seed), material, size) for seed in (1, 1, 2)]
    assert tokenizer.encode(first.text) == first.ids and len(first.ids) == len(other.ids) == n
    assert first == again and (first.text != other.text or task == "qa")
    assert all(reference in first.text for reference in first.references)
    assert first.references[0] in first.answer and first.answer.endswith(".")


@pytest.mark.parametrize("task, count", [("niah_single_1", 1), ("niah_single_3", 1), ("niah_multikey_1", 1),
                                         ("niah_multikey_3", 1), ("niah_multivalue", 4), ("niah_multiquery", 4)])
def test_needles_say_what_is_asked(tokenizer, material, task, count):
    """Each reference stands once, in a needle with a key that the question names; keys differ."""
    prompt = ruler_prompt(tokenizer, task, 2048, random.Random(0), material)
    needles = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", prompt.text)
    question = prompt.text.rsplit("\n", 1)[1]
    assert len(prompt.references) == count == len(set(prompt.references))
    for reference in prompt.references:
        [key] = [key for key, value in needles if value == reference]
        assert question.count(key) == 2 and prompt.text.count(reference) == 1
    keys = Counter(key for key, _ in needles)
    assert max(keys.values()) == (4 if task == "niah_multivalue" else 1)
    if task == "niah_multikey_3":
        assert len(needles) > 10 and all(len(word) == 36 for pair in needles for word in pair)


def test_variables_form_a_chain(tokenizer, material):
    """In their order, after a solved example with shorter names."""
    prompt = ruler_prompt(tokenizer, "vt", 2048, random.Random(0), material)
    example, text = re.split(r"\n\n(?=Memorize)", prompt.text)
    links = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
    assert [name for name, _ in links] == prompt.references and [len(name) for name in prompt.references] == [5] * 5
    assert all(earlier[0] == later[1] for earlier, later in pairwise(links))
    assert f"5 variables are assigned the value {links[0][1]}, they are:" in text.splitlines()[-1]
    assert re.findall(r"VAR (\w+) = ", example) == example.splitlines()[-1].split()[-5:]


def test_words_are_as_often_as_said(tokenizer, material):
    prompt = ruler_prompt(tokenizer, "cwe", 4096, random.Random(0), material, Size(example_words=()))
    counts = Counter(re.findall(r"\d+\. (\S+)", prompt.text))
    assert {word for word, count in counts.items() if count == 30} == set(prompt.references)
    assert len(prompt.references) == 10 and set(counts.values()) == {30, 3}
    prompt = ruler_prompt(tokenizer, "fwe", 4096, random.Random(0), material)
    context = prompt.text.split("appeared coded words. ")[1].split("\nQuestion")[0]
    ranked = Counter(context.split()).most_common()
    words = [word for word, _ in ranked]
    assert words[0] == "..." and words[1:4] == prompt.references and ranked[3][1] > ranked[4][1]
    assert zipf_counts(60, 8) == [36, 9, 4, 2, 1, 1, 0, 0]


def test_questions_stand_among_documents(tokenizer, material):
    prompt = ruler_prompt(tokenizer, "qa", 400, random.Random(3), material)
    assert prompt.references in [["France", "in France"], ["Italy", "in Italy"], ["Norway", "in Norway"]]
    assert prompt.text.count("Document ") == 3 and prompt.text.endswith("? Answer:")
    small = ruler_prompt(tokenizer, "qa", 120, random.Random(3), material, SMALL)
    assert f"\nIt lies in {small.references[0]}.\n" in small.text


def test_training_and_evaluation_share_nothing(tokenizer):
    """Names, values and prose, by a checksum."""
    trained_on = " ".join(ruler_tasks.topics(test=False))
    pieces = new_material(test=True).prose
    assert len(pieces) > 1000 and not any(piece in trained_on for piece in pieces)
    for test in (True, False):
        for seed in range(5):
            prompt = ruler_prompt(tokenizer, "niah_multikey_2", 600, random.Random(seed), new_material(test), SMALL)
            pairs = re.findall(r"The magic number of (\S+) is (\d+)\.", prompt.text)
            assert pairs and all(is_held_out(item) == test for pair in pairs for item in pair)


def test_scores_worked_by_hand():
    """RULER's: the share of references found in any case; for qa the best. F1 and exact match: SQuAD's, of one line."""
    assert substring_score("vt", "ABC, dEf and x", ["abc", "DEF", "GHI"]) == pytest.approx(2 / 3)
    assert substring_score("qa", "In France.", ["Gaul", "france"]) == 1
    assert exact_score("x", " The Eiffel tower.\nIt", ["eiffel tower"]) == 1
    assert exact_score("x", "tower", ["a tow"]) == 0
    assert f1_score("x", "a big old house", ["the old house by the sea", "no"]) == pytest.approx(2 * 2 / (3 + 4))


GRID = ("--tasks", "niah_single_1,vt", "--methods", "rope,rerope", "--lengths", "256,320", "--samples", "2")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    file = tmp_path_factory.mktemp("ruler") / "r.jsonl"
    code, out, err = run(eval_ruler, *GRID, "--results", file)
    assert code == 0
    return file, out, err


def test_table_and_effective_length(grid, monkeypatch):
    """Scores are those of the rows; a second run prints the same and runs nothing."""
    file, out, err = grid
    rows = rows_of(file)
    assert len(rows) == 16
    assert "scaled down for a window of 256 tokens: niah_single_1: brief wording, numbers of 5 digits (" in err
    lines = out.splitlines()
    assert lines[0] == "| length | method | single_1 | vt | mean |"
    cells = lines[2].split("|")
    expected = [100 * sum(row["score"] for row in rows[k:k + 2]) / 2 for k in (0, 4)]
    assert [float(cell) for cell in cells[3:6]] == pytest.approx([*expected, sum(expected) / 2], abs=0.05)
    assert lines[7] == "| mean | 256 (1x) | 320 (1.25x) | effective (85.6) |"
    monkeypatch.setattr(eval_ruler, "prefill", None)  # calling it would fail
    assert run(eval_ruler, *GRID, "--results", file)[:2] == (0, out) and rows_of(file) == rows
    below = run(eval_ruler, *GRID, "--results", file, "--threshold", "0")[1]
    assert below.splitlines()[-1].endswith("| 320 |")


def test_seeds_and_the_tasks_of_five_digits(tmp_path):
    """Every seed has rows of its own; the means get the standard deviation over seeds, worked by hand."""
    args = ("--tasks", "passkey,kv", "--methods", "rope", "--lengths", "256", "--samples", "3", "--seed", "0,1")
    code, out, _ = run(eval_ruler, *args, "--results", tmp_path / "r.jsonl")
    rows = rows_of(tmp_path / "r.jsonl")
    assert code == 0 and len(rows) == 12 and len({row["answer"] for row in rows if row["task"] == "passkey"}) == 6
    assert all(row["tokens"] == 248 and len(row["references"][0]) == 5 for row in rows)
    by_seed = [100 * sum(row["score"] for row in rows if row["seed"] == seed) / 6 for seed in (0, 1)]
    mean, spread = sum(by_seed) / 2, abs(by_seed[0] - by_seed[1]) / 2 ** 0.5
    assert f"| rope | {mean:.1f} ± {spread:.1f} |" in out
    refused(eval_ruler, (*args, "--write", tmp_path / "w"), "made of tokens", tmp_path / "x.jsonl")


def test_an_interrupted_run_ends_with_the_same_rows(grid, tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_bytes(b"".join(grid[0].read_bytes().splitlines(keepends=True)[:7])[:-30])
    code, out, _ = run(eval_ruler, *GRID, "--results", file)
    whole, resumed = [sorted(json.dumps(row) for row in rows_of(path)) for path in (grid[0], file)]
    assert code == 0 and out == grid[1] and whole == resumed


def test_prompts_and_answers_in_files(grid, tmp_path):
    """What --write writes, --data runs with the same answers; --predictions has NVIDIA's layout."""
    file = tmp_path / "prompts.jsonl"
    assert run(eval_ruler, *GRID, "--write", file)[0] == 0
    prompts = rows_of(file)
    assert len(prompts) == 8 and {"index", "input", "outputs", "length"} <= set(prompts[0])
    args = ("--data", file, "--methods", "rope,rerope", "--results", tmp_path / "r.jsonl")
    code, out, _ = run(eval_ruler, *args, "--predictions", tmp_path / "p")
    assert code == 0 and out == grid[1]
    found = rows_of(tmp_path / "p/rerope/320/vt.jsonl")
    assert [set(row) >= {"index", "pred", "outputs", "others", "input"} for row in found] == [True] * 2


def test_prompts_of_another_layout(tmp_path):
    """As LongBench's: context, input and answers, of several lengths."""
    file = tmp_path / "book.jsonl"
    rows = [{"context": "The sky is blue. " * k, "input": "The sky is", "answers": ["blue"], "length": 9}
            for k in (3, 40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("--data", file, "--methods", "rope", "--score", "f1", "--max-new-tokens", "4", "--results")
    code, out, _ = run(eval_ruler, *args, tmp_path / "r.jsonl", "--template", "{context}{input}")
    assert code == 0 and out.startswith("| length | method | book | mean |")
    assert [row["length"] for row in rows_of(tmp_path / "r.jsonl")] == [32, 256]


def test_picture(grid, tmp_path):
    pytest.importorskip("matplotlib")
    assert run(eval_ruler, *GRID, "--results", grid[0], "--plot", tmp_path / "a.png")[0] == 0


def test_rouge_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    refused(eval_ruler, (*GRID, "--score", "rouge-l"), "pip install rouge-score", tmp_path / "r.jsonl")


@pytest.mark.parametrize("args, named", [
    (("--tasks", "niah_single_9"), "unknown task 'niah_single_9'"), (("--tasks", "qa"), "--qa FILE"),
    (("--lengths", "40"), "tokens"), (("--methods", "ropee"), "did you mean rope"),
    (("--data", "nowhere.jsonl"), "nowhere.jsonl"), (("--data", ROOT / "LICENSE"), "line 1 is no prompt"),
    (("--qa", ROOT / "LICENSE"), "not JSON"), (("--qa", ROOT / "checkpoints/tiny/config.json"), "SQuAD"),
    (("--data", "x.jsonl", "--tasks", "vt"), "--data brings"), (("--prose", os.devnull), "an empty prose")])
def test_bad_input_is_one_clear_line(args, named, tmp_path):
    refused(eval_ruler, args, named, tmp_path / "r.jsonl")
