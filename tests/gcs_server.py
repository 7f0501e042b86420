"""A Google Cloud Storage service on this machine, with what galray relies on and the emulator leaves out."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

import pytest

__all__ = ["gcs_server"]


@contextlib.contextmanager
def gcs_server() -> Iterator[dict[str, str]]:
    """The emulator with a bucket ``galray``; yields the variables by which Google's clients find it.

    As at Google, an upload with ``ifGenerationMatch=0`` is refused where there is an object already, and what
    is read has its version and the time of its last change in its header.
    """
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read when gcsfs is imported
    pytest.importorskip("gcsfs", reason="pip install gcsfs")
    pytest.importorskip("gcp_storage_emulator", reason="pip install gcp-storage-emulator")
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import Response, create_server

    upload, close = objects._multipart_upload, Response.close

    def upload_once(request: Any, response: Any, storage: Any) -> None:
        with contextlib.suppress(NotFound):
            if request.query.get("ifGenerationMatch") == ["0"]:
                storage.get_file_obj(request.params["bucket_name"], request.data["meta"]["name"])
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        upload(request, response, storage)

    def close_dated(response: Any) -> None:
        response["Last-Modified"] = formatdate(usegmt=True)
        response["ETag"] = '"1"'
        close(response)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "_multipart_upload", upload_once)
        patch.setattr(Response, "close", close_dated)
        server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="galray")
        server.start()
        address = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
        account = {"gcs_base_url": address, "disable_oauth": True}
        account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        try:
            yield {
                "STORAGE_EMULATOR_HOST": address,
                "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account),
                "NO_GCE_CHECK": "true",  # clients look for a machine's own account first; there is none
            }
        finally:
            server.stop()
            if "gcsfs" in sys.modules:
                sys.modules["gcsfs"].GCSFileSystem.clear_instance_cache()
