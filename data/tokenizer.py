"""Text into token ids and back: bytes, or the tokens of a pretrained model's tokenizer.json.

Both tokenizers have the same methods. Text is a str in which bytes that are no UTF-8 are escaped,
as Python does it (errors="surrogateescape"): so every file is a text, and keeps its bytes.
"""
import io

from options import explain, require

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


class ByteTokenizer:
    """Tokens are bytes: every text is valid, and nothing has to be learned before training."""
    json = None  # the text of a tokenizer.json
    vocab_size = 256  # all ids are below it
    special_ids = ()  # tokens without text, such as the end of a text; any of them ends a sample
    words = {}  # {id: text} of tokens whose text `decode` would get wrong

    def encode(self, text, is_first=True):
        """The ids of a text, a list. is_first: of its first piece, which may get a begin token."""
        return list(text.encode(errors="surrogateescape"))

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def separators(self, characters=SEPARATORS):
        """The ids of the tokens that separate segments."""
        return tuple(characters.encode("ascii"))


class Tokenizer:
    """The tokens of a tokenizer.json, from its text. ValueError if it cannot be read."""

    def __init__(self, json):
        require(tokenizers, PACKAGES)
        with explain("the tokenizer.json cannot be read", Exception):  # the package raises no other
            self.tokenizer = tokenizers.Tokenizer.from_str(json)
        self.tokenizer.no_truncation()  # settings of somebody's training
        self.tokenizer.no_padding()
        self.json = json
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1  # there may be holes
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = {i for i, token in added.items() if token.special}
        self.words = {}
        decoder = self.tokenizer.decoder
        # GPT-2 spells each byte as a letter, a space as Ġ. Words that were added later are not
        # spelled so, but such a decoder reads their letters as bytes, too.
        if decoder and decoder.decode(["Ġ"]) == " ":
            self.words = {i: token.content for i, token in added.items() if not token.special}

    def encode(self, text, is_first=True):
        text = text.encode(errors="surrogateescape").decode(errors="replace")
        return self.tokenizer.encode(text, add_special_tokens=is_first).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def separators(self, characters=SEPARATORS):
        """The ids of the tokens whose text, spaces aside, consists of these characters only.

        The paper lists a few by hand for Llama 3, single and double spaces among them. This rule
        leaves the spaces out, and adds "..." and ".\\n\\n", often the end of a paragraph.
        """
        texts = [self.decode([token_id]).strip(" ") for token_id in range(self.vocab_size)]
        return tuple(i for i, text in enumerate(texts)
                     if text and not text.strip(" " + characters))


class Decoder:
    """Text from the ids of one text as they come, in whole characters.

    A token's text may depend on the tokens before it: some decoders drop a space at the beginning.
    So each token is decoded together with the ones before it.

    The package's DecodeStream does nearly the same. But it raises an exception when a byte that is
    part of no character changes the text before it.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.before = []  # ids whose text has been returned, as many as the next ones need
        self.waiting = []  # ids whose text is not complete

    def step(self, token_id):
        """The text of the next id; a character whose bytes are not all there yet waits."""
        words = self.tokenizer.words
        if token_id in words:
            return self.flush() + words[token_id]
        self.waiting.append(token_id)
        is_complete = self.tokenizer.decode(self.waiting)[-1:] not in ("", "\ufffd")
        # 64: ids without text, or bytes that never become a character
        return self.flush() if is_complete or len(self.waiting) == 64 else ""

    def flush(self):
        """The text of what still waits, with U+FFFD for incomplete characters."""
        decode = self.tokenizer.decode
        text = decode(self.before + self.waiting)[len(decode(self.before)):]
        if text:
            self.before = self.waiting
        self.waiting = []
        return text
