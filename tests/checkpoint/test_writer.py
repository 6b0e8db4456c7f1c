"""What is written: equal tensors for every reader, the same bytes each time, and no half-checked arguments."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from compressed_format.checkpoint import read_checkpoint, syscalls, write_checkpoint, writer
from compressed_format.dtypes import DTYPES, torch_dtype
from compressed_format.errors import CheckpointError

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]
Holds = Callable[..., bool]

_NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")
_SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def _tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = torch_dtype(draw(st.sampled_from(sorted(DTYPES))))
    shape = draw(_SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = torch.empty(shape, dtype=dtype).nbytes
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    # Any bytes at all: NaN and its kin must survive bit for bit.
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


@given(st.dictionaries(_NAMES, _tensors(), max_size=6), st.integers(1, 600))
def test_round_trips(same_bits: SameBits, tensors: dict[str, torch.Tensor], max_shard_size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "out"
        write_checkpoint(folder, tensors, max_shard_size=max_shard_size)
        checkpoint = read_checkpoint(folder)
        by_reference: dict[str, torch.Tensor] = {}
        for file in checkpoint.files:
            content = (folder / file).read_bytes()
            assert int.from_bytes(content[:8], "little") % 64 == 56
            by_reference |= load_file(folder / file)
            with safe_open(folder / file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
        if len(checkpoint.files) > 1:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
            assert list(index["weight_map"]) == sorted(tensors)
        else:
            assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
        assert set(checkpoint) == set(by_reference) == set(tensors)
        for key, tensor in tensors.items():
            assert same_bits(by_reference[key], tensor)
            assert same_bits(checkpoint[key], tensor)


@given(st.dictionaries(_NAMES, _tensors(), max_size=6))
@settings(max_examples=50)
def test_what_the_reference_writes_is_read(same_bits: SameBits, tensors: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as name:
        save_file(tensors, Path(name) / "model.safetensors")
        checkpoint = read_checkpoint(name)
        assert set(checkpoint) == set(tensors)
        assert all(same_bits(checkpoint[key], tensor) for key, tensor in tensors.items())


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {"c": torch.ones(10), "big": torch.ones(100), "a": torch.ones(10), "b": torch.ones(10)}
    write_checkpoint(tmp_path / "out", tensors, max_shard_size="0.08KB", files={"config.json": b"{}"})
    first, second, third = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    expected = f"""{{
  "metadata": {{
    "total_size": 520
  }},
  "weight_map": {{
    "a": "{third}",
    "b": "{third}",
    "big": "{second}",
    "c": "{first}"
  }}
}}
"""
    assert (tmp_path / "out" / "model.safetensors.index.json").read_text() == expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        first,
        second,
        third,
        "model.safetensors.index.json",
    ]


def test_same_tensors_same_bytes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    for name in ("first", "second"):
        write_checkpoint(tmp_path / name, tensors, max_shard_size=200)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("first", "second")]
    assert contents[0] == contents[1]
    assert len(contents[0]) > 2


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24).reshape(4, 6).t(),
        torch.arange(24)[3::5],
        torch.arange(24)[7:9],
        torch.arange(3)[::3],
        torch.ones(1).expand(3, 4),
        torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj(),
        torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj().imag,
        torch.ones(3, 2).requires_grad_(),
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Buffer(torch.ones(2)),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor(True),
        torch.empty(0),
        torch.empty(3, 0, 2).transpose(0, 1),
    ],
    ids=str,
)
def test_tensors_of_every_kind(tensor: torch.Tensor, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["x"], tensor)


@pytest.mark.cuda
def test_tensors_on_a_gpu(tmp_path: Path) -> None:
    tensor = torch.arange(6, device="cuda").reshape(2, 3).t()
    write_checkpoint(tmp_path / "out", {"x": tensor})
    assert torch.equal(read_checkpoint(tmp_path / "out")["x"], tensor.cpu())


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", {}, metadata={})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (56).to_bytes(8, "little") + b"{}".ljust(56)
    assert load_file(tmp_path / "out" / "model.safetensors") == {}


def test_metadata(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", {"x": torch.ones(1)}, metadata={"format": "pt", "ä": "ö"})
    assert read_checkpoint(tmp_path / "out").metadata == {"format": "pt", "ä": "ö"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "ä": "ö"}


def test_further_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 7)
    (tmp_path / "source").write_bytes(bytes(range(100)))
    files = {"config.json": b"{}", "code/a/x.py": tmp_path / "source", "code/y.py": b"", "code/a/z.py": b"1"}
    write_checkpoint(tmp_path / "out", {"x": torch.ones(1)}, files=files)
    found = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(found) == {*files, "model.safetensors"}
    assert found["code/a/x.py"].read_bytes() == bytes(range(100))
    assert found["config.json"].read_bytes() == b"{}"


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "a" / "out", {"x": torch.ones(1)}, files={"code/x.py": b""})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a").rglob("*")}
    assert modes == {"out": 0o750, "code": 0o750, "model.safetensors": 0o640, "x.py": 0o640}


class _Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("touched")


def _bad_tensors() -> Iterator[tuple[Any, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield "sparse", torch.eye(2).to_sparse()
        yield "rows", torch.eye(2).to_sparse_csr()
        yield "quantized", torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)
        yield "nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        yield "jagged", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    yield "meta", torch.ones(2, device="meta")
    yield "fake", FakeTensorMode().from_tensor(torch.ones(2))
    yield "subclass", torch.Tensor._make_wrapper_subclass(_Subclass, (2,))
    yield "lazy", torch.nn.UninitializedParameter()
    yield "complex128", torch.ones(1, dtype=torch.complex128)
    freed = torch.ones(2)
    freed.untyped_storage().resize_(0)
    yield "freed", freed
    yield "number", 3
    yield "array", torch.ones(2).numpy()
    yield "nothing", None
    yield 4, torch.ones(1)
    yield "\ud800", torch.ones(1)
    yield "__metadata__", torch.ones(1)


def test_all_offenders_are_listed_before_anything_is_written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    bad = dict(_bad_tensors())
    files: Any = {
        "../x": b"",
        "/etc/x": b"",
        "a\\b": b"",
        "": b"",
        "c\0": b"",
        "\udcff": b"",
        5: b"",
        "model.safetensors": b"",
        "model.safetensors.index.json": b"",
        "model-00001-of-00002.safetensors": b"",
        "model.safetensors/x": b"",
        "code": b"",
        "code/x.py": b"",
        "text": "a path or the content?",
        "missing": tmp_path / "missing",
        "folder": tmp_path,
        "fine": b"",
    }
    metadata: Any = {"a": 1, 2: "b", "c": "\ud800", "fine": "yes"}
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "deep" / "out", tensors | bad, files=files, metadata=metadata)
    places = {problem.place for problem in caught.value.problems}
    expected = {str(name) for name in bad if name != "\ud800"} | {r"\ud800"}
    expected |= {f"files[{name!r}]" for name in files if name not in ("fine", "code")}
    expected |= {f"metadata[{name!r}]" for name in metadata if name != "fine"}
    assert places == expected
    str(caught.value).encode()
    assert list(tmp_path.iterdir()) == []


def test_a_mapping_may_make_tensors_on_demand(tmp_path: Path) -> None:
    class Lazy(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().__getitem__(name)

    asked: list[str] = []
    write_checkpoint(tmp_path / "out", Lazy(a=torch.ones(2), b=torch.zeros(16)))
    assert asked == ["b", "a"]  # in the order of the file, one at a time


def test_a_mapping_must_not_change_its_mind(tmp_path: Path) -> None:
    class Fickle(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            return torch.ones(3)

    with pytest.raises(CheckpointError, match="first asked for"):
        write_checkpoint(tmp_path / "out", Fickle(a=torch.ones(2)))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_copied_that_lies_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contiguous tensor's own memory is what the system call gets."""
    addresses: list[int] = []
    original = syscalls.write

    def watched(descriptor: int, data: memoryview) -> int:
        addresses.append(torch.frombuffer(bytearray(1), dtype=torch.uint8).data_ptr() if data.readonly else _at(data))
        return original(descriptor, data)

    def _at(data: memoryview) -> int:
        return torch.frombuffer(data, dtype=torch.uint8).data_ptr()

    monkeypatch.setattr(syscalls, "write", watched)
    tensor = torch.arange(100)
    write_checkpoint(tmp_path / "out", {"x": tensor})
    assert tensor.data_ptr() in addresses


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 64)
    seen: list[tuple[int, int]] = []
    tensors = {"a": torch.ones(40), "b": torch.ones(2), "empty": torch.ones(0)}
    write_checkpoint(tmp_path / "out", tensors, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 168), (128, 168), (160, 168), (168, 168)]


def test_an_exception_of_progress_ends_the_save(tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    def stop(*_: int) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        write_checkpoint(tmp_path / "new" / "out", {"a": torch.ones(4)}, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, holds: Holds
) -> None:
    original = syscalls.write
    monkeypatch.setattr(syscalls, "write", lambda descriptor, data: original(descriptor, data[:5]))
    write_checkpoint(tmp_path / "out", tensors)
    assert holds(tmp_path / "out", tensors)


@pytest.mark.parametrize("when", ["open", "read"])
def test_a_further_file_that_cannot_be_read(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    if when == "open":
        original = Path.open

        def refuse(self: Path, *args: Any) -> Any:
            if self == source:
                raise PermissionError(13, "Permission denied")
            return original(self, *args)

        monkeypatch.setattr(Path, "open", refuse)
    else:
        source = Path("/proc/self/mem")  # address zero is never mapped: EIO
    with pytest.raises(CheckpointError, match=f"{source}: cannot be read: .*error|{source}: .*denied"):
        write_checkpoint(tmp_path / "out", {}, files={"x": source})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
