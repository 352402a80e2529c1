"""What the README says is so: options, files, lines of code, and the lines that change the rule."""
import inspect
import re

import torch
from conftest import ROOT, run

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
    for name in re.findall(r"[A-Za-z0-9_/-]+\.(?:py|md|sh|svg|txt)\b", README):
        assert (ROOT / name).exists(), name


def test_the_table_of_files_counts_their_lines():
    rows = re.findall(r"^\| `([a-z_/]+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) == 11
    for name, n_lines in rows:
        assert len((ROOT / name).read_text().splitlines()) == int(n_lines), name


def test_the_definition_is_the_code():
    definition = [line.strip() for line in SNIPPETS[0].splitlines()]
    code = (ROOT / "sep_kernel.py").read_text().splitlines()
    code = [line.strip() for line in code]
    start = code.index(definition[0])
    assert code[start:start + 4] == definition[:4]


def test_a_rule_of_ones_own_is_a_few_lines(monkeypatch):
    source = inspect.getsource(sep_mask.is_kept)
    changed = source.replace("    return kept", SNIPPETS[1] + "    return kept")
    assert changed != source
    exec(changed, vars(sep_mask) | {"__name__": "changed"}, names := {})
    monkeypatch.setattr(sep_mask, "is_kept", names["is_kept"])
    config = SepConfig(window=2, sinks=1, block_size=50)
    ids = torch.tensor([list(b"ab7cd.ef")])
    assert far_layout(ids, config).reach.tolist() == [[8, 2, 8, 2, 2, 8, 2, 2]]


def test_the_lines_for_a_model_of_ones_own_run():
    names = {}
    exec(SNIPPETS[2], names)
    q, layout, config = names["q"], names["layout"], names["config"]
    whole = names["sep_attention"](q, names["k"][:, :, :512], names["v"][:, :, :512], layout,
                                   config.window, config.sinks)
    assert whole.shape == names["y"].shape == (2, 8, 512, 64)
    assert torch.allclose(whole, names["y"], atol=1e-5)
