"""Routes that load and unload edits while a server runs, in the form of vLLM's `/v1/load_lora_adapter`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

from ..artifacts.edit import Edit
from ..errors import ArtifactError
from .access import Access, Authorize, headers
from .repository import EditRepository, NoSuchEditError


class LoadEdit(BaseModel):
    """The body of `/v1/load_edit`.

    Attributes:
        edit_name: the id that requests will name.
        edit_path: a file that the server can read.
        load_inplace: take the place of an edit that has this id.
    """

    edit_name: str
    edit_path: str
    load_inplace: bool = False


class UnloadEdit(BaseModel):
    """The body of `/v1/unload_edit`.

    Attributes:
        edit_name: the edit's id.
    """

    edit_name: str


def allowed(authorize: Authorize, ids: Iterable[str]) -> list[str]:
    """Those of these edits that the client may see."""
    found = []
    for id in ids:
        try:
            authorize(Access("list", (id,), None, headers.get()))
        except PermissionError:
            continue
        found.append(id)
    return found


def edit_routes(folder: EditRepository, authorize: Authorize, *, updating: bool) -> APIRouter:
    """`GET /v1/edits`, and where `updating` is allowed `POST /v1/load_edit` and `POST /v1/unload_edit`.

    Args:
        folder: the server's edits.
        authorize: asked before anything is told or done.
        updating: whether clients may load and unload at all; whoever may load can name any file of the server's.
    """
    router = APIRouter()

    @router.get("/v1/edits")
    def edits() -> Response:
        return JSONResponse({"object": "list", "data": [{"id": id} for id in allowed(authorize, folder.ids())]})

    def load(body: LoadEdit) -> Response:
        def run() -> str:
            authorize(Access("load", (body.edit_name,), None, headers.get()))
            folder.add(_edit_of(body.edit_path, body.edit_name), replacing=body.load_inplace)
            return f"Success: edit '{body.edit_name}' added successfully."

        return _answer(run)

    def unload(body: UnloadEdit) -> Response:
        def run() -> str:
            authorize(Access("unload", (body.edit_name,), None, headers.get()))
            folder.remove(body.edit_name)
            return f"Success: edit '{body.edit_name}' removed successfully."

        return _answer(run)

    if updating:
        router.post("/v1/load_edit")(load)
        router.post("/v1/unload_edit")(unload)
    return router


def _edit_of(path: str, id: str) -> Edit:
    try:
        return replace(Edit.load(path), id=id)
    except FileNotFoundError as error:
        raise NoSuchEditError(f"edit_path: there is no file {path!r:.200}") from error
    except (ArtifactError, OSError) as error:
        raise ValueError(f"edit_path: {path!r:.200} is not the file of an edit") from error


def _answer(run: Callable[[], str]) -> Response:
    """What `run` says, or its error in OpenAI's form."""
    try:
        return PlainTextResponse(run())
    except PermissionError as error:
        return error_response(403, str(error), "Forbidden")
    except NoSuchEditError as error:
        return error_response(404, str(error), "NotFoundError")
    except ValueError as error:
        return error_response(400, str(error), "InvalidUserInput")


def error_response(status: int, message: str, kind: str) -> Response:
    """An error as OpenAI's clients read it."""
    told: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": told}, status_code=status)
