"""Training: from scratch, from another model (post-training), resumed, on several devices.

    python train.py                  prepares its data if need be; trains a preset for this machine
    python train.py --resume         continues out/ckpt.pt exactly, to the last digit on a CPU
    python train.py --init_from out-full/ckpt.pt --attn sep --out_dir out-post
                                     continues an ordinary model's training with separators
    python train.py --init_from FOLDER --attn sep --data NAME --learning_rate 1e-4
                                     the same with a pretrained model, see `pretrained.py`
    torchrun --standalone --nproc_per_node=2 train.py
                                     data-parallel, the same losses as one process

The one idea: the batch of a step is a function of (seed, step). So a resumed run knows its data
without any saved state, and so does each process of a parallel run.
"""
import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data.loader import find_data, get_batch, load_data
from data.prepare import prepare, read_docs
from model import GPT, GPTConfig
from options import check_minima, explain, fields_of, option, parse_options, require, run_script
from pretrained import load_checkpoint, load_model
from sep_kernel import is_modern
from sep_mask import SepConfig

EVAL_BATCHES = 16  # of a validation
WORLD_SIZE, RANK = 1, 0  # the number of processes, and that of this one; only 0 writes and speaks
if dist.is_torchelastic_launched():  # by torchrun
    WORLD_SIZE = int(os.environ["WORLD_SIZE"])
    RANK = int(os.environ["RANK"])


@dataclass
class TrainConfig:
    """How to train."""
    data: str = option("docs", "folder with train.bin and val.bin, or its name below data/")
    out_dir: str = option("out", "where ckpt.pt and log.jsonl go")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu",
                         "cpu, cuda, cuda:N or another device of PyTorch")
    batch_size: int = option(16, "sequences per step, over all devices", 1)
    micro_batch_size: int | None = option(None, "how many of them a device computes at once: fewer "
                                          "need less memory, the losses are the same; None: all", 1)
    max_steps: int = option(1000, "length of the training", 0)
    learning_rate: float = option(3e-3, "peak learning rate", 0)
    warmup_steps: int = option(50, "steps of rising learning rate; then it falls to a tenth", 1)
    eval_every: int = option(250, "steps between validations, each of which writes the checkpoint",
                             1)
    compile: bool = option(False, "compile the model with torch.compile")
    seed: int = option(0, "of the initial weights and of the order of the data", 0)
    init_from: str = option(None, "start from the weights of this checkpoint or pretrained folder; "
                                  "its attention may change")
    resume: bool = option(False, "continue the run in out_dir from the step of its checkpoint")

    def __post_init__(self):
        check_minima(self)
        require(self.batch_size >= WORLD_SIZE,
                f"batch_size must be at least {WORLD_SIZE}, the number of processes")


# What `python train.py` alone does, by machine. Everything else is the default of its field.
PRESET = dict(window=32, max_seps=16)
if torch.cuda.is_available():
    PRESET = dict(block_size=1024, n_layer=6, n_head=6, n_embd=384, max_seps=64, batch_size=64,
                  micro_batch_size=16, max_steps=750, learning_rate=1e-3, warmup_steps=100,
                  compile=True)


def train(cfg, model, data, state=None):
    """Train `model` to cfg.max_steps or to a signal. Returns the exit code.

    data: of `load_data`; state: the rest of the checkpoint to continue from. ValueError when a loss
    is not finite.
    """
    train_tokens, val_tokens, meta = data
    device = torch.device(cfg.device)
    block_size = model.config.block_size
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), fused=True)
    step = 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    has_bf16 = is_modern(device)
    network = model
    if cfg.compile and (has_bf16 or device.type != "cuda"):
        network = torch.compile(model)

    def parts_of_loss(tokens, batch_seed):
        """The parts of a batch's mean loss, one for each micro-batch of this process. Over all
        processes they add up to it.

        batch_seed: (0, cfg.seed, step) or, in a validation, (1, 0, number of the batch).
        """
        rng = np.random.default_rng(batch_seed)
        x, y = (part[RANK::WORLD_SIZE].to(device)
                for part in get_batch(tokens, cfg.batch_size, block_size, rng))
        size = cfg.micro_batch_size or len(x)
        for ids, targets in zip(x.split(size), y.split(size)):
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16):
                _, loss = network(ids, targets)
            yield loss * (len(ids) / cfg.batch_size)

    bar = tqdm(None, "training", cfg.max_steps, initial=step)
    signals = catch_signals()
    n_signals = 0  # of all processes: all stop if one has caught a signal
    while step < cfg.max_steps and n_signals == 0:
        if step % cfg.eval_every == 0:
            val_loss = validate(cfg, parts_of_loss, val_tokens, step)
            save_checkpoint(cfg, meta, model, optimizer, step)
            bar.set_description(f"training, validation loss {val_loss:.4f}")

        start = time.perf_counter()
        lr = get_lr(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = 0
        for part in parts_of_loss(train_tokens, (0, cfg.seed, step)):
            part.backward()
            loss += part.detach()
        if WORLD_SIZE > 1:
            for weight in model.parameters():
                dist.all_reduce(weight.grad)  # the sum over processes
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        loss, n_signals = sum_over_processes(device, loss.item(), len(signals))
        speed = cfg.batch_size * block_size / (time.perf_counter() - start)
        log(cfg, step, loss=loss, lr=lr, tokens_per_s=speed)
        bar.set_postfix(loss=f"{loss:.4f}", tokens_per_s=f"{speed:,.0f}", refresh=False)
        bar.update()

    bar.close()
    is_done = step >= cfg.max_steps
    if is_done:
        val_loss = validate(cfg, parts_of_loss, val_tokens, step)
    is_finished = save_checkpoint(cfg, meta, model, optimizer, step) and is_done
    out_dir = shlex.quote(cfg.out_dir)
    summary = f"stopped at step {step}; go on with: python train.py --resume --out_dir {out_dir}"
    if is_finished:
        summary = (f"validation loss {val_loss:.4f} nats per token after {step} steps; sample from "
                   f"it with:\n  python sample.py --ckpt {out_dir}/ckpt.pt --stream")
    print(summary, file=sys.stderr)
    return 0 if is_finished else 1


def get_lr(step, cfg):
    """The learning rate of a step: it rises linearly, and falls along half a cosine to a tenth."""
    rising = (step + 1) / cfg.warmup_steps
    falling = 0.55 + 0.45 * math.cos(math.pi * step / cfg.max_steps)
    return cfg.learning_rate * min(rising, falling)


# ---- around the steps: validation, the log, signals, checkpoints


@torch.no_grad()
def validate(cfg, parts_of_loss, val_tokens, step):
    """The validation loss, on the same batches every time."""
    total = 0
    for i in tqdm(range(EVAL_BATCHES), "validation", leave=False):
        total += sum(part.item() for part in parts_of_loss(val_tokens, (1, 0, i)))
    val_loss, = sum_over_processes(cfg.device, total / EVAL_BATCHES)
    log(cfg, step, val_loss=val_loss)
    return val_loss


def sum_over_processes(device, *numbers):
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    return total.tolist()


def log(cfg, step, **numbers):
    """Write a line of log.jsonl. ValueError if a number is not finite."""
    require(all(map(math.isfinite, numbers.values())),
            f"the loss is not finite at step {step}; a ckpt.pt in {cfg.out_dir} is from before: "
            f"start from it with --init_from, a lower --learning_rate and another --out_dir")
    if RANK == 0:
        # the training is worth more than its log
        with contextlib.suppress(OSError), open(Path(cfg.out_dir, "log.jsonl"), "a") as file:
            print(json.dumps(dict(step=step, **numbers)), file=file)


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
    info = json.dumps(
        dict(model_config=asdict(model.config), train_config=asdict(cfg), data=meta))
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, info=info)
    path = Path(cfg.out_dir, "ckpt.pt").resolve()  # it may be a link
    partial = path.with_name(f".ckpt.pt.{os.getpid()}")
    try:
        torch.save(state, partial)
        os.replace(partial, path)
        return True
    except (OSError, RuntimeError) as error:
        print(f"\n{path} could not be written, and is as it was: {error}", file=sys.stderr)
        return False
    finally:
        for partial in path.parent.glob(".ckpt.pt.*"):  # if that failed, or a run was killed
            partial.unlink()


# ---- the command line


def start(options):
    """Put together what the options ask for, and train. Returns the exit code."""
    cfg = TrainConfig(**fields_of(TrainConfig, PRESET | options))
    path = Path(cfg.out_dir, "ckpt.pt")
    state = None
    if cfg.resume:
        model, state = load_checkpoint(path)
        # options come before what the run began with; and its folder may have moved
        old = state["info"]["train_config"] | dict(out_dir=cfg.out_dir)
        cfg = TrainConfig(**fields_of(TrainConfig, old | options))
    else:
        require(not path.exists(), f"{path} is of an earlier run: go on with --resume, or give "
                "another --out_dir")
        os.makedirs(cfg.out_dir, exist_ok=True)
    if WORLD_SIZE > 1:
        if cfg.device == "cuda":  # each process has its own
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(dist.get_default_backend_for_device(cfg.device))
    if RANK == 0 and cfg.data == "docs":
        with contextlib.suppress(FileExistsError):  # it is there already
            prepare(find_data("docs"), read_docs())
    if WORLD_SIZE > 1:
        dist.barrier()
    data = load_data(cfg.data)
    *_, meta = data

    if cfg.resume:
        require(state["info"]["data"]["checksums"] == meta["checksums"], f"the data {cfg.data} is "
                f"not what the run was trained on; --init_from accepts other data")
    elif cfg.init_from:
        model = load_model(cfg.init_from, separators=meta["separators"],
                           **fields_of(SepConfig, options))
        # without a tokenizer.json, the numbers of tokens have to do
        ours = meta["tokenizer"] or meta["vocab_size"]
        require(ours == (model.tokenizer_json or model.config.vocab_size),
                f"the tokens of {cfg.data} are not those of {cfg.init_from}; prepare it with that "
                "model's tokenizer")
    else:
        torch.manual_seed(cfg.seed)
        # options come before the preset, and what the data says before both
        model = GPT(GPTConfig(**fields_of(GPTConfig, PRESET | options | meta)))
    # a model that was loaded may have another shape or attention than the options ask for
    asked = fields_of(GPTConfig, options)
    require(replace(model.config, **asked) == model.config,
            f"the model has settled its shape and attention, and not all of them are {asked}")
    if RANK == 0 and not cfg.resume:
        settings = asdict(model.config) | asdict(cfg)
        Path(cfg.out_dir, "log.jsonl").write_text(json.dumps(dict(settings=settings)) + "\n")
    code = train(cfg, model, data, state)
    if WORLD_SIZE > 1:
        dist.barrier()  # the first to leave could take the others down
        dist.destroy_process_group()
    return code


def main():
    options = parse_options(__doc__, [TrainConfig, GPTConfig], PRESET)
    with (contextlib.redirect_stderr(sys.stderr if RANK == 0 else open(os.devnull, "w")),
          explain("a smaller --micro_batch_size needs less memory",
                  torch.OutOfMemoryError, MemoryError)):
        return start(options)


if __name__ == "__main__":
    run_script(main)
