"""The page of `srrl view` on loopback, and its questions as JSON."""

import secrets
import socket
import threading
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.viewer.export import STATIC
from srrl_jax.viewer.index import Index
from srrl_jax.viewer.labels import mark
from srrl_jax.viewer.queries import QUERIES

LOOPBACK = ("127.0.0.1", "localhost")
SECONDS, SECONDS_STORE = 1.0, 10.0  # between two looks at logs on a disk, in a store, which lists objects
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def make_app(index: Index, token: str = "") -> Starlette:
    """The page and its questions.

    With a `token` only for who has it; without one only for requests that name loopback: no DNS rebinding.
    """

    async def guard(request: Request, answer: Callable) -> Response:
        given, kept = (
            secrets.compare_digest(of.get("token", "").encode(), token.encode())
            for of in (request.query_params, request.cookies)
        )
        if token and given:
            response: Response = RedirectResponse("/", status_code=303)  # it does not stay in the address
            response.set_cookie("token", token, httponly=True, samesite="strict")
        elif token and not kept:
            said = "Open the link with ?token=... that srrl view printed."
            response = PlainTextResponse(said, status_code=403)
        elif request.method == "POST" and request.headers.get("content-type") != "application/json":
            response = PlainTextResponse("JSON only", status_code=415)  # which no form of another page sends
        else:
            response = await answer(request)
        response.headers.update(HEADERS)
        return response

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
    guards = [
        Middleware(BaseHTTPMiddleware, dispatch=guard),
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
    ]
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
