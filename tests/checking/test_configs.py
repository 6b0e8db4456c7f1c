"""Configs alone: written by hand, and in a model's config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressed_format import ConfigError, QuantizationConfig, check
from compressed_format.config import patterns
from tests.checking.checkpoints import found

W4A16 = {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}}}}
COMPRESSED = QuantizationConfig.preset("W4A16").to_dict()


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_config_that_is_right(tmp_path: Path) -> None:
    report = check(write(tmp_path / "w4a16.json", W4A16))
    assert report.findings == ()
    assert (report.ok, report.exit_code) == (True, 0)


def test_every_mistake_of_an_author(tmp_path: Path) -> None:
    """Everything that reading the config strictly says, in its words."""
    weights = {"num_bits": 9, "grup_size": 64, "strategy": "chanel"}
    path = write(
        tmp_path / "c.json", {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}, "ingore": []}
    )
    with pytest.raises(ConfigError) as error:
        QuantizationConfig.from_file(path)
    report = check(path)
    assert [(finding.place, finding.message) for finding in report.errors] == [
        (problem.place, problem.message) for problem in error.value.problems
    ]
    assert len(report.errors) == 4
    assert {finding.code for finding in report.errors} == {"CF101"}
    assert report.exit_code == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", '"words"', "\x00", '{"config_groups": {}', "[" * 100_000, "1e999"])
def test_what_is_no_config(tmp_path: Path, text: str) -> None:
    report = check(write(tmp_path / "c.json", text))
    assert {finding.code for finding in report.findings} == {"CF101"}
    assert report.exit_code == 1


def test_a_pattern_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried on names as they are in checkpoints."""
    monkeypatch.setattr(patterns, "_SECONDS_PER_MATCH", 0.01)
    config = {"config_groups": {"g": {"targets": [r"re:(\w|\w\w|\.)*[^a-z.0-9_]$"], "weights": {"num_bits": 4}}}}
    assert [code for code, _ in found(write(tmp_path / "c.json", config))] == ["CF111"]


def test_config_json_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert found(write(path, {"model_type": "llama", "quantization_config": COMPRESSED})) == []
    assert [finding.code for finding in check(write(path, {"model_type": "llama"})).findings] == ["CF104"]
    old = COMPRESSED | {"quantization_status": "frozen", "version": "0.9.0"}
    assert found(write(path, {"compression_config": old})) == [
        ("CF105", "compression_config.quantization_status"),
        ("CF108", "compression_config"),
    ]
    nested = {"text_config": {"quantization_config": COMPRESSED}}
    assert found(write(path, nested)) == [("CF108", "text_config.quantization_config")]
    assert found(write(path, {"quantization_config": [1]})) == [("CF101", "quantization_config")]
    assert [code for code, _ in found(write(path, {"quantization_config": {"quant_method": "awq"}}))] == ["CF101"]


def test_a_missing_status_is_an_error(tmp_path: Path) -> None:
    """The config reads it as compressed; transformers does not."""
    config = {key: value for key, value in COMPRESSED.items() if key != "quantization_status"}
    path = write(tmp_path / "config.json", {"quantization_config": config})
    assert found(path) == [("CF105", "quantization_config.quantization_status")]
    assert "is missing" in check(path).errors[0].message


@pytest.mark.parametrize(
    ("version", "codes"),
    [("0.20.0", []), ("0.20.1", []), ("0.9.4", []), ("0.21.0", ["CF106"]), ("1.0", ["CF106"]), ("main", ["CF106"]),
     (None, ["CF107"])],
)  # fmt: skip
def test_vintages(tmp_path: Path, version: str | None, codes: list[str]) -> None:
    path = write(tmp_path / "config.json", {"quantization_config": COMPRESSED | {"version": version}})
    assert [finding.code for finding in check(path).findings] == codes


def test_keys_that_stand_twice(tmp_path: Path) -> None:
    text = json.dumps({"quantization_config": COMPRESSED})
    path = write(tmp_path / "config.json", text.replace('"ignore": []', '"ignore": [], "ignore": ["lm_head"]'))
    assert found(path) == [("CF102", "quantization_config.ignore")]


@pytest.mark.parametrize(("location", "codes"), [("input", ["CF109"]), ("weight_input", ["CF110"])])
def test_rotations(tmp_path: Path, location: str, codes: list[str]) -> None:
    transform = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": location}]}
    config = COMPRESSED | {"transform_config": {"config_groups": {"R": transform}}}
    path = write(tmp_path / "config.json", {"quantization_config": config})
    report = check(path)
    assert [finding.code for finding in report.findings] == codes
    assert report.findings[0].place == "transform_config.config_groups.R.apply[0]"
    assert report.ok == (location == "weight_input")


def test_mxfp4_of_0_13_0() -> None:
    golden = Path(__file__).parents[1] / "golden"
    assert [code for code, _ in found(golden / "v0.13.0_mxfp4bug" / "mxfp4")] == ["CF211"]
    assert found(golden / "v0.20.0" / "mxfp4") == []


def test_rules_of_consumers_for_a_config_alone(tmp_path: Path) -> None:
    asymmetric = {
        "config_groups": {
            "g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64, "symmetric": False}}
        }
    }
    path = write(tmp_path / "c.json", asymmetric)
    assert found(path) == []
    assert found(path, consumers=["vllm", "sglang", "llama.cpp"]) == []
    assert found(path, consumers=["transformers"]) == [("CF601", "config_groups.g")]


@pytest.mark.parametrize("consumers", [["vlm"], "vllm"])
def test_unknown_consumers(tmp_path: Path, consumers: Any) -> None:
    with pytest.raises(ConfigError, match="consumers"):
        check(tmp_path, consumers=consumers)


def test_a_config_needs_no_torch(tmp_path: Path) -> None:
    authored = write(tmp_path / "c.json", W4A16)
    of_model = write(tmp_path / "config.json", {"quantization_config": COMPRESSED})
    program = (
        "import sys\nfrom compressed_format import check\n"
        f"assert check({str(authored)!r}, consumers=['vllm', 'sglang', 'transformers', 'llama.cpp']).ok\n"
        f"assert check({str(of_model)!r}).ok\n"
        "assert not {'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
