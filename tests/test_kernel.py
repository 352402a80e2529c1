"""The Triton kernel against the float64 reference: on the GPU if there is one, else in Triton's interpreter."""
import functools
import random

import pytest
import torch
from torch import library

import model as model_module
from model import GPT
from sep_cache import SepCache, far_list
from sep_kernel import NO_LIMIT, _attention, sep_attention

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_case(dtype):
    """Inputs of every shape and option that the kernel takes; far lists of random text, so that rows are ragged."""
    B, H, D = random.randint(1, 3), random.randint(1, 3), random.choice([16, 32, 64, 128])
    long = B * H <= 2 or B * H * D < 100  # the interpreter is slow
    Tq = random.choice([1, 2, random.randint(1, 40), random.randint(1, 80)] + [random.randint(80, 300)] * long)
    Tk, window, sinks = Tq + random.choice([0, random.randint(0, 60)]), random.choice([1, 2, 9, 33, 400]), random.choice([0, 1, 4, 20])
    density, max_seps = random.choice([0, 0.1, 0.5, 1]), random.choice([None, 0, 1, 5])
    kept = (torch.rand(B, Tk) < density) | (torch.arange(Tk) < sinks)
    layout = *(x.to(DEVICE) for x in far_list(kept, window, Tq)), window, sinks, max_seps
    inputs = [torch.randn(B, T, H, D, device=DEVICE).to(dtype).transpose(1, 2) for T in (Tq, Tk, Tk, Tq, Tq)]  # not contiguous
    return inputs, layout


def results(inputs, layout, dtype, impl, apart):
    """Output and gradients of q, k, v and, if it is apart, q_sink."""
    *leaves, do = (x.detach().to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    q, k, v, q_sink = leaves
    out = sep_attention(q, k, v, *layout, q_sink if apart else None, impl)
    return [out.detach(), *torch.autograd.grad(out, leaves if apart else leaves[:3], do)]


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory is full of NaN, so that an element that nobody wrote is seen."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: torch.full_like(x, torch.nan, **kw))
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: torch.full(*size, fill_value=torch.nan, **kw))


@pytest.mark.parametrize("dtype, cases", [(torch.float32, 50), (torch.bfloat16, 40), (torch.float16, 20)])
def test_kernel_equals_fp64_reference(seed, poison, dtype, cases):
    for _ in range(cases):
        (inputs, layout), apart = random_case(dtype), random.random() < 0.5
        exact = results(inputs, layout, torch.float64, "torch", apart)
        kernel = results(inputs, layout, dtype, "triton", apart)
        reference = results(inputs, layout, dtype, "torch", apart)
        # as wrong as the reference in this precision may be, and a dozen roundings of the largest numbers
        allowed = 3 * max((z.double() - x).abs().max() for x, z in zip(exact, reference))
        allowed += 12 * torch.finfo(dtype).eps * max(1, *(x.abs().max() for x in exact))
        for name, x, y in zip(("out", "dq", "dk", "dv", "dq_sink"), exact, kernel):
            assert (y.double() - x).abs().max() <= allowed, (name, [t.shape for t in inputs], layout[2:], apart)


def test_offsets_beyond_2_to_the_31(seed):
    if DEVICE == "cpu":
        pytest.skip("needs 20 GB on a GPU")
    T, kept = 1 << 19, torch.zeros(1, 1 << 19, dtype=torch.bool)
    kept[:, ::5000] = True
    far, n_far = (x.to(DEVICE) for x in far_list(kept, 16, T))
    q, k, v = (torch.randn(1, 80, T, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    out = sep_attention(q, k, v, far, n_far, 16, impl="triton")
    alone = sep_attention(q[:, -1:], k[:, -1:], v[:, -1:], far, n_far, 16, impl="triton")
    assert torch.equal(out[:, -1:], alone)


def operands(D=16):
    kept = torch.rand(2, 24) < 0.3
    q, k, v = (torch.randn(2, 2, T, D, device=DEVICE, requires_grad=True) for T in (20, 24, 24))
    return q, k, v, *(x.to(DEVICE) for x in far_list(kept, 3, 20)), 3, 1, 4


def test_opcheck(seed):
    for q_sink in (None, torch.randn(2, 2, 20, 16, device=DEVICE, requires_grad=True)):
        library.opcheck(_attention, (*operands()[:5], [3, 1, 4], q_sink))


def test_model_compiles_without_graph_break(seed, tiny, monkeypatch):
    monkeypatch.setattr(model_module, "sep_attention", functools.partial(sep_attention, impl="triton"))
    model = GPT(tiny(n_embd=32)).to(DEVICE)
    ids = torch.randint(12, (2, 30), device=DEVICE)  # longer than block_size: with q_sink
    loss = model(ids, ids)[1]
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, ids)[1]
    compiled.backward()
    assert torch.allclose(loss, compiled, atol=1e-5)
    assert all(torch.allclose(p.grad, g, atol=1e-4) for p, g in zip(model.parameters(), expected))


@torch.no_grad()
def test_kernel_streams_as_it_reads(seed, tiny, monkeypatch):
    """The promise of the cache holds on the Triton path, within bf16's own error."""
    config = tiny(n_layer=1, n_embd=32, window=9, max_seps=3)
    model, ids = GPT(config), torch.randint(12, (1, 150))
    exact = model.double()(ids)[0]
    model = model.to(DEVICE, torch.bfloat16)
    ids = ids.to(DEVICE)
    allowed = 3 * (model(ids)[0].cpu().double() - exact).abs().max() + 0.05 * exact.abs().max()
    monkeypatch.setattr(model_module, "sep_attention", functools.partial(sep_attention, impl="triton"))
    for piece in (1, 7, 64, 1000):
        cache = SepCache(config, 1, DEVICE, torch.bfloat16)
        T = 40 if piece == 1 else 150  # the interpreter is slow
        out = torch.cat([model(part, cache=cache)[0] for part in ids[:, :T].split(piece, dim=1)], 1).cpu().double()
        assert (out - exact[:, :T]).abs().max() <= allowed, piece


def test_what_the_kernel_cannot_do_is_a_sentence():
    q, k, v, *layout = operands(D=24)
    with pytest.raises(ValueError, match="D 24"):
        sep_attention(q, k, v, *layout, impl="triton")
    with pytest.raises(ValueError, match="torch.float64"):
        q, k, v, *layout = operands()
        sep_attention(q.double(), k.double(), v.double(), *layout, impl="triton")
    assert sep_attention(q, k, v, *layout).shape == q.shape


def test_limits_that_mean_everything(seed):
    q, k, v, far, n_far, window, sinks, _ = operands()
    a, b, c = (sep_attention(q, k, v, far, n_far, window, sinks, m, impl="triton") for m in (None, NO_LIMIT, far.shape[1]))
    assert torch.equal(a, b) and torch.equal(a, c)
