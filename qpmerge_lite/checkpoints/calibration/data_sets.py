"""Files of data sets at the Hugging Face Hub, of one commit, through the Hub's own client."""

from __future__ import annotations

import re
from pathlib import Path

from ..findings import Refused
from ..hub import endpoint, require_client, trouble

SCHEME = "hf://"
FORM = "hf://datasets/OWNER/NAME@COMMIT/PATH"
ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
COMMIT = re.compile(r"[0-9a-f]{40}")


def fetched(address: str) -> Path:
    """A file of a data set, in the client's cache.

    Args:
        address: ``hf://datasets/OWNER/NAME@COMMIT/PATH``, the commit with all its forty digits.
    Raises: Refused for another address, naming the commit that a branch stands for now; and saying
        why the Hub does not give the file.
    """
    require_client("download the file and give its path")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HTTPError

    match = ADDRESS.fullmatch(address)
    if match is None:
        raise Refused(address, f"{FORM}, a file of a data set", "another address", "write it so")
    repo, revision, path = match.groups()
    try:
        if not COMMIT.fullmatch(revision or ""):
            branch = (revision or "main").replace("%2F", "/")
            commit = HfApi(endpoint()).dataset_info(repo, revision=branch).sha
            given = repr(revision) if revision else "none"
            cure = f"write hf://datasets/{repo}@{commit}/{path}, which is what is there now"
            raise Refused(address, "a commit, which never changes", given, cure)
        local = hf_hub_download(
            repo, path, repo_type="dataset", revision=revision, endpoint=endpoint()
        )
    except (OSError, HTTPError) as error:
        page = f"{endpoint()}/datasets/{repo}"
        told, cure = trouble(error, page, "correct the address")
        raise Refused(address, "a file of the Hub", told, cure) from error
    return Path(local)
