"""What all scripts share: dataclass fields as command line options, and errors in one sentence.

Nothing here is about attention; it can be skipped. Argparse and dataclasses do the work.
"""
import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
import traceback


def option(default, help=None, minimum=None):
    """A dataclass field with this default. With a help text it is also a command line option.

    minimum: the least value that `check_minima` accepts.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, minimum=minimum))


def check_minima(config):
    """ValueError that names a field below its minimum. Where None is the default, it passes."""
    for field in dataclasses.fields(config):
        minimum = field.metadata.get("minimum")
        value = getattr(config, field.name)
        require(minimum is None or value is field.default is None or value >= minimum,
                f"{field.name} is {value}, and must be at least {minimum}")


def parse_options(description, config_classes, defaults={}, shown={}, arguments=()):
    """What the command line gives: {name: value} of the options that stand there.

    The options are the fields of config_classes that have a help text. arguments: names of what
    must be given besides. defaults: {name: value} where it is not the field's own default. shown:
    {name: text} where the help shows something else as the default.

    What argparse or a config class refuses ends the program: with the usage, one sentence and exit
    code 2.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in arguments:
        parser.add_argument(name)
    for config_class in config_classes:
        for field in dataclasses.fields(config_class):
            if not field.metadata.get("help"):
                continue
            kind = dict(type=int_or_none if field.type == int | None else field.type)
            if field.type is bool:
                kind = dict(action=argparse.BooleanOptionalAction)
            default = (defaults | shown).get(field.name, field.default)
            parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **kind,
                                help=f"{field.metadata['help']} (default: {default})")
    options = vars(parser.parse_args())
    try:
        for config_class in config_classes:
            config_class(**fields_of(config_class, defaults | options))
    except ValueError as error:
        parser.error(str(error))
    return options


def int_or_none(text):
    return None if text == "None" else int(text)


def fields_of(config_class, settings):
    """Those of the settings (a dict) that are fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in settings.items() if name in names}


def require(ok, sentence):
    """ValueError with this sentence unless ok."""
    if not ok:
        raise ValueError(sentence)


@contextlib.contextmanager
def explain(sentence, *errors):
    """Turn errors of these classes into a ValueError that begins with this sentence."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{sentence}: {error}") from None


def read_json(path):
    """A JSON object. ValueError if it is none."""
    with explain(f"{path} cannot be read as a JSON object", OSError, ValueError, TypeError):
        return dict(json.loads(path.read_bytes()))


class ErrorOutput:
    """Standard error, which may be closed, a broken pipe or a full disk: that stops no script."""

    def write(self, text):
        with contextlib.suppress(Exception):
            sys.__stderr__.write(text)
            sys.__stderr__.flush()

    def flush(self):
        pass


def run_script(main):
    """Call main. What goes wrong ends the program with one sentence and exit code 1.

    With `python -X dev` it ends with Python's traceback instead.
    """
    sys.stderr = ErrorOutput()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # if it was closed
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        try:
            sys.exit(main())
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough
        os._exit(0)  # at once, since Python would write once more to say goodbye
    except KeyboardInterrupt:
        sys.exit("stopped")
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        sentence = " ".join(str(error).splitlines()[:2])  # some of PyTorch's have many lines
        if not isinstance(error, (ValueError, OSError)):
            # unforeseen, so perhaps a mistake in our code: say the last line of ours that it passed
            ours = [f"{frame.filename}:{frame.lineno}"
                    for frame in traceback.extract_tb(error.__traceback__)
                    if "lib/python" not in frame.filename]
            sentence += f" ({ours[-1]}; for the way there: python -X dev {shlex.join(sys.argv)})"
        sys.exit(f"error: {sentence}")
