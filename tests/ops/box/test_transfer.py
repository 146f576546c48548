"""Push and pull against a real SSH server, over links that break."""

from __future__ import annotations

import hashlib
import os
import random
import time
from pathlib import Path

import pytest

from ops.box import pull as pulling
from ops.box.pull import pull
from ops.box.push import SMALL, push
from ops.box.transfer import PushFile
from ops.errors import BoxError, Lost, PreflightError

MOST = 1 << 30  # bytes that a pull may bring
RESENT_PER_CUT = 4 << 20  # bytes; what a cut link may cost


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def write(tmp_path):
    def make(name: str, size: int, seed: int = 0) -> Path:
        path = tmp_path / "laptop" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(f"{name}{seed}").randbytes(size))
        return path

    return make


def pushed(path: Path, remote: str) -> PushFile:
    return PushFile(path, remote, sha256(path.read_bytes()))


def test_a_box_without_openssl_hashes_with_coreutils(box, server, write):
    server.without("openssl")
    push(box, [pushed(write("a", 100), "milktea/r/a")])
    assert (server.home / "milktea/r/a").stat().st_size == 100


def test_files_of_every_size_arrive_whole_and_keep_nothing_behind(box, server, write):
    sizes = [0, 1, 511, 512, 513, SMALL, SMALL + 1, 5_000_000]
    files = [
        pushed(write(f"数据 {size}'s", size), f"milktea/r/data/{size} 数据 it's.bin")
        for size in sizes
    ]
    seen: list[tuple[int, int]] = []
    push(box, files, lambda done, total: seen.append((done, total)))
    for f in files:
        assert (server.home / f.remote).read_bytes() == f.local.read_bytes()
    assert len(list((server.home / "milktea/r/data").iterdir())) == len(sizes)
    assert seen[-1] == (sum(sizes), sum(sizes))
    assert all(0 <= done <= total for done, total in seen)


def test_what_is_whole_is_not_sent_again(server, make_box, make_proxy, write):
    proxy = make_proxy(server.port)
    box = make_box(proxy.port)
    files = [pushed(write("big", 6_000_000), "milktea/r/big")]
    files += [pushed(write(f"s{i}", 9000), f"milktea/r/s{i}") for i in range(50)]
    push(box, files)
    first = proxy.up
    push(box, files)
    assert first > 6_000_000
    assert proxy.up - first < 100_000


def test_a_changed_file_replaces_the_old_one(box, server, write):
    for seed in (1, 2):
        for size in (2000, 3_000_000):
            push(box, [pushed(write("data.json", size, seed), f"milktea/r/{size}")])
            assert (server.home / f"milktea/r/{size}").read_bytes() == (
                write("data.json", size, seed)
            ).read_bytes()


def test_a_push_over_a_link_that_is_cut_again_and_again_resends_little(
    server, make_box, make_proxy, write
):
    size, cut_after = 16_000_000, 4_000_000
    proxy = make_proxy(server.port, budget=cut_after)
    path = write("model.safetensors", size)
    push(make_box(proxy.port), [pushed(path, "milktea/r/model.safetensors")])
    assert (server.home / "milktea/r/model.safetensors").read_bytes() == path.read_bytes()
    assert proxy.cuts >= 3
    assert (proxy.up - size) / proxy.cuts < RESENT_PER_CUT


def test_a_pull_over_a_link_that_is_cut_again_and_again_resends_little(
    server, make_box, make_proxy, tmp_path
):
    size, cut_after = 16_000_000, 4_000_000
    data = random.Random(7).randbytes(size)
    (server.home / "adapter.zip").write_bytes(data)
    proxy = make_proxy(server.port, budget=cut_after)
    got = pull(
        make_box(proxy.port),
        "adapter.zip",
        tmp_path / "home" / "adapter.zip",
        sha256(data),
        max_bytes=MOST,
    )
    assert got.read_bytes() == data
    assert proxy.cuts >= 3
    assert (proxy.down - size) / proxy.cuts < RESENT_PER_CUT
    assert [p.name for p in got.parent.iterdir()] == ["adapter.zip"]


def test_a_pull_goes_on_from_the_part_of_an_earlier_call(server, make_box, make_proxy, tmp_path):
    data = random.Random(8).randbytes(30_000_000)
    (server.home / "a.zip").write_bytes(data)
    (tmp_path / "a.zip.part").write_bytes(data[:20_000_000])
    proxy = make_proxy(server.port)
    pull(make_box(proxy.port), "a.zip", tmp_path / "a.zip", sha256(data), max_bytes=MOST)
    assert (tmp_path / "a.zip").read_bytes() == data
    assert proxy.down < 11_000_000


def test_a_part_of_another_file_is_thrown_away_and_fetched_anew(box, server, tmp_path):
    data = random.Random(9).randbytes(10_000_000)
    (server.home / "a.zip").write_bytes(data)
    for rubbish in (b"x" * 9_000_000, b"y" * 10_000_000, b"z" * 11_000_000):
        (tmp_path / "a.zip.part").write_bytes(rubbish)
        assert pull(box, "a.zip", tmp_path / "a.zip", max_bytes=MOST).read_bytes() == data


def test_a_corrupt_part_on_the_box_is_sent_again(box, server, write):
    path = write("big", 4_000_000)
    (server.home / "big.part").write_bytes(b"x" * 3_000_000)
    push(box, [pushed(path, "big")])
    assert (server.home / "big").read_bytes() == path.read_bytes()


def test_a_part_longer_than_the_file_is_sent_again(box, server, write):
    path = write("big", 4_000_000)
    (server.home / "big.part").write_bytes(b"x" * 5_000_000)
    push(box, [pushed(path, "big")])
    assert (server.home / "big").read_bytes() == path.read_bytes()
    assert not (server.home / "big.part").exists()


@pytest.mark.parametrize("size", [100, 3_000_000])
def test_a_file_that_is_not_what_was_hashed_is_named(box, server, write, size):
    good, bad = write("good", 10), write("bad", size)
    with pytest.raises(BoxError, match="milktea/bad: changed on this disk") as error:
        push(box, [pushed(good, "milktea/good"), PushFile(bad, "milktea/bad", sha256(b"another"))])
    assert error.value.money == "the box is still rented"
    assert not (server.home / "milktea/bad").exists()


def test_a_file_that_the_box_misreports_is_pulled_twice_then_named(box, server, tmp_path):
    (server.home / "a.zip").write_bytes(b"x" * 100)
    with pytest.raises(BoxError, match=r"a\.zip came home twice with another sha256"):
        pull(box, "a.zip", tmp_path / "a.zip", sha256(b"other"), max_bytes=MOST)
    assert list(tmp_path.glob("a.zip*")) == []


def test_a_missing_file_is_an_error_with_its_name(box, tmp_path):
    with pytest.raises(BoxError, match=r"the box has no milktea/r/result/adapter\.zip"):
        pull(box, "milktea/r/result/adapter.zip", tmp_path / "a", max_bytes=MOST)


def test_a_folder_in_the_way_is_an_error_and_not_a_loop(box, server, write):
    (server.home / "big.part").mkdir()
    (server.home / "big.part" / "precious").touch()
    with pytest.raises(BoxError):
        push(box, [pushed(write("big", 2_000_000), "big")])


def test_a_link_that_stays_down_is_lost_after_the_patience(server, make_box, write):
    box = make_box(server.port, patience_s=1.0, connect_timeout_s=0.5)
    box.connect(10)
    path = write("a", 2_000_000)
    server.stop()
    began = time.monotonic()
    with pytest.raises(Lost, match="cannot be reached"):
        push(box, [pushed(path, "a")])
    with pytest.raises(Lost, match="cannot be reached"):
        pull(box, "a", path.with_name("b"), max_bytes=MOST)
    assert time.monotonic() - began < 100


def test_a_folder_that_is_a_link_on_the_box_stays_one(box, server, write):
    big_disk = server.home.with_name("big-disk")
    big_disk.mkdir()
    (server.home / "milktea").symlink_to(big_disk)
    for size in (100, 3_000_000):
        push(
            box,
            [
                pushed(write(f"f{size}", size), f"milktea/{place}f{size}")
                for place in ("", "r/", "r/s/")
            ],
        )
        assert [(big_disk / f"{place}f{size}").stat().st_size for place in ("", "r/", "r/s/")] == [
            size
        ] * 3
    assert (server.home / "milktea").is_symlink()


def test_two_files_for_one_place_are_refused(box, write):
    with pytest.raises(ValueError, match="two files go to the same place"):
        push(box, [pushed(write("a", 1), "x"), pushed(write("b", 1), "x")])


def test_nothing_to_push_is_fine(box):
    push(box, [])


def test_an_executable_stays_executable(box, server, write):
    path = write("run.sh", 10)
    path.chmod(0o700)
    push(box, [pushed(path, "run.sh")])
    assert os.access(server.home / "run.sh", os.X_OK)


def test_a_machine_without_ssh_or_any_other_program_pushes_and_pulls(
    box, server, write, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    path = write("big", 9_000_000)
    push(box, [pushed(path, "big")])
    assert pull(box, "big", tmp_path / "home", max_bytes=MOST).read_bytes() == path.read_bytes()


def test_a_file_that_grows_while_it_is_pushed_is_named_and_not_sent_for_ever(box, server, write):
    path = write("log", 2_000_000)
    file = pushed(path, "log")

    def grow(done: int, total: int) -> None:
        if 0 < done < total:
            with open(path, "ab") as log:
                log.write(b"x" * 1000)

    with pytest.raises(BoxError, match="log: changed on this disk"):
        push(box, [file], grow)
    assert not (server.home / "log").exists()


# -- a box that lies -------------------------------------------------------------------------------


def instead(server, tool: str, script: str) -> None:
    """A program of the box's own making in place of a tool."""
    server.without(tool)
    (server.bin / tool).write_text("#!/bin/sh\n" + script)
    (server.bin / tool).chmod(0o755)


def test_a_file_larger_than_the_job_can_have_made_is_left_there(box, server, tmp_path):
    (server.home / "a.zip").write_bytes(bytes(5000))
    with pytest.raises(BoxError, match=r"a\.zip has 5,000 bytes, .* no more than 4,999"):
        pull(box, "a.zip", tmp_path / "a.zip", max_bytes=4999)
    assert list(tmp_path.glob("a.zip*")) == []


def test_no_more_is_taken_than_the_box_said_it_has(box, server, tmp_path):
    (server.home / "a.zip").write_bytes(b"x" * 10)
    instead(server, "tail", "exec cat /dev/zero\n")
    with pytest.raises(BoxError, match=r"a\.zip goes on after its 10 bytes"):
        pull(box, "a.zip", tmp_path / "a.zip", max_bytes=MOST)
    assert list(tmp_path.glob("a.zip*")) == []


@pytest.mark.parametrize("said", ["-1", "1e9", "", "9" * 5000, "12 13", "\033]0;owned"])
def test_a_size_that_is_no_number_is_an_error_of_the_box(box, server, tmp_path, said):
    (server.home / "said").write_text(said)
    instead(server, "stat", "exec cat said\n")
    with pytest.raises(BoxError, match=r"the box says that a\.zip has"):
        pull(box, "a.zip", tmp_path / "a.zip", max_bytes=MOST)


def test_a_file_that_drips_is_given_up(server, make_box, tmp_path):
    """A byte a second is a byte that moved, and a box that bills."""
    (server.home / "a.zip").write_bytes(bytes(1000))
    instead(server, "tail", "while :; do printf x; sleep 0.2; done\n")
    began = time.monotonic()
    with pytest.raises(Lost, match="slower than 8 KiB a second"):
        pull(make_box(server.port, patience_s=2.0), "a.zip", tmp_path / "a.zip", max_bytes=MOST)
    assert time.monotonic() - began < 100


def test_a_box_that_keeps_nothing_gets_no_file_for_ever(box, server, write):
    instead(server, "tar", "exec cat >/dev/null\n")
    with pytest.raises(BoxError, match="a: sent 5 times and not there"):
        push(box, [pushed(write("a", 100), "a")])


def test_a_box_that_talks_nonsense_of_its_disk_is_an_error_with_its_words(box, server, write):
    instead(server, "stat", "echo nonsense\n")
    with pytest.raises(BoxError, match=r"does not say what it holds: \['nonsense'"):
        push(box, [pushed(write("a", 100), "a")])


def test_a_pull_leaves_a_reserve_on_this_disk(box, server, tmp_path, monkeypatch):
    (server.home / "a.zip").write_bytes(bytes(1000))
    usage = type(pulling.shutil.disk_usage("/"))
    disk = {"left": usage(10_000, 9_000, 1000)}
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda folder: disk["left"])
    with pytest.raises(PreflightError, match=r"a\.zip needs .* are kept free") as caught:
        pull(box, "a.zip", tmp_path / "a.zip", max_bytes=MOST)
    assert "resume" in caught.value.hint
    disk["left"] = usage(10_000, 8_800, 1200)
    pull(box, "a.zip", tmp_path / "a.zip", max_bytes=MOST)
    disk["left"] = usage(10**12, 0, 10**12)
    assert pulling.reserve_bytes(tmp_path) == 256 << 20, "of a large disk no more than that"


def test_a_full_disk_here_is_said_in_words_and_what_came_stays(box, server, tmp_path, monkeypatch):
    (server.home / "a.zip").write_bytes(bytes(1000))

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pulling.os, "fsync", full)
    with pytest.raises(PreflightError, match=r"a\.zip cannot be written: .*No space left"):
        pull(box, "a.zip", tmp_path / "a.zip", max_bytes=MOST)
    monkeypatch.undo()
    assert pull(box, "a.zip", tmp_path / "a.zip", max_bytes=MOST).stat().st_size == 1000
