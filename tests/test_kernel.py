"""The Triton kernel against float64: on the GPU if there is one, else in Triton's interpreter."""
import functools
import random

import pytest
import torch
from torch import library

import model
from model import GPT
from sep_cache import SepConfig, far_layout
from sep_kernel import _attention, sep_attention

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_attention = functools.partial(sep_attention, impl="triton")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """So that an element that no program wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def visible_keys(ids, config):
    """Which keys each query sees, (B, 1, T, T) bool: the definition, without reach or a list."""
    T = ids.shape[1]
    positions = torch.arange(T, device=ids.device)
    distance = positions[:, None] - positions  # (T, T)
    kept = torch.zeros_like(ids, dtype=torch.bool)
    if config.attn == "sep":
        kept = torch.isin(ids, torch.tensor(config.separators, device=ids.device))
    elif config.attn == "fixed":
        kept = (positions % config.fixed_every == 0).expand(ids.shape)
    is_sink = positions < config.sinks
    far = kept[:, None] & ~is_sink & (distance >= config.window)  # (B, T, T)
    if config.max_seps is not None:
        age = far.flip(2).cumsum(2).flip(2)  # 1: the latest that has left the window
        far &= age <= config.max_seps
    far &= distance < config.block_size
    near = distance < config.window
    return ((near | is_sink | far) & (distance >= 0))[:, None]


def dense_attention(q, k, v, mask):
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def random_case(dtype, head_sizes=(16, 32, 64, 128), longest=250):
    """q, k, v and the output's gradient; the layout and mask of the same texts; a config."""
    pick = random.choice
    config = SepConfig(
        attn=pick(["sep", "sep", "fixed", "streamingllm"]),
        window=pick([1, 2, 9, 33, 10 ** 9]),
        sinks=pick([0, 1, 4, 20]),
        max_seps=pick([None, 0, 3, 16, 64, 64, 64]),
        block_size=pick([8, 64, 300, 300]),
        fixed_every=pick([1, 3, 10]),
        separators=(1,))
    B = pick([1, 2])
    H = pick([1, 2])
    D = pick(head_sizes)
    T = pick([1, random.randint(2, 15), random.randint(16, 70), longest, longest, longest])
    share = torch.tensor([[pick([0, 0.1, 0.7, 0.9])] for _ in range(B)])  # of separators
    ids = (torch.rand(B, T) < share).long().to(DEVICE)
    # not contiguous, as a model has them
    tensors = torch.randn(4, B, T, H, D, device=DEVICE, dtype=dtype)
    tensors = list(tensors.transpose(2, 3))
    return tensors, far_layout(ids, config), visible_keys(ids, config), config


def out_and_gradients(attention, tensors, *args):
    q, k, v, do = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, *args)
    return out.detach(), *torch.autograd.grad(out, leaves, do)


def error(results, exact):
    """The largest error, or NaN."""
    errors = [(x.double() - e).abs().max() for x, e in zip(results, exact, strict=True)]
    return torch.stack(errors).max()


@pytest.mark.parametrize("dtype, cases", [
    (torch.float32, 6),
    (torch.bfloat16, 24),
    (torch.float16, 8),
])
def test_output_and_gradients_equal_float64(seed, dtype, cases):
    for _ in range(cases):
        tensors, layout, mask, config = random_case(dtype)
        exact = out_and_gradients(dense_attention, [x.double() for x in tensors], mask)
        dense = out_and_gradients(dense_attention, tensors, mask)
        kernel = out_and_gradients(
            triton_attention, tensors, layout, config.window, config.sinks)
        # three times the dense form's error in this precision, and 12 roundings of the largest
        largest = max(1, *(x.abs().max() for x in exact))
        allowed = 3 * error(dense, exact) + 12 * torch.finfo(dtype).eps * largest
        assert error(kernel, exact) <= allowed, (tensors[0].shape, config)


def guarded(x):
    """x, contiguous, with NaN (or -1) in the memory before and after it."""
    guard = 1 << 14
    poison = torch.nan if x.is_floating_point() else -1
    memory = torch.full((x.numel() + 2 * guard,), poison, dtype=x.dtype, device=x.device)
    inside = memory[guard:-guard].view(x.shape)
    return inside.copy_(x)


def test_nothing_outside_of_the_tensors_is_used(seed):
    for _ in range(12):
        tensors, layout, mask, config = random_case(torch.float32, [16], longest=40)
        expected = out_and_gradients(dense_attention, tensors, mask)
        tensors = [guarded(x) for x in tensors]
        layout = [guarded(x) for x in layout]
        kernel = out_and_gradients(
            triton_attention, tensors, layout, config.window, config.sinks)
        assert error(kernel, expected) < 1e-4, (tensors[0].shape, config)


def test_gradients_are_the_same_in_every_run(seed):
    tensors, layout, _, config = random_case(torch.bfloat16, [16])
    args = layout, config.window, config.sinks
    first = out_and_gradients(triton_attention, tensors, *args)
    second = out_and_gradients(triton_attention, tensors, *args)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_offsets_beyond_2_to_the_31(seed):
    if DEVICE == "cpu" or torch.cuda.mem_get_info()[0] < 50 << 30:
        pytest.skip("needs a GPU with 50 GB")
    T, H = 1 << 19, 80
    config = SepConfig(window=16, separators=(1,), block_size=T)
    ids = (torch.arange(T, device=DEVICE) % 5000 == 0).long()[None]
    args = far_layout(ids, config), config.window, config.sinks
    tensors = [torch.randn(1, H, T, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    last = [x[:, -1:] for x in tensors]
    alone = out_and_gradients(triton_attention, last, *args)
    together = out_and_gradients(triton_attention, tensors, *args)
    assert all(a.equal(b[:, -1:]) for a, b in zip(alone, together, strict=True))


@pytest.fixture
def small(seed):
    """q, k, v and the output's gradient; layout, window and sinks."""
    config = SepConfig(window=3, sinks=2, max_seps=4, separators=(1,))
    ids = torch.randint(3, (2, 20), device=DEVICE)
    tensors = [torch.randn(2, 1, 20, 16, device=DEVICE) for _ in range(4)]
    return tensors, (far_layout(ids, config), config.window, config.sinks)


def test_torch_library_accepts_the_operator(small):
    tensors, (layout, window, sinks) = small
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    library.opcheck(_attention, (q, k, v, list(layout), window, sinks))
    _, lse = _attention(q, k, v, list(layout), window, sinks)
    assert not lse.requires_grad  # it has no gradient, so none is dropped


def test_compiles_without_graph_break(small):
    tensors, args = small
    compiled = torch.compile(triton_attention, fullgraph=True, backend="aot_eager")
    expected = out_and_gradients(triton_attention, tensors, *args)
    results = out_and_gradients(compiled, tensors, *args)
    assert all(a.equal(b) for a, b in zip(results, expected, strict=True))


def test_a_training_step_compiles_without_graph_break(seed, tiny, monkeypatch):
    monkeypatch.setattr(model, "sep_attention", triton_attention)
    gpt = GPT(tiny(n_embd=32)).to(DEVICE)
    ids = torch.randint(12, (2, 16), device=DEVICE)

    def train(network):
        gpt.zero_grad()
        loss = network(ids, ids)[1]
        loss.backward()
        return loss.detach(), *(p.grad for p in gpt.parameters())

    expected = train(gpt)
    results = train(torch.compile(gpt, fullgraph=True, backend="aot_eager"))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("T, D, dtype, sentence", [
    (20, 24, torch.float32, "D 24"),
    (20, 16, torch.float64, "torch.float64"),
    (1_000_001, 16, torch.float32, "T 1000001"),
])
def test_what_cannot_be_done_is_a_sentence(small, T, D, dtype, sentence):
    _, args = small
    x = torch.zeros(2, 1, 1, D, device=DEVICE, dtype=dtype).expand(-1, -1, T, -1)
    with pytest.raises(ValueError, match=f"impl='triton' needs .*given: .*{sentence}"):
        triton_attention(x, x, x, *args)


def test_the_kernel_needs_a_gpu_or_the_interpreter(small, monkeypatch):
    tensors, args = small
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs triton, a CUDA device.*given: .*cpu"):
        triton_attention(*(x.cpu() for x in tensors[:3]), *args)
