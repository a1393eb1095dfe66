"""What must not be written: secrets, known by the name that they go by, by their place in a URL, by their form, or because
the environment or the config has them under such a name. docs/reproduce.md says what is caught and what is not."""

import os
import re
from typing import Any

REDACTED = "<redacted>"
WORDS = (
    r"(?:api|access|private|secret|signing|encryption)_?keys?|auth(?:orization)?|credentials?|passw(?:or)?ds?|pwd|passphrase"
    r"|secrets?|token"
)
CAMEL = r"(?-i:(?<=[a-z])(?=[A-Z]))"  # dbPassword
NAME = re.compile(rf"(?i)(^|[._-]|{CAMEL})({WORDS})$")
ENVIRONMENT = re.compile(rf"(?i)(^|_)({WORDS}|key|pat)$")  # names of variables

# Tokens as those who issue them write them.
FORMS = re.compile(
    r"\b(?:sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|xox[abpors]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)",
    re.DOTALL,
)
USER = re.compile(r"(\w+://)[^/\s]*@")  # user:password@ of a URL
QUERY = re.compile(r"(?i)([?&][\w.-]*(?:token|key|secret|password|signature|sig|auth)=)[^&\s'\"]+")
HEADER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/-]{12,}=*")
ENTRY = re.compile(
    rf"(?i)((?:^|[\s{{,.'\"_-]|{CAMEL})(?:{WORDS})['\"]?\s*[:=]\s*)(?!{REDACTED})(\"[^\"]*\"|'[^']*'|[^\s,}}\"']+)"
)
LITERAL = re.compile(
    r"(?i)(?:api_?key|access_?key|private_?key|passw(?:or)?d|passphrase|secret|auth_?token|access_?token)\w*['\"]?\s*[:=]\s*['\"][^'\"\s<>{}]{6,}['\"]"
)

# Values that the configs of this process have under a secret's name: an exception may quote one.
_known: set[str] = set()


def remember(config: Any, key: str = "") -> None:
    """Let `scrub` know the config's secrets: those of at least 6 characters, as shorter ones are parts of words."""
    if isinstance(config, dict):
        for k, value in config.items():
            remember(value, str(k))
    elif isinstance(config, list):
        for value in config:
            remember(value, key)
    elif isinstance(config, (str, int)) and not isinstance(config, bool):
        text = str(config)
        if NAME.search(key) and len(text) >= 6 and text != REDACTED:
            _known.add(text)
        _known.update(passwords(text))


def passwords(text: str) -> set[str]:
    """Those of at least 6 characters in the URLs of a text."""
    found = re.findall(r"\w+://[^/\s:@]*:([^/\s]*)@", text)
    return {p for p in found if len(p) >= 6}


def known() -> list[str]:
    """Secrets that can be told by themselves, the longest first."""
    found = set(_known)
    for name, value in os.environ.items():
        if ENVIRONMENT.search(name) and len(value) >= 8:
            found.add(value)
        found |= passwords(value)
    return sorted(found, key=len, reverse=True)


def scrub(text: str) -> str:
    """A text without the secrets in it."""
    for secret in known():
        text = text.replace(secret, REDACTED)
    text = USER.sub(r"\1", text)
    text = QUERY.sub(rf"\1{REDACTED}", text)
    text = HEADER.sub(rf"\1 {REDACTED}", text)
    return FORMS.sub(REDACTED, text)


def redact(value: Any, key: str = "") -> Any:
    """The same value with every entry whose key names a secret replaced, and every text scrubbed."""
    if isinstance(value, dict):
        return {scrub(k) if isinstance(k, str) else k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [redact(v, key) for v in value]
    if NAME.search(key) and isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
        return REDACTED
    return scrub(value) if isinstance(value, str) else value


def redact_override(text: str) -> str:
    """`key=value` as typed, also where the value is a mapping with a secret in it."""
    key, eq, value = text.partition("=")
    if not eq:
        return scrub(text)
    shown = redact(ENTRY.sub(rf"\1{REDACTED}", value), key.lstrip("+~"))
    return f"{scrub(key)}={shown}"


def has_secret(text: str) -> bool:
    """Whether a piece of a program or a patch holds what looks like one."""
    return scrub(text) != text or LITERAL.search(text) is not None
