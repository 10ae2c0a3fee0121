"""The examples of the documentation run as they stand."""

import re
from pathlib import Path

import pytest
import torch

from fastmask import kernels

DOCS = Path(__file__).parent.parent / "docs"


def examples(name):
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL))


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_kernel_examples_run(impl, monkeypatch):
    monkeypatch.setattr("fastmask.kernels._dispatch.default_impl", lambda device: impl)
    scope = {}
    exec(compile(examples("kernels.md"), "docs/kernels.md", "exec"), scope)
    assert scope["h"].shape == scope["restored"].shape == (2, 16, 32)
    assert scope["raw"].grad.any()
    for copy, param in zip(scope["copies"], scope["params"], strict=True):
        torch.testing.assert_close(copy.float(), param, rtol=2**-7, atol=0)  # the interpreter truncates


def test_images_of_several_sizes_give_gradients():
    scope = {}
    exec(compile(examples("training.md"), "docs/training.md", "exec"), scope)
    assert scope["losses"]["loss"].shape == (5,)
    assert all(p.grad is not None for p in scope["model"].parameters() if p.requires_grad)


def test_the_block_of_the_page_is_a_dit_block():
    scope = {}
    exec(compile(examples("kernels.md"), "docs/kernels.md", "exec"), scope)
    net = scope["DiT"](width=32, depth=2)
    x, c = torch.randn(2, 5, 32), torch.randn(2, 32)
    out = net(x, c)
    for block in net.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = (t[:, None] for t in block.modulation(c).chunk(6, dim=1))
        h = torch.nn.functional.layer_norm(x, (32,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = block.qkv(h).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 8**0.5).softmax(-1)
        x = x + gate1 * block.proj((weights @ v).transpose(1, 2).flatten(2))
        h = torch.nn.functional.layer_norm(x, (32,), eps=1e-6) * (1 + scale2) + shift2
        x = x + gate2 * block.fc2(torch.nn.functional.gelu(block.fc1(h), approximate="tanh"))
    shift, scale = (t[:, None] for t in net.modulation(c).chunk(2, dim=1))
    expected = net.head(torch.nn.functional.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_every_op_is_in_the_table():
    page = (DOCS / "kernels.md").read_text()
    table = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    helpers = {"patchify", "unpatchify", "random_normal", "random_uniform"}
    assert table == {row.op for row in kernels.backends()} - helpers
    assert all(f"`{name}`" in page for name in helpers)


NAMED_FASTMASK = re.compile(r"pip install[^`\n]*[ '\"]fastmask\b(?!-dit)")


def test_nobody_is_told_to_install_another_project():
    """On PyPI the name belongs to a mail client with the same import name."""
    assert NAMED_FASTMASK.search("pip install 'fastmask[latents]'")
    assert NAMED_FASTMASK.search("pip install -U fastmask")
    assert not NAMED_FASTMASK.search("pip install -e '.[latents]'")
    root = DOCS.parent
    files = [path for folder in ("fastmask", "bench", "docs", "kernels") for path in (root / folder).rglob("*.*")]
    files += [root / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "setup.py")]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".md", ".h", ".cpp", "")}
    assert [str(path) for path, text in texts.items() if NAMED_FASTMASK.search(text)] == []
    assert 'name = "fastmask-dit"' in (root / "pyproject.toml").read_text()


def test_the_speed_of_recipes_is_that_of_the_measured_rows():
    (sentence,) = re.findall(r"Of the other recipes a step .*?\n\n", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    table = (DOCS / "measured.md").read_text().split("### Steps of recipes")[1].split("\n###")[0]
    found = re.findall(r"\d+\.\d+x", sentence)
    assert len(found) == 6
    assert [ratio for ratio in found if f"| {ratio} |" not in table] == []
