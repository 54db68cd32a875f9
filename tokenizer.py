"""Text to token ids and back, by the tokenizer that lies in a checkpoint folder.

Does: tokenizer.model by sentencepiece, tokenizer.json by the optional tokenizers package; BOS, once; a stream of text
that loses no space and splits no character. Does not: chat templates.

    tokenizer = load_tokenizer("llama-7b", bos_id=1)
    ids = tokenizer.encode("The sky is")
"""
from pathlib import Path


def load_tokenizer(path, bos_id):
    """The Tokenizer of a folder; bos_id None: a model without BOS. FileNotFoundError or ValueError names the file."""
    path = Path(path)
    if (path / "tokenizer.model").is_file():
        return sentencepiece_tokenizer(path / "tokenizer.model", bos_id)
    if (path / "tokenizer.json").is_file():
        return json_tokenizer(path / "tokenizer.json", bos_id)
    raise FileNotFoundError(f"{path}: no tokenizer.model and no tokenizer.json in this folder")


def sentencepiece_tokenizer(file, bos_id):
    import sentencepiece
    try:
        core = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        raise ValueError(f"{file}: not a sentencepiece model") from None
    return Tokenizer(core.encode, core.decode, bos_id)


def json_tokenizer(file, bos_id):
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"{file}: needs the tokenizers package (pip install tokenizers)") from None
    core = tokenizers.Tokenizer.from_file(str(file))

    def encode(text):
        return core.encode(text, add_special_tokens=False).ids
    return Tokenizer(encode, core.decode, bos_id)


class Tokenizer:
    """Text to token ids and back. Does add BOS, once; does not know chat templates."""

    def __init__(self, encode, decode, bos_id):
        self.encode_text = encode  # text -> ids, nothing added
        self.decode_ids = decode   # list of ids -> text
        self.bos_id = bos_id

    def encode(self, text, bos=True):
        """Token ids, with BOS in front unless bos is False or the model has none. A leading "<s>" is not doubled."""
        if bos and self.bos_id is not None:
            return [self.bos_id] + self.encode_text(text.removeprefix("<s>"))
        return self.encode_text(text)

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
