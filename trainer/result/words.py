"""What tells other programs how to ask the result: tokenizer, chat template, stop tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from trainer.data.chat_template import CONVERSATIONS, prove
from trainer.data.prepare import Prepared
from trainer.data.template import TemplateError
from trainer.wire.merged import TOKENIZER_FILES

JINJA, BASES_JINJA = "chat_template.jinja", "chat_template.base.jinja"


def write_words(base: Path, folder: Path, data: Prepared) -> dict[str, Any]:
    """Write into `folder` the base's tokenizer with the trained template as its chat template (the
    base's own stays beside it), generation_config.json with the trained stop token, and
    template.json, by which milktea asks. Returns what was proven, for the manifest."""
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    told: dict[str, Any]
    jinja = ""
    try:
        jinja = prove(data.template, data.vocabulary, thinking=data.rows.thinking)
        told = {
            "conversations": CONVERSATIONS,
            "sha256": hashlib.sha256(jinja.encode()).hexdigest(),
        }
        (folder / JINJA).write_text(jinja, encoding="utf-8", newline="")
    except TemplateError as error:  # the result is whole without it; its card says so
        told = {"refused": str(error)}
    if data.vocabulary.chat_template != (jinja or data.template.jinja):
        _keep_the_bases(folder, data.vocabulary.chat_template)
    (folder / "generation_config.json").write_text(
        json.dumps(_generation(base, data.stop_id), indent=2, sort_keys=True) + "\n"
    )
    template = data.template
    asked = {
        "name": template.name,
        "source": template.source,
        "sha256": template.sha256,
        "token_hash": data.token_hash,
        "enable_thinking": data.rows.thinking,
    }
    (folder / "template.json").write_text(
        json.dumps(asked, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    return told


def _keep_the_bases(folder: Path, jinja: str) -> None:
    """The base's own chat template, under a name that no program takes for the trained one."""
    if jinja:
        (folder / BASES_JINJA).write_text(jinja, encoding="utf-8", newline="")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.pop("chat_template", None):
            path.write_text(
                json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
            )


def _generation(base: Path, stop_id: int) -> dict[str, Any]:
    """The base's settings; an answer ends at the trained stop token or at one of the base's."""
    path = base / "generation_config.json"
    settings: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    )
    own = settings.get("eos_token_id")
    ends = [own] if isinstance(own, int) else own or []
    return settings | {"eos_token_id": [stop_id, *(i for i in ends if i != stop_id)]}
