"""A stream computes what one forward over the whole text computes, in memory that does not grow."""
import math
import random
import resource
import time

import pytest
import torch

from model import GPT, rotation
from sep_cache import SepCache

MODES = ["full", "stream", "fixed", "sep"]


def split(T):
    """Random sizes of pieces that add up to T; long pieces, short ones, single tokens."""
    sizes = []
    while sum(sizes) < T:
        sizes.append(min(T - sum(sizes), random.choice([1, 1, 2, 3, random.randint(1, T)])))
    return sizes


def model_of(config, dtype=torch.float64):
    model = GPT(config).to(dtype)
    for p in model.parameters():  # untrained attention is nearly uniform; make it sharp, so that mistakes show
        p.data.mul_(3)
    return model.eval()


def in_pieces(model, ids, sizes):
    cache = SepCache(model.config, len(ids), dtype=model.embed.weight.dtype)
    logits = torch.cat([model(piece, cache=cache)[0] for piece in ids.split(sizes, dim=1)], dim=1)
    assert cache.n_tokens == ids.shape[1]
    return logits


@pytest.mark.parametrize("attn", MODES)
@torch.no_grad()
def test_stream_equals_full_forward(seed, tiny, attn):
    for _ in range(30):
        config = tiny(attn=attn, window=random.choice([1, 2, 5, 40]), sinks=random.choice([0, 1, 3, 9]),
                      max_seps=random.choice([0, 1, 3, None]), separators=random.choice([(), (1,), (1, 2, 3), tuple(range(12))]))
        model, ids = model_of(config), torch.randint(12, (random.randint(1, 3), random.randint(1, 80)))
        whole, streamed = model(ids)[0], in_pieces(model, ids, split(ids.shape[1]))
        assert (whole - streamed).abs().max() < 1e-9, config
        whole32, streamed32 = model.float()(ids)[0], in_pieces(model, ids, split(ids.shape[1]))
        assert (whole32 - streamed32).abs().max() < 1e-4 * whole.abs().max().clamp(min=1), config


@torch.no_grad()
def test_stream_equals_full_forward_50_times_longer_than_block_size(seed, tiny):
    for attn in MODES:
        model, ids = model_of(tiny(attn=attn, max_seps=4)), torch.randint(12, (2, 800))
        assert (model(ids)[0] - in_pieces(model, ids, split(800))).abs().max() < 1e-9


@torch.no_grad()
def test_ragged_batch_equals_its_rows(seed, tiny):
    model = model_of(tiny(max_seps=None))
    ids = torch.stack([torch.full((90,), 1), torch.full((90,), 5), torch.randint(12, (90,))])  # only separators, none, some
    together = in_pieces(model, ids, split(90))
    alone = torch.cat([in_pieces(model, row[None], split(90)) for row in ids])
    assert (together - alone).abs().max() < 1e-9


@torch.no_grad()
def test_training_mask_is_what_the_model_computes(seed, tiny):
    """A token that is hidden from a query, in one layer, has no influence on it at all."""
    model = model_of(tiny(n_layer=1, window=4, sinks=1, max_seps=1, separators=(1, 2)))
    ids = torch.tensor([[5, 6, 1, 7, 8, 1, 9, 9, 9, 9, 9]])
    for at, visible in ((0, True), (1, False), (2, False), (4, False), (5, True), (6, False), (7, True)):
        changed = ids.clone()
        changed[0, at] = 2 if ids[0, at] == 1 else 10  # a separator becomes another separator
        assert ((model(ids)[0][0, -1] - model(changed)[0][0, -1]).abs().max() > 1e-6) == visible, at


@pytest.mark.parametrize("attn", ["stream", "fixed", "sep"])
@torch.no_grad()
def test_memory_and_time_are_constant_over_200_000_tokens(seed, tiny, attn):
    model = GPT(tiny(attn=attn, n_layer=1, max_seps=4)).eval()

    def read(cache):
        clock = time.perf_counter()
        model(torch.randint(12, (1, 1000)), cache=cache)
        return time.perf_counter() - clock

    old, young = SepCache(model.config), SepCache(model.config)
    nbytes, address = old.nbytes, old.kv.data_ptr()
    for at in range(0, 180_000, 1000):
        read(old)
        if at == 20_000:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # each of its last thousands against one of another stream's first, in turns, because the machine is shared
    slower = torch.tensor([read(old) / read(young) for _ in range(20)]).median()
    assert old.n_tokens == 200_000 and old.nbytes == young.nbytes == nbytes and old.kv.data_ptr() == address
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < 20_000  # KiB
    assert slower < 1.3


@torch.no_grad()
def test_unbounded_caches_double_and_say_so(tiny):
    for changes in (dict(attn="full"), dict(max_seps=None, separators=tuple(range(12)))):
        cache, sizes = SepCache(tiny(**changes)), []
        model = GPT(cache.config)
        for _ in range(300):
            model(torch.ones(1, 1, dtype=torch.int64), cache=cache)
            sizes.append(cache.nbytes)
        assert sizes == sorted(sizes) and 2 <= len(set(sizes)) <= 12  # grows, and seldom


def test_nothing_but_the_visible_is_held(seed, tiny):
    config = tiny(n_layer=1, n_head=1, n_embd=2, window=4, sinks=2, max_seps=2)
    ids, cache = torch.randint(12, (1, 60)), SepCache(config)
    for i in range(60):
        cache.advance(ids[:, i:i + 1])
        cache.extend(0, *torch.full((2, 1, 1, 1, 2), float(i)))
        far = cache.kv[0, 0, 0, 0, :int(cache.n_far), 0].tolist()
        near = cache.kv[0, 0, 0, 0, cache.far_room:cache.far_room + min(i + 1, 3), 0].tolist()
        seps = [j for j in range(2, i - 2) if ids[0, j] in config.separators]
        assert far == [j for j in range(2) if j < i - 2] + seps[-2:] and near == list(range(max(0, i - 2), i + 1))
    assert cache.n_rows == len(far) + 3


def test_cache_refuses_another_batch_size(tiny):
    with pytest.raises(ValueError, match="holds 2 sequences"):
        GPT(tiny())(torch.zeros(3, 4, dtype=torch.int64), cache=SepCache(tiny(), batch_size=2))


def test_position_4_000_000_is_as_precise_as_position_4():
    for position in (4, 4_000_000, 4_000_000_000):
        cos, sin = rotation(torch.tensor([position]), 8, torch.float32)
        for pair in range(4):
            angle = math.fmod(position * 10000 ** (-pair / 4), 2 * math.pi)
            assert abs(cos[0, pair].item() - math.cos(angle)) < 1e-6 and abs(sin[0, pair + 4].item() - math.sin(angle)) < 1e-6


@torch.no_grad()
def test_greedy_decoding_equals_greedy_full_forwards(seed, tiny):
    for attn in MODES:
        model, ids = model_of(tiny(attn=attn, max_seps=3), torch.float32), torch.randint(12, (2, 7))
        streamed = torch.stack(list(model.generate(ids, 60, temperature=0)), 1)
        for _ in range(60):
            ids = torch.cat([ids, model(ids)[0][:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(ids[:, 7:], streamed)


@torch.no_grad()
def test_a_step_reuses_its_memory_once_the_window_is_full(seed, tiny):
    """What a captured CUDA graph needs: after `is_static`, every step reads and writes the same addresses."""
    model = model_of(tiny(max_seps=3))
    cache = SepCache(model.config, 2, dtype=torch.float64)
    state = [cache.kv, cache.n_far, cache.near_kept, cache.position]
    seen = set()
    for i in range(60):
        was_static = cache.is_static
        model(torch.randint(12, (2, 1)), cache=cache)
        if was_static:
            seen.add((str(cache.cached), *(x.data_ptr() for x in (cache.kv, cache.n_far, cache.near_kept, cache.position))))
    assert len(seen) == 1 and all(a is b for a, b in zip(state, (cache.kv, cache.n_far, cache.near_kept, cache.position)))
    assert int(cache.position) == cache.n_tokens == 60
