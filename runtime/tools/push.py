"""Pushes a bundle to the Hugging Face Hub, in one commit, with a model card. Engines never leave the machine."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from unipinrec.errors import BundleError
from unipinrec.runtime.bundle.bundle import USER_IDS, USERS, Bundle
from unipinrec.runtime.bundle.derived import seal_derived
from unipinrec.runtime.bundle.hub import COMMIT, HubReference, hub_client, is_engine
from unipinrec.runtime.bundle.integrity import MANIFEST, MANIFEST_HASH, seal, written_whole
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.bundle.quality import named
from unipinrec.runtime.kv.pages import KV_DTYPES
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.sample import chosen_cache

CARD, KEPT = "README.md", ".gitattributes"
LIMITS = (
    "figures on logged data do not tell how users will react",
    "the hash proves that the bundle is whole, not who made it",
)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


class Pushed(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a push.

    Attributes:
        bundle: Hash of the pushed bundle; it differs from that of the folder if files were left out.
        commit: The commit that holds it.
        load: What `Recommender.load` takes to load exactly this commit.
        left_out: Files of the folder's bundle that were not pushed.
    """

    bundle: str
    commit: str
    load: str
    left_out: tuple[str, ...]


def push_bundle(bundle: Path | str, target: str, *, license_id: str = "unknown", with_users: bool = False) -> Pushed:
    """Push a bundle and its model card as one commit of an existing repository; other files are deleted there.

    Args:
        bundle: Its folder. It is loaded first, with its golden requests.
        target: `hf://org/name`, or `hf://org/name@branch`.
        license_id: An identifier of the Hub, such as "apache-2.0".
        with_users: Push the sample users too, who are personal data.

    Raises:
        BundleError: The bundle does not load, `target` or `license_id` is invalid, or the Hub refuses the commit.
        ExportError: There is no room for a copy of the bundle in the temporary folder.
    """
    reference = HubReference.parse(target)
    if COMMIT.fullmatch(reference.revision):
        raise BundleError(f"{reference} is a commit, which never changes; push to a branch")
    if LICENSE.fullmatch(license_id) is None:
        raise BundleError(f"the license {license_id[:80]!r} is no identifier such as apache-2.0, other or unknown")
    parent = Bundle.open(bundle)
    private = () if with_users else (USERS, USER_IDS)
    left_out = tuple(name for name in parent.manifest.files if name in private or is_engine(name))
    with tempfile.TemporaryDirectory(prefix="unipinrec-") as scratch:
        folder = Path(scratch) / "bundle"
        with written_whole(folder) as partial:
            _write(partial, parent, left_out)
        with Recommender.load(folder, "cpu") as recommender:
            pushed = recommender.bundle
        card = model_card(pushed, reference.repo, license_id)
        with hub_client(reference) as client:
            api, add = client.HfApi(), client.CommitOperationAdd
            head = api.model_info(reference.repo, revision=reference.revision)
            names = (MANIFEST, MANIFEST_HASH, *pushed.manifest.files)
            stale = {file.rfilename for file in head.siblings} - {*names, CARD, KEPT}
            done = api.create_commit(
                reference.repo,
                [add(CARD, card.encode()), *(add(name, str(folder / name)) for name in names)]
                + [client.CommitOperationDelete(name, is_folder=False) for name in sorted(stale)],
                commit_message=f"unipinrec bundle {pushed.hash}",
                revision=reference.revision,
                parent_commit=head.sha,
            )
    return Pushed(bundle=pushed.hash, commit=done.oid, load=f"hf://{reference.repo}@{done.oid}", left_out=left_out)


def _write(folder: Path, parent: Bundle, left_out: tuple[str, ...]) -> None:
    """Copy the bundle; without some of its files it is a bundle of its own."""
    if not left_out:
        for name in (MANIFEST, MANIFEST_HASH):
            shutil.copyfile(parent.path / name, folder / name)
        for name in parent.manifest.files:
            shutil.copyfile(parent.files[name], folder / name)
        return
    sample = None if USERS in left_out else parent.manifest.sample
    manifest = seal_derived(folder, parent, dropped=left_out, engines=(), sample=sample)
    if manifest.cache and USERS in left_out:  # `verify` measures it with random histories from now on
        with Recommender.load(folder, "cpu") as recommender:
            measured = chosen_cache(recommender) or manifest.cache
        finest = min(manifest.cache, measured, key=lambda cache: KV_DTYPES.index(cache.dtype))
        seal(folder, msgspec.structs.replace(manifest, cache=finest))


def model_card(bundle: Bundle, repo: str, license_id: str) -> str:
    """The README.md of a bundle's repository, from its manifest."""
    manifest, items = bundle.manifest, bundle.catalogue.num_live
    names = {"actions": manifest.actions, "positive": manifest.positive_actions, "surfaces": manifest.surfaces}
    data = [f"{what}: {', '.join(f'`{name}`' for name in listed)}" for what, listed in names.items()]
    warnings = manifest.evaluation.warnings if manifest.evaluation else ()
    return f"""---
license: {license_id}
library_name: unipinrec
tags: [unipinrec, recommendation, onnx]
---
# {repo}
A recommender that retrieves and ranks with one transformer: a unipinrec bundle of {manifest.created},
{"with" if USERS in manifest.files else "without"} sample users. Its hash is `{bundle.hash}`.

## Load it
```python
from unipinrec.runtime import Recommender  # pip install 'unipinrec[cpu,hub]'
recommender = Recommender.load("hf://{repo}")  # pin it: hf://{repo}@COMMIT
print(recommender.recommend([{{"item": {bundle.item_ids[-1]!r}}}], k=10))
```
## Metrics
{_lines(_metrics(manifest)) or "None were measured."}
## Data
{_lines([f"items: {items}", *data, f"fingerprint: `{manifest.data_fingerprint}`"])}
## Limits
{_lines([f"only these items, and {manifest.model.max_history} events of a history", *LIMITS, *warnings])}
## License
{license_id}
"""


def _metrics(manifest: Manifest) -> Iterator[str]:
    evaluation = manifest.evaluation
    for name, quality in evaluation.lists.items() if evaluation else ():
        figures = {"HR@10": quality.hit_rate, "NDCG@10": quality.ndcg, "value": quality.value}
        measured = (f"{label} {one.mean:.4f} ± {one.error:.4f}" for label, one in figures.items() if one)
        yield f"{named(name)}: {', '.join(measured)}"
    for name, value in (manifest.metrics or {}).items():
        yield f"checkpoint: {name} {value}"


def _lines(texts: Iterable[str]) -> str:
    return "\n".join(f"- {' '.join(text.split())}" for text in texts)
