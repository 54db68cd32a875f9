"""tasks.py: prompts of an exact length, with every needle and entry where it should stand."""
import random
import re
from pathlib import Path

import pytest

from tasks import PAIRS, RECORDS, TASKS, WORDS, answer_text, entries, passkey_prompt, record_prompt
from tokenizer import load_tokenizer

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"


class Words:
    """A tokenizer with a token for every word, so that prompts can be read and counted."""

    def __init__(self, bos_id=0):
        self.bos_id = bos_id
        self.words = ["<s>"]

    def encode(self, text, bos=True):
        words = text.split()
        if bos and self.bos_id is not None:
            words = ["<s>", *words]
        self.words += [word for word in dict.fromkeys(words) if word not in self.words]
        return [self.words.index(word) for word in words]

    def decode(self, ids):
        return " ".join(self.words[token] for token in ids)


@pytest.fixture
def words():
    return Words()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY, bos_id=1)


def asked_for(tokenizer, prompt):
    """The text of the needle, or of the entry, that a prompt asks for."""
    first, last = prompt.span
    return tokenizer.decode(prompt.ids[first:last + 1])


# ---- a passkey

def test_a_passkey_prompt_in_full(words):
    """10 words of filler, the needle at a depth of 0.3, so after 3 of them; the filler begins anew behind it."""
    filler = words.encode("a b c d e", bos=False)
    prompt = passkey_prompt(words, 47, depth=0.3, keys=["12345"], filler=filler)
    assert words.decode(prompt.ids) == (
        "<s> There is a pass key hidden in the text below. Find it and remember it. "
        "a b c "
        "The pass key is 12345. Remember it. 12345 is the pass key. "
        "a b c d e a b "
        "What is the pass key? The pass key is")
    assert asked_for(words, prompt) == "The pass key is 12345. Remember it. 12345 is the pass key."
    assert prompt.answer == "12345" and prompt.task == "passkey"


def test_two_keys_have_owners_and_the_last_one_is_asked_for(words):
    """Ben's, at the depth given; Anna's stands in the middle of the filler."""
    prompt = passkey_prompt(words, 69, depth=0, keys=["11111", "22222"], filler=words.encode("x", bos=False))
    assert words.decode(prompt.ids) == (
        "<s> There is a pass key hidden in the text below. Find it and remember it. "
        "The pass key of Ben is 22222. Remember it. 22222 is the pass key of Ben. "
        "x x x x "
        "The pass key of Anna is 11111. Remember it. 11111 is the pass key of Anna. "
        "x x x x "
        "What is the pass key of Ben? The pass key of Ben is")
    assert prompt.answer == "22222" and asked_for(words, prompt).startswith("The pass key of Ben is 22222.")


@pytest.mark.parametrize("depth, order", [
    (0, "D...A...B...C..."), (1, "...A...B...C...D"), (1 / 3, "...A.D..B...C..."), (1 / 2, "...A...BD...C...")])
def test_where_the_needles_of_four_keys_stand(words, depth, order):
    """David is asked for, at the depth given; Anna, Ben and Clara stand after 1/4, 2/4 and 3/4 of the filler."""
    keys = ["11111", "22222", "33333", "44444"]
    prompt = passkey_prompt(words, 105, depth, keys, filler=words.encode(".", bos=False))
    needle = r" ?The pass key of (\w)\w+ is \d+\. Remember it\. \d+ is the pass key of \w+\. ?"
    body = re.search(r"and remember it\.(.*) What is", words.decode(prompt.ids)).group(1)
    assert re.sub(needle, r"\1", body).replace(" ", "") == order


@pytest.mark.parametrize("n, keys, depth", [
    (180, ["12345"], 0), (333, ["12345"], 0.4), (1001, ["12345"], 1), (1001, ["11111", "22222", "33333"], 0.4)])
def test_a_prompt_has_exactly_n_tokens_and_holds_every_key(tokenizer, n, keys, depth):
    prompt = passkey_prompt(tokenizer, n, depth, keys)
    text = tokenizer.decode(prompt.ids)
    assert len(prompt.ids) == n and prompt.ids[0] == tokenizer.bos_id
    assert asked_for(tokenizer, prompt).count(keys[-1]) == 2 and prompt.answer == keys[-1]
    assert all(text.count(key) == 2 for key in keys) and not text.endswith(" ")


def test_a_tokenizer_without_bos():
    prompt = passkey_prompt(Words(bos_id=None), 48)
    assert len(prompt.ids) == 48 and 0 not in prompt.ids


def test_a_prompt_too_short_says_what_it_takes(words):
    assert len(passkey_prompt(words, 37).ids) == 37
    with pytest.raises(ValueError, match="at least 37 tokens, not 36"):
        passkey_prompt(words, 36)


@pytest.mark.parametrize("count", [0, 9])
def test_no_more_keys_than_owners(words, count):
    with pytest.raises(ValueError, match=f"1 to 8 keys, not {count}"):
        passkey_prompt(words, 1000, 0.5, ["12345"] * count)


# ---- a record

def test_a_record_of_pairs_in_full(words):
    """Four entries of two words fit, beside 9 words of padding; the third is asked for.

    What a seed gives must never change, or old results could not be compared with new ones.
    """
    prompt = record_prompt(words, "kv", 39, 0.67, random.Random(1))
    assert words.decode(prompt.ids) == (
        "<s> Below is a list of keys and values. Remember the value of each key. "
        "The grass is green. The sky is blue. The "
        "ink: 13715, dart: 61093, bread: 66723, moss: 89618, "
        "What is the value of bread? bread:")
    assert asked_for(words, prompt) == "bread: 66723," and prompt.answer == "66723" and prompt.task == "kv"


ENTRY = {"lines": r"line ([a-z-]+): REGISTER_CONTENT is <(\d{5})>", "kv": r"([a-z-]+): (\d{5}),"}
ENDING = {"lines": "? line {name}: REGISTER_CONTENT is", "kv": "What is the value of {name}? {name}:"}


@pytest.mark.parametrize("task", RECORDS)
@pytest.mark.parametrize("n, depth", [(250, 0), (333, 0.5), (4000, 1)])
def test_a_record_is_exact_full_and_asks_for_one_entry(tokenizer, task, n, depth):
    """n tokens, nearly all of them entries, none named twice; the one asked for lies at its depth."""
    prompt = record_prompt(tokenizer, task, n, depth, random.Random(n))
    text = tokenizer.decode(prompt.ids)
    found = re.findall(ENTRY[task], text)
    assert len(prompt.ids) == n and prompt.task == task
    assert len(dict(found)) == len(found) > n / 60 and text.count("There and back again.") <= 1

    name, value = found[round(depth * (len(found) - 1))]
    assert re.findall(ENTRY[task], asked_for(tokenizer, prompt)) == [(name, value)]
    assert prompt.answer == value and text.endswith(ENDING[task].format(name=name))

    others = [tokenizer.decode(prompt.ids[first:last + 1]) for first, last in prompt.others]
    del found[round(depth * (len(found) - 1))]
    assert [re.findall(ENTRY[task], other) for other in others] == [[entry] for entry in found]


def test_a_record_too_short_for_an_entry(words):
    with pytest.raises(ValueError, match="20 tokens are too few for a prompt of the task lines"):
        record_prompt(words, "lines", 20, 0.5, random.Random(0))


def test_names_are_words_then_pairs_of_them_or_those_given(words):
    few = entries(words, "kv", 100, random.Random(0))
    many = entries(words, "kv", 1000, random.Random(0))
    given = entries(words, "kv", 100, random.Random(0), names=WORDS[:8])
    assert len(few) == 50 and {entry.name for entry in few} <= set(WORDS)
    assert len(many) == 500 and {entry.name for entry in many} <= set(PAIRS)
    assert sorted(entry.name for entry in given) == WORDS[:8]


def test_answers_as_they_stand_in_the_text():
    assert [answer_text(task, "71432") for task in TASKS] == ["71432", "<71432>", "71432,"]
