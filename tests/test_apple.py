"""What an Apple GPU cannot do is not asked of it: no float64 outside the angles, no missing operation.

It cannot be run without one. So training, streaming and scoring run on the CPU, under a watch that
refuses what would fail there.
"""
import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
import sample
import train
from conftest import SHAPE, run
from data import prepare

# from PyTorch's own list of what it skips on MPS, torch/testing/_internal/common_mps.py, and what
# that leaves to the CPU
MISSING = {"put", "put_", "kthvalue", "median", "nanmedian", "mode", "heaviside", "frexp", "logspace",
           "matrix_exp", "geqrf", "linalg_eig", "linalg_eigh", "linalg_lstsq", "linalg_svdvals",
           "linalg_matrix_norm", "hash_tensor", "glu", "huber_loss", "log_sigmoid_forward", "mish"}


class AppleGPU(TorchDispatchMode):
    """Refuses float64 and missing operations, but for what runs inside of `on_the_cpu`."""

    def __init__(self):
        super().__init__()
        self.elsewhere = 0
        self.operations = set()

    @contextlib.contextmanager
    def on_the_cpu(self):
        self.elsewhere += 1
        yield
        self.elsewhere -= 1

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        self.operations.add(name)
        if not self.elsewhere:
            assert name not in MISSING, f"{operation} is missing on MPS"
            results = result if isinstance(result, (tuple, list)) else [result]
            for x in results:
                is_float64 = isinstance(x, torch.Tensor) and x.dtype == torch.float64
                assert not is_float64, f"{operation} makes a float64 tensor"
        return result


def test_training_streaming_and_scoring_ask_for_nothing_that_mps_lacks(tmp_path, monkeypatch):
    (tmp_path / "some.txt").write_text("A man. A plan, a canal: Panama!\n" * 200)
    prepare.prepare(tmp_path / "text", path=tmp_path / "some.txt")
    watch = AppleGPU()
    for name in ("rope_cos_sin", "rope_frequencies"):
        def angles(*args, function=getattr(model_module, name)):
            with watch.on_the_cpu():
                return function(*args)
        monkeypatch.setattr(model_module, name, angles)
    checkpoint = tmp_path / "out" / "ckpt.pt"
    with watch:
        code, _, err = run(train, "--data", tmp_path / "text", "--out_dir", tmp_path / "out",
                           "--max_steps", 3, *SHAPE)
        assert code == 0, err
        for options in (["--stream", "--max_new_tokens", 60], ["--score", tmp_path / "some.txt"],
                        ["--num_samples", 2, "--top_k", 5, "--max_new_tokens", 10]):
            code, _, err = run(sample, "--ckpt", checkpoint, *options)
            assert code == 0, err
    # both ways through the cache were watched
    assert {"searchsorted", "index_copy_", "scatter_"} <= watch.operations
