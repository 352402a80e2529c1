"""A stream computes what one forward over the whole text computes, in memory that does not grow."""
import math
import random
import sys
import time

import pytest
import torch
from test_mask import definition_mask
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
import sep_cache
from model import GPT, forward_cos_sin, rope_cos_sin, rope_frequencies
from sep_cache import SepCache

try:
    import resource
except ImportError:  # Windows
    resource = None

MODES = ["full", "streamingllm", "fixed", "sep"]
SPARSE = MODES[1:]


def split(T):
    """Random sizes of chunks that add up to T; long chunks, short ones, single tokens."""
    sizes = []
    while sum(sizes) < T:
        sizes.append(min(T - sum(sizes), random.choice([1, 1, 2, 3, random.randint(1, T)])))
    return sizes


def model_of(config, dtype=torch.float64):
    model = GPT(config).to(dtype)
    for p in model.parameters():  # untrained attention is nearly uniform: sharper shows mistakes
        p.data.mul_(3)
    return model.eval()


def in_chunks(model, ids, sizes):
    cache = SepCache(model.config, len(ids), dtype=model.embed.weight.dtype)
    nbytes = cache.nbytes
    logits = torch.cat([model(chunk, cache=cache)[0] for chunk in ids.split(sizes, dim=1)], dim=1)
    assert cache.n_tokens == int(cache.position) == ids.shape[1]
    assert cache.is_full or cache.nbytes == nbytes
    return logits


def random_config(tiny, attn):
    return tiny(attn=attn, window=random.choice([1, 2, 5, 40]), sinks=random.choice([0, 1, 3, 9]),
                max_seps=random.choice([0, 1, 3, None]), block_size=random.choice([1, 8, 16, 90]),
                separators=random.choice([(), (1,), (1, 2, 3), tuple(range(12))]))


@pytest.mark.parametrize("attn", MODES)
@torch.no_grad()
def test_stream_equals_full_forward(seed, tiny, attn):
    for _ in range(40):
        config = random_config(tiny, attn)
        model = model_of(config)
        ids = torch.randint(12, (random.randint(1, 3), random.randint(1, 80)))
        whole = model(ids)[0]
        assert (whole - in_chunks(model, ids, split(ids.shape[1]))).abs().max() < 1e-9, config
        model.float()
        error = (model(ids)[0] - in_chunks(model, ids, split(ids.shape[1]))).abs().max()
        assert error < 1e-4 * whole.abs().max().clamp(min=1), config


@torch.no_grad()
def test_stream_equals_full_forward_50_times_longer_than_block_size(seed, tiny):
    for attn in MODES:
        for max_seps in (4, None):
            model = model_of(tiny(attn=attn, max_seps=max_seps))
            ids = torch.randint(12, (2, 800))
            assert (model(ids)[0] - in_chunks(model, ids, split(800))).abs().max() < 1e-9


@torch.no_grad()
def test_ragged_batch_equals_its_sequences(seed, tiny):
    model = model_of(tiny(max_seps=None))
    separators = torch.full((90,), 1)
    no_separators = torch.full((90,), 5)
    ids = torch.stack([separators, no_separators, torch.randint(12, (90,))])
    together = in_chunks(model, ids, split(90))
    alone = torch.cat([in_chunks(model, text[None], split(90)) for text in ids])
    assert (together - alone).abs().max() < 1e-9


@torch.no_grad()
def test_hidden_tokens_have_no_influence_at_all(seed, tiny):
    """In one layer, the last query changes exactly with the keys that it sees."""
    model = model_of(tiny(n_layer=1, window=4, sinks=1, max_seps=1, separators=(1, 2)))
    ids = torch.tensor([[5, 6, 1, 7, 8, 1, 9, 9, 9, 9, 9]])
    visible = {0: True, 1: False, 2: False, 4: False, 5: True, 6: False, 7: True}
    for j in visible:
        changed = ids.clone()
        changed[0, j] = 2 if ids[0, j] == 1 else 10  # a separator becomes another one
        difference = (model(ids)[0][0, -1] - model(changed)[0][0, -1]).abs().max()
        assert (difference > 1e-6) == visible[j], j


@torch.no_grad()
def test_no_key_is_used_at_an_untrained_distance(seed, tiny):
    """Separators beyond the horizon are hidden, and q_sink stands at block_size - 1."""
    config = tiny(n_layer=1, n_head=1, n_embd=8, window=3, sinks=2, block_size=8, max_seps=None,
                  separators=tuple(range(12)))
    model = model_of(config)
    ids = torch.randint(12, (1, 60))
    hidden = ids.clone()
    hidden[0, 2:60 - 8] = torch.randint(12, (50,))  # all at a distance of block_size or more
    assert (model(ids)[0][0, -1] - model(hidden)[0][0, -1]).abs().max() < 1e-12
    frequencies = rope_frequencies(8, 10000.0, torch.device("cpu"))
    cos_sin, sink_cos_sin = forward_cos_sin(torch.arange(60), frequencies, torch.float64, config)
    for expected, sink in zip(cos_sin, sink_cos_sin, strict=True):
        assert torch.equal(expected[:8], sink[:8])
        assert (sink[8:] == expected[7]).all()


def peak_kib():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else peak


@pytest.mark.skipif(resource is None, reason="the peak memory is read with a Unix call")
@pytest.mark.parametrize("attn", SPARSE)
@torch.no_grad()
def test_memory_and_time_are_constant_over_200_000_tokens(seed, tiny, attn):
    model = GPT(tiny(attn=attn, n_layer=1, max_seps=None)).eval()

    def read(cache):
        clock = time.perf_counter()
        model(torch.randint(12, (1, 1000)), cache=cache)
        return time.perf_counter() - clock

    old, young = SepCache(model.config), SepCache(model.config)
    nbytes = old.nbytes
    address = old.kv.data_ptr()
    for n_read in range(0, 180_000, 1000):
        read(old)
        if n_read == 20_000:
            peak = peak_kib()
    # each of its last thousands against one of another stream's first: the machine may be shared
    slower = torch.tensor([read(old) / read(young) for _ in range(20)]).median()
    assert old.n_tokens == 200_000 and old.kv.data_ptr() == address
    assert old.nbytes == young.nbytes == nbytes
    assert peak_kib() - peak < 20_000
    assert slower < 1.3


@torch.no_grad()
def test_only_the_ordinary_cache_grows_and_seldom(tiny):
    cache = SepCache(tiny(attn="full"))
    model = GPT(cache.config)
    sizes = []
    for _ in range(300):
        model(torch.ones(1, 1, dtype=torch.int64), cache=cache)
        sizes.append(cache.nbytes)
    assert sizes == sorted(sizes) and 2 <= len(set(sizes)) <= 12
    for attn in SPARSE:
        for max_seps in (0, 5, None):
            config = tiny(attn=attn, max_seps=max_seps)
            slots = config.sinks + config.far_capacity + 1 + config.window
            assert SepCache(config).kv.shape[4] == slots <= config.sinks + config.block_size + 1


def test_the_cache_holds_what_the_latest_token_sees(seed, tiny):
    for _ in range(20):
        config = random_config(tiny, "sep")
        config.n_layer, config.n_embd, config.n_head = 1, 2, 1
        ids = torch.randint(12, (1, 60))
        cache = SepCache(config)
        n_read = 0
        for size in split(60):
            positions, _ = cache.advance(ids[:, n_read:n_read + size])
            key = positions.float().view(1, 1, -1, 1).expand(1, 1, size, 2)
            cache.update(key, key, layer_idx=0)
            n_read += size
            slots = cache.visible_slots(cache.position - 1)[0]
            seen = cache.kv[0, 0, 0, 0, slots, 0].long()
            mask = definition_mask(ids[0, :n_read].tolist(), config)
            assert sorted(seen.tolist()) == mask[-1].nonzero()[:, 0].tolist(), config
            assert cache.n_visible_keys == len(seen)


def test_cache_refuses_another_batch_size_and_another_dtype(tiny):
    model = GPT(tiny())
    with pytest.raises(ValueError, match="holds 2 sequences"):
        model(torch.zeros(3, 4, dtype=torch.int64), cache=SepCache(tiny(), batch_size=2))
    for T in (1, 4):
        cache = SepCache(tiny(), dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="holds torch.bfloat16, and got keys of torch.float32"):
            model(torch.zeros(1, T, dtype=torch.int64), cache=cache)


def test_a_stream_keeps_no_graph_of_its_past(tiny):
    cache = SepCache(tiny())
    assert cache.n_visible_keys == 0
    model = GPT(tiny())
    for T in (9, 1, 30):
        model(torch.zeros(1, T, dtype=torch.int64), cache=cache)
        assert not cache.kv.requires_grad and not cache.sink_keys.requires_grad


def test_training_after_generating_in_one_process(tiny):
    """What is made once, in inference mode, serves the backward pass, too."""
    sep_cache._separator_tables.clear()
    model_module._rope_frequencies.clear()
    model = GPT(tiny())
    ids = torch.randint(12, (1, 20))
    list(model.generate(ids, 3))
    _, loss = torch.compile(model, fullgraph=False, backend="aot_eager")(ids, ids)
    loss.backward()
    assert model.embed.weight.grad.isfinite().all()


def test_position_4_000_000_is_as_precise_as_position_4():
    frequencies = rope_frequencies(8, 10000.0, torch.device("cpu"))
    for position in (4, 4_000_000, 4_000_000_000):
        cos, sin = rope_cos_sin(torch.tensor([position]), frequencies, torch.float32)
        for pair in range(4):
            angle = math.fmod(position * 10000 ** (-pair / 4), 2 * math.pi)
            assert abs(cos[0, pair].item() - math.cos(angle)) < 1e-6
            assert abs(sin[0, pair + 4].item() - math.sin(angle)) < 1e-6


@torch.no_grad()
def test_greedy_decoding_equals_greedy_full_forwards(seed, tiny):
    for attn in MODES:
        model = model_of(tiny(attn=attn, max_seps=3), torch.float32)
        ids = torch.randint(12, (2, 7))
        streamed = torch.stack(list(model.generate(ids, 60, temperature=0)), dim=1)
        for _ in range(60):
            ids = torch.cat([ids, model(ids)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(ids[:, 7:], streamed)


@pytest.mark.parametrize("attn", SPARSE)
@torch.no_grad()
def test_a_decoding_step_reuses_its_memory_from_the_first_token_on(seed, tiny, attn):
    """What a captured CUDA graph needs: the same addresses, shapes and operations in each step."""
    model = model_of(tiny(attn=attn, max_seps=3))
    cache = SepCache(model.config, 2, dtype=torch.float64)
    model(torch.randint(12, (2, 5)), cache=cache)

    def state():
        tensors = (cache.kv, cache.sink_keys, cache.position, cache.slot_position, cache.slot_kept,
                   cache.n_seps)
        return [x.data_ptr() for x in tensors]

    addresses = state()
    operations = set()
    for _ in range(40):
        with Recorder() as recorder:
            model(torch.randint(12, (2, 1)), cache=cache)
        operations.add(str(recorder.calls))
        assert state() == addresses
    assert len(operations) == 1 and len(recorder.calls) > 50
    assert "_local_scalar_dense" not in operations.pop()  # no wait for the device
    assert int(cache.position) == cache.n_tokens == 45


class Recorder(TorchDispatchMode):
    """The operations that run, with the shapes of their results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.calls.append((str(operation), getattr(result, "shape", None)))
        return result
