"""Names on the Hugging Face hub, looked up before anything heavy is imported: one small request, or a look into the cache.

In: a name that is no path of this machine. Out: nothing, or the reason why it cannot be loaded, with what was probably meant.
A name that cannot be judged (the hub answers with something else) is left to what loads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from rana_fx.errors import nearest

SECONDS = 5.0  # to wait for an answer
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # "gpt2", "owner/model"


def why_not(name: str, kind: str = "model") -> str:
    """The reason why there is no such ``kind`` ("model", "dataset"); "" where there is one, or nobody can say."""
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        return f"it is neither a path of this machine nor a name on the hub, such as {_EXAMPLES[kind]}"
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
    except GatedRepoError:
        return "access has to be asked for on its page on the hub, then: hf auth login"
    except RepositoryNotFoundError:
        near = _near(name, kind)
        return f"there is no such folder, and the hub has no public {kind} of that name{near}; for a private one: hf auth login"
    except (HfHubHTTPError, HFValidationError):  # a fault of the hub
        return ""
    except Exception:  # offline by HF_HUB_OFFLINE, or without a network: the classes are those of the HTTP client
        if name in cached(kind):
            return ""
        return f"there is no such folder, the hub cannot be reached, and the cache has no copy of it{_near(name, kind)}"
    return ""


def cached(kind: str) -> list[str]:
    """Names of models or data sets in the hub's cache on this machine."""
    from huggingface_hub import constants

    prefix = f"{kind}s--"
    try:
        found = sorted(path.name for path in Path(constants.HF_HUB_CACHE).iterdir() if path.name.startswith(prefix))
    except OSError:
        return []
    return [name.removeprefix(prefix).replace("--", "/") for name in found]


_EXAMPLES = {"model": "HuggingFaceTB/SmolLM2-135M", "dataset": "Salesforce/wikitext:wikitext-2-raw-v1"}


def _near(name: str, kind: str) -> str:
    """ " (did you mean NAME?)": one of the cache, or a folder beside the one that was meant as a path."""
    parent = Path(name).parent
    names: Iterable[str] = cached(kind)
    if parent.is_dir():
        names = [*names, *(str(parent / path.name) for path in parent.iterdir() if path.is_dir() or kind == "dataset")]
    near = nearest(name, names)
    return f" (did you mean {near}?)" if near else ""
