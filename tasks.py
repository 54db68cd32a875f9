"""Prompts of an exact length that ask for five digits hidden in them: a passkey, a line of a record, a key's value.

Does: the passkey in filler (arXiv 2305.16300), also with other keys beside it; a record of lines (LongEval) or of
key-value pairs (arXiv 2307.03172), one of which is asked for. Does not: run a model, or judge its answer.

    prompt = passkey_prompt(tokenizer, 2048, depth=0.3)       # prompt.ids, prompt.answer, prompt.span

Every part is encoded on its own, and filler is cut by tokens, not by words.
"""
import itertools
from dataclasses import dataclass


@dataclass
class Prompt:
    """A prompt, and what it asks for."""
    ids: list[int]
    answer: str             # the five digits
    span: tuple[int, int]   # the first and the last token of the needle, or of the entry, that holds the answer
    task: str               # one of TASKS
    others: tuple = ()      # the same of every other entry of a record


@dataclass
class Entry:
    """One entry of a record."""
    name: str
    value: str
    ids: list[int]


@dataclass
class Record:
    """The texts that a record is made of."""
    head: str        # what comes first
    entry: str
    question: str
    answer: str      # as it stands at the end of an entry


TASK = "There is a pass key hidden in the text below. Find it and remember it."
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")  # owners of several keys
OWNED_NEEDLE = "The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}."
OWNED_QUESTION = "What is the pass key of {name}? The pass key of {name} is"

RECORDS = {
    "lines": Record(
        head="Below is a record of lines. Remember the REGISTER_CONTENT of each line.",
        entry="line {name}: REGISTER_CONTENT is <{value}>",
        question="What is the REGISTER_CONTENT of line {name}? line {name}: REGISTER_CONTENT is",
        answer="<{value}>"),
    "kv": Record(
        head="Below is a list of keys and values. Remember the value of each key.",
        entry="{name}: {value},",
        question="What is the value of {name}? {name}:",
        answer="{value},"),
}
TASKS = ("passkey", *RECORDS)

WORDS = """
ant ape arch arm ash axe bag ball band bank barn bath bean bear bed bee bell belt bird boat bone boot bowl boy bread
bull bus bush cake camp cap car card cart cat cave chain chin clay clock club coal coat coin comb cook cord cork corn
cow crab crow cup dart desk dish dog doll door dove drum duck dust ear egg elf elm face fan farm fern fig fire fish
flag foot fork fox frog fruit game gate gem gift goat gold hand harp hat hawk hen herb hill hive hook horn ice ink
iron jar jet jug king kite knee knot lace lake lamb lamp leaf lens lime lion lock log map mask meal milk mill mint
mole moon moss moth mouse mule nail neck nest net nose nut oak oar owl paint palm pan park pea pen pig pipe pot rat
rock room root rug salt
""".split()  # names of entries
PAIRS = ["-".join(pair) for pair in itertools.permutations(WORDS, 2)]  # where words are too few


def cycled(ids, count):
    """The first count of ids, over and over: cycled([1, 2, 3], 5) is [1, 2, 3, 1, 2]."""
    return list(itertools.islice(itertools.cycle(ids), count))


def random_digits(rng):
    """Five digits, the first of them not 0."""
    return str(rng.randrange(10000, 100000))


def answer_text(task, answer):
    """The answer as it stands in the text: 71432, <71432> in a line, "71432," in a key-value pair."""
    if task == "passkey":
        return answer
    return RECORDS[task].answer.format(value=answer)


# ---------------------------------------------------------------------------------------------------------------------
# passkeys

def passkey_prompt(tokenizer, n, depth=0.5, keys=("71432",), filler=None):
    """A Prompt of exactly n tokens with a needle for every key; the last key is asked for, at depth 0 (start) to 1.

    The needles of the other keys are spread evenly over the filler: of 4 keys, they stand at depth 1/4, 2/4 and 3/4.
    filler: token ids, which begin anew after every needle; by default those of FILLER. ValueError where n is too short.
    """
    if filler is None:
        filler = tokenizer.encode(FILLER, bos=False)
    needle_texts, question_text = passkey_texts(keys)
    head = tokenizer.encode(TASK)
    needles = [tokenizer.encode(text, bos=False) for text in needle_texts]
    question = tokenizer.encode(question_text, bos=False)
    room = n - len(head) - sum(len(needle) for needle in needles) - len(question)  # tokens of filler
    if room < 0:
        raise ValueError(f"a passkey prompt takes at least {n - room} tokens, not {n}")

    depths = [k / len(needles) for k in range(1, len(needles))] + [depth]
    asked_for = [False] * (len(needles) - 1) + [True]
    places = [round(depth * room) for depth in depths]  # tokens of filler before each needle
    ids = list(head)
    filled = 0
    for place, is_asked_for, needle in sorted(zip(places, asked_for, needles)):
        ids += cycled(filler, place - filled)
        if is_asked_for:
            span = (len(ids), len(ids) + len(needle) - 1)
        ids += needle
        filled = place
    ids += cycled(filler, room - filled) + question
    return Prompt(ids, keys[-1], span, "passkey")


def passkey_texts(keys):
    """(the needle of every key, the question for the last one); several keys are told apart by the name of an owner."""
    if not 1 <= len(keys) <= len(NAMES):
        raise ValueError(f"a passkey prompt holds 1 to {len(NAMES)} keys, not {len(keys)}")
    if len(keys) == 1:
        return [NEEDLE.format(key=keys[0])], QUESTION
    needles = [OWNED_NEEDLE.format(name=name, key=key) for name, key in zip(NAMES, keys)]
    return needles, OWNED_QUESTION.format(name=NAMES[len(keys) - 1])


# ---------------------------------------------------------------------------------------------------------------------
# records

def record_prompt(tokenizer, task, n, depth, rng):
    """A Prompt of exactly n tokens: a record full of entries, and a question for the one at depth 0 to 1.

    task: "lines" or "kv". rng: a random.Random, which draws names and values. ValueError where n is too short for one
    entry.
    """
    record = RECORDS[task]
    head = tokenizer.encode(record.head)
    some_question = tokenizer.encode(record.question.format(name=PAIRS[0]), bos=False)
    spare = 8  # the name asked for may take more tokens than that of PAIRS[0]
    found = entries(tokenizer, task, n - len(head) - len(some_question) - spare, rng)
    if not found:
        raise ValueError(f"{n} tokens are too few for a prompt of the task {task}")
    number = round(depth * (len(found) - 1))
    asked = found[number]
    question = tokenizer.encode(record.question.format(name=asked.name), bos=False)

    body = joined(found)
    padding = cycled(tokenizer.encode(FILLER, bos=False), n - len(head) - len(body) - len(question))
    others = entry_spans(found, len(head) + len(padding))
    span = others.pop(number)
    return Prompt(head + padding + body + question, asked.value, span, task, tuple(others))


def entries(tokenizer, task, room, rng, names=None):
    """A list of as many Entries, with values of five random digits, as fit into room tokens.

    names: what to draw names from, none twice; by default WORDS, or, where these are too few, PAIRS like "moth-lamp".
    """
    def new_entry(name):
        value = random_digits(rng)
        text = RECORDS[task].entry.format(name=name, value=value)
        return Entry(name, value, tokenizer.encode(text, bos=False))

    shortest = min(len(new_entry(word).ids) for word in WORDS[:8])
    most = max(room, 0) // shortest
    if names is None:
        names = WORDS if most <= len(WORDS) else PAIRS
    found = []
    for name in rng.sample(names, min(most, len(names))):
        entry = new_entry(name)
        room -= len(entry.ids)
        if room < 0:
            break
        found.append(entry)
    return found


def entry_spans(entries, first):
    """(first, last) token of every entry, the first of which begins at token `first`."""
    found = []
    for entry in entries:
        found.append((first, first + len(entry.ids) - 1))
        first += len(entry.ids)
    return found


def joined(entries):
    """The token ids of entries, one after the other."""
    return [token for entry in entries for token in entry.ids]
