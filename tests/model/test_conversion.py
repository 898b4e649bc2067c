"""GGUF to a Hugging Face folder: whole or absent."""

import os
import time

import pytest

from lenvm.errors import CheckpointError, DataError, InputError
from lenvm.model import bundled
from lenvm.model.bundled import convert_gguf


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_an_interrupted_conversion_leaves_nothing(source, tmp_path, monkeypatch):
    def stop(source, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled, "_write_folder", stop)
    target = tmp_path / "cache" / "model"
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(source, target)
    assert [p.name for p in target.parent.iterdir()] == [".model.lock"]


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    def fill(source, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundled, "_write_folder", fill)
    target = tmp_path / "cache" / "model"
    with pytest.raises(DataError, match=r"cannot write .*model: No space left on device"):
        convert_gguf(source, target)
    assert [p.name for p in target.parent.iterdir()] == [".model.lock"]


def test_what_a_killed_conversion_left_goes_with_the_next_one(source, tmp_path, monkeypatch):
    def die(source, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        os._exit(9)

    monkeypatch.setattr(bundled, "_write_folder", die)
    target = tmp_path / "cache" / "model"
    child = os.fork()
    if child == 0:
        convert_gguf(source, target)
    os.waitpid(child, 0)
    assert len(list(target.parent.iterdir())) == 2
    (target.parent / ".model.other").mkdir()

    def write(source, folder):
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(bundled, "_write_folder", write)
    convert_gguf(source, target)
    left = {p.name for p in target.parent.iterdir()}
    assert left == {".model.lock", ".model.other", "model"}


def test_processes_that_convert_at_once_write_once(source, tmp_path, monkeypatch):
    written = tmp_path / "written"

    def write(source, folder):
        with written.open("a") as file:
            file.write("x")
        time.sleep(0.2)
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(bundled, "_write_folder", write)
    target = tmp_path / "cache" / "model"
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(convert_gguf(source, target) != target)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert written.read_text() == "x"
    assert {p.name for p in target.parent.iterdir()} == {".model.lock", "model"}


def test_a_second_conversion_uses_the_first(source, tmp_path, monkeypatch):
    calls = []

    def write(source, folder):
        calls.append(folder)
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(bundled, "_write_folder", write)
    target = tmp_path / "cache" / "model"
    assert convert_gguf(source, target) == convert_gguf(source, target) == target
    assert len(calls) == 1


def test_a_damaged_download_is_named_with_what_to_do(source, tmp_path):
    with pytest.raises(CheckpointError, match="force-reinstall"):
        convert_gguf(source, tmp_path / "model", sha256="0" * 64)
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_no_gguf(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read"):
        convert_gguf(source, tmp_path / "model")
    with pytest.raises(InputError, match="no file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "model")


def test_a_conversion_parses_the_file_once_and_leaves_gguf_as_it_was(tmp_path, monkeypatch):
    """What transformers reads four times; its own result is the reference, byte for byte."""
    import gguf
    import numpy

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "</s>", *(f"w{i}" for i in range(300))])
    writer.add_tensor("blk.0.attn_q.weight", numpy.arange(64, dtype=numpy.float32).reshape(8, 8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own = gguf.GGUFReader, gguf.get_tensor_name_map
    plain = gguf.GGUFReader(tmp_path / "tiny.gguf")
    with bundled._read_once():
        reader = gguf.GGUFReader(str(tmp_path / "tiny.gguf"))
        assert gguf.GGUFReader(str(tmp_path / "tiny.gguf")) is reader
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own
    for name, field in plain.fields.items():
        assert reader.fields[name].contents() == field.contents()
    for ours, theirs in zip(reader.tensors, plain.tensors, strict=True):
        assert ours.name == theirs.name
        numpy.testing.assert_array_equal(ours.data, theirs.data)
