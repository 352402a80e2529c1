"""Who sees whom: the far list and its ranges against the definition at the top of sep_cache.py."""
import random

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from sep_cache import far_layout, sees
from sep_kernel import sep_attention


def definition_mask(ids, config):
    """The T x T mask of one text (a list of ids), from the loop that defines it."""
    T = len(ids)
    kept = [j < config.sinks
            or config.attn == "sep" and ids[j] in config.separators
            or config.attn == "fixed" and j % config.fixed_every == 0 for j in range(T)]
    return torch.tensor([[j <= i and sees(i, j, kept, config) for j in range(T)] for i in range(T)])


def definition_masks(ids, config):
    return torch.stack([definition_mask(text.tolist(), config) for text in ids])


def random_case(tiny):
    """A sparse configuration and a batch of texts, shorter and longer than block_size."""
    config = tiny(
        attn=random.choice(["streamingllm", "fixed", "sep"]),
        window=random.choice([1, 2, 5, 17, 60]),
        sinks=random.choice([0, 1, 3, 60]),
        max_seps=random.choice([0, 1, 4, None]),
        block_size=random.choice([1, 6, 20, 100]),
        fixed_every=random.choice([1, 3, 8]),
        separators=random.choice([(), (1,), (1, 2, 3), tuple(range(12))]))
    return config, torch.randint(12, (random.randint(1, 3), random.randint(1, 50)))


def test_the_definition_and_the_list_are_the_worked_example(tiny):
    """`a,b.cd` in the docstrings of sep_cache.py: 1 for a separator and 5 for any other token."""
    config = tiny(attn="sep", window=2, sinks=1, max_seps=None, block_size=4, separators=(1,))
    ids = [5, 1, 5, 1, 5, 5]
    rows = ["x.....", "xx....", "xxx...", "xxxx..", "xx.xx.", "x..xxx"]
    expected = torch.tensor([[char == "x" for char in row] for row in rows])
    assert torch.equal(definition_mask(ids, config), expected)
    far, start, stop = far_layout(torch.tensor([ids]), config)
    assert far[0, :3].tolist() == [0, 1, 3]
    assert stop[0].tolist() == [0, 0, 1, 2, 2, 3]
    assert start[0].tolist() == [1, 1, 1, 1, 1, 2]


def test_ranges_are_the_definition(seed, tiny):
    for _ in range(300):
        config, ids = random_case(tiny)
        B, T = ids.shape
        q, k = torch.randn(2, B, 1, T, 8, dtype=torch.float64)
        # with the identity for values, the output is the attention: positive where a key is seen
        identity = torch.eye(T, dtype=q.dtype).expand(B, 1, T, T)
        layout = far_layout(ids, config)
        attention = sep_attention(q, k, identity, layout, config.window, config.sinks, impl="torch")
        assert torch.equal(attention[:, 0] > 0, definition_masks(ids, config)), config


def test_sinks_beyond_the_window_are_scored_with_q_sink(seed, tiny):
    for _ in range(30):
        config, ids = random_case(tiny)
        B, T = ids.shape
        q, q_sink, k, v = torch.randn(4, B, 2, T, 8, dtype=torch.float64)
        out = sep_attention(q, k, v, far_layout(ids, config), config.window, config.sinks, q_sink)
        i = torch.arange(T)[:, None]
        j = torch.arange(T)
        is_far_sink = (j < config.sinks) & (i - j >= config.window)
        scores = torch.where(is_far_sink, q_sink @ k.mT, q @ k.mT) / 8 ** 0.5
        mask = definition_masks(ids, config)[:, None]
        expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        assert torch.allclose(out, expected, atol=1e-12)


def test_layout_has_static_shapes_and_never_decreases(seed, tiny):
    for _ in range(100):
        config, ids = random_case(tiny)
        far, start, stop = far_layout(ids, config)
        assert far.shape == start.shape == stop.shape == ids.shape
        assert far.dtype == start.dtype == stop.dtype == torch.int32
        assert (stop.diff(dim=1) >= 0).all() and (stop <= torch.arange(ids.shape[1])).all()
        assert (start.diff(dim=1) >= 0).all() and (start >= config.sinks).all()
    assert far_layout(ids, tiny(attn="full")) is None


def test_unknown_impls_and_mixed_dtypes_are_refused(tiny):
    x = torch.zeros(1, 1, 1, 16)
    layout = far_layout(torch.zeros(1, 1, dtype=torch.int64), tiny())
    with pytest.raises(ValueError, match="impl is 'cuda'"):
        sep_attention(x, x, x, layout, 1, impl="cuda")
    with pytest.raises(ValueError, match="float32, torch.float32 and torch.bfloat16, and must"):
        sep_attention(x, x, x.bfloat16(), layout, 1)


def test_attention_gets_one_dtype_where_autocast_norms_in_float32(tiny, monkeypatch):
    """As on a GPU, where autocast gives rms_norm a float32 result."""
    dtypes = []

    def attend(q, k, v, *rest):
        dtypes.append({q.dtype, k.dtype, v.dtype})
        return q

    monkeypatch.setattr(model_module, "norm", lambda x: F.rms_norm(x.float(), x.shape[-1:]))
    monkeypatch.setattr(model_module, "attend", attend)
    with torch.autocast("cpu", torch.bfloat16):
        model_module.GPT(tiny())(torch.zeros(1, 40, dtype=torch.int64))
    assert dtypes == [{torch.bfloat16}] * 2
