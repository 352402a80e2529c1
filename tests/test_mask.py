"""Who sees whom: reach and the far list are the definition, and attention over them is exact."""
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run

from sep_cache import SepConfig, far_layout, is_kept, key_reach
from sep_kernel import sep_attention

SPARSE = ["streamingllm", "fixed", "sep"]


def definition_mask(ids, config):
    """(B, T, T) bool, from the words of the paper: window, sinks, and the latest max_seps kept
    tokens that have left the window, nearer than block_size."""
    B, T = ids.shape
    mask = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        kept = [j for j in range(config.sinks, T)
                if (config.attn == "sep" and ids[b, j].item() in config.separators)
                or (config.attn == "fixed" and j % config.fixed_every == 0)]
        for i in range(T):
            far = [j for j in kept if j <= i - config.window]
            if config.max_seps is not None:
                far = far[max(len(far) - config.max_seps, 0):]
            seen = [j for j in far if i - j < config.block_size]
            seen += range(min(config.sinks, i + 1))
            seen += range(max(i - config.window + 1, 0), i + 1)
            if config.attn == "full":
                seen = range(i + 1)
            mask[b, i, list(seen)] = True
    return mask


def random_config(**changes):
    settings = dict(
        attn=random.choice(SPARSE), window=random.choice([1, 2, 5, 40, 200, 10 ** 9]),
        sinks=random.choice([0, 1, 3, 9]), max_seps=random.choice([0, 1, 3, None, 10 ** 9]),
        block_size=random.choice([1, 8, 16, 300]), fixed_every=4,
        separators=random.choice([(), (1,), (1, 2, 3), tuple(range(12))]))
    return SepConfig(**settings | changes)


def test_the_worked_example():
    config = SepConfig(window=2, sinks=1, block_size=4, separators=tuple(b",."))
    ids = torch.tensor([list(b"a,b.cd")])
    expected = torch.tensor([[1, 0, 0, 0, 0, 0],
                             [1, 1, 0, 0, 0, 0],
                             [1, 1, 1, 0, 0, 0],
                             [1, 1, 1, 1, 0, 0],
                             [1, 1, 0, 1, 1, 0],
                             [1, 0, 0, 1, 1, 1]]).bool()
    assert definition_mask(ids, config)[0].equal(expected)
    layout = far_layout(ids, config)
    assert layout.far.tolist() == [[0, 1, 3, 5, 4, 2]]
    assert layout.stop.tolist() == [[0, 0, 1, 2, 2, 3]]
    assert layout.start.tolist() == [[0, 0, 1, 1, 1, 2]]
    assert layout.reach.tolist() == [[6, 4, 2, 4, 2, 2]]


@pytest.mark.parametrize("attn", ["full", *SPARSE])
def test_every_key_is_seen_by_the_queries_within_its_reach(seed, attn):
    for _ in range(30):
        config = random_config(attn=attn)
        T = random.randint(1, 60)
        ids = torch.randint(12, (2, T))
        positions = torch.arange(T).expand(2, T).contiguous()
        reach = key_reach(is_kept(ids, positions[0], config), positions, config)
        distance = positions[0, :, None] - positions[0]
        mask = (distance >= 0) & (distance < reach[:, None])
        assert mask.equal(definition_mask(ids, config)), config


def test_attention_and_its_gradients_are_those_of_the_definition(seed):
    for _ in range(40):
        config = random_config()
        B, T = random.randint(1, 3), random.randint(1, 150)
        ids = torch.randint(12, (B, T))
        q, k, v = (torch.randn(B, 2, T, 16, dtype=torch.float64).requires_grad_() for _ in range(3))
        mask = definition_mask(ids, config)[:, None]
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        layout = far_layout(ids, config)
        actual = sep_attention(q, k, v, layout, config.window, config.sinks, impl="torch")
        gradient = torch.randn_like(expected)
        expected_gradients = torch.autograd.grad(expected, (q, k, v), gradient)
        gradients = torch.autograd.grad(actual, (q, k, v), gradient)
        assert (actual - expected).abs().max() < 1e-9, config
        for a, b in zip(gradients, expected_gradients, strict=True):
            assert (a - b).abs().max() < 1e-9, config


def test_the_layout_is_linear_in_the_text_and_its_ranges_never_go_back(seed):
    for _ in range(20):
        config = random_config()
        layout = far_layout(torch.randint(12, (2, 100)), config)
        assert all(x.shape == (2, 100) and x.dtype == torch.int32 for x in layout)
        assert (layout.start.diff() >= 0).all() and (layout.stop.diff() >= 0).all()
        assert (layout.start <= layout.stop).all()
        assert (layout.far.sort().values == torch.arange(100)).all()


def test_unknown_impls_and_mixed_dtypes_are_refused():
    layout = far_layout(torch.zeros(1, 8, dtype=torch.int64), SepConfig(window=2))
    x = torch.zeros(1, 1, 8, 16)
    with pytest.raises(ValueError, match="cuda.*must be auto, triton or torch"):
        sep_attention(x, x, x, layout, 2, 0, impl="cuda")
    with pytest.raises(ValueError, match="must agree"):
        sep_attention(x, x.double(), x, layout, 2, 0)


@pytest.mark.parametrize("setting", [dict(window=0), dict(window=2 ** 31), dict(sinks=-1),
                                     dict(attn="seps"), dict(max_seps=-1), dict(fixed_every=0)])
def test_a_setting_out_of_range_is_named(setting):
    (name, value), = setting.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}.*must be"):
        SepConfig(**setting)


def test_the_map_is_drawn_as_the_readme_shows_it():
    _, out, _ = run("sep_cache.py", "To be, or not to be: that is it. So?", "--max_seps", 1)
    lines = out.splitlines()
    assert "  35 ?▒▒·················▓········████████   To: |  it. So?" in lines
    readme = (ROOT / "README.md").read_text().splitlines()
    shown = [line for line in readme if line[:4].strip().isdigit() and "|" in line]
    assert shown and set(shown) <= set(lines)
    assert run("sep_cache.py", "x" * 300)[0] == 2
    assert run("sep_cache.py", "x", "--window", 2 ** 70)[0] == 2
    assert run("sep_cache.py", b"caf\xe9")[0] == 0  # not UTF-8
