"""What all scripts share: dataclass fields as command line options, and errors in one sentence.

Nothing here is about attention; it can be skipped. Argparse and dataclasses do the work.
"""
import argparse
import contextlib
import dataclasses
import os
import sys


def option(default, help):
    """A dataclass field that is also a command line option, with its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


def add_options(parser, config_class, defaults):
    """A command line option for each field made by `option`; only those given will be parsed.

    defaults: a dict of what the help shows as default, where it is not the field's.
    """
    for field in dataclasses.fields(config_class):
        if "help" not in field.metadata:
            continue
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        else:
            kind = dict(type=int_or_none if field.type == int | None else field.type)
        default = defaults.get(field.name, field.default)
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **kind,
                            help=f"{field.metadata['help']} (default: {default})")


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


class ErrorOutput:
    """Standard error, which may be closed, a broken pipe or a full disk: that stops no script."""

    def write(self, text):
        with contextlib.suppress(Exception):
            sys.__stderr__.write(text)
            sys.__stderr__.flush()

    def flush(self):
        pass


def run_script(main):
    """Call main. What goes wrong ends the program with one sentence and exit code 1."""
    name = os.path.basename(sys.argv[0])
    sys.stderr = ErrorOutput()
    sys.stdin = sys.stdin or open(os.devnull)  # those that were closed
    sys.stdout = sys.stdout or open(os.devnull, "w")
    try:
        try:
            sys.exit(main())
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough; Python flushes it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped")
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        # PyTorch's own errors are RuntimeErrors of many lines; the first one says what it is
        sys.exit(f"{name}: {str(error).partition(chr(10))[0]}")
