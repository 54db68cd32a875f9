"""tasks.py: prompts of an exact length, with every needle and entry where it should stand."""
import random
import re
from pathlib import Path

import pytest

from tasks import (FILLER, PAIRS, QUESTION, RECORDS, TASK, TASKS, WORDS, answer_text, cycled, entries, passkey_prompt,
                   passkey_texts, random_digits, record_prompt)
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
    assert words.decode(prompt.ids[prompt.span[0]:prompt.span[1] + 1]) == (
        "The pass key is 12345. Remember it. 12345 is the pass key.")
    assert prompt.answer == "12345" and prompt.task == "passkey"


def needles_and_filler(words, depth, count, room):
    """["x x x", "Anna", "x", ...] of a prompt with `count` keys and `room` tokens of filler: what stands between its
    beginning and its question, a needle as the name of its owner."""
    filler = words.encode("x", bos=False)
    keys = [str(11111 * (k + 1)) for k in range(count)]
    shortest = int(re.search(r"at least (\d+)", message_of(words, keys)).group(1))
    text = words.decode(passkey_prompt(words, shortest + room, depth, keys, filler).ids)
    needle = r"The pass key of (\w+) is (\d+)\. Remember it\. \2 is the pass key of \1\."
    body = re.search(r"and remember it\. (.*) What is the pass key", text).group(1)
    return [part.strip() for part in re.split(r"(\w+)\|", re.sub(needle, r"\1|", body)) if part.strip()]


def message_of(words, keys):
    with pytest.raises(ValueError) as error:
        passkey_prompt(words, 1, 0.5, keys)
    return str(error.value)


def test_where_the_needles_of_four_keys_stand(words):
    """David is asked for, at the depth given; Anna, Ben and Clara stand after 1/4, 2/4 and 3/4 of the filler."""
    def placed(depth):
        return needles_and_filler(words, depth, count=4, room=12)
    assert placed(0) == ["David", "x x x", "Anna", "x x x", "Ben", "x x x", "Clara", "x x x"]
    assert placed(1) == ["x x x", "Anna", "x x x", "Ben", "x x x", "Clara", "x x x", "David"]
    assert placed(1 / 3) == ["x x x", "Anna", "x", "David", "x x", "Ben", "x x x", "Clara", "x x x"]
    assert placed(1 / 2) == ["x x x", "Anna", "x x x", "Ben", "David", "x x x", "Clara", "x x x"]


def test_where_the_needles_of_two_and_of_eight_keys_stand(words):
    assert needles_and_filler(words, 0, count=2, room=4) == ["Ben", "x x", "Anna", "x x"]
    alternating = needles_and_filler(words, 1, count=8, room=8)
    assert alternating[::2] == ["x"] * 8
    assert alternating[1::2] == ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry"]


def test_several_keys_have_owners_and_the_last_one_is_asked_for():
    needles, question = passkey_texts(["11111", "22222"])
    assert needles == [
        "The pass key of Anna is 11111. Remember it. 11111 is the pass key of Anna.",
        "The pass key of Ben is 22222. Remember it. 22222 is the pass key of Ben."]
    assert question == "What is the pass key of Ben? The pass key of Ben is"


@pytest.mark.parametrize("keys", [["12345"], ["11111", "22222", "33333"]], ids=len)
@pytest.mark.parametrize("n", [180, 333, 1001])
@pytest.mark.parametrize("depth", [0, 0.4, 1])
def test_a_prompt_has_exactly_n_tokens_and_holds_every_key(tokenizer, n, keys, depth):
    prompt = passkey_prompt(tokenizer, n, depth, keys)
    first, last = prompt.span
    text = tokenizer.decode(prompt.ids)
    assert len(prompt.ids) == n and prompt.ids[0] == tokenizer.bos_id
    assert tokenizer.decode(prompt.ids[first:last + 1]).count(keys[-1]) == 2 and prompt.answer == keys[-1]
    assert all(text.count(key) == 2 for key in keys) and not text.endswith(" ")


def test_depth_0_is_the_start_of_the_filler_and_1_its_end(tokenizer):
    first = passkey_prompt(tokenizer, 256, depth=0)
    last = passkey_prompt(tokenizer, 256, depth=1)
    assert first.span[0] == len(tokenizer.encode(TASK))
    assert last.span[1] == 255 - len(tokenizer.encode(QUESTION, bos=False))


def test_filler_and_key_by_default(tokenizer):
    prompt = passkey_prompt(tokenizer, 300)
    filler = tokenizer.encode(FILLER, bos=False)
    assert prompt.answer == "71432" and prompt == passkey_prompt(tokenizer, 300, 0.5, ["71432"], filler)


def test_a_tokenizer_without_bos():
    prompt = passkey_prompt(Words(bos_id=None), 48)
    assert len(prompt.ids) == 48 and 0 not in prompt.ids


def test_a_prompt_too_short_says_what_it_takes(words):
    assert message_of(words, ["12345"]) == "a passkey prompt takes at least 37 tokens, not 1"
    assert len(passkey_prompt(words, 37).ids) == 37
    with pytest.raises(ValueError, match="37 tokens, not 36"):
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
    assert words.decode(prompt.ids[prompt.span[0]:prompt.span[1] + 1]) == "bread: 66723,"
    assert prompt.answer == "66723" and prompt.task == "kv"


def test_a_record_of_lines_in_full(words):
    """Two entries of five words, beside the 8 words of padding that there always are: a longer name might need them."""
    prompt = record_prompt(words, "lines", 42, 1, random.Random(1))
    assert words.decode(prompt.ids) == (
        "<s> Below is a record of lines. Remember the REGISTER_CONTENT of each line. "
        "The grass is green. The sky is blue. "
        "line ink: REGISTER_CONTENT is <22302> line dart: REGISTER_CONTENT is <73944> "
        "What is the REGISTER_CONTENT of line dart? line dart: REGISTER_CONTENT is")
    assert words.decode(prompt.ids[prompt.span[0]:prompt.span[1] + 1]) == "line dart: REGISTER_CONTENT is <73944>"
    assert prompt.answer == "73944" and prompt.task == "lines"


ENTRY = {"lines": r"line ([a-z-]+): REGISTER_CONTENT is <(\d{5})>", "kv": r"([a-z-]+): (\d{5}),"}
ENDING = {"lines": "? line {name}: REGISTER_CONTENT is", "kv": "What is the value of {name}? {name}:"}


@pytest.mark.parametrize("task", RECORDS)
@pytest.mark.parametrize("n", [250, 333, 4000])
@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_a_record_is_exact_full_and_asks_for_one_entry(tokenizer, task, n, depth):
    """n tokens, nearly all of them entries, none named twice; the one asked for lies at its depth."""
    prompt = record_prompt(tokenizer, task, n, depth, random.Random(n))
    text = tokenizer.decode(prompt.ids)
    found = re.findall(ENTRY[task], text)
    assert len(prompt.ids) == n and prompt.task == task
    assert len(dict(found)) == len(found) > n / 60 and text.count("There and back again.") <= 1

    name, value = found[round(depth * (len(found) - 1))]
    first, last = prompt.span
    assert re.findall(ENTRY[task], tokenizer.decode(prompt.ids[first:last + 1])) == [(name, value)]
    assert prompt.answer == value and text.endswith(ENDING[task].format(name=name))


@pytest.mark.parametrize("task", RECORDS)
def test_a_record_too_short_for_an_entry(words, task):
    with pytest.raises(ValueError, match=f"20 tokens are too few for a prompt of the task {task}"):
        record_prompt(words, task, 20, 0.5, random.Random(0))


def test_entries_fill_the_room(tokenizer):
    """As many as fit, in the order drawn: what is left over is shorter than one more.

    In 4,000 tokens words are too few for names, and pairs of words make entries of unequal length.
    """
    for room in (50, 300, 1000, 4000, 4001, 4002):
        found = entries(tokenizer, "lines", room, random.Random(room))
        left = room - sum(len(entry.ids) for entry in found)
        assert 0 <= left < 40
        for entry in found:
            assert tokenizer.decode(entry.ids) == f"line {entry.name}: REGISTER_CONTENT is <{entry.value}>"
    assert entries(tokenizer, "lines", -3, random.Random(0)) == []


def test_names_are_words_then_pairs_of_them_or_those_given(words):
    few = entries(words, "kv", 100, random.Random(0))
    many = entries(words, "kv", 1000, random.Random(0))
    given = entries(words, "kv", 100, random.Random(0), names=WORDS[:8])
    assert len(few) == 50 and {entry.name for entry in few} <= set(WORDS)
    assert len(many) == 500 and {entry.name for entry in many} <= set(PAIRS)
    assert sorted(entry.name for entry in given) == WORDS[:8]


# ---- small parts

def test_answers_as_they_stand_in_the_text():
    assert [answer_text(task, "71432") for task in TASKS] == ["71432", "<71432>", "71432,"]
    for record in RECORDS.values():
        assert record.entry.endswith(record.answer)


def test_cycled():
    assert cycled([1, 2, 3], 5) == [1, 2, 3, 1, 2] and cycled([1], 0) == [] and cycled([], 3) == []


def test_random_digits_are_five_and_follow_the_seed():
    drawn = [random_digits(random.Random(seed)) for seed in range(200)]
    assert all(len(digits) == 5 and digits[0] != "0" for digits in drawn) and len(set(drawn)) > 190
    assert random_digits(random.Random(7)) == random_digits(random.Random(7))
