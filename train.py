"""Training: from scratch, from another checkpoint (post-training), resumed, on one or several devices.

    python train.py                                       prepares the data if need be and trains a preset for this machine
    python train.py --init_from out-full/ckpt.pt --attn sep    goes on training an ordinary model with separator attention
    python train.py --resume                              continues out/ckpt.pt exactly, to the last digit on a CPU
    torchrun --standalone --nproc_per_node=2 train.py     data-parallel, the same losses as one process

The one idea: nothing is random but the initial weights. The batch of a step is a function of (seed, step), so a resumed run,
and each process of a parallel one, knows its data without any saved state. Read after `sep_kernel.py`.
"""
import argparse
import dataclasses
import difflib
import json
import math
import os
import signal
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import GPT, GPTConfig, option, require

GPT2_SEPARATORS = (0, 11, 13, 25, 26, 30, 198, 628, 5145, 837, 764, 1058, 2162, 5633)  # ! , . : ; ? \n \n\n, and after a space
ATTENTION = ("attn", "window", "sinks", "max_seps", "fixed_every")  # what may change between training and use


@dataclass
class TrainConfig:
    data: str = option("docs", "folder with train.bin and val.bin, or its name below data/")
    out_dir: str = option("out", "where ckpt.pt and log.jsonl go")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or cuda:N")
    batch_size: int = option(16, "sequences per step, over all devices")
    accumulate: int = option(1, "split each step's batch into this many parts, to save memory")
    max_steps: int = option(1000, "length of the training")
    learning_rate: float = option(3e-3, "peak learning rate")
    weight_decay: float = option(0.1, "of AdamW, on the matrices")
    warmup_steps: int = option(50, "steps of rising learning rate; it falls to a tenth afterwards")
    grad_clip: float = option(1.0, "largest norm of the gradient")
    eval_every: int = option(250, "steps between validations, each of which writes the checkpoint")
    eval_batches: int = option(16, "batches per validation")
    log_every: int = option(10, "steps between lines in the log")
    compile: bool = option(False, "compile the model with torch.compile")
    seed: int = option(0, "of the initial weights and of the order of the data")

    def __post_init__(self):
        for names, least in (("batch_size accumulate eval_every eval_batches log_every", 1), ("max_steps warmup_steps seed", 0),
                             ("learning_rate weight_decay grad_clip", 0.0)):
            for name in names.split():
                require(least <= getattr(self, name) < math.inf, f"{name} is {getattr(self, name)}, and must be at least {least}")


PRESETS = {  # what `python train.py` alone does, by machine; everything else is the default of its field
    "cpu": dict(block_size=256, n_layer=4, n_head=4, n_embd=128, window=32, max_seps=16, batch_size=16, max_steps=1000),
    "cuda": dict(block_size=1024, n_layer=6, n_head=6, n_embd=384, window=64, max_seps=64, batch_size=64, max_steps=2000,
                 learning_rate=1e-3, warmup_steps=100, compile=True),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose options can be the fields of a dataclass, and whose errors are one sentence (exit code 2)."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)

    def add_config(self, cls, names=None, default=None):
        """An option for each field of `cls` (or those in `names`) that has a help text; only those given appear in the
        result. `default`: words for what the others are, if not the field's default or the machine's preset."""
        kinds = {int | None: int_or_none, bool: true_or_false}
        for field in dataclasses.fields(cls):
            if "help" in field.metadata and (names is None or field.name in names):
                presets = [f"{machine} preset: {preset[field.name]}" for machine, preset in PRESETS.items() if field.name in preset]
                note = default or "; ".join([str(field.default), *presets])
                self.add_argument(f"--{field.name}", type=kinds.get(field.type, field.type), metavar=field.name.upper(),
                                  default=argparse.SUPPRESS, help=f"{field.metadata['help']}\n(default: {note})")

    def parse_args(self):
        parsed, rest = self.parse_known_args()
        if rest:
            name = rest[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(name, known, n=1)
            self.error(f"there is no option {name}; " + (f"did you mean {near[0]}?" if near else "--help lists them"))
        return parsed

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def int_or_none(text):
    try:
        return None if text == "None" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor None") from None


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


# ---- data


def load_data(name):
    """(train, val, meta) of a data folder, or of data/<name>. ValueError in one sentence, also for hostile files."""
    folder = Path(name) if (Path(name) / "train.bin").exists() else Path(__file__).parent / "data" / name
    require(folder.is_dir(), f"there is no data folder {name}; prepare one with: python data/prepare.py --text YOUR_FILE")
    try:
        if (folder / "meta.json").exists():
            meta = json.loads((folder / "meta.json").read_text())
        else:
            require(not (folder / "meta.pkl").exists(), f"{folder} has a meta.pkl, and pickles are not read: write a "
                    f"meta.json with vocab_size, dtype and separators beside it")
            meta = dict(vocab_size=50304, dtype="uint16", separators=GPT2_SEPARATORS, source="GPT-2 tokens")
        require(isinstance(meta, dict), "it is not an object")
        vocab_size, dtype = meta.get("vocab_size"), meta.get("dtype")
        require(dtype in ("uint8", "uint16"), f"dtype is {dtype!r}, and must be uint8 or uint16")
        require(type(vocab_size) is int and 1 <= vocab_size <= 65536,
                f"vocab_size is {vocab_size!r}, and must be a whole number from 1 to 65536")
        for key, default in (("separators", None), ("answers", [])):
            ids = meta.setdefault(key, default)
            require(isinstance(ids, (list, tuple)) and all(type(i) is int and 0 <= i < vocab_size for i in ids),
                    f"{key} must be a list of token ids below vocab_size")
        record = meta.setdefault("record", 1)
        require(type(record) is int and 1 <= record < 2 ** 31, f"record is {record!r}, and must be a whole number from 1")
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{folder / 'meta.json'} can't be used: {error}") from None
    parts = []
    for part in (folder / "train.bin", folder / "val.bin"):
        require(part.is_file() and part.stat().st_size, f"{part} is missing or empty; prepare the data again")
        require(part.stat().st_size % np.dtype(dtype).itemsize == 0, f"{part} is cut: {part.stat().st_size} bytes are no "
                f"whole number of {dtype} tokens")
        tokens = np.memmap(part, dtype=dtype, mode="r")
        require(vocab_size > np.iinfo(dtype).max or tokens.max() < vocab_size,
                f"{part} holds token {tokens.max()}, beyond the vocabulary of {vocab_size}")
        parts.append(tokens)
    return *parts, meta


def get_batch(tokens, meta, rows, block_size, rng):
    """`rows` random pieces of the text: ids, targets, each (rows, block_size) int64, -1 where no loss is taken."""
    record = meta["record"]
    starts = rng.integers((len(tokens) - block_size - 1) // record + 1, size=rows) * record
    pieces = torch.from_numpy(np.stack([tokens[s:s + block_size + 1] for s in starts]).astype(np.int64))
    ids, targets = pieces[:, :-1], pieces[:, 1:].contiguous()
    if meta["answers"]:
        targets[~torch.isin(targets, torch.tensor(meta["answers"]))] = -1
    return ids, targets


# ---- checkpoints


def save_checkpoint(path, tensors, about):
    """Write tensors (nested dicts) and `about` (JSON) so that `path` is always a whole checkpoint. OSError, RuntimeError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            torch.save({**tensors, "about": json.dumps(about)}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path):
    """(model on the CPU, optimizer state, about) of a checkpoint. ValueError in one sentence if there is no good one."""
    path = Path(path)
    require(path.is_file(), f"there is no checkpoint {path}; train one with: python train.py")
    try:
        with zipfile.ZipFile(path) as archive:
            require(archive.testzip() is None, "a checksum is wrong")  # torch.load does not look at them
        state = torch.load(path, map_location="cpu", weights_only=True)
        about = json.loads(state["about"])
        config = GPTConfig(**about["model"])
        require(len(state["model"]) == 1 + 4 * config.n_layer, "it does not hold the layers that it names")
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(state["model"], assign=True)
        optimizer = state["optimizer"]
    except Exception as error:  # whatever a damaged or foreign file makes the readers say
        raise ValueError(f"{path} is damaged or not a checkpoint of this program "
                         f"({(str(error) or type(error).__name__).splitlines()[0][:120]})") from None
    return model, optimizer, about


# ---- the training


def learning_rate(step, train):
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    return train.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(done, 1)))


def peak_memory(device):
    """GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def find_device(parser, name, local_rank=0):
    """The torch.device of --device, or a usage error."""
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in PRESETS or device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {name} is not on this machine; it has cpu" +
                     (f" and cuda with {torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else " alone"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def configure(parser, given, device):
    """The run that the given options ask for: what `run` takes, but for the device."""
    resume, init_from = given.pop("resume", False), given.pop("init_from", None)
    shape = {f.name: given.pop(f.name) for f in dataclasses.fields(GPTConfig) if f.name in given}
    if resume and init_from:
        parser.error("--resume continues a run and --init_from starts one; give one of them")
    preset, optimizer, about = PRESETS[device.type], None, dict(step=0, val_loss=None)
    options = {k: v for k, v in preset.items() if k not in vars(GPTConfig())}
    if resume or init_from:
        path = Path(init_from or Path(given.get("out_dir", TrainConfig.out_dir), "ckpt.pt"))
        model, state, stored = load_checkpoint(path)
        for name, value in shape.items():
            if value != getattr(model.config, name) and (resume or name not in ATTENTION):
                parser.error(f"--{name} is {getattr(model.config, name)} in {path} and can't be changed here")
        if resume:
            options, optimizer, about = stored["train"], state, stored
    try:
        train = TrainConfig(**{**options, **given})
    except ValueError as error:
        parser.error(str(error))

    folder = Path(__file__).parent / "data" / TrainConfig.data
    if train.data == TrainConfig.data and not (folder / "train.bin").exists() and int(os.environ.get("RANK", 0)) == 0:
        from data.prepare import prepare  # here, because it imports this file
        prepare(folder)
    if dist.is_initialized():
        dist.barrier()
    data = load_data(train.data)
    of_data = {name: data[2][name] for name in ("vocab_size", "separators")}
    try:
        if resume or init_from:
            require(model.config.vocab_size == of_data["vocab_size"], f"{path} has a vocabulary of "
                    f"{model.config.vocab_size}, and the data {train.data} one of {of_data['vocab_size']}")
            model.configure(**shape, **of_data)
        else:
            shape = {**{k: v for k, v in preset.items() if k in vars(GPTConfig())}, **shape}
            torch.manual_seed(train.seed)
            model = GPT(GPTConfig(**shape, **of_data))
    except ValueError as error:
        parser.error(str(error))
    shortest = min(len(part) for part in data[:2])
    require(shortest > model.config.block_size, f"the data {train.data} is too short: {shortest} tokens in one part, and "
            f"block_size {model.config.block_size} needs one more than itself")
    return model.to(device), train, data, optimizer, about["step"], about["val_loss"]


def open_run(out_dir, step):
    """(checkpoint path, open log) of a run. A new run keeps the one before it under *.old; a resumed one drops the log lines
    behind its checkpoint, and a line that was cut."""
    out_dir.mkdir(parents=True, exist_ok=True)
    path, log = out_dir / "ckpt.pt", out_dir / "log.jsonl"
    if step == 0:
        for old in (path, log):
            if old.exists():
                os.replace(old, old.with_name(old.name + ".old"))
    elif log.exists():
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        with open(log.with_name("log.jsonl.partial"), "w") as f:
            f.writelines(line for line in lines if json.loads(line)["step"] <= step)
        os.replace(f.name, log)
    return path, open(log, "a")


def run(model, train, data, optimizer_state, step, val_loss, device):
    """Train to `max_steps` or to a signal; leaves ckpt.pt and log.jsonl in out_dir. Returns the exit code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rows, block_size = train.batch_size // (world * train.accumulate), model.config.block_size
    require(rows * world * train.accumulate == train.batch_size, f"batch_size {train.batch_size} does not divide by "
            f"{world} processes x accumulate {train.accumulate}; make it a multiple of {world * train.accumulate}")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=train.weight_decay, fused=True)
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    net = torch.compile(model) if train.compile else model
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(net)
    path, log = open_run(Path(train.out_dir), step) if rank == 0 else (None, None)
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))

    def losses(tokens, *seed):
        """The loss of each part of this process's share of one batch."""
        batch = get_batch(tokens, data[2], train.batch_size, block_size, np.random.default_rng(seed))
        for ids, targets in zip(*(half[rank::world].split(rows) for half in batch)):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                yield net(ids.to(device), targets.to(device))[1]

    def everywhere(*numbers):
        """The means of a few numbers over all processes."""
        numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(numbers)
        return (numbers / world).tolist()

    @torch.no_grad()
    def validate():  # on the same pieces every time, whatever the seed
        parts = [loss for batch in range(train.eval_batches) for loss in losses(data[1], 1, 0, batch)]
        return everywhere(torch.stack(parts).mean().item())[0]

    def record(**line):
        """A line in the log, and its numbers at the bar."""
        if rank == 0:
            line["memory_gib"] = round(peak_memory(device), 3)
            log.write(json.dumps(line) + "\n")
            log.flush()
            shown = dict(loss=line.get("loss"), val=val_loss, tokens_per_s=line.get("tokens_per_s"), GiB=line["memory_gib"])
            bar.set_postfix({k: f"{v:,}" if isinstance(v, int) else f"{v:.3f}" for k, v in shown.items() if v is not None})

    def save(path):
        """Write the checkpoint, or say why not: the state is still here, and so is the last file."""
        about = dict(model=asdict(model.config), train=asdict(train), data=data[2], step=step, val_loss=val_loss)
        try:
            save_checkpoint(path, dict(model=model.state_dict(), optimizer=optimizer.state_dict()), about)
            return True
        except (OSError, RuntimeError) as error:
            tqdm.write(f"train.py: could not write {path}; what was there is intact: {error}", file=sys.stderr)
            return False

    bar = tqdm(total=train.max_steps, initial=step, desc="training", unit="step", disable=rank > 0)
    saved = True
    if step == 0:
        val_loss = validate()
        record(step=step, val_loss=val_loss)
        saved = rank > 0 or save(path)
    clock, since, stopping = time.perf_counter(), step, False
    while step < train.max_steps and not stopping:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, train)
        loss = 0.0
        for part in losses(data[0], 0, train.seed, step):
            (part / train.accumulate).backward()
            loss += part.detach() / train.accumulate
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        evaluating = step % train.eval_every == 0 or step == train.max_steps
        logging = evaluating or step % train.log_every == 0
        if not (logging or stop and world == 1):
            continue  # reading the loss waits for the GPU, so only now and then
        loss, stopping = everywhere(float(loss), len(stop))  # a signal that one process got is for all
        require(math.isfinite(loss), f"the loss is {loss} at step {step}; {path} is the last good checkpoint: go on from it "
                f"with --init_from and a lower --learning_rate")
        if logging:
            speed = round((step - since) * train.batch_size * block_size / (time.perf_counter() - clock))
            line = dict(step=step, loss=loss, lr=group["lr"], tokens_per_s=speed)
            if evaluating:
                line["val_loss"] = val_loss = validate()
            record(**line)
            clock, since = time.perf_counter(), step
        if rank == 0 and (evaluating or stopping):
            saved = save(path)
    bar.close()
    if rank > 0:
        return 0
    if not saved:  # nowhere to put it, so elsewhere rather than nowhere
        path = Path(tempfile.gettempdir(), f"nanosep-{os.getpid()}.pt")
        saved = save(path)
        print(f"train.py: {f'the checkpoint is {path} instead' if saved else 'the state of this run is lost'}", file=sys.stderr)
        return 1
    if stopping:
        number = stop[0] if stop else signal.SIGTERM  # another process may have got it
        print(f"stopped at step {step} by {signal.Signals(number).name}; go on with: python train.py --resume --out_dir "
              f"{train.out_dir}", file=sys.stderr)
        return 128 + number
    print(f"validation loss {val_loss:.4f} nats per token after {step} steps; let it write with:\n"
          f"  python sample.py --ckpt {path} --stream", file=sys.stderr)
    return 0


def main():
    parser = Parser(f"{__doc__}\nOptions: --key value or --key=value. Model and training:")
    parser.add_config(TrainConfig)
    parser.add_config(GPTConfig)
    parser.add_argument("--init_from", metavar="CKPT", help="start from this checkpoint's weights; its shape is kept, and\n"
                        f"{', '.join(ATTENTION)} may change (post-training)")
    parser.add_argument("--resume", action="store_true", help="continue the run in out_dir where its checkpoint was written")
    given = vars(parser.parse_args())
    device = find_device(parser, given.get("device", TrainConfig.device), os.environ.get("LOCAL_RANK", 0))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        sys.exit(run(*configure(parser, given, device), device))
    except torch.OutOfMemoryError:
        sys.exit("train.py: the GPU's memory is full; lower --batch_size or --block_size, or raise --accumulate")
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # while the data is prepared; later on it saves a checkpoint
        sys.exit("train.py: stopped before the training began; nothing was written")
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        sys.exit(f"train.py: another process of this run has ended ({str(error).splitlines()[0][:120]}); go on with --resume")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
