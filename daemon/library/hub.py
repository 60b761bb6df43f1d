"""Models of the Hugging Face hub: which files of a repository make a checkpoint, and fetching them.

Knows what repositories hold (quantisations side by side, shards, other frameworks' files). `huggingface_hub` knows
the hub's addresses, tokens and listings, and heeds HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE; `download` moves the
bytes.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from shoal.daemon.errors import DaemonError
from shoal.daemon.progress import Progress
from shoal.models.errors import one_line

from .download import RemoteFile, download
from .library import Kind
from .transfer import check_space

LIST_TIMEOUT_S = 30.0
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.(gguf|safetensors)$)", re.IGNORECASE)
TEMPLATES = "additional_chat_templates/*.jinja"  # in the store they lie beside the other files
_WITH_WEIGHTS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class HubModel:
    """The files of a model, at one commit."""

    repo: str
    commit: str
    kind: Kind
    files: tuple[RemoteFile, ...]

    @property
    def source(self) -> str:
        """What tells these files apart from others of the repository, and from those of any other commit."""
        file = f":{self.files[0].name}" if self.kind == "gguf" else ""
        return f"hf:{self.repo}@{self.commit[:12]}{file}"

    @classmethod
    def find(cls, repo: str, wanted: str) -> HubModel:
        """Ask the hub. wanted: a file or quantisation, "" when there is only one. Raises DaemonError."""
        from huggingface_hub import HfApi, get_token, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        endpoint = os.environ.get("HF_ENDPOINT") or None
        try:
            info = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True, timeout=LIST_TIMEOUT_S)
        except OfflineModeIsEnabled as error:
            raise DaemonError("internal", f"cannot ask for {repo}: HF_HUB_OFFLINE is set") from error
        except HfHubHTTPError as error:
            raise _refused(repo, error) from error
        except (HFValidationError, ValueError) as error:
            raise DaemonError("bad_request", f"{repo}: {one_line(error)}") from error
        except Exception as error:  # the HTTP library's errors, which are others in each of its versions
            raise DaemonError(
                "internal",
                f"cannot reach {endpoint or 'the Hugging Face hub'} for {repo}: {one_line(error)}",
                "check the network (HF_ENDPOINT names another server, HTTPS_PROXY a proxy)",
            ) from error
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        kind, chosen = choose(repo, sorted(siblings), wanted)
        commit = info.sha or "main"
        token = get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        files = []
        for name in chosen:
            lfs = siblings[name].lfs
            url = hf_hub_url(repo, name, revision=commit, endpoint=endpoint)
            files.append(RemoteFile(url, name, siblings[name].size or 0, lfs.sha256 if lfs else "", headers))
        return cls(repo, commit, kind, tuple(files))


def choose(repo: str, files: list[str], wanted: str) -> tuple[Kind, list[str]]:
    """The files of the checkpoint `wanted` in a repository. Raises DaemonError, which lists the choices."""
    top = [file for file in files if "/" not in file]
    groups = gguf_groups(files)
    if not wanted and "config.json" in top and any(file.endswith(".safetensors") for file in top):
        return "hf", checkpoint_files(top) + [file for file in files if fnmatchcase(file, TEMPLATES)]
    matches = [group for group in groups if _matches(group[0], wanted)]
    if len(matches) == 1:
        return "gguf", matches[0]
    if not groups:
        raise DaemonError(
            "unsupported",
            f"{repo} has neither GGUF files nor safetensors with a config.json",
            "Shoal reads those two; pickles (.bin, .pt) are never loaded",
        )
    choices = ", ".join(_SHARD.sub("", PurePosixPath(group[0]).name) for group in matches or groups)
    problem = f"nothing in {repo} matches {wanted!r}" if not matches else f"{repo} has {len(matches)} models"
    raise DaemonError("bad_request", problem, f"choose one with {repo}:FILE or :QUANT from {choices}")


def gguf_groups(files: list[str]) -> list[list[str]]:
    """The GGUF files, grouped by model: one with shards has several. Image projectors are left out."""
    groups: dict[str, list[str]] = {}
    for file in files:
        if file.lower().endswith(".gguf") and "mmproj" not in file.lower():
            groups.setdefault(_SHARD.sub("", file), []).append(file)
    return [sorted(group) for group in groups.values()]


def checkpoint_files(top: list[str]) -> list[str]:
    """Those of a directory's file names that make a checkpoint: weights (once), configuration, tokenizer, template."""
    weights = [file for file in top if file.endswith(".safetensors") and not file.startswith("consolidated")]
    if "model.safetensors" in weights:
        weights = ["model.safetensors"]
    elif shards := [file for file in weights if file.startswith("model-") and _SHARD.search(file)]:
        weights = shards
    return weights + [file for file in top if any(fnmatchcase(file, pattern) for pattern in _WITH_WEIGHTS)]


def fetch_hub(model: HubModel, directory: Path, progress: Progress) -> dict[str, str]:
    """Fetch the files into `directory`. Returns name → sha256. Raises DaemonError."""
    total = sum(file.size for file in model.files)
    here = sum(path.stat().st_size for path in directory.iterdir())
    check_space(directory, total - here, model.repo)
    sha256: dict[str, str] = {}
    before = 0
    for number, file in enumerate(model.files, 1):
        local = PurePosixPath(file.name).name
        note = f"{local} ({number}/{len(model.files)})" if len(model.files) > 1 else local

        def moved(what: str, done: int, size: int, before: int = before, note: str = note) -> None:
            progress(note, before + done, total or size)

        sha256[local] = download(file, directory / local, moved)
        before += file.size or (directory / local).stat().st_size
    return sha256


def _matches(file: str, wanted: str) -> bool:
    """Whether `wanted` is this file's name or path, or the quantisation its name ends with."""
    if not wanted:
        return True
    name = PurePosixPath(file).name.lower()
    stem, wanted = _SHARD.sub("", name).removesuffix(".gguf"), wanted.lower()
    return wanted in (file.lower(), name, stem) or re.search(f"[-._]{re.escape(wanted)}$", stem) is not None


def _refused(repo: str, error: OSError) -> DaemonError:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in (401, 403, 404):
        return DaemonError(
            "not_found",
            f"the Hugging Face hub shows no model {repo} ({status})",
            "check the spelling; for private and gated models set HF_TOKEN",
        )
    return DaemonError(
        "internal", f"the Hugging Face hub failed for {repo}: {one_line(error)}", "try again later"
    )
