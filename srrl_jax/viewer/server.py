"""The page of `srrl view` on loopback, and its questions as JSON."""

import secrets
import socket
import threading
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.viewer.index import Index
from srrl_jax.viewer.labels import mark
from srrl_jax.viewer.queries import QUERIES

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("127.0.0.1", "localhost")
SECONDS, SECONDS_STORE = (
    1.0,
    10.0,
)  # between two looks at logs on a disk and in a store, which lists its objects
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Guard:
    """Sets the headers of every answer, and lets in only who has the token, where there is one."""

    def __init__(self, app, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope, receive, send):
        async def with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] += [(k.encode(), v.encode()) for k, v in HEADERS.items()]
            await send(message)

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request, answer = Request(scope), self.app
        given = request.query_params.get("token", "")
        if self.token and secrets.compare_digest(given.encode(), self.token.encode()):
            answer = RedirectResponse("/", status_code=303)  # the token does not stay in the address
            answer.set_cookie("token", given, httponly=True, samesite="strict")
        elif self.token and not secrets.compare_digest(
            request.cookies.get("token", "").encode(), self.token.encode()
        ):
            answer = PlainTextResponse(
                "Open the link with ?token=... that srrl view printed.", status_code=403
            )
        elif request.method == "POST" and request.headers.get("content-type") != "application/json":
            answer = PlainTextResponse("JSON only", status_code=415)  # which no form of another page can send
        return await answer(scope, receive, with_headers)


def make_app(index: Index, token: str = "") -> Starlette:
    """The page and its questions; without a token only for requests that name loopback: no DNS rebinding."""

    def ask(request: Request) -> JSONResponse:
        question = QUERIES.get(request.path_params["question"])
        if question is None:
            return JSONResponse({"error": "no such question"}, status_code=404)
        try:
            return JSONResponse(question(index, request.query_params))
        except (InputError, KeyError, ValueError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    async def put_mark(request: Request) -> JSONResponse:
        body = await request.json()
        try:
            run, label = index.run(body["run"]), body["label"]
            if label is not None and not isinstance(label, bool):
                raise InputError("label: must be true, false or null")
            return JSONResponse(mark(index, run, int(body["id"]), int(body["k"]), label))
        except (InputError, KeyError, ValueError, IndexError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    routes = [
        Route("/api/label", put_mark, methods=["POST"]),
        Route("/api/{question}", ask),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    hosts = ["*"] if token else list(LOOPBACK)
    guards = [Middleware(Guard, token=token), Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    return Starlette(routes=routes, middleware=guards)


def follow(index: Index, stop: threading.Event) -> None:
    """Reads what the logs gain, until it is told to stop."""
    while not stop.is_set():
        try:
            index.refresh()
        except Exception as error:  # which the page shows
            index.fault = f"reading stopped: {error}"
            raise
        remote = any(storage.is_remote(run.folder) for run in index.runs)
        stop.wait(SECONDS_STORE if remote else SECONDS)


def serve(index: Index, host: str, port: int) -> None:
    """Shows the page until it is interrupted. Off loopback it asks for a token, which it prints.

    Raises:
      InputError: the port cannot be had.
    """
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise InputError(f"cannot listen on {host}, port {port} ({error}): give another --port") from None
    token = "" if host in LOOPBACK else secrets.token_urlsafe(24)
    app = make_app(index, token)
    stop = threading.Event()
    reader = threading.Thread(target=follow, args=(index, stop), daemon=True)
    reader.start()
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
    print(f"{address}{f'?token={token}' if token else ''}  (stop with Ctrl-C)", flush=True)
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
    finally:
        stop.set()
        index.close()
        reader.join()
