"""Chat with a checkpoint: its own chat template, and turns on stdin and stdout that share one cache.

Does: render the template in a sandbox, in a process that is stopped after some seconds; compute only what a turn adds;
/reset, /stats, /exit. Does not: run a model (generate.py gives it `answer`), tools and documents of templates.

    python generate.py --chat --ckpt llama-7b-chat --method mesa --system "Answer in one sentence."
"""
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tokenizer import tokenizer_config, until_stop

SECONDS = 20           # that a template may take
MEMORY = 2 * 2 ** 30   # bytes that it may take, where the system can limit them
EXTRA = 10 ** 6        # characters that it may write beyond four times the messages
COMMANDS = "/reset forgets all turns, /stats counts tokens, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def say(text, end="\n"):
    """Print to stderr, as cli.say: what renders a template imports nothing of torch, and so starts in a moment."""
    print(text, end=end, file=sys.stderr, flush=True)


def line_end():
    """What ends a line on stderr where one on stdout follows: nothing on a terminal, which shows both."""
    return "" if sys.stderr.isatty() else "\n"


# ---------------------------------------------------------------------------------------------------------------------
# chat templates

@dataclass
class Template:
    """A checkpoint's Jinja template, and the texts of its special tokens: {"bos_token": "<s>", ...}."""
    file: Path
    source: str
    special: dict

    def render(self, messages):
        """The text of messages, [{"role": "user", "content": "Hi"}, ...], up to where the next answer begins.

        ValueError, in one line, for a template that is broken, refuses these messages (raise_exception), takes longer
        than SECONDS, or writes or holds more than it may. It is code from a checkpoint, which can loop for ever even
        in Jinja's sandbox, and there also without writing anything; so a process of its own renders it.
        """
        values = {**self.special, "messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
        request = json.dumps({"source": self.source, "values": values})
        try:
            done = subprocess.run([sys.executable, __file__, "--render"], input=request, capture_output=True,
                                  encoding="utf-8", timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{self.file}: the chat template did not end within {SECONDS} seconds") from None
        reply = json.loads(done.stdout) if done.returncode == 0 else {"error": "it was killed"}
        if "error" in reply:
            raise ValueError(f"{self.file}: the chat template failed: {reply['error']}")
        return reply["text"]


def read_template(folder):
    """The Template of a checkpoint folder, or None: in chat_template.jinja, else in tokenizer_config.json."""
    config = tokenizer_config(folder)
    special = {name: text_of(value) for name, value in config.items() if name.endswith("_token") and text_of(value)}
    file = Path(folder) / "chat_template.jinja"
    if file.is_file():
        from checkpoint import own_file  # here, as tokenizer.read_object
        return Template(file, own_file(folder, file.name).read_text(encoding="utf-8"), special)
    file = Path(folder) / "tokenizer_config.json"
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        try:
            source = {named["name"]: named["template"] for named in source}.get("default")
        except (TypeError, KeyError):
            raise ValueError(f"{file}: chat_template is no list of templates with names") from None
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{file}: chat_template is not a text")
    return Template(file, source, special)


def text_of(token):
    """The text of a special token in tokenizer_config.json: a text, an object with its content, or None."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def render_request():
    """What the process that renders does: a request on stdin, {"text": ...} or {"error": one line} on stdout."""
    text = sys.stdin.read()
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):  # no such limit on this system
        pass
    try:
        reply = {"text": rendered(most=EXTRA + 4 * len(text), **json.loads(text))}
    except Exception as error:  # whatever the template's code may raise
        reply = {"error": (f"{error}" or type(error).__name__).splitlines()[0]}
    sys.stdout.write(json.dumps(reply))


def rendered(source, values, most):
    """The text of a Jinja template, as transformers renders it, of at most so many characters."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, indent=None):  # Jinja's own is for HTML
        return json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.now().strftime
    environment.filters["tojson"] = tojson
    pieces = []
    for piece in environment.from_string(source).generate(values):
        pieces.append(piece)
        most -= len(piece)
        if most < 0:
            raise ValueError("it writes without end")
    return "".join(pieces)


# ---------------------------------------------------------------------------------------------------------------------
# turns

@dataclass
class Counts:
    """Tokens of prompts that were computed, tokens of prompts that were in the cache, and tokens of answers."""
    turns: int = 0
    computed: int = 0
    reused: int = 0
    answered: int = 0


@dataclass
class Conversation:
    """The turns so far, as messages, as the text that the template makes of them, as token ids, and in the cache.

    A turn's prompt is the whole conversation, and its n the whole length: n grows with every turn, so the method puts
    the new tokens where they belong in the longer prompt. Computed are only tokens that the cache does not hold. These
    are the new ones, as long as the template writes what it wrote before, then the answer, then something new: the
    answer's ids then stay those that the model chose. Where a template changes what it wrote (some drop the thoughts of
    older answers), the text is encoded anew, and the cache is cut to what both have in common.
    """
    tokenizer: object
    template: Template | None
    answer: Callable     # ids -> an iterator of token ids; reads and writes the cache, which holds the first of ids
    cache: object        # cache.KVCache
    stops: list = field(default_factory=list)     # texts that end an answer
    warn: Callable | None = None                  # (n) is called for every prompt of n tokens
    messages: list = field(default_factory=list)
    text: str = ""                                # that ids stand for, without what is there before the first turn
    ids: list = field(default_factory=list)
    cached: list = field(default_factory=list)    # the ids in the cache
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self):
        self.begin_with(self.messages, self.ids)

    def begin_with(self, messages, before, note=""):
        """Start anew: after messages, and ids that are in the cache; with a note, where the turns it is of ended."""
        saved = json.loads(note or "{}")
        if saved and messages:
            raise ValueError("the saved chat has begun already; --system comes too late")
        self.messages = saved.get("messages", messages)
        self.text = saved.get("text", "")
        self.ids = saved.get("ids", before)
        self.cached = before
        self.begin = (self.messages, self.text, self.ids)  # for reset; these lists are not changed in place

    def reset(self):
        """Back to before the first turn; a system message stays, and what was loaded with its cache."""
        self.messages, self.text, self.ids = self.begin
        self.cached = self.cached[:len(self.ids)]
        self.counts = Counts()

    def render(self, messages):
        """The text of messages, with guards (see Tokenizer), by the template; without one, the lines of all turns."""
        messages = [{**message, "content": self.tokenizer.guard(message["content"])} for message in messages]
        if self.template:
            return self.template.render(messages)
        text = ""
        for number, message in enumerate(messages):
            starts_line = number > 0 and message["role"] == "user"
            text += "\n" + message["content"] if starts_line else message["content"]
        return text

    def prompt(self, messages):
        """(text, token ids) of the prompt after which the answer to messages begins."""
        text = self.render(messages)
        known = self.text
        before = self.ids
        if not text.startswith(known):            # the template changed what it wrote
            known = ""
            before = [] if self.begin[1] else self.begin[2]  # a prompt that was loaded stays in front
        new = self.tokenizer.encode_rendered(text[len(known):], continued=bool(before))
        bos = self.tokenizer.bos_id
        if before and not known and new[:1] == [bos]:
            new = new[1:]                         # the template's own, after a loaded prompt that has one
        if not before and not self.template and bos is not None:
            new = [bos, *new]
        return text, before + new

    def turn(self, line, write):
        """Answer a line: write(text) piece by piece, until the model, a stop text or Ctrl-C ends it."""
        messages = [*self.messages, {"role": "user", "content": line}]
        text, ids = self.prompt(messages)
        reused = min(common_prefix(self.cached, ids), len(ids) - 1)  # the last one gives the logits to begin with
        self.cache.cut(reused)
        reused = min(reused, len(self.cache))  # none, where it has forgotten what these have seen
        self.cached = ids[:reused]
        if self.warn:
            self.warn(len(ids))
        tokens = []       # of the answer
        marks = [(0, 0)]  # after each piece of the answer: how many tokens and characters there are
        answer = ""
        interrupted = False
        try:
            for piece in until_stop(self.pieces(ids, tokens, marks), self.stops):
                answer += piece
                write(piece)
        except KeyboardInterrupt:
            interrupted = True
            say("\ninterrupted", end=line_end())
        self.cache.cut(len(self.cache))  # an interrupted step has reached some layers and not others
        self.cached = (ids + tokens)[:len(self.cache)]
        self.counts.turns += 1
        self.counts.computed += max(0, min(len(self.cache), len(ids)) - reused)
        self.counts.reused += reused
        self.counts.answered += len(tokens)
        if answer or not interrupted:
            # the tokens of what was written, without an eos or a stop text: the template writes what comes next
            count, characters = [mark for mark in marks if mark[1] <= len(answer)][-1]
            self.ids = ids + tokens[:count]
            self.text = text + self.tokenizer.guard(answer[:characters])
            self.messages = [*messages, {"role": "assistant", "content": answer}]

    def pieces(self, ids, tokens, marks):
        """Yield the answer to a prompt of ids as text, piece by piece; its tokens and marks go to the lists."""
        def arriving():
            for token in self.answer(ids):
                tokens.append(token)
                yield token
        for piece in self.tokenizer.stream(arriving(), ids):
            if piece:
                marks.append((len(tokens), marks[-1][1] + len(piece)))
            yield piece

    def stats(self):
        """One line of counts."""
        c = self.counts
        return (f"turns {c.turns}, tokens in the conversation {len(self.ids)}, in the cache {len(self.cached)}; "
                f"prompts: {c.computed} computed, {c.reused} taken from the cache; answers: {c.answered}")

    def note(self):
        """The turns as a text, for a saved cache."""
        return json.dumps({"messages": self.messages, "text": self.text, "ids": self.ids})


def common_prefix(a, b):
    """How many of the first items of two lists are equal: common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2."""
    for number, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return number
    return min(len(a), len(b))


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def open_template(folder, system):
    """The Template of a folder, tried out before anything long with the text of a system message or None; None, and
    a line on stderr, where there is no template."""
    template = read_template(folder)
    if template is None:
        say("this checkpoint has no chat template: each line continues the text so far")
    else:
        template.render([*system_message(system), {"role": "user", "content": "Hi"}])
    return template


def system_message(text):
    """The messages that a conversation begins with."""
    return [] if text is None else [{"role": "system", "content": text}]


def chat(conversation, system=None, first=None, before=(), note="", ask=input):
    """Turns of a new Conversation until stdin ends: the line first, if given, then lines from stdin; answers to stdout.

    system: the text of its system message. before: ids that its cache holds; note: see Conversation.note; with one,
    the conversation that it is of goes on. ask: input, or what reads a line in its place. Returns the ids in the cache
    in the end, and a new note.
    """
    conversation.begin_with(system_message(system), list(before), note)
    say(COMMANDS)
    for line in typed_lines(first, ask):
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
        elif line == "/stats":
            say(conversation.stats())
        elif line.strip():
            try:
                conversation.turn(line, write)
            except KeyboardInterrupt:  # before the answer began
                say("interrupted", end=line_end())
            write("\n")
    return conversation.cached, conversation.note()


def typed_lines(first=None, ask=input):
    """Yield first, where it is given, then lines of stdin; Ctrl-C while waiting for one does not end them."""
    if first is not None:
        yield first
    while True:
        try:
            line = ask("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            say(f"\n{COMMANDS}")
            continue
        except EOFError:
            return
        yield line


def write(text):
    print(text, end="", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] != ["--render"]:
        sys.exit("python generate.py --chat")
    render_request()
