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
of a parallel one, knows its data without any saved state.
"""
import argparse
import contextlib
import dataclasses
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
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from options import add_options, fields_of, option, require, run_script
from pretrained import folder_of, load_checkpoint, load_model
from sep_kernel import is_modern
from sep_mask import SepConfig

EVAL_BATCHES = 16  # of a validation
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)  # processes, of torchrun
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0  # of this one; the first one writes


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
    init_from: str = option(None, "start from the weights of this checkpoint or pretrained folder; "
                                  "its attention may change")
    resume: bool = option(False, "continue the run in out_dir from the step of its checkpoint")

    def __post_init__(self):
        require(self.batch_size > 0 and self.batch_size % WORLD_SIZE == 0 and self.eval_every > 0,
                "eval_every must be at least 1, batch_size a multiple of the number of processes")


# What `python train.py` alone does, by machine. Everything else is the default of its field.
PRESET = dict(block_size=256, n_layer=4, n_head=4, n_embd=128, window=32, max_seps=16)
if torch.cuda.is_available():
    PRESET = dict(block_size=1024, n_layer=6, n_head=6, n_embd=384, window=64, max_seps=64,
                  batch_size=64, max_steps=750, learning_rate=1e-3, warmup_steps=100,
                  compile=True)

def train(cfg, model, data, state=None):
    """Train `model` to cfg.max_steps or to a signal. Returns the exit code.

    data: of `load_data`; state: the rest of the checkpoint to continue from. ValueError when a loss
    is not finite.
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
    if state:
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    has_bf16 = is_modern(device)
    network = model
    if cfg.compile and (has_bf16 or device.type != "cuda"):
        network = torch.compile(model)
    if WORLD_SIZE > 1:
        network = DistributedDataParallel(network)

    def loss_of(tokens, batch_seed):
        """The mean loss of this process's share of a batch. batch_seed: (0, cfg.seed, step) or, in
        a validation, (1, 0, number of the batch)."""
        rng = np.random.default_rng(batch_seed)
        x, y = get_batch(tokens, cfg.batch_size, model.config.block_size, rng)
        x, y = x[RANK::WORLD_SIZE].to(device), y[RANK::WORLD_SIZE].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16):
            _, loss = network(x, y)
        return loss

    bar = tqdm(None, "training", cfg.max_steps, initial=step, disable=RANK > 0)
    signals = catch_signals()
    n_signals = 0  # the mean of all processes: all stop if one has caught a signal
    while step < cfg.max_steps and n_signals == 0:
        if step % cfg.eval_every == 0:
            val_loss = validate(cfg, loss_of, val_tokens, step)
            save_checkpoint(cfg, meta, model, optimizer, step)
            bar.set_description(f"training, validation loss {val_loss:.4f}")

        start = time.perf_counter()
        lr = get_lr(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(train_tokens, (0, cfg.seed, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        loss, n_signals = mean_over_processes(device, loss.item(), len(signals))
        n_tokens = cfg.batch_size * model.config.block_size
        speed = n_tokens / (time.perf_counter() - start)
        log(cfg, step, loss=loss, lr=lr, tokens_per_s=speed)
        bar.set_postfix(loss=f"{loss:.4f}", tokens_per_s=f"{speed:,.0f}", refresh=False)
        bar.update()

    bar.close()
    is_done = step == cfg.max_steps
    if is_done:
        val_loss = validate(cfg, loss_of, val_tokens, step)
    is_saved = save_checkpoint(cfg, meta, model, optimizer, step)
    if RANK > 0:
        return 0
    out_dir = shlex.quote(cfg.out_dir)
    if not (is_done and is_saved):
        print(f"stopped at step {step}; go on with: python train.py --resume --out_dir {out_dir}",
              file=sys.stderr)
        return 1
    print(f"validation loss {val_loss:.4f} nats per token after {step} steps; sample from it with:"
          f"\n  python sample.py --ckpt {out_dir}/ckpt.pt --stream", file=sys.stderr)
    return 0


def get_lr(step, cfg):
    """The learning rate of a step: linear warm-up, then half a cosine down to a tenth."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)  # 0 ... 1
    return cfg.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(progress, 1)))


# ---- around the steps: validation, the log, signals, checkpoints


@torch.no_grad()
def validate(cfg, loss_of, val_tokens, step):
    """The validation loss, on the same batches every time."""
    batches = tqdm(range(EVAL_BATCHES), "validation", leave=False, disable=RANK > 0)
    losses = [loss_of(val_tokens, (1, 0, i)).item() for i in batches]
    val_loss, = mean_over_processes(cfg.device, sum(losses) / EVAL_BATCHES)
    log(cfg, step, val_loss=val_loss)
    return val_loss


def mean_over_processes(device, *numbers):
    if WORLD_SIZE == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return (total / WORLD_SIZE).tolist()


def log(cfg, step, **numbers):
    """Write a line of log.jsonl. ValueError if a number is not finite."""
    require(all(map(math.isfinite, numbers.values())),
            f"the loss is not finite at step {step}; a ckpt.pt in {cfg.out_dir} is from before: "
            f"start from it with --init_from and a lower --learning_rate")
    if RANK == 0:
        # the training is worth more than its log
        with contextlib.suppress(OSError), open(Path(cfg.out_dir, "log.jsonl"), "a") as file:
            file.write(json.dumps(dict(step=step, **numbers)) + "\n")


def catch_signals():
    """A list that grows with each SIGINT, SIGTERM or SIGHUP, which no longer end the program."""
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, lambda number, frame: signals.append(number))
    return signals


def save_checkpoint(cfg, meta, model, optimizer, step):
    """Write out_dir/ckpt.pt; at any time it is whole. Says so and returns False if that failed."""
    if RANK > 0:
        return True
    info = dict(model_config=asdict(model.config), train_config=asdict(cfg), data=meta)
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                 info=json.dumps(info))
    path = Path(cfg.out_dir, "ckpt.pt")
    try:
        for partial in path.parent.glob(".ckpt.pt.*"):  # of a run that was killed
            partial.unlink()
        partial = path.with_name(f".ckpt.pt.{os.getpid()}")
        torch.save(state, partial)
        os.replace(partial, path)
        return True
    except (OSError, RuntimeError) as error:
        print(f"\n{path} could not be written, and is as it was: {error}", file=sys.stderr)
        return False


# ---- the command line


def start(options):
    """Put together what the options ask for, and train. Returns the exit code."""
    settings = PRESET | options
    cfg = TrainConfig(**fields_of(TrainConfig, settings))
    out_dir = Path(cfg.out_dir)
    state = None
    if cfg.resume:
        model, state = load_checkpoint(out_dir / "ckpt.pt")
        # the folder may have moved
        old = state["info"]["train_config"] | dict(resume=True, out_dir=cfg.out_dir)
        cfg = TrainConfig(**fields_of(TrainConfig, old | options))
        for name, value in asdict(cfg).items():
            if value != old.get(name):
                print(f"from here on {name} is {value}, and not {old.get(name)}", file=sys.stderr)
    folder = find_data(cfg.data)
    if RANK == 0 and cfg.data == "docs" and not (folder / "train.bin").exists():
        prepare(folder, read_docs())
    if WORLD_SIZE > 1:
        dist.barrier()
    data = load_data(cfg.data)
    _, _, meta = data
    vocabulary = load_tokenizer(folder).vocabulary

    if cfg.resume:
        require(state["info"]["data"]["checksums"] == meta["checksums"], f"the data {cfg.data} is "
                f"not what the run was trained on; --init_from accepts other data")
    elif cfg.init_from:
        model = load_model(cfg.init_from, separators=meta["separators"],
                           **fields_of(SepConfig, options))
        n_tokens = model.config.vocab_size
        # {token: id}, or the number of tokens where there is no tokenizer.json
        theirs = load_tokenizer(folder_of(cfg.init_from)).vocabulary or n_tokens
        ours = vocabulary or meta["vocab_size"]
        require(ours == theirs and meta["vocab_size"] <= n_tokens, f"the tokens of {cfg.data} are "
                f"not those of {cfg.init_from}; prepare it with: data/prepare.py --tokenizer ...")
    else:
        torch.manual_seed(cfg.seed)
        model = GPT(GPTConfig(**fields_of(GPTConfig, settings | meta)))
    # the model as the options describe it
    asked = asdict(dataclasses.replace(model.config, **fields_of(GPTConfig, options)))
    changes = [f"{name} is {value}, and must be {getattr(model.config, name)}"
               for name, value in asked.items() if value != getattr(model.config, name)]
    require(not changes, f"the model has settled it: {'; '.join(changes)}")

    if cfg.resume and state["step"] >= cfg.max_steps:
        print(f"the run in {out_dir} has finished, at step {state['step']}; it goes on with a "
              "larger --max_steps", file=sys.stderr)
        return 0
    if not cfg.resume and RANK == 0:
        is_free = load_tokenizer(out_dir).vocabulary in (None, vocabulary)
        require(is_free and not (out_dir / "ckpt.pt").exists(), f"{out_dir} holds a run or another "
                "tokenizer.json: go on with --resume, or give another --out_dir")
        out_dir.mkdir(parents=True, exist_ok=True)
        if vocabulary:  # whoever samples from the checkpoint needs it
            shutil.copy(folder / "tokenizer.json", out_dir)
    return train(cfg, model, data, state)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, TrainConfig, PRESET)
    add_options(parser, GPTConfig, PRESET)
    options = vars(parser.parse_args())
    if WORLD_SIZE > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from now on
        dist.init_process_group()
    try:
        return start(options)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"a smaller --batch_size needs less memory: {error}") from None
    finally:
        if WORLD_SIZE > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
