"""A stream computes one definition, however it is cut into chunks, in memory that does not grow."""
import random
import time

import pytest
import torch
import torch.nn.functional as F
from test_mask import definition_mask

from model import GPT, apply_rope, rope_cos_sin, rope_frequencies, sample_token
from sep_cache import make_cache

MODES = ["full", "streamingllm", "fixed", "sep"]


def model_of(config):
    model = GPT(config).double().eval()
    for weight in model.parameters():  # untrained attention is nearly uniform: sharper is stricter
        weight.data.mul_(3)
    return model


def random_config(tiny, **changes):
    settings = dict(attn=random.choice(MODES), window=random.choice([1, 2, 5, 40]),
                    sinks=random.choice([0, 1, 3, 9]), max_seps=random.choice([0, 1, 3, None]),
                    block_size=random.choice([1, 8, 16, 90]), n_head=4, n_kv_head=2,
                    separators=random.choice([(), (1,), (1, 2, 3), tuple(range(12))]))
    return tiny(**settings | changes)


def definition(model, ids):
    """The logits of whole texts by the definition, with a dense mask; sinks beyond block_size are
    scored as if the query stood at block_size - 1."""
    config = model.config
    B, T = ids.shape
    H, H_kv, D = config.n_head, config.n_kv_head, config.head_dim
    mask = definition_mask(ids, config)[:, None]
    positions = torch.arange(T)
    frequencies = rope_frequencies(config, "cpu")
    cos_sin = rope_cos_sin(positions, frequencies, torch.float64)
    sink_cos_sin = rope_cos_sin(positions.clamp(max=config.block_size - 1), frequencies,
                                torch.float64)
    is_sink = (positions < config.sinks) & (config.attn != "full")
    x = model.embed(ids)
    for block in model.blocks:
        attn = block.attn
        qkv = attn.qkv(block.attn_norm(x)).view(B, T, H + 2 * H_kv, D).transpose(1, 2)
        q, k, v = qkv.split([H, H_kv, H_kv], dim=1)
        q = F.rms_norm(q, (D,), eps=config.norm_eps) * attn.qk_gain[:H]
        k = F.rms_norm(k, (D,), eps=config.norm_eps) * attn.qk_gain[H:]
        k = apply_rope(k, cos_sin).repeat_interleave(H // H_kv, dim=1)
        v = v.repeat_interleave(H // H_kv, dim=1)
        scores = apply_rope(q, cos_sin) @ k.mT
        scores = torch.where(is_sink, apply_rope(q, sink_cos_sin) @ k.mT, scores) * D ** -0.5
        y = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        x = x + attn.out(y.transpose(1, 2).reshape(B, T, H * D))
        x = x + block.mlp(block.mlp_norm(x))
    return F.linear(model.norm(x), model.embed.weight)


def stream(model, ids):
    """The logits of texts that are read in random chunks: long ones, short ones, single tokens."""
    cache = make_cache(model.config, len(ids), dtype=model.embed.weight.dtype)
    logits = []
    while cache.n_tokens < ids.shape[1]:
        size = random.choice([1, 1, 1, 2, 3, random.randint(1, 60)])
        logits.append(model(ids[:, cache.n_tokens:][:, :size], cache=cache)[0])
    assert cache.n_tokens == ids.shape[1]
    return torch.cat(logits, dim=1)


@torch.no_grad()
def test_a_stream_in_any_chunks_is_the_definition(seed, tiny):
    for _ in range(40):
        model = model_of(random_config(tiny))
        ids = torch.randint(12, (random.randint(1, 3), random.randint(1, 120)))
        expected = definition(model, ids)
        assert (stream(model, ids) - expected).abs().max() < 1e-9, model.config
        if ids.shape[1] <= model.config.block_size:
            assert (model(ids)[0] - expected).abs().max() < 1e-9, model.config


@torch.no_grad()
@pytest.mark.parametrize("attn", MODES)
def test_the_same_over_50_block_size(seed, tiny, attn):
    for max_seps in (4, None):
        model = model_of(random_config(tiny, attn=attn, block_size=16, max_seps=max_seps))
        ids = torch.randint(12, (2, 800))
        expected = definition(model, ids)
        assert (stream(model, ids) - expected).abs().max() < 1e-9
        assert (stream(model, ids) - stream(model, ids)).abs().max() < 1e-9


@torch.no_grad()
def test_each_sequence_of_a_batch_has_its_own_separators(seed, tiny):
    model = model_of(tiny(max_seps=3))
    ids = torch.randint(12, (3, 100))
    ids[0] = 1  # nothing but separators
    ids[1] = 5  # none
    alone = torch.cat([stream(model, row[None]) for row in ids])
    assert (stream(model, ids) - alone).abs().max() < 1e-9


def test_the_past_of_a_text_beyond_every_reach_has_no_influence(seed, tiny):
    """Layer by layer a token may hear of an older one; in one layer it hears what it sees."""
    model = model_of(tiny(n_layer=1, sinks=0, max_seps=2, window=3))
    ids = torch.randint(3, 12, (1, 60))  # without separators
    changed = ids.clone()
    changed[:, :57] = torch.randint(3, 12, (57,))
    with torch.no_grad():
        assert stream(model, ids)[:, -1].equal(stream(model, changed)[:, -1])


def test_a_longer_text_than_block_size_needs_a_cache(tiny):
    with pytest.raises(ValueError, match="17 tokens, and block_size is 16"):
        GPT(tiny())(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("attn", MODES[1:])
def test_memory_and_time_are_constant_over_100_000_tokens(seed, tiny, attn):
    config = tiny(attn=attn, n_layer=1, max_seps=4)
    model = GPT(config).eval()
    cache = make_cache(config)
    ids = torch.randint(12, (1, 1000))
    seconds = []
    with torch.inference_mode():
        for n_thousand in range(100):
            model(ids, cache=cache)
            if n_thousand % 10 == 9:
                start = time.perf_counter()
                for token in ids[:, :200].split(1, dim=1):
                    model(token, cache=cache)
                    assert cache.nbytes <= cache.max_nbytes or cache.n_rows > 1000
                assert cache.nbytes <= cache.max_nbytes
                seconds.append(time.perf_counter() - start)
    assert min(seconds[-3:]) < 1.5 * min(seconds[:3])


def test_the_bound_does_not_depend_on_how_many_separators_the_text_has(tiny):
    config = tiny(max_seps=4)
    cache = make_cache(config)
    for token in torch.ones(1, 300, dtype=torch.int64).split(1, dim=1):  # separators only
        cache.advance(token)
        assert cache.nbytes <= cache.max_nbytes == cache.nbytes_of(2 + 4 + 5 + 16)
        assert cache.n_visible_keys == min(cache.n_tokens, 2 + 4 + 5)


def test_only_the_ordinary_cache_grows(tiny):
    cache = make_cache(tiny(attn="full"))
    for _ in range(10):
        cache.advance(torch.zeros(1, 100, dtype=torch.int64))
    assert cache.n_visible_keys == 1000 and cache.nbytes >= cache.nbytes_of(1000)


def test_a_cache_refuses_another_batch_size_and_another_dtype(tiny):
    model = GPT(tiny())
    with pytest.raises(ValueError, match="holds 2 sequences, and got ids of 1"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache=make_cache(model.config, 2))
    with pytest.raises(ValueError, match="float64, and got keys of torch.float32"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache=make_cache(model.config,
                                                                     dtype=torch.float64))


def test_training_goes_on_after_generating_in_one_process(tiny):
    model = GPT(tiny())
    ids = torch.zeros(1, 8, dtype=torch.int64)
    list(model.generate(ids, 3))
    model(ids, ids)[1].backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_position_4_000_000_is_as_precise_as_position_4(tiny):
    """A rotation by 4,000,001 after one back by 4,000,000 is a rotation by 1, to float32."""
    frequencies = rope_frequencies(tiny(n_embd=64), "cpu")

    def cos_sin(position):
        return rope_cos_sin(torch.tensor([position]), frequencies, torch.float32)

    x = torch.randn(1, 32)
    there_and_back = apply_rope(apply_rope(x, cos_sin(4_000_001)), cos_sin(-4_000_000))
    assert (there_and_back - apply_rope(x, cos_sin(1))).abs().max() < 1e-6


@torch.no_grad()
def test_greedy_decoding_takes_the_likeliest_token_of_the_definition(seed, tiny):
    model = model_of(tiny(max_seps=3))
    ids = torch.randint(12, (2, 40))
    new = torch.stack(list(model.generate(ids, 20, temperature=0)), dim=1)
    logits = definition(model, torch.cat([ids, new], dim=1))
    assert new.equal(logits[:, 39:-1].argmax(-1))


def test_tokens_are_sampled_as_often_as_they_are_likely(seed):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1).expand(100_000, 4)
    shares = sample_token(logits, 1.0, None).bincount(minlength=4) / 100_000
    assert (shares - logits[0].exp()).abs().max() < 0.01
    assert set(sample_token(logits, 1.0, 2).tolist()) == {0, 1}
    assert set(sample_token(logits, 1e-39, None).tolist()) == {0}  # as good as greedy
    assert (sample_token(logits, 0, None) == 0).all()
