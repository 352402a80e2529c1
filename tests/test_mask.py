"""Who sees whom: attention over reach, and over the far list, is the definition, and exact."""
import contextlib
import random

import pytest
import torch
from conftest import ROOT, run, tiny
from torch._subclasses import FakeTensorMode

import sep_kernel
from model import GPT
from sep_kernel import block_attention, dense_attention, in_blocks, kernel_attention, sep_attention
from sep_mask import SepConfig, SepLayout, far_layout, visible

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


def masked_attention(q, k, v, mask):
    """Softmax attention, q, k, v (B, H, T, D), mask (B, T, T)."""
    scores = q @ k.mT * q.shape[3] ** -0.5
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v


def out_and_gradients(attention, tensors, *args):
    """tensors: q, k, v and the output's gradient."""
    q, k, v, do = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, *args)
    return out.detach(), *torch.autograd.grad(out, leaves, do)


def error(results, exact):
    """The largest error, or NaN."""
    errors = [(x.double() - e).abs().max() for x, e in zip(results, exact, strict=True)]
    return torch.stack(errors).max()


def random_config(config_class=SepConfig, **changes):
    pick = random.choice
    settings = dict(
        attn=pick(SPARSE),
        window=pick([1, 2, 5, 40, 200, 10 ** 9]),
        sinks=pick([0, 1, 3, 20]),
        max_seps=pick([0, 1, 3, None, 10 ** 9]),
        block_size=pick([1, 8, 16, 300]),
        fixed_every=pick([1, 4]),
        separators=pick([(), (1,), (1, 2, 3), tuple(range(12))]))
    return config_class(**settings | changes)


def test_the_worked_example():
    config = SepConfig(window=2, sinks=1, block_size=4, separators=tuple(b",."))
    ids = torch.tensor([list(b"a,b.cd")])
    rows = definition_mask(ids, config)[0].tolist()
    assert ["".join("x" if seen else "." for seen in row) for row in rows] == [
        "x.....",
        "xx....",
        "xxx...",
        "xxxx..",
        "xx.xx.",
        "x..xxx"]
    layout = far_layout(ids, config)
    assert layout.far.tolist() == [[0, 1, 3, 5, 4, 2]]
    assert layout.stop.tolist() == [[0, 0, 1, 2, 2, 3]]
    assert layout.start.tolist() == [[0, 0, 1, 1, 1, 2]]
    assert layout.reach.tolist() == [[6, 4, 2, 4, 2, 2]]


def test_attention_and_its_gradients_are_those_of_the_definition():
    for _ in range(60):
        config = random_config()
        B, T = random.randint(1, 3), random.randint(1, 150)
        ids = torch.randint(12, (B, T))
        tensors = torch.randn(4, B, 2, T, 16, dtype=torch.float64)
        expected = out_and_gradients(masked_attention, tensors, definition_mask(ids, config))
        layout = far_layout(ids, config)
        for attention, who in ((dense_attention, layout.reach), (block_attention, layout)):
            actual = out_and_gradients(attention, tensors, who)
            assert error(actual, expected) < 1e-9, (attention, config)


def test_a_layout_that_was_used_in_inference_mode_can_be_trained_on():
    ids = torch.randint(12, (2, 70))
    config = random_config()
    tensors = torch.randn(4, 2, 2, 70, 16)
    with torch.inference_mode():
        layout = in_blocks(far_layout(ids, config))
        sep_attention(*tensors[:3], layout)
    expected = out_and_gradients(masked_attention, tensors, definition_mask(ids, config))
    for attention in [block_attention] + [kernel_attention] * bool(sep_kernel.triton):
        actual = out_and_gradients(attention, tensors, layout)
        assert error(actual, expected) < 1e-4, config


def test_an_attention_remembers_no_layout():
    """It follows one that is written over, and leaves no fake tensor behind."""
    ids = torch.randint(3, (2, 1, 70))
    config = SepConfig(window=5, separators=(1,))
    layout, other = (far_layout(x, config) for x in ids)
    q, k, v = torch.randn(3, 1, 2, 70, 16)
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(RuntimeError):
        GPT(tiny(block_size=70))(ids[0])
    sep_attention(q, k, v, layout)
    for old, new in zip(layout[:4], other[:4], strict=True):
        old.copy_(new)
    expected = masked_attention(q, k, v, definition_mask(ids[1], config))
    assert (sep_attention(q, k, v, layout) - expected).abs().max() < 1e-5


def test_what_all_layers_share_is_made_once(monkeypatch):
    made = []
    monkeypatch.setattr(sep_kernel, "visible", lambda *args: made.append(1) or visible(*args))
    GPT(tiny(n_layer=3))(torch.zeros(2, 16).long())
    assert len(made) == 1


def test_shapes_and_dtypes_that_disagree_are_refused():
    x = torch.zeros(2, 4, 8, 16)
    rows = torch.zeros(2, 8, dtype=torch.int32)
    for k, v, rows_of_layout in [
            (x, x[:, :2], rows),
            (x.double(), x, rows),
            (x, x, rows[:, :7]),
            (x, x, rows[:1])]:
        with pytest.raises(ValueError, match="must agree"):
            sep_attention(x, k, v, SepLayout(*[rows_of_layout] * 4, 2, 0))


def test_the_map_is_drawn_as_the_readme_shows_it():
    _, out, _ = run("sep_mask.py", "To be, or not to be: that is it. So?", "--max_seps", 1)
    lines = out.splitlines()
    assert "  35 ? ▒▒·················▓········████████" in lines
    readme = (ROOT / "README.md").read_text().splitlines()
    shown = [line for line in readme if "█" in line]
    assert len(shown) > 5 and set(shown) <= set(lines)


def test_the_map_draws_any_text():
    for text, last_line in (("é.ü", "   2 ü ·▓█"), (".\udce9", "   1 · ▓█"), ("", "       ")):
        _, out, _ = run("sep_mask.py --window 1 --sinks 0", text)
        assert out.splitlines()[-1] == last_line


