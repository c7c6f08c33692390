"""The Java programs of the COCO caption code, as PyPI's pycocoevalcap ships them: Stanford's tokeniser, METEOR 1.5.

pycocoevalcap's own wrappers are not used: they write into site-packages, take a Java that is missing or dies for broken
text, and pair texts with tokens by position without looking whether the numbers agree.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from crosslore_eval.errors import EvalError

INSTALL_JAVA = "Install a Java runtime, for example: apt-get install default-jre-headless"
# METEOR holds its paraphrase table in memory: 0.85 GiB were used at this limit.
METEOR_HEAP = "-Xmx1G"


class JavaError(EvalError):
    """Java is missing or failed."""


def find_java() -> str | None:
    """Return the path of the `java` program: below JAVA_HOME, else on PATH, else None."""
    home = os.environ.get("JAVA_HOME")
    candidates = [str(Path(home) / "bin" / "java")] if home else []
    return next((found for name in [*candidates, "java"] if (found := shutil.which(name))), None)


@cache
def _starts(java: str) -> bool:
    done = subprocess.run([java, "-version"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.returncode == 0


def java_runs() -> bool:
    """Return whether there is a `java` that starts; some systems have one that only says where to get Java."""
    java = find_java()
    return java is not None and _starts(java)


def _jar(folder: str, name: str) -> Path:
    """Return the path of a jar of pycocoevalcap."""
    package = find_spec("pycocoevalcap")
    places = list(package.submodule_search_locations or []) if package else []
    path = Path(places[0]) / folder / name if places else None
    if path is None or not path.is_file():
        raise EvalError(f'{name} was not found. Install it with: pip install "crosslore[eval]"')
    return path


def _run(arguments: Sequence[str], text: str, *, program: str) -> str:
    """Return what Java prints for UTF-8 text on its standard input."""
    java = find_java()
    if java is None:
        raise JavaError(f"{program} needs Java, and no `java` was found. {INSTALL_JAVA}")
    # A file rather than a pipe: Java reads what it wants, when it wants, and nothing can wait on anything.
    with tempfile.TemporaryFile() as source:
        source.write(text.encode("utf-8"))
        source.seek(0)
        done = subprocess.run(
            [java, "-Dfile.encoding=UTF-8", *arguments], stdin=source, capture_output=True, check=False
        )
    if done.returncode != 0:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise JavaError(
            f"{program} failed (exit {done.returncode}): {reason[0].rstrip('.') if reason else 'no message'}."
        )
    return done.stdout.decode("utf-8")


@cache
def punctuation() -> frozenset[str]:
    """Return the tokens that the COCO caption code drops."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    return frozenset(PUNCTUATIONS)


def ptb_tokenise(texts: Sequence[str]) -> list[str]:
    """Return each text's Penn Treebank tokens joined by spaces, lower-cased, punctuation dropped.

    Args:
        texts: without line breaks.

    Raises:
        JavaError: if Java is missing or fails.

    Source: the COCO caption code's `PTBTokenizer` around Stanford CoreNLP 3.4.1.
    """
    distinct = list(dict.fromkeys(texts))
    # Empty texts stay out, and a last line that is not empty: the program's line count is then certain.
    sent = [text for text in distinct if text]
    jar = _jar("tokenizer", "stanford-corenlp-3.4.1.jar")
    arguments = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = _run(arguments, "\n".join(sent) + "\n", program="the PTB tokeniser").split("\n")[:-1] if sent else []
    if len(lines) != len(sent):
        raise JavaError(f"the PTB tokeniser returned {len(lines)} lines for {len(sent)} texts.")
    dropped = punctuation()
    tokens = {
        text: " ".join(w for w in line.split(" ") if w and w not in dropped)
        for text, line in zip(sent, lines, strict=True)
    }
    return [tokens.get(text, "") for text in texts]


def meteor_lines(requests: Sequence[str]) -> list[str]:
    """Return METEOR 1.5's answers (English, normalised) to requests of its -stdio protocol, one line each.

    Raises:
        JavaError: if Java is missing or fails, or an answer is an error.
    """
    if not requests:
        return []
    jar = _jar("meteor", "meteor-1.5.jar")
    arguments = [METEOR_HEAP, "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    lines = _run(arguments, "\n".join(requests) + "\n", program="METEOR").split("\n")[:-1]
    bad = next((line for line in lines if line.startswith("Error")), None)
    if bad is not None:
        raise JavaError(f"METEOR: {bad}")
    return lines
