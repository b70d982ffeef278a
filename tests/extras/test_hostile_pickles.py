"""torch.save's files as a stranger may make them: nothing of them runs, no byte beside them is read, none is a bomb."""

import io
import struct
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_kernels.cli import main
from tests.support import hostile_files as hostile
from tests.support import hostile_pickles as pickles
from tests.support.hostile_files import depths
from tests.support.hostile_pickles import ODD, OTHERS, Storage, View, saved, state_dict
from tests.support.hostile_readers import assert_bits, converted
from tests.support.peft_meaning import K, N, R

FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=("zip", "legacy"))


def read(case, content, name="state.pt"):
    """What is converted of these bytes: (lora_A, lora_B, magnitude) of each module, None where they are refused."""
    folder = case()
    path = pickles.written(folder / name, content)
    made = converted(folder, path, source_format="torchtune", alpha=8)
    return None if made is None else {module: parts[1:] for module, parts in made.items()}


def check(case, content):
    """Where these bytes are taken, torch.load has the same numbers."""
    made = read(case, content)
    if made is None:
        return
    try:
        expected = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # what torch takes apart more strictly has no other reader to tell what it means
        return
    assert expected.keys() == {f"{module}.{name}" for module in made for name in pickles.NAMES}
    for module, parts in made.items():
        for name, tensor in zip(pickles.NAMES, parts, strict=True):
            assert_bits(tensor, expected[f"{module}.{name}"])


@FORMATS
@pytest.mark.parametrize("name", ODD)
def test_odd_tensors(case, name, legacy):
    make, fine = ODD[name]
    tensors = state_dict()
    lora_A = make(tensors["a.lora_a.weight"])
    made = read(case, saved(tensors | {"a.lora_a.weight": lora_A}, legacy))
    assert (made is not None) == fine
    if fine:
        assert_bits(made["a"][0], lora_A)
        assert_bits(made["a"][1], tensors["a.lora_b.weight"])


@FORMATS
@pytest.mark.parametrize("name", OTHERS)
def test_other_things_than_a_state_dict(case, name, legacy):
    assert read(case, saved(OTHERS[name](), legacy)) is None


@FORMATS
@depths
def test_damaged_files(case, depth, legacy):
    content = saved(state_dict(), legacy)

    @depth(40)
    @given(content=hostile.damaged(content))
    def holds(content):
        check(case, content)

    holds()


@FORMATS
@depths
def test_other_pickles(case, depth, legacy):
    """An instruction of the program is another one; in the older format it stands among the storages."""
    tensors = state_dict()
    with zipfile.ZipFile(io.BytesIO(saved(tensors))) as archive:
        program = archive.read("archive/data.pkl")
    whole = saved(tensors, legacy=True)
    start = whole.index(b"\x80\x02}q\x00(X\x0f\x00\x00\x00a.lora_a.weight")
    end = whole.index(b"\x80\x02]", start)

    @depth(60)
    @given(program=pickles.mutated_pickle(whole[start:end] if legacy else program))
    def holds(program):
        if legacy:
            check(case, whole[:start] + program + whole[end:])
        else:
            check(case, pickles.with_pickle(saved(tensors), lambda content: program))

    holds()


def tensors_of(storage, offset=0, size=(R, K), stride=(K, 1)):
    """A state dict of Views, of which lora_A is this one."""
    views = (View(storage, offset, size, stride), View(Storage("1", N * R), 0, (N, R), (R, 1)))
    views += (View(Storage("2", N), 0, (N,), (1,)),)
    return {f"a.{name}": view for name, view in zip(pickles.NAMES, views, strict=True)}


RECORDS = {"0": struct.pack("<20f", *range(20)), "1": b"\1" * (4 * N * R), "2": b"\1" * (4 * N)}


def both_formats(value, elements=R * K):
    """A state dict of Views in an archive, and in the older format, where a storage's size stands twice."""
    counts = (elements, N * R, N)
    keys = ["0", "1", "2"]
    records = [
        (count if type(count) is int and abs(count) < 2**63 else 0, RECORDS[key])
        for count, key in zip(counts, keys, strict=True)
    ]
    return pickles.archive(value, RECORDS), pickles.legacy(value, keys, records)


def test_a_file_made_by_hand_is_read(case):
    for content in both_formats(tensors_of(Storage("0", R * K))):
        assert_bits(read(case, content)["a"][0], torch.arange(20.0).reshape(R, K))
        assert len(torch.load(io.BytesIO(content), weights_only=True)) == 3


CLAIMS = (0, 1, 19, 21, 1000, 2**31, 2**40, 2**62, 2**63, 2**70, -1, -20, True, "20", None, 20.0)


@pytest.mark.parametrize("elements", CLAIMS, ids=str)
def test_storages_that_claim_other_bytes_than_there_are(case, elements):
    for size, stride in (((R, K), (K, 1)), ((1000, 1000), (1000, 1)), ((R, K), (0, 1))):
        for content in both_formats(tensors_of(Storage("0", elements), 0, size, stride), elements):
            assert read(case, content) is None


@depths
def test_views_of_any_shape(case, depth):
    """Of a storage of 20 numbers: what reaches beyond it is refused, and all else has the numbers that it names."""
    number = st.sampled_from(
        (0, 1, 2, 3, 4, 5, 6, 19, 20, 21, 2**31, 2**62, 2**63, 2**64, -1, -5, True, "4", 4.0, None)
    )
    shape = st.lists(number, max_size=4).map(tuple) | st.sampled_from(((R, K), (R, 1), (1, K), (), [R, K], "ab", {}, 3))

    @depth(60)
    @given(offset=st.just(0) | number, size=st.just((R, K)) | shape, stride=shape | st.just((K, 1)))
    def holds(offset, size, stride):
        for content in both_formats(tensors_of(Storage("0", R * K), offset, size, stride)):
            made = read(case, content)
            if made is not None:
                assert_bits(made["a"][0], torch.arange(20.0).as_strided(size, stride, offset))

    holds()


def parts_that_take_for_ever():
    """State dicts with a tuple of 2^60 parts in every place that somebody may hash, show or compare."""
    bomb, fine = pickles.doubled(), tensors_of(Storage("0", R * K))
    for value in (
        bomb,
        fine | {"a.b": bomb},
        tensors_of(bomb),
        tensors_of(Storage(bomb, R * K)),
        tensors_of(Storage("0", bomb)),
        tensors_of(Storage("0", R * K), bomb),
        tensors_of(Storage("0", R * K), 0, bomb),
        tensors_of(Storage("0", R * K), 0, bomb, bomb),
        tensors_of(Storage("0", R * K), 0, (R, K), bomb),
        {**fine, "b": [bomb]},
    ):
        yield from both_formats(value)
    for keys in (bomb, [bomb], [bomb, "0"], {"0": bomb}, ["0", bomb]):
        yield pickles.legacy(fine, keys, [(R * K, RECORDS["0"])])
    program = pickles.dumped(bomb)[:-1] + b"N"
    for opcodes in (b"s.", b"d.", b"R.", b"\x81.", b"Q.", b"b.", b"a.", b"e.", b"\x93.", b"}" + program[2:] + b"s."):
        yield from pickles.files_around(b"\x80\x02}" + program[2:] + opcodes)


def test_what_takes_for_ever_is_refused(case):
    for content in parts_that_take_for_ever():
        assert read(case, content) is None
    for program in (pickles.deep(10**4), b"\x80\x02" + b"(" * 10**4 + b".", b"\x80\x02" + b"]" * 10**4 + b"."):
        for content in pickles.files_around(program):
            assert read(case, content) is None


def test_a_pickle_of_endless_instructions_is_refused(case, monkeypatch):
    content = saved(state_dict())
    assert read(case, content) is not None
    monkeypatch.setattr("dora_kernels.extras.convert.pickles.MOST_OPCODES", 50)
    assert read(case, content) is None


def test_nothing_runs(case, tmp_path):
    canary = tmp_path / "ran"
    for program in pickles.running(f"touch {canary}"):
        for content in pickles.files_around(program):
            for name in ("state.pt", "state.bin", "state.pth", "state.safetensors"):
                assert read(case, content, name) is None
    assert not canary.exists()


def test_a_name_imports_nothing(case, monkeypatch):
    """torch makes some of its names, torch.onnx for one, when it is asked for them."""
    asked = []
    monkeypatch.setattr(torch, "__getattr__", asked.append)
    for program in (b"\x80\x02}X\x01\x00\x00\x00actorch\nonnx_of_tomorrow\ns.", b"\x80\x02ctorch\nonnx_of_tomorrow\n."):
        for content in pickles.files_around(program):
            assert read(case, content) is None
    assert "onnx_of_tomorrow" not in asked


def test_records_that_are_not_what_they_seem(case):
    """Compressed ones, which may be bombs, ones that are gone or longer, twice the same name, another byte order."""
    content = saved(state_dict())
    compressed = pickles.rezipped(content, lambda name, record: record, zipfile.ZIP_DEFLATED)
    bomb = pickles.rezipped(
        content, lambda name, record: b"\0" * 10**8 if "/data/" in name else record, zipfile.ZIP_DEFLATED
    )
    gone = pickles.rezipped(content, lambda name, record: None if name.endswith("/data/0") else record)
    longer = pickles.rezipped(content, lambda name, record: record + b"\0" if "/data/" in name else record)
    no_pickle = pickles.rezipped(content, lambda name, record: None if name.endswith(".pkl") else record)
    order = pickles.rezipped(content, lambda name, record: b"big" if name.endswith("byteorder") else record)
    for made in (bomb, gone, longer, no_pickle):
        assert read(case, made) is None
    for made in (compressed, order):
        check(case, made)
    twice = io.BytesIO(content)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("archive/data/0", b"\0" * 4 * R * K)
    check(case, twice.getvalue())


def test_the_command_line_says_one_line(tmp_path, capfd):
    """Nothing of torch's beside it."""
    for place, content in enumerate(pickles.files_around(b"\x80\x05}.")):
        path = pickles.written(tmp_path / f"{place}.pt", content)
        names = ["--from", "torchtune", "--to", "lycoris", "--no-bias"]
        assert main(["convert", str(path), str(tmp_path / "out"), *names]) == 2
        assert len(capfd.readouterr().err.splitlines()) == 1
