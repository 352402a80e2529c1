"""What the README says is so: options, files, and the lines for a model of one's own."""
import re

import torch
from conftest import ROOT, run

README = (ROOT / "README.md").read_text()


def test_the_readme_names_options_and_files_that_exist():
    for script in ("train.py", "sample.py", "data/prepare.py", "sep_cache.py"):
        _, known, _ = run(script, "--help")
        for line in README.splitlines():
            if re.match(rf"(\$ )?(python|torchrun .*) {script}", line):
                for option in re.findall(r" (--[a-z_]+)", line.partition(script)[2]):
                    assert option in known, line
    for name in re.findall(r"[A-Za-z_/-]+\.(?:py|md|sh|svg|txt)\b", README):
        assert (ROOT / name).exists(), name


def test_the_lines_for_a_model_of_ones_own_run():
    code = README.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code, names)
    whole, streamed = names["y"], None
    assert whole.shape == (2, 8, 512, 64)
    streamed = names["sep_attention"](names["q"], names["k"], names["v"], names["layout"], 64, 4)
    assert torch.allclose(whole, streamed, atol=1e-5)
