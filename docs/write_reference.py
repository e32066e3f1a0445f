"""Write ``docs/reference`` from the code: ``python -m docs.write_reference [--check]``.

With ``--check`` nothing is written, and the exit status is 1 if a page is stale.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import tomllib
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

import gatdist
from docs.docstrings import args_of, fields_of, markdown, paragraphs, prose, section_of
from gatdist.cli import parser as command_line
from gatdist.common import errors
from gatdist.config import (
    Config,
    NamedConfig,
    PenaltyConfig,
    Schedule,
    load_config,
    preset_names,
)
from gatdist.monitor.tags import FIELDS, TAGS

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Written from the code by `python -m docs.write_reference`; change it there. -->\n"


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if one is stale")
    arguments = parser.parse_args()
    found = pages()
    if arguments.check:
        return int(bool(stale(found)))
    FOLDER.mkdir(exist_ok=True)
    for name, text in found.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


def stale(found: dict[str, str]) -> list[str]:
    """Return the names of pages that are stale or superfluous."""
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    return sorted(n for n in there.keys() | found.keys() if there.get(n) != found.get(n))


def pages() -> dict[str, str]:
    """Return the text of each page by its name."""
    made = {
        "configuration.md": ("Configuration", configuration()),
        "names.md": ("Networks, losses and other names", names()),
        "commands.md": ("Commands", commands()),
        "metrics.md": ("Metrics and tags", metric_tags()),
        "presets.md": ("Presets", presets()),
        "errors.md": ("Errors and exit statuses", exit_statuses()),
        "python.md": ("Python", python()),
    }
    return {
        name: f"# {title}\n\n{NOTE}\n" + "\n".join(lines).rstrip() + "\n"
        for name, (title, lines) in made.items()
    }


# Configuration


def configuration() -> Iterator[str]:
    yield (
        "Sections and keys of a TOML file and of `--set section.key=value`. "
        "The networks, losses, metrics and so on that keys refer to, and their options, are listed "
        "in [names](names.md)."
    )
    seen: set[type[BaseModel]] = set()
    for name, field in Config.model_fields.items():
        models = models_in(field.annotation)
        if models:
            yield from section(name, models[0], seen)
    yield "\n## `plugins`\n"
    yield f"{fields_of(Config)['plugins']} Default: `[]`."
    yield from section("schedule", Schedule, seen)


def section(path: str, model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """Yield a table of the keys of a section, and the sections inside it."""
    yield f"\n## `{path}`\n"
    yield from prose(model)
    inner: list[tuple[str, type[BaseModel]]] = []  # where each stands, and what it is
    schema = model.model_json_schema()
    meanings = fields_of(model)
    yield "| key | value | default | meaning |\n| --- | --- | --- | --- |"
    for key, field in model.model_fields.items():
        below = [m for m in models_in(field.annotation) if m not in (NamedConfig, Schedule)]
        if below:
            by_name = ".<name>" if below[0] is PenaltyConfig else ""
            inner.append((f"{path}.{key}{by_name}", below[0]))
        default = (
            "required"
            if field.is_required()
            else shown(field.get_default(call_default_factory=True))
        )
        value = kind(schema["properties"][key], schema.get("$defs", {}))
        yield f"| `{key}` | {value} | {default} | {meanings[key]} |"
    for _, below in inner:
        if below not in seen:
            seen.add(below)
            same = [where for where, other in inner if other is below]
            yield from section("`, `".join(same), below, seen)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def kind(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    """Describe the values that a JSON schema allows."""
    if schema.get("$ref") == "#/$defs/Schedule":
        return "number or [schedule](#schedule)"
    if "$ref" in schema:
        return "table"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind(one, defs) for one in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    base = {
        "integer": "integer",
        "number": "number",
        "boolean": "`true`, `false`",
        "string": "string",
        "null": "none",
        "object": "table",
    }.get(schema.get("type", ""), "any")
    if schema.get("type") == "array":
        count = schema.get("maxItems")
        one = kind(schema["items"], defs)
        return f"list of {count} × {one}" if count else f"list of {one}"
    if "pattern" in schema:
        return "64 hexadecimal digits or empty"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [
        f"{sign} {shown(schema[key]).strip('`')}"
        for key, sign in signs.items()
        if key in schema and schema[key] != 2**63
    ]
    return " ".join([base, ", ".join(limits)]).strip()


def shown(value: Any) -> str:
    """Format a default as TOML."""
    if value is None:
        return "none"
    if isinstance(value, NamedConfig):
        return f'`{{ name = "{value.name}" }}`'
    if isinstance(value, Schedule):
        return shown(value.start)
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, list | tuple):
        return f"`[{', '.join(shown(one).strip('`') for one in value)}]`"
    if isinstance(value, dict):
        pairs = ", ".join(f"{key} = {shown(one).strip('`')}" for key, one in value.items())
        return f"`{{ {pairs} }}`" if pairs else "`{}`"
    return f"`{value:_}`" if isinstance(value, int) and value >= 10_000 else f"`{value:g}`"


# Names


def names() -> Iterator[str]:
    from gatdist.evaluation.features import extractors
    from gatdist.evaluation.metrics import metrics
    from gatdist.game.augmentation import augmentations
    from gatdist.game.losses import Sum, losses
    from gatdist.game.penalties import penalties
    from gatdist.game.tasks import tasks
    from gatdist.game.terms import terms
    from gatdist.game.updates import update_rules
    from gatdist.models.registry import discriminators, generators

    given = {"latent_size", "sample_shape", "num_classes", "sample_rate", "seed", "device", "self"}
    yield "Register your own in a module listed in `plugins`; see [Python](python.md)."
    for title, registry in (
        ("model.generator.name", generators),
        ("model.discriminator.name", discriminators),
        ("game.augmentation.name", augmentations),
        ("game.task.name", tasks),
        ("game.terms", terms),
    ):
        yield f"\n## `{title}`\n\n| name | options and defaults | description |"
        yield "| --- | --- | --- |"
        for name, builder in own(registry).items():
            options = ", ".join(
                f"`{p.name} = {shown(p.default).strip('`')}`"
                for p in inspect.signature(builder).parameters.values()
                if p.name not in given and p.default is not p.empty
            )
            most = 2 if registry is augmentations else None
            what = " ".join(map(markdown, paragraphs(builder)[:most]))
            yield f"| `{name}` | {options} | {what} |"
    for title, entries in (
        ("game.update_rule", own(update_rules)),
        ("evaluate.metrics", {n: m.measure for n, m in own(metrics).items()}),
        ("evaluate.features", own(extractors)),
    ):
        yield f"\n## `{title}`\n\n| name | description |\n| --- | --- |"
        for name, thing in entries.items():
            yield f"| `{name}` | {markdown(' '.join(paragraphs(thing)[:1]))} |"
    yield "\n## `game.loss`\n\nSee [the formulas](../how-to/losses-and-rules.md#losses-gameloss).\n"
    yield "| name | supports `one_stage` | zero-sum (for `competitive`) | sum of two parts |"
    yield "| --- | --- | --- | --- |"
    for name, loss in own(losses).items():
        facts = (loss.ratio is not None, loss.zero_sum, isinstance(loss.discriminator, Sum))
        yield f"| `{name}` | {' | '.join(map(yes, facts))} |"
    yield "\n## `game.penalties`\n\n| name | added to the loss of the | at | value per sample |"
    yield "| --- | --- | --- | --- |"
    for name, penalty in own(penalties).items():
        what = paragraphs(penalty.per_sample)[0].removesuffix(", [n].")
        what = re.sub(r" for each (sample|pair)$", "", what)
        yield f"| `{name}` | {penalty.player} | {PLACES[penalty.at]} | {markdown(what)} |"


PLACES = {
    "real": "real samples",
    "fake": "fakes",
    "between": "points between real and fake samples",
    "logits": "pairs of logits",
    "latents": "latents",
}


def own(registry: Any) -> dict[str, Any]:
    """Return the built-in entries of a registry by name."""
    entries = {name: registry[name] for name in registry.names()}
    return {name: entry for name, entry in entries.items() if home(entry).startswith("gatdist.")}


def home(entry: Any) -> str:
    """Return the module that defines an entry or its functions."""
    if inspect.isroutine(entry) or isinstance(entry, type):
        return entry.__module__
    return next(f.__module__ for f in vars(entry).values() if inspect.isroutine(f))


def yes(value: bool) -> str:
    return "yes" if value else "no"


# Commands


def commands() -> Iterator[str]:
    yield (
        "Every command takes `--json`, which prints exactly one JSON document on standard output, "
        "and `--help`. [Exit statuses](errors.md) are those of the errors."
    )
    yield from subcommands(command_line(), "gatdist")


def subcommands(parser: argparse.ArgumentParser, path: str) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield f"\n{'#' * (1 + len(path.split()))} `{path} {name}`\n\n{sub.description}\n"
                yield from options(sub)
                yield from subcommands(sub, f"{path} {name}")


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    rows = []
    for action in parser._actions:
        if action.dest in ("help", "json") or isinstance(action, argparse._SubParsersAction):
            continue
        value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
        flag = " ".join([*action.option_strings[-1:], str(value)]).strip()
        what = (action.help or "").replace("|", "\\|")
        must = "" if not (action.required and action.option_strings) else " (required)"
        rows.append(f"| `{flag}` | {what}{must} |")
    if rows:
        yield "| argument | meaning |\n| --- | --- |"
        yield from rows


# The rest


def metric_tags() -> Iterator[str]:
    yield (
        "TensorBoard shows these tags. Each line of `metrics.jsonl` is one log interval. "
        "`<player>` is `generator` or `discriminator`; other placeholders are names you choose."
    )
    for title, tags in (("Tags", TAGS), ("Other fields of `metrics.jsonl`", FIELDS)):
        yield f"\n## {title}\n\n| tag | meaning |\n| --- | --- |"
        yield from (f"| `{tag.name}` | {tag.meaning} |" for tag in tags)


def presets() -> Iterator[str]:
    yield "Train one with `gatdist train NAME`. [Results](../results.md) has what they reach."
    yield "\n| name | samples | data | generator | loss | notes |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in preset_names():
        config = load_config(name)
        text = (Path(gatdist.__file__).parent / "config" / "presets" / f"{name}.toml").read_text()
        assert tomllib.loads(text)
        comment = " ".join(
            line[1:].strip() for line in text.split("\n\n")[0].splitlines() if line.startswith("# ")
        )
        yield (
            f"| `{name}` | {config.run.total_samples:,} | `{config.data.url}` "
            f"| `{config.model.generator.name}` | `{config.game.loss}` | {comment} |"
        )


EXITS = """\
| exit status | meaning |
| --- | --- |
| 0 | The command succeeded. |
| 1 | Training failed, or an unexpected error occurred. |
| 2 | Invalid input. One message names the field or file, its value, the rule and a hint. |
| 75 | Temporary failure: interrupted, a worker lost, or storage down. Run the command again. |

## Classes, in `gatdist.common.errors`

| class | base class | exit status | raised when |
| --- | --- | --- | --- |"""


def exit_statuses() -> Iterator[str]:
    yield EXITS
    for name, thing in vars(errors).items():
        if isinstance(thing, type) and issubclass(thing, errors.GatdistError):
            what = markdown(" ".join(paragraphs(thing)))
            yield f"| `{name}` | `{thing.__base__.__name__}` | {thing.exit_status} | {what} |"


def python() -> Iterator[str]:
    yield "The public names of `import gatdist`."
    for name in gatdist.__all__:
        thing = getattr(gatdist, name)
        home = importlib.import_module(gatdist._HOMES[name])
        assert getattr(home, name) is thing
        title = name + (signature(thing) if isinstance(thing, types.FunctionType) else "")
        yield f"\n## `{name}`\n\n```text\n{title}\n```\n" if "(" in title else f"\n## `{name}`\n"
        yield from prose(thing)
        if isinstance(thing, type) and not issubclass(thing, BaseModel):
            yield from listed("Attributes", args_of(thing, "Attributes"))
            yield from listed("Methods", methods(thing))
        yield from listed("Arguments", args_of(thing, "Args"))
        if returns := [*section_of(thing, "Returns")]:
            yield f"Returns: {markdown(' '.join(line.strip() for line in returns))}\n"
        yield from listed("Raises", args_of(thing, "Raises"))


def methods(kind: type) -> dict[str, str]:
    """Return what the documented public methods of a class do, by call."""
    functions = {
        name: each
        for name, each in vars(kind).items()
        if isinstance(each, types.FunctionType) and each.__doc__
        if name == "__call__" or not name.startswith("_")
    }
    calls = {
        name: ", ".join(
            p.name if p.default is p.empty else f"{p.name} = {p.default!r}"
            for p in inspect.signature(each).parameters.values()
            if p.name != "self"
        )
        for name, each in functions.items()
    }
    return {
        f"{name}({calls[name]})": markdown(" ".join(paragraphs(each)))
        for name, each in functions.items()
    }


def signature(function: Any) -> str:
    """Format a signature, with one parameter per line if it is long."""
    parameters, was_keyword_only = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not was_keyword_only:
            parameters.append("*")
            was_keyword_only = True
        default = "" if p.default is p.empty else f" = {p.default!r}"
        parameters.append(f"{p.name}: {p.annotation}{default}")
    line = f"({', '.join(parameters)})"
    return line if len(line) < 80 else "(\n    " + ",\n    ".join(parameters) + ",\n)"


def listed(title: str, entries: dict[str, str]) -> Iterable[str]:
    """Yield a titled list, or nothing if it is empty."""
    if entries:
        yield f"{title}:\n"
        yield "\n".join(f"* `{name}`: {text}" for name, text in entries.items()) + "\n"


if __name__ == "__main__":
    sys.exit(main())
