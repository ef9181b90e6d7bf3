"""The single products of `train_gpu.py --products`: forms that are compared compute the same."""

from __future__ import annotations

import torch

from recipes.benchmarks import train_gpu, train_products

SMALL = ["--products", "--device", "cpu", "--hidden", "32", "--intermediate", "48", "--layers", "2", "--batch", "1",
         "--length", "16", "--widths", "8", "16", "--rank", "4"]  # fmt: skip


def test_forms_of_a_product_agree():
    args = train_gpu.parse(SMALL)
    torch.manual_seed(0)
    compared = 0
    for name, (features, outs) in train_products.groups_of(args.hidden, args.intermediate).items():
        for question in train_products.questions(name, features, outs, args, 16):
            results = {form: call().clone().float() for form, call in question.forms.items() if form != "without up"}
            first, *others = results.values()
            assert first.norm() > 0
            for other in others:
                torch.testing.assert_close(other, first, rtol=2e-2, atol=2e-2)
                compared += 1
    assert compared > 30


def test_report(tmp_path, capsys):
    path = tmp_path / "products.json"
    report = train_gpu.main([*SMALL, "--output", str(path)])
    assert path.exists() and {row["width"] for row in report["rows"]} == {8, 16}
    for row in report["rows"]:
        stars = [form for form in row["us"] if form.endswith("*")]
        assert len(stars) == 1 and row["us"].keys() == row["per_step_ms"].keys()
    assert "qkv[2] dB" in capsys.readouterr().out
