"""Settings, job types and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from forge.comfyui.nodes import lacking
from forge.comfyui.workflows import Workflow
from forge.doctor.facts import Away, Facts, seen
from forge.doctor.findings import Verdicts, failure, ok, warning

LEAST_SECRET = 16
"""Characters of a bootstrap key; less can be tried out."""


def settings(facts: Facts) -> Verdicts:
    for wrong in facts.invalid:
        name = wrong.partition("=")[0]
        yield failure(wrong, f"give {name} another value, or none; `forge settings` tells what it means")
    for name, meant in facts.strange.items():
        said = f"rename it to {meant}" if meant else "unset it"
        yield warning(f"{name} is no setting of forge", f"{said}; `forge settings` lists all there are")
    if not facts.invalid and not facts.strange:
        yield ok("every variable can be used")


def job_types(facts: Facts) -> Verdicts:
    if isinstance(facts.job_types, Away):
        remedy = "mend the files it names (docs/JOB_TYPES.md); forge does not start so"
        yield failure(facts.job_types.why, remedy)
        return
    lacks = list(_lacks(facts, facts.job_types))
    for url, what in sorted({(url, what) for url, _, what in lacks}):
        names = ", ".join(name for at, name, it in lacks if (at, it) == (url, what))
        yield failure(
            f"{names} cannot be drawn at {url}: {what}",
            "put it into that ComfyUI, or name one that it has (FORGE_MODELS, or the job type's own files)",
        )
    if not lacks:
        yield ok(", ".join(facts.job_types))


def _lacks(facts: Facts, workflows: Mapping[str, Workflow]) -> Iterator[tuple[str, str, str]]:
    """Address of a ComfyUI that is there, job type, and what is not there for it."""
    for url, info in facts.nodes.items():
        if isinstance(info, Away):
            continue
        for name, workflow in workflows.items():
            slots = {target for param in workflow.params.values() for target in param.targets}
            yield from ((url, name, what) for what in lacking(workflow.graph, info, slots))


def keys(facts: Facts) -> Verdicts:
    if any(wrong.startswith("FORGE_API_KEYS") for wrong in facts.invalid):
        seen(Away("FORGE_API_KEYS cannot be used", behind="settings"))
    bootstrap = facts.settings.api_keys
    weak = [f"{key.role}:{key.user}" for key in bootstrap if len(key.secret) < LEAST_SECRET]
    if weak:
        yield warning(
            f"bootstrap keys that can be guessed: {', '.join(weak)}",
            f"in FORGE_API_KEYS take secrets of at least {LEAST_SECRET} random characters, or no such keys",
        )
    good = [key for key in seen(facts.keys) if key.revoked_at is None]
    if not bootstrap and not good and facts.dev_url is None:
        yield failure(
            "there is no key, so nobody may use the API", "`forge keys create --role operator --user NAME`"
        )
    elif bootstrap and any(key.role == "operator" for key in good):
        yield warning(
            f"{len(bootstrap)} bootstrap keys are open beside those of the log, and cannot be revoked",
            "unset FORGE_API_KEYS and restart every API",
        )
    elif not weak:
        yield ok(f"{len(good)} in the log, {len(bootstrap)} of FORGE_API_KEYS")
