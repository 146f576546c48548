"""Where tests/airgap.py tries a bundle: its copies, a server that knows the sender, the engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from ops.image.bundle import parts, signature
from ops.image.bundle.contents import Contents


@dataclass
class Bench:
    """``folder`` has the bundles full and update, a sender's key and a stranger's; ``full`` and
    ``after`` are what the bundles bring."""

    folder: Path
    full: Contents
    after: Contents
    lines: dict[str, int] = field(default_factory=dict)
    based: bool = False  # the engine has what the update builds on, and folder/base its PREFIX

    @property
    def key(self) -> Path:
        return self.folder / "key"

    @property
    def stranger(self) -> Path:
        return self.folder / "stranger"

    @property
    def fingerprint(self) -> str:
        return signature.fingerprint(Path(f"{self.key}.pub"))

    def copy(self, kind: str) -> Path:
        """A bundle to spoil: hard links, so whoever changes a file unlinks it first."""
        at = self.folder / "trial"
        shutil.rmtree(at, ignore_errors=True)
        shutil.copytree(self.folder / kind, at, copy_function=os.link, symlinks=True)
        return at

    def run(
        self, at: Path, *words: str, prefix: Path | None = None, path: str | None = None
    ) -> tuple[int, str]:
        """INSTALL.sh without a network, on the server that knows the sender where no other PREFIX
        is named; its exit code and all that it said."""
        more = ["--key", self.fingerprint] if prefix and "--key" not in words else []
        done = subprocess.run(
            ["unshare", "-n", "sh", str(at / "INSTALL.sh"), *words, *more]
            + ["--prefix", str(prefix or self.folder / "pinned")],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            cwd=self.folder,
            env={**os.environ, "PATH": path or os.environ["PATH"]},
            timeout=600,
        )
        return done.returncode, done.stdout + done.stderr

    def readme(self, at: Path) -> str:
        """What the README's two lines before INSTALL.sh say where one of them does not say yes."""
        text = (self.folder / "full" / "README.en.txt").read_text()
        said = ""
        for pattern in (r"test .*check-novalidate.*", r"grep ' INSTALL.sh\$' .*"):
            [line] = re.findall(pattern, text)
            done = subprocess.run(["sh", "-c", line], cwd=at, capture_output=True, text=True)
            out = done.stdout + done.stderr
            if done.returncode or ("Good" in out and self.fingerprint not in out):
                said += out
        return said

    def tags(self) -> set[str]:
        listed = docker("images", "--filter", f"reference={self.repository}",
                        "--format", "{{.Repository}}:{{.Tag}}")  # fmt: skip
        return set(listed.split())

    @property
    def repository(self) -> str:
        return self.full.image.tag.partition(":")[0]

    def clean(self) -> None:
        """Remove every image and container of ours from the engine."""
        for tag in self.tags():
            left = docker("ps", "-aq", "--filter", f"ancestor={tag}").split()
            if left:
                docker("rm", "-f", *left)
            docker("rmi", "-f", tag)

    def ready(self, kind: str, prefix: Path) -> None:
        """A server that has nothing of ours, or for an update the full bundle."""
        shutil.rmtree(prefix, ignore_errors=True)
        if kind == "full" or not self.based:
            self.clean()
        self.based = kind == "update"
        if kind == "full":
            return
        base, installed = parts.final_tag(self.full.image), self.folder / "base"
        if base not in self.tags():
            shutil.rmtree(installed, ignore_errors=True)
            self.run(self.folder / "full", "install", prefix=installed)
        for tag in self.tags() - {base}:
            docker("rmi", "-f", tag)
        docker("tag", base, f"{self.repository}:current")
        shutil.copytree(installed, prefix, symlinks=True)

    def leftovers(self, prefix: Path, contents: Contents) -> list[str]:
        """What is wrong with a server after an installation of ``contents`` that said DONE."""
        final = parts.final_tag(contents.image)
        wanted = {final, f"{self.repository}:current"}
        if contents is self.after:
            wanted |= {parts.final_tag(self.full.image), f"{self.repository}:previous"}
        wrong = [f"tags {sorted(self.tags())}"] if self.tags() != wanted else []
        layers = json.loads(docker("image", "inspect", "--format", "{{json .RootFS.Layers}}",
                                   f"{self.repository}:current"))  # fmt: skip
        wrong += ["current is another image"] if layers != contents.image.diff_ids else []
        state = prefix / "state"
        found = [*state.glob("work.*"), *state.glob("lock"), *prefix.glob("models/.part*"),
                 *prefix.rglob("*.part"), *prefix.glob("*.new"), *prefix.glob("*.old")]  # fmt: skip
        wrong += [f"left: {path.name}" for path in found]
        if f"current {final}\n" not in (state / "airgap").read_text():
            wrong.append("the state names another image")
        json.loads((prefix / "INSTALL-RECORD.json").read_text())
        return wrong


def docker(*words: str, data: bytes | None = None) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, input=data)
    return done.stdout.decode()
