"""Text to token ids and back, by the tokenizer that lies in a checkpoint folder.

Does: tokenizer.model by sentencepiece, tokenizer.json by the optional tokenizers package; BOS, once; control tokens
where a template has them, never where a user wrote their names; a stream of text that loses no space and splits no
character. Does not: render chat templates (chat.py).

    tokenizer = load_tokenizer("llama-7b", bos_id=1)
    ids = tokenizer.encode("The sky is")
"""
import re
import warnings
from pathlib import Path

GUARD = "\ufdd0"  # a noncharacter of Unicode, in no text: in front of a control token's name it says "this is text"
LONE = "\ue000"   # a character for private use, which no tokenizer merges with what follows


def load_tokenizer(path, bos_id, vocab_size=None):
    """The Tokenizer of a folder; bos_id None: a model without BOS. FileNotFoundError or ValueError names the file, also
    where the tokenizer has more pieces than the model's vocab_size; much fewer give a warning."""
    from checkpoint import own_file  # see read_object
    path = Path(path)
    settings = tokenizer_config(path)
    has_no_bos = settings.get("add_bos_token") is False or settings.get("bos_token", "unsaid") is None
    bos_id = None if has_no_bos else bos_id  # Qwen's config.json names a BOS that no text begins with
    if (path / "tokenizer.model").is_file():
        tokenizer = sentencepiece_tokenizer(own_file(path, "tokenizer.model"), bos_id)
    elif (path / "tokenizer.json").is_file():
        tokenizer = json_tokenizer(own_file(path, "tokenizer.json"), bos_id)
    else:
        raise FileNotFoundError(f"{path}: no tokenizer.model and no tokenizer.json in this folder")
    if vocab_size is not None and tokenizer.size is not None:
        check_size(path, tokenizer.size, vocab_size)
    return tokenizer


def check_size(path, size, vocab_size):
    """ValueError for a tokenizer of more pieces than the model has embeddings, as its ids would be outside of them.
    Embeddings are often padded, so that a few more are right; a warning for more than an eighth, and 1024, too many."""
    if size > vocab_size:
        raise ValueError(f"{path}: the tokenizer has {size} pieces, but config.json's vocab_size is {vocab_size}; "
                         "is it this model's?")
    if size < vocab_size - max(1024, vocab_size // 8):
        warnings.warn(f"{path}: the tokenizer has {size} pieces, and the model {vocab_size}; is it this model's?",
                      stacklevel=3)


def sentencepiece_tokenizer(file, bos_id):
    import sentencepiece
    try:
        core = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        raise ValueError(f"{file}: not a sentencepiece model") from None
    size = core.get_piece_size()
    if size == 0:
        raise ValueError(f"{file}: a sentencepiece model without pieces")
    named = [token for token in range(size) if core.is_control(token) or core.is_unknown(token)]
    control = {core.id_to_piece(token): token for token in named}

    def decode(ids):
        return core.decode([token for token in ids if token < size])  # an added token has no text
    return Tokenizer(core.encode, decode, bos_id, {**control, **added_tokens(file.parent)}, size=size)


def json_tokenizer(file, bos_id):
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"{file}: needs the tokenizers package (pip install tokenizers)") from None
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more special
        raise ValueError(f"{file}: not a tokenizer ({error})") from None

    def encode_as(text, special_as_text):
        core.encode_special_tokens = special_as_text
        try:
            return core.encode(text, add_special_tokens=False).ids
        except Exception as error:
            raise ValueError(f"{file}: cannot encode this text ({error})") from None

    def encode(text):
        return encode_as(text, True)    # the name of a special token is text like any other

    def encode_control(text):
        return encode_as(text, False)
    if core.post_processor is not None and core.encode("a").ids[:1] != [bos_id]:
        bos_id = None
    control = {token.content: number for number, token in core.get_added_tokens_decoder().items() if token.special}
    return Tokenizer(encode, core.decode, bos_id, control, encode_control, core.get_vocab_size(with_added_tokens=False))


def tokenizer_config(folder):
    """The contents of tokenizer_config.json, {} where there is none; ValueError names a broken one."""
    return read_object(Path(folder) / "tokenizer_config.json")


def added_tokens(folder):
    """{name: id} of the tokens that a folder adds to its tokenizer.model."""
    added = dict(read_object(folder / "added_tokens.json"))
    config = tokenizer_config(folder)
    try:
        for number, token in config.get("added_tokens_decoder", {}).items():
            added[token["content"]] = int(number)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{folder}/tokenizer_config.json: added_tokens_decoder is not {{id: token}}") from None
    return added


def read_object(file):
    """The JSON object in a file; {} where there is none."""
    from checkpoint import read_json  # here, as it needs torch, without which a process that renders templates starts
    return read_json(file) if file.is_file() else {}


class Tokenizer:
    """Text to token ids and back. Does add BOS, once; does not render chat templates.

    Control tokens (<s>, <|im_end|>, ...) steer the model, so only a template may set them. encode never makes one, and
    encode_rendered makes one of every name in a rendered template, but not where the name has a GUARD in front: guard
    puts it into the text of messages, before the template is rendered. So the template may trim and split messages, its
    text and theirs are encoded together as in training, and a user who writes <|im_end|> gets these ten characters.
    """

    def __init__(self, encode, decode, bos_id, control=None, encode_control=None, size=None):
        self.encode_any = encode              # text -> ids, nothing added
        self.decode_ids = decode              # list of ids -> text
        self.bos_id = bos_id
        self.control = control or {}          # {name: id} of the control tokens
        self.encode_control = encode_control  # text -> ids, names of control tokens parsed; None: encode_rendered does
        self.size = size                      # how many pieces there are, without added tokens; None: not known
        names = sorted(self.control, key=len, reverse=True)
        self.control_names = re.compile(f"(?<!{GUARD})({'|'.join(map(re.escape, names)) or '(?!)'})")

    def encode_text(self, text):
        """Token ids of a text, nothing added. ValueError for half characters, which flags and JSON can hold."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"a text that is not UTF-8 (at character {error.start})") from None
        return self.encode_any(text)

    def encode(self, text, bos=True):
        """Token ids, with BOS in front unless bos is False or the model has none. A leading "<s>" is not doubled."""
        if bos and self.bos_id is not None:
            return [self.bos_id] + self.encode_text(text.removeprefix("<s>"))
        return self.encode_text(text)

    def encode_more(self, text):
        """Token ids of a text that goes on after others: without the space that sentencepiece puts before a text."""
        if self.encode_text("a") == self.encode_text(LONE + "a")[len(self.encode_text(LONE)):]:
            return self.encode_text(text)
        return self.encode_text(LONE + text)[len(self.encode_text(LONE)):]

    def guard(self, text):
        """The text of a message with GUARDs, so that no control token comes of it, nor of it and what stands around."""
        text = text.replace(GUARD, "")
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if begin >= end:
            return text
        places = {begin}                                        # the rest of a name, begun by the template
        for found in re.finditer(f"(?={self.control_names.pattern})", text):
            places.add(found.start())                           # a name
        for place in range(max(begin, end - max(map(len, self.control), default=0)), end):
            if any(name.startswith(text[place:end]) for name in self.control):
                places.add(place)                               # the beginning of a name, ended by the template
        cuts = [0, *sorted(places), len(text)]
        return GUARD.join(text[a:b] for a, b in zip(cuts, cuts[1:]))

    def encode_rendered(self, text, continued=False):
        """Token ids of a rendered template; continued: the text goes on after others. See the class."""
        parts = [part.replace(GUARD, "") for part in self.control_names.split(text)]  # text, name, text, ..., text
        whole = "".join(parts)
        if self.encode_control and not (continued and parts[0]) and parts == self.control_names.split(whole):
            return self.encode_control(whole)                   # no message has a name in it: as the package does it
        ids = []
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(self.control[part])
            elif part.startswith(" ") or (continued and number == 0):  # a space is not doubled after a control token
                ids += self.encode_more(part) if part else []
            elif part:
                ids += self.encode_text(part)
        return ids

    def decode(self, ids):
        """The text of token ids."""
        return self.decode_ids(list(ids))

    def stream(self, ids, context=()):
        """Yield the text of ids piece by piece as they come, spaces kept, no character split; context: the ids before.

        A token's text depends on its neighbours (sentencepiece drops a leading space, an emoji is four byte tokens), so
        what is new is the difference of two decodings of the last few tokens; an unfinished character waits.
        """
        window = list(context)[-8:]  # the last few tokens; those before give a new one its space
        shown = len(window)          # how many of them have been shown
        for token in ids:
            window.append(token)
            before = self.decode(window[:shown])
            now = self.decode(window)
            unfinished = now.endswith("\ufffd") or len(now) <= len(before)
            if not unfinished or len(window) - shown > 8:
                yield now[len(before):]
                window = window[shown:]
                shown = len(window)
        yield self.decode(window)[len(self.decode(window[:shown])):]


def until_stop(pieces, stops):
    """Yield pieces of text up to the first of the texts in stops, without it; what may be its beginning waits."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.find(stop) for stop in stops if stop in held]
        if found:
            yield held[:min(found)]
            return
        shown = len(held)
        for stop in stops:
            begun = [size for size in range(1, len(stop)) if held.endswith(stop[:size])]
            shown = min(shown, len(held) - max(begun, default=0))
        yield held[:shown]
        held = held[shown:]
    yield held
