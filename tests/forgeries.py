"""Forged bundles, look-alike images and hostile installers, each with the words that must refuse
it. tests/airgap.py runs them on a bundle of the practice image.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from airgap_bench import Bench, docker
from image_shell import jail, script

from ops.image.bundle import archive, parts, signature

HOSTILE = "#!/bin/sh\necho 'DONE  everything is fine'\nexit 0\n"


class Refused(Exception):
    """A forgery that was not refused as it must be; the text says how it was answered."""


def write(path: Path, data: str) -> None:
    """Never through a hard link."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.write_text(data)


def sign_again(at: Path, key: Path, *, sums: str | None = None) -> None:
    """Make the sums anew over what lies there, or take ``sums``, and sign them with ``key``."""
    if sums is None:
        files = [p for p in sorted(at.rglob("*")) if p.is_file() and "SHA256SUMS" not in p.name]
        sums = "".join(
            f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(at)}\n" for p in files
        )
    for path in at.glob("SHA256SUMS*"):
        path.unlink()
    (at / "SHA256SUMS").write_text(sums)
    signature.sign(at / "SHA256SUMS", key)


FORGERIES: list[tuple[str, Callable[[Bench, Path], None]]] = []
Forge = Callable[[Bench, Path], object]


def forgery(
    name: str,
    forge: Forge,
    code: int,
    says: str,
    *words: str,
    tools: tuple[str, ...] | None = None,
    new_server: bool = False,
) -> None:
    """``forge`` spoils a bundle; INSTALL.sh must then end with ``code`` and say ``says`` and a
    remedy. {key} and {stranger} in ``words`` are their files, {print} the stranger's fingerprint;
    ``tools`` alone are on the server beside coreutils."""

    def act(bench: Bench, at: Path) -> None:
        forge(bench, at)
        told = signature.fingerprint(Path(f"{bench.stranger}.pub"))
        typed = [w.format(key=bench.key, stranger=bench.stranger, print=told, at=at,
                          truth=bench.fingerprint) for w in words or ("verify",)]  # fmt: skip
        prefix = bench.folder / "fresh" if new_server else None
        path = None
        if tools is not None:
            shutil.rmtree(bench.folder / "jail", ignore_errors=True)
            path = jail(bench.folder / "jail", "unshare", *tools)
        got, said = bench.run(at, *typed, prefix=prefix, path=path)
        if got != code or not re.search(says, said) or "do this:" not in said:
            raise Refused(f"code {got} instead of {code}: {said}")

    FORGERIES.append((name, act))


def installer(name: str, forge: Forge, says: str) -> None:
    """A hostile INSTALL.sh is found by the README's lines, before anything of it runs."""

    def act(bench: Bench, at: Path) -> None:
        forge(bench, at)
        said = bench.readme(at)
        if not re.search(says, said):
            raise Refused(f"README's lines said: {said or 'yes'}")

    FORGERIES.append((name, act))


# -- signatures and keys


def theirs(bench: Bench, at: Path, *left: str) -> None:
    sign_again(at, bench.stranger)
    for kind in {"sig", "openssl"} - set(left or ("sig", "openssl")):
        (at / f"SHA256SUMS.{kind}").unlink()


def unsigned(bench: Bench, at: Path) -> None:
    for path in at.glob("SHA256SUMS.*"):
        path.unlink()


def other_namespace(bench: Bench, at: Path) -> None:
    (at / "SHA256SUMS.sig").unlink()
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", bench.key, "-n", "file",
                    at / "SHA256SUMS"], check=True, stderr=subprocess.DEVNULL)  # fmt: skip


def of_the_other(bench: Bench, at: Path, *names: str) -> None:
    for name in names:
        (at / name).unlink()
        shutil.copyfile(bench.folder / "full" / name, at / name)


for _tool in ("ssh-keygen", "openssl", ""):
    for _left in (("sig",), ("openssl",), ("sig", "openssl")):
        forgery(f"a stranger's bundle, {' and '.join(_left)}, {_tool or 'no tool'} here",
                functools.partial(lambda b, at, left: theirs(b, at, *left), left=_left),
                5, "REFUSED", tools=(_tool,) if _tool else ())  # fmt: skip
for _form in ("{truth}", "{key}.pub", "{key}.pem"):
    forgery(f"a stranger's bundle, the true key as {_form}", theirs, 5, "wrong signature",
            "verify", "--key", _form, new_server=True)  # fmt: skip
for _form in ("{print}", "{stranger}.pub", "{stranger}.pem"):
    forgery(f"a stranger's bundle and key as {_form}", theirs, 5,
            "knows another sender|wrong signature", "verify", "--key", _form)  # fmt: skip
forgery("no signature", unsigned, 5, "the signature is not signed")
forgery("no signature, asked for", unsigned, 5, "the signature is", "verify", "--key", "{key}.pub",
        new_server=True)  # fmt: skip
forgery("a key on the disk", lambda b, at: write(at / "keys/k.pub",
        Path(f"{b.key}.pub").read_text()), 5, "lies on the disk", "verify", "--key",
        "{at}/keys/k.pub")  # fmt: skip
forgery("a key that the disk has too", lambda b, at: shutil.copy(f"{b.key}.pub", at / "k.pub"), 5,
        "is the file k.pub of the disk", "verify", "--key", "{key}.pub")  # fmt: skip
forgery("a signature for another purpose", other_namespace, 5, "wrong signature")
forgery("the signature of the release before",
        lambda b, at: of_the_other(b, at, "SHA256SUMS.sig"), 5, "wrong signature")  # fmt: skip
forgery("openssl's signature of the release before",
        lambda b, at: of_the_other(b, at, "SHA256SUMS.openssl"), 5, "wrong signature")  # fmt: skip
forgery("sums and signatures of the release before",
        lambda b, at: of_the_other(b, at, *(p.name for p in at.glob("SHA256SUMS*"))), 4,
        "is damaged, or belongs to another|is missing")  # fmt: skip
forgery("an empty signature", lambda b, at: write(at / "SHA256SUMS.sig", ""), 5, "wrong signature")
forgery("an empty signature of openssl", lambda b, at: write(at / "SHA256SUMS.openssl", ""), 5,
        "wrong signature", tools=("openssl",))  # fmt: skip
forgery("a signature of a thousand brackets", lambda b, at: write(at / "SHA256SUMS.sig", "(" * 999),
        5, "wrong signature")  # fmt: skip
forgery("one hash of the sums", lambda b, at: write(at / "SHA256SUMS",
        re.sub(r"^\w{64}(?=  parts)", "0" * 64, (at / "SHA256SUMS").read_text(), flags=re.M)),
        5, "wrong signature")  # fmt: skip

# -- releases, small files, names


def edited(name: str, old: str, new: str, sign: bool = False) -> Forge:
    def forge(bench: Bench, at: Path) -> None:
        text = (at / name).read_text()
        assert old in text, (name, old)
        write(at / name, text.replace(old, new, 1))
        if sign:
            sign_again(at, bench.key)

    return forge


def downgrade(bench: Bench, at: Path) -> None:
    write(bench.folder / "pinned/state/airgap", "current x\nrelease 9\ngpus all\nprevious \n")


forgery("an older release", downgrade, 5, "release 8, and 9 is installed", "install")
forgery("a release number", edited("PLAN", "release 8", "release 10"), 4, "PLAN is damaged",
        "install")  # fmt: skip
for _name in ("tools/milktea-run", "tools/installer.py", "image.lock", "sbom/image.cdx.json",
              "README.en.txt", "licenses/INDEX.txt"):  # fmt: skip
    forgery(f"an exchanged {_name}", functools.partial(lambda b, at, name: write(at / name, "#"),
            name=_name), 4, f"{_name} is damaged, or belongs")  # fmt: skip


def linked(bench: Bench, at: Path) -> None:
    (at / "tools/milktea-run").unlink()
    (at / "tools/milktea-run").symlink_to("/bin/true")


forgery("a tool that is a link out of the bundle", linked, 4, "tools/milktea-run is damaged")
for _old, _new in (
    ("ref milktea/airgap:", "ref other/image:"),
    ("name airgap", "name ../../etc"),
    ("name airgap", "name -rf"),
    ("id ", "id ../"),
    ("intermediate milktea/airgap:", "intermediate debian:"),
    ("vol parts/", "vol ../parts/"),
    ("vol parts/", "vol /etc/parts/"),
    ("release 8", "release 8;reboot"),
    ("ref milktea/airgap:", "ref milktea/airgap:$(id)"),
):
    forgery(f"{_new!r}, signed by the sender", edited("PLAN", _old, _new, sign=True), 4,
            "PLAN is damaged")  # fmt: skip
for _path in ("../PLAN", "/etc/passwd", "-rf", "a b"):
    forgery(f"sums of {_path!r}, signed by the sender", functools.partial(
        lambda b, at, path: sign_again(at, b.key, sums=f"{'0' * 64}  {path}\n"), path=_path),
        4, "SHA256SUMS is damaged|is missing")  # fmt: skip
forgery("sums without PLAN, signed by the sender", lambda b, at: sign_again(at, b.key, sums=re.sub(
        r"^.*  PLAN\n", "", (at / "SHA256SUMS").read_text(), flags=re.M)), 4,
        "PLAN is not in it")  # fmt: skip

# -- hostile installers


def hostile(bench: Bench, at: Path) -> None:
    write(at / "INSTALL.sh", HOSTILE)


def hostile_summed(bench: Bench, at: Path) -> None:
    hostile(bench, at)
    digest = hashlib.sha256(HOSTILE.encode()).hexdigest()
    sums = (at / "SHA256SUMS").read_text()
    write(at / "SHA256SUMS", re.sub(r"\w{64}(?=  INSTALL.sh)", digest, sums))


def hostile_signed(bench: Bench, at: Path) -> None:
    hostile(bench, at)
    sign_again(at, bench.stranger)


def hostile_link(bench: Bench, at: Path) -> None:
    write(at / "x", HOSTILE)
    (at / "INSTALL.sh").unlink()
    (at / "INSTALL.sh").symlink_to("x")


installer("a hostile INSTALL.sh", hostile, "INSTALL.sh: FAILED")
installer("a hostile INSTALL.sh in the sums", hostile_summed, "[Ii]ncorrect signature")
installer("a hostile INSTALL.sh, signed by a stranger", hostile_signed, "Good.*SHA256:")
installer("a hostile INSTALL.sh by a link", hostile_link, "INSTALL.sh: FAILED")

# -- look-alike images, and an engine or a disk that changes its mind


def look_alike(bench: Bench, at: Path, layers: int | None = None) -> None:
    """An image of the name of ours with our layers and another ENTRYPOINT, or with fewer."""
    config = json.loads(bench.full.image.config_json_bytes)
    config["config"]["Entrypoint"] = ["/bin/sh", "-c", "echo OWNED"]
    image = replace(bench.full.image, config_json_bytes=archive.canonical_json(config))
    tag = parts.final_tag(bench.full.image)
    image = archive.prefix(image, layers or len(image.layers), tag)
    out = io.BytesIO()
    archive.write_archive(image, out)
    docker("load", "-q", data=out.getvalue())


def stranger_image(bench: Bench, at: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("owned"))
    docker("import", "-", parts.final_tag(bench.full.image), data=out.getvalue())


def hands(bench: Bench, at: Path, on_load: str = "", always: str = "") -> None:
    """A docker command in front of the real one, which somebody else has a hand in."""
    real = shutil.which("docker")
    script(bench.folder / "hands", "docker",
           f'{always}\ncase $1 in load) {on_load or ":"} ;; esac\nexec {real} "$@"\n')  # fmt: skip


def of_engine(name: str, forge: Forge, code: int, says: str) -> None:
    """Installed on a new server: with ``code`` 0 the image of the signed plan is current and the
    tools are the signed ones, else nothing is."""

    def act(bench: Bench, at: Path) -> None:
        bench.clean()
        shutil.rmtree(bench.folder / "hands", ignore_errors=True)
        prefix = bench.folder / "server"
        shutil.rmtree(prefix, ignore_errors=True)
        forge(bench, at)
        path = f"{bench.folder / 'hands'}:{os.environ['PATH']}"
        got, said = bench.run(at, "install", prefix=prefix, path=path)
        wrong = bench.leftovers(prefix, bench.full) if got == 0 == code else []
        signed = bench.folder / "full/tools/milktea-run"
        if got == 0 and (prefix / "bin/milktea-run").read_bytes() != signed.read_bytes():
            wrong.append("milktea-run is not the signed one")
        identity = docker("image", "inspect", "--format", "{{.Id}}", f"{bench.repository}:current")
        if code == 0 and identity.strip() != bench.full.image.config_digest:
            wrong.append(f"current is {identity}")
        if code and identity.strip():
            wrong.append("an image became current")
        if got != code or not re.search(says, said) or wrong:
            raise Refused(f"code {got} instead of {code}: {wrong}: {said}")

    FORGERIES.append((f"image: {name}", act))


of_engine("our layers under another ENTRYPOINT", look_alike, 0, "DONE")
of_engine("fewer of our layers under our name", lambda b, at: look_alike(b, at, 3), 0, "DONE")
of_engine("a stranger's image under our name", stranger_image, 0, "DONE")
of_engine("an engine that says it loaded and did not",
          lambda b, at: hands(b, at, "echo Loaded image; exit 0"), 6,
          "did not take|is not the image")  # fmt: skip
of_engine("a disk whose tools change while it installs",
          lambda b, at: hands(b, at, always=f"rm -f {at}/tools/milktea-run; echo OWNED "
          f">{at}/tools/milktea-run"), 0, "DONE")  # fmt: skip
of_engine("a disk whose parts change after they were verified", lambda b, at: hands(b, at,
          f'for x in {at}/parts/*; do head -c 9000 "$x" >y; rm "$x"; mv y "$x"; done'), 6,
          "did not take|is not the image")  # fmt: skip
