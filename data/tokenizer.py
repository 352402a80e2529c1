"""Text into token ids and back: bytes, or the tokens of a pretrained model's tokenizer.json.

Both tokenizers have the same methods. Text is a str in which bytes that are no UTF-8 are escaped,
as Python does it (errors="surrogateescape"): so every file is a text, and keeps its bytes.
"""
import io
import json
from pathlib import Path

try:
    import tokenizers
except ImportError:  # only pretrained models need it
    tokenizers = None

PACKAGES = "safetensors or tokenizers is missing: pip install -r requirements-pretrained.txt"
SEPARATORS = ".,?!;:\n\r"  # the characters that make a token a separator
PIECE_SIZE = 1 << 18  # characters of a text that are read at once


def read_pieces(file):
    """A binary file as text, in pieces of about PIECE_SIZE characters that end where lines do."""
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    while piece := text.read(PIECE_SIZE) + text.readline(PIECE_SIZE):
        yield piece


def load_tokenizer(folder):
    """The tokenizer of a folder: of its tokenizer.json or, without one, bytes."""
    if Path(folder, "tokenizer.json").is_file():
        return Tokenizer(folder)
    return ByteTokenizer()


class ByteTokenizer:
    """Tokens are bytes: every text is valid, and nothing has to be learned before training."""
    vocabulary = None  # of others {token: id}; two tokenizers agree if theirs are equal
    vocab_size = 256  # all ids are below it
    eos_ids = ()  # tokens that end a text

    def encode(self, text, is_first=True):
        """The ids of a text, a list. is_first: of its first piece, which may get a begin token."""
        return list(text.encode(errors="surrogateescape"))

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def n_bytes(self, ids):
        """The length of their text in bytes."""
        return len(ids)

    def separators(self, characters=SEPARATORS):
        """The ids of the tokens that separate segments."""
        return tuple(characters.encode())

    def decoder(self):
        """A new Decoder, for one text as it comes."""
        return Decoder(self.decode)


class Tokenizer:
    """The tokens of a folder's tokenizer.json. ValueError if it cannot be read.

    Which tokens end a text, config.json, generation_config.json and tokenizer_config.json say.
    """

    def __init__(self, folder):
        if tokenizers is None:
            raise ValueError(PACKAGES)
        path = Path(folder, "tokenizer.json")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"{path} cannot be read: {error}") from None
        self.tokenizer.no_truncation()  # settings of somebody's training
        self.tokenizer.no_padding()
        self.vocabulary = self.tokenizer.get_vocab()
        self.vocab_size = max(self.vocabulary.values()) + 1  # there may be holes
        self.eos_ids = set()
        for path in Path(folder).glob("*config.json"):
            config = read_json(path)
            ids = config.get("eos_token_id")  # a number, a list, or none
            self.eos_ids.update(ids if isinstance(ids, list) else [ids])
            token = config.get("eos_token")
            if isinstance(token, dict):  # as older programs write it
                token = token["content"]
            self.eos_ids.add(self.vocabulary.get(token))

    def encode(self, text, is_first=True):
        text = text.encode(errors="surrogateescape").decode(errors="replace")
        return self.tokenizer.encode(text, add_special_tokens=is_first).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def n_bytes(self, ids):
        return len(self.decode(ids).encode())

    def separators(self, characters=SEPARATORS):
        """The ids of the tokens whose text, spaces aside, consists of these characters only.

        The paper lists a few by hand for Llama 3, single and double spaces among them. This rule
        leaves the spaces out, and adds such as "..." and, often the end of a paragraph, ".\n\n".
        """
        found = []
        for token_id in range(self.vocab_size):
            text = self.decode([token_id])
            if text.strip(" ") and not text.strip(" " + characters):
                found.append(token_id)
        return tuple(found)

    def decoder(self):
        added = self.tokenizer.get_added_tokens_decoder()
        return Decoder(self.decode, {i: token.content for i, token in added.items()
                                     if not token.special})


class Decoder:
    """Text from ids as they come, in whole characters.

    A token is decoded together with those before it, since some decoders drop the first space of
    what they get. Special tokens have no text.

    (The package's DecodeStream does nearly the same, but raises an exception where a byte that is
    no character changes the text before it.)
    """

    def __init__(self, decode, added=()):
        self.decode = decode
        self.added = added  # {id: text} of words that were added to the tokenizer later
        self.before = []  # ids whose text has been returned, as many as the next ones need
        self.waiting = []  # ids whose text is not complete

    def step(self, ids):
        """The text of the next ids; a character whose bytes are not all there yet waits."""
        text = ""
        for token_id in ids:
            if token_id in self.added:
                # the tokenizer would read letters as GPT-2's spelling of bytes
                text += self.flush() + self.added[token_id]
                continue
            self.waiting.append(token_id)
            is_complete = self.decode(self.waiting)[-1:] not in ("", "\ufffd")
            # 64: ids without text, or bytes that never become a character
            if is_complete or len(self.waiting) == 64:
                text += self.flush()
        return text

    def flush(self):
        """The text of what still waits, with U+FFFD for incomplete characters."""
        n_before = len(self.decode(self.before))
        text = self.decode(self.before + self.waiting)[n_before:]
        if text:
            self.before = self.waiting
        self.waiting = []
        return text


def read_json(path):
    """A JSON object. ValueError if it is none."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a JSON object: {error}") from None
