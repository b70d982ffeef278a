"""Files of torch.save are read to the last bit, run nothing, and say what is wrong with them in one ValueError."""

import collections
import io
import random
import time
import warnings
import zipfile

import pytest
import torch
from torch import nn

from dora_kernels.extras.convert.adapter import same_bits
from dora_kernels.extras.convert.state_dicts import load_state_dict

SAVED = (
    {},
    {"pickle_protocol": 4},
    {"pickle_protocol": 5},
    {"_use_new_zipfile_serialization": False},
)
LEGACY = SAVED[-1]


class Subclass(torch.Tensor):
    pass


class Evil:
    def __reduce__(self):
        return (open, ("ran", "w"))


def tensors():
    torch.manual_seed(0)
    tagged = torch.randn(3)
    tagged.source = "somewhere"
    rows = torch.randn(6, 5)
    return {
        "plain": rows,
        "column": torch.randn(6, 2)[:, 0],
        "every second": torch.randn(10)[::2],
        "transposed, offset": rows.T[1:],
        "expanded": torch.ones(1, 4).expand(3, 4),
        "rank 1": torch.randn(1, 5),
        "negative": torch._neg_view(torch.randn(4)),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "with an attribute": tagged,
        "scalar": torch.tensor(3.0),
        "empty": torch.ones(0, 4),
        **{str(dtype): torch.ones(3).to(dtype) for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
            torch.uint8, torch.bool, torch.uint16, torch.float8_e4m3fn,
        )},
    }  # fmt: skip


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("options", SAVED, ids=str)
def test_what_was_saved_is_read(tmp_path, options):
    expected = tensors()
    module = nn.Linear(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in (expected, collections.OrderedDict(expected), module.state_dict()):
            read = load_state_dict("f", saved(tmp_path / "x.pt", content, **options))
            assert list(read) == list(content)
            for key, tensor in read.items():
                assert type(tensor) is torch.Tensor
                ours, theirs = (torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t.detach()
                                for t in (tensor, content[key]))  # fmt: skip
                assert same_bits(ours, theirs), key


def test_an_archive_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        saved(tmp_path / "x.pt", {"a": torch.arange(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_state_dict("f", tmp_path / "x.pt")["a"].tolist() == [0, 1, 2]


REFUSED = {
    "a number": ({"a": 3}, "a is of type int"),
    "text": ({"a": "x" * 10_000}, "a is of type str"),
    "an object": ({"a": collections.Counter("a")}, "a is made by"),
    "a call": ({"a": Evil()}, "a is made by"),
    "a call beside": ({"a": torch.ones(2), "b": Evil()}, "b is made by"),
    "nested": ({"a": {"b": torch.ones(2)}}, "a is of type dict"),
    "a list": ([torch.ones(2)], "does not hold tensors by name"),
    "a tensor": (torch.ones(2), "does not hold tensors by name"),
    "a module": (nn.Linear(2, 2), "cannot be read"),
    "integer keys": ({1: torch.ones(2)}, "a key is 1; expected a name"),
    "keys of two kinds": ({"a": torch.ones(2), 2: torch.ones(2)}, "a key is 2"),
    "bytes": ({b"a": torch.ones(2)}, "a key is of type"),
    "a tuple": ({("a",): torch.ones(2)}, "a key is of type tuple"),
    "a number by a key of two lines": ({"a\nb": 3}, r"a\nb is of type int"),
    "half a letter": ({"\ud800": torch.ones(2)}, "surrogates not allowed"),
    "a long key": ({"k" * 1001: torch.ones(2)}, "expected a name of at most 1000 letters"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "a is made by torch._utils._rebuild_sparse_tensor"),
    "nested tensor": ({"a": torch.nested.nested_tensor([torch.ones(2)])}, "a is made by torch._utils._rebuild_nested"),
    "meta": ({"a": torch.ones(4, device="meta")}, "a is made by torch._utils._rebuild_meta_tensor"),
    "a subclass": ({"a": torch.ones(3).as_subclass(Subclass)}, "a is made by torch._tensor._rebuild_from_type_v2"),
    "30 dimensions": ({"a": torch.ones([1] * 30)}, "a has 30 sizes"),
    "16 TB": ({"a": torch.ones(4).as_strided((4, 10**12), (1, 0))}, "bytes ask for 16000000000000"),
    "10^3 views": ({f"{i}": view for view in [torch.ones(10**5)] for i in range(10**3)}, "bytes ask for 400000000"),
}


@pytest.mark.parametrize("options", ({}, LEGACY), ids=("zip", "legacy"))
@pytest.mark.parametrize(("content", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_state_dict_is_named(tmp_path, monkeypatch, content, expected, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as raised:
        load_state_dict("f", saved(tmp_path / "x.pt", content, **options))
    message = str(raised.value)
    assert message.startswith(f"f: {tmp_path / 'x.pt'} cannot be read: ") and expected in message
    assert message.endswith("; expected a state dict of dense tensors and nothing else") and len(message) < 600
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("options", ({}, LEGACY), ids=("zip", "legacy"))
def test_quantized_tensors_are_named(tmp_path, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match="a is made by torch._utils._rebuild_qtensor"):
        load_state_dict("f", saved(tmp_path / "x.pt", {"a": quantized}, **options))


def changed(source, target, change=lambda name, content: content, compression=zipfile.ZIP_STORED):
    """The archive at `source` with other records."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def test_archives_that_say_more_than_they_hold_are_refused(tmp_path):
    good = saved(tmp_path / "good.pt", {"a": torch.ones(3)})

    def is_refused(match, path):
        with pytest.raises(ValueError, match=f"^f: .* cannot be read: .*{match}"):
            load_state_dict("f", path)

    longer = lambda name, old: old.replace(b"K\x03", b"K\xff") if name == "data.pkl" else old  # noqa: E731
    is_refused("a has a storage of 12 bytes; expected 1020", changed(good, tmp_path / "longer.pt", longer))
    wider = lambda name, old: old.replace(b"K\x03\x85", b"K\xff\x85") if name == "data.pkl" else old  # noqa: E731
    is_refused("a has a storage of 12 bytes; expected 12, and its last", changed(good, tmp_path / "wider.pt", wider))
    gone = lambda name, old: None if name == "data/0" else old  # noqa: E731
    is_refused("a has a storage of 0 bytes", changed(good, tmp_path / "gone.pt", gone))
    big = lambda name, old: b"big" if name == "byteorder" else old  # noqa: E731
    is_refused("big-endian", changed(good, tmp_path / "big.pt", big))
    zeros = lambda name, old: bytes(100 << 20) if name == "data/0" else old  # noqa: E731
    is_refused("compressed", changed(good, tmp_path / "bomb.pt", zeros, zipfile.ZIP_DEFLATED))
    content = bytearray(good.read_bytes())
    place = content.index(torch.ones(3).numpy().tobytes())
    content[place] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    is_refused("Bad CRC-32", tmp_path / "flipped.pt")


def test_records_that_share_their_bytes_are_refused(tmp_path):
    """A bomb that is not compressed: every entry of the directory is the one record."""
    saved(tmp_path / "one.pt", {"a": torch.ones(10**4)})
    with zipfile.ZipFile(changed(tmp_path / "one.pt", tmp_path / "x.pt"), "a") as archive:
        (record,) = (one for one in archive.filelist if one.filename.endswith("/data/0"))
        for i in range(1, 100):
            other = zipfile.ZipInfo(record.filename[:-1] + str(i))
            other.header_offset, other.CRC = record.header_offset, record.CRC
            other.file_size = other.compress_size = record.file_size
            archive.filelist.append(other)
        archive.writestr("last", b"")  # so that the directory is written again
    assert (tmp_path / "x.pt").stat().st_size < 100_000
    with pytest.raises(ValueError, match="its records are larger than the file"):
        load_state_dict("f", tmp_path / "x.pt")


def test_a_key_that_is_hashed_for_ever_is_not_hashed(tmp_path):
    twice = b"h\x01h\x01\x86q\x01"
    pickle = b"\x80\x02}q\x00(K\x01\x85q\x01" + 60 * twice + b"tK\x01s."
    good = saved(tmp_path / "good.pt", {"a": torch.ones(3)})
    path = changed(good, tmp_path / "x.pt", lambda name, old: pickle if name == "data.pkl" else old)
    with pytest.raises(ValueError, match="a key is of type tuple"):  # torch.load did not end in 10 s
        load_state_dict("f", path)


def test_sizes_that_are_printed_for_ever_are_not_printed(tmp_path):
    laughs = b"(" + b"K\x01\x85q\xf0" + 60 * b"h\xf0h\xf0\x86q\xf0" + b"t\x85"
    good = saved(tmp_path / "good.pt", {"a": torch.ones(3)})
    for size in (b"K\x03\x85q\x08", b"K\x01\x85q\x09"):

        def change(name, old, size=size):
            if name == "data.pkl":
                assert old.count(size) == 1
                old = old.replace(size, laughs + size[-2:])
            return old

        with pytest.raises(ValueError, match="a has a size, a stride or an offset that is no integer"):
            load_state_dict("f", changed(good, tmp_path / "x.pt", change))


def test_a_legacy_file_that_forgets_a_storage_is_refused(tmp_path):
    content = saved(tmp_path / "x.pt", {"a": torch.ones(3)}, **LEGACY).read_bytes()
    keys = content.rindex(b"\x80\x02]q\x00")
    (tmp_path / "x.pt").write_bytes(content[:keys] + b"\x80\x02]q\x00.")
    with pytest.raises(ValueError, match="a has a storage of 0 bytes"):  # torch.load: memory as it was found
        load_state_dict("f", tmp_path / "x.pt")
    for cut in (3, 8, 13):
        (tmp_path / "x.pt").write_bytes(content[:-cut])
        with pytest.raises(ValueError, match="cannot be read"):
            load_state_dict("f", tmp_path / "x.pt")


@pytest.mark.parametrize("options", SAVED, ids=str)
def test_damaged_files_end_in_a_value_or_one_error(tmp_path, options):
    buffer = io.BytesIO()
    torch.save(
        {"a": torch.randn(4, 5), "b": torch.ones(6, 2)[:, 0], "c": nn.Parameter(torch.ones(2))}, buffer, **options
    )
    source, generator, start = buffer.getvalue(), random.Random(0), time.monotonic()
    for _ in range(300):
        content = bytearray(source)
        for _ in range(generator.choice((1, 1, 3, 20))):
            place = generator.randrange(len(content))
            if generator.random() < 0.7:
                content[place] = generator.randrange(256)
            else:
                del content[place : place + generator.randrange(1, 20)]
        (tmp_path / "x.pt").write_bytes(content)
        try:
            read = load_state_dict("f", tmp_path / "x.pt")
        except ValueError as error:
            assert str(error).startswith("f: ") and len(str(error)) < 600
        else:
            assert all(isinstance(tensor.sum(), torch.Tensor) for tensor in read.values())
    assert time.monotonic() - start < 60
