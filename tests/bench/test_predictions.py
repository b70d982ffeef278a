"""The tables of predictions: what their cells are of, by hand where it can be."""

import pytest

from bench.studies import predictions


def cells(table):
    """The rows of a Markdown table by their first cells, each by column."""
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    found = [dict(zip(header, row, strict=True)) for row in rows]
    return {(row["M, N, K, R"], row.get("card", "")): row for row in found}


def test_steps_add_up_to_their_ratio():
    """With a gap of 1 us before each launch, of which the frozen layer has two."""
    ratios, steps = cells(predictions.ratios_table()), cells(predictions.steps_table())
    assert len(steps) == 2 * len(ratios)
    for (sizes, card), row in steps.items():
        total = sum(float(row[name] or 0) for name in predictions.STEPS)
        launches, ratio = (ratios[sizes, ""][f"{card}: {column}"] for column in ("launches", "graph"))
        frozen = float(row["base"]) + float(row["dx"]) + 2
        assert (total + int(launches)) / frozen == pytest.approx(float(ratio), abs=0.01)


def test_peft_s_passes_are_counted_over_the_frozen_layer():
    row = cells(predictions.nf4_table())["8192, 4096, 4096, 64", ""]
    # 12 passes over (M, N) and 6 over (M, K) of 67 MB, and 12 launches of 4 us
    assert float(row["QLoRA"]) - float(row["frozen"]) == pytest.approx(18 * 67.1e6 / 4.3e9 + 0.048, abs=0.011)
    assert float(row["frozen"]) < float(row["ours"]) < float(row["QLoRA"]) < float(row["QDoRA"])
    over = float(row["ours over QDoRA (target 0.6)"])
    assert over == pytest.approx(float(row["ours"]) / float(row["QDoRA"]), abs=0.01)


def test_the_ways_are_the_steps_of_a_training_step_and_what_won_stands_beside_them():
    rows = [
        {"M": 8192, "N": 4096, "K": 4096, "R": 64, "pass": name, "way": way, "us": us}
        for name, of in {"forward": {"split": 400.0, "fused": 380.0}, "backward": {"none": 500.0}}.items()
        for way, us in of.items()
    ]
    rows += [{**rows[0], "way": "merged", "left_out": "no room"}, {**rows[0], "N": 8192, "us": 1.0}]
    del rows[-2]["us"]
    found = cells(predictions.ways_table([{"meta": {"device": "NVIDIA H200"}, "rows": rows}]))
    steps = cells(predictions.steps_table())
    for card, won in (("H200", "forward fused -5.0% of 400 us"), ("H100", "")):
        key = "8192, 4096, 4096, 64", card
        row, alone = (
            found[key],
            {name: float(us) for name, us in steps[key].items() if us and name in predictions.STEPS},
        )
        forward = sum(alone[name] for name in ("norm", "low", "base", "epilogue"))
        assert float(row["forward: split"]) == pytest.approx(forward + 4, abs=1)  # and four launches of 1 us
        backward = sum(alone[name] for name in ("merge", "dx", "P", "token_sums", "dA"))
        assert float(row["backward: none"]) == pytest.approx(backward + 5, abs=2)
        assert row["measured"] == won
    assert all(row["measured"] == "" for key, row in found.items() if key != ("8192, 4096, 4096, 64", "H200"))
