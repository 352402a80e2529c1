"""A stream computes one definition, however it is cut into chunks, in memory that does not grow."""
import random
import shutil
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from test_mask import SPARSE, definition_mask, random_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, apply_rope, rope_cos_sin, rope_frequencies, sample_token
from sep_cache import SepCache

MODES = ["full", *SPARSE]


def model_of(config):
    model = GPT(config).double().eval()
    for weight in model.parameters():  # untrained attention is nearly uniform: sharper is stricter
        weight.data.mul_(3)
    return model


def random_model(**changes):
    changes.setdefault("attn", random.choice(MODES))
    return model_of(random_config(tiny, n_head=4, n_kv_head=2, **changes))


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
    x = model.embed_tokens(ids)
    for block in model.layers:
        attn = block.self_attn
        qkv = attn.qkv_proj(block.input_layernorm(x)).view(B, T, H + 2 * H_kv, D).transpose(1, 2)
        qk = F.rms_norm(qkv[:, :-H_kv], (D,), eps=config.norm_eps) * attn.qk_gain
        q = qk[:, :H]
        k = apply_rope(qk[:, H:], cos_sin).repeat_interleave(H // H_kv, dim=1)
        v = qkv[:, -H_kv:].repeat_interleave(H // H_kv, dim=1)
        scores = apply_rope(q, cos_sin) @ k.mT
        scores = torch.where(is_sink, apply_rope(q, sink_cos_sin) @ k.mT, scores) * D ** -0.5
        y = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        x = x + attn.o_proj(y.transpose(1, 2).reshape(B, T, H * D))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return F.linear(model.norm(x), model.embed_tokens.weight)


@torch.no_grad()
def stream(model, ids, before_chunk=lambda model, cache: None):
    """The logits of texts that are read in random chunks: long ones, short ones, single tokens."""
    cache = model.new_cache(len(ids))
    logits = []
    while cache.n_tokens < ids.shape[1]:
        before_chunk(model, cache)
        size = random.choice([1, 1, 1, 2, 3, random.randint(1, 60)])
        logits.append(model(ids[:, cache.n_tokens:][:, :size], cache=cache)[0])
    assert cache.n_tokens == ids.shape[1]
    return torch.cat(logits, dim=1)


class Watch(TorchDispatchMode):
    """Keeps all tensors that operations take and make."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.tensors += [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        return out


def take_in(cache, ids):
    """What a forward asks of a cache, with keys and values that are 0."""
    T = ids.shape[1]
    cache.make_room(T)
    cache.advance(ids)
    x = cache.kv[0][:, :, :1].expand(-1, -1, T, -1)
    for layer_idx in range(cache.config.n_layer):
        cache.update(x, x, layer_idx)
    cache.take_in(T)


def assert_is_definition(logits, model, ids):
    assert (logits - definition(model, ids)).abs().max() < 1e-9, model.config


@torch.no_grad()
def test_a_stream_in_any_chunks_is_the_definition():
    for _ in range(40):
        model = random_model()
        ids = torch.randint(12, (random.randint(1, 3), random.randint(1, 120)))
        assert_is_definition(stream(model, ids), model, ids)
        if ids.shape[1] <= model.config.block_size:
            assert_is_definition(model(ids)[0], model, ids)


@torch.no_grad()
@pytest.mark.parametrize("attn", MODES)
def test_the_same_over_50_block_size_with_separators_of_each_sequence_its_own(attn):
    for max_seps in (4, None):
        model = random_model(attn=attn, block_size=16, max_seps=max_seps, separators=(1, 2))
        ids = torch.randint(12, (3, 800))
        ids[0] = 1  # nothing but separators
        ids[1] = 5  # none
        assert_is_definition(stream(model, ids), model, ids)


@torch.no_grad()
def test_attention_may_write_its_output_in_any_order_of_memory(monkeypatch):
    attend = F.scaled_dot_product_attention

    def attend_as_on_a_gpu(*args):
        """PyTorch's memory-efficient kernel writes (B, T, H, D)."""
        return attend(*args).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_as_on_a_gpu)
    model = random_model()
    ids = torch.randint(12, (2, 60))
    assert_is_definition(stream(model, ids), model, ids)


@torch.no_grad()
@pytest.mark.parametrize("broken", ["embed_tokens", "layers.0.mlp", "norm"])
def test_a_forward_that_fails_leaves_the_cache_as_it_was(broken):
    def interrupt(model, cache):
        cache.make_room(1)  # and nothing else
        fail = mock.Mock(side_effect=KeyError)
        hook = model.get_submodule(broken).register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(torch.randint(12, (2, random.randint(1, 60))), cache=cache)
        hook.remove()

    for _ in range(10):
        model = random_model()
        ids = torch.randint(12, (2, 120))
        assert_is_definition(stream(model, ids, interrupt), model, ids)


def test_what_cannot_be_right_is_refused():
    model = GPT(tiny())
    ids = torch.zeros(1, 17).long()
    with pytest.raises(ValueError, match="17 tokens, and block_size is 16"):
        model(ids)
    for arguments in ((-1,), (torch.nan,), (torch.inf,), (1, 0)):
        with pytest.raises(ValueError, match="temperature is .* and top_k"):
            next(model.generate(ids, 1, *arguments))
    cache = model.new_cache()
    model.configure(window=3)
    with pytest.raises(ValueError, match="configured since this cache was made; make a new one"):
        model(ids, cache=cache)
    with pytest.raises((TypeError, ValueError)):
        model.configure(separators=".,")


def test_buffers_shrink_again_after_a_long_chunk():
    cache = SepCache(tiny())
    take_in(cache, torch.zeros(1, 1000).long())
    for _ in range(100):
        take_in(cache, torch.zeros(1, 16).long())
    assert cache.kv[0].shape[2] == cache.row_kept.shape[1] == 64


def test_only_the_angles_of_positions_are_float64():
    model = GPT(tiny())
    with Watch() as watch:
        _, loss = model(*torch.zeros(2, 3, 16).long())
        loss.backward()
    largest = max(x.numel() for x in watch.tensors if x.dtype == torch.float64)
    assert largest == 4 * 16 * model.config.head_dim / 2  # cos, cos, -sin and sin


def test_after_generating_the_cache_can_be_used_and_the_model_trained():
    model = GPT(tiny())
    ids = torch.zeros(1, 8).long()
    with torch.inference_mode():
        cache = model.new_cache()
    list(model.generate(ids.byte(), 3, cache=cache))
    with torch.no_grad():
        model(ids, cache=cache)
    logits, loss = model(ids, ids)
    loss.backward()
    assert logits is None


def test_position_4_000_000_is_as_precise_as_position_4():
    """A rotation by 4,000,001 after one back by 4,000,000 is a rotation by 1, to float32."""
    frequencies = rope_frequencies(tiny(n_embd=64), "cpu")

    def rotate(x, position):
        return apply_rope(x, rope_cos_sin(torch.tensor([position]), frequencies, torch.float32))

    x = torch.randn(1, 32)
    there_and_back = rotate(rotate(x, 4_000_001), -4_000_000)
    assert (there_and_back - rotate(x, 1)).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("compile", [False, True])
def test_greedy_decoding_takes_the_likeliest_token_of_the_definition(compile):
    if compile and not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()
    model = model_of(tiny(max_seps=3))
    ids = torch.randint(12, (2, 10))
    new = torch.stack(list(model.generate(ids, 50, temperature=0, compile=compile)), dim=1)
    logits = definition(model, torch.cat([ids, new], dim=1))
    assert new.equal(logits[:, 9:-1].argmax(-1))


def test_tokens_are_sampled_as_often_as_they_are_likely():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1).expand(100_000, 4)
    shares = sample_token(logits, 1.0, None).bincount(minlength=4) / 100_000
    assert (shares - logits[0].exp()).abs().max() < 0.01
    assert set(sample_token(logits, 1.0, 2).tolist()) == {0, 1}
    assert set(sample_token(logits, 1e-39, None).tolist()) == {0}  # as good as greedy
    ties = torch.zeros(100_000, 12)
    assert len(set(sample_token(ties, 1.0, 3).tolist())) == 3
