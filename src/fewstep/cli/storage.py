"""Commands for what fewstep keeps on the disk."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import click
from rich.table import Table

from fewstep.cache import damaged, default_limit, default_root
from fewstep.cache import prune as prune_entries
from fewstep.cache_entries import Entry, entries, size_bytes
from fewstep.cli.console import OUT, print_json
from fewstep.cli.options import json_option
from fewstep.errors import StorageError
from fewstep.recipe.quantization import parse_size

_DAY_S = 86400


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def cache(context: click.Context, as_json: bool) -> None:
    """Show what the stage cache holds, by stage; or prune or verify it."""
    if context.invoked_subcommand is not None:
        return
    root = default_root()
    stages: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries(root):
        stages[entry.stage].append(entry)
    others = {path.name: size_bytes(path) for path in _folders(root) if path.name not in stages}
    limit = default_limit()
    total = sum(entry.bytes for found in stages.values() for entry in found)
    if as_json:
        kept = {name: {"entries": len(e), "bytes": sum(x.bytes for x in e)} for name, e in sorted(stages.items())}
        return print_json({"root": str(root), "limit": limit, "bytes": total, "stages": kept, "others": others})
    table = Table("stage", "entries", "MB", "last used", title=str(root))
    for name, found in sorted(stages.items()):
        days = (time.time() - max(entry.used for entry in found)) / _DAY_S
        table.add_row(name, str(len(found)), f"{sum(e.bytes for e in found) / 1e6:.1f}", f"{max(0, days):.0f} days ago")
    for name, size in others.items():
        table.add_row(name, "", f"{size / 1e6:.1f}", "not pruned")
    OUT.print(table)
    most = "no limit" if limit is None else f"limit {limit / 1e6:.0f} MB"
    OUT.print(f"{total / 1e6:.1f} MB in entries, {most} (FEWSTEP_CACHE_LIMIT)", markup=False)


@cache.command()
@click.option("--older", type=click.FloatRange(0), metavar="DAYS", help="Entries that were not used for so long.")
@click.option("--max-size", metavar="SIZE", help="The least recently used, until no more than 10GB or so are left.")
@click.option("--damaged", "bad", is_flag=True, help="Entries that `fewstep cache verify` finds damaged.")
@click.option("--all", "everything", is_flag=True, help="All entries.")
@json_option
def prune(older: float | None, max_size: str | None, bad: bool, everything: bool, as_json: bool) -> None:
    """Remove entries; those that a running build uses stay."""
    if older is None and max_size is None and not bad and not everything:
        raise click.UsageError("say what to remove: --older DAYS, --max-size SIZE, --damaged or --all")
    root = default_root()
    before = sum(entry.bytes for entry in entries(root))
    most = 0 if everything else None if max_size is None else parse_size(max_size, "--max-size")
    older_s = None if older is None else older * _DAY_S
    removed = prune_entries(root, older_s=older_s, most=most, bad=bad, now=time.time())
    freed = before - sum(entry.bytes for entry in entries(root))
    if as_json:
        return print_json({"root": str(root), "removed": [str(path) for path in removed], "freed_bytes": freed})
    OUT.print(f"removed {len(removed)} entries, {freed / 1e6:.1f} MB, from {root}", markup=False)


@cache.command()
@json_option
def verify(as_json: bool) -> None:
    """Read every entry and compare it with its hashes; a damaged one ends in exit status 2."""
    root = default_root()
    bad, count = damaged(root), len(entries(root))
    if as_json:
        print_json({"root": str(root), "entries": count, "damaged": {str(path): said for path, said in bad}})
    else:
        for path, said in bad:
            OUT.print(f"damaged  {path}: {said}", markup=False)
        OUT.print(f"{count - len(bad)} of {count} entries are as they were written", markup=False)
    if bad:
        raise StorageError(
            f"{len(bad)} of {count} entries of the stage cache are damaged",
            hint="builds that need them make them again; `fewstep cache prune --damaged` removes them now",
        )


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]


COMMANDS = (cache,)
