"""Ray's token: who may speak to a Ray. Whoever has it can run code as the user whose Ray it is.

Ray 2.60 asks for one by default. A Ray started here takes the user's own (`~/.ray/auth_token`, made on first use), and this module
sees to it that no other user can read it. For a cluster it comes from the usual environment: `RAY_AUTH_TOKEN_PATH` or
`RAY_AUTH_TOKEN`. It is never printed, and never sent to an address on another machine unless one of these is set.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
MODE = "RAY_AUTH_MODE"


def keep_private() -> None:
    """See to it that a Ray started now has a token that only this user can read, unless the environment says otherwise.

    A home that cannot be written gets a token in memory, for this process and those it starts.
    """
    if os.environ.get(MODE, "token") != "token" or any(os.environ.get(name) for name in VARIABLES):
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
        if path.exists():
            if path.stat().st_mode & 0o077:  # as Ray itself writes it
                path.chmod(0o600)
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = path.with_name(f".auth_token.{secrets.token_hex(8)}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another process was first: its token counts
            os.link(fresh, path)
        fresh.unlink()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def use(on_this_machine: bool) -> None:
    """Use the token that the environment names, for an address of this machine also the user's own, unless a mode is set."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    if MODE in os.environ or not (on_this_machine or any(os.environ.get(name) for name in VARIABLES)):
        return
    if AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        os.environ[MODE] = "token"
        Config.initialize("")  # Ray reads the mode once


def accepted(address: str, timeout_s: float = 10.0) -> bool:
    """False when the control process at `HOST:PORT` refuses our token, or that we have none; True also where it does not answer.

    Ray itself asks again every second for most of a minute and then says that nobody answered.
    """
    import grpc
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    header = AuthenticationTokenLoader.instance().get_token_for_http_header() if os.environ.get(MODE) == "token" else {}
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=timeout_s, metadata=[(name.lower(), value) for name, value in header.items()])
        except grpc.RpcError as error:
            return bool(error.code() != grpc.StatusCode.UNAUTHENTICATED)
    return True


def refusal(address: str) -> PermissionError:
    """What to tell when Ray at `address` refuses the token, or that there is none."""
    named = next((name for name in VARIABLES if os.environ.get(name)), None)
    if os.environ.get(MODE) == "disabled":
        state = f"{MODE}=disabled sends none"
    elif named is not None:
        state = f"the one that {named} names is another one"
    else:
        state = f"neither {VARIABLES[1]} nor {VARIABLES[0]} is set"
    return PermissionError(
        f"{address} asks for its token, and {state}: set {VARIABLES[1]} to a file that holds the cluster's token "
        f"(and {MODE}=token where it is set to something else)"
    )
