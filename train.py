"""Training: from scratch, from another checkpoint (post-training), resumed, on several devices.

    python train.py                  prepares the data if need be; trains a preset for this machine
    python train.py --resume         continues out/ckpt.pt exactly, to the last digit on a CPU
    python train.py --init_from out-full/ckpt.pt --attn sep
                                     continues an ordinary model's training with separator attention
    torchrun --standalone --nproc_per_node=2 train.py
                                     data-parallel, the same losses as one process

The one idea: nothing is random but the initial weights. The batch of a step is a function of
(seed, step), so a resumed run, and each process of a parallel one, knows its data without any
saved state. Read after `sep_kernel.py`.

In this file: the configuration, checkpoints, the training (`Trainer`), the command line.
"""
import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import os
import signal
import sys
import tempfile
import textwrap
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.loader import DATA_FOLDER, check_meta, get_batch, load_data
from data.prepare import prepare
from model import GPT, GPTConfig
from sep_cache import SepConfig, option, require

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE_HELP = "cpu, cuda, cuda:N, or mps (Apple GPUs: untried, with the preset of a CPU)"


@dataclass
class TrainConfig:
    """How to train. ValueError names the field that is out of range."""
    data: str = option("docs", "folder with train.bin and val.bin, or its name below data/")
    out_dir: str = option("out", "where ckpt.pt and log.jsonl go")
    device: str = option(DEFAULT_DEVICE, DEVICE_HELP)
    batch_size: int = option(16, "sequences per step, over all devices")
    grad_accum_steps: int = option(1, "split each batch into so many micro-batches, to save memory")
    max_steps: int = option(1000, "length of the training")
    learning_rate: float = option(3e-3, "peak learning rate")
    weight_decay: float = option(0.1, "of AdamW, on the matrices")
    warmup_steps: int = option(50, "steps of rising learning rate; then it falls to a tenth")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no limit")
    eval_every: int = option(250, "steps between validations, each of which writes the checkpoint")
    eval_batches: int = option(16, "batches per validation")
    log_every: int = option(10, "steps between lines in the log")
    compile: bool = option(False, "compile the model with torch.compile")
    seed: int = option(0, "of the initial weights and of the order of the data")

    def __post_init__(self):
        minimum_of = dict(
            batch_size=1, grad_accum_steps=1, eval_every=1, eval_batches=1, log_every=1,
            max_steps=0, warmup_steps=0, seed=0, learning_rate=0.0, weight_decay=0.0, grad_clip=0.0)
        for name, minimum in minimum_of.items():
            value = getattr(self, name)
            require(minimum <= value < math.inf,
                    f"{name} is {value}, and must be at least {minimum}")
        require(self.seed < 2 ** 64, f"seed is {self.seed}, and must be below 2 ** 64")


# What `python train.py` alone does, by machine (Apple GPUs: as a CPU). Everything else is the
# default of its field.
PRESETS = {
    "cpu": dict(block_size=256, n_layer=4, n_head=4, n_embd=128, window=32, max_seps=16,
                batch_size=16, max_steps=1000),
    "cuda": dict(block_size=1024, n_layer=6, n_head=6, n_embd=384, window=64, max_seps=64,
                 batch_size=64, max_steps=2000, learning_rate=1e-3, warmup_steps=100, compile=True),
}


# ---- checkpoints


class Checkpoint(NamedTuple):
    model: GPT             # on the CPU
    optimizer_state: dict  # of AdamW
    info: dict             # model_config, train_config, data_meta, step, val_loss


def save_checkpoint(path, model, optimizer, info):
    """Write a checkpoint. At any time `path` holds a whole one. Raises OSError, RuntimeError."""
    # `info` goes in as JSON: the file then holds tensors and one string, nothing that runs code
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), info=json.dumps(info))
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())  # on the disk before it takes the old one's place
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path):
    """The Checkpoint in a file. ValueError in one sentence if there is no good one."""
    path = Path(path)
    if path.is_dir():
        files = ", ".join(sorted(os.listdir(path))[:9])
        raise ValueError(f"{path} is a folder, not a checkpoint; it holds: {files or 'nothing'}")
    require(path.is_file(), f"there is no checkpoint {path}, and no folder of that name; train one "
            f"with: python train.py")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            require(archive.testzip() is None, "a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        info = json.loads(state["info"])
        config = GPTConfig(**info["model_config"])
        # checked first: a wrong n_layer would build a model that fits no memory
        n_tensors = 1 + 4 * config.n_layer
        require(len(state["model"]) == n_tensors, "it does not hold the layers that it names")
        with torch.device("meta"):  # without memory: the tensors of the file become its weights
            model = GPT(config)
        model.load_state_dict(state["model"], assign=True)
        # the rest is only tried here, so that a damaged file fails now and not later
        torch.optim.AdamW(model.parameters()).load_state_dict(state["optimizer"])
        TrainConfig(**fields_of(TrainConfig, info["train_config"]))
        check_meta(info["data_meta"])
        for key, kind in (("step", int), ("val_loss", float)):
            require(type(info[key]) is kind, f"its {key} is {info[key]!r}")
        return Checkpoint(model, state["optimizer"], info)
    except Exception as error:  # whatever a damaged or foreign file makes the readers say
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint of this program "
                         f"({reason.splitlines()[0][:120]})") from None


# ---- the training


# a batch's seed is (TRAINING, cfg.seed, step) or (VALIDATION, 0, number of the batch)
TRAINING = 0
VALIDATION = 1


class Trainer:
    """Trains `model` to `max_steps` or to a signal; leaves ckpt.pt and log.jsonl in out_dir.

    model: on `device` already. data: what `load_data` returns. resumed: the Checkpoint to continue
    from, None for a new run. ValueError if the batch cannot be shared out.
    """

    def __init__(self, cfg, model, data, device, resumed=None):
        self.cfg = cfg
        self.model = model
        self.train_tokens, self.val_tokens, self.meta = data
        self.device = device
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0  # the process that writes the files
        n_micro_batches = self.world_size * cfg.grad_accum_steps
        require(cfg.batch_size % n_micro_batches == 0,
                f"batch_size {cfg.batch_size} does not divide by {self.world_size} processes x "
                f"grad_accum_steps {cfg.grad_accum_steps}; make it a multiple of "
                f"{n_micro_batches}")

        # fused: one kernel for all weights. Apple GPUs have it only in some versions of PyTorch.
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.95), weight_decay=cfg.weight_decay,
            fused=device.type != "mps")
        self.is_new = resumed is None
        self.step = 0  # steps done
        self.val_loss = None  # of the last validation
        if resumed is not None:
            self.optimizer.load_state_dict(resumed.optimizer_state)
            for group in self.optimizer.param_groups:  # the stored ones bring their own settings
                group["weight_decay"] = cfg.weight_decay
                group["fused"] = device.type != "mps"
            self.step = resumed.info["step"]
            self.val_loss = resumed.info["val_loss"]
        self.wrapped_model = torch.compile(model) if cfg.compile else model
        if self.world_size > 1:
            self.wrapped_model = DistributedDataParallel(self.wrapped_model)
        self.checkpoint_path = Path(cfg.out_dir, "ckpt.pt")

    def micro_batches(self, tokens, seed):
        """This process's share of the batch that `seed` names, in grad_accum_steps pieces: x, y."""
        cfg = self.cfg
        rng = np.random.default_rng(seed)
        x, y = get_batch(tokens, self.meta, cfg.batch_size, self.model.config.block_size, rng)
        x_micro_batches = x[self.rank::self.world_size].chunk(cfg.grad_accum_steps)
        y_micro_batches = y[self.rank::self.world_size].chunk(cfg.grad_accum_steps)
        return zip(x_micro_batches, y_micro_batches, strict=True)

    def loss(self, x, y):
        """The mean loss of a micro-batch, as a tensor."""
        is_cuda = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_cuda):
            _, loss = self.wrapped_model(x.to(self.device), y.to(self.device))
        return loss

    def train_step(self, lr):
        """One step of the optimizer. Returns the loss before it, as a tensor."""
        cfg = self.cfg
        step_loss = 0.0
        for x, y in self.micro_batches(self.train_tokens, seed=(TRAINING, cfg.seed, self.step)):
            loss = self.loss(x, y) / cfg.grad_accum_steps
            loss.backward()
            step_loss += loss.detach()

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if cfg.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.bar.update()
        return step_loss

    @torch.no_grad()
    def evaluate(self):
        """The validation loss, on the same batches every time, whatever cfg.seed is."""
        losses = [self.loss(x, y) for i in range(self.cfg.eval_batches)
                  for x, y in self.micro_batches(self.val_tokens, seed=(VALIDATION, 0, i))]
        return all_reduce_mean(torch.stack(losses).mean().item(), self.device)

    def run(self):
        """Train, and return the exit code.

        ValueError when a loss is not finite, OSError when out_dir cannot be written.
        """
        cfg = self.cfg
        signals = catch_signals()
        with tqdm(total=cfg.max_steps, initial=self.step, desc="training", unit="step",
                  disable=not self.is_main) as self.bar:
            is_saved = self.train(signals)
        if not self.is_main:
            return 0
        if not is_saved:
            return self.rescue()
        if self.step < cfg.max_steps:
            number = signals[0] if signals else signal.SIGTERM  # another process may have got it
            device = "" if self.device.type == DEFAULT_DEVICE else f" --device {self.device.type}"
            print(f"stopped at step {self.step} by {signal.Signals(number).name}; go on with: "
                  f"python train.py --resume --out_dir {cfg.out_dir}{device}", file=sys.stderr)
            return 128 + number
        print(f"validation loss {self.val_loss:.4f} nats per token after {self.step} steps; sample "
              f"from it with:\n  python sample.py --ckpt {self.checkpoint_path} --stream",
              file=sys.stderr)
        return 0

    def train(self, signals):
        """Train to `max_steps`, or until `signals` holds one. Returns whether the end is saved."""
        cfg = self.cfg
        if self.is_new:  # before open_log: if this fails, the files of the run before stay
            self.val_loss = self.evaluate()
        if self.is_main:
            self.log_file = open_log(Path(cfg.out_dir), self.step, self.is_new)
        is_saved = True
        if self.is_new:
            self.log(step=0, val_loss=self.val_loss)
            is_saved = self.save(self.checkpoint_path)

        logged_step = self.step
        logged_time = time.perf_counter()
        is_stopping = False
        while self.step < cfg.max_steps and not is_stopping:
            lr = get_lr(self.step, cfg)
            step_loss = self.train_step(lr)

            # Reading the loss waits for the GPU, so it is read at log steps only. Several processes
            # must agree to stop, and do that there; a single one stops after any step.
            is_eval_step = self.step % cfg.eval_every == 0 or self.step == cfg.max_steps
            is_log_step = self.step % cfg.log_every == 0 or is_eval_step
            is_interrupted = len(signals) > 0 and self.world_size == 1
            if not is_log_step and not is_interrupted:
                continue
            loss = all_reduce_mean(step_loss.item(), self.device)
            self.require_finite(loss)
            # a signal to one process stops all
            is_stopping = all_reduce_mean(len(signals), self.device) > 0

            if is_log_step:
                n_tokens = (self.step - logged_step) * cfg.batch_size * self.model.config.block_size
                tokens_per_s = round(n_tokens / (time.perf_counter() - logged_time))
                numbers = dict(step=self.step, loss=loss, lr=lr, tokens_per_s=tokens_per_s)
                if is_eval_step:
                    self.val_loss = self.evaluate()
                    self.require_finite(self.val_loss)
                    numbers["val_loss"] = self.val_loss
                self.log(**numbers)
            if is_eval_step or is_stopping:
                is_saved = self.save(self.checkpoint_path)
            logged_step = self.step
            logged_time = time.perf_counter()
        return is_saved

    def require_finite(self, loss):
        """ValueError if a loss is not finite; the checkpoint is from before that."""
        require(math.isfinite(loss),
                f"the loss is {loss} at step {self.step}; {self.checkpoint_path} is the last good "
                f"checkpoint: go on from it with --init_from and a lower --learning_rate")

    def log(self, **numbers):
        """Write a line of the log, and show its numbers at the progress bar."""
        if not self.is_main:
            return
        numbers["memory_gib"] = round(peak_memory(self.device), 3)
        try:
            self.log_file.write(json.dumps(numbers) + "\n")
            self.log_file.flush()
        except OSError as error:  # the training is worth more than its log
            tqdm.write(f"train.py: could not write {self.log_file.name}: {error}", file=sys.stderr)
        shown = {**numbers, "val_loss": self.val_loss}
        names = ("loss", "val_loss", "tokens_per_s", "memory_gib")
        self.bar.set_postfix({name: f"{shown[name]:,.5g}" for name in names if name in shown})

    def save(self, path):
        """Write the checkpoint. Returns False, after saying why, if that failed."""
        if not self.is_main:
            return True
        info = dict(model_config=asdict(self.model.config), train_config=asdict(self.cfg),
                    data_meta=self.meta, step=self.step, val_loss=self.val_loss)
        try:
            save_checkpoint(path, self.model, self.optimizer, info)
        except (OSError, RuntimeError) as error:
            tqdm.write(f"train.py: could not write {path}; what was there is intact: {error}",
                       file=sys.stderr)
            return False
        return True

    def rescue(self):
        """Write the checkpoint to the temporary folder, since out_dir takes none. Returns 1."""
        path = Path(tempfile.gettempdir(), f"nanosep-{os.getpid()}.pt")
        outcome = "the state of this run is lost"
        if self.save(path):
            outcome = (f"the checkpoint is {path} instead; move it to {self.checkpoint_path}, and "
                       f"go on with --resume")
        print(f"train.py: {outcome}", file=sys.stderr)
        return 1


def get_lr(step, cfg):
    """The learning rate of a step: linear warm-up, then half a cosine down to a tenth."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    min_lr = cfg.learning_rate / 10
    decay_ratio = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)  # 0 ... 1
    coeff = 0.5 * (1.0 + math.cos(math.pi * min(decay_ratio, 1)))  # 1 ... 0
    return min_lr + coeff * (cfg.learning_rate - min_lr)


def all_reduce_mean(number, device):
    """The mean of a number over all processes."""
    if not dist.is_initialized():
        return number
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def catch_signals():
    """From now on SIGINT and SIGTERM do not end the program, but are added to the list returned."""
    signals = []

    def on_signal(number, frame):
        signals.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return signals


def open_log(out_dir, step, is_new):
    """log.jsonl of a run that is at `step`, open for appending.

    A new run keeps the files of the one before it as *.old. A run that goes on drops what was
    logged after its checkpoint, and a line that was cut.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "log.jsonl"
    if is_new:
        for old in (path, out_dir / "ckpt.pt"):
            if old.exists() and old.stat().st_size > 0:  # an empty one is not worth keeping
                os.replace(old, old.with_name(old.name + ".old"))
    elif path.exists():
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        up_to_step = [line + "\n" for line in whole if json.loads(line)["step"] <= step]
        partial = out_dir / "log.jsonl.partial"
        try:
            partial.write_text("".join(up_to_step))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return open(path, "a")


def peak_memory(device):
    """GiB that were held at most: of the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if device.type == "mps":  # no peak is kept; this includes what is cached for reuse
        return torch.mps.driver_allocated_memory() / 2 ** 30
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def is_out_of_memory(error):
    """Whether an exception says that there is too little memory, of a GPU or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    sentences = ("DefaultCPUAllocator", "Storage size calculation overflowed")
    return any(sentence in str(error) for sentence in sentences)


# ---- the command line


class Parser(argparse.ArgumentParser):
    """Options from the fields of a dataclass; errors in one sentence (exit code 2)."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawTextHelpFormatter)

    def add_config(self, config_class, default=None):
        """An option for each field with a help text; only those given are in the parsed result.

        default: how the help calls what is used where an option is not given; None: it names the
        field's default and the presets.
        """
        readers = {int | None: int_or_none, bool: true_or_false}
        for field in dataclasses.fields(config_class):
            if "help" not in field.metadata:
                continue
            defaults = [default]
            if default is None:
                defaults = [str(field.default)]
                defaults += [f"{machine} preset: {preset[field.name]}"
                             for machine, preset in PRESETS.items() if field.name in preset]
            help_text = textwrap.fill(field.metadata["help"], width=75)
            self.add_argument(f"--{field.name}", type=readers.get(field.type, field.type),
                              metavar=field.name.upper(), default=argparse.SUPPRESS,
                              help=f"{help_text}\n(default: {'; '.join(defaults)})")

    def parse_args(self):
        args, unknown = self.parse_known_args()
        if unknown:
            name = unknown[0].split("=")[0]
            known = [text for action in self._actions for text in action.option_strings]
            similar = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {similar[0]}?" if similar else "--help lists them"
            self.error(f"there is no option {name}; {advice}")
        return args

    @contextlib.contextmanager
    def usage_errors(self):
        """Inside, a ValueError is a mistake in the options."""
        try:
            yield
        except ValueError as error:
            self.error(str(error))

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def int_or_none(text):
    if text == "None":
        return None
    try:
        return int(text)
    except ValueError:
        sentence = f"{text!r} is neither a whole number nor None"
        raise argparse.ArgumentTypeError(sentence) from None


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def find_device(parser, name, local_rank=0):
    """The torch.device of --device, or a usage error. Plain `cuda`: the GPU of this process."""
    if name == "mps" and not torch.backends.mps.is_available():
        parser.error("--device mps is not on this machine: PyTorch finds no Apple GPU here")
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{local_rank}"
    names = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    if name not in names:
        parser.error(f"--device {name} is not on this machine; it has: {', '.join(names)}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def fields_of(config_class, settings):
    """Those of the settings (a dict) that are fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in settings.items() if name in names}


def prepare_default_data(name):
    """The first `python train.py` makes its own data; with several processes, one of them does."""
    folder = DATA_FOLDER / TrainConfig.data
    is_missing = name == TrainConfig.data and not (folder / "train.bin").exists()
    if is_missing and int(os.environ.get("RANK", 0)) == 0:
        prepare(folder)
    if dist.is_initialized():
        dist.barrier()


def start(parser, options, device):
    """Put together what the options ask for, and train. Returns the exit code."""
    resume = options.pop("resume")
    init_from = options.pop("init_from")
    preset = PRESETS["cuda" if device.type == "cuda" else "cpu"]

    checkpoint = None
    if resume or init_from:
        checkpoint_path = init_from or Path(options.get("out_dir", TrainConfig.out_dir), "ckpt.pt")
        checkpoint = load_checkpoint(checkpoint_path)
        # the attention's settings shape no weights, so a new training may change them
        changeable = fields_of(SepConfig, options) if init_from else {}
        for name, value in fields_of(GPTConfig, options).items():
            stored = getattr(checkpoint.model.config, name)
            if value != stored and name not in changeable:
                parser.error(f"--{name} is {stored} in {checkpoint_path} and can't be changed here")

    defaults = preset
    if resume:  # its folder may have been moved, and the device may be another one
        defaults = {**checkpoint.info["train_config"], "out_dir": str(checkpoint_path.parent),
                    "device": str(device)}
    with parser.usage_errors():
        cfg = TrainConfig(**fields_of(TrainConfig, {**defaults, **options}))

    prepare_default_data(cfg.data)
    data = load_data(cfg.data)
    train_tokens, val_tokens, meta = data
    of_data = dict(vocab_size=meta["vocab_size"], separators=meta["separators"])
    with parser.usage_errors():
        if checkpoint is None:
            config = GPTConfig(**fields_of(GPTConfig, {**preset, **options, **of_data}))
            torch.manual_seed(cfg.seed)
            model = GPT(config)
        else:
            model = checkpoint.model
            is_same_data = json.loads(json.dumps(meta)) == checkpoint.info["data_meta"]
            require(is_same_data or not resume,
                    f"the data {cfg.data} has changed since {checkpoint_path} was written; "
                    f"--init_from accepts that")
            require(model.config.vocab_size == meta["vocab_size"],
                    f"{checkpoint_path} has a vocabulary of {model.config.vocab_size}, "
                    f"and the data {cfg.data} one of {meta['vocab_size']}")
            model.configure(**fields_of(SepConfig, {**options, **of_data}))
    n_tokens = min(len(train_tokens), len(val_tokens))
    require(n_tokens > model.config.block_size,
            f"the data {cfg.data} is too short: {n_tokens} tokens in one part, and "
            f"block_size {model.config.block_size} needs one more than itself")
    resumed = checkpoint if resume else None
    return Trainer(cfg, model.to(device), data, device, resumed).run()


def main():
    parser = Parser(f"{__doc__}\nOptions: --key value or --key=value. Model and training:")
    parser.add_config(TrainConfig)
    parser.add_config(GPTConfig)
    parser.add_argument("--init_from", metavar="CKPT", help="start from this checkpoint's weights; "
                        "its shape is kept, and its\nattention may change (post-training)")
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in out_dir from the step of its checkpoint")
    options = vars(parser.parse_args())  # of the configurations' fields, only those given
    if options["resume"] and options["init_from"]:
        parser.error("--resume continues a run and --init_from starts one; give one of them")
    device = find_device(parser, options.get("device", TrainConfig.device),
                         int(os.environ.get("LOCAL_RANK", 0)))
    if "WORLD_SIZE" in os.environ:
        if device.type == "mps":
            parser.error("--device mps trains in one process; start it without torchrun")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        exit_code = start(parser, options, device)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # while the data is prepared; later on it saves a checkpoint
        sys.exit("train.py: stopped before the training began; out_dir is as it was")
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            sys.exit("train.py: the memory is full; lower --batch_size or --block_size, "
                     "or raise --grad_accum_steps")
        if not dist.is_initialized():
            raise
        reason = str(error).splitlines()[0][:120]
        sys.exit(f"train.py: stopped by an error, perhaps because another process has ended "
                 f"({reason}); go on with --resume")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
