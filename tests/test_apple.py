"""What an Apple GPU cannot do is not asked of it: no float64 but for angles, no missing operation.

It cannot be run without one. So training, streaming and scoring run on the CPU, under a watch that
refuses what would fail there.
"""
import re
from pathlib import Path

import torch
import torchgen
from conftest import SHAPE, run
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
import sample
import train

TABLE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"


class AppleGPU(TorchDispatchMode):
    """Refuses float64 and missing operations, but for what runs `on_the_cpu`.

    Which operations have a kernel for Apple GPUs ("MPS") stands in PyTorch's own table of them.
    """

    def __init__(self):
        super().__init__()
        self.depth_on_cpu = 0
        self.operations = set()
        entries = re.split(r"^- func: ", TABLE.read_text(), flags=re.MULTILINE)[1:]
        self.entry_of = {entry.split("(")[0]: entry for entry in entries}

    def on_the_cpu(self, function):
        """The function as one that computes on the CPU, and is not watched."""

        def unwatched(*args):
            self.depth_on_cpu += 1
            result = function(*args)
            self.depth_on_cpu -= 1
            return result

        return unwatched

    def has_kernel(self, name):
        """name: of an operation and its overload, such as `add.Tensor`."""
        entry = self.entry_of.get(name)
        if entry is None:
            return False
        if delegate := re.search(r"structured_delegate: (\S+)", entry):
            return self.has_kernel(delegate[1])
        # "Composite": made of other operations; so is what has no entry for any device
        return "dispatch:" not in entry or bool(re.search(r"MPS|Composite", entry))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = str(operation).removeprefix("aten.").removesuffix(".default")
        self.operations.add(name)
        is_attention = name.startswith("_scaled_dot_product")  # each device has its own
        if self.depth_on_cpu > 0 or is_attention or operation.namespace != "aten":
            return result
        assert self.has_kernel(name), f"{name} is missing on MPS"
        for x in result if isinstance(result, (tuple, list)) else [result]:
            is_float64 = isinstance(x, torch.Tensor) and x.dtype == torch.float64
            assert not is_float64, f"{name} makes a float64 tensor"
        return result


def test_training_streaming_and_scoring_ask_for_nothing_that_mps_lacks(data, tmp_path, monkeypatch):
    watch = AppleGPU()
    assert watch.has_kernel("add.Tensor") and not watch.has_kernel("linalg_eig")
    for name in ("rope_cos_sin", "rope_frequencies"):
        unwatched = watch.on_the_cpu(getattr(model_module, name))
        monkeypatch.setattr(model_module, name, unwatched)
    checkpoint = tmp_path / "out" / "ckpt.pt"
    with watch:
        code, _, err = run(train, "--data", data, "--out_dir", tmp_path / "out",
                           "--max_steps", 3, *SHAPE)
        assert code == 0, err
        for options in (["--stream", "--max_new_tokens", 60], ["--score", data / "val.bin"],
                        ["--num_samples", 2, "--top_k", 5, "--max_new_tokens", 10]):
            code, _, err = run(sample, "--ckpt", checkpoint, *options)
            assert code == 0, err
    # both ways through the cache were watched
    assert {"searchsorted.Tensor", "index_copy_", "scatter_.src"} <= watch.operations
