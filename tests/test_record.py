"""A step of decoding is recorded once and then replayed, or compiled: shown without a GPU.

In place of a CUDA graph, `trace` keeps the operations of a step, with their numbers and addresses.
"""
import functools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import tiny
from test_stream import MODES, Watch, model_of, take_in
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

import model
from model import GPT, RecordedStep, sample_token


def trace(step, device):
    """As `model.record`, on a CPU. To trace a step is to run it: that is the first replay."""
    def replays():
        graph = make_fx(step)()
        while True:
            yield
            graph()

    return functools.partial(next, replays())


@torch.no_grad()
def write(gpt, ids, *settings):
    """The tokens of two generators that take turns with one cache, and chunks of text between."""
    torch.manual_seed(0)
    cache = gpt.new_cache(len(ids))
    generators = [gpt.generate(ids, 1000, *settings, cache) for _ in range(2)]
    tokens = []
    for i in range(200):
        if i % 70 == 69:
            gpt(ids, cache=cache)
        tokens.append(next(generators[i // 40 % 2]))
    return torch.stack(tokens)


@pytest.mark.parametrize("attn", MODES)
@pytest.mark.parametrize("device, record", [("cpu", trace), ("cuda", model.record)])
@pytest.mark.filterwarnings("error:decoding without a CUDA graph")
def test_replayed_steps_write_the_tokens_of_plain_steps(monkeypatch, attn, device, record):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    record = mock.Mock(side_effect=record)
    gpt = model_of(tiny(attn=attn, block_size=64, window=30)).float().to(device)
    for B, *settings in [(1, 0, None), (3, 0.8, 3), (3, 1.0, None)]:
        ids = torch.randint(12, (B, 20), device=device)
        monkeypatch.setattr(model, "record", lambda step, device: step)
        expected = write(gpt, ids, *settings)
        monkeypatch.setattr(model, "record", record)
        assert write(gpt, ids, *settings).equal(expected)
    assert record.call_count >= 9


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


def test_where_recording_fails_the_step_itself_runs_and_that_is_said(monkeypatch):
    cuda = mock.MagicMock()
    cuda.graph.return_value.__exit__.side_effect = RuntimeError("capture failed")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(model, "capture_stream", cuda.Stream)
    with pytest.warns(UserWarning, match="without a CUDA graph: capture failed"):
        assert model.record(list, torch.device("cuda", 0)) is list
    cuda.set_stream.assert_called_with(cuda.current_stream())


@torch.no_grad()
@pytest.mark.parametrize("attn", MODES)
def test_a_step_is_work_of_the_device_alone(attn):
    """On the meta device it is an error to ask for a number."""
    gpt = GPT(tiny(attn=attn, max_seps=3))
    cache = gpt.new_cache()
    gpt(torch.zeros(1, 30).long(), cache=cache)  # beyond block_size
    gpt.to("meta")
    vars(cache).update(tree_map_only(torch.Tensor, lambda x: x.to("meta"), vars(cache)))
    token = torch.zeros(1, 1, device="meta").long()
    with Watch() as watch:
        logits, _ = gpt(token, cache=cache)
        sample_token(logits[:, -1], 0.8, 5)
    assert all(x.is_meta for x in watch.tensors)


@pytest.mark.parametrize("attn", MODES)
@pytest.mark.parametrize("window", [5, 50, 150])
def test_few_buffers_with_memory_of_their_own_serve_a_long_text(attn, window):
    cache = GPT(tiny(attn=attn, window=window, block_size=256)).new_cache(2)
    ids = torch.randint(12, (2, 3000))
    ids[0] = 1  # nothing but separators
    buffers = {}  # {row_position: addresses of all others}
    for token in ids.split(1, dim=1):
        take_in(cache, token)
        state = *cache.kv, cache.row_kept, cache.next_row, cache.next_position
        addresses = [x.untyped_storage().data_ptr() for x in state]
        assert len(set(addresses)) == len(addresses)
        assert addresses == buffers.setdefault(cache.row_position, addresses)
    sizes = [buffer.shape[1] for buffer in buffers]
    assert all(size % 64 == 0 for size in sizes)
    if attn == "full":
        assert len(sizes) <= 14
    else:
        # 2 sinks and 256 others are visible; a quarter more, and 16 spare rows
        assert len(sizes) <= 4 and max(sizes) <= 384, sizes


def test_a_step_is_compiled_for_some_rows_for_any_number_and_at_the_horizon(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounter()
    # fullgraph: no part of a step is left to Python
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    gpt = GPT(tiny(window=50, block_size=128))
    ids = torch.randint(12, (2, 20))
    for settings in [(1.0, None), (0, None), (0.5, None), (0.8, 3), (2.0, 5)]:
        tokens = gpt.generate(ids, 300, *settings, compile=True)
        assert len(list(tokens)) == 300 and counter.frame_count == 3, settings


def test_any_number_of_models_compiles_in_one_process(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for window in range(1, 11):
        gpt = GPT(tiny(n_layer=1, window=window))
        assert len(list(gpt.generate(torch.zeros(1, 1), 3, compile=True))) == 3


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_token_is_minus_1_once_logits_are_not_finite(temperature):
    gpt = GPT(tiny())
    tokens = gpt.generate(torch.zeros(2, 3, dtype=torch.int64), 3, temperature)
    assert next(tokens).min() >= 0
    gpt.norm.weight.data.fill_(torch.nan)
    assert next(tokens).tolist() == [-1, -1]
