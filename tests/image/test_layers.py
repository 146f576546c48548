"""Layers as bytes: what is spliced is what tar would have packed, and no compressor has a say in it."""

import gzip
import hashlib
import io
import os
import random
import tarfile
import zipfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.image import layers
from ops.image.layers import Entry

EPOCH = 1747699200


def wheel(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def members(path, prefix="opt/"):
    with zipfile.ZipFile(path) as archive:
        return [Entry(prefix + info.filename, archive=path, member=info) for info in archive.infolist()]


def written(entries):
    out = io.BytesIO()
    blob = layers.write_blob(entries, EPOCH, out)
    assert blob.sha256 == hashlib.sha256(out.getvalue()).hexdigest()
    assert blob.blob_bytes == len(out.getvalue())
    return out.getvalue(), blob


@given(st.lists(st.one_of(st.binary(max_size=300), st.integers(1, 3000).map(bytes)), max_size=12).map(b"".join))
@settings(max_examples=300, deadline=None)
def test_plain_deflate_inflates_to_what_went_in(data):
    assert zlib.decompress(layers.deflate_plain(data), -15) == data


def test_every_length_of_zero_run_is_right():
    for length in [*range(24, 800), 65_535, 65_536, 200_000]:
        data = b"a" + bytes(length) + b"b"
        assert zlib.decompress(layers.deflate_plain(data), -15) == data, length


def test_a_tar_header_takes_a_third_of_its_512_bytes():
    header = layers.tar_header(Entry("opt/venv/lib/python3.11/site-packages/package/module.py", data=b"x"), EPOCH)
    assert len(layers.deflate_plain(header)) < 512 / 2


def test_spliced_wheels_read_back_as_the_files_that_they_hold(tmp_path):
    files = {f"pkg/{'deep/' * (i % 40)}file{i}.py": random.Random(i).randbytes(i * 37 % 5000) for i in range(120)}
    path = wheel(tmp_path / "a.whl", files)
    data, _ = written(layers.with_parents(members(path)))
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as tar:
        found = {info.name.removeprefix("opt/"): tar.extractfile(info).read() for info in tar if info.isfile()}
        assert {(info.uid, info.gid, info.uname, info.mtime) for info in tar} == {(0, 0, "", EPOCH)}
    assert found == files


def test_the_diff_id_is_the_hash_of_the_inflated_blob(tmp_path):
    path = wheel(tmp_path / "a.whl", {"a.so": os.urandom(300_000) + bytes(300_000), "empty": b""})
    entries = [*members(path), Entry("opt/link", link="a.so"), Entry("opt/text", 0o755, b"#!/bin/sh\n"), Entry("opt", 0o755)]
    data, blob = written(entries)
    inflated = gzip.decompress(data)
    assert layers.diff_id(entries, EPOCH) == "sha256:" + hashlib.sha256(inflated).hexdigest()
    assert blob.size_bytes == len(inflated)


def test_stored_members_and_large_plain_files_go_in_too(tmp_path):
    stored = wheel(tmp_path / "s.whl", {"weights": os.urandom(9_000_000)}, zipfile.ZIP_STORED)
    (tmp_path / "plain").write_bytes(os.urandom(5_000_000))
    entries = [*members(stored), Entry("opt/plain", file=tmp_path / "plain")]
    data, _ = written(entries)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as tar:
        assert tar.extractfile("opt/plain").read() == (tmp_path / "plain").read_bytes()
        assert tar.extractfile("opt/weights").read() == zipfile.ZipFile(stored).read("weights")


def test_the_same_contents_give_the_same_bytes_wherever_they_lie(tmp_path):
    blobs = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        path = wheel(tmp_path / place / "a.whl", {"a": b"1" * 1000, "b": b"2" * 50})
        os.utime(path, (1, 1))
        blobs.append(written(layers.with_parents(members(path)))[0])
    assert blobs[0] == blobs[1]


def test_a_flipped_bit_in_a_member_is_found_and_the_wheel_named(tmp_path):
    path = wheel(tmp_path / "torn.whl", {"a": random.Random(1).randbytes(5000)})
    entries = members(path)
    damaged = bytearray(path.read_bytes())
    damaged[2000] ^= 4
    path.write_bytes(damaged)
    with pytest.raises((zipfile.BadZipFile, zlib.error), match=r"torn\.whl|invalid"):
        layers.diff_id(entries, EPOCH)


def test_a_layer_file_appears_whole_or_not_at_all(tmp_path):
    missing = Entry("opt/lost", file=tmp_path / "lost")
    with pytest.raises(FileNotFoundError):
        layers.write_file([Entry("opt/a", data=b"1"), missing], EPOCH, tmp_path / "blob")
    assert list(tmp_path.iterdir()) == []


def test_directories_come_first_and_each_once():
    entries = layers.with_parents([Entry("a/b/c", data=b""), Entry("a/d", data=b""), Entry("a/b", 0o700)])
    assert [(entry.path, entry.mode) for entry in entries] == [("a", 0o755), ("a/b", 0o700), ("a/b/c", 0o644), ("a/d", 0o644)]


@given(
    path=st.text(st.characters(min_codepoint=33, max_codepoint=0x4FFF, exclude_characters="\\"), min_size=1, max_size=110),
    mode=st.sampled_from([0o644, 0o755]),
    size=st.integers(0, 3000),
)
def test_a_plain_files_header_is_the_one_that_tarfile_writes(path: str, mode: int, size: int) -> None:
    info = tarfile.TarInfo(path)
    info.mode, info.mtime, info.size = mode, 1_747_699_200, size
    assert layers.tar_header(layers.Entry(path, mode, data=bytes(size)), 1_747_699_200) == info.tobuf(tarfile.GNU_FORMAT)
