"""Who sees whom: the lists and the reference against the definition, written as plain loops."""
import random

import pytest
import torch

from sep_cache import far_layout, reach
from sep_kernel import sep_attention, sep_attention_reference


def dense_mask(ids, config):
    """The definition: query i sees key j <= i if it is in the window, a sink, or one of the latest separators beyond it."""
    T = len(ids)
    window = T if config.attn == "full" else config.window
    sinks = 0 if config.attn == "full" else config.sinks
    limit = T if config.max_seps is None else config.max_seps

    def separator(j):
        return j >= sinks and (config.attn == "sep" and ids[j] in config.separators
                               or config.attn == "fixed" and j % config.fixed_every == 0)

    def sees(i, j):
        if j > i:
            return False
        later = sum(separator(m) for m in range(j + 1, i - window + 1))
        return i - j < window or j < sinks or separator(j) and later < limit

    return torch.tensor([[sees(i, j) for j in range(T)] for i in range(T)])


def random_case(tiny):
    config = tiny(attn=random.choice(["full", "stream", "fixed", "sep"]), window=random.choice([1, 2, 5, 17, 60]),
                  sinks=random.choice([0, 1, 3, 60]), max_seps=random.choice([0, 1, 4, None]),
                  fixed_every=random.choice([1, 3, 8]), separators=random.choice([(), (1,), (1, 2, 3), tuple(range(12))]))
    return config, torch.randint(12, (random.randint(1, 3), random.randint(1, 40)))


def test_mask_is_the_definition(seed, tiny):
    for _ in range(300):
        config, ids = random_case(tiny)
        (B, T), (far, n_far) = ids.shape, far_layout(ids, config)
        q, k = torch.randn(2, B, 1, T, 8, dtype=torch.float64)
        # with the identity for values, the output is the attention: positive exactly where a key is seen
        attention = sep_attention(q, k, torch.eye(T, dtype=q.dtype).expand(B, 1, T, T), far, n_far, *reach(config), impl="torch")
        expected = torch.stack([dense_mask(row.tolist(), config) for row in ids])
        assert torch.equal(attention[:, 0] > 0, expected), config


def test_sinks_meet_their_own_query(seed, tiny):
    for _ in range(30):
        config, ids = random_case(tiny)
        (B, T), (window, sinks, max_seps) = ids.shape, reach(config)
        q, q_sink, k, v = torch.randn(4, B, 2, T, 8, dtype=torch.float64)
        out = sep_attention(q, k, v, *far_layout(ids, config), window, sinks, max_seps, q_sink)
        i, j = torch.arange(T)[:, None], torch.arange(T)
        scores = torch.where((j < sinks) & (i - j >= window), q_sink @ k.mT, q @ k.mT) / 8 ** 0.5
        mask = torch.stack([dense_mask(row.tolist(), config) for row in ids])[:, None]
        assert torch.allclose(out, scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v, atol=1e-12)


def test_layout_has_static_shapes_and_never_decreases(seed, tiny):
    for _ in range(100):
        config, ids = random_case(tiny)
        far, n_far = far_layout(ids, config)
        assert far.shape == n_far.shape == ids.shape and far.dtype == n_far.dtype == torch.int32
        assert (n_far.diff(dim=1) >= 0).all() and (n_far <= torch.arange(ids.shape[1])).all()


def test_library_attention_is_the_reference_without_q_sink(seed, tiny):
    for _ in range(20):
        config, ids = random_case(tiny)
        q, k, v = torch.randn(3, ids.shape[0], 2, ids.shape[1], 8, dtype=torch.float64)
        layout = *far_layout(ids, config), *reach(config)
        assert torch.allclose(sep_attention_reference(q, k, v, *layout), sep_attention_reference(q, k, v, *layout, q), atol=1e-12)


def test_unknown_impl_is_refused():
    with pytest.raises(ValueError, match="impl is 'cuda'"):
        x = torch.zeros(1, 1, 1, 16)
        sep_attention(x, x, x, torch.zeros(1, 1).int(), torch.zeros(1, 1).int(), 1, impl="cuda")
