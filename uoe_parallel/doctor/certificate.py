"""What a machine has certified: a whole run of the tests on a device that passed, and of what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from uoe_parallel.doctor.versions import CHECKOUT, fingerprint

FOLDER = CHECKOUT / "runs" / "certified"
CERTIFIED = ("uoe_parallel", "tests", "tools", "launch", "configs", "pyproject.toml")
"""What of a checkout a certificate is about, with its pins."""
PINS = "requirements*.txt"


@dataclass(frozen=True)
class Area:
    """The tests of a folder, or of a file that is in none."""

    passed: int
    skipped: Mapping[str, int]
    """How many, by reason."""


@dataclass(frozen=True)
class Certificate:
    """That all tests passed, or were skipped for a reason."""

    device: str
    """ "cpu" or "cuda" """
    hardware: str
    when: str
    """Date and time of the end, ISO 8601 with the zone."""
    with_slow: bool
    """Whether the tests marked slow ran too."""
    versions: Mapping[str, str]
    code: str
    """Fingerprint of what was tested."""
    areas: Mapping[str, Area]

    @property
    def passed(self) -> int:
        return sum(area.passed for area in self.areas.values())

    @property
    def skipped(self) -> int:
        return sum(sum(area.skipped.values()) for area in self.areas.values())

    def outdated_by(self, versions: Mapping[str, str], code: str) -> list[str]:
        """What has changed since, for people; empty while it holds."""
        changes = ["the code"] if code != self.code else []
        for name in sorted(versions.keys() | self.versions.keys()):
            before, now = self.versions.get(name, "-"), versions.get(name, "-")
            if before != now:
                changes.append(f"{name} {before} -> {now}")
        return changes


def certified_code(checkout: Path = CHECKOUT) -> str:
    """Fingerprint of everything that a certificate is about."""
    places = [checkout / name for name in CERTIFIED] + sorted(checkout.glob(PINS))
    return fingerprint(place for place in places if place.exists())


def save_certificate(certificate: Certificate, folder: Path = FOLDER) -> Path:
    """Replaces the device's earlier one; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{certificate.device}.json"
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(certificate), indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def read_certificates(folder: Path = FOLDER) -> Iterator[Certificate]:
    """Of all devices; a file that is not one is left out."""
    for path in sorted(folder.glob("*.json")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            areas = {name: Area(**area) for name, area in fields.pop("areas").items()}
            yield Certificate(**fields, areas=areas)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
