"""Training: from scratch, from another model (post-training), resumed, on several devices.

    python train.py                  prepares its data if need be; trains a preset for this machine
    python train.py --resume         continues out/ckpt.pt exactly, to the last digit on a CPU
    python train.py --init_from out-full/ckpt.pt --attn sep --out_dir out-post
                                     continues an ordinary model's training with separators
    python train.py --init_from FOLDER --attn sep --data NAME --learning_rate 1e-4
                                     the same with a pretrained model, see `pretrained.py`
    torchrun --standalone --nproc_per_node=2 train.py
                                     data-parallel, the same losses as one process

The one idea: the batch of a step is a function of (seed, step). So a resumed run, and each process
of a parallel one, knows its data without any saved state. Read after `model.py`.
"""
import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.loader import find_data, get_batch, load_data
from data.prepare import prepare, read_docs
from model import GPT, GPTConfig
from sep_cache import SepConfig, add_options, fields_of, option, require


@dataclass
class TrainConfig:
    """How to train."""
    data: str = option("docs", "folder with train.bin and val.bin, or its name below data/")
    out_dir: str = option("out", "where ckpt.pt and log.jsonl go")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu",
                         "cpu, cuda, cuda:N or another device of PyTorch")
    batch_size: int = option(16, "sequences per step, over all devices; a multiple of their number")
    max_steps: int = option(1000, "length of the training")
    learning_rate: float = option(3e-3, "peak learning rate")
    warmup_steps: int = option(50, "steps of rising learning rate; then it falls to a tenth")
    eval_every: int = option(250, "steps between validations, each of which writes the checkpoint")
    compile: bool = option(False, "compile the model with torch.compile")
    seed: int = option(0, "of the initial weights and of the order of the data")


# What `python train.py` alone does, by machine. Everything else is the default of its field.
PRESET = dict(block_size=256, n_layer=4, n_head=4, n_embd=128, window=32, max_seps=16)
if torch.cuda.is_available():
    PRESET = dict(block_size=1024, n_layer=6, n_head=6, n_embd=384, window=64, max_seps=64,
                  batch_size=64, max_steps=750, learning_rate=1e-3, warmup_steps=100, compile=True)

RANK = int(os.environ.get("RANK", 0))  # of this process, by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
EVAL_BATCHES = 16  # of a validation


def train(cfg, model, data, resumed=None):
    """Train `model` to cfg.max_steps or to a signal. Returns the exit code.

    data: of `load_data`; resumed: the checkpoint's `optimizer` and `step`, to continue from there.
    ValueError when a loss is not finite, OSError when out_dir cannot be written.
    """
    train_tokens, val_tokens, meta = data
    device = torch.device(cfg.device)
    model.to(device).train()
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    gains = [weight for weight in model.parameters() if weight.dim() != 2]
    optimizer = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=0.1), dict(params=gains, weight_decay=0)],
        betas=(0.9, 0.95), fused=True)
    step = 0
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        step = resumed["step"]
    forward = torch.compile(model) if cfg.compile else model
    if WORLD_SIZE > 1:
        forward = DistributedDataParallel(forward)

    def loss_of(tokens, *seed):
        """The mean loss of this process's share of a batch. Its seed is (0, cfg.seed, step) or, in
        a validation, (1, 0, number of the batch).
        """
        rng = np.random.default_rng(seed)
        x, y = get_batch(tokens, meta, cfg.batch_size, model.config.block_size, rng)
        x, y = x[RANK::WORLD_SIZE].to(device), y[RANK::WORLD_SIZE].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return forward(x, y)[1]

    @torch.no_grad()
    def evaluate():
        """The validation loss, on the same batches every time."""
        losses = [loss_of(val_tokens, 1, 0, i).item() for i in range(EVAL_BATCHES)]
        return mean_over_processes(sum(losses) / EVAL_BATCHES, device)

    def log(**line):
        # the training is worth more than its log
        with contextlib.suppress(OSError), open(Path(cfg.out_dir, "log.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")

    signals = []  # heard so far; from now on they end the program in its own time
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, lambda number, frame: signals.append(number))
    numbers = {}  # shown at the bar
    is_saved = True
    bar = tqdm(None, "training", cfg.max_steps, initial=step, disable=RANK > 0)
    while True:
        # every process stops if one has heard a signal
        is_last = step >= cfg.max_steps or mean_over_processes(len(signals), device) > 0
        is_eval_step = step % cfg.eval_every == 0 or step == cfg.max_steps
        if is_eval_step:
            numbers["val_loss"] = evaluate()
            log(step=step, val_loss=numbers["val_loss"])
        require(all(map(math.isfinite, numbers.values())),
                f"the loss is not finite at step {step}; {cfg.out_dir}/ckpt.pt is from before: "
                f"start from it with --init_from and a lower --learning_rate")
        if RANK == 0 and (is_eval_step or is_last):
            info = dict(model_config=asdict(model.config), train_config=asdict(cfg), data=meta)
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                         info=json.dumps(info))
            path = Path(cfg.out_dir, "ckpt.pt")
            is_saved = save_checkpoint(path, state)
            n_signals = len(signals)
            while is_last and not is_saved and len(signals) == n_signals:
                time.sleep(5)  # what was trained waits for room on the disk; a signal ends it
                is_saved = save_checkpoint(path, state)
        if is_last:
            break

        start = time.perf_counter()
        lr = get_lr(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(train_tokens, 0, cfg.seed, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        n_tokens = cfg.batch_size * model.config.block_size
        new = dict(loss=mean_over_processes(loss.item(), device),
                   tokens_per_s=round(n_tokens / (time.perf_counter() - start)))
        numbers |= new
        bar.set_postfix({name: f"{number:,.5g}" for name, number in numbers.items()}, refresh=False)
        bar.update()
        log(step=step, lr=lr, **new)
    bar.close()
    out_dir = shlex.quote(cfg.out_dir)
    if step < cfg.max_steps or not is_saved:
        print(f"stopped at step {step}; go on with: python train.py --resume --out_dir {out_dir}",
              file=sys.stderr)
        return 1
    print(f"validation loss {numbers['val_loss']:.4f} nats per token after {step} steps; sample "
          f"from it with:\n  python sample.py --ckpt {out_dir}/ckpt.pt --stream", file=sys.stderr)
    return 0


def get_lr(step, cfg):
    """The learning rate of a step: linear warm-up, then half a cosine down to a tenth."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)  # 0 ... 1
    return cfg.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(progress, 1)))


def mean_over_processes(number, device):
    if WORLD_SIZE == 1:
        return number
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / WORLD_SIZE


# ---- checkpoints


def save_checkpoint(path, state):
    """Write a checkpoint; at any time `path` holds a whole one. False if that failed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's place
        os.replace(partial, path)
        return True
    except (OSError, RuntimeError) as error:
        print(f"\n{path} could not be written, and is as it was: {error}", file=sys.stderr)
        return False
    finally:
        partial.unlink(missing_ok=True)


def load_any(path):
    """The GPT in a checkpoint or in a Hugging Face folder."""
    return GPT.from_pretrained(path) if Path(path).is_dir() else load_checkpoint(path)[0]


def load_checkpoint(path):
    """The GPT in a checkpoint, and the rest of its state. ValueError if it is none, or damaged."""
    require(Path(path).is_file(), f"there is no checkpoint {path}; train one with: python train.py")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["info"] = json.loads(state["info"])
        model = GPT(GPTConfig(**state["info"]["model_config"]))
        model.load_state_dict(state.pop("model"))
    except Exception as error:  # whatever a damaged or foreign file makes the readers say
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or no checkpoint of this program ({reason})") from None
    return model, state


# ---- the command line


class Output:
    """Standard error, which may be closed, a broken pipe or a full disk: that stops no training."""

    def write(self, text):
        with contextlib.suppress(Exception):
            sys.__stderr__.write(text)
            sys.__stderr__.flush()

    def flush(self):
        pass


def check_device(name):
    """ValueError if PyTorch finds no such device here."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {error}") from None


def start(options):
    """Put together what the options ask for, and train. Returns the exit code."""
    resume, init_from = options.pop("resume"), options.pop("init_from")
    settings = PRESET | options
    attention = fields_of(SepConfig, options)
    settled = fields_of(GPTConfig, options).keys()  # by the model that the training starts from
    model = state = None
    if resume:
        out_dir = options.get("out_dir", TrainConfig.out_dir)
        model, state = load_checkpoint(Path(out_dir, "ckpt.pt"))
        # the folder may have been moved
        settings = state["info"]["train_config"] | {"out_dir": out_dir} | options
    elif init_from:
        settled = settled - attention.keys()
        model = load_any(init_from)
    require(model is None or not settled,
            f"the model that the training starts from has settled {', '.join(settled)}")
    cfg = TrainConfig(**fields_of(TrainConfig, settings))
    require(cfg.batch_size > 0 and cfg.batch_size % WORLD_SIZE == 0 and cfg.eval_every > 0,
            "eval_every must be at least 1, and batch_size a multiple of the number of processes")
    check_device(cfg.device)

    folder = find_data(cfg.data)
    if RANK == 0 and cfg.data == "docs" and not (folder / "train.bin").exists():
        prepare(folder, read_docs())
    if WORLD_SIZE > 1:
        dist.barrier()
    data = load_data(cfg.data)
    meta = data[2]
    tokenizer = folder / "tokenizer.json"
    if model is None:
        torch.manual_seed(cfg.seed)
        model = GPT(GPTConfig(**fields_of(GPTConfig, settings | meta)))
    elif resume:
        require(state["info"]["data"] == meta, f"the data {cfg.data} is not what the run was "
                f"trained on; --init_from accepts other data")
    else:
        n_more = model.config.vocab_size - meta["vocab_size"]  # a tokenizer may know fewer
        require(n_more == 0 or n_more > 0 and tokenizer.exists(), f"the vocabulary of {cfg.data} "
                f"is not the model's; prepare it with: data/prepare.py --tokenizer {init_from}")
        model.configure(separators=meta["separators"], **attention)
    out_dir = Path(cfg.out_dir)
    require(resume or not (out_dir / "ckpt.pt").exists(),
            f"{out_dir} holds a run: go on with --resume, or give another --out_dir")
    out_dir.mkdir(parents=True, exist_ok=True)
    if tokenizer.exists():  # whoever samples from the checkpoint needs it
        shutil.copy(tokenizer, out_dir)
    return train(cfg, model, data, state)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, TrainConfig, **PRESET)
    add_options(parser, GPTConfig, **PRESET)
    start_from = parser.add_mutually_exclusive_group()
    start_from.add_argument("--init_from", help="start from the weights of this "
                        "checkpoint or pretrained folder; its attention may change")
    start_from.add_argument("--resume", action="store_true",
                        help="continue the run in out_dir from the step of its checkpoint")
    options = vars(parser.parse_args())
    sys.stderr = Output()
    if WORLD_SIZE > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from now on
        dist.init_process_group()
    try:
        sys.exit(start(options))
    except KeyboardInterrupt:  # while the data is prepared; later on it saves a checkpoint
        sys.exit("train.py: stopped before the training began")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"train.py: {error}")
    finally:
        if WORLD_SIZE > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
