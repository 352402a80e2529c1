"""The Triton kernel against float64: on the GPU if there is one, else in Triton's interpreter."""
import functools
import random

import pytest
import torch
from torch import library

import sep_kernel
from model import GPT
from sep_cache import SepCache, SepLayout
from sep_kernel import _attention, sep_attention

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dense_attention(q, k, v, layout, window, sinks=0, q_sink=None):
    """The contract of `sep_attention`, query by query, with a dense mask. Any dtype."""
    far, start, stop = (x.tolist() for x in layout)
    (B, _, Tq, D), Tk = q.shape, k.shape[2]
    sink = torch.zeros(B, 1, Tq, Tk, dtype=torch.bool)
    visible = sink.clone()
    for b in range(B):
        for t in range(Tq):
            row = Tk - Tq + t
            sink[b, 0, t, far[b][:min(sinks, stop[b][t])]] = True
            visible[b, 0, t, far[b][start[b][t]:stop[b][t]]] = True
            visible[b, 0, t, max(row - window + 1, 0):row + 1] = True
    sink, visible = sink.to(q.device), (visible | sink).to(q.device)
    q_sink = q if q_sink is None else q_sink
    scores = torch.where(sink, q_sink @ k.mT, q @ k.mT) * D ** -0.5  # (B, H, Tq, Tk)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v


def random_layout(B, Tq, Tk, window, sinks):
    """Any layout that the contract allows: other rules than those of a text, too."""
    density = random.choice([0, 0.1, 0.5, 1])
    kept = (torch.rand(B, Tk) < density) | (torch.arange(Tk) < sinks)
    S = Tk + random.choice([0, 0, 7])
    far = torch.zeros(B, S, dtype=torch.int32)
    for b in range(B):
        rows = kept[b].nonzero()[:, 0]
        far[b, :len(rows)] = rows
    gone = torch.arange(Tk - Tq, Tk) - window  # the last row that has left each query's window
    stop = kept.cumsum(1)[:, gone.clamp(min=0)] * (gone >= 0)  # (B, Tq) kept rows up to that one
    if random.random() < 0.5:  # some leave later than they might
        stop = (stop * torch.rand(B, Tq)).cummax(1).values
    rule = random.choice(["all", "cap", "any"])
    if rule == "all":
        start = torch.zeros(B, Tq)
    elif rule == "cap":
        start = stop - random.choice([0, 1, 5])
    else:
        start = (1.3 * stop * torch.rand(B, Tq)).cummax(1).values  # also beyond stop
    layout = far, start.clamp(min=sinks), stop
    return SepLayout(*(x.to(DEVICE, torch.int32).contiguous() for x in layout))


def random_case(dtype, head_sizes):
    """Inputs of every shape and option of the kernel: tensors, then layout, window, sinks."""
    B, H, D = random.randint(1, 3), random.randint(1, 3), random.choice(head_sizes)
    lengths = [1, 2, random.randint(1, 40), random.randint(1, 80)]
    if B * H <= 2:  # the interpreter is slow
        lengths.append(random.randint(80, 300))
    Tq = random.choice(lengths)
    Tk = Tq + random.choice([0, random.randint(0, 60)])
    window = random.choice([1, 2, 9, 33, 130, 400])
    sinks = random.choice([0, 1, 4, 20])
    # transposed, not contiguous, as a model has them
    tensors = [torch.randn(B, T, H, D, device=DEVICE).to(dtype).transpose(1, 2)
               for T in (Tq, Tk, Tk, Tq, Tq)]
    return tensors, (random_layout(B, Tq, Tk, window, sinks), window, sinks)


def out_and_gradients(attention, tensors, case, dtype, with_q_sink):
    """Output and gradients of q, k, v and q_sink."""
    q, k, v, q_sink, do = (x.detach().to(dtype).requires_grad_() for x in tensors)
    leaves = {"q": q, "k": k, "v": v}
    if with_q_sink:
        leaves["q_sink"] = q_sink
    out = attention(q, k, v, *case, q_sink=leaves.get("q_sink"))
    grads = torch.autograd.grad(out, list(leaves.values()), do)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


triton_attention = functools.partial(sep_attention, impl="triton")


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory is full of NaN, so that an element that nobody wrote is seen."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: torch.full_like(x, torch.nan, **kw))
    monkeypatch.setattr(torch, "empty",
                        lambda *size, **kw: torch.full(size, fill_value=torch.nan, **kw))


@pytest.mark.parametrize("dtype, head_sizes, cases", [
    (torch.float32, [16, 32, 64, 128], 14),
    (torch.bfloat16, [16, 32, 64, 128], 14),
    (torch.float16, [16, 64], 8),  # few, since each size costs six compilations
])
def test_output_and_gradients_equal_float64(seed, poison, dtype, head_sizes, cases):
    for _ in range(cases):
        tensors, case = random_case(dtype, head_sizes)
        with_q_sink = random.random() < 0.5
        exact = out_and_gradients(dense_attention, tensors, case, torch.float64, with_q_sink)
        dense = out_and_gradients(dense_attention, tensors, case, dtype, with_q_sink)
        kernel = out_and_gradients(triton_attention, tensors, case, dtype, with_q_sink)
        # three times the dense form's error in this precision, and 12 roundings of the largest
        allowed = 3 * max((dense[name].double() - exact[name]).abs().max() for name in exact)
        allowed += 12 * torch.finfo(dtype).eps * max(1, *(x.abs().max() for x in exact.values()))
        for name in exact:
            error = (kernel[name].double() - exact[name]).abs().max()
            shapes = [tuple(x.shape) for x in tensors[:2]]
            assert error <= allowed, (name, shapes, case[1:], with_q_sink)


def test_gradients_are_the_same_in_every_run(seed):
    tensors, case = random_case(torch.float32, [16])
    first, second = (out_and_gradients(triton_attention, tensors, case, torch.float32, True)
                     for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_offsets_beyond_2_to_the_31(seed):
    if DEVICE == "cpu" or torch.cuda.mem_get_info()[0] < 50 << 30:
        pytest.skip("needs a GPU with 50 GB")
    T, H, window = 1 << 19, 80, 16
    far = torch.arange(0, T, 5000, dtype=torch.int32, device=DEVICE)[None]
    stop = torch.searchsorted(far[0], torch.arange(T, device=DEVICE) - window, right=True)
    stop = stop.to(torch.int32)[None]
    case = SepLayout(far, torch.zeros_like(stop), stop), window
    q, k, v, do = (torch.randn(1, H, T, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    tensors = q, k, v, q, do
    last = [x[:, -1:] for x in tensors]
    alone = out_and_gradients(triton_attention, last, case, torch.bfloat16, False)
    together = out_and_gradients(triton_attention, tensors, case, torch.bfloat16, False)
    for name in alone:
        assert torch.equal(together[name][:, -1:], alone[name]), name


@pytest.fixture
def small(seed):
    """q, k, v, and layout, window, sinks of a small case."""
    q, k, v = (torch.randn(2, 1, T, 16, device=DEVICE, requires_grad=True) for T in (20, 24, 24))
    return q, k, v, random_layout(2, 20, 24, window=3, sinks=4), 3, 4


def test_torch_library_accepts_the_operator(small):
    q, k, v, layout, window, sinks = small
    for q_sink in (None, torch.randn_like(q).requires_grad_()):
        library.opcheck(_attention, (q, k, v, *layout, window, sinks, q_sink))


def test_compiles_without_graph_break(small):
    q, k, v, *case = small
    compiled = torch.compile(triton_attention, fullgraph=True, backend="aot_eager")
    tensors = q, k, v, q, torch.randn_like(q)
    for with_q_sink in (False, True):
        expected = out_and_gradients(triton_attention, tensors, case, q.dtype, with_q_sink)
        result = out_and_gradients(compiled, tensors, case, q.dtype, with_q_sink)
        assert all(torch.equal(expected[name], result[name]) for name in expected)


def test_model_compiles_without_graph_break(seed, tiny, monkeypatch):
    monkeypatch.setattr(sep_kernel, "sep_attention", triton_attention)
    model = GPT(tiny(n_embd=32)).to(DEVICE)
    ids = torch.randint(12, (2, 30), device=DEVICE)  # longer than block_size: with q_sink
    loss = model(ids, ids)[1]
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, ids)[1]
    compiled.backward()
    assert torch.allclose(loss, compiled, atol=1e-5)
    grads = [p.grad for p in model.parameters()]
    assert all(torch.allclose(g, e, atol=1e-4) for g, e in zip(grads, expected, strict=True))


@torch.no_grad()
def test_kernel_streams_as_it_reads(seed, tiny, monkeypatch):
    """The promise of the cache holds on the Triton path, within bf16's own error."""
    config = tiny(n_layer=1, n_embd=32, window=9, max_seps=3)
    model, ids = GPT(config), torch.randint(12, (1, 150))
    exact = model.double()(ids)[0]
    model = model.to(DEVICE, torch.bfloat16)
    ids = ids.to(DEVICE)
    allowed = 3 * (model(ids)[0].cpu().double() - exact).abs().max() + 0.05 * exact.abs().max()
    monkeypatch.setattr(sep_kernel, "sep_attention", triton_attention)
    for chunk_size in (1, 7, 64, 1000):
        cache = SepCache(config, 1, DEVICE, torch.bfloat16)
        T = 40 if chunk_size == 1 else 150  # the interpreter is slow
        chunks = ids[:, :T].split(chunk_size, dim=1)
        out = torch.cat([model(chunk, cache=cache)[0] for chunk in chunks], 1).cpu().double()
        assert (out - exact[:, :T]).abs().max() <= allowed, chunk_size


def test_a_window_may_be_longer_than_the_text(small):
    q, k, v, layout, _, sinks = small
    nothing_far = torch.zeros_like(layout.stop)
    layout = layout._replace(stop=nothing_far)
    for impl in ("torch", "triton"):
        out = sep_attention(q, k, v, layout, 24, sinks, impl=impl)
        endless = sep_attention(q, k, v, layout, 1 << 40, sinks, impl=impl)
        assert torch.equal(out, endless)


@pytest.mark.parametrize("D, dtype, impl, sentence", [
    (24, torch.float32, "triton", "D 24"),
    (16, torch.float64, "triton", "torch.float64"),
    (16, torch.float32, "cuda", "impl is 'cuda', and must be auto, triton or torch"),
])
def test_what_cannot_be_done_is_a_sentence(small, D, dtype, impl, sentence):
    *_, layout, window, sinks = small
    q, k, v = (torch.randn(2, 2, T, D, device=DEVICE, dtype=dtype) for T in (20, 24, 24))
    with pytest.raises(ValueError, match=sentence):
        sep_attention(q, k, v, layout, window, sinks, impl=impl)
