"""A certificate given to the kernel: ``coqc`` under limits, in a folder of its own; what it assumes is held against a list."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from controllability.errors import BadInput
from controllability.prover.derivation import Derivation
from controllability.rocq.certificate import certificate
from controllability.rocq.names import theory
from controllability.rocq.vocabulary import check_vocabulary

try:
    import resource
except ImportError:  # not on Unix
    resource = None

SECONDS, MEMORY, TO_COMPILE = 120, 4 << 30, 600
THEORY = ("theory.v", "rationals.v")
# those of the standard library's real numbers, and that functions with equal values are equal
AXIOMS = frozenset({
    "FunctionalExtensionality.functional_extensionality_dep", "ClassicalDedekindReals.sig_forall_dec",
    "ClassicalDedekindReals.sig_not_dec",
})  # fmt: skip
MISSING = "coqc is not installed: the Debian package coq has it (apt install coq), or opam install coq"
CLOSED = "Closed under the global context"


class NoKernel(Exception):
    """There is no coqc, or it cannot be used here; the message says what to do."""


@dataclass(frozen=True)
class Verdict:
    """What the kernel said of a certificate."""

    accepted: bool
    kernel: str
    seconds: float
    axioms: tuple[str, ...] = ()
    reason: str = ""

    def told(self) -> str:
        """In a line."""
        if not self.accepted:
            return f"refused by {self.kernel}: {self.reason}"
        assumed = ", ".join(a.rpartition(".")[2] for a in self.axioms) or "nothing"
        return f"accepted by the kernel of {self.kernel} in {self.seconds:.1f} s; it assumes {assumed}"


def machine(proof: Derivation) -> list[dict[str, str]]:
    """The row of level "machine": [{rule, status: passed | failed | skipped, method}], skipped where there is no kernel or no lemma."""
    try:
        verdict = kernel_verdict(certificate(proof))
    except (NoKernel, BadInput) as reason:
        return [{"rule": "certificate", "status": "skipped", "method": str(reason)}]
    return [{"rule": "certificate", "status": "passed" if verdict.accepted else "failed", "method": verdict.told()}]


def kernel_verdict(text: str) -> Verdict:
    """What the kernel says of a certificate from anywhere.

    Raises ``BadInput`` for a text that is no certificate, before Coq sees it, and ``NoKernel`` where none can be asked.
    """
    check_vocabulary(text)
    return ask(text)


def ask(text: str) -> Verdict:
    """What the kernel says of a text that was written here; an acceptance is remembered by the hash of theory, kernel and text."""
    kernel, compiled = _theory()
    known = compiled / f"{_hash(text)}.json"
    try:
        found = json.loads(known.read_text("utf-8"))
        return Verdict(**{**found, "axioms": tuple(found["axioms"])})
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not asked before, or what was remembered is damaged
    with tempfile.TemporaryDirectory(prefix="certificate-") as folder:
        Path(folder, "certificate.v").write_text(text, "utf-8")
        started = time.perf_counter()
        done = _coqc(["-R", str(compiled), "Controllability", "certificate.v"], folder, SECONDS)
        verdict = _verdict(done, kernel, time.perf_counter() - started)
    if verdict.accepted:
        _write(known, json.dumps(asdict(verdict)).encode())
    return verdict


def _verdict(done: "subprocess.CompletedProcess[str] | None", kernel: str, seconds: float) -> Verdict:
    if done is None:
        return Verdict(False, kernel, seconds, reason=f"it took more than {SECONDS} s")
    if done.returncode:
        told = re.sub(r"\s+", " ", done.stderr.partition("Error:")[2] or done.stderr).strip()
        return Verdict(False, kernel, seconds, reason=told[:300] or f"coqc ended with status {done.returncode}")
    listed = done.stdout.partition("Axioms:")[2]
    axioms = tuple(re.findall(r"^(\S+)(?:\s|$)", listed, re.MULTILINE))
    if not axioms and CLOSED not in done.stdout:
        return Verdict(False, kernel, seconds, reason="coqc did not say what the theorem assumes")
    if more := sorted(set(axioms) - AXIOMS):
        return Verdict(False, kernel, seconds, axioms, f"it assumes {', '.join(more)}")
    return Verdict(True, kernel, seconds, axioms)


def _theory() -> tuple[str, Path]:
    """(the kernel's name, the folder with the compiled theory); compiled once for each theory and kernel."""
    program = shutil.which("coqc")
    if program is None:
        raise NoKernel(MISSING)
    asked = _coqc(["--print-version"], tempfile.gettempdir(), 60)
    version = asked.stdout.split()[0] if asked is not None and asked.stdout.split() else ""
    if not re.fullmatch(r"(8\.1[6-9]|8\.[2-9]\d|9)\S*", version):
        raise NoKernel(f"coqc is version {version or 'unknown'}: certificates need 8.16 or later")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "controllability" / f"rocq-{version}-{_hash(''.join(map(theory, THEORY)))}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in THEORY:
            if not (folder / f"{name[:-2].capitalize()}.vo").is_file():
                _compile(name, folder)
    except OSError as error:
        raise NoKernel(
            f"the compiled theory cannot be kept in {folder}: {error.strerror}; set XDG_CACHE_HOME"
        ) from None
    return f"Coq {version}", folder


def _compile(name: str, folder: Path) -> None:
    module = name[:-2].capitalize()
    with tempfile.TemporaryDirectory(prefix="theory-", dir=folder) as work:
        Path(work, f"{module}.v").write_text(theory(name), "utf-8")
        done = _coqc(["-R", ".", "Controllability", f"{module}.v"], work, TO_COMPILE)
        if done is None or done.returncode:
            told = "it took too long" if done is None else re.sub(r"\s+", " ", done.stderr)[:300]
            raise NoKernel(f"coqc does not compile the theory: {told}")
        os.replace(Path(work, f"{module}.vo"), folder / f"{module}.vo")  # whole, or not at all


def _coqc(arguments: list[str], folder: str, seconds: int) -> "subprocess.CompletedProcess[str] | None":
    """``coqc`` under limits of time and memory, nothing of the user's read; None where it took too long."""

    if resource is None:
        raise NoKernel("coqc runs under limits of time and memory, which this system does not have")
    limits = ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, seconds))
    setrlimit = resource.setrlimit

    def limit() -> None:
        for what, most in limits:
            setrlimit(what, (most, most))

    home = {"HOME": folder, "PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8"}
    try:
        return subprocess.run(
            ["coqc", "-q", *arguments], cwd=folder, env=home, preexec_fn=limit, timeout=seconds, capture_output=True,
            text=True, encoding="utf-8", errors="replace", check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    except OSError as error:
        raise NoKernel(f"coqc cannot be started: {error.strerror}") from None


def _write(path: Path, data: bytes) -> None:
    """Whole, or not at all; a cache that cannot be written is none."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        pass


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
