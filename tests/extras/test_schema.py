"""JSON of strangers ends in a value, or in one ValueError with the file, the key, its value and what was expected."""

import json
import math

import pytest
import torch
from pydantic import ValidationError

from dora_kernels.extras import convert
from dora_kernels.extras.patterns import whole
from dora_kernels.extras.schema import AdapterConfig, HeaderAlphas, ModelIndex, parsed, read_config, read_json

DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


def test_a_config_keeps_what_it_says_and_no_more(tmp_path):
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"a": 4}, "alpha_pattern": None, "x": [1]}
    (tmp_path / "c.json").write_text(json.dumps(config))
    read = read_config("f", tmp_path / "c.json")
    assert read == config and type(read["lora_alpha"]) is int
    (tmp_path / "c.json").write_text('{"lora_alpha": 1e-1, "init_lora_weights": true, "alpha_pattern": {"a": 2.5}}')
    read = read_config("f", tmp_path / "c.json")
    assert read == {"lora_alpha": 0.1, "init_lora_weights": True, "alpha_pattern": {"a": 2.5}}
    (tmp_path / "c.json").write_text("{}")
    assert read_config("f", tmp_path / "c.json") == {}


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        (AdapterConfig, "[]", "it is []; expected a JSON object"),
        (AdapterConfig, "3", "it is 3; expected a JSON object"),
        (
            AdapterConfig,
            "",
            "cannot be read: Invalid JSON: EOF while parsing a value at line 1 column 0; expected JSON",
        ),
        (AdapterConfig, b"\xff\xfe{\0}\0", "cannot be read: Invalid JSON"),
        (AdapterConfig, b'{"x": "\xff"}', "cannot be read: Invalid JSON"),
        (AdapterConfig, DEEP, "cannot be read: Invalid JSON: recursion limit exceeded"),
        (AdapterConfig, '{"x": 1' + "0" * 10_000 + "}", "cannot be read: Invalid JSON: number out of range"),
        *[
            (AdapterConfig, f'{{"r": {value}}}', "; expected an integer of 1 or more")
            for value in ("0", "-1", "null", "true", '"4"', "4.0", "[4]", "{}", "NaN", "1e400", "1" + "0" * 400, 2**31)
        ],
        *[
            (AdapterConfig, f'{{"{field}": {before}{value}{after}}}', "; expected a number that float64 holds")
            for field, before, after in (("lora_alpha", "", ""), ("alpha_pattern", '{"a": ', "}"))
            for value in ("true", "null", '"8"', "[]", "{}", "NaN", "-Infinity", "1e999", "1" + "0" * 400)
        ],
        (AdapterConfig, '{"rank_pattern": [4]}', "rank_pattern is [4]; expected a JSON object"),
        (AdapterConfig, '{"rank_pattern": {"a": true}}', "rank_pattern.a is True; expected an integer"),
        (AdapterConfig, '{"rank_pattern": {"' + "a" * 5000 + '": 0}}', "aaa... is 0; expected an integer"),
        (AdapterConfig, '{"use_dora": "yes"}', "use_dora is 'yes'; expected a valid boolean"),
        (AdapterConfig, '{"use_rslora": 1}', "use_rslora is 1; expected a valid boolean"),
        (AdapterConfig, '{"fan_in_fan_out": []}', "fan_in_fan_out is []; expected a valid boolean"),
        (AdapterConfig, '{"peft_type": ["LORA"]}', "peft_type is ['LORA']; expected a valid string"),
        (AdapterConfig, '{"init_lora_weights": 1}', "init_lora_weights is 1; expected true, false or a name"),
        (AdapterConfig, '{"init_lora_weights": {}}', "init_lora_weights is {}; expected true, false or a name"),
        (ModelIndex, "{}", "has no weight_map; expected one"),
        *[
            (ModelIndex, f'{{"weight_map": {value}}}', "; expected a JSON object")
            for value in ("[]", "null", "3", '"model.safetensors"')
        ],
        *[
            (ModelIndex, json.dumps({"weight_map": {"w": value}}), "; expected the name of a file in the same folder")
            for value in (3, None, [], "", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "x" * 256)
        ],
        (HeaderAlphas, "[]", "it is []; expected a JSON object"),
        (HeaderAlphas, '{"a": "3"}', "a is '3'; expected a number that float64 holds"),
        (HeaderAlphas, DEEP, "cannot be read: Invalid JSON: recursion limit exceeded"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_what_is_wrong_is_named(model, text, expected):
    with pytest.raises(ValueError) as raised:
        parsed("f", "c.json", text, model)
    message = str(raised.value)
    assert message.startswith(("f: c.json: ", "f: c.json cannot", "f: c.json has")) and expected in message
    assert len(message) < 400 and "\n" not in message


def test_numbers_at_the_ends_of_their_ranges_are_taken():
    config = parsed("f", "c.json", f'{{"r": {2**31 - 1}, "lora_alpha": {10**308}, "use_dora": null}}', AdapterConfig)
    assert (config.r, config.lora_alpha, config.use_dora) == (2**31 - 1, 10**308, None)
    alphas = parsed("f", "header", '{"a": 5e-324, "b": -1.7976931348623157e308, "c": 0}', HeaderAlphas).root
    assert alphas == {"a": 5e-324, "b": -math.nextafter(math.inf, 0), "c": 0}


def test_a_file_of_another_kind_or_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^f: .* is a folder"):
        read_json("f", tmp_path, ModelIndex)
    (tmp_path / "c.json").write_bytes(b"[" * (AdapterConfig.most_bytes + 1))
    with pytest.raises(ValueError, match="^f: .*c.json has more than"):
        read_config("f", tmp_path / "c.json")


@pytest.mark.parametrize(
    ("model", "text"),
    [(AdapterConfig, '{"rank_pattern": %s}'), (AdapterConfig, '{"alpha_pattern": %s}')]
    + [(ModelIndex, '{"weight_map": %s}'), (HeaderAlphas, "%s")],
)
def test_of_many_wrong_values_the_first_is_the_only_error(model, text):
    """pydantic has a kilobyte for each: an index of 10 MB had 1.4 GB."""
    text %= json.dumps({"fine": 0, "b": None} | dict.fromkeys(map(str, range(1000))))
    with pytest.raises(ValidationError) as raised:
        model.model_validate_json(text)
    assert raised.value.error_count() == 1


def test_what_is_written_of_46_000_layers_is_not_too_long_to_be_read():
    """Of 60 blocks with 256 experts of 3 layers, each with a rank and an alpha of its own."""
    names = [f"model.layers.{i}.mlp.experts.{j}.gate_{k}_proj" for i in range(60) for j in range(256) for k in range(3)]
    settings = {whole(name): 16 for name in names}
    config = {"rank_pattern": settings, "alpha_pattern": settings, "target_modules": names}
    assert len(json.dumps(config, indent=2)) < AdapterConfig.most_bytes
    assert len(json.dumps(dict.fromkeys(names, 16))) < HeaderAlphas.most_bytes


def test_alphas_of_a_header_that_are_too_long_are_refused(monkeypatch):
    monkeypatch.setattr(HeaderAlphas, "most_bytes", 9)
    tensors = {"a.lora_A.weight": torch.ones(4, 5), "a.lora_B.weight": torch.ones(6, 4)}
    tensors["a.lora_magnitude_vector"] = torch.ones(6)
    for text, fits in (('{"a": 40}', True), ('{"a": 40 }', False)):
        checkpoint = convert.Checkpoint(tensors, header={"dora_alpha": text})
        if fits:
            assert convert.decode(convert.FORMATS["dora_kernels"], checkpoint)[0].scaling == 10
            continue
        with pytest.raises(ValueError, match="dora_alpha has 10 letters; expected at most 9"):
            convert.decode(convert.FORMATS["dora_kernels"], checkpoint)
