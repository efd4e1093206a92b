"""What schemathesis may do at the gateway: work below one scratch directory, with commands that do nothing.

Names of its own making are replaced by known ones half of the time, so that not all that it asks for is unknown.
"""

import os
import zlib

import schemathesis

ROOT = os.environ["SCRATCH"]
EXECUTOR = os.environ["EXECUTOR"]
UNCONNECTED = os.environ["UNCONNECTED"]
SESSION = os.environ["SESSION"]

PATHS = {"path", "source", "destination", "source_path", "destination_path", "cwd"}
WAITS = {"wait_ms", "yield_time_ms", "grace_ms"}


def half(value):
    return zlib.crc32(repr(value).encode()) % 2 == 0


def below_root(path):
    """The path below the scratch directory, however it is written."""
    kept = "".join(c for c in path if c not in "\0\\" and c.isprintable())
    parts = [part[:60] for part in kept.split("/") if part not in ("", ".", "..", "~")]
    return "/".join([ROOT, *parts[:4]])


def harmless(name, value):
    if isinstance(value, float) and value.is_integer():
        # The same number to JSON Schema; the gateway wants it without a point.
        return int(value)
    if name in PATHS and isinstance(value, str):
        return below_root(value)
    if name == "command" and isinstance(value, str):
        return "echo harmless"
    if name == "command" and isinstance(value, list) and all(isinstance(word, str) for word in value):
        return ["echo", "harmless"] if value else value
    if name == "patch" and isinstance(value, str):
        return f"*** Begin Patch\n*** Add File: {below_root(value[:20])}\n+text\n*** End Patch\n"
    if name in WAITS and isinstance(value, int) and not isinstance(value, bool):
        return min(value, 50)
    if name == "timeout_ms" and isinstance(value, int) and 0 < value < 20_000:
        # Time enough for the executor to say that it has begun: else 504 is the right answer.
        return 20_000
    if name in ("environment_id", "source_environment_id", "destination_environment_id") and isinstance(value, str):
        return "box" if half(value) else value
    if name == "session_id" and isinstance(value, str):
        return SESSION if half(value) else value
    return value


@schemathesis.hook
def before_call(context, case, kwargs):
    path, parameters = case.operation.path, case.path_parameters or {}
    for name, value in parameters.items():
        if isinstance(value, str) and half((value, case.body, case.query)) and case.method != "DELETE":
            known = UNCONNECTED if path.endswith(("register", "validate")) else EXECUTOR
            parameters[name] = {"name": "box", "sid": SESSION, "id": known}.get(name, value)
    for name, value in list((case.query or {}).items()):
        if name == "path" and isinstance(value, str):
            case.query[name] = below_root(value)
        if name in WAITS:
            case.query[name] = 50 if str(value).isdigit() else value
    if "offset" in (case.query or {}):
        # It counts the bytes of one stream, which a description cannot tell.
        case.query.setdefault("stream", "stdout")
    if path.endswith("/mcp"):
        # Not a parameter by the rules of OpenAPI.
        case.headers["Accept"] = "application/json, text/event-stream"
    body = case.body
    if isinstance(body, dict):
        for named in (body, body.get("arguments")):
            if isinstance(named, dict):
                for name, value in list(named.items()):
                    named[name] = harmless(name, value)
