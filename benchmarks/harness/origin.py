"""Where a published run comes from, in sentences: machine, commit, versions, and its limits."""

from __future__ import annotations

from collections import Counter

from harness.providers import PROVIDERS, is_ours
from harness.report import BUSY
from harness.results import WILD, Run, short_commit
from harness.sets import SETS

_COPIED = (
    "OpenVINO copied its outputs at every call, up to about a tenth of its time where they are "
    "large; it no longer does."
)
NOT_UNROLLED = (
    "jax's scan was not unrolled, which takes two to three times as long as by 16 steps, its "
    "setting now."
)
_EXPERIMENT = (
    "The CUDA kernels measured here are not those of this tree: 1733a3b is an experiment that "
    "sends h between the CTAs of a cluster by copies, taken back by the commit behind it."
)
_POOLED = (
    "Its rows are of several processes, of which the file describes the first only, that of "
    "gpu-headline."
)
_OLDER_KERNELS = (
    "Messages, products and some tiles of the CUDA kernels have changed since; no GPU has run "
    "what they are now."
)
# What is known of measurements by now, by the commit they were made with: a set that is measured
# again leaves it behind, and an entry without a published set is to be deleted (a test asks).
CAVEATS = {
    "6f822e5e839b766ca1a9e2ca8fe8f2647c67a49a": (_COPIED,),
    "d7b3b5582be56d6ffc89d8832528aefbcf752e9d": (_COPIED, NOT_UNROLLED),
    "2df24922e3c8949992fb634dfb14097d99bbd3dd": (_COPIED, NOT_UNROLLED),
    "7274041583abbabc1622566e1c21af4912985117": (_COPIED, NOT_UNROLLED),
    "1733a3b2f52eb6cddde6da6ade69e5e438aa8810": (_POOLED, _EXPERIMENT, _OLDER_KERNELS),
    "338e8e579e0b72fc34d6bdaa5871e91d694e8f52": (_OLDER_KERNELS,),
}


def commits(run: Run) -> list[str]:
    """Of the run itself and of the sets that another one measured."""
    others = (facts["commit"] for facts in run.meta.get("others", {}).values())
    return list(dict.fromkeys((run.meta["commit"], *others)))


def caveats(run: Run) -> list[str]:
    return list(dict.fromkeys(text for c in commits(run) for text in CAVEATS.get(c, ())))


def place(run: Run) -> str:
    """When, where and with which commit it ran."""
    meta, machine = run.meta, run.meta["machine"]
    cpu = f"{machine['cpu']}, {machine['fused_rnn_capability']} kernels, {meta['threads']} threads"
    where = machine.get("gpu") or cpu
    return f"{meta['date'][:10]}, {where}, commit {short_commit(meta['commit'])}"


def setting(run: Run) -> str:
    """When, where, with what, how well; and what else there is to know."""
    machine = run.meta["machine"]
    timed = [row for row in run.rows if row.ms]
    wild = sum(row.wild for row in timed)
    busy = f", load average {machine['load']:.1f} before the run" if machine["load"] > BUSY else ""
    fewest: dict[str, int] = {}
    for row in timed:
        fewest[row.set] = min(row.samples, fewest.get(row.set, row.samples))
    sentences = [
        f"{place(run)}{busy}; {len(timed)} medians, {wild} of them with a spread above {WILD:.0%}; "
        f"{_versions(run)}.",
        f"Fewest samples of a median: {', '.join(f'{n} {count}' for n, count in fewest.items())}.",
        reached(run),
        _left_out(run),
        *(f"Corrected since: {text}." for text in run.meta.get("corrections", ())),
        f"Measured by {1 + len(more)} processes." if (more := run.meta.get("processes")) else "",
        *caveats(run),
    ]
    return " ".join(filter(None, sentences))


def reached(run: Run) -> str:
    """Which part of all sets for its kind of device was measured; nothing where all was."""
    device = "cuda" if run.on_gpu else "cpu"
    known = {name: len(s.groups) for name, s in SETS.items() if s.device == device}
    found = Counter(group[0].set for group in run.groups() if group[0].set in known)
    if all(found[name] >= count for name, count in known.items()):
        return ""
    parts = [f"{found[n]} of {count} of {n}" for n, count in known.items() if 0 < found[n] < count]
    none = sum(not found[name] for name in known)
    parts += [f"nothing of {none} other sets"] if none else []
    return (
        f"Measured were {found.total()} of the {sum(known.values())} groups of cases that the sets "
        f"have now: {'; '.join(parts)}."
    )


def _versions(run: Run) -> str:
    """Of what took part, not of all that was installed."""
    shown = {"python", "torch", "fused_rnn"}
    for name in {row.provider for row in run.rows if row.ms}:
        requires = PROVIDERS[name].requires if name in PROVIDERS else ()
        shown |= {module.split(".")[0] for module in requires}
        shown |= {"triton"} if name == "fused_rnn/triton" else set()
    return ", ".join(
        f"{n} {v}" for n, v in sorted(run.meta["versions"].items()) if v and n in shown
    )


def _left_out(run: Run) -> str:
    absent = run.meta.get("absent", {})
    named = [f"{name} ({reason.partition(' (')[0]})" for name, reason in absent.items()]
    return f"Left out: {', '.join(named)}." if named else ""


def measured_by_itself(run: Run, name: str) -> str:
    """Of a set that another run has measured than the one its file begins with."""
    facts = run.meta.get("others", {}).get(name)
    if facts is None:
        return ""
    return (
        f"Measured by itself on {facts['date'][:10]}, {facts['threads']} threads, commit "
        f"{short_commit(facts['commit'])}, load average {facts['load']:.1f} before."
    )


def rivals(run: Run, names: tuple[str, ...]) -> str:
    """Who took part beside ours and torch.nn in these sets, by mode, and by dtype on a GPU."""
    found: dict[str, set[str]] = {}
    for row in run.rows:
        if row.set in names and row.ms:
            kind = f"{row.case.mode} in {row.case.dtype}" if run.on_gpu else row.case.mode
            others = {row.provider} - {"torch.nn"} if not is_ours(row.provider) else set()
            found.setdefault(kind, set()).update(others)
    by_names: dict[str, list[str]] = {}
    for kind, others in found.items():
        by_names.setdefault(" and ".join(sorted(others)) or "nobody", []).append(kind)
    parts = [f"{who} in {', '.join(kinds)}" for who, kinds in by_names.items()]
    theirs = "torch.nn, which is cuDNN here" if run.on_gpu else "torch.nn"
    return f"All others beside {theirs}: {'; '.join(parts)}."
