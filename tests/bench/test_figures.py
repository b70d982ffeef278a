"""The figures of README.md and docs/ are what the results say, and nothing else."""

import json

import pytest

from bench import figures
from bench.studies import predictions


def row(provider, ms, *, graph=None, ok=True, M=64, step="forward+backward"):
    timing = None if ms is None else {"median": ms}
    return {
        "provider": provider, "step": step, "precision": "bf16", "M": M, "N": 32, "K": 16, "R": 8, "ok": ok,
        "ms": timing, "graph_ms": graph and {"median": graph},
    }  # fmt: skip


META = {"device": "Card", "torch": "2", "triton": "3", "peft": "0", "commit": "a" * 40, "date": "2026-01-02T03"}


@pytest.fixture
def results(tmp_path):
    rows = [row("frozen", 2.0), row("peft_lora", 3.0), row("peft_dora", 8.0), row("ours", 2.5)]
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "layer.json").write_text(json.dumps({"meta": META, "rows": rows}))
    return tmp_path


def test_the_page_holds_the_ratios(results):
    text = figures.layer_page(results)
    assert "| bf16 | 32 x 16 | 8 | 64 | 2 ms | 1.50 | 4.00 | 1.25 | 0.31 |" in text
    assert "Card" in text and "`aaaaaaaaaa`" in text and "2026-01-02" in text


def test_the_summary_holds_geometric_means(results):
    path = results / "card" / "layer.json"
    data = json.loads(path.read_text())
    others = [row("frozen", 1.0), row("peft_lora", 6.0), row("peft_dora", 4.0), row("ours", 5.0)]
    data["rows"] += [entry | {"N": 48} for entry in others]
    path.write_text(json.dumps(data))
    text = figures.figures(results)
    # 1.5 and 6 over the frozen layer; 4 and 4; 1.25 and 5; ours over PEFT DoRA 0.3125 and 1.25
    assert "| bf16 | 64 | 2 | 3.00 | 4.00 | 2.50 | 0.62 | 1.25 |" in text
    assert figures.NO_GPU not in text


def test_the_readme_has_the_means_of_bf16_and_its_card(results):
    path = results / "card" / "layer.json"
    data = json.loads(path.read_text())
    data["rows"] += [row("frozen", 1.0) | {"N": 48}, row("peft_lora", 6.0) | {"N": 48}]
    data["rows"] += [row("peft_dora", 4.0) | {"N": 48}, row("ours", 5.0) | {"N": 48}]
    data["rows"] += [entry | {"precision": "fp32"} for entry in data["rows"]]
    path.write_text(json.dumps(data))
    text = figures.headline(results)
    assert [line for line in text.splitlines() if line.startswith("| 64")] == ["| 64 | 1 | 3.00 | 4.00 | 2.50 | 0.62 |"]
    assert "**Card** (card)" in text and "No GPU" not in text
    (results / "cpu").mkdir()
    (results / "cpu" / "layer.json").write_text(json.dumps(data))
    assert figures.headline(results) == text  # where a GPU has run it, a CPU's figures are for another page
    (results / "card" / "layer.json").unlink()
    assert "(cpu)" in figures.headline(results) and figures.headline(results).count("No GPU") == 1
    assert max(map(len, text.splitlines())) <= figures.COLUMNS


def test_the_cpu_alone_says_that_no_gpu_ran(results):
    (results / "card").rename(results / "cpu")
    assert figures.figures(results).startswith(figures.NO_GPU)


def test_errors_by_way_stand_in_a_line_for_each_tensor(results):
    rows = [
        {"dtype": "bfloat16", "R": R, "tensor": tensor, "pytorch": 4e-3, "split": 2e-3, "merged": merged}
        for R, merged in ((128, 2.5e-3), (384, 3e-3))
        for tensor in ("y", "dx")
    ]
    data = {"meta": META | {"configurations": 2, "seed": 1}, "rows": rows}
    (results / "card" / "errors-by-way.json").write_text(json.dumps(data))
    table = figures.error_tables(results).splitlines()[2:]
    cells = "4.00e-03 / 2.00e-03 / 2.50e-03 (1.25) | 4.00e-03 / 2.00e-03 / 3.00e-03 (1.50)"
    header = ["| weight-adapter | tensor | R = 128 | R = 384 |", "| --- | --- | --- | --- |"]
    assert [line.strip() for line in table] == [*header, f"| bfloat16 | y | {cells} |", f"| bfloat16 | dx | {cells} |"]


def test_no_results_no_figures(tmp_path):
    assert figures.figures(tmp_path).startswith(figures.NO_GPU)
    assert figures.draw(tmp_path, tmp_path / "out") == []


def test_one_clock_for_both_sides_of_a_ratio():
    graphs = [row("frozen", 2.0, graph=1.0), row("peft_dora", 8.0, graph=6.0), row("ours", 4.0, graph=1.5)]
    (times,) = figures.cases(graphs, "forward+backward").values()
    assert times == {"frozen": 1.0, "peft_dora": 6.0, "ours": 1.5}
    graphs[2]["graph_ms"] = None
    (times,) = figures.cases(graphs, "forward+backward").values()
    assert times == {"frozen": 2.0, "peft_dora": 8.0, "ours": 4.0}


def test_inference_is_told_by_step_and_by_clock(results):
    path = results / "card" / "layer.json"
    data = json.loads(path.read_text())
    for step, factor in (("inference", 1.0), ("inference+frozen_adapters", 0.5)):
        for name, eager, graph in (("frozen", 2.0, 1.0), ("peft_dora", 6.0, 3.0), ("ours", 4.0 * factor, 1.2)):
            data["rows"].append(row(name, eager, graph=graph, step=step))
    path.write_text(json.dumps(data))
    table = figures.layer_page(results).partition("## Inference")[2]
    assert "| inference | graph | bf16 | 32 x 16 | 8 | 64 | 1 ms |  | 3.00 | 1.20 | 0.40 |" in table
    assert "| inference | eager | bf16 | 32 x 16 | 8 | 64 | 2 ms |  | 3.00 | 2.00 | 0.67 |" in table
    assert "| inference+frozen_adapters | graph | bf16 | 32 x 16 | 8 | 64 | 1 ms |  | 3.00 | 1.20 | 0.40 |" in table
    assert "| inference+frozen_adapters | eager | bf16 | 32 x 16 | 8 | 64 | 2 ms |  | 3.00 | 1.00 | 0.33 |" in table


def test_what_is_no_ordinary_case_stands_apart(results):
    before = figures.layer_page(results), figures.figures(results)
    assert "With dropout" not in before[0]
    path = results / "card" / "layer.json"
    data = json.loads(path.read_text())
    times = {"frozen": 2.0, "peft_dora": 9.0, "ours": 5.0, "ours_lora_dropout": 3.0}
    data["rows"] += [row(name, ms) | {"variant": "dropout 0.05"} for name, ms in times.items()]
    path.write_text(json.dumps(data))
    assert figures.figures(results) == before[1]  # of the same sizes as an ordinary case
    page = figures.layer_page(results)
    assert (
        "- dropout 0.05, bf16, 64 tokens, 32 x 16, R = 8: frozen 2 ms; "
        "over it peft_dora 4.50, ours 2.50, ours_lora_dropout 1.50\n" in page
    )


def test_predictions_name_their_cards():
    header, _, first, *_ = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in predictions.ratios_table().splitlines()
    )
    found = dict(zip(header, first, strict=True))
    assert found["M, N, K, R"] == "8192, 4096, 4096, 64"
    assert 1 < float(found["H200: graph"]) < float(found["H200: eager"]) < float(found["H100: eager"])
    # all that is not the frozen layer's two products is bytes, from memory and in part from the L2 cache, and gaps
    more = (float(found["H100: graph"]) - 1) / (float(found["H200: graph"]) - 1)
    assert 1.25 < more < 4.3 / 3.0
    assert found["H200: launches"] == found["H100: launches"] == "9"


def test_a_provider_that_failed_the_gate_is_left_out():
    rows = [row("frozen", 2.0), row("peft_dora", 8.0), row("ours", None, ok=False)]
    assert figures.cases(rows, "forward+backward") == {}


def test_the_plots_are_reproducible(results, tmp_path):
    paths = figures.draw(results, tmp_path / "one")
    again = figures.draw(results, tmp_path / "two")
    assert [path.stem for path in paths] == ["card-speed", "card-tokens"] == list(figures.plot_names(results))
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]


def test_the_analysis_says_what_was_found(tmp_path):
    def points(method, pairs):
        return [
            {"layer": "q_proj" if at % 2 else "k_proj", "checkpoint": f"{method}-{at // 2}", "method": method,
             "delta_direction": x, "delta_magnitude": y}
            for at, (x, y) in enumerate(pairs)
        ]  # fmt: skip

    rows = points("full", [(1, 4), (2, 3), (3, 1), (4, 2)]) + points("LoRA", [(1, 1), (2, 2), (3, 3), (4, 4)])
    rows += points("DoRA", [(1, 1), (2, 3), (3, 2), (4, 4)])
    (tmp_path / "card").mkdir()
    meta = META | {"preset": "tiny", "rank": 4}
    (tmp_path / "card" / "analysis.json").write_text(json.dumps({"meta": meta, "rows": rows}))
    text = figures.figures(tmp_path)
    assert "2 linear layers" in text and "2 checkpoints a method" in text
    assert "down for full fine-tuning (correlation -0.80; 1.00 within the last checkpoint)" in text
    assert "up for LoRA (correlation 1.00; 1.00 within" in text and "up for DoRA (correlation 0.80; 1.00 w" in text
    assert "the paper's for: full fine-tuning, LoRA." in text and "(figures/card-analysis.png" in text
    (plot,) = figures.draw(tmp_path, tmp_path / "one")
    (again,) = figures.draw(tmp_path, tmp_path / "two")
    assert plot.name == "card-analysis.png" and plot.read_bytes() == again.read_bytes()


def test_the_markers_have_to_be_there():
    assert figures.replaced(f"a {figures.BEGIN} old {figures.END} b", "new") == (
        f"a {figures.BEGIN}\nnew\n{figures.END} b"
    )
    for readme in ("none", f"{figures.END}{figures.BEGIN}", 2 * f"{figures.BEGIN}{figures.END}"):
        with pytest.raises(ValueError, match="expected both"):
            figures.replaced(readme, "new")


def test_readme_and_performance_are_up_to_date():
    assert figures.main(["--check"]) == 0
