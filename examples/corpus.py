"""Real text that every machine has: the source files of the Python standard library, as bytes."""

import pathlib
import sysconfig

import numpy as np

VOCABULARY = 256  # a token is a byte


def standard_library(held_out_every: int = 10) -> tuple[np.ndarray, list[np.ndarray]]:
    """Training text, uint8[bytes], and held-out files, uint8[bytes] each: every tenth file, in order of name."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 2000)
    texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in files]
    held_out = texts[::held_out_every]
    training = [text for i, text in enumerate(texts) if i % held_out_every]
    return np.concatenate(training), held_out


def bigram_loss(training: np.ndarray, text: np.ndarray) -> float:
    """Nats per byte of a bigram model: counts of byte pairs in the training text, plus one for every pair."""
    counts = np.ones((VOCABULARY, VOCABULARY))
    np.add.at(counts, (training[:-1], training[1:]), 1)
    log_probability = np.log(counts / counts.sum(axis=1, keepdims=True))
    return float(-log_probability[text[:-1], text[1:]].mean())
