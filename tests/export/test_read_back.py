"""Files of tensors, compared with what was handed to their writer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoq.errors import VerificationError
from autoq.export import _read_back as read_back
from autoq.export._read_back import compare_with_file, same_bits
from autoq.export._shards import ShardWriter

PIECE = read_back._BYTES_AT_ONCE


def some_bytes(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("length", [1, 7, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_every_bit_of_every_place_counts(length: int) -> None:
    tensor = some_bytes(length)
    assert same_bits(tensor, tensor.clone())
    for place in {0, length // 2, length - 1, min(PIECE, length - 1)}:
        for bit in range(8):
            changed = tensor.clone()
            changed[place] ^= 1 << bit
            assert not same_bits(tensor, changed)


def test_dtype_and_shape_count_and_strides_do_not() -> None:
    tensor = torch.arange(12, dtype=torch.int32).view(3, 4)
    assert not same_bits(tensor, tensor.view(4, 3))
    assert not same_bits(tensor, tensor.view(torch.float32))
    assert not same_bits(torch.empty(0, 4), torch.empty(0, 5))
    assert same_bits(torch.empty(0, 4), torch.empty(0, 4))
    assert same_bits(tensor.t().contiguous().t(), tensor)


def test_zeros_have_signs_and_nan_is_itself() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_a_file_with_another_tensor_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_back, "_MAPPED_BYTES", 1024)  # the file is opened several times
    tensors = {f"tensor{number}": some_bytes(300 + number) for number in range(9)}
    save_file(tensors, tmp_path / "file")
    compare_with_file(tensors, tmp_path / "file")
    for name, tensor in tensors.items():
        handed = {**tensors, name: tensor ^ (tensor == tensor[-1])}
        with pytest.raises(VerificationError, match=f"{name} differs from what was written"):
            compare_with_file(handed, tmp_path / "file")


def test_tensors_may_change_once_a_writer_has_taken_them(tmp_path: Path) -> None:
    """They share one piece of memory, which is filled anew for every shard."""
    writer = ShardWriter(tmp_path, 4096)
    memory = torch.empty(5, 100)
    expected = {}
    for number in range(20):
        tensor = memory.fill_(number).t()
        expected[f"tensor{number}"] = tensor.clone()
        writer.add([(f"tensor{number}", tensor)])
    writer.finish()
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) == 10
    assert found.keys() == expected.keys() == writer.names
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 64)
    tensors = {"small": torch.ones(4), "large": torch.arange(100.0), "other": torch.zeros(4)}
    writer.add(tensors.items())
    writer.finish()
    found = [load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert [sorted(names) for names in found] == [["small"], ["large"], ["other"]]
    assert all(torch.equal(tensors[name], file[name]) for file in found for name in file)
