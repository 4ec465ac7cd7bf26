"""``python -m fewstep.untouched FOLDER`` answers the request in a folder; without one, those whose folders it reads.

Loading torch and diffusers takes longer than the calls of a small pipeline. Without an argument, the process loads them
once and answers each request, a line of its input, in a process forked from it, so that none sees what another did.
"""

from __future__ import annotations

import json
import os
import select
import sys
import tempfile
from pathlib import Path

from fewstep.untouched.request import Answer, Request

# After so many seconds without a request the process ends, and the memory of its libraries with it.
IDLE_S = 60.0
ENDED, LOG = "ended", "log"


def answer(request: Request) -> Answer:
    """Returns the answer to a request."""
    from fewstep.untouched import calling, hearing
    from fewstep.untouched.loading import load_subject

    subject = load_subject(request.source)
    outputs = calling.outputs(subject, request)
    texts = hearing.texts_of(subject, request)
    reads = hearing.reads(subject, request, texts)
    modules = sorted(name for name in sys.modules if name.startswith("fewstep."))
    return Answer(tuple(outputs), texts, tuple(reads), subject.through, tuple(modules))


def _answer(folder: Path) -> None:
    request = Request.load(folder)
    os.chdir(request.source.cwd)
    answer(request).save(folder)


def _serve() -> None:
    import diffusers  # noqa: F401 - before the forks, once for all of them
    import torch  # noqa: F401 - likewise
    import transformers  # noqa: F401 - likewise

    while select.select([sys.stdin], [], [], IDLE_S)[0] and (line := sys.stdin.readline()):
        folder = Path(line.rstrip("\n"))
        _load_classes(folder)
        process = os.fork()
        if process == 0:
            _in_the_fork(folder)
        _, status = os.waitpid(process, 0)
        (folder / ENDED).write_text(str(os.waitstatus_to_exitcode(status)))


def _load_classes(folder: Path) -> None:
    """Imports the classes of a folder's pipeline, which takes seconds, before the fork and so once for each class."""
    import diffusers
    import transformers

    source = Request.load(folder).source
    index = Path(source.cwd, source.folder, "model_index.json")
    if not index.is_file():
        return
    values = json.loads(index.read_text(encoding="utf-8"))
    names = [values.get("_class_name"), *(entry[1] for entry in values.values() if isinstance(entry, list))]
    for name in names:
        for library in (diffusers, transformers):
            getattr(library, str(name), None)


def _in_the_fork(folder: Path) -> None:
    """Answers one request and ends; standard error goes to a file of the request's folder."""
    status = 1
    try:
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT, 0o600)
        for stream in (1, 2):
            os.dup2(log, stream)
        # Temporary files of a user's function are removed with the folder: nothing else is, at such an end.
        tempfile.tempdir = tempfile.mkdtemp(dir=folder)
        _answer(folder)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(10)  # who waits for the answer computes nothing meanwhile; until then the compiler comes first
    if len(sys.argv) > 1:
        _answer(Path(sys.argv[1]))
    else:
        _serve()
