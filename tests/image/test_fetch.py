"""Fetching: any mirror will do, nothing wrong is kept, what is there is not asked for again."""

import hashlib
import http.server
import io
import os
import re
import socket
import tarfile
import threading
from pathlib import Path

import pytest
from image_world import make_wheel

from ops.errors import PreflightError
from ops.image.fetch import debian
from ops.image.fetch import wheels as packages
from ops.image.fetch.debian import Mirrors
from ops.image.spec.definition import Python
from ops.image.spec.lock import Deb
from trainer.wire.digest import sha256_of

PYTHON = Python(version="3.11", requirements=["pkg"])


@pytest.fixture
def mirror(tmp_path):
    """An HTTP server over a folder; ``asked`` are the paths that it was asked for."""
    asked = []
    root = tmp_path / "mirror"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield root, f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def quiet(line):
    pass


def deb(data, archive="debian"):
    return Deb(
        name="tiny",
        version="1:2.0+b1",
        architecture="all",
        archive=archive,
        file="pool/main/t/tiny/tiny_2.0+b1_all.deb",
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
    )


def publish(root, data, archive="debian"):
    path = root / archive / "pool/main/t/tiny/tiny_2.0+b1_all.deb"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)


def test_a_debian_package_comes_from_the_configured_mirror_once(mirror, tmp_path):
    root, url, asked = mirror
    publish(root, b"package", "debian-security")
    mirrors = Mirrors("http://127.0.0.1:9/none", f"{url}/debian-security")
    for _ in range(2):
        [path] = debian.fetch(
            [deb(b"package", "debian-security")], mirrors, tmp_path / "cache", quiet
        )
        assert path.read_bytes() == b"package"
    assert len(asked) == 1


def test_a_package_with_other_bytes_is_refused_and_not_kept(mirror, tmp_path):
    root, url, _ = mirror
    publish(root, b"another build")
    with pytest.raises(PreflightError, match="the mirror sent 13 bytes with sha256"):
        debian.fetch([deb(b"package")], Mirrors(f"{url}/debian"), tmp_path / "cache", quiet)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_network_that_fails_is_asked_again_and_a_mirrors_no_is_final(tmp_path, monkeypatch):
    """The first answer is cut, the second is a gateway's 502, the third is the package; a 404 is
    asked for once.
    """
    monkeypatch.setattr(debian, "PAUSES_S", (0.01, 0.01))
    answers = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\npac",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\npackage",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    ]
    told = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            for answer in answers:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        mirrors = Mirrors(f"http://127.0.0.1:{server.getsockname()[1]}/debian")
        [path] = debian.fetch([deb(b"package")], mirrors, tmp_path / "cache", told.append)
        assert path.read_bytes() == b"package" and sum("again in" in line for line in told) == 2
        path.unlink()
        with pytest.raises(PreflightError, match="404"):
            debian.fetch([deb(b"package")], mirrors, tmp_path / "cache", quiet)
        thread.join(5)
        assert not thread.is_alive()


def test_a_package_that_the_mirror_dropped_says_where_old_ones_are_kept(mirror, tmp_path):
    _, url, _ = mirror
    with pytest.raises(PreflightError, match=r"tiny 1:2\.0\+b1 is not to be had") as caught:
        debian.fetch([deb(b"package")], Mirrors(f"{url}/debian"), tmp_path / "cache", quiet)
    assert "snapshot.debian.org" in caught.value.hint


def test_a_cached_package_that_was_damaged_is_fetched_again(mirror, tmp_path):
    root, url, asked = mirror
    publish(root, b"package")
    mirrors = Mirrors(f"{url}/debian")
    [path] = debian.fetch([deb(b"package")], mirrors, tmp_path / "cache", quiet)
    path.write_bytes(b"damaged")
    [path] = debian.fetch([deb(b"package")], mirrors, tmp_path / "cache", quiet)
    assert path.read_bytes() == b"package"
    assert len(asked) == 2


@pytest.mark.parametrize(
    "text",
    [
        "deb [signed-by=/k.gpg] http://mirror.example/debian bookworm main\n",
        "Types: deb\nURIs: http://mirror.example/debian\n",
    ],
)
def test_the_mirror_that_apt_uses_here_is_found_in_either_style(tmp_path, text):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text(text)
    assert Mirrors.of_this_host(tmp_path) == Mirrors(
        "http://mirror.example/debian", "https://deb.debian.org/debian-security"
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip, told by its own configuration to look into a folder and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_wheels_are_resolved_and_pinned_and_come_back_by_their_hash(index, tmp_path):
    make_wheel(index, "pkg", "1.0", {"pkg.py": b"1"})
    make_wheel(index, "pkg", "1.1", {"pkg.py": b"2"})
    [locked] = packages.resolve(PYTHON, ["pkg"], tmp_path / "cache", quiet)
    assert (locked.name, locked.version, locked.license) == ("pkg", "1.1", "MIT")
    packages.fetch(PYTHON, [locked], tmp_path / "other", quiet)
    assert sha256_of(packages.where(locked, tmp_path / "other")) == locked.sha256


@pytest.mark.slow
def test_the_mirrors_of_the_documents_line_are_asked_for_wheels_and_for_debian(
    mirror, tmp_path, monkeypatch
):
    root, url, asked = mirror
    page = (Path(__file__).parents[2] / "docs/airgap.md").read_text()
    [words] = re.findall(r"^    (PIP_INDEX_URL=.*) make image$", page, re.MULTILINE)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for word in words.split():
        monkeypatch.setenv(*word.replace("https://a-mirror", url).split("="))
    (root / "simple/pkg").mkdir(parents=True)
    make_wheel(root / "simple/pkg", "pkg", "1.0", {"pkg.py": b"1"})
    [locked] = packages.resolve(PYTHON, ["pkg"], tmp_path / "cache", quiet)
    assert locked.version == "1.0" and "/simple/pkg/" in asked
    publish(root, b"package")
    [path] = debian.fetch([deb(b"package")], Mirrors.given(os.environ), tmp_path / "debs", quiet)
    assert path.read_bytes() == b"package" and asked[-1].startswith("/debian/pool/")


def make_source(folder, name, version):
    """A package that is published as source alone, and builds itself without a network."""
    pyproject = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    info = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: MIT\n"
    backend = (
        "import pathlib\n"
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        f"    at = pathlib.Path(folder, '{name}-{version}.dist-info')\n"
        "    at.mkdir()\n"
        f"    (at / 'METADATA').write_text({info!r})\n"
        "    return at.name\n"
        "def build_wheel(*_):\n    raise NotImplementedError\n"
    )
    with tarfile.open(folder / f"{name}-{version}.tar.gz", "w:gz") as tar:
        for path, data in {
            "pyproject.toml": pyproject,
            "PKG-INFO": info.encode(),
            "backend.py": backend.encode(),
        }.items():
            entry = tarfile.TarInfo(f"{name}-{version}/{path}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_a_package_without_a_wheel_is_pinned_and_fetched_as_source(index, tmp_path):
    make_wheel(index, "pkg", "1.0", {"pkg.py": b"1"})
    make_source(index, "only", "2.0")
    spec = PYTHON.model_copy(update={"sources": ["only"]})
    source, wheel = packages.resolve(spec, ["pkg"], tmp_path / "cache", quiet)
    assert (source.file, source.license) == ("only-2.0.tar.gz", "MIT")
    packages.fetch(spec, [wheel, source], tmp_path / "other", quiet)
    found = packages.where(source, tmp_path / "other")
    assert sha256_of(found) == source.sha256
    (tmp_path / "cut.tar.gz").write_bytes(found.read_bytes()[:80])
    with pytest.raises(PreflightError, match="not a whole package"):
        packages.lock(tmp_path / "cut.tar.gz")


def test_a_wheel_whose_hash_changed_on_the_index_is_refused(index, tmp_path):
    make_wheel(index, "pkg", "1.0", {"pkg.py": b"1"})
    [locked] = packages.resolve(PYTHON, ["pkg"], tmp_path / "cache", quiet)
    make_wheel(index, "pkg", "1.0", {"pkg.py": b"tampered"})
    with pytest.raises(PreflightError, match=r"pip cannot get the packages: .*(hash|HASH)"):
        packages.fetch(PYTHON, [locked], tmp_path / "other", quiet)
    assert not packages.where(locked, tmp_path / "other").exists()


def test_a_cached_wheel_is_hashed_again_when_its_file_changed(index, tmp_path):
    make_wheel(index, "pkg", "1.0", {"pkg.py": b"1"})
    [locked] = packages.resolve(PYTHON, ["pkg"], tmp_path / "cache", quiet)
    path = packages.where(locked, tmp_path / "cache")
    assert packages.is_whole(locked, tmp_path / "cache")
    path.write_bytes(path.read_bytes()[::-1])
    assert not packages.is_whole(locked, tmp_path / "cache")
    packages.fetch(PYTHON, [locked], tmp_path / "cache", quiet)
    assert sha256_of(path) == locked.sha256


def test_an_index_without_the_package_says_how_to_name_another(index, tmp_path):
    with pytest.raises(PreflightError) as caught:
        packages.resolve(PYTHON, ["nothing-like-this"], tmp_path / "cache", quiet)
    assert "PIP_INDEX_URL" in caught.value.hint
