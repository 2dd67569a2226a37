"""The parser's errors in one line, and the checks of configuration files that the parser leaves out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from rlhf_lit.commands.renamed import successor
from rlhf_lit.errors import UserError
from rlhf_lit.files import Ambiguous, check_yaml, load_yaml

_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_REFUSED = re.compile(r"(?:Option|(?:Group|Subcommand) '(?P<group>[^']+)' does not accept option) '(?P<key>[^']+)'")
_ARGUMENT = re.compile(r"unrecognized arguments: --(?P<key>[^=\s]+)")
_MISSING = re.compile(r"the following arguments are required: (.*)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\S+)")
_EXPECTED = re.compile(r"Expected an? (?P<type>.+?)(?:\. Got value: (?P<value>.*))?$")
_NO_SUBCLASS = re.compile(r"Subclasses are disabled for (?P<type>\w+), thus '(?:[\w.]*\.)?(?P<given>\w+)'")
_NO_FIELDS = re.compile(r"Not a valid subclass of (?P<type>\w+)")
_CHATTER = (
    "Does not validate against", "Subtypes:", "Errors:", "Given value type:", "Expected a path but",
    "Subclass types expect one of", "a class path (str)", "a dict with", "(class path given previously)",
)  # fmt: skip


@dataclass(frozen=True)
class _Finding:
    """One leaf of the parser's indented complaint: where, about which class, and what."""

    path: tuple[str, ...]
    owner: str
    text: str


def condense(message: str) -> str:
    """The one line of a jsonargparse error that says which key is wrong and why.

    Its message is an indented tree: every member of every union complains. The deepest complaint is the one about what
    the user wrote; "expected null" beside it only says that the key could also be left out.
    """
    findings, value = _findings(message)
    if not findings:
        return " ".join(message.split())
    deepest = max(len(f.path) + bool(f.owner) for f in findings)
    chosen = [f for f in findings if len(f.path) + bool(f.owner) == deepest]
    where = ".".join(chosen[0].path)
    wanted: list[str] = []
    others: list[str] = []
    for finding in chosen:
        text = finding.text
        if match := _NO_SUBCLASS.search(text):
            return f"{where}: {match['given']} does not fit: the fields of {match['type']} alone, without class_path"
        if match := _REFUSED.search(text) or _ARGUMENT.search(text):
            group = match.groupdict().get("group")
            group = None if text.startswith("Subcommand") else group
            return _unknown_key(where, ".".join(filter(None, [group, match["key"]])), finding.owner)
        if match := _MISSING.search(text):
            names = [re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in match[1].split(", ")]
            keys = ", ".join(".".join(filter(None, [where, name])) for name in names)
            return f"{keys}: required, and not set in a config or on the command line"
        if match := _NO_CLASS.search(text):
            return ": ".join(filter(None, [where, f"there is no class named {match['name']!r}"]))
        if match := _NO_FIELDS.search(text):
            wanted.append(f"the fields of {match['type']}")
        elif match := _EXPECTED.search(text):
            wanted.append(_readable(match["type"]))
            value = match["value"] or value
        else:
            others.append(text)
    if wanted and not others:
        got = f", got {value!r}" if value else ""
        return f"{where}: expected {' or '.join(dict.fromkeys(wanted))}{got}"
    return ": ".join(filter(None, [where, "; ".join(dict.fromkeys(others))]))


def _findings(message: str) -> tuple[list[_Finding], str]:
    """The leaves of the tree, and the innermost value it quotes (the first: inner blocks close before outer ones)."""
    keys: list[tuple[int, str]] = []
    owners: list[tuple[int, str]] = []
    findings: list[_Finding] = []
    value = ""
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip()) + (2 if line.lstrip().startswith("- ") else 0)
        if not text or text.startswith(_CHATTER):
            continue
        if text.startswith("Given value:"):
            value = value or text.removeprefix("Given value:").strip()
            continue
        keys = [entry for entry in keys if entry[0] < indent]
        owners = [entry for entry in owners if entry[0] < indent]
        if match := _KEY.match(text):
            keys.append((indent, match[1]))
            owners = []
            text = match[2]
        if match := _CLASS.search(text):
            owners.append((indent, match[1]))
        elif text:
            findings.append(_Finding(tuple(key for _, key in keys), owners[-1][1] if owners else "", text))
    return findings, value


def _unknown_key(where: str, key: str, owner: str) -> str:
    """``owner`` is the class path of what stands at ``where``; the key may reach further in."""
    key = key.removeprefix("init_args.")
    full = ".".join(filter(None, [where, key]))
    if new := successor(full):
        return f"{full}: unknown key; in its place there is {new} (docs/migration.md)"
    line = f"{full}: unknown key"
    if not owner or "." in key:
        return line
    module, name = owner.rsplit(".", 1)
    known = list(_parameters(getattr(import_module(module), name)))
    return f"{line}; {name} has {', '.join(known) or 'none'}"


def _parameters(kind: type) -> Iterator[str]:
    """What a constructor takes; where it hands ``**rest`` on to its parent's, the parent's too."""
    seen: set[str] = set()
    for ancestor in kind.__mro__:
        if "__init__" not in vars(ancestor):
            continue
        parameters = list(inspect.signature(vars(ancestor)["__init__"]).parameters.values())[1:]
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        yield from (name for name in named if name not in seen)
        seen.update(named)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return


def _readable(kind: str) -> str:
    kind = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", kind)
    kind = re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind)
    return re.sub(r"\bNoneType\b", "null", kind)


def read_configs(argv: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The files given by ``--config``, in order, as plain dictionaries.

    Raises:
        UserError: a file that does not exist, is no YAML, has a key twice, or holds no keys.
    """
    files = [value for flag, value in pairwise(argv) if flag in ("--config", "-c")]
    files += [arg.split("=", 1)[1] for arg in argv if arg.startswith(("--config=", "-c="))]
    documents = []
    for name in files:
        try:
            content = load_yaml(Path(name).read_text(encoding="utf-8"), f"--config {name}")
        except OSError as error:
            raise UserError(f"--config {name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--config {name}: not YAML: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"--config {name}: expected keys and values (such as 'model:'), found {_kind(content)}")
        documents.append((name, content))
    return documents


def read_options(argv: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Each ``--a.b=value`` of a command line as a document of its own, for ``check_keys``."""
    documents = []
    for argument, following in pairwise([*argv, ""]):
        flag, equals, value = argument.partition("=")
        key = flag.removeprefix("--").removesuffix("+")
        if not flag.startswith("--") or key in ("config", "print_config", "help"):
            continue
        text = value if equals else following
        inner: Any = {} if text.strip() == "{}" else text
        for part in reversed(key.split(".")):
            inner = {part: inner}
        documents.append(("the command line", inner))
    return documents


def refuse_ambiguous(argv: Sequence[str]) -> None:
    """Refuse configuration files and options in which a key is there twice, or whose aliases have no end.

    Raises:
        UserError: what it is, and where; a file that cannot be read.
    """
    read_configs(argv)
    for argument, following in pairwise([*argv, ""]):
        flag, equals, value = argument.partition("=")
        if flag.startswith("--") and flag not in ("--config", "--print_config"):
            try:
                check_yaml(value if equals else following)
            except Ambiguous as error:
                raise UserError(f"{flag}: {error.problem}") from error
            except yaml.YAMLError:
                pass  # a text


def _kind(content: object) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"


def check_keys(documents: list[tuple[str, dict[str, Any]]], config: Namespace) -> list[str]:
    """What became of the keys of the configuration files in the resolved configuration.

    Returns:
        One line for each value that was dropped because a later file or option chose another class.

    Raises:
        UserError: an unknown key whose value is an empty mapping, which the parser overlooks.
    """
    notes = []
    for name, document in documents:
        for key, value in _lost(document, config, ()):
            if _says_nothing(value):
                raise UserError(f"{key}: unknown key, in {name}")
            notes.append(f"{key}: {value!r} of {name} is not used, as the class chosen later has no such key")
    return notes


def _says_nothing(value: object) -> bool:
    return isinstance(value, dict) and all(map(_says_nothing, value.values()))


def _lost(document: dict[str, Any], resolved: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Keys of a file that are absent from the resolved configuration."""
    for name, value in document.items():
        key = str(name).removesuffix("+")
        holder = resolved
        if key not in holder and "init_args" in holder:  # written in short: model.base for model.init_args.base
            holder = holder["init_args"]
        if key not in holder:
            if key not in ("init_args", "dict_kwargs"):
                yield ".".join(part for part in (*path, key) if part != "init_args"), value
        elif isinstance(value, dict) and isinstance(holder[key], Mapping | Namespace):
            yield from _lost(value, holder[key], (*path, key))
