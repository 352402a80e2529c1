"""The Triton kernel against float64: on the GPU if there is one, else in Triton's interpreter."""
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from test_mask import definition_mask, error, masked_attention, out_and_gradients, random_config
from torch import library

import model
from model import GPT, cached_attention
from sep_kernel import (
    _attention,
    block_attention,
    kernel_attention,
    kernel_can_run,
    sep_attention,
)
from sep_mask import SepConfig, far_layout

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANGES = "far", "start", "stop", "reach"


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """So that an element that no program wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_case(dtype, head_sizes=(16, 32, 64, 128), longest=250):
    """q, k, v and the output's gradient; the layout and mask of the same texts; a config."""
    pick = random.choice
    config = random_config(
        max_seps=pick([None, 0, 3, 16, 64]), block_size=pick([8, 64, 300]), separators=(1,))
    B = pick([1, 2])
    H = pick([1, 2])
    D = pick(head_sizes)
    T = pick([1, random.randint(2, 15), random.randint(16, 70), longest, longest, longest])
    share = torch.tensor([[pick([0, 0.1, 0.7, 0.9])] for _ in range(B)])  # of separators
    ids = (torch.rand(B, T) < share).long()
    mask = definition_mask(ids, config).to(DEVICE)
    # not contiguous, as a model has them
    tensors = torch.randn(4, B, T, H, D, device=DEVICE, dtype=dtype).transpose(2, 3)
    return tensors, far_layout(ids.to(DEVICE), config), mask, config


@pytest.mark.parametrize("dtype, cases", [
    (torch.float32, 6),
    (torch.float16, 24),
    # in the interpreter, NumPy would multiply the bare bits
    pytest.param(torch.bfloat16, 24, marks=pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")),
])
def test_output_and_gradients_equal_float64(dtype, cases):
    for _ in range(cases):
        tensors, layout, mask, config = random_case(dtype)
        exact = out_and_gradients(masked_attention, tensors.double(), mask)
        dense = out_and_gradients(masked_attention, tensors, mask)
        kernel = out_and_gradients(kernel_attention, tensors, layout)
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


def test_nothing_outside_of_the_tensors_is_used():
    for _ in range(12):
        tensors, layout, mask, config = random_case(torch.float32, [16], longest=40)
        expected = out_and_gradients(masked_attention, tensors, mask)
        tensors = [guarded(x) for x in tensors]
        layout = layout._replace(**{name: guarded(getattr(layout, name)) for name in RANGES})
        kernel = out_and_gradients(kernel_attention, tensors, layout)
        assert error(kernel, expected) < 1e-4, (tensors[0].shape, config)


def test_offsets_beyond_2_to_the_31():
    if DEVICE == "cpu" or torch.cuda.mem_get_info()[0] < 50 << 30:
        pytest.skip("needs a GPU with 50 GB")
    T, H = 1 << 19, 80
    config = SepConfig(window=16, separators=(1,), block_size=T)
    ids = (torch.arange(T, device=DEVICE) % 5000 == 0).long()[None]
    layout = far_layout(ids, config)
    tensors = torch.randn(4, 1, H, T, 64, device=DEVICE, dtype=torch.bfloat16)
    last = tensors[:, :, -1:]
    alone = out_and_gradients(kernel_attention, last, layout)
    together = out_and_gradients(kernel_attention, tensors, layout)
    assert all(a.equal(b[:, -1:]) for a, b in zip(alone, together, strict=True))


def test_torch_library_accepts_the_operator():
    tensors, layout, *_ = random_case(torch.float32, [16], longest=20)
    q, k, v, _ = (x.transpose(1, 2).contiguous().requires_grad_() for x in tensors)
    library.opcheck(_attention, (q, k, v, list(layout[:4]), layout.window, layout.sinks))


def test_a_training_step_compiles_without_graph_break(monkeypatch):
    monkeypatch.setattr(model, "sep_attention", kernel_attention)
    gpt = GPT(tiny(n_embd=32)).to(DEVICE)
    ids = torch.randint(12, (2, 16), device=DEVICE)

    gradients = []
    for network in (gpt, torch.compile(gpt, fullgraph=True, backend="aot_eager")):
        gpt.zero_grad()
        network(ids, ids)[1].backward()
        gradients.append([p.grad for p in gpt.parameters()])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""
    is_cuda = True
    device = torch.device("cuda", 0)


def test_a_gpu_that_triton_does_not_support_takes_the_pytorch_form(monkeypatch):
    (q, k, v, _), layout, *_ = random_case(torch.float32)
    q_on_gpu = q.as_subclass(OnGPU)
    properties = SimpleNamespace(major=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert kernel_can_run(q_on_gpu)
    assert not any(map(kernel_can_run, (q.cpu(), q_on_gpu.double(), q_on_gpu[..., :15])))
    properties.major = 7
    out = sep_attention(q_on_gpu, k, v, layout)
    assert out.equal(block_attention(q, k, v, layout))


def test_heads_that_share_keys_are_attended_to_as_with_enable_gqa(monkeypatch):
    q = torch.randn(2, 6, 5, 16)
    k, v = torch.randn(2, 2, 2, 40, 16)
    mask = torch.randn(2, 1, 5, 40)
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    attend = F.scaled_dot_product_attention

    def attend_as_on_a_gpu(q, *args):
        """PyTorch's memory-efficient kernel writes (B, T, H, D)."""
        return attend(q, *args).transpose(1, 2).contiguous().transpose(1, 2)

    for how in (attend, attend_as_on_a_gpu):
        monkeypatch.setattr(F, "scaled_dot_product_attention", how)
        out = cached_attention(q, k, v, mask.repeat(1, 1, 3, 1))  # 3 heads share keys
        assert torch.allclose(out, expected, atol=1e-5)
