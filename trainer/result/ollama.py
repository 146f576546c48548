"""A trained template in the words of Ollama's Modelfile (Go's text/template). No torch.

Literals are written as string expressions, and every action trims the blanks around it, so that
nothing but them is in the prompt. Ollama's parser drops signs that Go does not print (other blanks
than U+0020, joiners, controls), so these are escaped. Ollama's messages have no place for Alpaca's
input.
"""

from __future__ import annotations

import re

from trainer.data.template import Template, TemplateError
from trainer.data.tokens import Vocabulary, prefix_ids

_HOLE = re.compile(r"\{(system|user|assistant|instruction|input|round|bos)\}")


def modelfile(gguf_name: str, template: Template, vocabulary: Vocabulary, stop: str) -> str:
    """FROM the file beside it, with the trained template and its stop token."""
    lines = [f"FROM ./{gguf_name}"]
    if template.name != "chat":  # Ollama knows the model's own by its text in the GGUF
        lines.append(f'TEMPLATE """{go_template(template, vocabulary)}"""')
    lines += [f'PARAMETER stop "{stop}"', "PARAMETER temperature 0"]  # it reads no escapes
    return "\n".join(lines) + "\n"


def go_template(template: Template, vocabulary: Vocabulary) -> str:
    """The template over `.Messages`. Raises TemplateError for one that counts its rounds, which Go
    cannot."""
    pieces = (template.user, template.between, template.assistant, template.system)
    if any("{round}" in piece for piece in pieces):
        raise TemplateError(
            f"template {template.name} numbers its rounds, which Ollama's templates cannot: use "
            "llama.cpp, which takes the Jinja template"
        )
    bos = {"bos": _literal(vocabulary.bos)}
    system = "{{- if $told -}}" + _filled(template.system, {"system": "{{- $told -}}"})
    system += "{{- end -}}"
    values = {
        "user": "{{- $m.Content -}}",
        "instruction": "{{- $m.Content -}}",
        "input": "",
        "system": system,
    }
    user = _filled(template.user, values | bos)
    if "{system}" not in template.user:
        user = system + user
    stop = vocabulary.eos if template.stop == "eos" else template.stop
    answer = _filled(template.assistant, {"assistant": "{{- $m.Content -}}"}) + _literal(stop)
    lead = template.assistant.partition("{assistant}")[0]
    # the tokenizer's own are put before by the GGUF's settings
    named = () if vocabulary.prefix else prefix_ids(vocabulary, template)
    before = [vocabulary.tokenizer.id_to_token(i) or "" for i in named]
    return "".join(
        (
            _literal("".join(before)),
            "{{- $first := true -}}",
            "{{- range $i, $m := .Messages -}}",
            '{{- if eq $m.Role "user" -}}',
            '{{- $told := "" -}}',
            "{{- if $first -}}",
            "{{- $told = " + _string(template.preamble) + " -}}",
            "{{- if $.System -}}{{- $told = $.System -}}{{- end -}}",
            "{{- else -}}" + _filled(template.between, bos) + "{{- end -}}",
            "{{- $first = false -}}" + user,
            '{{- else if eq $m.Role "assistant" -}}' + answer,
            "{{- end -}}",
            "{{- end -}}",
            _literal(lead) if lead.strip() else "",
        )
    )


def _filled(piece: str, values: dict[str, str]) -> str:
    out, at = [], 0
    for hole in _HOLE.finditer(piece):
        if (name := hole.group(1)) not in values:
            continue
        out += [_literal(piece[at : hole.start()]), values[name]]
        at = hole.end()
    return "".join([*out, _literal(piece[at:])])


def _literal(text: str) -> str:
    return "{{- " + _string(text) + " -}}" if text else ""


def _string(text: str) -> str:
    """`text` as Go writes it in double quotes; the Modelfile's own quotes are three of these."""
    return '"' + "".join(map(_sign, text)) + '"'


def _sign(sign: str) -> str:
    if sign == "\n":
        return "\\n"
    if sign.isprintable() and sign not in '"\\':
        return sign
    return f"\\u{ord(sign):04x}" if ord(sign) < 0x10000 else f"\\U{ord(sign):08x}"
