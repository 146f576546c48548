"""Debian packages: resolved by apt, pinned by hash, fetched from any mirror; and a base made of
them by mmdebstrap.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ops.errors import ConfigError, PreflightError
from ops.image.spec.definition import Os
from ops.image.spec.lock import Deb

PAUSES_S = (1.0, 5.0)  # before a network that failed is asked again
Progress = Callable[[str], None]
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PUBLIC = {
    "debian": "https://deb.debian.org/debian",
    "debian-security": "https://deb.debian.org/debian-security",
}
HOOKS = "/usr/share/mmdebstrap/hooks/merged-usr"


@dataclass(frozen=True)
class Mirrors:
    """Where Debian packages come from: configuration of this machine at build time, in no lock and
    no layer.
    """

    debian: str = PUBLIC["debian"]
    security: str = PUBLIC["debian-security"]

    def root(self, archive: str) -> str:
        return (self.security if archive == "debian-security" else self.debian).rstrip("/")

    @classmethod
    def of_this_host(cls, sources: Path = Path("/etc/apt")) -> Mirrors:
        """What apt on this machine uses, where it is a Debian; the public archive elsewhere."""
        files = [sources / "sources.list", *sorted(sources.glob("sources.list.d/*"))]
        text = "\n".join(file.read_text() for file in files if file.is_file())
        found = re.findall(r"^(?:URIs:|deb(?:\s+\[[^]]*])?)\s+(\S+)", text, re.MULTILINE)
        pick = {
            name: next((url for url in found if re.search(rf"/{name}/?$", url)), PUBLIC[name])
            for name in PUBLIC
        }
        return cls(pick["debian"], pick["debian-security"])

    @classmethod
    def given(cls, environment: Mapping[str, str]) -> Mirrors:
        """MILKTEA_DEBIAN_MIRROR and MILKTEA_DEBIAN_SECURITY_MIRROR, each in place of what
        :meth:`of_this_host` says.
        """
        here = cls.of_this_host()
        chosen = {
            name: environment.get(variable, "").strip() or getattr(here, name)
            for name, variable in (
                ("debian", "MILKTEA_DEBIAN_MIRROR"),
                ("security", "MILKTEA_DEBIAN_SECURITY_MIRROR"),
            )
        }
        for url in chosen.values():
            if not re.match(r"(https?|file)://?\S+$", url):
                raise ConfigError(
                    f"{url!r} is no mirror of Debian",
                    hint="MILKTEA_DEBIAN_MIRROR=https://HOST/debian, as in apt's sources",
                )
        return cls(**chosen)


def resolve(spec: Os, mirrors: Mirrors) -> list[Deb]:
    """The closure of the wanted packages and of Debian's essential ones, with hashes from the
    signed index.

    Asks the mirror; changes nothing on this machine. Raises PreflightError where apt cannot answer.
    """
    _require("apt-get", "lock images on a Debian or Ubuntu machine")
    with tempfile.TemporaryDirectory(prefix="milktea-apt-") as folder:
        options = _private_apt(Path(folder), spec.suite, mirrors)
        _run(
            ["apt-get", *options, "-qq", "-o", "APT::Update::Error-Mode=any", "update"],
            "the Debian index cannot be read",
        )
        asked = [
            "apt-get",
            *options,
            "-qq",
            "-y",
            "--print-uris",
            "install",
            "?essential",
            *spec.packages,
        ]
        printed = _run(asked, "apt finds no set of packages for [os] packages")
    return sorted(
        (_deb(line, mirrors) for line in printed.splitlines() if line.startswith("'")),
        key=lambda deb: deb.name,
    )


def fetch(debs: Sequence[Deb], mirrors: Mirrors, cache: Path, progress: Progress) -> list[Path]:
    """Every package as a file in ``cache``, checked against its hash. What is there already is not
    fetched again.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda deb: _fetch_one(deb, mirrors, cache, progress), debs))


def make_base(spec: Os, debs: Sequence[Deb], cache: Path, epoch: int, out: Path) -> None:
    """Write a Debian root file system of the fetched packages as the tar ``out``, for a machine
    that reaches no registry.

    Needs no network, and root or an ordinary user with subordinate ids. 25 to 40 s. Raises
    PreflightError.
    """
    _require(
        "mmdebstrap",
        "apt-get install mmdebstrap, or name another Debian 12: make image BASE=IMAGE",
    )
    with tempfile.TemporaryDirectory(prefix="milktea-os-") as folder:
        os.chmod(folder, 0o755)  # the unshared user must be able to read it
        _repository(Path(folder), spec.suite, debs, cache)
        command = [
            "mmdebstrap",
            "--variant=essential",
            "--format=tar",
            f"--hook-dir={HOOKS}",
            f"--include={','.join(spec.packages)}",
            # no fsync for each file of a folder that is thrown away: 4 times faster on a busy disk
            (
                '--setup-hook=mkdir -p "$1"/etc/dpkg/dpkg.cfg.d && echo force-unsafe-io'
                ' >"$1"/etc/dpkg/dpkg.cfg.d/00unsafe'
            ),
            '--customize-hook=rm "$1"/etc/dpkg/dpkg.cfg.d/00unsafe',
            spec.suite,
            str(out.resolve()),
            f"deb [trusted=yes] copy:{folder} {spec.suite} main",
        ]
        # nothing else of the user's environment: the packages' scripts would see it
        own = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        environment = {**own, "SOURCE_DATE_EPOCH": str(epoch), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        _run(command, "mmdebstrap could not make the base", environment)


def where(deb: Deb, cache: Path) -> Path:
    return cache / f"{deb.sha256[:16]}-{Path(deb.file).name}"


def _private_apt(folder: Path, suite: str, mirrors: Mirrors) -> list[str]:
    """Options that give apt a state of its own: nothing installed, our three suites, no setting of
    this machine.
    """
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    suites = [
        (mirrors.debian, suite),
        (mirrors.debian, f"{suite}-updates"),
        (mirrors.security, f"{suite}-security"),
    ]
    (folder / "sources.list").write_text(
        "".join(f"deb [signed-by={KEYRING}] {url} {name} main\n" for url, name in suites)
    )
    settings = {
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Architecture": "amd64",
        "APT::Install-Recommends": "false",
        "Acquire::Check-Valid-Until": "false",
        "Acquire::Languages": "none",
        "Acquire::ForceHash": "SHA256",
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "",
    }
    return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


def _deb(line: str, mirrors: Mirrors) -> Deb:
    """One line of ``apt-get --print-uris``: 'URL' FILE SIZE SHA256:HEX."""
    url, file, size, digest = line.split()
    name, version, rest = file.removesuffix(".deb").split("_")
    url = url.strip("'")
    archive = "debian-security" if url.startswith(mirrors.security.rstrip("/") + "/") else "debian"
    path = urllib.parse.unquote(url.removeprefix(mirrors.root(archive) + "/"))
    return Deb(
        name=name,
        version=urllib.parse.unquote(version),
        architecture=rest,
        archive=archive,  # type: ignore[arg-type]
        file=path,
        sha256=digest.removeprefix("SHA256:"),
        size_bytes=int(size),
    )


def _fetch_one(deb: Deb, mirrors: Mirrors, cache: Path, progress: Progress) -> Path:
    target = where(deb, cache)
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == deb.sha256:
        return target
    progress(f"fetching {deb.name} {deb.version}")
    url = f"{mirrors.root(deb.archive)}/{urllib.parse.quote(deb.file)}"
    try:
        data = _read(url, progress)
    except (OSError, http.client.HTTPException) as error:
        raise PreflightError(
            f"{deb.name} {deb.version} is not to be had from the mirror: {error}",
            hint=(
                "set MILKTEA_DEBIAN_MIRROR to an archive that keeps old versions"
                " (snapshot.debian.org), or make image-lock"
            ),
        ) from error
    if (found := hashlib.sha256(data).hexdigest()) != deb.sha256:
        raise PreflightError(
            f"{deb.name} {deb.version}: the mirror sent {len(data):,} bytes with sha256"
            f" {found[:12]}, the lock says {deb.sha256[:12]}",
            hint=(
                "use another mirror; if Debian replaced the package, make image-lock and read the"
                " difference"
            ),
        )
    part = target.with_name(target.name + ".part")
    part.write_bytes(data)
    os.replace(part, target)
    return target


def _read(url: str, progress: Progress) -> bytes:
    """What a mirror says itself is taken at its word; a network that fails is asked again, after
    PAUSES_S.
    """
    pauses_s = list(PAUSES_S)
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as reply:
                return bytes(reply.read())
        except (OSError, http.client.HTTPException) as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            if final or not pauses_s:
                raise
            progress(f"{error}: again in {pauses_s[0]:g} s")
            time.sleep(pauses_s.pop(0))


def _repository(folder: Path, suite: str, debs: Sequence[Deb], cache: Path) -> None:
    """A Debian archive of exactly these packages, which apt takes for the suite itself."""
    pool, index = folder / "pool", folder / f"dists/{suite}/main/binary-amd64"
    pool.mkdir()
    index.mkdir(parents=True)
    stanzas = []
    for deb in debs:
        source = where(deb, cache)
        if not source.is_file():
            raise PreflightError(
                f"{deb.name} {deb.version} was not fetched",
                hint="make image, where there is a network",
            )
        file = pool / f"{deb.name}_{deb.version.replace(':', '%3a')}_{deb.architecture}.deb"
        shutil.copyfile(source, file)
        control = _run(
            ["dpkg-deb", "--field", str(file)], f"{file.name} is not a Debian package"
        ).strip()
        stanzas.append(
            f"{control}\nFilename: pool/{file.name}\nSize: {deb.size_bytes}\nSHA256: {deb.sha256}\n"
        )
    packages = "\n".join(stanzas).encode()
    (index / "Packages").write_bytes(packages)
    summary = f" {hashlib.sha256(packages).hexdigest()} {len(packages)} main/binary-amd64/Packages"
    release = (
        f"Suite: {suite}\nCodename: {suite}\nArchitectures: amd64\nComponents:"
        f" main\nSHA256:\n{summary}\n"
    )
    (index.parent.parent / "Release").write_text(release)


def _require(program: str, instead: str) -> None:
    if not shutil.which(program):
        raise PreflightError(f"{program} is not on this machine", hint=instead)


def _run(command: list[str], failed: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-3:])[-600:]
        raise PreflightError(
            f"{failed}: {command[0]} exited {done.returncode}: {last}",
            hint="the lines above are its own words",
        )
    return done.stdout
