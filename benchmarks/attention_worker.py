"""One framework in a process of its own.

    python -m benchmarks.attention_worker NAME MODULE PACKAGE...

Reads requests and writes answers, a line of JSON each. First it answers that it is ready. A
request: {"do": "prepare" | "round" | "clear", "case": fields of a `Case`, "keep": bool}; where not
`keep`, no inputs stay alive after it. A module whose cases are of another class names it `CASE`.
Another one, {"do": "compile", "cases": [...], "seconds": number}, is for sessions that can compile
before they are asked for a case. An answer is what the module's `Session` returns, or
{"error": text}, or {"unsupported": text}; beside it, where the session counts them, {"phases":
seconds by name} since the last answer.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any, TextIO

from benchmarks.cases import Case


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def answer(session: Any, request: dict[str, Any]) -> dict[str, Any]:
    reply = _reply(session, request)
    return reply | {"phases": session.phases.take()} if hasattr(session, "phases") else reply


def _reply(session: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if request["do"] == "clear":
            return session.clear() or {}
        make_case = getattr(sys.modules[type(session).__module__], "CASE", Case)
        if request["do"] == "compile":
            if hasattr(session, "compile"):
                cases = [make_case(**fields) for fields in request["cases"]]
                session.compile(cases, request["seconds"])
            return {}
        reply = getattr(session, request["do"])(make_case(**request["case"]))
        if not request["keep"]:
            session.forget_inputs()
        return reply
    except NotImplementedError as failure:
        return {"unsupported": str(failure)}
    except Exception as failure:  # a peer may fail in any way, and the result says how
        return {"error": first_line(failure)}


def serve(name: str, module: str, packages: list[str], requests: TextIO, answers: TextIO) -> None:
    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        session = importlib.import_module(module).Session(name)
        for package in packages:
            importlib.import_module(package)
    except Exception as failure:  # likewise: an installation may be broken in any way
        say({"error": first_line(failure)})
        return
    say({"ready": True})
    for line in requests:
        say(answer(session, json.loads(line)))


def main() -> None:
    # What libraries print goes where errors go; the protocol has the standard output to itself.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _, name, module, *packages = sys.argv
    serve(name, module, packages, sys.stdin, answers)


if __name__ == "__main__":
    main()
