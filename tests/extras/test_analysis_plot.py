"""The figure: of any names and any number of points, the same bytes for the same analysis, whole or not there."""

import errno
import functools
import os
import time
import warnings

import pytest

from dora_kernels.extras.analysis import Analysis, Point, draw
from tests.support import children
from tests.support.children import in_child

pytest.importorskip("matplotlib")


def points(count, kinds=("q_proj", "k_proj"), checkpoints=("a", "b"), scale=1.0):
    return Analysis(
        [
            Point(
                f"layers.{number}.{kinds[number % len(kinds)]}",
                checkpoints[number % len(checkpoints)],
                ("full", "LoRA", "DoRA")[number % 3],
                scale * (number * 7919 % 1000) / 1000,
                scale * (number * 7877 % 1000) / 1000,
            )
            for number in range(count)
        ]
    )


def drawn(path, *arguments):
    """The file's bytes; whatever matplotlib warns of is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(arguments[0], path, *arguments[1:])
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and [entry.name for entry in path.parent.iterdir()] == [path.name]
    return content


NAMES = [
    *("$", r"b$\frac$.safetensors", r"$\text", "_hidden", "a" * 100_000, "\u3042\U0001f600", "\udcff", "\0\n\x1b[31m"),
    *("", "\u202e\u0301" * 50, "%s{0}", "\\"),
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_is_no_formula(tmp_path, name):
    content = drawn(tmp_path / "a.png", points(9, (name, "other")), name)
    assert content == drawn(tmp_path / "a.png", points(9, (name, "other")), name)
    if name:
        assert content != drawn(tmp_path / "a.png", points(9, (name, "other")), "")


def test_a_label_that_begins_with_an_underscore_is_in_the_legend(tmp_path):
    named, nameless = (drawn(tmp_path / "a.png", points(9, (name, "other"))) for name in ("_kind", ""))
    assert named != nameless


def test_many_points_are_few_artists(tmp_path):
    """33,333 points took 16 s of a processor when each was an artist of its own, and 0.5 now."""
    drawn(tmp_path / "a.png", points(9))
    start = time.process_time()
    drawn(tmp_path / "a.png", points(33_333, checkpoints=[f"c{number}" for number in range(33_333)]))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("scale", [0.0, 1e-320, 1e300, -1e308])
def test_any_numbers_can_be_drawn(tmp_path, scale):
    drawn(tmp_path / "a.png", points(9, scale=scale))


def test_an_analysis_of_nothing(tmp_path):
    drawn(tmp_path / "a.png", Analysis())


def limited(path):
    children.limit_files(4096)
    with pytest.raises(OSError) as error:
        draw(points(99), path)
    return error.value.errno, error.value.filename


def test_a_disk_that_refuses_leaves_the_old_figure(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    assert in_child(functools.partial(limited, path)) == (errno.EFBIG, str(path))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.png"]
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        draw(points(9), "/dev/full")
