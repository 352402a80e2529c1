"""The Triton kernel against float64: on the GPU if there is one, else in Triton's interpreter."""
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny
from test_mask import definition_mask, error, masked_attention, out_and_gradients, random_config
from torch import library

import model
from model import GPT
from sep_kernel import _attention, kernel_attention, kernel_can_run
from sep_mask import SepConfig, SepLayout, far_layout

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """So that an element that no program wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def guarded(x):
    """x, contiguous, with NaN (or -1) in the memory before and after it."""
    guard = 1 << 14
    poison = torch.nan if x.is_floating_point() else -1
    memory = x.new_full((x.numel() + 2 * guard,), poison)
    inside = memory[guard:-guard].view(x.shape)
    return inside.copy_(x)


def random_case(dtype, longest=250):
    """q, k, v and the output's gradient; the layout and mask of the same texts; a config.

    The kernel computes on these very tensors, so their guards show whether it uses other memory.
    """
    pick = random.choice
    config = random_config(
        max_seps=pick([None, 0, 3, 16, 64]), block_size=pick([8, 64, 300]), separators=(1,))
    B = pick([1, 2])
    H = pick([1, 2])
    D = pick([16, 32, 64, 128])
    T = pick([1, random.randint(2, 15), random.randint(16, 70), longest, longest, longest])
    share = torch.tensor([[pick([0, 0.1, 0.7, 0.9])] for _ in range(B)])  # of separators
    ids = (torch.rand(B, T) < share).long()
    mask = definition_mask(ids, config).to(DEVICE)
    layout = far_layout(ids.to(DEVICE), config)
    layout = SepLayout(*map(guarded, layout[:4]), layout.window, layout.sinks)
    # in the order of memory that a model has them in
    tensors = torch.randn(4, B, T, H, D, device=DEVICE, dtype=dtype)
    return [guarded(x).transpose(1, 2) for x in tensors], layout, mask, config


@pytest.mark.parametrize("dtype, cases", [
    (torch.float32, 12),
    (torch.float16, 24),
    # in the interpreter, NumPy would multiply the bare bits
    pytest.param(torch.bfloat16, 24, marks=pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")),
])
def test_output_and_gradients_equal_float64_and_use_no_other_memory(dtype, cases):
    for _ in range(cases):
        tensors, layout, mask, config = random_case(dtype)
        exact = out_and_gradients(masked_attention, [x.double() for x in tensors], mask)
        dense = out_and_gradients(masked_attention, tensors, mask)
        kernel = out_and_gradients(kernel_attention, tensors, layout)
        # three times the dense form's error in this precision, and 12 roundings of the largest
        largest = max(1, *(x.abs().max() for x in exact))
        allowed = 3 * error(dense, exact) + 12 * torch.finfo(dtype).eps * largest
        assert error(kernel, exact) <= allowed, (tensors[0].shape, config)


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
    assert error([x[:, -1:] for x in together], alone) == 0


def test_torch_library_accepts_the_operator():
    tensors, layout, *_ = random_case(torch.float32, longest=20)
    q, k, v, _ = (x.transpose(1, 2).requires_grad_() for x in tensors)
    library.opcheck(_attention, (q, k, v, list(layout[:4]), layout.window, layout.sinks))


def test_a_training_step_compiles_without_graph_break(monkeypatch):
    monkeypatch.setattr(model, "sep_attention", kernel_attention)
    gpt = GPT(tiny(n_embd=32)).to(DEVICE)
    ids = torch.randint(12, (2, 16), device=DEVICE)

    gradients = []
    for network in (gpt, torch.compile(gpt, fullgraph=True, backend="aot_eager")):
        _, loss = network(ids, ids)
        gradients.append(torch.autograd.grad(loss, list(gpt.parameters())))
    assert error(*gradients) < 1e-4


def test_the_kernel_runs_where_triton_supports_the_gpu_and_there_are_tiles(monkeypatch):
    def can_run(device="cuda:0", major=8, D=16, dtype=torch.float16):
        properties = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return kernel_can_run(SimpleNamespace(device=torch.device(device), shape=(D,), dtype=dtype))

    assert can_run()
    assert not (can_run("cpu") or can_run(major=7) or can_run(D=15) or can_run(dtype=torch.float64))
