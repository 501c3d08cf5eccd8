"""The environment of reward workers: an allow list, without secrets.

A scorer reads text of the policy, and a mistake in it must not cost the user's keys. A recipe can pass further
variables by name (`scoring.environment`).
"""

import fnmatch
import os
from collections.abc import Mapping, Sequence

from rekatrain.data.errors import InputError

# Python, the search for programs and libraries, language, time zone, temporary files, threads, caches and proxies.
ALLOWED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TMPDIR", "TEMP", "TMP"),
    *("PYTHON*", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD", "LOCPATH", "NIX_LD*"),
    *("OMP_*", "MKL_*", "OPENBLAS_*", "NUMEXPR_*", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES"),
    *("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_*OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("NLTK_DATA", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "NO_PROXY", "no_proxy"),
)
# Names that a rule above never allows. A recipe can still pass one by its full name.
SECRET = (
    *("*TOKEN", "*_TOKEN_*", "*API_KEY*", "*_KEY", "*SECRET*", "*PASSWORD*", "*PASSWD*", "*CREDENTIAL*"),
    *("AWS_*", "WANDB_*"),
)


def allowed_names(names: Sequence[str]) -> list[str]:
    """Return the names of variables that every worker has."""
    return [name for name in names if _matches(name, ALLOWED) and not _matches(name.upper(), SECRET)]


def read_passed(names: Sequence[str]) -> dict[str, str]:
    """Return the values of the variables that a recipe passes; raise InputError for one that is not set."""
    for name in names:
        if name not in os.environ:
            raise InputError(f"scoring.environment names {name}, which is not set: export it, or remove it")
    return {name: os.environ[name] for name in names}


def set_environment(values: Mapping[str, str | None]) -> None:
    """Set variables of this process; None removes one."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
