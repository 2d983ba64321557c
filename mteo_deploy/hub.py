"""The Hugging Face Hub: backbones by their repository's name, bundles pushed and pulled.

All of it is huggingface_hub's: its cache, its token (``HF_TOKEN`` or ``hf auth login``), its offline mode
(``HF_HUB_OFFLINE=1``). A backbone is fetched as JSON, safetensors and tokenizer files only; a pulled bundle counts as one when
every hash of its manifest is right.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mteo_deploy import assets
from mteo_deploy.bundle import MANIFEST, Bundle, whole_directory
from mteo_deploy.directories import CARDS
from mteo_deploy.errors import InputError, MissingPackageError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
BACKBONE_FILES = ("*.json", "*.safetensors", "README.md", "LICENSE*", "tokenizer*/*")
"""Of a diffusers repository; no pickled weights."""
NOT_FETCHED = ("*.py", "*.fp16.safetensors", "*.bf16.safetensors", "*non_ema*", "flax_*", "*.onnx*", "openvino_*")
"""Code is never run, and other weights are not read."""
LICENSE = re.compile(r"^license:[ \t]*['\"]?([\w.+-]+)", re.MULTILINE)


def is_repository(name: Path | str) -> bool:
    """Whether ``name`` reads as ``org/name``, optionally ``org/name@revision``, and nothing of the kind lies on the disk."""
    return REPOSITORY.fullmatch(str(name).partition("@")[0]) is not None and not Path(name).exists()


def model_directory(model: Path | str) -> Path:
    """The directory of a backbone: ``model`` itself, a packaged one's by its name, or the Hub's ``org/name`` or
    ``org/name@revision`` in the local cache.

    Raises:
        InputError: when there is no such repository, or it is not in the cache and the Hub cannot be reached.
        MissingPackageError: when huggingface_hub is not installed.
    """
    if not is_repository(model):
        return Path(model) if Path(model).exists() else assets.backbones().get(str(model), Path(model))
    hub, (name, _, revision) = _package(), str(model).partition("@")
    with _explained(f"backbone {name}, which is no directory here,"):
        found = hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(BACKBONE_FILES), ignore_patterns=list(NOT_FETCHED)
        )
    return Path(found)


def license_of(model: Path) -> str | None:
    """What the card (``README.md``) of a pipeline directory says of its licence, e.g. ``apache-2.0``."""
    card = model / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = LICENSE.search(text.split("---")[1]) if text.startswith("---") else None
    return found[1] if found else None


def push(bundle: Path | str, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a bundle, without its built engines, as one model repository with a card.

    Files of an older bundle there are deleted.

    Args:
        repository: ``org/name``; made if there is none.
        private: make it private, if it is made.
        revision: branch; None for the default one.

    Returns:
        The repository's address.

    Raises:
        BundleError: for a bundle that is not whole.
        InputError: when the Hub refuses, or cannot be reached.
        MissingPackageError: when huggingface_hub is not installed.
    """
    if REPOSITORY.fullmatch(repository) is None:
        raise InputError(f"expected a repository as org/name; found {repository!r}")
    opened, hub = Bundle.open(bundle), _package()
    api = hub.HfApi(library_name="mteo-deploy")
    with _explained(f"repository {repository}"), tempfile.TemporaryDirectory() as staged:
        for name in [*opened.manifest["files"], MANIFEST]:
            link = Path(staged) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(opened.file(name).resolve())
        (Path(staged) / "README.md").write_text(card(opened, repository), encoding="utf-8")
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=staged,
            revision=revision,
            commit_message=f"{len(opened.plan.evaluations)} evaluations, {opened.plan.solver}",
            delete_patterns=["graphs/*", "reference/*", "tokenizers/*"],
        )
    return str(made)


def pull(repository: str, output: Path | str, *, revision: str | None = None) -> Bundle:
    """Download a bundle and check every hash; ``output`` is written whole or not at all.

    Raises:
        BundleError: when what lies there is no bundle, or not whole.
        InputError: for a repository that is not there, or a Hub that cannot be reached.
        MissingPackageError: when huggingface_hub is not installed.
    """
    if REPOSITORY.fullmatch(repository) is None:
        raise InputError(f"expected a repository as org/name; found {repository!r}")
    hub = _package()
    with whole_directory(Path(output), replace=MANIFEST) as directory:
        with _explained(f"bundle {repository}"):
            hub.snapshot_download(
                repository, revision=revision, local_dir=directory, ignore_patterns=[".gitattributes", "engines/*"]
            )
        shutil.rmtree(directory / ".cache", ignore_errors=True)
        listed = {MANIFEST, *CARDS, *Bundle.open(directory).manifest["files"]}
        for path in directory.rglob("*"):
            if path.is_file() and path.relative_to(directory).as_posix() not in listed:
                path.unlink()  # what else the repository holds is no part of the bundle, and would keep it from being replaced
    return Bundle.open(output)


def card(bundle: Bundle, repository: str) -> str:
    """A model card: what the bundle is, of what backbone and licence, and how to use it."""
    manifest, plan = bundle.manifest, bundle.plan
    backbone, embeddings = manifest["backbone"], manifest["embeddings"]
    base = str(backbone["source"]).partition("@")[0]
    head = ["library_name: mteo-deploy", "tags: [diffusion, onnx, mteo]"]
    head += [f"license: {backbone['license']}"] if backbone.get("license") else []
    head += [f"base_model: {base}"] if REPOSITORY.fullmatch(base) else []
    trained = f"{embeddings['parameters']:,} numbers learned" if embeddings["training"] else "nothing learned: the plain solver"
    facts = {
        "backbone": f"{backbone['family']} ({backbone['source']}), {backbone['parameters']:,} parameters",
        "evaluations": f"{len(plan.evaluations)} ({plan.summary(bundle.plain_plan)})",
        "embeddings": f"{trained}, at {len(embeddings['sites'])} sites",
        "samples": "x".join(map(str, bundle.sample_shape)),
        "request inputs": ", ".join(request.name for request in bundle.requests) or "none",
        "realisations": ", ".join(bundle.realisations),
        "made by": f"mteo-deploy {manifest['versions']['mteo-deploy']}",
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    use = [
        f"mteo-deploy pull {repository} -o bundle",
        "mteo-deploy build bundle",
        "mteo-deploy sample bundle --num 4 -o grid.png",
    ]
    lines = ["---", *head, "---", "", f"# {repository.partition('/')[2]}", ""]
    lines += ["A few-step sampler in ONNX: a bundle of mteo-deploy.", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join([*lines, *(f"    {line}" for line in use), ""])


def _package() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise MissingPackageError("the Hub needs huggingface_hub; run: pip install huggingface_hub") from None
    return huggingface_hub


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn huggingface_hub's errors into one that says what to do.

    Raises:
        InputError: for each of them.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError:
        raise InputError(
            f"expected a revision (branch, tag or commit) of {what}; the Hub has no such one; look at its page"
        ) from None
    except errors.GatedRepoError:
        raise InputError(f"{what} is gated; ask for access on its page, then run: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"expected {what} on the Hub; found none; for a private one run: hf auth login") from None
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise InputError(
            f"the Hub refused {what}: {_first_line(error)}; check the name and the token (hf auth login)"
        ) from None
    except Exception as error:
        if not isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError)) and not _of_http(error):
            raise
        raise InputError(
            f"the Hub cannot be reached and {what} is not in the local cache ({_first_line(error)}); go online, or give a path"
        ) from None


def _of_http(error: Exception) -> bool:
    """Whether it is the HTTP library's own error: which library depends on huggingface_hub's version."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
