"""A step of decoding is recorded once and then replayed, or compiled: shown without a GPU.

In place of a CUDA graph, `trace` keeps the operations of a step, with their numbers and addresses.
"""
import contextlib
import functools
import inspect
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from test_stream import MODES, model_of, take_in
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import model
from model import GPT, RecordedStep, sample_token
from sep_cache import SepCache


def tensors_of(*values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


@contextlib.contextmanager
def without_effect(step):
    """Whatever the step does is taken back, since a GPU that records does nothing yet."""
    names = inspect.getclosurevars(step).nonlocals
    state = tensors_of(names["token"], vars(names["cache"]))
    before = [x.clone() for x in state]
    with torch.random.fork_rng([]):
        yield
    for x, value in zip(state, before, strict=True):
        x.copy_(value)


def trace(step, device):
    """As `model.record`, on a CPU."""
    with without_effect(step):
        return make_fx(step)()


@torch.no_grad()
def write(gpt, seed, ids, *settings):
    """The tokens of two generators that take turns with one cache, and chunks of text between."""
    torch.manual_seed(seed)
    cache = SepCache(gpt.config, len(ids), ids.device)
    generators = [gpt.generate(ids, 1000, *settings, cache) for _ in range(2)]
    tokens = []
    for i in range(200):
        if i % 70 == 69:
            gpt(ids, cache=cache)
        tokens.append(next(generators[i // 40 % 2]))
    return torch.stack(tokens)


@pytest.mark.parametrize("attn", MODES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_replayed_steps_write_the_tokens_of_plain_steps(seed, tiny, monkeypatch, attn, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    record = trace if device == "cpu" else model.record
    replays = []

    def record_and_count(step, device):
        replays.append(record(step, device))
        assert replays[-1] is not step
        return replays[-1]

    gpt = model_of(tiny(attn=attn, block_size=64, window=30)).float().to(device)
    for B, *settings in [(1, 0, None), (3, 0.8, 3), (3, 1.0, None)]:
        ids = torch.randint(12, (B, 20), device=device)
        monkeypatch.setattr(model, "record", lambda step, device: step)
        expected = write(gpt, seed, ids, *settings)
        monkeypatch.setattr(model, "record", record_and_count)
        assert write(gpt, seed, ids, *settings).equal(expected)
    assert len(replays) >= 9


def test_a_recording_is_replayed_with_its_own_buffers_only(monkeypatch):
    done = []

    def record(step, device):
        done.append("record")
        return lambda: done.append("replay")

    monkeypatch.setattr(model, "record", record)
    cache = SimpleNamespace(row_position=torch.zeros(1, 64), past_horizon=False)
    step = RecordedStep(lambda: done.append("run"), cache)
    at_the_same_address = cache.row_position.detach()
    for change in [{}, {"row_position": at_the_same_address}, {"past_horizon": True}]:
        vars(cache).update(change)
        for _ in range(3):
            step()
    assert done == ["run", "record", "replay", "replay"] * 3


def test_a_recording_that_fails_is_said_and_changes_no_token(seed, tiny, monkeypatch):
    gpt = model_of(tiny()).float()
    ids = torch.randint(12, (2, 10))
    expected = write(gpt, seed, ids, 1.0, None)
    record = model.record

    def record_on_gpu(step, device):
        with without_effect(step):
            return record(step, torch.device("cuda", 0))

    cuda = mock.MagicMock()
    cuda.graph.return_value.__exit__.side_effect = RuntimeError("capture failed")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(model, "record", record_on_gpu)
    monkeypatch.setattr(model, "capture_stream", cuda.Stream)
    with pytest.warns(UserWarning, match="without a CUDA graph: capture failed"):
        tokens = write(gpt, seed, ids, 1.0, None)
    assert tokens.equal(expected)
    cuda.set_stream.assert_called_with(cuda.current_stream())


class OnMeta(TorchDispatchMode):
    """All tensors must be on the meta device; there, to ask for a number is an error."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        assert all(x.is_meta for x in tensors_of(args, kwargs, out)), function
        return out


@torch.no_grad()
@pytest.mark.parametrize("attn", MODES)
def test_a_step_is_work_of_the_device_alone(tiny, attn):
    gpt = GPT(tiny(attn=attn, max_seps=3))
    cache = SepCache(gpt.config)
    gpt(torch.zeros(1, 30, dtype=torch.int64), cache=cache)  # beyond block_size
    gpt.to("meta")
    vars(cache).update(tree_map_only(torch.Tensor, lambda x: x.to("meta"), vars(cache)))
    token = torch.zeros(1, 1, dtype=torch.int64, device="meta")

    def step():
        logits, _ = gpt(token, cache=cache)
        sample_token(logits[:, -1], 0.8, 5)

    step()  # makes what is made once
    with OnMeta():
        step()


@pytest.mark.parametrize("attn", MODES)
@pytest.mark.parametrize("window", [5, 50, 150])
def test_few_buffers_with_memory_of_their_own_serve_a_long_text(seed, tiny, attn, window):
    cache = SepCache(tiny(attn=attn, window=window, block_size=256), batch_size=2)
    buffer = None
    sizes = []
    for i, token in enumerate(torch.randint(12, (2, 3000)).split(1, dim=1)):
        take_in(cache, token)
        state = *cache.kv, cache.row_kept, cache.next_row, cache.next_position
        addresses = [x.untyped_storage().data_ptr() for x in state]
        assert len(set(addresses)) == len(addresses)
        if cache.row_position is not buffer:
            buffer = cache.row_position
            sizes.append(buffer.shape[1])
            first, first_addresses = i, addresses
        assert addresses == first_addresses
    assert all(size % 64 == 0 for size in sizes)
    assert len(sizes) <= (14 if attn == "full" else 4), sizes
    assert first < 2700 or attn == "full"


def test_a_step_is_compiled_for_some_rows_for_any_number_and_at_the_horizon(seed, tiny,
                                                                            monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounter()
    how = dict(backend=counter, fullgraph=True)  # no part of a step is left to Python
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, **how))
    gpt = GPT(tiny(window=50, block_size=128))
    ids = torch.randint(12, (2, 20))
    for settings in [(1.0, None), (0, None), (0.5, None), (0.8, 3), (2.0, 5)]:
        tokens = gpt.generate(ids, 300, *settings, compile=True)
        assert len(list(tokens)) == 300 and counter.frame_count == 3, settings


def test_any_number_of_models_compiles_in_one_process(tiny, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for window in range(1, 11):
        gpt = GPT(tiny(n_layer=1, window=window))
        assert len(list(gpt.generate(torch.zeros(1, 1), 3, compile=True))) == 3


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_compiled_steps_write_the_tokens_of_plain_steps(seed, tiny):
    torch._dynamo.reset()
    gpt = model_of(tiny(max_seps=3))
    ids = torch.randint(12, (2, 10))
    plain = list(gpt.generate(ids, 50, temperature=0))
    compiled = list(gpt.generate(ids, 50, temperature=0, compile=True))
    assert all(a.equal(b) for a, b in zip(plain, compiled, strict=True))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_token_is_minus_1_once_logits_are_not_finite(tiny, temperature):
    gpt = GPT(tiny())
    tokens = gpt.generate(torch.zeros(2, 3, dtype=torch.int64), 3, temperature)
    assert next(tokens).min() >= 0
    gpt.norm.weight.data.fill_(torch.nan)
    assert next(tokens).tolist() == [-1, -1]
