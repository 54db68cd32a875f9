"""RULER's prompts (arXiv 2404.06654) of an exact number of tokens: needles, variables, words to count, questions.

Does: the 11 tasks that need no outside data, and questions over a file in SQuAD's format, in the wording and with the
counts of NVIDIA/RULER @ c3f5e3b (scripts/data/synthetic); smaller ones of the same shape for small windows. The text
itself, encoded at once, has the exact length, so that it can be written to a file and read again. Does not: run a
model, or score its answer.

    prompt = ruler_prompt(tokenizer, "niah_multikey_1", 2048, random.Random("test-0"))     # prompt.ids, prompt.text

Evaluation and training draw from different things: a name, a value, or a help topic belongs to the evaluation where
is_held_out says so of it, and to training otherwise. What differs from NVIDIA's: keys are never drawn twice; prose
begins at a random place; no space stands at the end of a prompt (it would be a token that no answer begins with).
"""
import itertools
import math
import pydoc_data.topics
import random
import re
import string
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields

from tasks import FILLER, PAIRS, WORDS, cycled


@dataclass
class RulerPrompt:
    """A prompt, and what its answer should hold."""
    ids: list[int]           # those of text, BOS in front
    text: str
    references: list[str]    # what the answer should hold; for qa one of them is enough
    answer: str              # the right answer as text that goes on after the prompt, with its full stop
    task: str                # one of TASKS


@dataclass(frozen=True)
class Size:
    """How large the parts of a prompt are; the defaults are RULER's."""
    name: str = "full"
    brief: bool = False               # the wording
    digits: int = 7                   # of a number
    uuid: int = 36                    # characters of a uuid
    needles: int = 4                  # keys, values or queries, where a task has several
    hops: int = 4                     # assignments after the first
    letters: int = 5                  # of a variable's name
    example_lines: int = 5            # lines of noise in the solved example of vt; 0: no example
    common: int = 10                  # common words, all asked for
    times: tuple = (30, 3)            # how often a common word stands in the list, and another one
    example_words: tuple = (40, 10, 3)  # words in the solved example of cwe, and their times; (): no example
    coded_letters: int = 6            # of a coded word
    paragraphs: bool = True           # documents of qa are whole paragraphs, not single sentences


SIZES = (
    Size(),
    Size("short", example_lines=1, times=(6, 1), example_words=(20, 3, 1)),  # the counts as RULER's below 4,096 tokens
    Size("small", brief=True, digits=5, uuid=13, hops=3, letters=3, example_lines=0, common=5, times=(4, 1),
         example_words=(), coded_letters=4, paragraphs=False),
    Size("smallest", brief=True, digits=5, uuid=8, needles=3, hops=2, letters=3, example_lines=0, common=3,
         times=(4, 1), example_words=(), coded_letters=3, paragraphs=False),
)


@dataclass(frozen=True)
class Needles:
    """The kind of a needle task."""
    hay: str = "prose"     # prose, noise, or needles
    keys: str = "words"    # or uuids
    values: str = "numbers"
    several: str = ""      # what there are several of: keys, values, or queries

    @property
    def noun(self):
        return self.values.removesuffix("s")


@dataclass
class Draft:
    """A prompt whose length is still open, and its answer."""
    body: Callable[[int], str]   # the text with so many units of hay
    least: int                   # units that it takes
    most: int                    # units that there are
    references: list[str]
    answer: str


@dataclass
class Question:
    """A question of a file in SQuAD's format."""
    query: str
    answers: list[str]
    paragraph: int         # the index of the one with the answer


@dataclass
class Paragraph:
    text: str
    article: int


@dataclass
class Material:
    """What prompts are made of, besides what is drawn at random."""
    test: bool                       # for the evaluation, not for training
    prose: list[str]                 # in pieces of at most PIECE words
    questions: list[Question]
    paragraphs: list[Paragraph]


FULL = {
    "one": "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
           "about the {kind} afterwards.\n{context}\n"
           "What is the special magic {kind} for {query} mentioned in the provided text? "
           "The special magic {kind} for {query} mentioned in the provided text is",
    "many": "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the {kind}s afterwards.\n{context}\n"
            "What are all the special magic {kind}s for {query} mentioned in the provided text? "
            "The special magic {kind}s for {query} mentioned in the provided text are",
    "needle": "One of the special magic {kind}s for {key} is: {value}.",
    "vt": "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
          "Question: Find all variables that are assigned the value {query} in the text above. "
          "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
          "the value {query}, they are:",
    "cwe": "Below is a numbered list of words. In these words, some appear more often than others. "
           "Memorize the ones that appear most often.\n{context}\n"
           "Question: What are the {count} most common words in the above list? "
           "Answer: The top {count} words that appear most often in the list are:",
    "fwe": "Read the following coded text and track the frequency of each coded word. "
           "Find the three most frequently appeared coded words. {context}\n"
           "Question: Do not provide any explanation. Please ignore the dots '....'. "
           "What are the three most frequently appeared words in the above coded text? "
           "Answer: According to the coded text above, the three most frequently appeared words are:",
    "qa": "Answer the question based on the given documents. Only give me the answer and do not output any other words."
          "\n\nThe following are given documents.\n\n{context}\n\n"
          "Answer the question based on the given documents. Only give me the answer and do not output any other words."
          "\n\nQuestion: {query} Answer:",
}
BRIEF = {
    "one": "Remember the magic {kind} in the text below.\n{context}\n"
           "What is the magic {kind} of {query}? The magic {kind} of {query} is",
    "many": "Remember the magic {kind}s in the text below.\n{context}\n"
            "What are the magic {kind}s of {query}? The magic {kind}s of {query} are",
    "needle": "The magic {kind} of {key} is {value}.",
    "vt": "Track the variables in the text below.\n{context}\n"
          "Which {count} variables have the value {query}? They are:",
    "cwe": "Remember the most common words of the list below.\n{context}\n"
           "What are the {count} most common words? They are:",
    "fwe": "Remember the most common words of the text below. {context}\n"
           "What are the three most common words but the dots? They are:",
    "qa": "Answer from the documents.\n{context}\nQuestion: {query} Answer:",
}
DOTS = "..."      # the most frequent coded word, which does not count
PIECE = 20        # words of a piece of prose: needles stand between pieces
ROOMS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}   # tokens that NVIDIA lets a model write
DESCRIPTIONS = {  # of a field of Size that is smaller than RULER's: its value, and RULER's
    "brief": "brief wording",
    "digits": "numbers of {} digits (RULER: {})",
    "uuid": "uuids cut to {} characters ({})",
    "needles": "{} of what there are several of ({})",
    "hops": "chains of {} hops ({})",
    "letters": "names of {} letters ({})",
    "example_lines": "{} lines of noise in the solved example ({}; 0: no example)",
    "common": "{} common words ({})",
    "times": "common and other words {} times ({})",
    "example_words": "words and times in the solved example {} ({})",
    "coded_letters": "words of {} letters ({})",
    "paragraphs": "documents of one sentence",
}

ADJECTIVES = """
able amber ample bald bare basic blank blond blunt bold brave brief bright brisk broad brown calm cheap clean clear
clever cold cool crisp curly damp dark dear deep dense dim dry dull dusty early easy eager empty equal faint fair fast
fierce fine firm flat fond frank free fresh full gentle glad good grand gray great green happy hard harsh heavy high
hollow honest huge humble keen kind large late lazy lean light little local long loose loud low lucky mild modest narrow
neat new nice noble odd old open pale plain polite poor proud pure quick quiet rare raw rich ripe rough round royal
""".split()
VERBS = """
accept add agree allow answer appear argue arrive ask bake become begin believe bend bind bite blow boil borrow bounce
bring build burn buy call carry catch change chase choose climb collect cough count cover create cry cure dance decide
deliver describe dig dive divide draw dream drink drive drop earn eat enjoy enter escape explain fail fall fasten feed
fetch fight fill find fix float flow fly fold follow forget forgive freeze gain gather give glow grab grow guess guide
hang hear heat help hide hope hunt hurry improve invite join judge jump keep kick kneel knit know laugh lay lead learn
leave lend lift listen live lose love melt mend miss mix move need obey offer owe own pack paint pass pay pick
""".split()
COUNTED = list(dict.fromkeys(WORDS + ADJECTIVES + VERBS))    # the words of cwe


# ---------------------------------------------------------------------------------------------------------------------
# what belongs to the evaluation, and what to training

def is_held_out(name):
    """Whether a name, a value or a help topic belongs to the evaluation: a quarter of all do, by their checksum."""
    return zlib.crc32(name.encode()) % 4 == 0


def topics(test):
    """Python's help topics, a list of texts, each on one line: those held out for the evaluation, or the others. A text
    of several names goes by the first of them."""
    names = {}
    for name, text in sorted(pydoc_data.topics.topics.items()):
        names.setdefault(" ".join(text.split()), name)
    return [text for text, name in names.items() if is_held_out(name) == test]


def new_material(test=True, prose=None, squad=None):
    """The Material of a prose text, by default Python's help topics, and of the contents of a file in SQuAD's format.

    test: for the evaluation; False: for training. ValueError for an empty text, and for what is not SQuAD's format.
    """
    pieces = topic_pieces(test) if prose is None else prose_pieces(prose)
    if not pieces:
        raise ValueError("an empty prose text")
    questions, paragraphs = ([], []) if squad is None else parse_squad(squad)
    return Material(test, pieces, questions, paragraphs)


def topic_pieces(test):
    """The pieces of the topics; for the evaluation without those that stand in a topic of training too."""
    pieces = [piece for text in topics(test) for piece in prose_pieces(text)]
    if not test:
        return pieces
    trained_on = " ".join(topics(test=False))
    return [piece for piece in pieces if piece not in trained_on]


def prose_pieces(text):
    """The sentences of a text, those of more than PIECE words in parts."""
    pieces = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        words = sentence.split()
        pieces += [" ".join(words[start:start + PIECE]) for start in range(0, len(words), PIECE)]
    return pieces


def parse_squad(data):
    """(Questions that have an answer, Paragraphs) of the contents of a file in SQuAD's format, versions 1.1 and 2.0."""
    questions = []
    paragraphs = []
    try:
        for article, entry in enumerate(data["data"]):
            for paragraph in entry["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = list(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                    if answers:
                        questions.append(Question(asked["question"], answers, len(paragraphs)))
                paragraphs.append(Paragraph(paragraph["context"], article))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not in SQuAD's format ({type(error).__name__}: {error})") from None
    if not questions:
        raise ValueError("no question with an answer")
    return questions, paragraphs


class Draws:
    """What is drawn for one prompt, nothing twice: for the evaluation (test), or for training."""

    def __init__(self, rng, test, size):
        self.rng = rng
        self.test = test
        self.size = size
        self.taken = set()

    def fresh(self, make):
        """What make() draws, as soon as it has not been drawn before and is held out or not, as test says."""
        while True:
            item = make()
            if is_held_out(item) == self.test and item not in self.taken:
                self.taken.add(item)
                return item

    def item(self, kind):
        """One of words (a key like "happy-moth"), numbers, or uuids."""
        return {"words": self.key, "numbers": self.number, "uuids": self.uuid}[kind]()

    def key(self):
        """A key like "happy-moth"; with two adjectives where many have been drawn."""
        adjectives = 1 if len(self.taken) < 4000 else 2
        return self.fresh(lambda: "-".join([*self.rng.sample(ADJECTIVES, adjectives), self.rng.choice(WORDS)]))

    def number(self, digits=None):
        """A number as text, its first digit not 0; with one digit more where many have been drawn."""
        digits = digits or self.size.digits
        least = 10 ** (digits - 1 + (len(self.taken) > 10 ** digits // 20))
        return self.fresh(lambda: str(self.rng.randrange(least, 10 * least)))

    def uuid(self):
        """A uuid of version 4, or its first characters."""
        return self.fresh(lambda: str(uuid.UUID(int=self.rng.getrandbits(128), version=4))[:self.size.uuid])

    def letters(self, alphabet, count):
        return self.fresh(lambda: "".join(self.rng.choices(alphabet, k=count)))


# ---------------------------------------------------------------------------------------------------------------------
# prompts of an exact length

def ruler_prompt(tokenizer, task, n, rng, material=None, size=SIZES[0]):
    """A RulerPrompt of exactly n tokens, BOS included, for a task of TASKS.

    rng: a random.Random, which draws all there is to draw. material: see new_material; by default the evaluation's.
    size: one of SIZES; see size_for. ValueError where n is too short, and for qa without questions.
    """
    draft = new_draft(tokenizer, task, n, rng, material or new_material(), size)

    def tokens(units):
        return len(tokenizer.encode(draft.body(units)))

    shortest = tokens(draft.least)
    if shortest > n:
        raise ValueError(f"a prompt of the task {task} takes at least {shortest} tokens, not {n}")
    units = most_units(tokens, draft.least, draft.most, n)
    for fewer in range(min(8, units - draft.least + 1)):
        text = padded(tokenizer, draft.body(units - fewer), n)
        if text is not None:
            return RulerPrompt(tokenizer.encode(text), text, draft.references, draft.answer, task)
    raise ValueError(f"this tokenizer makes no prompt of exactly {n} tokens for the task {task}")


def most_units(tokens, least, most, n):
    """The largest count of units, least to most, with tokens(units) <= n, for a function that rises with it.

    What the next guess would add is taken from the last ones, so that few prompts are encoded.
    """
    low, low_tokens = least, tokens(least)
    high = most + 1
    rate = 1.5  # tokens per unit, a first guess
    while high - low > 1:
        guess = low + int((n - low_tokens) / rate)
        guess = min(max(guess, low + 1), high - 1)
        count = tokens(guess)
        rate = max((count - low_tokens) / (guess - low), 0.1)
        if count <= n:
            low, low_tokens = guess, count
        else:
            high = guess
    return low


def padded(tokenizer, text, n):
    """The text with a line of FILLER before it that makes it n tokens long; None where no such line is found."""
    missing = n - len(tokenizer.encode(text))
    if missing == 0:
        return text

    def with_filler(words, more=""):
        return " ".join(cycled(FILLER.split(), words)) + more + "\n" + text

    def tokens(words):
        return len(tokenizer.encode(with_filler(words)))

    if tokens(0) > n:
        return None
    words = most_units(tokens, 0, missing, n)
    left = n - tokens(words)
    for single in (" a", " I", ".", "!"):  # of one token each, as a rule
        candidate = with_filler(words, single * left)
        if len(tokenizer.encode(candidate)) == n:
            return candidate
    return None


def new_draft(tokenizer, task, n, rng, material, size):
    """The Draft of a prompt that will have n tokens."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    build = {"vt": vt_draft, "cwe": cwe_draft, "fwe": fwe_draft, "qa": qa_draft}.get(task, niah_draft)
    return build(tokenizer, task, n, rng, material, size)


def family(task):
    """niah, vt, cwe, fwe, or qa."""
    return task.split("_")[0]


def wording(size):
    return BRIEF if size.brief else FULL


def listed(items):
    """["a", "b", "c"] -> "a, b, and c", as NVIDIA lists the keys asked for."""
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + ", and " + items[-1]


def first_words(texts, count):
    """The first so many words of texts, an iterator: whole texts, and the last one cut."""
    found = []
    for text in texts:
        words = text.split()[:count]
        if not words:
            break
        found.append(" ".join(words))
        count -= len(words)
    return found


def inserted(lines, extra, depths):
    """The lines with extra ones among them, each at its depth, 0 (before all) to 1 (after all)."""
    lines = list(lines)
    places = [int(depth * (len(lines) + 1)) for depth in depths]
    for place, line in reversed(sorted(zip(places, extra), key=first)):  # from the back: nothing before it has moved
        lines.insert(place, line)
    return lines


def first(pair):
    return pair[0]


# ---------------------------------------------------------------------------------------------------------------------
# how large, for a window of so many tokens

def size_for(tokenizer, task, window, material=None):
    """The first Size of SIZES whose prompt without hay, with its answer, takes two thirds of the window or less."""
    material = material or new_material()
    for size in SIZES:
        draft = new_draft(tokenizer, task, window, random.Random(0), material, size)
        needed = len(tokenizer.encode(draft.body(draft.least))) + answer_room(tokenizer, task, size, material)
        if needed <= 2 * window / 3:
            break
    return size


def answer_room(tokenizer, task, size, material=None):
    """Tokens that a model may write: as many as NVIDIA lets it; of a brief prompt at most half as many again as a right
    answer takes, and four more."""
    most = ROOMS[family(task)]
    if not size.brief:
        return most
    draft = new_draft(tokenizer, task, 64, random.Random(0), material or new_material(), size)
    return min(most, len(tokenizer.encode(draft.answer, bos=False)) * 3 // 2 + 4)


def scaled_down(task, size):
    """What is smaller than RULER's, as text: "brief wording, numbers of 5 digits (RULER: 7)"; "" where nothing is."""
    parts = []
    for field in fields(Size):
        value = getattr(size, field.name)
        if field.name in sizes_used(task) and value != field.default:
            parts.append(DESCRIPTIONS[field.name].format(value, field.default))
    return ", ".join(parts)


def sizes_used(task):
    """The fields of Size that a task looks at."""
    others = {"vt": ("hops", "letters", "example_lines"), "cwe": ("common", "times", "example_words"),
              "fwe": ("coded_letters",), "qa": ("paragraphs",)}
    if task in others:
        return ("brief", *others[task])
    kind = NIAH[task]
    used = {"brief": True, "digits": kind.values == "numbers", "uuid": kind.values == "uuids", "needles": kind.several}
    return [name for name, is_used in used.items() if is_used]


# ---------------------------------------------------------------------------------------------------------------------
# a builder for each family of tasks

def niah_draft(tokenizer, task, n, rng, material, size):
    """Needles, "the magic number for a key is a value", in noise, in prose, or among other needles: a Draft, whose unit
    is a word of noise or prose, or a needle."""
    kind = NIAH[task]
    draws = Draws(rng, material.test, size)

    def needle(key, value):
        return wording(size)["needle"].format(kind=kind.noun, key=key, value=value)

    count = {kind.several: size.needles}  # of keys, of values of each, of keys asked for
    keys = [draws.item(kind.keys) for _ in range(max(count.get("keys", 1), count.get("queries", 1)))]
    values = {key: [draws.item(kind.values) for _ in range(count.get("values", 1))] for key in keys}
    asked = rng.sample(keys, count.get("queries", 1))
    references = [value for key in asked for value in values[key]]
    needles = [needle(key, value) for key in keys for value in values[key]]
    depths = [rng.random() for _ in needles]
    start = rng.randrange(len(material.prose))

    most = n
    hay = [FILLER]
    if kind.hay == "prose":
        hay = material.prose[start:] + material.prose[:start]
    elif kind.hay == "needles":
        most = n // len(tokenizer.encode(needles[0], bos=False)) + 1
        hay = [needle(draws.item(kind.keys), draws.item(kind.values)) for _ in range(most)]

    def body(units):
        lines = hay[:units] if kind.hay == "needles" else first_words(itertools.cycle(hay), units)
        separator = " " if kind.hay == "prose" else "\n"
        context = separator.join(inserted(lines, needles, depths))
        template = wording(size)["one" if len(references) == 1 else "many"]
        return template.format(kind=kind.noun, context=context, query=listed(asked))

    return Draft(body, 0, most, references, listed(references) + ".")


def vt_draft(tokenizer, task, n, rng, material, size):
    """Variable tracking: a chain of assignments in noise, all of its names asked for; a Draft, whose unit is a word of
    noise. Where size has one, a solved example with names of three letters stands in front."""
    draws = Draws(rng, material.test, size)

    def prompt(units, names, lines, depths, value):
        noise = first_words(itertools.cycle([FILLER]), units)
        context = "\n".join(inserted(noise, lines, depths))
        return wording(size)["vt"].format(context=context, query=value, count=len(names))

    def new_chain(length):
        names = [draws.letters(string.ascii_uppercase, length) for _ in range(size.hops + 1)]
        value = draws.number(5)
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {later} = VAR {earlier}" for earlier, later in zip(names, names[1:])]
        depths = sorted(rng.random() for _ in lines)
        return names, lines, depths, value

    example = ""
    if size.example_lines:
        solved = new_chain(3)
        example = prompt(size.example_lines * len(FILLER.split()), *solved) + f" {' '.join(solved[0])}\n\n"
    chain = new_chain(size.letters)

    def body(units):
        return example + prompt(units, *chain)

    names = chain[0]
    return Draft(body, 0, n, names, " ".join(names) + ".")


def cwe_draft(tokenizer, task, n, rng, material, size):
    """Common words: a numbered list in which some words stand more often than the others; a Draft, whose unit is
    another word. Words are those of COUNTED, or, where these are too few, PAIRS like "moth-lamp"."""
    order = rng.random()

    def prompt(words, others, times):
        common = words[:size.common]
        entries = common * times[0] + words[size.common:size.common + others] * times[1]
        random.Random(order).shuffle(entries)
        return wording(size)["cwe"].format(context=numbered(entries), count=len(common))

    example = ""
    if size.example_words:
        total, *times = size.example_words
        solved = rng.sample(COUNTED, total)
        example = prompt(solved, total, times) + f" {numbered(solved[:size.common])}\n"

    words = rng.sample(COUNTED, len(COUNTED))
    if len(tokenizer.encode(example + prompt(words, len(words), size.times))) < n:
        words = rng.sample(PAIRS, min(len(PAIRS), n))

    def body(units):
        return example + prompt(words, units, size.times)

    common = words[:size.common]
    return Draft(body, size.common, len(words) - size.common, common, numbered(common) + ".")


def numbered(words):
    """["ant", "bee"] -> "1. ant 2. bee"."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def fwe_draft(tokenizer, task, n, rng, material, size):
    """Frequent words: coded words, each as often as Zipf's law says, of which ranks 2 to 4 are asked for, rank 1 being
    dots; a Draft, whose unit is a word of the text."""
    draws = Draws(rng, material.test, size)
    ranks = 5 + int((0.61 * n) ** 0.5)  # no later one stands in a text of n words
    words = [DOTS] + [draws.letters(string.ascii_lowercase, size.coded_letters) for _ in range(ranks)]
    order = rng.random()

    def body(units):
        counts = zipf_counts(units, len(words))
        coded = [word for word, count in zip(words, counts) for _ in range(count)]
        random.Random(order).shuffle(coded)
        return wording(size)["fwe"].format(context=" ".join(coded))

    references = words[1:4]
    return Draft(body, 27, n, references, ", ".join(references) + ".")


def zipf_counts(total, ranks):
    """How often the word of each rank k = 1, 2, ... stands in a text of so many words: floor(total k^-2 / zeta(2)), but
    those after the fourth less often than it. Example: 60 words -> 36, 9, 4, 2, 1, 1, 0, ..."""
    zeta = math.pi ** 2 / 6
    counts = [int(total / k ** 2 / zeta) for k in range(1, ranks + 1)]
    return counts[:4] + [min(count, counts[3] - 1) for count in counts[4:]]


def qa_draft(tokenizer, task, n, rng, material, size):
    """A question over documents, one of which has the answer; a Draft, whose unit is a word of the others. These come
    from the same article first."""
    if not material.questions:
        raise ValueError("the task qa needs a file in SQuAD's format (--qa FILE)")
    question = rng.choice(material.questions)
    gold = material.paragraphs[question.paragraph]
    others = [other for other in material.paragraphs if other is not gold]
    rng.shuffle(others)
    same = [document(other.text, "", size) for other in others if other.article == gold.article]
    rest = [document(other.text, "", size) for other in others if other.article != gold.article]
    depth = rng.random()

    def body(units):
        documents = first_words(same + rest, units)
        documents = inserted(documents, [document(gold.text, question.answers[0], size)], [depth])
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, 1))
        return wording(size)["qa"].format(context=context, query=question.query)

    return Draft(body, 0, n, question.answers, question.answers[0] + ".")


def document(text, answer, size):
    """A paragraph, or, where size says so, the first of its sentences that holds the answer."""
    if size.paragraphs:
        return text
    sentences = re.split(r"(?<=[.!?])\s+", text)
    return next((sentence for sentence in sentences if answer in sentence), text)


NIAH = {
    "niah_single_1": Needles(hay="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(values="uuids"),
    "niah_multikey_1": Needles(several="keys"),
    "niah_multikey_2": Needles(hay="needles"),
    "niah_multikey_3": Needles(hay="needles", keys="uuids", values="uuids"),
    "niah_multivalue": Needles(several="values"),
    "niah_multiquery": Needles(several="queries"),
}
TASKS = (*NIAH, "vt", "cwe", "fwe", "qa")
