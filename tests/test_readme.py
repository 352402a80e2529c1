"""What the README says is so: options, files, lines of code, and the lines that change the rule."""
import inspect
import re

import torch
from conftest import ROOT, run
from test_mask import definition_mask

import sep_kernel
import sep_mask
from sep_mask import SepConfig, far_layout

README = (ROOT / "README.md").read_text()
SNIPPETS = [code.partition("```")[0] for code in README.split("```python\n")[1:]]


def test_the_readme_names_options_and_files_that_exist():
    for script in ("train.py", "sample.py", "data/prepare.py", "sep_mask.py"):
        _, known, _ = run(script, "--help")
        for line in README.splitlines():
            if re.match(rf"(\$ )?(python|torchrun .*) {script}", line):
                for option in re.findall(r" (--[a-z_]+)", line.partition(script)[2]):
                    assert option in known, line
    for name in re.findall(r"(?<!--out )\b[A-Za-z0-9_/-]+\.(?:py|md|sh|svg|txt)\b", README):
        assert (ROOT / name).exists(), name


def test_the_definition_is_the_code():
    """Every line of it stands in one of the two functions that it shows."""
    code = inspect.getsource(sep_mask.visible) + inspect.getsource(sep_kernel.dense_attention)
    lines = list(map(str.strip, code.splitlines()))
    assert all(line.strip() in lines for line in SNIPPETS[0].strip().splitlines())


def test_a_rule_of_ones_own_is_a_few_lines(monkeypatch):
    source = inspect.getsource(sep_mask.is_kept)
    in_sep = "        kept = kept | (ids[..., None] == separators).any(-1)\n"
    changed = source.replace(in_sep, in_sep + SNIPPETS[1])
    assert changed != source
    exec(changed, vars(sep_mask) | {"__name__": "changed"}, names := {})
    monkeypatch.setattr(sep_mask, "is_kept", names["is_kept"])
    config = SepConfig(window=2, sinks=1, block_size=50)
    ids = torch.tensor([list(b"ab7cd.ef")])
    assert far_layout(ids, config).reach.tolist() == [[8, 2, 8, 2, 2, 8, 2, 2]]


def test_the_lines_for_a_model_of_ones_own_run():
    """Streamed beyond block_size they are the definition, with sinks seen from block_size - 1."""
    ours = {}
    exec(SNIPPETS[2], ours)
    x, outputs, config = ours["x"], ours["outputs"], ours["config"]
    assert torch.allclose(outputs[:, :, :512], ours["y"], atol=1e-4)
    mask = definition_mask(ours["ids"], config)
    position = torch.arange(x.shape[1])
    q, k, v = ours["project"](x, position)
    q_sink, _, _ = ours["project"](x, position.clamp(max=config.block_size - 1))
    scores = torch.where(position < config.sinks, q_sink @ k.mT, q @ k.mT) * 64 ** -0.5
    expected = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v
    assert torch.allclose(outputs, expected, atol=1e-4)
